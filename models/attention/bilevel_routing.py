"""Bi-level routing attention as a module (BiFormer, arXiv:2303.08810, section 3.2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook, routed_attention
from attn.routed.api import affinity, region_means, top_regions
from attn.routed.region_pool import POOLS, pool_regions
from kernels.neighborhood.pattern import PerAxis, per_axis
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.tap import sees_probabilities
from models.layers.conv import Conv
from models.layers.linear import DType, Linear
from models.layers.pad import cropped, padded

ROUTINGS = ("hard", "soft_detached", "soft", "learned")
PADDINGS = (None, "input", "projected")


class BiLevelRoutingAttention(nnx.Module):
    """Regions of the map choose regions by the means of their queries and keys; tokens attend to the chosen ones.

    A depthwise convolution of the values is added to the heads before the output projection (local enhancement).

    Args:
      regions: rows and columns of regions, or a number for both. Their number is fixed, not their size: on a larger map
        a query sees more keys.
      topk: regions that each region is routed to.
      qk_width: channels of queries and keys; `width` unless given.
      scale: of the logits of tokens; `qk_width ** -0.5` unless given, that of all heads together, as published.
      local: side of the depthwise kernel; 0 for none.
      routing: `"hard"`; `"soft"`, keys and values of a routed region times the softmax of the affinities of all routed
        ones; `"soft_detached"`, the same without a gradient through them; `"learned"`, as soft, with a linear layer on
        the means before the affinities. Which regions are chosen has no gradient in any.
      pooling: of the keys and values inside each region, a name of `attn.routed.region_pool.POOLS`; None for none.
      pool_size: see `attn.routed.region_pool.pool_regions`.
      padding: what becomes of a map that the regions do not divide. None: an error. `"input"`: zeros on the right and
        at the bottom before the projections, places like any others. `"projected"`: regions of `floor(side / regions)`
        places and as many more as are needed, filled with zeros behind the projections, which count in no mean.
      projection: with the output projection.
      implementation: see `attn.routed_attention`.

    Hook sites: `"q" "k" "v"` `[B, N, H, D]` over the (padded) map; `"routes"` `[B, R, topk]`, int32; `"logits" "probs"`
    `[B * R, H, T, topk * S]`, regions as a batch with T queries and S keys each; `"heads"` `[B, N, H, D]`. A hook that
    says by an attribute `sites` that it looks at neither logits nor probabilities leaves the fused path in use.
    """

    definition = "xla"
    """The implementation that multiplies what is needed and nothing else (`models/core/summary.py`)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        regions: PerAxis = 7,
        topk: int = 4,
        qk_width: int | None = None,
        scale: float | None = None,
        local: int = 5,
        routing: str = "hard",
        pooling: str | None = None,
        pool_size: int = 1,
        padding: str | None = None,
        projection: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        init: str = "timm",
        implementation: str | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        qk_width = width if qk_width is None else qk_width
        for name, value in (("width", width), ("qk_width", qk_width)):
            if value % heads:
                raise ValueError(f"{name} {value} is not divisible by {heads} heads")
        for option, choice, allowed in (
            ("routing", routing, ROUTINGS),
            ("pooling", pooling, (None, *POOLS)),
            ("padding", padding, PADDINGS),
        ):
            if choice not in allowed:
                raise ValueError(unknown_name(option, str(choice), map(str, allowed)))
        self.regions: tuple[int, int] = per_axis("regions", regions, 2, 1)  # type: ignore[assignment]
        self.heads, self.topk, self.routing, self.dropout = heads, topk, routing, dropout
        self.pooling, self.pool_size, self.padding, self.implementation = pooling, pool_size, padding, implementation
        self.scale = qk_width**-0.5 if scale is None else scale
        start = scheme(init)
        shared = {"dtype": dtype, "rngs": rngs}
        split = {"units": (heads, "heads"), "use_bias": qkv_bias, "kernel_init": start.qkv, **shared}
        self.qk = Linear(width, 2 * qk_width, split="parts", **split)
        self.v = Linear(width, width, split="out", **split)
        self.router = (
            Linear(qk_width, qk_width, kernel_init=start.linear, dtype=jnp.float32, rngs=rngs)
            if routing == "learned"
            else None
        )
        self.local = (
            Conv(width, width, size=local, groups=width, kernel_init=start.patch, **shared) if local > 0 else None
        )
        self.proj = (
            Linear(
                width,
                width,
                split="in",
                units=(heads, "heads"),
                use_bias=proj_bias,
                kernel_init=start.linear,
                **shared,
            )
            if projection
            else None
        )

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Array | None = None,
        mask: Array | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """New tokens.

        Raises:
          ValueError: a context, a mask or prefix tokens, which belong to no region; a map of other than two axes, or
            one that the regions do not divide, without `padding`; fewer regions than `topk`.
        """
        if context is not None or mask is not None:
            raise ValueError("bi-level routing attention takes neither a context nor a mask: it chooses what it sees")
        if grid.prefix:
            raise ValueError(
                f"bi-level routing attention has no region for {grid.prefix} prefix tokens (class token, registers): "
                "use average pooling and no registers"
            )
        edit = (lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value)
        regions, larger = self._cut(grid.shape)
        inside = larger if self.padding == "input" else grid

        x = padded(x, grid, inside)
        qk, v = checkpoint_name((self.qk.parts(x, 2, self.heads), self.v(x)), "attention_qkv")
        local = None if self.local is None else self.local(v.reshape(v.shape[0], *inside.shape, -1))

        def place(site: str, tokens: Array) -> Array:
            """On the map that is cut into regions."""
            tokens = padded(tokens.reshape(*tokens.shape[:2], -1), inside, larger)
            tokens = edit(site, tokens.reshape(*tokens.shape[:2], self.heads, -1))
            return tokens.reshape(tokens.shape[0], *larger.shape, *tokens.shape[2:])

        q, k, v = place("q", qk[:, :, 0]), place("k", qk[:, :, 1]), place("v", v)
        indices, weights = self._route(q, k, regions, inside.shape)
        if self.pooling is not None:
            k, v = (pool_regions(tokens, regions, kind=self.pooling, size=self.pool_size) for tokens in (k, v))
        heads = routed_attention(
            q,
            k,
            v,
            edit("routes", indices),
            regions=regions,
            scale=self.scale,
            weights=weights,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook if sees_probabilities(hook) else None,
            layer=layer,
            implementation=self.implementation,
        )
        heads = edit("heads", heads.reshape(heads.shape[0], larger.places, *heads.shape[3:]))
        heads = cropped(heads.reshape(*heads.shape[:2], -1), larger, inside)
        heads = heads if local is None else heads + local.reshape(heads.shape)
        heads = cropped(heads, inside, grid)
        return heads if self.proj is None else self.proj(heads)

    def _cut(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], Grid]:
        """Rows and columns of regions, and the map that they divide."""
        if len(shape) != 2:
            raise ValueError(f"regions {self.regions} do not fit a map of {shape}: it needs two axes")
        if self.padding == "projected":
            sizes = [side // count for side, count in zip(shape, self.regions, strict=True)]
            if 0 in sizes:
                raise ValueError(f"regions {self.regions}: a map of {shape} has fewer places")
            rows, columns = (-(-side // size) for side, size in zip(shape, sizes, strict=True))
            return (rows, columns), Grid((rows * sizes[0], columns * sizes[1]))
        larger = tuple(-(-side // count) * count for side, count in zip(shape, self.regions, strict=True))
        if larger != shape and self.padding is None:
            raise ValueError(
                f"regions {self.regions} do not divide a map of {shape}; allowed: other sides, other regions, or "
                "padding='input' (in BiFormer auto_pad=True)"
            )
        return self.regions, Grid(larger)

    def _route(
        self, q: Array, k: Array, regions: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[Array, Array | None]:
        """Which regions each is routed to, and what their keys and values are multiplied by."""
        if self.routing in ("hard", "soft_detached"):
            q, k = jax.lax.stop_gradient((q, k))
        queries, keys = (region_means(tokens, regions, shape=shape) for tokens in (q, k))
        if self.router is not None:
            queries, keys = self.router(queries), self.router(keys)
        affinities, indices = top_regions(affinity(queries, keys, self.scale), self.topk)
        return indices, None if self.routing == "hard" else jax.nn.softmax(affinities, axis=-1)
