"""Neighborhood attention: every query sees the keys around it, on maps of one to three axes.

Neighborhood Attention (arXiv:2204.07143), with dilation (arXiv:2209.15001), stride (Generalized Neighborhood Attention,
arXiv:2504.16922), causal axes, and keys that every query sees. Which keys these are: `kernels/neighborhood/pattern.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn.core.operator import Implementation, Operator, dispatch
from attn.core.shards import Layout, on_shards
from attn.core.vmap import foldable
from attn.neighborhood.arguments import check_arrays, usable_bias, usable_scale
from kernels.neighborhood.pattern import Pattern, PerAxis, make_pattern

NEIGHBORHOOD = Operator(
    "neighborhood_attention",
    (
        Implementation("dense", "attn.neighborhood.dense", platforms=("tpu",)),
        Implementation("tpu", "kernels.neighborhood.tpu", platforms=("tpu",)),
        Implementation("gpu", "kernels.neighborhood.gpu", platforms=("cuda",)),
        Implementation("windows", "attn.neighborhood.windows"),
        Implementation("xla", "attn.neighborhood.xla"),
        Implementation("reference", "attn.neighborhood.reference"),
    ),
)


def neighborhood_attention(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    *,
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    bias: Float[Array, "H ..."] | None = None,
    extra_keys: Float[Array, "B M K D"] | None = None,
    extra_values: Float[Array, "B M K E"] | None = None,
    return_lse: bool = False,
    on_oversize: str = "error",
    implementation: str | None = None,
) -> Any:
    """Softmax attention of every query to the keys in its window and to all extra keys.

    With N(i) the keys that query i sees, M extra keys, and `c(j)` the position of token j within its dilation group,

        logit(i, j) = scale * q_i . k_j + bias[c(j) - c(i) + window - 1]   for j in N(i), without bias for extra keys,
        out_i = sum_j softmax(logit(i, .))_j v_j,   lse_i = log sum_j exp(logit(i, j)).

    Query head h reads key head `h // (H // K)`. Softmax, logsumexp and sums are in float32 whatever the inputs are.
    Differentiable in all arrays, in reverse mode and once; the logsumexp too, so that `merge_attention` of parts is.
    Under `jax.checkpoint` the results are named `"attention_heads"` and `"attention_lse"`: with a policy that keeps
    both, the backward pass does not compute them again. Under a mesh: `attn/core/shards.py`; what runs where:
    `explain`.

    Args:
      q, k, v: one to three axes of the map between batch and heads; one dtype of float32, bfloat16, float16.
      window: keys along each axis, `stride <= window`, `window * dilation <=` the axis. A number holds for every axis.
      stride: queries that share the window of one of them; `stride == window` is attention within blocks.
      dilation: distance between the keys.
      is_causal: no key behind the query, along each axis on its own.
      scale: of the logits, a number; `D ** -0.5` unless given.
      bias: by relative position, `2 * window - 1` entries along each axis, in float32 where it is used.
      extra_keys, extra_values: seen by every query; both or neither.
      return_lse: return `(out, lse)`.
      on_oversize: `"error"`, or `"clamp"` for a window that is longer than the map (`make_pattern`); of the bias the
        centre is used.
      implementation: `"dense"` (TPU, small maps), `"tpu"`, `"gpu"`, `"windows"` (patterns that cut the map into
        windows), `"xla"` or `"reference"`; None: the best for the platform that is lowered for.

    Returns:
      The output `[B, *S, H, E]` in the dtype of v; with `return_lse`, and the logsumexp `[B, *S, H]`, float32, natural.

    Raises:
      ValueError: for what is not legal, with the legal choices; for a forced implementation that refuses.
    """
    check_arrays(q, k, v, extra_keys, extra_values)
    pattern = make_pattern(
        q.shape[1:-2], window, stride=stride, dilation=dilation, is_causal=is_causal, on_oversize=on_oversize
    )
    bias = None if bias is None else usable_bias(bias, q.shape[-2], window, pattern)
    if implementation is not None:
        NEIGHBORHOOD.named(implementation)
    if extra_keys is not None and extra_keys.shape[1] == 0:
        extra_keys = extra_values = None
    call = _Call(pattern, usable_scale(scale, q.shape[-1]), implementation, return_lse)
    return _attention(call, q, k, v, bias, extra_keys, extra_values)


# --- one custom VJP around the implementations ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call is no array."""

    pattern: Pattern
    scale: float
    implementation: str | None
    with_lse: bool

    @property
    def about(self) -> str:
        axes = [(axis.length, axis.window, axis.stride, axis.dilation, axis.is_causal) for axis in self.pattern.axes]
        names = ("map", "window", "stride", "dilation", "causal")
        return " ".join(f"{name} {values}" for name, values in zip(names, zip(*axes, strict=True), strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, *inputs: Array | None) -> Any:
    return _attention_forward(call, *inputs)[0]


def _attention_forward(call: _Call, *inputs: Array | None) -> tuple[Any, Any]:
    out, lse = _step(call, "forward")(*inputs)
    # Named here, what is handed to the backward pass is what a policy keeps; forward and backward on every platform
    # speak of the same arrays.
    out, lse = checkpoint_name(out, "attention_heads"), checkpoint_name(lse, "attention_lse")
    return (out, lse) if call.with_lse else out, (inputs, out, lse)


def _attention_backward(call: _Call, kept: Any, cotangent: Any) -> tuple[Array | None, ...]:
    inputs, out, lse = kept
    d_out, d_lse = cotangent if call.with_lse else (cotangent, None)
    return _step(call, "backward")(*inputs, out, lse, d_out, d_lse)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.lru_cache(maxsize=1024)
def _step(call: _Call, step: str) -> Any:
    """`forward` or `backward` of the implementation that is chosen, over a mesh, and under vmap."""

    def layouts(*arguments: Any) -> tuple[list[Layout | None], list[Layout | None]]:
        space = (None,) * len(call.pattern.axes)
        heads: Layout = ("batch", *space, "heads", None)
        extra: Layout = ("batch", None, "heads", None)
        lse: Layout = ("batch", *space, "heads")
        possible: list[Layout | None] = [heads, heads, heads, ("heads", *space), extra, extra, heads, lse, heads, lse]
        into = [None if array is None else own for array, own in zip(arguments, possible, strict=False)]
        return into, [heads, lse] if step == "forward" else into[:6]

    def on_one_device(*arguments: Any) -> tuple[Any, ...]:
        return dispatch(
            NEIGHBORHOOD,
            step,
            arguments[:6],
            arguments[6:],
            options={"pattern": call.pattern},
            settings={"pattern": call.pattern, "scale": call.scale},
            about=call.about,
            forced=call.implementation,
        )

    def everywhere(*arguments: Any) -> tuple[Any, ...]:
        return on_shards(on_one_device, arguments, *layouts(*arguments))

    return foldable(everywhere, layouts, keys=1)
