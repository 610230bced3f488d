"""Window attention as dense products in each window, by the compiler. Letters: W windows, N places of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.common.relative import relative_position_bias
from attn.core.numerics import Edit, dropped, edited, logsumexp, masked, product, softmax

Gradients = tuple[Array, Array, Array, Array | None]


def plain(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X K D"],
    v: Float[Array, "B Y X K E"],
    bias: Float[Array, "H V U"] | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
) -> tuple[Float[Array, "B Y X H E"], Float[Array, "B Y X H"]]:
    """Output and logsumexp; arguments as in `window_attention`."""
    shape, heads = q.shape[1:3], q.shape[3]
    queries, keys, values = (_cut(x, heads, window, shift, grid) for x in (q, k, v))
    logits = scale * product("bwhnd,bwhmd->bwhnm", queries, keys)
    if bias is not None:
        logits = logits + relative_position_bias(bias, window)
    same = same_side(shape, window, shift)
    logits = logits if same is None else masked(logits, same[:, None])
    logits = edited(edit, "logits", logits)
    # Every place sees itself, so no row is empty.
    probs = edited(edit, "probs", softmax(logits, None))
    mixed = dropped(probs, dropout, key).astype(v.dtype)
    out = product("bwhnm,bwhme->bwhne", mixed, values).astype(v.dtype)
    lse = logsumexp(logits, None)[..., None]
    return _together(out, shape, window, shift, grid), _together(lse, shape, window, shift, grid)[..., 0]


def forward(
    q: Array, k: Array, v: Array, bias: Array | None, *, window: Any, shift: Any, grid: bool, scale: float
) -> tuple[Array, Array]:
    """Output and logsumexp, for a backward pass that keeps no map."""
    return plain(q, k, v, bias, window=window, shift=shift, grid=grid, scale=scale)


def backward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array | None,
    **settings: Any,
) -> Gradients:
    """Gradients of the four arrays; maps are computed again."""

    def run(*inputs: Any) -> tuple[Array, Array]:
        return plain(*inputs, **settings)

    _, pullback = jax.vjp(run, q, k, v, bias)
    return pullback((d_out.astype(out.dtype), jnp.zeros_like(lse) if d_lse is None else d_lse))


def same_side(shape: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Bool[Array, "W N N"] | None:
    """Which places of each window of the rolled map lie on one side of the map's border; None without a shift."""
    if not any(shift):
        return None
    sides = [np.arange(n) >= n - by if by else np.zeros(n, bool) for n, by in zip(shape, shift, strict=True)]
    # The last `shift` rows of the rolled map were its first ones.
    side = (2 * sides[0][:, None] + sides[1][None, :]).astype(np.int8)
    rows, columns = window
    side = side.reshape(shape[0] // rows, rows, shape[1] // columns, columns).transpose(0, 2, 1, 3)
    of_window = jnp.asarray(side.reshape(-1, rows * columns))
    return of_window[:, :, None] == of_window[:, None, :]


def _cut(
    x: Float[Array, "B Y X K F"], heads: int, window: Sequence[int], shift: Sequence[int], grid: bool
) -> Float[Array, "B W H N F"]:
    """Windows of the rolled map, key heads repeated for their query heads.

    Heads before the places of a window make every product contiguous.
    """
    x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    x = x if x.shape[3] == heads else jnp.repeat(x, heads // x.shape[3], axis=3)
    batch, height, width, _, depth = x.shape
    down, right = height // window[0], width // window[1]
    sides = (window[0], down, window[1], right) if grid else (down, window[0], right, window[1])
    x = x.reshape(batch, *sides, heads, depth)
    x = x.transpose((0, 2, 4, 5, 1, 3, 6) if grid else (0, 1, 3, 5, 2, 4, 6))
    return x.reshape(batch, down * right, heads, window[0] * window[1], depth)


def _together(
    x: Float[Array, "B W H N F"], shape: Sequence[int], window: Sequence[int], shift: Sequence[int], grid: bool
) -> Float[Array, "B Y X H F"]:
    """Inverse of `_cut`."""
    batch, _, heads, _, depth = x.shape
    down, right = shape[0] // window[0], shape[1] // window[1]
    x = x.reshape(batch, down, right, heads, *window, depth)
    x = x.transpose((0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6))
    x = x.reshape(batch, *shape, heads, depth)
    return jnp.roll(x, tuple(shift), (1, 2)) if any(shift) else x
