"""Softmax attention between all pairs of tokens (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.core.operator import PLATFORMS, Implementation, Operator, checked, decide, dispatch
from attn.core.shards import Layout, on_shards
from attn.core.vmap import foldable
from attn.dense.xla import unfused

DENSE = Operator(
    "dense_attention",
    (
        Implementation("splash", "attn.dense.splash", platforms=("tpu",)),
        Implementation("cudnn", "attn.dense.cudnn", platforms=("cuda",)),
        Implementation("xla", "attn.dense.xla"),
    ),
)

Hook = Callable[[str, Array, Any], Array]
"""`hook(site, value, layer) -> value` sees, and may edit, what an attention module computes. Sites: `"q" "k" "v"`
`[B, N, H, D]`, `"logits" "probs"` `[B, H, N, M]`, `"heads"` `[B, N, H, D]` (per-head outputs before the projection)."""


def dense_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H N M"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B N H E"]:
    """`softmax(scale * q k^T + bias) v`, every head on its own.

    What runs where, `attn.explain` says. Where a kernel may run (on any platform) the map is not kept for the backward
    pass, and there is reverse-mode differentiation only, once; `implementation="xla"` has neither limit.

    Args:
      mask: True where a query may look. A query with nothing to look at gets zeros.
      bias: added to the scaled logits.
      scale: `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      hook: may edit `"q" "k" "v" "logits" "probs" "heads"`; its presence selects the unfused path on every platform.
      layer: handed to the hook.
      implementation: `"splash"` (TPU), `"cudnn"` (NVIDIA) or `"xla"`; None: the best for the platform lowered for.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.

    Raises:
      ValueError: for an unknown implementation, or one that refuses.
    """
    edit = (lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value)
    q, k, v = edit("q", q), edit("k", k), edit("v", v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    asked = {"mask": mask is not None, "bias": bias is not None, "dropout": bool(dropout), "hook": hook is not None}
    asked["scale that is an array"] = not isinstance(scale, numbers.Real)
    beside = tuple(name for name in asked if asked[name])
    about = f"with {', '.join(beside)}" if beside else ""
    if implementation is None:
        fused = any(DENSE.choose(name, (q, k, v), beside=beside).implementation != "xla" for name in PLATFORMS)
    else:
        fused = DENSE.named(implementation).name != "xla"
    if fused and not beside:
        heads = _fused(float(scale), implementation, q, k, v)
    else:
        choices = decide(DENSE, (q, k, v), {"beside": beside}, about=about, forced=implementation)
        q = checked(DENSE, (q, k, v), choices, about=about)
        heads = unfused(q, k, v, scale=scale, mask=mask, bias=bias, dropout=dropout, key=key, edit=edit)
    return edit("heads", checkpoint_name(heads, "attention_heads"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(scale: float, implementation: str | None, q: Array, k: Array, v: Array) -> Array:
    return _step(scale, implementation, "forward")(q, k, v)[0]


def _fused_forward(scale: float, implementation: str | None, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _step(scale, implementation, "forward")(*inputs)[0], inputs


def _fused_backward(scale: float, implementation: str | None, inputs: tuple[Array, ...], d_out: Array) -> Any:
    return _step(scale, implementation, "backward")(*inputs, d_out)


_fused.defvjp(_fused_forward, _fused_backward)


@functools.lru_cache(maxsize=1024)
def _step(scale: float, implementation: str | None, step: str) -> Any:
    """`forward` or `backward` of the implementation that is chosen, over a mesh, and under vmap."""
    heads: Layout = ("batch", None, "heads", None)

    def layouts(*arguments: Any) -> tuple[list[Layout | None], list[Layout | None]]:
        return [heads] * len(arguments), [heads] * (1 if step == "forward" else 3)

    def on_one_device(*arguments: Any) -> tuple[Array, ...]:
        return dispatch(
            DENSE,
            step,
            arguments[:3],
            arguments[3:],
            options={"beside": ()},
            settings={"scale": scale},
            forced=implementation,
        )

    def everywhere(*arguments: Any) -> tuple[Array, ...]:
        return on_shards(on_one_device, arguments, *layouts(*arguments))

    return foldable(everywhere, layouts, keys=1)
