"""The isotropic host: patches, one map of tokens, blocks, pooling. ViT, DeiT, DINOv2, SigLIP and CLIP towers are
options.

Papers: arXiv:2010.11929 (ViT), 2205.01580 (simple baseline), 2012.12877 (DeiT), 2204.07118 (DeiT-III), 2304.07193
(DINOv2), 2309.16588 (registers). Variants are in `models/families/vit/variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import RESAMPLE_METHODS, Grid, resample_positions, sincos_2d
from models.attention.registry import checked_options
from models.core import sharding
from models.core.call import Call
from models.core.init import constant, scheme
from models.core.options import Count, Flag, Pair, Positive, Rate, Size, check_choices, pair
from models.core.stack import Stack, shortest_cycle
from models.core.tap import TOKENS
from models.hosts.block import BLOCKS, BlockOptions
from models.hosts.classifier import Classifier
from models.hosts.options import TransformerOptions
from models.layers.drop import dropout
from models.layers.linear import Head, Linear
from models.layers.norm import LayerNorm
from models.layers.patch import PatchEmbed
from models.layers.pool import GLOBAL_POOLS, AttentionPool

POOLS = ("token", "avg", "max", "avgmax", "map")
POSITIONS = ("learned", "sincos2d", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitOptions(TransformerOptions):
    """Options of the isotropic host, besides those of every classifier of transformer blocks.

    Attributes:
      patch_size: side in pixels, or (height, width).
      width, depth, heads: channels, layers, attention heads.
      image_size: images of another size are accepted at call time: learned positions are resampled.
      mlp_width: hidden units of the MLP; for `mlp="swiglu"` those after gating. `4 * width` unless given.
      class_token, registers, distillation_token: prefix tokens, in the order class, distillation, registers.
      position: `"learned"`, `"sincos2d"` or `"none"`.
      prefix_positions: the learned table has rows for the prefix tokens too (ViT, DeiT, DINOv2), rather than being
        added to the patches before the prefix is put in front (DeiT-III, big_vision, register models).
      position_resample: method for other image sizes, see `attn.resample_positions`.
      pre_norm: LayerNorm before the blocks and, unless `patch_bias` says otherwise, no bias in the patch embedding
        (CLIP).
      final_norm: LayerNorm after the blocks.
      fc_norm: that norm acts on the pooled features instead of on the tokens; None: as timm, for `pool="avg"`,
        `"max"` and `"avgmax"`.
      pool: `"token"` (class token), `"avg"` (mean of the patch tokens), `"max"`, `"avgmax"` (mean of these two) or
        `"map"` (attention pooling).
      pool_prefix: prefix tokens are pooled too.
      pool_mlp_width: hidden units of the attention pooling; `mlp_width` unless given.
      pre_logits: width of a Dense + tanh before the head (ViT's original representation layer).
      block: kind of block, see `models.hosts.block.BLOCKS`.
      attention_options: a sequence of options is that of the layers in turn, repeated as often as needed.
      proj_bias: biases of the attention's output projection and of the MLP.
      scale_attention_norm, scale_mlp_norm: a norm before the output projection, before the MLP's second layer.
      layer_scale: initial value; None for no layer scale.
      dropout: after position, attention projection and both MLP layers.
      head_bias: initial bias of the head.
    """

    patch_size: Pair
    width: Count
    depth: Count
    heads: Count
    mlp_width: Count | None = None
    class_token: Flag = True
    registers: Size = 0
    distillation_token: Flag = False
    position: str = "learned"
    prefix_positions: Flag = True
    position_resample: str = "bicubic"
    pre_norm: Flag = False
    patch_bias: Flag | None = None
    final_norm: Flag = True
    fc_norm: Flag | None = None
    norm_eps: Positive = 1e-6
    pool: str = "token"
    pool_prefix: Flag = False
    pool_mlp_width: Count | None = None
    pre_logits: Count | None = None
    block: str = "pre_norm"
    proj_bias: Flag = True
    qk_norm: Flag = False
    scale_attention_norm: Flag = False
    scale_mlp_norm: Flag = False
    layer_scale: float | None = None
    drop_path: Rate = 0.0
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            position=(self.position, POSITIONS),
            position_resample=(self.position_resample, RESAMPLE_METHODS),
            pool=(self.pool, POOLS),
            block=(self.block, BLOCKS),
        )
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' needs class_token=True; without a class token use pool='avg' or 'map'")
        if self.distillation_token and (self.pool != "token" or self.fc_norm or self.pre_logits):
            raise ValueError("distillation_token=True needs pool='token', no fc_norm and no pre_logits")

    def check_attention_options(self) -> None:
        """Options, or several in turn."""
        for options in in_turn(self.attention_options):
            checked_options(self.attention, options)

    @property
    def prefix(self) -> int:
        """Prefix tokens."""
        return self.class_token + self.distillation_token + self.registers

    def attention_defaults(self, layer: int, grid: Grid) -> Mapping[str, Mapping[str, Any]]:
        """What a family says to mechanisms of a layer, by their names; layers that are told alike are scanned
        together."""
        return {}


def in_turn(options: Any) -> list[Any]:
    """Options of mechanisms for the layers in turn.

    Raises:
      ValueError: a sequence without any.
    """
    if options is None or isinstance(options, Mapping):
        return [options]
    if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        raise ValueError(
            f"attention_options={options!r}; allowed: a dictionary, None, or several for the layers in turn"
        )
    return list(options)


class VisionTransformer(Classifier):
    """Patches, position, blocks, norm, pool, head."""

    Options = VitOptions
    options: VitOptions

    def __init__(self, options: VitOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        mlp_width = 4 * o.width if o.mlp_width is None else o.mlp_width
        start, dtype = scheme(o.init), o.dtype
        self.width, self.num_classes, self.dtype = o.width, o.num_classes, dtype
        self.position, self.position_resample, self.pool = o.position, o.position_resample, o.pool
        self.heads, self.block, self.attention = o.heads, o.block, o.attention
        self.activation, self.qkv_bias = o.activation, o.qkv_bias

        patch_bias = not o.pre_norm if o.patch_bias is None else o.patch_bias
        self.patch_embed = PatchEmbed(
            pair(o.patch_size),
            o.channels,
            o.width,
            kernel_init=start.patch,
            use_bias=patch_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.grid = Grid(self.patch_embed.grid_shape(*pair(o.image_size)), prefix=o.prefix)

        def token(count: int) -> nnx.Param | None:
            return nnx.Param(start.token(rngs.params(), (1, count, o.width), jnp.float32)) if count else None

        self.cls_token = token(int(o.class_token))
        self.dist_token = token(int(o.distillation_token))
        self.reg_token = token(o.registers)
        learned = o.position == "learned"
        self.prefix_positions = o.prefix_positions and learned
        if o.position == "sincos2d":
            sincos_2d(self.grid.shape, o.width)  # refuses a width that it cannot serve
        rows = self.grid.tokens if self.prefix_positions else self.grid.places
        self.pos_embed = nnx.Param(start.position(rngs.params(), (1, rows, o.width), jnp.float32)) if learned else None
        self.norm_pre = LayerNorm(o.width, eps=o.norm_eps, dtype=dtype) if o.pre_norm else None
        self.blocks = Stack(self._makers(mlp_width), o.depth, rngs=rngs, scan=o.scan, remat=o.remat)

        after_pool = (o.pool in ("avg", "max", "avgmax")) if o.fc_norm is None else o.fc_norm
        self.norm = LayerNorm(o.width, eps=o.norm_eps, dtype=dtype) if o.final_norm and not after_pool else None
        self.fc_norm = LayerNorm(o.width, eps=o.norm_eps, dtype=dtype) if o.final_norm and after_pool else None
        self.attn_pool = (
            AttentionPool(
                o.width,
                o.heads,
                mlp_width=o.pool_mlp_width or mlp_width,
                activation=o.activation,
                norm_eps=o.norm_eps,
                init=o.init,
                dtype=dtype,
                rngs=rngs,
            )
            if o.pool == "map"
            else None
        )
        self.pre_logits = (
            Linear(o.width, o.pre_logits, kernel_init=start.pre_logits, dtype=dtype, rngs=rngs)
            if o.pre_logits
            else None
        )

        def head() -> Head | None:
            if o.num_classes == 0:
                return None
            bias = constant(o.head_bias)
            features = o.pre_logits or o.width
            return Head(features, o.num_classes, kernel_init=start.head, bias_init=bias, dtype=dtype, rngs=rngs)

        self.head = head()
        self.head_dist = head() if o.distillation_token else None

    def _makers(self, mlp_width: int) -> list[Any]:
        """Blocks of the layers in turn."""
        o = self.options
        options = BlockOptions.of(o, mlp_width=mlp_width, grid=self.grid, attention_options=None)
        own = in_turn(o.attention_options)
        defaults = [o.attention_defaults(layer, self.grid).get(o.attention, {}) for layer in range(o.depth)]
        layers = [(own[layer % len(own)], defaults[layer]) for layer in range(o.depth)]
        return [
            partial(
                BLOCKS[o.block],
                dataclasses.replace(options, attention_options=said, attention_defaults={o.attention: told}),
            )
            for said, told in shortest_cycle(layers)
        ]

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return self.options.depth

    def run(self, images: Float[Array, "B Y X I"], call: Call, layers: Sequence[int]) -> dict[str, Array]:
        """`"embedded"`, `"blocks.3"` for chosen layers, `"tokens"`, `"pooled"`, `"logits"`; with a distillation token
        also `"distillation_logits"` and the mean of both, `"mean_logits"`.
        """
        with jax.named_scope("patch_embed"):
            x, grid = self._embed(images)
            x = dropout(x, self.options.dropout, train=call.train, key=call.key_for("patch_embed"))
            x = x if self.norm_pre is None else self.norm_pre(x)
            x = call.emit("embedded", x, TOKENS)
        outputs = {"embedded": x}
        rates = np.linspace(0.0, self.options.drop_path, self.depth, dtype=np.float32)
        call = call.replace(grid=grid)
        x, found = self.blocks(x, call, drop_path=rates if self.options.drop_path else None, layers=layers)
        outputs |= {f"blocks.{name}": value for name, value in found.items()}
        return outputs | self._classify(x, call.replace(layer=self.depth))

    def answer(self, outputs: Mapping[str, Array], train: bool) -> Any:
        """With a distillation token: the mean of both heads, and in training
        `{"logits": class head, "distillation_logits": distillation head}`.
        """
        if self.head_dist is None:
            return super().answer(outputs, train)
        if train:
            return {name: outputs[name] for name in ("logits", "distillation_logits")}
        return outputs["mean_logits"]

    def _embed(self, images: Float[Array, "B Y X I"]) -> tuple[Float[Array, "B N C"], Grid]:
        x = self.patch_embed(images)
        grid = Grid(self.patch_embed.grid_shape(*images.shape[1:3]), self.grid.prefix)
        positions = self._positions(grid)
        tokens = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        prefix = [jnp.broadcast_to(t[...].astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in tokens]
        if positions is not None and not self.prefix_positions:
            x = x + positions.astype(x.dtype)
        x = jnp.concatenate([*prefix, x], axis=1)
        if positions is not None and self.prefix_positions:
            x = x + positions.astype(x.dtype)
        return sharding.over_batch(x), grid

    def _positions(self, grid: Grid) -> Float[Array, "1 N C"] | None:
        if self.position == "sincos2d":
            return jnp.asarray(sincos_2d(grid.shape, self.width))[None]
        if self.pos_embed is None:
            return None
        prefix = self.grid.prefix if self.prefix_positions else 0
        table = self.pos_embed[...]
        method = self.position_resample
        return jnp.asarray(resample_positions(table, self.grid.shape, grid.shape, prefix=prefix, method=method))

    def _classify(self, x: Float[Array, "B N C"], call: Call) -> dict[str, Array]:
        with jax.named_scope("norm"):
            x = call.emit("norm", x if self.norm is None else self.norm(x), TOKENS)
        outputs = {"tokens": x}
        with jax.named_scope("attn_pool" if self.pool == "map" else "head"):
            pooled = self._pooled(x, call)
        with jax.named_scope("head"):
            pooled = pooled if self.fc_norm is None else self.fc_norm(pooled)
            pooled = pooled if self.pre_logits is None else jnp.tanh(self.pre_logits(pooled))
            pooled = outputs["pooled"] = call.emit("pooled", pooled, "batch channels")
            key = call.key_for("head")
            pooled = dropout(pooled, self.options.head_dropout, train=call.train, key=key)
            if self.head is not None:
                logits = self.head(pooled)
                outputs["logits"] = call.emit("logits.out", logits, "batch classes")
            if self.head_dist is not None:
                outputs["distillation_logits"] = self.head_dist(x[:, 1])
                outputs["mean_logits"] = (outputs["logits"] + outputs["distillation_logits"]) / 2
        return outputs

    def _pooled(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B C"]:
        if self.pool == "token":
            # Without heads the features of a distilled model are those that its two heads would average.
            return x[:, :2].mean(axis=1) if self.dist_token is not None and self.head is None else x[:, 0]
        x = x if self.options.pool_prefix else x[:, call.grid.prefix :]
        if self.attn_pool is not None:
            grid = call.grid if self.options.pool_prefix else Grid(call.grid.shape)
            return self.attn_pool(x, call.at("attn_pool", grid=grid))
        return GLOBAL_POOLS[self.pool](x)

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return self.depth + 1

    def layer_id(self, name: str) -> int:
        """Layer of an unrolled parameter name, for layer-wise decay: 0 embedding, i + 1 block i, then `num_layers`."""
        head, _, rest = name.partition(".")
        if head in ("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre"):
            return 0
        return int(rest.partition(".")[0]) + 1 if head == "blocks" else self.num_layers
