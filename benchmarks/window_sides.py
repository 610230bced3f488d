"""What `benchmarks/window_tpu.py` compiles: attention within windows with a bias, by this project and by others.

Every side takes packed projections `[B, Y, X, H * D]` and a table of biases by relative position, and returns a packed
output; where it is given the cotangent of that, the gradients of the four beside it. So each pays for the layout that
it wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.common.relative import relative_position_bias
from attn.common.windows import from_windows, to_windows
from attn.window import window_attention
from kernels.neighborhood.pattern import make_pattern

Packed = Float[Array, "B Y X HD"]
Table = Float[Array, "H V U"]


def _run(attention: Callable[..., Array], *arrays: Array, cotangents: Sequence[Packed]) -> tuple[Array, ...]:
    """The output, and where there is a cotangent the gradients."""
    if not cotangents:
        return (attention(*arrays),)
    out, backward = jax.vjp(attention, *arrays)
    return (out, *backward(cotangents[0]))


def ours(
    q: Packed,
    k: Packed,
    v: Packed,
    bias: Table,
    *cotangents: Packed,
    window: int,
    grid: bool = False,
    shift: int = 0,
    implementation: str | None = None,
    tile: Sequence[int] | None = None,
    residues: int = 1,
) -> tuple[Array, ...]:
    """`attn.window.window_attention` by what it chooses on a TPU, or neighborhood attention by `implementation`."""
    heads = bias.shape[0]

    def attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
        q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
        if implementation is None:
            out = window_attention(q, k, v, window=(window,) * 2, grid=grid, shift=(shift,) * 2, bias=bias)
        else:
            from attn.neighborhood.api import neighborhood_attention

            cut: Any = {"dilation": q.shape[1] // window} if grid else {"stride": window}
            out = neighborhood_attention(q, k, v, window=window, bias=bias, implementation=implementation, **cut)
        return out.reshape(*out.shape[:-2], -1)

    if tile is None:
        return _run(attention, q, k, v, bias, cotangents=cotangents)
    from kernels.neighborhood import tpu_choice, tuning

    with (
        mock.patch.object(tpu_choice, "candidates", return_value=[(tuple(tile), residues)]),
        mock.patch.object(tuning, "lookup", return_value=None),
    ):
        return _run(attention, q, k, v, bias, cotangents=cotangents)


def xla(
    q: Packed,
    k: Packed,
    v: Packed,
    bias: Table,
    *cotangents: Packed,
    window: int,
    grid: bool = False,
    order: str = "last",
) -> tuple[Array, ...]:
    """Windows as a batch and dense attention in each, by XLA.

    Args:
      order: where heads are in what is multiplied: `"last"`, `[windows, N, H, D]`, or `"first"`, `[windows, H, N, D]`.
    """
    heads, shape = bias.shape[0], q.shape[1:3]
    sizes = (window, window)

    def attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
        q, k, v = (to_windows(x.reshape(*x.shape[:-1], heads, -1), sizes, grid=grid) for x in (q, k, v))
        scale, axes = q.shape[-1] ** -0.5, "gqhd,gkhd"
        if order == "first":
            q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
            axes = "ghqd,ghkd"
        queries, keys = axes.split(",")
        logits = scale * jnp.einsum(f"{axes}->ghqk", q, k, preferred_element_type=jnp.float32)
        logits += relative_position_bias(bias, sizes)
        out = jnp.einsum(f"ghqk,{keys}->{queries}", jax.nn.softmax(logits).astype(v.dtype), v)
        out = out.transpose(0, 2, 1, 3) if order == "first" else out
        return from_windows(out.reshape(*out.shape[:2], -1), shape, sizes, grid=grid)

    return _run(attention, q, k, v, bias, cotangents=cotangents)


def rolled(
    q: Packed, k: Packed, v: Packed, bias: Table, *cotangents: Packed, window: int, grid: bool, shift: int
) -> tuple[Array, ...]:
    """Shifted windows as Swin's code has them, by XLA: a map that is rolled, and a mask for what met at its border."""

    def attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
        q, k, v = (x.reshape(*x.shape[:-1], bias.shape[0], -1) for x in (q, k, v))
        sizes: Any = {"window": (window,) * 2, "grid": grid, "shift": (shift,) * 2}
        out = window_attention(q, k, v, bias=bias, implementation="windows", **sizes)
        return out.reshape(*out.shape[:-2], -1)

    return _run(attention, q, k, v, bias, cotangents=cotangents)


def splash(
    q: Packed, k: Packed, v: Packed, bias: Table, *cotangents: Packed, window: int, block: int, grid: bool = False
) -> tuple[Array, ...]:
    """Splash attention with the windows as its mask, and without the bias, which it has not.

    Args:
      block: queries and keys of a block.
    """
    from benchmarks import neighborhood_sides

    cut: Any = {"dilation": q.shape[1] // window} if grid else {"stride": window}
    heads, shape = bias.shape[0], q.shape[1:3]
    pattern = make_pattern(shape, window, **cut)
    with mock.patch.object(neighborhood_sides, "make_pattern", return_value=pattern):
        options: Any = {"heads": heads, "window": window, "dilation": 1, "block_q": block, "block_kv": block}
        return neighborhood_sides.splash(q, k, v, *cotangents, **options)
