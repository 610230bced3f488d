"""Problems of neighborhood attention and what every implementation of it has to give for them.

An implementation is a module with `forward`, `backward` and `refuse` (docs/neighborhood.md); the tests of each one use
`random_problem`, `check` and `mask_reading` with it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import dense_attention
from attn.neighborhood import reference
from kernels.neighborhood import oracle
from kernels.neighborhood.pattern import Pattern, make_pattern

NAMES = ("out", "lse", "dq", "dk", "dv", "d_bias", "d_extra_keys", "d_extra_values")
# Longest axis by rank: some thousand pairs of query and key, so that the oracle takes milliseconds.
LONGEST = {1: 30, 2: 9, 3: 6}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of forward and backward as NumPy arrays, rounded to their dtype."""

    seed: Any
    pattern: Pattern
    scale: float
    arguments: tuple[np.ndarray | None, ...]  # q, k, v, bias, extra_keys, extra_values
    d_out: np.ndarray
    d_lse: np.ndarray | None

    def __str__(self):
        shapes = [None if array is None else (*array.shape, array.dtype.name) for array in self.arguments]
        return f"seed {self.seed}: {self.pattern}, scale {self.scale}, {shapes}, d_lse {self.d_lse is not None}"

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray | None]:
        """The results of the oracle by name."""
        options = {"pattern": self.pattern, "scale": self.scale}
        out, lse = oracle.forward(*self.arguments, **options)
        gradients = oracle.backward(*self.arguments, out, lse, self.d_out, self.d_lse, **options)
        return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def random_pattern(random: np.random.Generator, rank: int, longest: int) -> Pattern:
    """Any legal pattern, with windows from one token to the whole axis."""
    length = random.integers(1, longest + 1, rank)
    window = random.integers(1, length + 1)
    dilation = random.integers(1, length // window + 1)
    stride = random.integers(1, window + 1)
    stride = np.where(random.random(rank) < 0.5, 1, stride)
    causal = random.random(rank) < 0.3
    return make_pattern(
        tuple(length.tolist()),
        tuple(window.tolist()),
        stride=tuple(stride.tolist()),
        dilation=tuple(dilation.tolist()),
        is_causal=tuple(causal.tolist()),
    )


def random_problem(
    seed: int,
    rank: int | None = None,
    *,
    pattern: Pattern | None = None,
    longest: int | None = None,
    dtype: Any = jnp.float32,
    heads: tuple[int, ...] = (1, 2, 4),
    head_dims: tuple[int, ...] = (1, 2, 3, 5, 8),
    bias: bool | None = None,
    extra: bool | None = None,
    d_lse: bool | None = None,
) -> Problem:
    """A problem drawn from a seed; what is None is drawn too.

    Args:
      longest: bound of the length of an axis.
      heads: choices of query heads; key heads are one of their divisors.
      head_dims: choices of the head dims of keys and of values, which are drawn independently.
      bias, extra, d_lse: with a bias, extra keys, a cotangent of the logsumexp.
    """
    random = np.random.default_rng(seed)
    rank = rank or int(random.integers(1, 4))
    drawn = random_pattern(random, rank, longest or LONGEST[rank])
    pattern = pattern or drawn
    batch, head_count = int(random.integers(1, 3)), int(random.choice(heads))
    kv_heads = int(random.choice([n for n in range(1, head_count + 1) if head_count % n == 0]))
    width, value_width = (int(random.choice(head_dims)) for _ in range(2))
    count = int(random.integers(1, 4))
    flags = random.random(3) < 0.5
    bias, extra, d_lse = (
        bool(flag) if given is None else given for flag, given in zip(flags, (bias, extra, d_lse), strict=True)
    )
    scale = float(random.choice([width**-0.5, 0.3, 1.0]))

    def normal(*shape: int, kind: Any = dtype) -> np.ndarray:
        return random.standard_normal(shape).astype(kind)

    grid = (batch, *pattern.shape)
    arguments = (
        normal(*grid, head_count, width),
        normal(*grid, kv_heads, width),
        normal(*grid, kv_heads, value_width),
        normal(head_count, *pattern.bias_shape, kind=np.float32) if bias else None,
        normal(batch, count, kv_heads, width) if extra else None,
        normal(batch, count, kv_heads, value_width) if extra else None,
    )
    d_out = normal(*grid, head_count, value_width)
    d_lse = normal(*grid, head_count, kind=np.float32) if d_lse else None
    return Problem(seed, pattern, scale, arguments, d_out, d_lse)


def sibling(problem: Problem, seed: int) -> Problem:
    """A problem with arrays of the same shapes: other numbers, strides and causal axes."""
    random = np.random.default_rng(seed)
    axes = tuple(
        dataclasses.replace(
            axis, stride=int(random.integers(1, axis.window + 1)), is_causal=bool(random.random() < 0.3)
        )
        for axis in problem.pattern.axes
    )

    def renewed(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else random.standard_normal(array.shape).astype(array.dtype)

    return dataclasses.replace(
        problem,
        seed=(problem.seed, seed),
        pattern=Pattern(axes),
        arguments=tuple(map(renewed, problem.arguments)),
        d_out=renewed(problem.d_out),
        d_lse=renewed(problem.d_lse),
    )


def run(implementation: Any, problem: Problem, *, gradients: bool = True) -> dict[str, np.ndarray | None]:
    """The results of an implementation by name; those of the forward pass only without `gradients`."""
    options = {"pattern": problem.pattern, "scale": problem.scale}

    @jax.jit
    def compute(arguments, d_out, d_lse):
        out, lse = implementation.forward(*arguments, **options)
        if not gradients:
            return out, lse
        return out, lse, *implementation.backward(*arguments, out, lse, d_out, d_lse, **options)

    # What takes everything has nothing that could refuse.
    if refuse := getattr(implementation, "refuse", None):
        refused = refuse(*problem.arguments, pattern=problem.pattern)
        assert refused is None, f"{problem}\nrefused: {refused}"
    return dict(zip(NAMES, compute(problem.arguments, problem.d_out, problem.d_lse), strict=False))


def errors(found: dict[str, Any], problem: Problem) -> dict[str, float]:
    """Largest difference from the oracle by name, relative to the largest number there (or to 1, if that is more).

    Asserts the shapes and the dtypes: those of the arguments; the logsumexp is float32.
    """
    q, k, v, bias, extra_keys, extra_values = problem.arguments
    like = dict(zip(NAMES, (v, np.zeros(0, np.float32), q, k, v, bias, extra_keys, extra_values), strict=True))
    result = {}
    for name, value in found.items():
        expected = problem.expected[name]
        assert (value is None) == (expected is None), f"{name} of {problem}"
        if expected is not None:
            assert value.shape == expected.shape, f"{name} of {problem}"
            assert value.dtype == like[name].dtype, f"{name} of {problem}"
            largest = max(1.0, np.abs(expected).max())
            result[name] = float(np.abs(np.asarray(value, np.float64) - expected).max() / largest)
    return result


def check(
    implementation: Any,
    problem: Problem,
    *,
    gradients: bool = True,
    tolerance: float = 1e-5,
    beside_dense: float | None = None,
) -> None:
    """Asserts that an implementation agrees with the oracle.

    Args:
      tolerance: for every error. In float32 rounding is far below it, and what is wrong far above.
      beside_dense: if given, an error may also be this many times what dense attention with a mask loses in the
        same dtype, and the tolerance is that of the logsumexp alone.
    """
    found = errors(run(implementation, problem, gradients=gradients), problem)
    lost = {}
    if beside_dense is not None:
        lost = errors({name: value for name, value in dense(problem).items() if name != "lse"}, problem)
    for name, error in found.items():
        # A loss of dense attention may be small by luck: it counts as half a unit in the last place at least.
        rounding = 0.5 * float(jnp.finfo(problem.arguments[0].dtype).eps)
        allowed = tolerance if name not in lost else beside_dense * max(lost[name], rounding)
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}: {problem}"  # NaN fails


def dense(problem: Problem) -> dict[str, np.ndarray | None]:
    """What attention between all tokens with a mask gives in the same dtype, by name; without a logsumexp."""
    pattern, heads = problem.pattern, problem.arguments[0].shape[-2]
    extra_keys = problem.arguments[4]
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    mask = np.pad(pattern.mask(), ((0, 0), (0, extra)), constant_values=True)
    keys, valid, relative = reference.tables(pattern)
    keys = np.where(valid, keys, pattern.tokens + extra)  # out of bounds: dropped
    rows = np.arange(pattern.tokens)[:, None]

    def attend(q, k, v, bias, extra_keys, extra_values):
        def flat(array, extra):
            tokens = array.reshape(len(array), pattern.tokens, *array.shape[-2:])
            tokens = tokens if extra is None else jnp.concatenate([tokens, extra], axis=1)
            return jnp.repeat(tokens, heads // tokens.shape[2], axis=2)

        table = None
        if bias is not None:
            near = bias.reshape(heads, -1)[:, relative]
            table = jnp.zeros((heads, *mask.shape)).at[:, rows, keys].set(near, mode="drop")[None]
        out = dense_attention(
            flat(q, None), flat(k, extra_keys), flat(v, extra_values), mask=mask, bias=table, scale=problem.scale
        )
        return out.reshape(*q.shape[:-1], -1)

    @jax.jit
    def compute(arguments, d_out):
        out, pullback = jax.vjp(attend, *arguments)
        return out, *pullback(d_out)

    assert problem.d_lse is None
    names = [name for name in NAMES if name != "lse"]
    return dict(zip(names, compute(problem.arguments, problem.d_out), strict=True))


def mask_reading(implementation: Any, pattern: Pattern, *, head_dim: int = 8) -> None:
    """Reads from an implementation which keys a query sees and which queries see a key, exactly.

    With `q = k = 0` a query weighs the keys that it sees equally. One-hot values show them in its output, and one-hot
    cotangents of the output show in the gradient of the values who saw a value (two calls; values as wide as the map).
    """
    tokens = pattern.tokens
    nothing = np.zeros((1, *pattern.shape, 1, head_dim), np.float32)
    one_hot = np.eye(tokens, dtype=np.float32).reshape(1, *pattern.shape, 1, tokens)
    problem = Problem(0, pattern, 1.0, (nothing, nothing, one_hot, None, None, None), one_hot, None)
    found = run(implementation, problem)
    mask = pattern.mask()
    weights = mask / mask.sum(axis=1, keepdims=True)
    out = np.asarray(found["out"]).reshape(tokens, tokens)
    np.testing.assert_array_equal(out > 0, mask, err_msg=f"keys seen by queries (rows): {pattern}")
    np.testing.assert_allclose(out, weights, rtol=1e-6, err_msg=str(pattern))
    # Cotangent e_i of query i adds weights[i, j] e_i to the gradient of value j: its component i tells whether i saw j.
    dv = np.asarray(found["dv"]).reshape(tokens, tokens)
    np.testing.assert_array_equal(dv > 0, mask.T, err_msg=f"queries that saw keys (rows): {pattern}")
    np.testing.assert_allclose(dv, weights.T, rtol=1e-6, err_msg=str(pattern))
