"""Softmax attention of short sequences for TPUs (Pallas Mosaic): both directions.

All keys of an example lie on the chip, so a query's softmax needs no running maximum, and the backward pass computes it
again from queries and keys: nothing is kept but the inputs. Heads lie side by side, `[B, N, H * D]`, as a projection
leaves them, or queries, keys and values of all heads in one array, `[B, N, 3 * H * D]`.

Logits are `[keys, queries]`: maxima and sums run down the sublanes, a number for each query is a dense row, and the
number of keys need not be a multiple of 128. Heads that share 128 lanes are told apart by zeros in the lanes of the
others, so nothing moves across lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
      heads, depth: how many heads, and of how many lanes.
      group: heads that are worked on together, whole vectors of lanes unless all of them.
      block: queries whose logits are on the chip at a time; those that are left over come last.
      packed: queries, keys and values lie in one array. A step of the grid then takes an example, otherwise an example
        and a group of heads.
    """

    heads: int
    depth: int
    group: int
    block: int
    packed: bool = False

    @property
    def lanes(self) -> int:
        """Of a group."""
        return self.group * self.depth

    @property
    def groups(self) -> int:
        """How many."""
        return self.heads // self.group


def forward(arrays: Any, *, scale: float, plan: Plan) -> Any:
    """The output `[B, N, H * D]`.

    Args:
      arrays: `(q, k, v)`, `[B, N, H * D]` and `[B, M, H * D]`; if `plan.packed`, `(qkv, bias)`, `[B, N, 3 * H * D]` and
        `[1, 3 * H * D]`, which is added to it.
    """
    first = arrays[0]
    out = jax.ShapeDtypeStruct((*first.shape[:2], plan.heads * plan.depth), first.dtype)
    kernel = functools.partial(_forward, plan=plan, scale=scale)
    return _call(kernel, arrays, [out], plan, "short_attention_forward", products=2)[0]


def backward(arrays: Any, d_out: Any, *, scale: float, plan: Plan) -> Any:
    """Gradients of the arrays; that of the bias for each example, `[B, 1, 3 * H * D]`, float32."""
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    if plan.packed:
        results[1] = jax.ShapeDtypeStruct((arrays[0].shape[0], 1, arrays[0].shape[2]), jnp.float32)
    kernel = functools.partial(_backward, plan=plan, scale=scale)
    sums = [pltpu.VMEM((arrays[0 if plan.packed else 1].shape[1], plan.lanes), jnp.float32)] * 2
    return _call(kernel, (*arrays, d_out), results, plan, "short_attention_backward", products=5, scratch=sums)


