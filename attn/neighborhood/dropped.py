"""Neighborhood attention with dropout, in the tiles of `attn.neighborhood.xla`: no map of all pairs, and none is kept.

What is dropped follows from the key and from example, head and tile alone. So the backward pass draws it again, and
neither the size of blocks nor the devices of a mesh change it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from attn.core import lowering, shards
from attn.core.shards import Layout
from attn.neighborhood import xla
from attn.neighborhood.tiles import tiling
from kernels.neighborhood.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class _How:
    """What of a call is no array."""

    pattern: Pattern
    scale: float
    rate: float
    impl: str
    inputs: tuple[Layout | None, ...]
    results: tuple[Layout | None, ...]


def attend(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    *,
    pattern: Pattern,
    scale: float,
    dropout: float,
    key: PRNGKeyArray,
    layouts: tuple[Any, Any],
    message: str,
) -> tuple[Array, ...]:
    """Output and logsumexp, which dropout does not change; differentiable in reverse mode, once.

    Args:
      dropout: share of probabilities set to zero (the rest scaled up).
      layouts: of the arrays and of the results, on a mesh.
      message: of the ValueError for other derivatives.
    """
    inputs = shards.all_varying((q, k, v, bias, extra_keys, extra_values))
    inputs = lowering.guarded(inputs, message)
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    of_examples = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(q.shape[0]))
    of_heads = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_examples, jnp.arange(k.shape[-2]))
    keys = jax.random.key_data(of_heads)
    how = _How(pattern, scale, dropout, str(jax.random.key_impl(key)), *map(tuple, layouts))
    if isinstance(q.shape[0], int):
        return _attend(how, keys, *inputs)

    # A program that is exported for any batch: chunks are cut by numbers, so they have all examples.
    def of_one(*arrays: Any) -> Any:
        keys, q, k, v, *extra = jax.tree.map(lambda array: array[None], arrays)
        return jax.tree.map(lambda array: array[0], _attend(how, keys, q, k, v, inputs[3], *extra))

    return jax.vmap(of_one)(keys, *inputs[:3], *inputs[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, keys: UInt32[Array, "B K W"], *inputs: Any) -> tuple[Array, ...]:
    return _forward(how, keys, *inputs)[0]


def _forward(how: _How, keys: Array, *inputs: Any) -> tuple[tuple[Array, ...], Any]:
    def on_one_device(keys: Array, *shares: Any) -> tuple[Array, ...]:
        q, k, v, _, extra_keys, _ = shares
        tiles = tiling(q, k, v, extra_keys, how.pattern)
        return xla.forward_tiles(tiles, *shares, scale=how.scale, dropout=_dropout(how, keys))

    results = shards.on_shards(on_one_device, (keys, *inputs), (_KEYS, *how.inputs), how.results)
    results = lowering.named(results)
    return results, (keys, inputs, results)


def _backward(how: _How, kept: Any, cotangents: tuple[Array, ...]) -> tuple[Array | None, ...]:
    keys, inputs, results = kept

    def on_one_device(keys: Array, *shares: Any) -> tuple[Array | None, ...]:
        q, k, v, _, extra_keys, *_ = shares
        tiles = tiling(q, k, v, extra_keys, how.pattern)
        return xla.backward_tiles(tiles, *shares, scale=how.scale, dropout=_dropout(how, keys))

    layouts = (_KEYS, *how.inputs, *how.results, *how.results)
    return None, *shards.on_shards(on_one_device, (keys, *inputs, *results, *cotangents), layouts, how.inputs)


_attend.defvjp(_forward, _backward)

_KEYS: Layout = ("batch", "heads", None)


def _dropout(how: _How, keys: Array) -> xla.Dropout:
    return xla.Dropout(how.rate, jax.random.wrap_key_data(keys, impl=how.impl))
