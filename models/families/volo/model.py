"""Vision Outlooker, VOLO (Yuan et al. 2021, arXiv:2106.13112). Variants are in `models/families/volo/variants.py`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from attn import RESAMPLE_METHODS, Grid, resample_positions
from models.core import sharding
from models.core.call import Call
from models.core.init import scheme
from models.core.options import Count, Flag, Positive, Rate, Size, check_choices, check_stages, each, pair
from models.core.stack import Stack
from models.core.tap import TOKENS
from models.hosts.block import BlockOptions, PreNormBlock
from models.hosts.class_block import ClassBlock
from models.hosts.hierarchy import Hierarchy, HierarchyOptions, Stage, stack_stages
from models.hosts.options import options_for
from models.layers.cutmix import exchange, token_box
from models.layers.drop import dropout
from models.layers.linear import Head
from models.layers.norm import LayerNorm
from models.layers.patch import MapPatches
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import VoloStem

POOLS = ("token", "avg", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoloOptions(HierarchyOptions):
    """Options of `Volo`, besides those of every hierarchy.

    Attributes:
      widths, heads: channels and attention heads by stage.
      downsamples: which stages a patch embedding of 2 x 2 follows, which halves the map; one entry for each stage.
      outlook: which stages have outlook attention. Their layers count in the schedule of drop path but have none, as in
        the official code.
      mlp_ratio: hidden units of the MLPs over channels, one for all stages or one for each.
      window, stride: of outlook attention.
      image_size: which positions are for; others are accepted at call time.
      patch_size: side in pixels, even; stem_width: channels of the stem's convolutions.
      position_stage: the stage before whose blocks learned positions are added. position_resample: method for other
        image sizes, see `attn.resample_positions`.
      class_layers: class-attention blocks at the end; None for no class token.
      pool: `"token"`, the first token; `"avg"`, the mean of all, the class token among them; `"none"`, logits of all.
      token_head: there is a head for the tokens.
      dense: training gives `{"logits": class token, "token_logits": [B, N, K]}`, for `task.options.token_labels`.
      mix_token: training with `dense` exchanges a box of the embedded tokens between examples i and B-1-i (Token
        Labeling, arXiv:2104.10858, section 3.3). Token logits are exchanged back; `"own_share"` `[B]` is what is left
        of an example for its class token to see.
      attention: mechanism by name for all stages, in place of outlook and dense attention. Class attention stays, but
        for `"identity"`, with which no token sees another one.
      attention_options: a dictionary, of which each stage's mechanism takes what it has, or one for each stage.
      drop_path: rate of the last layer before class attention; layer i of n has `drop_path * i / (n - 1)`.
      dropout: after the stem too; position_dropout: after positions.
    """

    widths: Sequence[Count]
    heads: Sequence[Count]
    downsamples: Sequence[Flag] = (True, False, False, False)
    outlook: Sequence[Flag] = (True, False, False, False)
    mlp_ratio: Positive | Sequence[Positive] = 3.0
    window: Count = 3
    stride: Count = 2
    patch_size: Count = 8
    stem_width: Count = 64
    position_stage: Size = 1
    position_resample: str = "cubic"
    class_layers: Size | None = 2
    pool: str = "token"
    token_head: Flag = True
    dense: Flag = False
    mix_token: Flag = False
    attention: str | None = None
    qkv_bias: Flag = False
    position_dropout: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = each("mlp_ratio", self.mlp_ratio, len(self.depths))
        check_stages(
            depths=self.depths,
            widths=self.widths,
            heads=self.heads,
            downsamples=self.downsamples,
            outlook=self.outlook,
            mlp_ratio=ratios,
        )
        _check_widths(self.widths, self.downsamples)
        check_choices(pool=(self.pool, POOLS), position_resample=(self.position_resample, RESAMPLE_METHODS))
        if self.position_stage >= len(self.depths):
            raise ValueError(f"position_stage={self.position_stage}; allowed: 0 to {len(self.depths) - 1}")
        if self.dense and not (self.token_head and self.pool == "token" and self.class_layers is not None):
            raise ValueError("dense=True needs pool='token', token_head=True and a class token (class_layers)")
        if self.mix_token and not self.dense:
            raise ValueError("mix_token=True needs dense=True: nothing else knows what was exchanged")

    def check_attention_options(self) -> None:
        """Options of all stages, or of each."""
        options_for(self.by_stage(), self.attention_options)

    def by_stage(self) -> list[str]:
        """The mechanism of each stage."""
        return [self.attention or ("outlook" if outlook else "dense") for outlook in self.outlook]

    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms of the model, each once."""
        return tuple(dict.fromkeys(self.by_stage()))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows are for outlook attention."""
        return {"window": ("outlook",), "stride": ("outlook",)}


class Volo(Hierarchy):
    """Convolutional stem, outlook attention on a fine map, dense attention on a coarse one, class attention, two heads.

    The class token's head is joined by one for every other token: logits are those of the class token and half of the
    largest, for each class, of all tokens. Training by token labels takes them apart (`dense`): a call then gives
    `"logits"` of the class token alone, `"token_logits"` and, with mix-token, `"own_share"`.

    `features` are those of `Hierarchy`, and: layers of class attention come last, `"class_blocks.1"` `[B, 1 + N, C]`;
    `"tokens"` begin with the class token; `"class_logits"` and `"token_logits"` `[B, N, K]`, which `"logits"` are made
    of.
    """

    Options = VoloOptions
    options: VoloOptions
    patch_embed: VoloStem

    def __init__(self, options: VoloOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        start, last = scheme(o.init), len(o.depths) - 1
        self.num_classes, self.dtype, self.drop_path = o.num_classes, o.dtype, o.drop_path
        self.position_resample = o.position_resample
        self.dropout, self.head_dropout = o.dropout, o.head_dropout
        common: dict[str, Any] = {"init": o.init, "dtype": o.dtype, "rngs": rngs}

        self.patch_embed = VoloStem(o.channels, o.widths[0], hidden=o.stem_width, patch=o.patch_size, **common)
        maps = self._maps()
        self.grid = Grid(maps[o.position_stage])
        shape = (1, *self.grid.shape, o.widths[o.position_stage])
        self.pos_embed = nnx.Param(start.position(rngs.params(), shape, jnp.float32))

        makers = [[partial(PreNormBlock, self._block(stage, Grid(shape)))] for stage, shape in enumerate(maps)]
        stacks = stack_stages(makers, o.depths, rngs=rngs, scan=o.scan, remat=o.remat)
        between = [None] + [
            MapPatches((2, 2), before, after, kernel_init=start.patch, dtype=o.dtype, rngs=rngs) if halves else None
            for (before, after), halves in zip(itertools.pairwise(o.widths), o.downsamples, strict=False)
        ]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])

        # PyTorch's 0.02 for this token too, where timm's ViT has 1e-6.
        token = (1, 1, o.widths[last])
        has_token = o.class_layers is not None
        self.cls_token = nnx.Param(start.position(rngs.params(), token, jnp.float32)) if has_token else None
        late: dict[str, Any] = {"name": "class_blocks", "first": sum(o.depths), "scan": o.scan, "remat": o.remat}
        class_block = partial(ClassBlock, self._block(last, None))
        self.class_blocks = Stack([class_block], o.class_layers, rngs=rngs, **late) if o.class_layers else None
        self.norm = LayerNorm(o.widths[last], eps=o.norm_eps, dtype=o.dtype)

        def classifier() -> Head:
            return Head(o.widths[last], o.num_classes, kernel_init=start.head, dtype=o.dtype, rngs=rngs)

        self.head = classifier() if o.num_classes else None
        self.aux_head = classifier() if o.num_classes and o.token_head else None

    def _maps(self) -> list[tuple[int, int]]:
        """Rows and columns of the map of each stage."""
        o = self.options
        halved = itertools.accumulate(o.downsamples[:-1], lambda before, now: before + now, initial=0)
        rows, columns = self.patch_embed.grid_shape(*pair(o.image_size))
        return [(max(1, rows // 2**times), max(1, columns // 2**times)) for times in halved]

    def _block(self, stage: int, grid: Grid | None) -> BlockOptions:
        o = self.options
        names = o.by_stage()
        return BlockOptions.of(
            o,
            width=o.widths[stage],
            heads=o.heads[stage],
            mlp_width=int(o.widths[stage] * each("mlp_ratio", o.mlp_ratio, len(o.depths))[stage]),
            attention=names[stage],
            attention_options=options_for(names, o.attention_options)[stage],
            attention_defaults={"outlook": {"window": o.window, "stride": o.stride}},
            grid=grid,
        )

    def answer(self, outputs: Mapping[str, Array], train: bool) -> Any:
        """In training with `dense`, logits of the class token and of the others, apart."""
        if self.head is None or not (train and self.options.dense):
            return super().answer(outputs, train)
        return {name: outputs[name] for name in ("logits", "token_logits", "own_share") if name in outputs}

    def run(self, images: Float[Array, "B Y X I"], call: Call, layers: Sequence[int]) -> dict[str, Array]:
        """See above."""
        chosen = self._chosen(layers)
        inside = sum(stage.depth for stage in self.stages)
        outputs = super().run(images, call, [layer for layer in chosen if layer < inside])
        last = outputs[f"stages.{len(self.stages) - 1}"]
        x, grid = last.reshape(last.shape[0], -1, last.shape[-1]), Grid(last.shape[1:3])
        if self.cls_token is not None:
            token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            x, grid = sharding.over_batch(jnp.concatenate([token, x], axis=1)), Grid(grid.shape, prefix=1)
        if self.class_blocks is not None:
            late = [layer - inside for layer in chosen if layer >= inside]
            own = call.replace(grid=grid, key=call.key_for("class_blocks"), layer=inside)
            x, found = self.class_blocks(x, own, layers=late)
            outputs |= {f"class_blocks.{name}": value for name, value in found.items()}
        call = call.replace(layer=self.depth)
        with jax.named_scope("norm"):
            x = outputs["tokens"] = call.emit("norm", self.norm(x), TOKENS)
            pooled = {"token": x[:, 0], "avg": x.mean(axis=1), "none": x}[self.options.pool]
            axes = TOKENS if self.options.pool == "none" else "batch channels"
            outputs["pooled"] = call.emit("pooled", pooled, axes)
        if self.head is not None:
            mixes = call.train and self.options.mix_token
            outputs |= self._logits(outputs, grid.shape, self._box(grid.shape, call) if mixes else None, call)
        return outputs

    def _logits(
        self, outputs: dict[str, Array], shape: tuple[int, ...], box: Bool[Array, "V U"] | None, call: Call
    ) -> dict[str, Array]:
        def of(name: str, x: Array) -> Array:
            x = dropout(x, self.head_dropout, train=call.train, key=call.key_for(name))
            return getattr(self, name)(x)

        with jax.named_scope("head"):
            logits = of("head", outputs["pooled"])
        axes = "batch tokens classes" if logits.ndim == 3 else "batch classes"
        found = {"class_logits": logits, "logits": logits}
        if self.aux_head is not None:
            with jax.named_scope("aux_head"):
                tokens = found["token_logits"] = of("aux_head", outputs["tokens"][:, 1:])
                if not (call.train and self.options.dense) and self.options.pool != "none":
                    found["logits"] = logits + 0.5 * GLOBAL_POOLS["max"](tokens)
                if box is not None:
                    back = exchange(tokens.reshape(tokens.shape[0], *shape, -1), box)
                    found["token_logits"] = back.reshape(tokens.shape)
                    found["own_share"] = jnp.full(len(tokens), 1 - box.mean(), jnp.float32)
        found["logits"] = call.emit("logits.out", found["logits"], axes)
        return found

    def enter(self, stage: int, x: Float[Array, "B Y X C"], call: Call) -> Array:
        """Mix-token before the first stage, positions before that of `position_stage`."""
        if stage == 0 and call.train and self.options.mix_token and self.head is not None:
            cell = 2 ** sum(stage.downsample is not None for stage in self.stages)
            x = exchange(x, self._box((x.shape[1] // cell, x.shape[2] // cell), call), cell)
        if stage == self.options.position_stage:
            rows = self.pos_embed[...].reshape(1, -1, x.shape[-1])
            method = self.position_resample
            rows = jnp.asarray(resample_positions(rows, self.grid.shape, x.shape[1:3], method=method))
            x = x + rows.reshape(1, *x.shape[1:]).astype(x.dtype)
            x = dropout(x, self.options.position_dropout, train=call.train, key=call.key_for("positions"))
        return x

    def classify(self, x: Float[Array, "B Y X C"], call: Call) -> dict[str, Array]:
        """Nothing: `run` goes on from the last map, because class attention has layers of its own."""
        return {}

    def drop_rates(self) -> np.ndarray:
        """Drop-path rates of the layers before class attention; none in stages of outlook attention."""
        owners = np.repeat(self.options.outlook, [stage.depth for stage in self.stages])
        return np.where(owners, 0.0, np.linspace(0.0, self.drop_path, len(owners)))

    def _box(self, shape: tuple[int, ...], call: Call) -> Bool[Array, "V U"]:
        """The box of a call of the model, the same wherever it is asked for."""
        key = call.key_for("box")
        if key is None:
            raise ValueError("mix-token needs a key in training: call the model with key=...")
        return token_box(key, (shape[0], shape[1]))

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


def _check_widths(widths: Sequence[int], downsamples: Sequence[bool]) -> None:
    if downsamples[-1]:
        raise ValueError(f"downsamples={tuple(downsamples)}: no stage follows the last one")
    for stage, (before, after) in enumerate(itertools.pairwise(widths)):
        if before != after and not downsamples[stage]:
            raise ValueError(f"widths={tuple(widths)}: the width changes behind stage {stage} without downsampling")
