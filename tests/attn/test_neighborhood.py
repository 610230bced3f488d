"""The reference and the XLA path of neighborhood attention against the oracle, and what they need of memory."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import neighborhood_cases as cases
import numpy as np
import pytest

from attn import neighborhood_attention
from attn.neighborhood import dense, reference, tiles, xla
from attn.neighborhood.axis_tiles import axis_tiles
from kernels.neighborhood import oracle
from kernels.neighborhood.pattern import make_pattern

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "dense": dense}
each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def test_oracle_differentiates_itself():
    """Central differences along a random direction, in float64."""
    problem = cases.random_problem(3, 2, longest=5, bias=True, extra=True, d_lse=True)
    options = {"pattern": problem.pattern, "scale": problem.scale}
    random = np.random.default_rng(0)
    arrays = [np.asarray(array, np.float64) for array in problem.arguments]

    def value(arrays):
        out, lse = oracle.forward(*arrays, **options)
        return (out * problem.d_out).sum() + (lse * problem.d_lse).sum()

    gradients = oracle.backward(*arrays, *oracle.forward(*arrays, **options), problem.d_out, problem.d_lse, **options)
    for position, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ahead, behind = (
            [array + step * direction if position == number else array for number, array in enumerate(arrays)]
            for step in (1e-5, -1e-5)
        )
        slope = (value(ahead) - value(behind)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


@pytest.mark.smoke
@each_implementation
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_problem(name, rank):
    cases.check(IMPLEMENTATIONS[name], cases.random_problem(rank, rank, bias=rank != 1, extra=rank != 3, d_lse=True))


# --- a thousand random problems ---------------------------------------------------------------------------------------


def same_shapes(tilings):
    """Tilings of one map whose tables have the same shapes: halos get keys that no query sees, kinds are repeated."""

    def pad(axis, halo, kinds):
        more_keys, more_kinds = halo - axis.keys.shape[1], kinds - len(axis.seen)
        table = ((0, more_kinds), (0, 0), (0, more_keys))
        return dataclasses.replace(
            axis,
            keys=np.pad(axis.keys, ((0, 0), (0, more_keys)), mode="edge"),
            seen=np.pad(axis.seen, table),
            relative=np.pad(axis.relative, table),
        )

    by_axis = list(zip(*(tiling.axes for tiling in tilings), strict=True))
    halos = [max(axis.keys.shape[1] for axis in axes) for axes in by_axis]
    kinds = [max(len(axis.seen) for axis in axes) for axes in by_axis]
    return [dataclasses.replace(tiling, axes=tuple(map(pad, tiling.axes, halos, kinds))) for tiling in tilings]


@pytest.mark.parametrize("seed", range(42))
def test_many_problems(seed, monkeypatch):
    """25 problems of one shape by one compiled program (the pattern is in tables), any tile, and blocks of any size."""
    first = cases.random_problem(seed, 1 + seed % 3)
    problems = [cases.sibling(first, number) for number in range(25)]
    random = np.random.default_rng(seed)
    size = [int(random.integers(1, -(-axis.length // axis.dilation) + 1)) for axis in first.pattern.axes]
    monkeypatch.setattr(tiles, "BLOCK", int(random.choice([1, 100, 2000, 2**17])))
    q, k, v, _, extra_keys, _ = first.arguments
    usual = tiles.tiling(q, k, v, extra_keys, first.pattern)
    tilings = same_shapes(
        [dataclasses.replace(usual, axes=tuple(map(axis_tiles, problem.pattern.axes, size))) for problem in problems]
    )

    @jax.jit
    def compute(tiling, arguments, d_out, d_lse):
        out, lse = xla.forward_tiles(tiling, *arguments, scale=first.scale)
        gradients = xla.backward_tiles(tiling, *arguments, out, lse, d_out, d_lse, scale=first.scale)
        return out, lse, *gradients

    for problem, tiling in zip(problems, tilings, strict=True):
        found = compute(tiling, problem.arguments, problem.d_out, problem.d_lse)
        for name, error in cases.errors(dict(zip(cases.NAMES, found, strict=True)), problem).items():
            assert error < 1e-5, f"{name} is off by {error}: {problem}, tile {size}"
    assert compute._cache_size() == 1


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_more_is_lost_than_by_dense_attention(dtype, seed):
    problem = cases.random_problem(seed, 2, dtype=dtype, head_dims=(32,), bias=bool(seed % 2), extra=True, d_lse=False)
    cases.check(xla, problem, beside_dense=3)


@each_implementation
def test_runs_agree_bit_for_bit(name):
    problem = cases.random_problem(5, 2, bias=True, extra=True)
    first, second = (cases.run(IMPLEMENTATIONS[name], problem) for _ in range(2))
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


# --- sets, read without a tolerance -----------------------------------------------------------------------------------

READ = [
    make_pattern((23,), 5, stride=3, dilation=2),
    make_pattern((9, 11), (3, 4), stride=(2, 1), dilation=(2, 1), is_causal=(False, True)),
    make_pattern((4, 5, 6), (2, 5, 3), stride=(2, 3, 1), dilation=(2, 1, 2), is_causal=(True, False, False)),
]


@each_implementation
@pytest.mark.parametrize("pattern", READ, ids=lambda pattern: f"{len(pattern.axes)}d")
def test_masks_are_read_back(name, pattern):
    cases.mask_reading(IMPLEMENTATIONS[name], pattern)


def test_a_wrong_border_is_caught(monkeypatch):
    """A window that is cut off at the border instead of sliding inwards: right everywhere but there."""
    pattern = make_pattern((12, 9), 3)

    def cut_off(axis, size):
        tiles = axis_tiles(axis, size)
        distance = np.abs(tiles.relative - (axis.window - 1))
        return dataclasses.replace(tiles, seen=tiles.seen & (distance <= axis.window // 2))

    cases.mask_reading(xla, pattern)
    monkeypatch.setattr(tiles, "axis_tiles", cut_off)
    with pytest.raises(AssertionError, match="keys seen by queries"):
        cases.mask_reading(xla, pattern)
    with pytest.raises(AssertionError, match="is off by"):
        cases.check(xla, cases.random_problem(0, pattern=pattern), gradients=False)


# --- memory -----------------------------------------------------------------------------------------------------------


def largest_array(jaxpr):
    """Elements of the largest array that a jaxpr makes, inside loops and calls too."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(math.prod(variable.aval.shape) for variable in equation.outvars)])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


