"""Attention within windows of a map: blocks of neighbouring places, or grids of places spread over the map.

Block and grid attention are those of MaxViT (arXiv:2204.01697, section 3.2); block attention with shifted windows is
Swin's (arXiv:2103.14030, section 3.2). Both of MaxViT's are cases of neighborhood attention and run by what implements
that: blocks are windows with a stride of their size, grids windows with a dilation (docs/neighborhood.md). A shift cuts
the windows at the border of the map, and what is left there are blocks too, of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.common.relative import relative_position_bias
from attn.common.windows import from_windows, to_windows
from attn.dense.api import Hook, dense_attention
from attn.neighborhood.api import neighborhood_attention
from attn.neighborhood.arguments import DTYPES


def window_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    *,
    window: tuple[int, int],
    grid: bool = False,
    shift: tuple[int, int] = (0, 0),
    bias: Float[Array, "H V U"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B Y X H E"]:
    """Softmax attention between the places of each window.

    Without dropout and a hook this is `neighborhood_attention`, by a kernel where there is one, differentiable in
    reverse mode and once; else dense attention in each window. `attn.explain` says which. Shifted windows are up to
    nine of these, since the border cuts off windows of other sizes on every side.

    Args:
      window: rows and columns of a window; they divide the map.
      grid: a window is not a block of neighbouring places but every (Y / rows)-th row and (X / columns)-th column.
      shift: rows and columns by which blocks begin later than the map does. The map is taken as a torus, and places
        that are neighbours only across its border do not see each other.
      bias: by relative position key - query, `2 * window - 1` entries along each axis.
      scale: a number; `D ** -0.5` unless given.
      dropout, key, hook, layer: as in `dense_attention`; the hook sees windows as a batch `[B * windows, N, H, D]`.
      implementation: `"windows"` for dense attention in each window whatever else there is, or one of
        `neighborhood_attention`, where that computes it.

    Raises:
      ValueError: a window that does not divide the map; a shifted grid.
    """
    shape = q.shape[1:3]
    if any(side % size for side, size in zip(shape, window, strict=True)):
        raise ValueError(f"window {tuple(window)}: does not divide a map of {shape}")
    if grid and any(shift):
        raise ValueError(f"shift={tuple(shift)}: a grid cannot be shifted; allowed: (0, 0)")
    one = hook is None and not dropout and _is_fit(q, k, v) and implementation != "windows"
    if one and any(shift):
        return _shifted(q, k, v, window, shift, bias, scale=scale, implementation=implementation)
    if one:
        cut: Any = {"dilation": tuple(side // size for side, size in zip(shape, window, strict=True))}
        cut = cut if grid else {"stride": tuple(window)}
        cut["implementation"] = implementation
        return neighborhood_attention(q, k, v, window=tuple(window), bias=bias, scale=scale, **cut)
    if any(shift):
        q, k, v = (jnp.roll(x, (-shift[0], -shift[1]), (1, 2)) for x in (q, k, v))
    heads = dense_attention(
        *(to_windows(x, window, grid=grid) for x in (q, k, v)),
        mask=_same_side(shape, window, shift, q.shape[0]) if any(shift) else None,
        bias=None if bias is None else relative_position_bias(bias, window)[None],
        scale=scale,
        dropout=dropout,
        key=key,
        hook=hook,
        layer=layer,
    )
    out = from_windows(heads, shape, window, grid=grid)
    return jnp.roll(out, shift, (1, 2)) if any(shift) else out


class _Stretch(NamedTuple):
    """Part of an axis that is cut into windows of one size."""

    begin: int
    end: int
    window: int


def _stretches(length: int, window: int, shift: int) -> Iterator[_Stretch]:
    """What blocks that begin `shift` later leave of an axis: a part of a window, whole ones, the rest of the first."""
    before, after = shift % window, -shift % window
    for one in (_Stretch(0, before, before), _Stretch(before, length - after, window)):
        if one.begin < one.end:
            yield one
    if after:
        yield _Stretch(length - after, length, after)


def _shifted(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    window: Sequence[int],
    shift: Sequence[int],
    bias: Float[Array, "H V U"] | None,
    **options: Any,
) -> Float[Array, "B Y X H E"]:
    """Shifted windows with neither torus nor mask: block attention in the middle, on the sides and in the corners."""
    heads = q.shape[3]
    # Cut with features in one axis: a TPU stores the last two in tiles, and heads would fill a part of each.
    q, k, v = (x.reshape(*x.shape[:3], -1) for x in (q, k, v))
    rows = []
    for down in _stretches(q.shape[1], window[0], shift[0]):
        row = []
        for right in _stretches(q.shape[2], window[1], shift[1]):
            parts = (x[:, down.begin : down.end, right.begin : right.end] for x in (q, k, v))
            parts = (x.reshape(*x.shape[:3], heads, -1) for x in parts)
            sizes = (down.window, right.window)
            out = window_attention(*parts, window=sizes, bias=_of_middle(bias, window, sizes), **options)
            row.append(out.reshape(*out.shape[:3], -1))
        rows.append(jnp.concatenate(row, 2))
    out = jnp.concatenate(rows, 1)
    return out.reshape(*out.shape[:3], heads, -1)


def _of_middle(
    bias: Float[Array, "H V U"] | None, window: Sequence[int], smaller: Sequence[int]
) -> Float[Array, "H v u"] | None:
    """What of a table of biases by relative position windows of a smaller size need."""
    if bias is None:
        return None
    rows, columns = (slice(whole - part, whole + part - 1) for whole, part in zip(window, smaller, strict=True))
    return bias[:, rows, columns]


def _is_fit(*arrays: Array) -> bool:
    """Whether neighborhood attention takes arrays of these dtypes."""
    dtypes = {str(array.dtype) for array in arrays}
    return len(dtypes) == 1 and dtypes <= set(DTYPES)


def _same_side(shape: Sequence[int], window: Sequence[int], shift: Sequence[int], batch: int) -> Bool[Array, "G 1 N N"]:
    """Which places of a window of the rolled map lie on one side of the map's border, for all examples."""
    sides = [np.arange(n) >= n - by if by else np.zeros(n, bool) for n, by in zip(shape, shift, strict=True)]
    # The last `shift` rows of the rolled map were its first ones.
    side = 2 * sides[0][:, None] + sides[1][None, :]
    rows, columns = window
    side = side.reshape(shape[0] // rows, rows, shape[1] // columns, columns).transpose(0, 2, 1, 3)
    side = side.reshape(-1, rows * columns)
    same = (side[:, :, None] == side[:, None, :])[:, None]
    # By JAX, since the batch of an exported program need not be a number.
    return jnp.broadcast_to(same, (batch, *same.shape)).reshape(-1, *same.shape[1:])
