"""The TPU kernels of neighborhood attention: interpreted on the CPU, and compiled by the TPU's own compiler."""

import jax
import jax.numpy as jnp
import neighborhood_cases as cases
import numpy as np
import pytest
from interpreting import interpreted
from jax.experimental import pallas as pl

from kernels.neighborhood import tpu, tpu_choice
from kernels.neighborhood.pattern import Axis, make_pattern
from kernels.neighborhood.tiles import AxisTiles
from kernels.neighborhood.tpu_bias import LOG2E, Spread, along_x, packed_table, scratch, spread
from kernels.neighborhood.tpu_plan import block_sizes, make_plan

MIB = 2**20


@pytest.mark.parametrize("seed", range(4))
def test_random_problems_agree_with_the_oracle(seed):
    problem = cases.random_problem(seed, head_dims=(8, 16, 5), heads=(1, 2, 6))
    with interpreted():
        cases.check(tpu, problem)


@pytest.mark.parametrize(
    ("shape", "options", "heads", "head_dim"),
    [
        ((6, 9), {"window": (3, 4)}, 8, 32),  # two blocks of four heads
        ((5, 8), {"window": 3, "dilation": (1, 2)}, 4, 96),  # heads that lie across a border of 128 lanes
        ((16, 16), {"window": 5}, 2, 64),  # queries read where they lie
    ],
)
def test_heads_side_by_side(shape, options, heads, head_dim, monkeypatch):
    monkeypatch.setattr(tpu_choice, "chip_memory", lambda: 6 * MIB)
    problem = cases.random_problem(
        1, pattern=make_pattern(shape, **options), heads=(heads,), head_dims=(head_dim,), bias=True, d_lse=True
    )
    with interpreted():
        cases.check(tpu, problem)


@pytest.mark.parametrize(
    ("shape", "options", "memory"),
    [((160,), {"window": 9}, 1.7), ((48, 8), {"window": (5, 3), "dilation": (2, 1)}, 2.2)],
)
def test_a_map_larger_than_the_memory_is_done_in_bands(shape, options, memory, monkeypatch):
    monkeypatch.setattr(tpu_choice, "chip_memory", lambda: int(memory * MIB))
    pattern = make_pattern(shape, **options)
    problem = cases.random_problem(3, pattern=pattern, heads=(2,), head_dims=(8,), extra=True, bias=True)
    for direction in ("forward", "backward"):
        blocks = tpu_choice.choose(pattern, 2, 8, jnp.float32, direction, bias=True, extra=3, batch=2)
        assert blocks.plan.bands > 1, direction
    with interpreted():
        cases.check(tpu, problem)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 7), {"window": (3, 4), "stride": (2, 1)}),
        ((13,), {"window": 3, "dilation": 3, "is_causal": True}),
        ((3, 4, 5), {"window": (2, 3, 3), "stride": (1, 3, 1)}),
    ],
)
def test_reads_exactly_the_pattern(shape, options):
    with interpreted():
        cases.mask_reading(tpu, make_pattern(shape, **options))


def test_bfloat16_loses_no_more_than_dense_attention_does():
    problem = cases.random_problem(
        5, pattern=make_pattern((9, 8), 3), dtype=jnp.bfloat16, heads=(2,), head_dims=(16,), d_lse=False
    )
    with interpreted():
        cases.check(tpu, problem, beside_dense=2.0, tolerance=2e-2)