def largest_of(implementation, pattern, heads=4, width=32, batch=2):
    """Elements of the largest array in forward and in backward, over those of q."""
    grid = (batch, *pattern.shape, heads)
    q = jax.ShapeDtypeStruct((*grid, width), jnp.float32)
    lse = jax.ShapeDtypeStruct(grid, jnp.float32)
    bias = jax.ShapeDtypeStruct((heads, *pattern.bias_shape), jnp.float32)
    options = {"pattern": pattern, "scale": 1.0}
    forward = jax.make_jaxpr(functools.partial(implementation.forward, **options))(q, q, q, bias, None, None)
    backward = jax.make_jaxpr(functools.partial(implementation.backward, **options))(
        q, q, q, bias, None, None, q, lse, q, lse
    )
    return tuple(largest_array(program.jaxpr) / math.prod(q.shape) for program in (forward, backward))


@pytest.mark.parametrize(
    "pattern",
    [
        make_pattern((56, 56), 7),
        make_pattern((56, 56), 7, dilation=8),
        make_pattern((64, 64), 13, is_causal=True),
        make_pattern((64, 64), 8, stride=8),
        make_pattern((8192,), 255),
        make_pattern((16, 32, 32), 5),
    ],
    ids=lambda pattern: f"{len(pattern.axes)}d-window{pattern.window[0]}-dilation{pattern.axes[0].dilation}",
)
def test_no_array_is_larger_than_the_arguments(pattern):
    """In jaxprs, forward and backward, loops included: the window does not show, halos and logits are of one block."""
    assert max(largest_of(xla, pattern)) <= 1.05
    # The same count finds the window in an implementation that gathers it.
    assert min(largest_of(reference, pattern)) >= math.prod(pattern.window)


