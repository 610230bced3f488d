"""What models of several stages have in common: stages of blocks on ever coarser maps, and how such a model is run.

A family of this kind says in its constructor what it is made of (stem, stages, norm, head) and is otherwise a
`Hierarchy`. Blocks are those of every model (`models/hosts/block.py`), so a stage can hold any kind with any attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.call import Call
from models.core.options import Count, check_choices, check_stages
from models.core.stack import MakeBlock, Stack, run_alone
from models.core.tap import TOKENS
from models.hosts.block import BLOCKS
from models.hosts.classifier import Classifier
from models.hosts.options import TransformerOptions
from models.layers.drop import dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class HierarchyOptions(TransformerOptions):
    """Options of models of several stages.

    Attributes:
      depths: layers by stage.
    """

    depths: Sequence[Count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesOptions(HierarchyOptions):
    """Options of those whose stages are stacks of blocks by name.

    Attributes:
      heads: attention heads of a layer, by stage.
      block: kind of block (`models.hosts.block.BLOCKS`).
      layer_scale: initial value; None for no layer scale.
    """

    heads: Sequence[Count]
    block: str = "pre_norm"
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(block=(self.block, self.blocks()))
        check_stages(depths=self.depths, heads=self.heads)

    def blocks(self) -> Sequence[str]:
        """Names of the kinds of blocks that there are."""
        return tuple(BLOCKS)


class Stage(nnx.Module):
    """A layer that halves the map (none in the first stage), then blocks on the tokens of the smaller one.

    Args:
      downsample: called as `downsample(map, *, train)`.
      blocks: the stage's stack, or None if `first` is its only layer.
      first: for stages whose first block itself changes sides and channels (MaxViT, ResNets): that block, a layer like
        those of the stack, called as `first(map, call)`.
      remat: of `first`; the stack has its own.
    """

    def __init__(
        self,
        downsample: nnx.Module | None,
        blocks: Stack | None,
        first: nnx.Module | None = None,
        remat: str = "auto",
    ):
        self.downsample, self.blocks, self.first, self.remat = downsample, blocks, first, remat

    @property
    def depth(self) -> int:
        """Layers, `first` among them."""
        return (self.first is not None) + (0 if self.blocks is None else self.blocks.depth)


def stack_stages(
    makers: Sequence[Sequence[MakeBlock]],
    depths: Sequence[int],
    *,
    rngs: nnx.Rngs,
    scan: bool,
    remat: str,
    own_first: bool = False,
) -> list[Stack | None]:
    """The blocks of every stage, numbered through the model; None for a stage without any in its stack.

    Args:
      makers: for each stage the group of blocks that it repeats.
      depths: layers of each stage.
      own_first: every stage has a `first` block, one of its layers, which is not made here.
    """
    starts = np.cumsum([0, *depths]).tolist()
    stacks: list[Stack | None] = []
    for stage, (group, depth, start) in enumerate(zip(makers, depths, starts, strict=False)):
        name, inside = f"stages.{stage}.blocks", depth - own_first
        options = {"rngs": rngs, "name": name, "first": start + own_first, "scan": scan, "remat": remat}
        # A short stage does not reach the last blocks of its group.
        stacks.append(Stack(group[:inside], inside, **options) if inside else None)
    return stacks


class Hierarchy(Classifier):
    """A model of stages; its constructor sets what is declared here.

    The last stage's tokens are normalized, averaged and classified (`pool` says so, and may be said otherwise). Drop
    path grows linearly over the layers of all stages (`drop_rates`). Layers are numbered through the model, for taps
    and for `features`.

    `features` are the pyramid `"stages.0"`, `"stages.1"` ... `[B, Y, X, C]`, outputs of the stages;
    `"stages.2.embedded"` before the blocks of a stage, and `"embedded"` before all; `"stages.2.blocks.5"` or
    `"stages.2.first"` `[B, N, C]` for chosen layers; `"tokens"`, `"pooled"`, `"logits"`.
    """

    patch_embed: nnx.Module
    stages: nnx.List
    norm: nnx.Module
    head: nnx.Module | None
    dropout: float
    head_dropout: float = 0.0
    drop_path: float

    def run(self, images: Float[Array, "B Y X I"], call: Call, layers: Sequence[int]) -> dict[str, Array]:
        """See above."""
        chosen = self._chosen(layers)
        rates = np.asarray(self.drop_rates(), np.float32) if self.drop_path else None
        outputs: dict[str, Array] = {}
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(images, train=call.train)
            x = dropout(x, self.dropout, train=call.train, key=call.key_for("patch_embed"))
            tokens = call.emit("embedded", _tokens(x), TOKENS)
            outputs["embedded"] = x = tokens.reshape(x.shape)
        start = 0
        for number, stage in enumerate(self.stages):
            name, layer = f"stages.{number}", start
            with jax.named_scope(f"{name}.downsample" if number else "patch_embed"):
                x = tokens.reshape(x.shape)
                x = x if stage.downsample is None else stage.downsample(x, train=call.train)
                x = outputs[f"{name}.embedded"] = self.enter(number, x, call)
                tokens = _tokens(x)
            if stage.first is not None:
                with jax.named_scope(f"{name}.first"):
                    rate = 0.0 if rates is None else float(rates[layer])
                    own = call.at(f"{name}.first", grid=Grid(x.shape[1:-1]), layer=layer, drop_path=rate)
                    x = run_alone(stage.first, x, own, remat=stage.remat)
                    tokens = _tokens(x)
                if layer in chosen:
                    outputs[f"{name}.first"] = tokens
                layer += 1
            if stage.blocks is not None:
                mine = range(layer, layer + stage.blocks.depth)
                tokens, found = stage.blocks(
                    tokens,
                    call.replace(grid=Grid(x.shape[1:-1]), key=call.key_for(name)),
                    drop_path=None if rates is None else rates[mine.start : mine.stop],
                    layers=[one - layer for one in chosen if one in mine],
                )
                outputs |= {f"{name}.blocks.{found_name}": value for found_name, value in found.items()}
            outputs[name] = tokens.reshape(x.shape)
            start += stage.depth
        return outputs | self.classify(tokens.reshape(x.shape), call.replace(layer=self.depth))

    def enter(self, stage: int, x: Float[Array, "B Y X C"], call: Call) -> Array:
        """What happens to the map before the blocks of a stage: nothing, unless a model says so (positions). The call
        is that of the model.
        """
        return x

    def drop_rates(self) -> Sequence[float] | np.ndarray:
        """Drop-path rates of all layers."""
        return np.linspace(0.0, self.drop_path, self.depth)

    def classify(self, x: Float[Array, "B Y X C"], call: Call) -> dict[str, Array]:
        """`"tokens"`, `"pooled"` and, with a head, `"logits"`, from the last stage's map."""
        outputs: dict[str, Array] = {}
        with jax.named_scope("norm"):
            tokens, pooled = self.pool(x, call)
            outputs["tokens"], outputs["pooled"] = tokens, call.emit("pooled", pooled, "batch channels")
        if self.head is not None:
            with jax.named_scope("head"):
                key = call.key_for("head")
                pooled = dropout(outputs["pooled"], self.head_dropout, train=call.train, key=key)
                outputs["logits"] = call.emit("logits.out", self.head(pooled), "batch classes")
        return outputs

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        """Final tokens and the pooled features: norm, then mean."""
        tokens = call.emit("norm", self.norm(_tokens(x)), TOKENS)
        return tokens, tokens.mean(axis=1)

    @property
    def depth(self) -> int:
        """Layers of all stages."""
        return sum(stage.depth for stage in self.stages)

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return self.depth + 1

    def layer_id(self, name: str) -> int:
        """Layer of an unrolled parameter name, for layer-wise decay: 0 embedding, i + 1 layer i, then `num_layers`.

        What stands before the blocks of a stage goes with the first of them.
        """
        top, _, rest = name.partition(".")
        if top == "patch_embed":
            return 0
        if top != "stages":
            return self.num_layers
        stage, part, *inside = rest.split(".")
        start = 1 + sum(before.depth for before in self.stages[: int(stage)])
        if part != "blocks":
            return start
        return start + (self.stages[int(stage)].first is not None) + int(inside[0])

    def _chosen(self, layers: Sequence[int]) -> set[int]:
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"no layer {layer}, there are {self.depth}")
        return {layer % self.depth for layer in layers}


def _tokens(x: Float[Array, "B Y X C"]) -> Float[Array, "B N C"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