def _call(kernel: Any, arguments: Any, results: Any, plan: Plan, name: str, *, products: int, scratch: Any = ()) -> Any:
    """One run of a kernel that takes so many products of the size of the logits."""
    examples, queries = arguments[0].shape[:2]
    keys = queries if plan.packed else arguments[1].shape[1]
    pairs = examples * plan.heads * queries * keys

    def block(array: Any) -> pl.BlockSpec:
        if len(array.shape) == 2:
            return pl.BlockSpec(array.shape, lambda example: (0, 0))
        if plan.packed:
            return pl.BlockSpec((1, *array.shape[1:]), lambda example: (example, 0, 0))
        return pl.BlockSpec((1, array.shape[1], plan.lanes), lambda example, group: (example, 0, group))

    grid = (examples,) if plan.packed else (examples, plan.groups)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[block(array) for array in arguments],
        out_specs=[block(array) for array in results],
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=["parallel" for _ in grid]),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * plan.depth,
            transcendentals=pairs,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*arguments, *results)),
        ),
        name=name,
    )(*arguments)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Queries, keys, values or outputs: the lanes of an array from `first` on.

    Attributes:
      bias: what is added to it when it is read; what is written is summed up in it.
    """

    array: Any
    first: Any = 0
    bias: Any = None

    def lanes(self, at: slice) -> Any:
        """Where lanes of a group are in the array."""
        start, size = self.first + at.start, at.stop - at.start
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)

    def read(self, at: slice, rows: Any = slice(None)) -> Any:
        """`[rows, lanes]`."""
        found = self.array[0, rows, self.lanes(at)]
        return found if self.bias is None else found + self.bias[:, self.lanes(at)]

    def write(self, value: Any, at: slice, rows: Any = slice(None)) -> None:
        """In the type of the array."""
        self.array[0, rows, self.lanes(at)] = value.astype(self.array.dtype)
        if self.bias is not None:
            self.bias[0, :, self.lanes(at)] += jnp.sum(value, axis=0, keepdims=True)


def _each_group(plan: Plan, arrays: Any, work: Callable[..., None]) -> None:
    """`work(q, k, v, out)` with the parts of each group of heads; `arrays` end with one of outputs."""
    *inputs, out = arrays
    if not plan.packed:
        work(*map(_Part, inputs), _Part(out))
        return
    width = plan.heads * plan.depth

    def one(first: Any) -> None:
        work(*(_Part(inputs[0], number * width + first, inputs[1]) for number in range(3)), _Part(out, first))

    if plan.groups == 1:
        one(0)
    else:
        pl.loop(0, plan.groups)(lambda group: one(group * plan.lanes))


@dataclasses.dataclass(frozen=True)
class _Head:
    """Where a head lies: `at`, the whole vectors of lanes of its group that it touches, and its lanes within them."""

    at: slice
    first: int
    last: int

    def own(self, x: Any) -> Any:
        """x `[N, lanes of at]` with zeros in the lanes of other heads."""
        if (self.first, self.last) == (0, x.shape[1]):
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
        return jnp.where((lane >= self.first) & (lane < self.last), x, jnp.zeros_like(x))

    def rows(self, turned: Any) -> Any:
        """Its rows `[D, M]` of a group that was turned, `[lanes, M]`."""
        return turned[self.at.start + self.first : self.at.start + self.last]


def _heads(plan: Plan) -> Iterator[_Head]:
    for begin in range(0, plan.lanes, plan.depth):
        end = begin + plan.depth
        start = begin // LANES * LANES
        stop = min(-(-end // LANES) * LANES, plan.lanes)
        yield _Head(slice(start, stop), begin - start, end - start)


def _each_block(queries: int, plan: Plan, work: Callable[[Any], None]) -> None:
    """`work(rows)` for the queries, a block at a time."""
    whole = queries // plan.block
    if whole == 1:
        work(pl.ds(0, plan.block))
    elif whole:
        pl.loop(0, whole)(lambda number: work(pl.ds(pl.multiple_of(number * plan.block, plan.block), plan.block)))
    if left := queries % plan.block:
        work(pl.ds(whole * plan.block, left))


def _product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _weights(q: Any, k: Any, scale: float) -> tuple[Any, Any]:
    """Exponentials `[M, N]` of the logits less the largest of each query, and one over their sum `[1, N]`."""
    logits = _product(k, q, (1, 1))
    if scale < 0:
        logits, scale = -logits, -scale
    largest = jnp.max(logits, axis=0, keepdims=True)
    weights = jnp.exp((logits - largest) * scale)
    return weights, 1 / jnp.sum(weights, axis=0, keepdims=True)


def _forward(*arrays: Any, plan: Plan, scale: float) -> None:
    group = slice(0, plan.lanes)

    def work(q: _Part, k: _Part, v: _Part, out: _Part) -> None:
        turned = v.read(group).T

        def block(rows: Any) -> None:
            found = []
            for head in _heads(plan):
                weights, share = _weights(head.own(q.read(head.at, rows)), k.read(head.at), scale)
                found.append(_product(head.rows(turned), weights.astype(turned.dtype), (1, 0)) * share)  # [D, N]
            out.write(jnp.concatenate(found, axis=0).T, group, rows)

        _each_block(arrays[0].shape[1], plan, block)

    _each_group(plan, arrays, work)


def _backward(*references: Any, plan: Plan, scale: float) -> None:
    *arrays, of_keys, of_values = references
    count = 2 if plan.packed else 3
    group, gradients = slice(0, plan.lanes), arrays[count + 1 :]
    if plan.packed:
        gradients[1][...] = jnp.zeros_like(gradients[1])

    def work(q: _Part, k: _Part, v: _Part, d_out: _Part) -> None:
        if plan.packed:
            d_q, d_k, d_v = (_Part(gradients[0], part.first, gradients[1]) for part in (q, k, v))
        else:
            d_q, d_k, d_v = map(_Part, gradients)
        turned = k.read(group).T
        of_keys[...] = jnp.zeros_like(of_keys)
        of_values[...] = jnp.zeros_like(of_values)

        def block(rows: Any) -> None:
            found = []
            for head in _heads(plan):
                queries, d_mixed = (head.own(part.read(head.at, rows)) for part in (q, d_out))
                weights, share = _weights(queries, k.read(head.at), scale)
                probs = weights * share
                d_probs = _product(v.read(head.at), d_mixed, (1, 1))
                inner = jnp.sum(probs * d_probs, axis=0, keepdims=True)
                d_logits = (probs * (d_probs - inner) * scale).astype(turned.dtype)
                of_values[:, head.at] += _product(probs.astype(turned.dtype), d_mixed, (1, 0))
                of_keys[:, head.at] += _product(d_logits, queries, (1, 0))
                found.append(_product(head.rows(turned), d_logits, (1, 0)))
            d_q.write(jnp.concatenate(found, axis=0).T, group, rows)

        _each_block(arrays[0].shape[1], plan, block)
        d_k.write(of_keys[...], group)
        d_v.write(of_values[...], group)

    _each_group(plan, arrays[: count + 1], work)
