"""Neighborhood attention: every query sees the keys around it, on maps of one to three axes.

Neighborhood Attention (arXiv:2204.07143), with dilation (arXiv:2209.15001), stride (Generalized Neighborhood Attention,
arXiv:2504.16922), causal axes, and keys that every query sees. Which keys these are: `kernels/neighborhood/pattern.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.common.grid import Grid
from attn.core import lowering
from attn.core.arguments import check_key, check_rank, check_rate, shapes_of, usable_scale
from attn.core.masks import Mask, as_mask
from attn.core.numerics import Edit
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.dense.api import dense_attention
from attn.neighborhood import dropped, masked
from attn.neighborhood.arguments import check_arrays, usable_bias
from kernels.neighborhood.pattern import Pattern, PerAxis, make_pattern


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    pattern: Pattern
    scale: float

    @property
    def about(self) -> str:
        """As text."""
        axes = [(axis.length, axis.window, axis.stride, axis.dilation, axis.is_causal) for axis in self.pattern.axes]
        names = ("map", "window", "stride", "dilation", "causal")
        return " ".join(f"{name} {values}" for name, values in zip(names, zip(*axes, strict=True), strict=True))


def _layouts(settings: Settings, *inputs: Any) -> tuple[list[Layout | None], list[Layout | None]]:
    space = (None,) * len(settings.pattern.axes)
    heads: Layout = ("batch", *space, "heads", None)
    extra: Layout = ("batch", None, "heads", None)
    possible: list[Layout | None] = [heads, heads, heads, ("heads", *space), extra, extra]
    into = [None if array is None else own for array, own in zip(inputs, possible, strict=True)]
    return into, [heads, ("batch", *space, "heads")]


def _results(settings: Settings, q: Any, k: Any, v: Any, *_: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
    return out, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)


NEIGHBORHOOD = Operator(
    "neighborhood_attention",
    (
        Implementation("dense", "attn.neighborhood.dense", platforms=("tpu",)),
        Implementation("tpu", "kernels.neighborhood.tpu", platforms=("tpu",)),
        Implementation("gpu", "kernels.neighborhood.gpu", platforms=("cuda",)),
        Implementation("windows", "attn.neighborhood.windows"),
        Implementation("xla", "attn.neighborhood.xla", takes=("dropout",)),
        Implementation("reference", "attn.neighborhood.reference", plain=True),
    ),
    layouts=_layouts,
    results=_results,
    decisive=("pattern",),
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
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
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
    `implementation="reference"` has derivatives of every kind. Under `jax.checkpoint` the results are named
    `"attention_heads"` and `"attention_lse"`: with a policy that keeps both, the backward pass does not compute them
    again. Under a mesh: `attn/core/shards.py`; what runs where: `explain`.

    Args:
      q, k, v: one to three axes of the map between batch and heads; one dtype of float32, bfloat16, float16.
      window: keys along each axis, `stride <= window`, `window * dilation <=` the axis. A number holds for every axis.
      stride: queries that share the window of one of them; `stride == window` is attention within blocks.
      dilation: distance between the keys.
      is_causal: no key behind the query, along each axis on its own.
      scale: of the logits, a number; `D ** -0.5` unless given.
      bias: by relative position, `2 * window - 1` entries along each axis, in float32 where it is used.
      extra_keys, extra_values: seen by every query; both or neither.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change the `"logits"` (scaled, after bias and mask) and `"probs"` `[B, H, N, M + N]`, float32, over all
        N tokens of the map behind the extra keys, on a path that has all pairs.
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
    inputs, settings = _checked(
        (q, k, v, bias, extra_keys, extra_values), (window, stride, dilation, is_causal, on_oversize), scale
    )
    check_key(key, check_rate("dropout", dropout))
    options = {"dropout": dropout, "key": key, "edit": edit}
    asked = _asked(dropout=bool(dropout), edit=edit is not None)
    found = NEIGHBORHOOD.run(
        inputs,
        settings,
        plain=functools.partial(_plain, options, implementation),
        asked=asked,
        implementation=implementation,
        returned=1 + return_lse,
    )
    return found if return_lse else found[0]


def token_neighborhood_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K E"],
    *,
    grid: Grid,
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    bias: Float[Array, "H ..."] | None = None,
    mask: Mask | Bool[Array, "*S"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Neighborhood attention of the tokens of a grid, of which the prefix sees everything and is seen by all.

    Args:
      grid: prefix tokens first, then the places of the map in row-major order.
      mask: takes pairs of tokens away.
      edit: may change `"logits"` and `"probs"` `[B, H, N, N]` over all tokens. A mask and this take a path that has
        all pairs.
      return_lse: return `(out, lse)` with the logsumexp `[B, N, H]`.

    Everything else as in `neighborhood_attention`.

    Raises:
      ValueError: as `neighborhood_attention`, and for tokens that are not those of the grid.
    """
    shapes = shapes_of(q=q, k=k, v=v)
    check_rank((4,), "batch, tokens, heads, head dim", q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.shape[1] != grid.tokens:
            raise ValueError(f"{shapes}: {name} must have {grid.tokens} tokens, those of {grid}")
    prefix, (batch, _, heads, _) = grid.prefix, q.shape
    maps = [x[:, prefix:].reshape(x.shape[0], *grid.shape, *x.shape[2:]) for x in (q, k, v)]
    extra = [x[:, :prefix] for x in (k, v)] if prefix else [None, None]
    inputs, settings = _checked((*maps, bias, *extra), (window, stride, dilation, is_causal, "error"), scale)
    check_key(key, check_rate("dropout", dropout))
    allowed = None if mask is None else as_mask(mask).dense(batch, heads, grid.tokens, grid.tokens)
    asked = _asked(mask=mask is not None, dropout=bool(dropout), edit=edit is not None)
    noise: dict[str, Any] = {"dropout": dropout, "key": key}
    run = functools.partial(
        NEIGHBORHOOD.run, inputs, settings, asked=asked, implementation=implementation, returned=1 + return_lse
    )
    all_pairs = mask is not None or _keeps_maps({**noise, "edit": edit}, implementation)
    if all_pairs and batch:
        queries = q[:, :prefix] if prefix else None
        options = {**noise, "edit": edit, "mask": allowed, "extra_queries": queries}
        found = run(plain=lambda *arrays, **own: masked.plain(*arrays, **{**own, **options}))
        axes = 2 if prefix else 1 + len(grid.shape)
        parts = [x.reshape(batch, grid.tokens, *x.shape[axes:]) for x in found]
        return tuple(parts) if return_lse else parts[0]
    out, *lse = run(plain=functools.partial(_plain, {**noise, "edit": None}, implementation))
    parts = [x.reshape(batch, grid.places, *x.shape[1 + len(grid.shape) :]) for x in (out, *lse)]
    if prefix:
        if dropout and key is not None:
            noise["key"] = jax.random.fold_in(key, _OF_PREFIX)
        own = dense_attention(
            q[:, :prefix],
            k,
            v,
            scale=settings.scale,
            return_lse=return_lse,
            implementation="reference" if implementation == "reference" else None,
            **noise,
        )
        parts = [jnp.concatenate(both, axis=1) for both in zip(own if return_lse else [own], parts, strict=True)]
    return tuple(parts) if return_lse else parts[0]


_OF_PREFIX = 2**32 - 1
"""What the key of the dropout of prefix queries is made with; no example has this number."""


def _checked(inputs: tuple[Any, ...], pattern: tuple[Any, ...], scale: Any) -> tuple[tuple[Any, ...], Settings]:
    """Arrays that may be used and settings; ValueError for what is not legal."""
    q, k, v, bias, extra_keys, extra_values = inputs
    window, stride, dilation, is_causal, on_oversize = pattern
    check_arrays(q, k, v, extra_keys, extra_values)
    made = make_pattern(
        q.shape[1:-2], window, stride=stride, dilation=dilation, is_causal=is_causal, on_oversize=on_oversize
    )
    bias = None if bias is None else usable_bias(bias, q.shape[-2], window, made)
    if extra_keys is not None and extra_keys.shape[1] == 0:
        extra_keys = extra_values = None
    return (q, k, v, bias, extra_keys, extra_values), Settings(made, usable_scale(scale, q.shape[-1]))


def _asked(**there: bool) -> list[str]:
    names = {"edit": "look at the maps"}
    return [names.get(name, name) for name, flag in there.items() if flag]


def _plain(options: dict[str, Any], implementation: str | None, *inputs: Any, **settings: Any) -> tuple[Array, ...]:
    """What goes with a call in ordinary JAX: dropout in tiles, edits with the pattern as a mask over all pairs."""
    if _keeps_maps(options, implementation):
        return masked.plain(*inputs, **{**settings, **options})
    if options["dropout"]:
        return dropped.attend(
            *inputs,
            **settings,
            dropout=options["dropout"],
            key=options["key"],
            layouts=_layouts(Settings(**settings), *inputs),
            message=lowering.once(NEIGHBORHOOD.name),
        )
    from attn.neighborhood import reference

    return reference.forward(*inputs, **settings)


def _keeps_maps(options: dict[str, Any], implementation: Any) -> bool:
    """Whether what goes with a call takes the path that has all pairs."""
    return options["edit"] is not None or bool(options["dropout"] and implementation == "reference")
