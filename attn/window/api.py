"""Attention within windows of a map: blocks of neighbouring places, or grids of places spread over the map.

Block and grid attention are those of MaxViT (arXiv:2204.01697, section 3.2); block attention with shifted windows is
Swin's (arXiv:2103.14030, section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn.common.maps import check_lse, check_numbers
from attn.common.relative import relative_position_bias
from attn.common.windows import to_windows
from attn.core.arguments import check_key, check_rank, check_rate, usable_scale
from attn.core.numerics import Edit
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.neighborhood.arguments import check_arrays, usable_bias
from attn.window.parts import PartsImplementation
from attn.window.plain import plain, same_side
from kernels.neighborhood.pattern import PerAxis, make_pattern, per_axis


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    window: tuple[int, int]
    shift: tuple[int, int]
    grid: bool
    scale: float

    @property
    def about(self) -> str:
        """As text."""
        shift = f" shift {self.shift}" if any(self.shift) else ""
        return f"{'grid' if self.grid else 'window'} {self.window}{shift}"


_MAP: Layout = ("batch", None, None, "heads", None)


def _layouts(settings: Settings, *inputs: Any) -> tuple[list[Layout | None], list[Layout | None]]:
    possible: list[Layout] = [_MAP, _MAP, _MAP, ("heads", None, None)]
    into = [None if array is None else own for array, own in zip(inputs, possible, strict=True)]
    return into, [_MAP, _MAP[:-1]]


def _results(settings: Settings, q: Any, k: Any, v: Any, *_: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
    return out, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)


WINDOW = Operator(
    "window_attention",
    (
        PartsImplementation("tpu", "attn.window.parts", platforms=("tpu",), on="tpu"),
        PartsImplementation("gpu", "attn.window.parts", platforms=("cuda",), on="cuda"),
        PartsImplementation("xla", "attn.window.parts", using="xla"),
        Implementation("windows", "attn.window.plain", plain=True),
    ),
    layouts=_layouts,
    results=_results,
    decisive=("window", "shift", "grid", "scale"),
    definition="windows",
)


def window_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X K D"],
    v: Float[Array, "B Y X K E"],
    *,
    window: PerAxis,
    grid: bool = False,
    shift: PerAxis = 0,
    bias: Float[Array, "H V U"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention between the places of each window.

    Blocks and grids are cases of neighborhood attention, whose kernels compute them: blocks are windows with a stride
    of their size, grids windows with a dilation (docs/neighborhood.md). A shift cuts the windows at the border of the
    map, and what is left there are blocks too, of other sizes.

    Args:
      window: rows and columns of a window; they divide the map. A number holds for both, here as for `shift`.
      grid: a window is not a block of neighbouring places but every (Y / rows)-th row and (X / columns)-th column.
      shift: rows and columns by which blocks begin later than the map does. The map is taken as a torus, and places
        that are neighbours only across its border do not see each other.
      bias: by relative position key - query, `2 * window - 1` entries along each axis.
      scale: of the products, a number; `D ** -0.5` unless given.
      dropout: share of the probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change `"logits"` and `"probs"` `[B, windows, H, N, N]`, windows of the map that is rolled by the shift,
        in row-major order, float32.
      return_lse: return `(out, lse)` with the logsumexp `[B, Y, X, H]`, float32, natural.
      implementation: `"tpu"`, `"gpu"`, `"xla"` (tiles, for large windows) or `"windows"`, which is the reference: dense
        products in each window; None: the best for the platform that is lowered for.

    Query head h reads key head `h // (H // K)`. Softmax and sums are in float32 whatever the inputs are; the result has
    the dtype of v.

    Raises:
      ValueError: arrays that do not belong together; a window that does not divide the map; a shift of a window or
        more, or of a grid; an unknown implementation, or one that refuses.
    """
    settings = _checked(q, k, v, window, shift, grid, scale)
    check_key(key, check_rate("dropout", dropout))
    pattern = make_pattern(settings.window, settings.window)
    bias = None if bias is None else usable_bias(bias, q.shape[-2], settings.window, pattern)
    asked = [name for name, there in {"dropout": dropout, "look at the maps": edit}.items() if there]
    found = WINDOW.run(
        (q, k, v, bias),
        settings,
        plain=functools.partial(_plain, {"dropout": dropout, "key": key, "edit": edit}),
        asked=asked,
        implementation=implementation,
        returned=1 + return_lse,
    )
    return found if return_lse else found[0]


def window_maps(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X K D"],
    lse: Float[Array, "B Y X H"],
    windows: Sequence[int] | Int[Array, " W"],
    *,
    window: PerAxis,
    grid: bool = False,
    shift: PerAxis = 0,
    bias: Float[Array, "H V U"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B W H N N"]:
    """What the places of chosen windows look at, `exp(logit - lse)` in float32, from a fused run that keeps no map.

    Args:
      lse: what `window_attention(..., return_lse=True)` gave for q and k.
      windows: numbers of windows, of the map that is rolled by the shift, in row-major order.

    Other arguments as in that call.

    Raises:
      ValueError: as `window_attention`; a logsumexp of other queries; a window that there is not.
    """
    settings = _checked(q, k, k, window, shift, grid, scale)
    check_lse(lse, q.shape[:-1])
    shape = q.shape[1:3]
    count = (shape[0] // settings.window[0]) * (shape[1] // settings.window[1])
    numbers = check_numbers("window", windows, count)
    if bias is not None:
        bias = usable_bias(bias, q.shape[-2], settings.window, make_pattern(settings.window, settings.window))

    def chosen(x: Array) -> Array:
        x = jnp.roll(x, (-settings.shift[0], -settings.shift[1]), (1, 2)) if any(settings.shift) else x
        cut = to_windows(x, settings.window, grid=grid)
        return cut.reshape(x.shape[0], count, *cut.shape[1:])[:, numbers]

    q, k = chosen(q.astype(jnp.float32)), chosen(k.astype(jnp.float32))
    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    logits = settings.scale * jnp.einsum("bwnhd,bwmhd->bwhnm", q, k, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        logits = logits + relative_position_bias(bias, settings.window)
    maps = jnp.exp(logits - jnp.swapaxes(chosen(lse), 2, 3)[..., None])
    same = same_side(shape, settings.window, settings.shift)
    return maps if same is None else jnp.where(same[numbers][:, None], maps, 0)


def _checked(q: Array, k: Array, v: Array, window: Any, shift: Any, grid: bool, scale: float | None) -> Settings:
    check_rank((5,), "batch, rows, columns, heads, head dim", q=q, k=k, v=v)
    check_arrays(q, k, v)
    shape, window, shift = q.shape[1:3], _pair("window", window, 1), _pair("shift", shift, 0)
    if any(side % size for side, size in zip(shape, window, strict=True)):
        raise ValueError(f"window {window}: does not divide a map of {tuple(shape)}")
    if any(by >= size for by, size in zip(shift, window, strict=True)):
        raise ValueError(f"shift={shift} of windows of {window}; allowed: less than a window")
    if grid and any(shift):
        raise ValueError(f"shift={shift}: a grid cannot be shifted; allowed: (0, 0)")
    return Settings(window, shift, bool(grid), usable_scale(scale, q.shape[-1]))


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Rows and columns. ValueError for what is no pair of integers from `least` on."""
    rows, columns = per_axis(name, tuple(value) if isinstance(value, Sequence) else value, 2, least)
    return rows, columns


def _plain(options: dict[str, Any], *inputs: Any, **settings: Any) -> tuple[Array, ...]:
    return plain(*inputs, **{**settings, **options})
