"""Outlook attention: the centre of a window says, without keys, how the places of the window are mixed (VOLO).

Yuan et al. 2021, arXiv:2106.13112, section 3.1 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from attn.common.maps import check_lse
from attn.core.arguments import check_counts, check_dtypes, check_key, check_rank, check_rate, number_or_array
from attn.core.numerics import Edit, edited
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.outlook.xla import plain


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    window: int
    stride: int
    scale: float

    @property
    def about(self) -> str:
        """As text."""
        return f"window={self.window}, stride={self.stride}"


_PLACES: Layout = ("batch", None, None, "heads", None)
_WEIGHTS: Layout = (*_PLACES, None)

OUTLOOK = Operator(
    "outlook_attention",
    (
        Implementation("tpu", "kernels.outlook.tpu", platforms=("tpu",)),
        Implementation("xla", "attn.outlook.xla", plain=True),
    ),
    layouts=lambda settings, logits, v: ([_WEIGHTS, _PLACES], [_PLACES]),
    results=lambda settings, logits, v: (jax.ShapeDtypeStruct(v.shape, v.dtype),),
    decisive=("window", "stride"),
    keeps_results=False,
    keeps_maps=True,
)


def outlook_attention(
    logits: Float[Array, "B V U H O I"],
    v: Float[Array, "B Y X H D"],
    *,
    window: int = 3,
    stride: int = 2,
    scale: float | Array | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Every window mixes its own places; where windows overlap, what they give is summed.

    Windows stand at every `stride`-th row and column, `V = ceil(Y / stride)` by `U = ceil(X / stride)`, the first one
    centred on the first place. With `o` and `i` places of a window in row-major order and `v` zero outside the map,

        out[p] = sum over windows w, and o with w + o = p, of sum_i softmax(scale * logits[w, :, o, :])_i v[w + i].

    The sum is not divided by the number of windows, and the zeros around the map have their share of the softmax. What
    windows give outside the map is dropped.

    Where a kernel may run (on any platform) weights are not kept for the backward pass, and there is reverse-mode
    differentiation only, once; `implementation="reference"` has neither limit. `attn.explain` says what runs where.

    Args:
      logits: of each window, for every output place the weights of all input places; `O = I = window ** 2`.
      window: places along each axis, odd. stride: between windows, at most `window`, so that every place is in one.
      scale: of the logits; `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change `"logits"` (scaled) and `"probs"` `[B, V, U, H, O, I]`, float32.
      return_lse: return `(out, lse)` with the logsumexp of the scaled logits `[B, V, U, H, O]`, float32, natural.
      implementation: `"tpu"`, a kernel, or `"xla"`, which is the reference; None: the best for the platform lowered
        for.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.

    Raises:
      ValueError: a window that is even or shorter than the stride, or logits that are not those of its windows; an
        unknown implementation, or one that refuses.
    """
    check_windows(window, stride)
    check_rank((6,), "batch, rows of windows, columns of windows, heads, window ** 2, window ** 2", logits=logits)
    check_rank((5,), "batch, rows, columns, heads, head dim", v=v)
    check_dtypes(logits=logits, v=v)
    check_key(key, check_rate("dropout", dropout))
    batch, height, width, heads, depth = v.shape
    expected = (batch, -(-height // stride), -(-width // stride), heads, window**2, window**2)
    if logits.shape != expected:
        raise ValueError(f"logits of shape {logits.shape}: for values of shape {v.shape} they are {expected}")
    number, array = number_or_array(scale, depth)
    asked = {
        "dropout": bool(dropout),
        "look at the maps": edit is not None,
        "scale that is an array": array is not None,
    }
    of_edit: list[Array] = []

    def noted(site: str, value: Array) -> Array:
        value = edited(edit, site, value)
        of_edit.extend([value] if site == "logits" else [])
        return value

    options: dict[str, Any] = {"dropout": dropout, "key": key, "edit": None if edit is None else noted}
    if array is not None:
        options["scale"] = array
    (out,) = OUTLOOK.run(
        (logits, v),
        Settings(window, stride, number),
        plain=lambda *inputs, **settings: plain(*inputs, **{**settings, **options}),
        asked=[name for name, there in asked.items() if there],
        implementation=implementation,
    )
    if not return_lse:
        return out
    scaled = of_edit[0] if of_edit else logits.astype(jnp.float32) * (number if array is None else array)
    return out, jax.nn.logsumexp(scaled, axis=-1)


def outlook_maps(
    logits: Float[Array, "*W O I"], lse: Float[Array, "*W O"], *, scale: float | Array
) -> Float[Array, "*W O I"]:
    """How windows mix their places, `exp(scale * logits - lse)` in float32, from a fused run that keeps no weights.

    Args:
      logits, lse: of chosen windows or output places: rows of what `outlook_attention(..., return_lse=True)` was given
        and gave.
      scale: as in that call.

    Raises:
      ValueError: a logsumexp of others.
    """
    check_lse(lse, logits.shape[:-1])
    if scale is None:
        raise ValueError("scale=None; allowed: that of the call (head dim ** -0.5 where none was given), a number")
    number, array = number_or_array(scale, 1)
    scale = number if array is None else array
    return jnp.exp(scale * logits.astype(jnp.float32) - lse[..., None])


def check_windows(window: int, stride: int) -> None:
    """ValueError for windows without a centre, or so far apart that some places are in none."""
    check_counts(1, window=window, stride=stride)
    if window % 2 == 0 or not 0 < stride <= window:
        raise ValueError(f"window={window}, stride={stride}; allowed: an odd window and a stride of 1 to the window")


def outlook_centres(x: Float[Array, "B Y X C"], *, stride: int = 2) -> Float[Array, "B V U C"]:
    """What the logits are computed from: means over blocks of `stride` by `stride` places (arXiv:2106.13112, section
    3.1). The last blocks of a map that `stride` does not divide are means of the places that there are.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, [(0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0)])
    sums = x.reshape(batch, rows, stride, columns, stride, channels).sum((2, 4), dtype=jnp.float32)
    down, across = (np.minimum(stride, n - stride * np.arange(-(-n // stride))) for n in (height, width))
    return (sums / (down[:, None] * across)[..., None].astype(sums.dtype)).astype(x.dtype)
