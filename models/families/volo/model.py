"""Vision Outlooker, VOLO (Yuan et al. 2021, arXiv:2106.13112). Variants are in `models/families/volo/variants.py`."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import RESAMPLE_METHODS, Grid, Hook, resample_positions
from models.core import sharding
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.stack import Stack
from models.hosts.block import BlockOptions, PreNormBlock
from models.hosts.class_block import ClassBlock
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.cutmix import exchange, token_box
from models.layers.drop import dropout, fold_key
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm
from models.layers.patch import MapPatches
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import VoloStem

POOLS = ("token", "avg", "none")
# A stack folds the numbers of its layers into the key of its stage; what else a stage draws has numbers behind these.
_BOX, _POSITIONS = 2**21, 2**21 + 1


class Volo(Hierarchy):
    """Convolutional stem, outlook attention on a fine map, dense attention on a coarse one, class attention, two heads.

    The class token's head is joined by one for every other token: logits are those of the class token and half of the
    largest, for each class, of all tokens. Training by token labels takes them apart (`dense`).

    Args:
      depths, widths, heads: layers, channels and attention heads by stage.
      downsamples: which stages a patch embedding of 2 x 2 follows, which halves the map; one entry for each stage.
      outlook: which stages have outlook attention. Their layers count in the schedule of drop path but have none, as in
        the official code.
      mlp_ratio: hidden units of the MLPs over channels, one for all stages or one for each.
      window, stride: of outlook attention.
      image_size: side in pixels, or (height, width), which positions are for; others are accepted at call time.
      num_classes: 0 for no heads; the model then returns pooled features.
      patch_size: side in pixels, even; stem_width: channels of the stem's convolutions.
      position_stage: the stage before whose blocks learned positions are added. position_resample: method for other
        image sizes, see `attn.resample_positions`.
      class_layers: class-attention blocks at the end; None for no class token.
      pool: `"token"`, the first token; `"avg"`, the mean of all, the class token among them; `"none"`, logits of all.
      token_head: there is a head for the tokens.
      dense: training gives `{"logits": class token, "token_logits": [B, N, K]}`, for `train.token_labels`.
      mix_token: training with `dense` exchanges a box of the embedded tokens between examples i and B-1-i (Token
        Labeling, arXiv:2104.10858, section 3.3). Token logits are exchanged back; `"own_share"` `[B]` is what is left
        of an example for its class token to see.
      attention: mechanism by name for all stages, in place of outlook and dense attention. Class attention stays, but
        for `"identity"`, with which no token sees another one. attention_options: for the mechanism of every stage.
      drop_path: rate of the last layer before class attention; layer i of n has `drop_path * i / (n - 1)`.
      dropout: after the stem, attention projection and both MLP layers; position_dropout: after positions;
        head_dropout: before the heads; attention_dropout: on probabilities.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        heads: Sequence[int],
        downsamples: Sequence[bool] = (True, False, False, False),
        outlook: Sequence[bool] = (True, False, False, False),
        mlp_ratio: float | Sequence[float] = 3.0,
        window: int = 3,
        stride: int = 2,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        patch_size: int = 8,
        stem_width: int = 64,
        position_stage: int = 1,
        position_resample: str = "cubic",
        class_layers: int | None = 2,
        pool: str = "token",
        token_head: bool = True,
        dense: bool = False,
        mix_token: bool = False,
        mlp: str = "mlp",
        activation: str = "gelu",
        attention: str | None = None,
        attention_options: dict[str, Any] | None = None,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        position_dropout: float = 0.0,
        head_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        ratios = [mlp_ratio] * len(depths) if isinstance(mlp_ratio, int | float) else mlp_ratio
        _check_stages(depths, widths=widths, heads=heads, downsamples=downsamples, outlook=outlook, mlp_ratio=ratios)
        _check_widths(widths, downsamples)
        for option, value, allowed in (
            ("pool", pool, POOLS),
            ("position_resample", position_resample, RESAMPLE_METHODS),
        ):
            if value not in allowed:
                raise ValueError(unknown_name(option, value, allowed))
        if not 0 <= position_stage < len(depths):
            raise ValueError(f"position_stage={position_stage}; allowed: 0 to {len(depths) - 1}")
        if dense and not (token_head and pool == "token" and class_layers is not None):
            raise ValueError("dense=True needs pool='token', token_head=True and a class token (class_layers)")
        if mix_token and not dense:
            raise ValueError("mix_token=True needs dense=True: nothing else knows what was exchanged")
        start = scheme(init)
        self.num_classes, self.dtype, self.pooling = num_classes, dtype, pool
        self.dense, self.mix_token = dense, mix_token
        self.position_stage, self.position_resample = position_stage, position_resample
        self.outlook, self.drop_path = tuple(outlook), drop_path
        self.dropout, self.position_dropout, self.head_dropout = dropout, position_dropout, head_dropout
        common = {"init": init, "dtype": dtype, "rngs": rngs}

        self.patch_embed = VoloStem(channels, widths[0], hidden=stem_width, patch=patch_size, **common)
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        halved = 2 ** sum(downsamples[:position_stage])
        rows, columns = (max(1, side // halved) for side in self.patch_embed.grid_shape(*sides))
        self.grid = Grid((rows, columns))
        positions = start.position(rngs.params(), (1, rows, columns, widths[position_stage]), jnp.float32)
        self.pos_embed = nnx.Param(positions)

        def options(stage: int, mechanism: str, **defaults: Any) -> BlockOptions:
            return BlockOptions(
                width=widths[stage],
                heads=heads[stage],
                mlp_width=int(widths[stage] * ratios[stage]),
                mlp=mlp,
                activation=activation,
                attention=mechanism,
                attention_options=attention_options,
                attention_defaults=defaults,
                qkv_bias=qkv_bias,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
                init=init,
                dtype=dtype,
            )

        def stage_options(stage: int) -> BlockOptions:
            mechanism = attention or ("outlook" if outlook[stage] else "dense")
            own = {"window": window, "stride": stride} if mechanism == "outlook" else {}
            return options(stage, mechanism, **own)

        makers = [[partial(PreNormBlock, stage_options(stage))] for stage in range(len(depths))]
        stacks = stack_stages(makers, depths, rngs=rngs, scan=scan, remat=remat)
        between = [None] + [
            MapPatches((2, 2), widths[stage], widths[stage + 1], kernel_init=start.patch, dtype=dtype, rngs=rngs)
            if downsamples[stage]
            else None
            for stage in range(len(depths) - 1)
        ]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])

        last = len(depths) - 1
        has_token = class_layers is not None
        # PyTorch's 0.02 for this token too, where timm's ViT has 1e-6.
        self.cls_token = (
            nnx.Param(start.position(rngs.params(), (1, 1, widths[last]), jnp.float32)) if has_token else None
        )
        late: dict[str, Any] = {"name": "class_blocks", "first": sum(depths), "scan": scan, "remat": remat}
        class_block = partial(ClassBlock, options(last, attention or "dense"))
        self.class_blocks = Stack([class_block], class_layers, rngs=rngs, **late) if class_layers else None
        self.norm = LayerNorm(widths[last], eps=norm_eps, dtype=dtype)

        def classifier() -> Linear:
            return Linear(widths[last], num_classes, kernel_init=start.head, dtype=dtype, rngs=rngs)

        self.head = classifier() if num_classes else None
        self.aux_head = classifier() if num_classes and token_head else None

    def __call__(  # type: ignore[override]
        self,
        images: Float[Array, "B Y X I"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        hook: Hook | None = None,
    ) -> Float[Array, "B K"] | dict[str, Array]:
        """Logits in float32 (pooled features if there is no head), for images of any size.

        In training with `dense`: `"logits"` of the class token alone, `"token_logits"` and, with mix-token,
        `"own_share"`.
        """
        outputs = self.features(images, train=train, key=key, hook=hook)
        if self.head is None:
            return outputs["pooled"]
        if not (train and self.dense):
            return outputs["logits"]
        return {name: outputs[name] for name in ("logits", "token_logits", "own_share") if name in outputs}

    def features(
        self,
        images: Float[Array, "B Y X I"],
        *,
        layers: Sequence[int] = (),
        sites: Sequence[str] = (),
        train: bool = False,
        key: PRNGKeyArray | None = None,
        hook: Hook | None = None,
    ) -> dict[str, Array]:
        """Named intermediates, as `Hierarchy.features` has them.

        Layers of class attention come last: `"class_blocks.1"` `[B, 1 + N, C]`. `"tokens"` begin with the class token.
        Besides, `"class_logits"` and `"token_logits"` `[B, N, K]`, which `"logits"` are made of.
        """
        chosen = self._chosen(layers)
        inside = sum(stage.depth for stage in self.stages)
        outputs = super().features(
            images,
            layers=[layer for layer in chosen if layer < inside],
            sites=sites,
            train=train,
            key=key,
            hook=hook,
        )
        last = outputs[f"stages.{len(self.stages) - 1}"]
        x, grid = last.reshape(last.shape[0], -1, last.shape[-1]), Grid(last.shape[1:3])
        own_key = fold_key(key, 1 + len(self.stages))
        if self.cls_token is not None:
            token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            x, grid = sharding.over_batch(jnp.concatenate([token, x], axis=1)), Grid(grid.shape, prefix=1)
        if self.class_blocks is not None:
            late = [layer - inside for layer in chosen if layer >= inside]
            x, found = self.class_blocks(x, grid, hook=hook, train=train, key=own_key, layers=late, sites=sites)
            outputs |= {f"class_blocks.{name}": value for name, value in found.items()}
        with jax.named_scope("norm"):
            x = outputs["tokens"] = self.norm(x)
            outputs["pooled"] = {"token": x[:, 0], "avg": x.mean(axis=1), "none": x}[self.pooling]
        if self.head is not None:
            box = self._box(last.shape[1:3], key) if train and self.mix_token else None
            outputs |= self._logits(outputs, grid.shape, box, train=train, key=own_key)
        return outputs

    def _logits(
        self,
        outputs: dict[str, Array],
        shape: tuple[int, ...],
        box: Bool[Array, "V U"] | None,
        *,
        train: bool,
        key: PRNGKeyArray | None,
    ) -> dict[str, Array]:
        def of(head: Any, x: Array, number: int) -> Array:
            x = dropout(x, self.head_dropout, train=train, key=fold_key(key, _BOX + number))
            return head(x).astype(jnp.float32)

        with jax.named_scope("head"):
            logits = of(self.head, outputs["pooled"], 0)
        found = {"logits": logits, "class_logits": logits}
        if self.aux_head is None:
            return found
        with jax.named_scope("aux_head"):
            tokens = found["token_logits"] = of(self.aux_head, outputs["tokens"][:, 1:], 1)
            if not (train and self.dense) and self.pooling != "none":
                found["logits"] = logits + 0.5 * GLOBAL_POOLS["max"](tokens)
            if box is not None:
                back = exchange(tokens.reshape(tokens.shape[0], *shape, -1), box)
                found["token_logits"] = back.reshape(tokens.shape)
                found["own_share"] = jnp.full(len(tokens), 1 - box.mean(), jnp.float32)
        return found

    def enter(self, stage: int, x: Float[Array, "B Y X C"], *, train: bool, key: PRNGKeyArray | None) -> Array:
        """Mix-token before the first stage, positions before that of `position_stage`."""
        if stage == 0 and train and self.mix_token and self.head is not None:
            cell = 2 ** sum(stage.downsample is not None for stage in self.stages)
            x = exchange(x, self._stage_box((x.shape[1] // cell, x.shape[2] // cell), key), cell)
        if stage == self.position_stage:
            rows = self.pos_embed[...].reshape(1, -1, x.shape[-1])
            method = self.position_resample
            rows = jnp.asarray(resample_positions(rows, self.grid.shape, x.shape[1:3], method=method))
            x = x + rows.reshape(1, *x.shape[1:]).astype(x.dtype)
            x = dropout(x, self.position_dropout, train=train, key=fold_key(key, _POSITIONS))
        return x

    def classify(
        self, x: Float[Array, "B Y X C"], *, hook: Hook | None, train: bool, key: PRNGKeyArray | None
    ) -> dict[str, Array]:
        """Nothing: `features` goes on from the last map, because class attention has layers of its own."""
        return {}

    def drop_rates(self) -> np.ndarray:
        """Drop-path rates of the layers before class attention; none in stages of outlook attention."""
        owners = np.repeat(self.outlook, [stage.depth for stage in self.stages])
        return np.where(owners, 0.0, np.linspace(0.0, self.drop_path, len(owners)))

    def _box(self, shape: tuple[int, ...], key: PRNGKeyArray | None) -> Bool[Array, "V U"]:
        """The box that the first stage was entered with: its key is made from the key of the call as there."""
        return self._stage_box(shape, fold_key(key, 1))

    def _stage_box(self, shape: tuple[int, ...], key: PRNGKeyArray | None) -> Bool[Array, "V U"]:
        if key is None:
            raise ValueError("mix-token needs a key in training: call the model with key=...")
        return token_box(jax.random.fold_in(key, _BOX), (shape[0], shape[1]))

    @property
    def depth(self) -> int:
        """Layers of all stages and of class attention."""
        late = 0 if self.class_blocks is None else self.class_blocks.depth
        return sum(stage.depth for stage in self.stages) + late

    def layer_id(self, name: str) -> int:
        """As in `Hierarchy`; positions and class token are embedding, blocks of class attention follow the stages."""
        top, _, rest = name.partition(".")
        if top in ("pos_embed", "cls_token"):
            return 0
        if top == "class_blocks":
            return 1 + sum(stage.depth for stage in self.stages) + int(rest.partition(".")[0])
        return super().layer_id(name)


def _check_stages(depths: Sequence[int], **options: Sequence[Any]) -> None:
    for name, values in options.items():
        if len(values) != len(depths):
            raise ValueError(f"depths={tuple(depths)} and {name}={tuple(values)}: one entry for each stage is needed")


def _check_widths(widths: Sequence[int], downsamples: Sequence[bool]) -> None:
    if downsamples[-1]:
        raise ValueError(f"downsamples={tuple(downsamples)}: no stage follows the last one")
    for stage, (before, after) in enumerate(itertools.pairwise(widths)):
        if before != after and not downsamples[stage]:
            raise ValueError(f"widths={tuple(widths)}: the width changes behind stage {stage} without downsampling")
