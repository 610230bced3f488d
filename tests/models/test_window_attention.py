"""Attention within windows: against float64 in NumPy, what runs where, transformations, meshes, kernels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import neighborhood_cases as cases
import numpy as np
import pytest
import simulated
from interpreting import interpreted
from lowering import lowered

from attn import explain
from attn.neighborhood import windows
from attn.window import window_attention
from kernels.neighborhood import tpu, tpu_choice
from kernels.neighborhood.pattern import Axis, make_pattern
from kernels.neighborhood.tiles import AxisTiles, is_cut, with_examples
from kernels.neighborhood.tpu_plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
SHAPE, WINDOW = (6, 8), (3, 4)
KINDS = {"block": {}, "grid": {"grid": True}, "shifted": {"shift": (1, 2)}}


def problem(batch=2, heads=2, dim=4, shape=SHAPE, window=WINDOW, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, d_out = rng.normal(size=(4, batch, *shape, heads, dim))
    bias = rng.normal(size=(heads, *(2 * size - 1 for size in window)))
    return [np.asarray(x, np.float32) for x in (q, k, v, bias)], np.asarray(d_out, np.float32)


def relations(shape, window, *, grid=False, shift=(0, 0)):
    """Which places see each other, and the displacement of those that do, from one to the other, per axis."""
    seen, displaced = np.ones((1, 1), bool), []
    for axis, (n, w, s) in enumerate(zip(shape, window, shift, strict=True)):
        place = (np.arange(n) - s) % n  # in the rolled map
        where, inside = (place % (n // w), place // (n // w)) if grid else (place // w, place % w)
        together = (where[:, None] == where) & ((np.arange(n)[:, None] < s) == (np.arange(n) < s))
        seen = np.kron(seen, together)
        ones = [np.ones((m, m), int) for m in shape]
        ones[axis] = inside - inside[:, None]
        displaced.append(np.kron(*ones))
    return seen, displaced


def in_float64(arrays, d_out, kind):
    """Output and gradients of all arrays, by matrices of all places."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in arrays)
    batch, heads, dim = q.shape[0], *q.shape[-2:]
    seen, displaced = relations(SHAPE, WINDOW, **KINDS[kind])
    entry = tuple(np.where(seen, d, 0) + w - 1 for d, w in zip(displaced, WINDOW, strict=True))
    flat = [x.reshape(batch, -1, heads, dim).transpose(0, 2, 1, 3) for x in (q, k, v, np.asarray(d_out, np.float64))]
    scale = dim**-0.5
    logits = np.where(seen, scale * flat[0] @ flat[1].swapaxes(2, 3) + bias[:, *entry], -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = flat[3] @ flat[2].swapaxes(2, 3)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_bias = np.zeros_like(bias)
    for head in range(heads):
        np.add.at(d_bias[head], entry, d_logits[:, head].sum(0))
    found = (
        weights @ flat[2],
        scale * d_logits @ flat[1],
        scale * d_logits.swapaxes(2, 3) @ flat[0],
        weights.swapaxes(2, 3) @ flat[3],
    )
    return *(x.transpose(0, 2, 1, 3).reshape(q.shape) for x in found), d_bias


def attend(kind, **options):
    return lambda *arrays: window_attention(*arrays[:3], window=WINDOW, bias=arrays[3], **KINDS[kind], **options)


def with_gradients(function, arrays, d_out):
    out, pull = jax.vjp(function, *arrays)
    return out, *pull(d_out)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_float64(kind):
    arrays, d_out = problem()
    found = jax.jit(lambda *given: with_gradients(attend(kind), given, d_out))(*arrays)
    for name, one, other in zip(("out", "q", "k", "v", "bias"), found, in_float64(arrays, d_out, kind), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_explained_is_what_is_lowered(kind):
    arrays, d_out = problem(batch=1)
    (call,) = explain(attend(kind), *arrays).calls
    assert call.operator == "window_attention"
    names = {platform: choice.implementation for platform, choice in call.choices.items()}
    assert names == {"cpu": "windows", "tpu": "tpu", "cuda": "gpu"}
    # A shift of (1, 2) leaves windows of 1, 3 and 2 rows, and of 2, 4 and again 2 columns, each forward and backward.
    kernels = 2 * (9 if kind == "shifted" else 1)
    for platform in ("cpu", "tpu"):
        text = lowered(lambda *given: with_gradients(attend(kind), given, d_out), platform, *arrays)
        assert text.count("tpu_custom_call") == (kernels if platform == "tpu" else 0), platform


@pytest.mark.parametrize("kind", ["block", "shifted"])
@pytest.mark.parametrize("options", [{"edit": lambda site, value: value}, {"dropout": 0.5}])
def test_edits_and_dropout_take_the_path_that_has_the_map(options, kind):
    arrays, _ = problem(batch=1)
    if "dropout" in options:
        options = {**options, "key": jax.random.key(0)}
    call = explain(attend(kind, **options), *arrays).calls[0]
    assert (call.operator, call.choices["tpu"].implementation) == ("window_attention", "windows")
    out = attend(kind, **options)(*arrays)
    assert np.allclose(out, attend(kind)(*arrays), atol=1e-5) == ("edit" in options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_axis_is_more_examples(kind):
    pairs = [problem(seed=seed)[0] for seed in range(3)]
    bias = pairs[0][3]
    together = [np.stack([given[which] for given in pairs]) for which in range(3)]
    mapped = jax.vmap(attend(kind), in_axes=(0, 0, 0, None))(*together, bias)
    for one, (q, k, v, _) in zip(mapped, pairs, strict=True):
        np.testing.assert_allclose(one, attend(kind)(q, k, v, bias), atol=1e-6)


def test_the_program_does_not_grow_with_the_map():
    def operations(side):
        arrays, d_out = problem(batch=1, shape=(side, side), window=(7, 7))
        run = lambda *given: window_attention(*given[:3], window=(7, 7), bias=given[3])  # noqa: E731
        text = str(jax.make_jaxpr(lambda *given: with_gradients(run, given, d_out))(*arrays))
        return text.count(" = ")

    assert operations(56) <= operations(14) + 10  # a map may take another tile


# --- the implementation by XLA ----------------------------------------------------------------------------------------

CUTS = [
    ((6, 9), {"window": 3, "stride": 3}),
    ((6, 9), {"window": 3, "dilation": (2, 3)}),
    ((8,), {"window": 2, "stride": 2, "dilation": 2}),
    ((4, 4, 6), {"window": (2, 4, 3), "stride": (2, 1, 3)}),
]


@pytest.mark.parametrize(("shape", "options"), CUTS)
def test_windows_agree_with_the_oracle(shape, options):
    pattern = make_pattern(shape, **options)
    for seed in range(2):
        cases.check(windows, cases.random_problem(seed, pattern=pattern, extra=False))


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((6, 6), {"window": 3}, "cut the map"),
        ((7, 6), {"window": 3, "stride": 3}, "cut the map"),
        ((7, 6), {"window": 3, "dilation": 2}, "cut the map"),
        ((6, 6), {"window": 3, "stride": 3, "is_causal": True}, "cut the map"),
        ((64, 64), {"window": 32, "stride": 32}, "windows of 1024 tokens"),
    ],
)
def test_other_patterns_are_left_to_others(shape, options, reason):
    pattern = make_pattern(shape, **options)
    assert reason in windows.unprofitable(None, None, None, pattern=pattern)
    refused = windows.refuse(None, None, None, pattern=pattern)
    assert refused is None if reason != "cut the map" else reason in refused


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("blocks", "window", "dilation", "residues"), [(4, 7, 1, 2), (3, 5, 4, 2), (1, 6, 1, 1)])
def test_tiles_take_whole_blocks(blocks, window, dilation, residues):
    """Every pair of the pattern is in exactly one tile, and no other pair is."""
    axis = Axis(blocks * window * dilation, window, window, dilation)
    tiles = AxisTiles(axis, 8, 8, residues, by_block=True)
    found = np.zeros((2 * axis.length, 2 * axis.length), int)
    for tile in range(tiles.count):
        for key_group, key, query_group, query in zip(*tiles.masks[tiles.mask_class[tile]].nonzero(), strict=True):
            start = tiles.group_start(tiles.first_group[tile])
            at = [start + tiles.apart * g + tiles.step * m for g, m in ((query_group, query), (key_group, key))]
            found[tuple(at)] += 1
    np.testing.assert_array_equal(found[: axis.length, : axis.length], axis.mask)
    assert found.sum() == axis.mask.sum()
    assert tiles.count == blocks * dilation // residues


