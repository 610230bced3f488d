"""The GPU kernels of neighborhood attention, by Pallas' interpreter on the CPU, and lowered for CUDA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import neighborhood_cases
import numpy as np
import pytest
from neighborhood_cases import NAMES, check, dense, errors, mask_reading, random_problem, run

from attn import explain, neighborhood_attention
from kernels.interpreter import interpret
from kernels.neighborhood import gpu, gpu_choice, gpu_program, gpu_tiles
from kernels.neighborhood.pattern import make_pattern


class Interpreted:
    """The module under its interpreter, with tiles of its choice or others."""

    refuse = staticmethod(gpu.refuse)

    def __init__(self, **tiles):
        self.tiles = tiles

    def forward(self, *arguments, **options):
        chosen = {name: tile for name, tile in self.tiles.items() if name == "tile"}
        with interpret():
            return gpu.forward(*arguments, **options, **chosen)

    def backward(self, *arguments, **options):
        with interpret():
            return gpu.backward(*arguments, **options, **self.tiles)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_random_problems_agree_with_the_oracle(seed):
    check(Interpreted(), random_problem(seed, rank=1 + seed % 3))


PATTERNS = {
    "1-D, causal, strided": make_pattern((37,), 6, stride=4, dilation=2, is_causal=True),
    "2-D, even, dilated": make_pattern((13, 10), (4, 3), dilation=(2, 3)),
    "2-D, one group shorter": make_pattern((9, 9), 3, dilation=2, is_causal=(True, False)),
    "3-D, blocks": make_pattern((4, 6, 5), (2, 3, 2), stride=(2, 3, 1)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.smoke] if "even" in name else []) for name in PATTERNS],
)
def test_every_feature_at_once(name):
    problem = random_problem(
        7, pattern=PATTERNS[name], heads=(4,), head_dims=(24, 40), bias=True, extra=True, d_lse=True
    )
    check(Interpreted(), problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_no_more_than_dense_attention(dtype):
    pattern = make_pattern((7, 9), (3, 5), dilation=(2, 1))
    problem = random_problem(
        3, pattern=pattern, dtype=jnp.dtype(dtype), heads=(2,), head_dims=(16,), bias=True, extra=True, d_lse=False
    )
    found = errors(run(Interpreted(), problem), problem)
    lost = errors({name: value for name, value in dense(problem).items() if value is not None}, problem)
    rounding = 0.5 * float(jnp.finfo(dtype).eps)  # a loss of dense attention may be small by luck
    for name, loss in lost.items():
        assert found[name] <= 3 * max(loss, rounding), name
    assert found["lse"] <= 1e-5
    assert found.keys() == {*lost, "lse"}


@pytest.mark.parametrize("name", PATTERNS)
def test_who_sees_whom_read_from_the_results(name):
    mask_reading(Interpreted(), PATTERNS[name])


TILES = {
    "one token": gpu_choice.Tile((1, 1), 16, warps=1),
    "larger than the map": gpu_choice.Tile((16, 8), 64, warps=8),
    "uneven": gpu_choice.Tile((3, 4), 16, warps=1),
}


@pytest.mark.parametrize("name", TILES)
def test_results_do_not_depend_on_the_tile(name):
    problem = random_problem(
        5, pattern=make_pattern((9, 7), (4, 3), dilation=(2, 1)), heads=(2,), head_dims=(8,), bias=True, extra=True
    )
    check(Interpreted(tile=TILES[name], key_tile=TILES[name]), problem)


def test_a_wrong_border_is_caught(monkeypatch):
    whole = gpu_tiles.make_tiling

    def shifted(pattern, extents, *, reverse=False):
        tiling = whole(pattern, extents, reverse=reverse)
        tables = tiling.tables.copy()
        tables[tiling.axes[0].starts] += 1  # the first query looks one key too far
        return gpu_tiles.Tiling(tiling.axes, tables)

    monkeypatch.setattr(gpu_tiles, "make_tiling", shifted)
    pattern = make_pattern((12,), 5)
    with pytest.raises(AssertionError, match="keys seen by queries"):
        mask_reading(Interpreted(), pattern)
    with pytest.raises(AssertionError, match="is off by"):
        check(Interpreted(), random_problem(1, pattern=pattern))


# --- what is not looked at --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["example", "head", "dilation group"])
def test_nan_elsewhere_does_not_leak(place):
    """Tiles are filled up with tokens that do not exist, and lanes beyond a head dim: neither may be read."""
    pattern = make_pattern((6, 9), 3, dilation=(1, 2))
    random = np.random.default_rng(0)
    shape = (2, *pattern.shape, 2, 20)  # examples, map, heads, a head dim that is filled up to 32
    q, k, v, d_out = (random.standard_normal(shape).astype(np.float32) for _ in range(4))
    extra_keys, extra_values = (random.standard_normal((2, 3, 2, 20)).astype(np.float32) for _ in range(2))
    poisoned = {
        "example": (slice(1, None),),
        "head": (..., slice(1, None), slice(None)),
        "dilation group": (slice(None), slice(None), slice(1, None, 2)),
    }[place]

    def results(*arrays):
        arguments = (*arrays[:3], None, extra_keys, extra_values)
        implementation = Interpreted(tile=TILES["uneven"], key_tile=TILES["uneven"])
        return run(implementation, neighborhood_cases.Problem(0, pattern, 0.3, arguments, arrays[3], None))

    def poison(array):
        array = array.copy()
        array[poisoned] = np.nan
        return array

    clean, found = results(q, k, v, d_out), results(*map(poison, (q, k, v, d_out)))
    reached = np.zeros(shape, bool)
    reached[poisoned] = True
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(found[name][~reached], clean[name][~reached], err_msg=name)
        assert np.isnan(found[name][reached]).all(), f"{name} has no poison: the test does not see what it should"


def test_nothing_is_read_from_behind_the_arrays(monkeypatch):
    """The interpreter moves an index that is out of bounds to the border; here it reads NaN."""
    load = gpu_program.triton.load

    def poisoned_load(ref, *, mask, other):
        indexer = ref.transforms[-1]
        outside = False
        for index, length in zip(indexer.indices, indexer.shape, strict=True):
            outside |= (index < 0) | (index >= length)
        value = load(ref, mask=mask, other=other)
        return jnp.where(outside & mask, jnp.nan if value.dtype == jnp.float32 else 2**30, value)

    monkeypatch.setattr(gpu_program.triton, "load", poisoned_load)
    problem = random_problem(
        6, pattern=make_pattern((7, 6), 3), heads=(2,), head_dims=(24,), bias=True, extra=True, d_lse=True
    )
    check(Interpreted(tile=TILES["uneven"], key_tile=TILES["uneven"]), problem)


def test_the_same_bits_every_time():
    problem = random_problem(4, pattern=PATTERNS["2-D, even, dilated"], heads=(2,), bias=True, extra=True, d_lse=True)
    results = [run(Interpreted(), problem) for _ in range(2)]
    for name in NAMES:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_nothing_is_added_in_an_order_left_to_chance():
    """No atomic operation is in any of the kernels, which the interpreter would run in order."""
    jaxpr = str(jax.make_jaxpr(both(make_pattern((9, 8), 3)))(*shapes((9, 8), (3, 3), extra=2)))
    assert all(f"neighborhood_{name}" in jaxpr for name in ("forward", "dq", "dkv", "dbias", "dextra"))
    assert "atomic" not in jaxpr


# --- lowering and choice ----------------------------------------------------------------------------------------------


def shapes(shape, window, *, dtype=jnp.bfloat16, extra=0, head_dim=32):
    heads = jax.ShapeDtypeStruct((2, *shape, 4, head_dim), dtype)
    extras = jax.ShapeDtypeStruct((2, extra, 4, head_dim), dtype) if extra else None
    table = jax.ShapeDtypeStruct((4, *(2 * size - 1 for size in window)), jnp.float32) if window else None
    return heads, heads, heads, table, extras, extras


def both(pattern):
    def compute(*arguments):
        out, lse = gpu.forward(*arguments, pattern=pattern, scale=0.2)
        return gpu.backward(*arguments, out, lse, out, lse, pattern=pattern, scale=0.2)

    return compute


def described_gpu():
    """Newer versions of JAX want to know which GPU a Triton kernel is lowered for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def triton_calls(function, arguments, platform="cuda"):
    with described_gpu():
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("@__gpu$xla.gpu.triton")


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_forward_and_backward_lower_for_cuda(dtype):
    pattern = make_pattern((14, 14), 7, dilation=2)
    forward = functools.partial(gpu.forward, pattern=pattern, scale=0.2)
    arguments = shapes(pattern.shape, (), dtype=jnp.dtype(dtype))
    assert triton_calls(forward, arguments) == 1
    assert triton_calls(both(pattern), arguments) == 3
    assert triton_calls(both(pattern), shapes(pattern.shape, pattern.window, dtype=jnp.dtype(dtype), extra=3)) == 5


