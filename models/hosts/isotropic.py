"""Vision Transformer: ViT, DeiT, DeiT-III, DINOv2, SigLIP and CLIP towers are options of one class.

Papers: arXiv:2010.11929 (ViT), 2205.01580 (simple baseline), 2012.12877 (DeiT), 2204.07118 (DeiT-III), 2304.07193
(DINOv2), 2309.16588 (registers). Variants are in `models/families/vit/variants.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import RESAMPLE_METHODS, Grid, Hook, resample_positions, sincos_2d
from models.core import sharding
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.stack import Stack
from models.hosts.block import BLOCKS, BlockOptions
from models.layers.activation import ACTIVATIONS
from models.layers.drop import dropout, fold_key
from models.layers.linear import DType, Linear
from models.layers.mlp import MLPS
from models.layers.norm import LayerNorm
from models.layers.patch import PatchEmbed
from models.layers.pool import GLOBAL_POOLS, AttentionPool

POOLS = ("token", "avg", "max", "avgmax", "map")
POSITIONS = ("learned", "sincos2d", "none")


class VisionTransformer(nnx.Module):
    """Patches, position, blocks, norm, pool, head.

    Args:
      image_size: side in pixels, or (height, width). Images of another size are accepted at call time: learned
        positions are resampled.
      num_classes: 0 for no head; the model then returns pooled features.
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
      attention, attention_options: mechanism by name, see `models.attention.registry.ATTENTION`; a sequence of options
        is that of the layers in turn, repeated as often as needed.
      proj_bias: biases of the attention's output projection and of the MLP.
      scale_attention_norm, scale_mlp_norm: a norm before the output projection, before the MLP's second layer.
      drop_path: rate of the last block; block i of n has `drop_path * i / (n - 1)`.
      dropout: after position, attention projection and both MLP layers. attention_dropout: on probabilities.
      init: `"timm"` or `"big_vision"`; head_bias: initial bias of the head.
      scan: one leaf per parameter for all blocks, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    def __init__(
        self,
        *,
        patch_size: int | tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        mlp_width: int | None = None,
        mlp: str = "mlp",
        activation: str = "gelu",
        class_token: bool = True,
        registers: int = 0,
        distillation_token: bool = False,
        position: str = "learned",
        prefix_positions: bool = True,
        position_resample: str = "bicubic",
        pre_norm: bool = False,
        patch_bias: bool | None = None,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        norm_eps: float = 1e-6,
        pool: str = "token",
        pool_prefix: bool = False,
        pool_mlp_width: int | None = None,
        pre_logits: int | None = None,
        block: str = "pre_norm",
        attention: str = "dense",
        attention_options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_attention_norm: bool = False,
        scale_mlp_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: str = "timm",
        head_bias: float = 0.0,
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        _check_choices(
            position=(position, POSITIONS),
            position_resample=(position_resample, RESAMPLE_METHODS),
            pool=(pool, POOLS),
            block=(block, BLOCKS),
            mlp=(mlp, MLPS),
            activation=(activation, ACTIVATIONS),
        )
        if pool == "token" and not class_token:
            raise ValueError("pool='token' needs class_token=True; without a class token use pool='avg' or 'map'")
        if distillation_token and (pool != "token" or fc_norm or pre_logits):
            raise ValueError("distillation_token=True needs pool='token', no fc_norm and no pre_logits")
        mlp_width = 4 * width if mlp_width is None else mlp_width
        start = scheme(init)
        self.width, self.depth, self.num_classes, self.dtype = width, depth, num_classes, dtype
        self.position, self.position_resample = position, position_resample
        self.pool, self.pool_prefix = pool, pool_prefix
        self.heads, self.block, self.attention = heads, block, attention
        self.activation, self.qkv_bias = activation, qkv_bias
        self.drop_path, self.dropout = drop_path, dropout

        patch_bias = not pre_norm if patch_bias is None else patch_bias
        self.patch_embed = PatchEmbed(
            _pair(patch_size), channels, width, kernel_init=start.patch, use_bias=patch_bias, dtype=dtype, rngs=rngs
        )
        self.grid = Grid(
            self.patch_embed.grid_shape(*_pair(image_size)), prefix=class_token + distillation_token + registers
        )

        def token(count: int) -> nnx.Param | None:
            return nnx.Param(start.token(rngs.params(), (1, count, width), jnp.float32)) if count else None

        self.cls_token = token(int(class_token))
        self.dist_token = token(int(distillation_token))
        self.reg_token = token(registers)
        self.prefix_positions = prefix_positions and position == "learned"
        if position == "sincos2d":
            sincos_2d(self.grid.shape, width)  # refuses a width that it cannot serve
        rows = self.grid.tokens if self.prefix_positions else self.grid.places
        learned = position == "learned"
        self.pos_embed = nnx.Param(start.position(rngs.params(), (1, rows, width), jnp.float32)) if learned else None
        self.norm_pre = LayerNorm(width, eps=norm_eps, dtype=dtype) if pre_norm else None

        options = BlockOptions(
            width=width,
            heads=heads,
            mlp_width=mlp_width,
            mlp=mlp,
            activation=activation,
            attention=attention,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            scale_attention_norm=scale_attention_norm,
            scale_mlp_norm=scale_mlp_norm,
            layer_scale=layer_scale,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            init=init,
            dtype=dtype,
        )
        in_turn = [attention_options] if isinstance(attention_options, dict | None) else attention_options
        group = [partial(BLOCKS[block], dataclasses.replace(options, attention_options=own)) for own in in_turn]
        self.blocks = Stack(group, depth, rngs=rngs, scan=scan, remat=remat)

        after_pool = (pool in ("avg", "max", "avgmax")) if fc_norm is None else fc_norm
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if final_norm and not after_pool else None
        self.fc_norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if final_norm and after_pool else None
        self.attn_pool = (
            AttentionPool(
                width,
                heads,
                mlp_width=pool_mlp_width or mlp_width,
                activation=activation,
                norm_eps=norm_eps,
                init=init,
                dtype=dtype,
                rngs=rngs,
            )
            if pool == "map"
            else None
        )
        self.pre_logits = (
            Linear(width, pre_logits, kernel_init=start.pre_logits, dtype=dtype, rngs=rngs) if pre_logits else None
        )

        def head() -> Linear | None:
            if num_classes == 0:
                return None
            bias = jax.nn.initializers.constant(head_bias)
            features = pre_logits or width
            return Linear(features, num_classes, kernel_init=start.head, bias_init=bias, dtype=dtype, rngs=rngs)

        self.head = head()
        self.head_dist = head() if distillation_token else None

    def __call__(
        self,
        images: Float[Array, "B Y X I"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        hook: Hook | None = None,
        mask: Bool[Array, "#B #H #N N"] | None = None,
    ) -> Float[Array, "B K"] | dict[str, Float[Array, "B K"]]:
        """Logits in float32 (pooled features if there is no head).

        With a distillation token: the mean of both heads, and in training
        `{"logits": class head, "distillation_logits": distillation head}`.
        """
        outputs = self._outputs(images, train=train, key=key, hook=hook, mask=mask)
        if train and self.head_dist is not None:
            return {name: outputs[name] for name in ("logits", "distillation_logits")}
        return outputs["mean_logits" if self.head_dist is not None else "logits" if self.num_classes else "pooled"]

    def features(
        self,
        images: Float[Array, "B Y X I"],
        *,
        layers: Sequence[int] = (),
        sites: Sequence[str] = (),
        train: bool = False,
        key: PRNGKeyArray | None = None,
        hook: Hook | None = None,
        mask: Bool[Array, "#B #H #N N"] | None = None,
    ) -> dict[str, Array]:
        """Named intermediates: `"blocks.3"` `[B, N, C]` for chosen layers, `"blocks.3.probs"` for chosen hook sites of
        these, `"embedded"` before the blocks, `"tokens"` after the final norm, `"pooled"`, and `"logits"` (and those of
        the distillation head).
        """
        return self._outputs(images, layers=layers, sites=sites, train=train, key=key, hook=hook, mask=mask)

    def _outputs(self, images, *, layers=(), sites=(), train, key, hook, mask) -> dict[str, Array]:
        with jax.named_scope("patch_embed"):
            x, grid = self._embed(images)
            x = dropout(x, self.dropout, train=train, key=fold_key(key, 0))
            x = x if self.norm_pre is None else self.norm_pre(x)
        embedded = x
        rates = np.linspace(0.0, self.drop_path, self.depth, dtype=np.float32)
        x, outputs = self.blocks(
            x,
            grid,
            per_layer={"drop_path": rates} if self.drop_path else None,
            mask=mask,
            hook=hook,
            train=train,
            key=fold_key(key, 1),
            layers=layers,
            sites=sites,
        )
        outputs = {"embedded": embedded} | {f"blocks.{name}": value for name, value in outputs.items()}
        return outputs | self._classify(x, grid, hook)

    def _embed(self, images: Float[Array, "B Y X I"]) -> tuple[Float[Array, "B N C"], Grid]:
        x = self.patch_embed(images if self.dtype is None else images.astype(self.dtype))
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

    def _classify(self, x: Float[Array, "B N C"], grid: Grid, hook: Hook | None) -> dict[str, Array]:
        with jax.named_scope("norm"):
            x = x if self.norm is None else self.norm(x)
        outputs = {"tokens": x}
        with jax.named_scope("attn_pool" if self.pool == "map" else "head"):
            pooled = self._pooled(x, grid, hook)
        with jax.named_scope("head"):
            pooled = pooled if self.fc_norm is None else self.fc_norm(pooled)
            pooled = pooled if self.pre_logits is None else jnp.tanh(self.pre_logits(pooled))
            outputs["pooled"] = pooled
            if self.head is not None:
                outputs["logits"] = self.head(pooled).astype(jnp.float32)
            if self.head_dist is not None:
                outputs["distillation_logits"] = self.head_dist(x[:, 1]).astype(jnp.float32)
                outputs["mean_logits"] = (outputs["logits"] + outputs["distillation_logits"]) / 2
        return outputs

    def _pooled(self, x: Float[Array, "B N C"], grid: Grid, hook: Hook | None) -> Float[Array, "B C"]:
        if self.pool == "token":
            # Without heads the features of a distilled model are those that its two heads would average.
            return x[:, :2].mean(axis=1) if self.dist_token is not None and self.head is None else x[:, 0]
        x = x if self.pool_prefix else x[:, grid.prefix :]
        if self.attn_pool is not None:
            return self.attn_pool(x, hook=hook)
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


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_choices(**choices: tuple[str, Any]) -> None:
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(unknown_name(option, value, allowed))