def test_a_second_run_gives_the_same_bits():
    problem = cases.random_problem(2, pattern=make_pattern((7, 6), 3), bias=True, extra=True, d_lse=True)
    with interpreted():
        first, second = cases.run(tpu, problem), cases.run(tpu, problem)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_a_wrong_border_is_noticed(monkeypatch):
    """Planted: windows of the first tile begin one key late."""
    right = AxisTiles.masks.func

    def wrong(self):
        masks = right(self).copy()
        masks[0, :, 0] = False
        return masks

    monkeypatch.setattr(AxisTiles, "masks", property(wrong))
    with interpreted(), pytest.raises(AssertionError, match="is off by"):
        cases.check(tpu, cases.random_problem(2, pattern=make_pattern((6, 5), 3)))


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(60))
def test_tiles_hold_the_pattern(seed):
    """Every pair of the pattern is in exactly one tile, and no other pair is."""
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 40))
    window = int(random.integers(1, length + 1))
    dilation = int(random.integers(1, length // window + 1))
    stride = int(random.integers(1, window + 1))
    axis = Axis(length, window, stride, dilation, bool(random.random() < 0.3))
    residues = int(random.choice([n for n in range(1, dilation + 1) if dilation % n == 0]))
    tile, multiple, bands = int(random.integers(1, 9)), int(random.choice([1, 8])), int(random.integers(1, 4))
    tiles = AxisTiles(axis, tile, multiple, residues, bands)
    found = np.zeros((length + 400, length + 400), int)
    for tile in range(tiles.count):
        for key_group, key, query_group, query in zip(*tiles.masks[tiles.mask_class[tile]].nonzero(), strict=True):
            member = tiles.query_start[tile] + query, tiles.key_start[tile] + key
            group = tiles.first_group[tile] + query_group, tiles.first_group[tile] + key_group
            found[group[0] + dilation * member[0], group[1] + dilation * member[1]] += 1
    np.testing.assert_array_equal(found[:length, :length], axis.mask)
    assert found.sum() == axis.mask.sum()


def test_rows_by_tile_and_maps_are_each_other_s_reverse():
    pattern = make_pattern((9, 12), (2, 3), dilation=(2, 4))
    plan = make_plan(pattern, 4, 64, tile=(2, 8), residues=2, bands=2, block_heads=2)
    values = jnp.arange(2 * 9 * 12 * 4.0).reshape(2, 9, 12, 4) + 1
    np.testing.assert_array_equal(tpu.rows_to_map(plan, tpu.map_to_rows(plan, values), values.shape), values)


def test_the_spread_bias_is_the_table_at_every_distance():
    plan = make_plan(make_pattern((9, 7), (3, 5)), 1, 8, tile=(4, 8))
    table = jnp.arange(5 * 9.0).reshape(1, 5, 9)
    memory = scratch(plan, backward=False)
    del memory["bias_map"]
    with interpreted():
        kernel = pl.pallas_call(
            lambda *refs: spread(plan, dict(zip(("bias", "along_x", "bias_map", *memory), refs, strict=True))),
            out_shape=jax.ShapeDtypeStruct(Spread(plan).shape, jnp.float32),
            scratch_shapes=list(memory.values()),
        )
        found = np.asarray(kernel(packed_table(plan, table), along_x(plan))) / LOG2E
    y, x = plan.tiles.axes[1], plan.tiles.axes[2]
    for tile_y in range(y.count):
        for tile_x in range(x.count):
            first_y = y.offset[tile_y] - y.offset.min()
            at_x = np.unique(x.offset).tolist().index(x.offset[tile_x])
            box = found[0, at_x, 0, first_y : first_y + y.span]
            for row, key, query in np.ndindex(*box.shape):
                query_y, query_x = divmod(query, 8)
                step_y = y.offset[tile_y] + row - query_y + 2
                step_x = x.offset[tile_x] + key - query_x + 4
                if 0 <= step_y < 5 and 0 <= step_x < 9:
                    np.testing.assert_allclose(box[row, key, query], table[0, step_y, step_x], rtol=1e-6)


def test_blocks_of_heads_fill_lanes():
    assert block_sizes(12, 32) == [12, 4]
    assert block_sizes(6, 32) == [6]
    assert block_sizes(4, 128) == [4, 2, 1]
    assert block_sizes(8, 96) == [8, 4]


def test_what_does_not_fit_or_is_no_type_of_the_kernel_is_refused(monkeypatch):
    def arrays(shape, dtype):
        one = jax.ShapeDtypeStruct((1, *shape, 2, 64), dtype)
        return one, one, one, None, None, None

    pattern = make_pattern((64, 64), 7)
    assert tpu.refuse(*arrays((64, 64), jnp.bfloat16), pattern=pattern) is None
    assert "float16" in tpu.refuse(*arrays((64, 64), jnp.float16), pattern=pattern)
    monkeypatch.setattr(tpu_choice, "chip_memory", lambda: MIB // 4)
    assert "MiB on the chip" in tpu.refuse(*arrays((64, 64), jnp.bfloat16), pattern=pattern)


CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@pytest.mark.plan
@pytest.mark.parametrize("chip", CHIPS)
def test_both_kernels_compile_for_every_generation(chip):
    pytest.importorskip("libtpu")
    from benchmarks import tpu_cycles

    packed, window = "bf16[2,14,16,128]", 5
    report = tpu_cycles.measure(
        "tests.neighborhood_compiled:both_directions",
        *[packed] * 4,
        "f32[4,9,9]",
        chip=chip,
        window=window,
        dilation=[1, 2],
        heads=4,
    )
    names = [use.name for use in report.kernels]
    assert any("forward" in name for name in names), names
    assert any("backward" in name for name in names), names
    assert not report.unknown


@pytest.mark.plan
def test_float32_is_multiplied_in_full_precision():
    """Seen in the schedule: products of float32 take several passes of the matrix unit, those of bfloat16 one."""
    pytest.importorskip("libtpu")
    from benchmarks import tpu_cycles

    used = {}
    for kind in ("bf16", "f32"):
        shapes = [f"{kind}[1,16,16,128]"] * 4
        report = tpu_cycles.measure(
            "tests.neighborhood_compiled:both_directions", *shapes, "f32[2,9,9]", window=5, dilation=1, heads=2
        )
        used[kind] = {use.name.split(".")[0]: use.cost.slots["MATMUL"] for use in report.kernels}
    for name, passes in used["bf16"].items():
        assert used["f32"][name] >= 3 * passes, used