def test_the_interpreter_stays_inside_its_context():
    pattern = make_pattern((8,), 3)
    forward = functools.partial(gpu.forward, pattern=pattern, scale=0.2)
    arguments = shapes((8,), ())
    with interpret():
        assert triton_calls(forward, arguments) == 0
    assert triton_calls(forward, arguments) == 1


def test_float32_is_not_rounded_for_products():
    jaxpr = str(jax.make_jaxpr(both(make_pattern((9, 8), 3)))(*shapes((9, 8), (3, 3), dtype=jnp.float32, extra=2)))
    assert "Precision.HIGHEST" in jaxpr
    assert "precision=None" not in jaxpr


@pytest.mark.smoke
def test_the_public_function_runs_it_on_cuda_and_says_so():
    q, k, v, bias, _, _ = shapes((14, 14), (7, 7))
    attend = functools.partial(neighborhood_attention, window=7, dilation=2)
    assert explain(attend, q, k, v, bias=bias)["cuda"].implementation == "gpu"
    wide = jax.ShapeDtypeStruct((1, 14, 14, 1, 288), jnp.bfloat16)
    assert "head dim 288" in explain(attend, wide, wide, wide)["cuda"].refused["gpu"]

    def loss(q, k, v, bias):
        return attend(q, k, v, bias=bias).astype(jnp.float32).sum()

    assert triton_calls(loss, (q, k, v, bias)) == 1
    assert triton_calls(jax.grad(loss, argnums=(0, 1, 2, 3)), (q, k, v, bias)) == 4
    assert triton_calls(loss, (q, k, v, bias), platform="cpu") == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=jnp.float64), "dtype float64; allowed: float32, bfloat16, float16"),
        (dict(head_dim=264), "head dim 264; allowed: up to 256"),
        (dict(shape=(2**22, 8)), "2**31"),
    ],
)
def test_reasons_to_refuse(change, reason):
    shape = change.pop("shape", (8, 8))
    arguments = shapes(shape, (3, 3), **change)
    assert reason in gpu.refuse(*arguments, pattern=make_pattern(shape, 3))