# --- patterns of other models -----------------------------------------------------------------------------------------


def partition(shape, block, is_grid=False):
    """Flat tokens of each block `[blocks, tokens]`; of a grid: those at the same place of every block."""
    rank = len(shape)
    split = [extent for length, size in zip(shape, block, strict=True) for extent in (length // size, size)]
    tokens = np.arange(math.prod(shape)).reshape(split)
    outer, inner = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    first, second = (inner, outer) if is_grid else (outer, inner)
    sets = tokens.transpose(*first, *second)
    return sets.reshape(math.prod(sets.shape[:rank]), -1)


def within(sets, q, k, v, is_causal=False):
    """Dense attention inside each of these sets of tokens, one head, `[N, D]`."""
    out = np.zeros_like(q)
    for tokens in sets:
        logits = q[tokens] @ k[tokens].T * q.shape[-1] ** -0.5
        if is_causal:
            logits = np.where(np.tri(len(tokens), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[tokens] = weights / weights.sum(axis=1, keepdims=True) @ v[tokens]
    return out


def sliding(window):
    """Each token with the `window - 1` before it: sets of which only the last token counts, in order."""

    def attend(q, k, v):
        return np.stack([within([np.arange(max(0, i - window + 1), i + 1)], q, k, v)[i] for i in range(len(q))])

    return attend


MAP = (6, 8)
EQUIVALENT = {
    "window attention": (MAP, {"window": (3, 4), "stride": (3, 4)}, functools.partial(within, partition(MAP, (3, 4)))),
    "grid attention": (
        MAP,
        {"window": (3, 4), "dilation": (2, 2)},
        functools.partial(within, partition(MAP, (2, 2), is_grid=True)),
    ),
    "long-distance attention": (
        MAP,
        {"window": (2, 4), "dilation": (3, 2)},
        functools.partial(within, partition(MAP, (3, 2), is_grid=True)),
    ),
    "row attention": (MAP, {"window": (1, 8)}, functools.partial(within, partition(MAP, (1, 8)))),
    "column attention": (MAP, {"window": (6, 1)}, functools.partial(within, partition(MAP, (6, 1)))),
    "frame by frame": ((2, 3, 4), {"window": (1, 3, 4)}, functools.partial(within, partition((2, 3, 4), (1, 3, 4)))),
    "global attention": (MAP, {"window": MAP}, functools.partial(within, [np.arange(48)])),
    "causal attention": (
        (12,),
        {"window": 12, "is_causal": True},
        functools.partial(within, [np.arange(12)], is_causal=True),
    ),
    "causal sliding window": ((12,), {"window": 5, "is_causal": True}, sliding(5)),
    "block-causal attention": (
        (12,),
        {"window": 4, "stride": 4, "is_causal": True},
        functools.partial(within, partition((12,), (4,)), is_causal=True),
    ),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_patterns_of_other_models_are_cases(name):
    shape, options, plain = EQUIVALENT[name]
    random = np.random.default_rng(0)
    q, k, v = random.standard_normal((3, math.prod(shape), 4)).astype(np.float32)
    found = jax.jit(functools.partial(neighborhood_attention, **options))(
        *(array.reshape(1, *shape, 1, 4) for array in (q, k, v))
    )
    np.testing.assert_allclose(np.asarray(found).reshape(v.shape), plain(q, k, v), atol=2e-6)


def test_the_page_has_a_row_for_each_of_them():
    page = (Path(__file__).resolve().parents[2] / "docs" / "neighborhood.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert set(EQUIVALENT) <= {row.split(" (")[0] for row in rows}