@pytest.mark.parametrize(
    ("shape", "options", "examples"),
    [((4, 10), {"window": (2, 5), "stride": (2, 5)}, 1), ((2, 10), {"window": (2, 5), "stride": (2, 5)}, 4)],
)
def test_rows_by_tile_and_maps_are_each_other_s_reverse(shape, options, examples):
    pattern = make_pattern(shape, **options)
    pattern = pattern if examples == 1 else with_examples(pattern, examples)
    assert is_cut(pattern)
    plan = make_plan(pattern, 2, 64, tile=(2, 8), residues=2, examples=examples)
    values = jnp.arange(float(8 * np.prod(shape) * 2)).reshape(8, *shape, 2) + 1
    np.testing.assert_array_equal(tpu.rows_to_map(plan, tpu.map_to_rows(plan, values), values.shape), values)


@pytest.mark.parametrize(
    ("shape", "options", "batch"),
    [
        ((4, 10), {"window": (2, 5), "stride": (2, 5)}, 1),  # blocks side by side in a tile
        ((2, 10), {"window": (2, 5), "stride": (2, 5)}, 8),  # the same with examples side by side
        ((4, 6), {"window": (2, 3), "dilation": 2}, 8),
    ],
)
def test_the_kernels_agree_with_the_oracle(shape, options, batch):
    given = cases.random_problem(
        1, pattern=make_pattern(shape, **options), heads=(2,), head_dims=(8,), bias=True, extra=False, d_lse=False
    )
    rng = np.random.default_rng(2)

    def more(array):
        return rng.normal(size=(batch, *array.shape[1:])).astype(array.dtype)

    q, k, v, bias = given.arguments[:4]
    given = cases.dataclasses.replace(
        given, arguments=(more(q), more(k), more(v), bias, None, None), d_out=more(given.d_out)
    )
    plan = tpu_choice.choose(given.pattern, 2, 8, jnp.float32, "backward", bias=True, batch=batch).plan
    assert plan.examples == batch
    assert plan.recomputes
    with interpreted():
        cases.check(tpu, given)


@pytest.mark.plan
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_windows_of_a_batch_compile_without_a_copy(chip):
    """Forward and backward are two kernels; XLA, which lays out a batch of small maps in its own way, adds little."""
    pytest.importorskip("libtpu")
    from benchmarks import tpu_cycles

    packed = ["bf16[8,14,14,128]"] * 3
    report = tpu_cycles.measure(
        "benchmarks.window_sides:ours", *packed, "f32[4,13,13]", packed[0], chip=chip, window=7, grid=False
    )
    assert len(report.kernels) == 2
    assert not report.unknown
    assert report.xla_cycles < 0.2 * report.figure


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_devices_exchange_the_gradient_of_the_bias_and_nothing_else():
    """On 2 x 2 x 2 devices: the results of one."""
    for kind, result in simulated.run(8, ROOT / "tests" / "window_mesh_job.py").items():
        assert result["difference"] < 1e-5, kind
        # The whole table, once, however many parts a shift cuts the map into.
        assert result["exchanged"] == [["all-reduce", [2, 5, 7]]], kind
        assert result["share"] == "float32[2,6,8,2,8]", kind