def test_mixed_dtypes_are_refused():
    q, k, v, *rest = shapes((8, 8), (3, 3))
    wide = jax.ShapeDtypeStruct(v.shape, jnp.float32)
    assert "one dtype, got bfloat16, float32" in gpu.refuse(q, k, wide, *rest, pattern=make_pattern((8, 8), 3))


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_hold_every_token_once_and_boxes_all_that_is_seen(name, reverse):
    pattern = PATTERNS[name]
    tile = gpu_choice.choose(pattern, 32, 32, 2, reverse=reverse)
    for axis, extent in zip(pattern.axes, tile.extents, strict=True):
        tokens, seen = [], axis.reverse if reverse else axis.neighbors
        for group, first, low, high in gpu_tiles.cut(axis, extent, reverse):
            members = [group + axis.dilation * member for member in range(first, first + extent)]
            members = [token for token in members if token < axis.length]
            tokens += members
            union = np.unique(np.concatenate([seen(token) for token in members])) // axis.dilation
            assert (union.min(), union.max() + 1) == (low, high)
        assert sorted(tokens) == list(range(axis.length))


def test_the_choice_is_one_that_registers_hold():
    """Within the bounds found by compiling, and what one would choose by hand where that is plain."""
    for width in (16, 32, 64, 128, 256):
        for itemsize in (2, 4):
            for pattern in (*PATTERNS.values(), make_pattern((56, 56), 7), make_pattern((4096,), 255)):
                tile = gpu_choice.choose(pattern, width, width, itemsize)
                rows = gpu_tiles.make_tiling(pattern, tile.extents).rows
                assert rows <= gpu_choice.MOST_ROWS
                assert tile.warps in (1, 2, 4, 8)
    assert gpu_choice.choose(make_pattern((56, 56), 7), 32, 32, 2).extents == (8, 8)
    assert gpu_choice.choose(make_pattern((7, 7), 7), 32, 32, 2).extents == (7, 7)
