"""Bi-level routing attention as a module (BiFormer, arXiv:2303.08810, section 3.2)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from attn import Edit, Grid, routed_attention
from attn.core.arguments import check_counts
from attn.routed import affinity, region_means, top_regions
from attn.routed.region_pool import POOLS, pool_regions
from kernels.neighborhood.pattern import PerAxis, per_axis
from models.attention.mechanism import KEYS, QUERIES, WINDOWS, Declaration, Entry, Mechanism, check_divides
from models.core.call import Call
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.tap import TokenIndex
from models.layers.conv import Conv
from models.layers.linear import DType, Linear
from models.layers.pad import cropped, padded

ROUTINGS = ("hard", "soft_detached", "soft", "learned")
PADDINGS = (None, "input", "projected")


class BiLevelRoutingAttention(Mechanism):
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

    Sites are over the (padded) map. Maps are `[B, R, H, T, topk * S]`, T queries of a region and S keys of each routed
    one; `"routes"` `[B, R, topk]`, int32, leave the fused path in use.
    """

    declaration = Declaration(
        summary="regions of the map choose regions, tokens see those of the chosen ones",
        paper="arXiv:2303.08810",
        operator="routed_attention",
        cost="4 N C^2 + 2 N^2 C k / R + R^2 C + 25 N C for k of R regions",
        any_size=False,
        sites=("q", "k", "v", "routes", "logits", "probs", "lse", "heads"),
    )

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
        check_divides(width, heads)
        check_divides(qk_width, heads, "qk_width")
        for option, choice, allowed in (
            ("routing", routing, ROUTINGS),
            ("pooling", pooling, (None, *POOLS)),
            ("padding", padding, PADDINGS),
        ):
            if choice not in allowed:
                raise ValueError(unknown_name(option, str(choice), map(str, allowed)))
        self.regions: tuple[int, int] = per_axis("regions", regions, 2, 1)  # type: ignore[assignment]
        check_counts(1, topk=topk, pool_size=pool_size)
        check_counts(0, local=local)
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

    def refuse_map(self, grid: Grid) -> str | None:
        """A map that the regions do not divide, without padding; fewer regions than are chosen."""
        shape = tuple(grid.shape)
        if self.padding == "projected" and any(side < count for side, count in zip(shape, self.regions, strict=True)):
            return f"regions {self.regions}: a map of {shape} has fewer places"
        if self.padding is None and any(side % count for side, count in zip(shape, self.regions, strict=True)):
            return (
                f"regions {self.regions} do not divide a map of {shape}; allowed: other sides, other regions, or "
                "padding='input' (in BiFormer auto_pad=True)"
            )
        regions = self._cut(shape)[0]
        if self.topk > regions[0] * regions[1]:
            return f"topk={self.topk}: there are {regions[0] * regions[1]} regions"
        return None

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        grid = call.grid
        regions, larger = self._cut(grid.shape)
        inside = larger if self.padding == "input" else grid

        x = padded(x, grid, inside)
        qk, v = checkpoint_name((self.qk.parts(x, 2, self.heads), self.v(x)), "attention_qkv")
        local = None if self.local is None else self.local(v.reshape(v.shape[0], *inside.shape, -1))

        def place(site: str, tokens: Array, axes: str) -> Array:
            """On the map that is cut into regions."""
            tokens = padded(tokens.reshape(*tokens.shape[:2], -1), inside, larger)
            tokens = call.emit(site, tokens.reshape(*tokens.shape[:2], self.heads, -1), axes)
            return tokens.reshape(tokens.shape[0], *larger.shape, *tokens.shape[2:])

        q, k, v = place("q", qk[:, :, 0], QUERIES), place("k", qk[:, :, 1], KEYS), place("v", v, KEYS)
        indices, weights = self._route(q, k, regions, inside.shape)
        indices = call.emit("routes", indices, "batch regions routes")
        edit = self._edit(call, indices, regions, larger)
        if self.pooling is not None:
            k, v = (pool_regions(tokens, regions, kind=self.pooling, size=self.pool_size) for tokens in (k, v))
        found = routed_attention(
            q,
            k,
            v,
            indices,
            regions=regions,
            scale=self.scale,
            weights=weights,
            dropout=self.dropout if call.train else 0.0,
            key=call.key,
            edit=edit,
            return_lse=call.wants("lse"),
            implementation=self.implementation,
        )
        if call.wants("lse"):
            found, lse = found
            call.emit("lse", lse.reshape(lse.shape[0], larger.places, -1), "batch tokens heads")
        heads = call.emit("heads", found.reshape(found.shape[0], larger.places, *found.shape[3:]), QUERIES)
        heads = cropped(heads.reshape(*heads.shape[:2], -1), larger, inside)
        heads = heads if local is None else heads + local.reshape(heads.shape)
        heads = cropped(heads, inside, grid)
        return heads if self.proj is None else self.proj(heads)

    def _edit(self, call: Call, indices: Int[Array, "B R K"], regions: tuple[int, int], grid: Grid) -> Edit | None:
        if not call.wants("logits", "probs"):
            return None
        height, width = (side // count for side, count in zip(grid.shape, regions, strict=True))
        cells = np.arange(grid.places).reshape(regions[0], height, regions[1], width)
        places = cells.transpose(0, 2, 1, 3).reshape(regions[0] * regions[1], -1)
        if self.pooling is not None:
            return call.edit(WINDOWS)  # keys that are pooled are no tokens
        keys = jnp.asarray(places)[indices]
        keys = keys.reshape(*keys.shape[:2], -1)
        return call.edit(WINDOWS, TokenIndex(places, keys, (grid, grid)))

    def _cut(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], Grid]:
        """Rows and columns of regions, and the map that they divide."""
        if self.padding == "projected":
            sizes = [side // count for side, count in zip(shape, self.regions, strict=True)]
            rows, columns = (-(-side // size) for side, size in zip(shape, sizes, strict=True))
            return (rows, columns), Grid((rows * sizes[0], columns * sizes[1]))
        larger = tuple(-(-side // count) * count for side, count in zip(shape, self.regions, strict=True))
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

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration, of the padded map; for hard routing of unpooled keys."""
        (rows, columns), larger = self._cut(grid.shape)
        inside = larger if self.padding == "input" else grid
        count, widths = rows * columns, (self.qk.kernel.shape[-1] // 2, self.v.kernel.shape[-1])
        linear = inside.places * (self.qk.kernel.size + self.v.kernel.size)
        linear += grid.places * (0 if self.proj is None else self.proj.kernel.size)
        local = 0 if self.local is None else self.local.kernel.size * inside.places
        pairs = larger.places * (larger.places // count) * self.topk
        return linear + local + count**2 * widths[0] + pairs * sum(widths)


MECHANISMS = (Entry("bilevel_routing", BiLevelRoutingAttention, BiLevelRoutingAttention.declaration),)
