"""What models of several stages have in common: stages of blocks on ever coarser maps, and how such a model is run.

A family of this kind says in its constructor what it is made of (stem, stages, norm, head) and is otherwise a
`Hierarchy`. Blocks are those of every model (`models/blocks.py`), so a stage can hold any kind with any attention.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models.layers import DType, Linear, dropout, fold_key
from models.stack import MakeBlock, Stack


class Stage(nnx.Module):
    """A layer that halves the map (none in the first stage), then blocks on the tokens of the smaller one."""

    def __init__(self, downsample: nnx.Module | None, blocks: Stack):
        self.downsample, self.blocks = downsample, blocks


def stack_stages(
    makers: Sequence[Sequence[MakeBlock]], depths: Sequence[int], *, rngs: nnx.Rngs, scan: bool, remat: str
) -> list[Stack]:
    """The blocks of every stage, numbered through the model.

    Args:
      makers: for each stage the group of blocks that it repeats, `depths` layers in all.
    """
    firsts = np.cumsum([0, *depths]).tolist()
    return [
        Stack(group, depth, rngs=rngs, name=f"stages.{stage}.blocks", first=first, scan=scan, remat=remat)
        for stage, (group, depth, first) in enumerate(zip(makers, depths, firsts, strict=False))
    ]


class Hierarchy(nnx.Module):
    """A model of stages; its constructor sets what is declared here.

    The last stage's tokens are normalized, averaged and classified. Drop path grows linearly over the layers of all
    stages. Layers are numbered through the model, for hooks and for `features`.
    """

    patch_embed: nnx.Module
    stages: nnx.List
    norm: nnx.Module
    head: Linear | None
    dropout: float
    drop_path: float
    dtype: DType

    def __call__(
        self,
        images: Float[Array, "B Y X I"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        hook: Hook | None = None,
    ) -> Float[Array, "B K"]:
        """Logits in float32 (pooled features if there is no head), for images of any size."""
        outputs = self.features(images, train=train, key=key, hook=hook)
        return outputs["pooled" if self.head is None else "logits"]

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
        """Named intermediates.

        The pyramid `"stages.0"`, `"stages.1"` ... `[B, Y, X, C]`, outputs of the stages; `"stages.2.embedded"` before
        the blocks of a stage, and `"embedded"` before all; `"stages.2.blocks.5"` `[B, N, C]` for chosen layers
        (numbered through the model, negative ones from the end) and `"stages.2.blocks.5.probs"` for chosen hook sites
        of these; `"tokens"` after the final norm, `"pooled"`, `"logits"`.
        """
        chosen = self._chosen(layers)
        rates = np.linspace(0.0, self.drop_path, self.depth, dtype=np.float32)
        outputs: dict[str, Array] = {}
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(images if self.dtype is None else images.astype(self.dtype))
            x = outputs["embedded"] = dropout(x, self.dropout, train=train, key=fold_key(key, 0))
            tokens = _tokens(x)
        for number, stage in enumerate(self.stages):
            name, blocks = f"stages.{number}", stage.blocks
            if stage.downsample is not None:
                with jax.named_scope(f"{name}.downsample"):
                    x = stage.downsample(tokens.reshape(x.shape))
                    tokens = _tokens(x)
            outputs[f"{name}.embedded"] = x
            mine = range(blocks.first, blocks.first + blocks.depth)
            tokens, found = blocks(
                tokens,
                Grid(x.shape[1:-1]),
                per_layer={"drop_path": rates[mine.start : mine.stop]} if self.drop_path else None,
                hook=hook,
                train=train,
                key=fold_key(key, 1 + number),
                layers=[layer - blocks.first for layer in chosen if layer in mine],
                sites=sites,
            )
            outputs[name] = tokens.reshape(x.shape)
            outputs |= {f"{name}.blocks.{layer}": value for layer, value in found.items()}

        with jax.named_scope("norm"):
            outputs["tokens"] = self.norm(tokens)
        with jax.named_scope("head"):
            outputs["pooled"] = outputs["tokens"].mean(axis=1)
            if self.head is not None:
                outputs["logits"] = self.head(outputs["pooled"]).astype(jnp.float32)
        return outputs

    @property
    def depth(self) -> int:
        """Layers of all stages."""
        return sum(stage.blocks.depth for stage in self.stages)

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
        first = self.stages[int(stage)].blocks.first + 1
        return first + int(inside[0]) if part == "blocks" else first

    def _chosen(self, layers: Sequence[int]) -> set[int]:
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"no layer {layer}, there are {self.depth}")
        return {layer % self.depth for layer in layers}


def _tokens(x: Float[Array, "B Y X C"]) -> Float[Array, "B N C"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
