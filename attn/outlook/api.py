"""Outlook attention: the centre of a window says, without keys, how the places of the window are mixed (VOLO).

Yuan et al. 2021, arXiv:2106.13112, section 3.1 and algorithm 1.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from attn.core.operator import PLATFORMS, Implementation, Operator, checked, decide, dispatch
from attn.core.shards import Layout, on_shards
from attn.core.vmap import foldable
from attn.dense.api import Hook
from attn.outlook.xla import unfused

OUTLOOK = Operator(
    "outlook_attention",
    (
        Implementation("tpu", "kernels.outlook.tpu", platforms=("tpu",)),
        Implementation("xla", "attn.outlook.xla"),
    ),
)


def outlook_attention(
    logits: Float[Array, "B V U H O I"],
    v: Float[Array, "B Y X H D"],
    *,
    window: int = 3,
    stride: int = 2,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B Y X H D"]:
    """Every window mixes its own places; where windows overlap, what they give is summed.

    Windows stand at every `stride`-th row and column, `V = ceil(Y / stride)` by `U = ceil(X / stride)`, the first one
    centred on the first place. With `o` and `i` places of a window in row-major order and `v` zero outside the map,

        out[p] = sum over windows w, and o with w + o = p, of sum_i softmax(scale * logits[w, :, o, :])_i v[w + i].

    The sum is not divided by the number of windows, and the zeros around the map have their share of the softmax. What
    windows give outside the map is dropped.

    Where a kernel may run (on any platform) weights are not kept for the backward pass, and there is reverse-mode
    differentiation only, once; `implementation="xla"` has neither limit. `attn.explain` says what runs where.

    Args:
      logits: of each window, for every output place the weights of all input places; `O = I = window ** 2`.
      window: places along each axis, odd. stride: between windows, at most `window`, so that every place is in one.
      scale: of the logits; `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      hook: may edit `"v"` and `"heads"` `[B, Y * X, H, D]`, `"logits"` (scaled) and `"probs"` `[B, V, U, H, O, I]`.
      layer: handed to the hook.
      implementation: `"tpu"`, a kernel, or `"xla"`; None: the best for the platform lowered for.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.

    Raises:
      ValueError: a window that is even or shorter than the stride, or logits that are not those of its windows; an
        unknown implementation, or one that refuses.
    """
    check_windows(window, stride)
    batch, height, width, heads, depth = v.shape
    expected = (batch, -(-height // stride), -(-width // stride), heads, window**2, window**2)
    if logits.shape != expected:
        raise ValueError(f"logits of shape {logits.shape}: for values of shape {v.shape} they are {expected}")

    def edit(site: str, value: Array) -> Array:
        return value if hook is None else hook(site, value, layer)

    v = edit("v", v.reshape(batch, -1, heads, depth)).reshape(v.shape)
    scale = depth**-0.5 if scale is None else scale
    asked = {"dropout": bool(dropout), "hook": hook is not None}
    asked["scale that is an array"] = not isinstance(scale, numbers.Real)
    beside = tuple(name for name in asked if asked[name])
    options = {"window": window, "stride": stride, "beside": beside}
    if implementation is None:
        fused = any(OUTLOOK.choose(name, (logits, v), **options).implementation != "xla" for name in PLATFORMS)
    else:
        fused = OUTLOOK.named(implementation).name != "xla"
    if fused and not beside:
        out = _fused(window, stride, float(scale), implementation, logits, v)
    else:
        about = _about(window, stride, beside)
        choices = decide(OUTLOOK, (logits, v), options, about=about, forced=implementation)
        logits = checked(OUTLOOK, (logits, v), choices, about=about)
        out = unfused(logits, v, window=window, stride=stride, scale=scale, dropout=dropout, key=key, edit=edit)
    return edit("heads", out.reshape(batch, -1, heads, depth)).reshape(out.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fused(window: int, stride: int, scale: float, implementation: str | None, logits: Array, v: Array) -> Array:
    return _step(window, stride, scale, implementation, "forward")(logits, v)[0]


def _fused_forward(
    window: int, stride: int, scale: float, implementation: str | None, *inputs: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _step(window, stride, scale, implementation, "forward")(*inputs)[0], inputs


def _fused_backward(
    window: int, stride: int, scale: float, implementation: str | None, inputs: tuple[Array, ...], d_out: Array
) -> Any:
    return _step(window, stride, scale, implementation, "backward")(*inputs, d_out)


_fused.defvjp(_fused_forward, _fused_backward)


@functools.lru_cache(maxsize=1024)
def _step(window: int, stride: int, scale: float, implementation: str | None, step: str) -> Any:
    """`forward` or `backward` of the implementation that is chosen, over a mesh, and under vmap."""
    weights: Layout = ("batch", None, None, "heads", None, None)
    places: Layout = ("batch", None, None, "heads", None)

    def layouts(*arguments: Any) -> tuple[list[Layout | None], list[Layout | None]]:
        into: list[Layout | None] = [weights, places, places]
        out_of: list[Layout | None] = [places] if step == "forward" else [weights, places]
        return into[: len(arguments)], out_of

    def on_one_device(*arguments: Any) -> tuple[Array, ...]:
        return dispatch(
            OUTLOOK,
            step,
            arguments[:2],
            arguments[2:],
            options={"window": window, "stride": stride, "beside": ()},
            settings={"window": window, "stride": stride, "scale": scale},
            about=_about(window, stride, ()),
            forced=implementation,
        )

    def everywhere(*arguments: Any) -> tuple[Array, ...]:
        return on_shards(on_one_device, arguments, *layouts(*arguments))

    return foldable(everywhere, layouts, keys=1)


def _about(window: int, stride: int, beside: tuple[str, ...]) -> str:
    """The options as text."""
    return f"window={window}, stride={stride}" + (f", with {', '.join(beside)}" if beside else "")


def check_windows(window: int, stride: int) -> None:
    """ValueError for windows without a centre, or so far apart that some places are in none."""
    if window % 2 == 0 or not 0 < stride <= window:
        raise ValueError(f"window={window}, stride={stride}; allowed: an odd window and a stride of 1 to the window")


def outlook_centres(x: Float[Array, "B Y X C"], *, stride: int = 2) -> Float[Array, "B V U C"]:
    """What the logits are computed from: means over blocks of `stride` by `stride` places (arXiv:2106.13112, section
    3.1). The last blocks of a map that `stride` does not divide are means of the places that there are.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, [(0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0)])
    sums = x.reshape(batch, rows, stride, columns, stride, channels).sum((2, 4))
    down, across = (np.minimum(stride, n - stride * np.arange(-(-n // stride))) for n in (height, width))
    return sums / (down[:, None] * across)[..., None].astype(sums.dtype)
