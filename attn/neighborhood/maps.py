"""Attention maps of chosen queries, computed again from a fused run that keeps no map."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attn.common.maps import check_lse, check_places
from attn.core.arguments import usable_scale
from attn.neighborhood.arguments import check_arrays, usable_bias
from kernels.neighborhood.pattern import PerAxis, make_pattern


def neighborhood_maps(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    lse: Float[Array, "B *S H"],
    *,
    queries: Int[Array | np.ndarray, "Q R"],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    bias: Float[Array, "H ..."] | None = None,
    extra_keys: Float[Array, "B M K D"] | None = None,
    on_oversize: str = "error",
) -> Float[Array, "B Q H *S"] | tuple[Float[Array, "B Q H *S"], Float[Array, "B Q H M"]]:
    """What chosen queries of `neighborhood_attention` look at: `exp(logit(i, j) - lse_i)`, float32.

    Costs as much as dense attention of the chosen queries, whatever the window is.

    Args:
      lse: as `neighborhood_attention(..., return_lse=True)` gives it; the other arguments are those of that call.
      queries: coordinates of the queries on the map, one row for each; R axes.

    Returns:
      A map over all keys for each query, 0 outside its window; with extra keys also the shares of these. The two
      together sum to 1.

    Raises:
      ValueError: as `neighborhood_attention`, and for queries that are not on the map.
    """
    check_arrays(q, k, k, extra_keys, extra_keys)
    pattern = make_pattern(
        q.shape[1:-2], window, stride=stride, dilation=dilation, is_causal=is_causal, on_oversize=on_oversize
    )
    scale = usable_scale(scale, q.shape[-1])
    shape, rank = pattern.shape, len(pattern.shape)
    check_lse(lse, q.shape[:-1])
    places = check_places(queries, shape)
    batch, kv_heads = q.shape[0], k.shape[-2]
    chosen = (
        q[:, *places].astype(jnp.float32).reshape(batch, len(places[0]), kv_heads, q.shape[-2] // kv_heads, q.shape[-1])
    )
    totals = lse[:, *places]

    def logits(keys: Float[Array, "B *N K D"]) -> Float[Array, "B Q H *N"]:
        flat = keys.astype(jnp.float32).reshape(batch, math.prod(keys.shape[1:-2]), *keys.shape[-2:])
        products = jnp.einsum("bqhgd,bnhd->bqhgn", chosen, flat, precision=jax.lax.Precision.HIGHEST)
        return scale * products.reshape(*totals.shape, *keys.shape[1:-2])

    near = logits(k)
    seen = jnp.ones((1,) * (rank + 1), bool)
    relative = []
    for number, (axis, place) in enumerate(zip(pattern.axes, places, strict=True)):
        others = [1 + other for other in range(rank) if other != number]
        seen &= jnp.expand_dims(jnp.asarray(axis.mask)[place], others)
        member = jnp.arange(axis.length) // axis.dilation
        displacement = member - member[place][:, None] + axis.window - 1
        relative.append(jnp.expand_dims(jnp.clip(displacement, 0, 2 * axis.window - 2), others))
    if bias is not None:
        table = usable_bias(bias, q.shape[-2], window, pattern)
        near += jnp.moveaxis(table[:, *relative], 0, 1)
    maps = jnp.exp(jnp.where(seen[:, None], near - totals.reshape(*totals.shape, *[1] * rank), -jnp.inf))
    if extra_keys is None:
        return maps
    return maps, jnp.exp(logits(extra_keys) - totals[..., None])
