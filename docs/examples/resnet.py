"""A convolutional host: ResNet (arXiv:1512.03385), whose blocks may hold an attention in place of their last
convolution.

models.register_family(RESNET)
model = models.create("resnet18", rngs=nnx.Rngs(0))
models.load_weights(model, "resnet18.pth")       # torchvision's or timm's
models.create("resnet18", attention="neighborhood", attended=(3,), rngs=nnx.Rngs(0))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.attention.registry import make_attention
from models.core.call import Call
from models.core.init import normal
from models.core.options import Count, Size, check_stages, pair
from models.core.tap import TOKENS
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.hosts.options import ClassifierOptions
from models.layers.activation import ACTIVATIONS
from models.layers.conv_norm import ConvNorm
from models.layers.drop import drop_path
from models.layers.linear import Head
from models.layers.stem import HaloStem
from models.weights.family import Family
from models.weights.table import Row, Table, batch_norm, conv, linear, pointwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetOptions(ClassifierOptions):
    """Options of `ResNet`, besides those of every classifier.

    Attributes:
      widths, depths: channels and blocks by stage.
      attended: numbers of the stages whose blocks have attention; heads: of it.
    """

    activation: str = "relu"
    widths: Sequence[Count] = (64, 128, 256, 512)
    depths: Sequence[Count] = (2, 2, 2, 2)
    attended: Sequence[Size] = ()
    heads: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(widths=self.widths, depths=self.depths)

    def mechanisms(self) -> tuple[str, ...]:
        """The plug-in, where there is one."""
        return (self.attention,) if self.attended else ()


class BasicBlock(nnx.Module):
    """`activation(shortcut(x) + mix(activation(norm(conv(x)))))`; `mix` is a convolution and a norm, or attention."""

    def __init__(self, o: ResNetOptions, channels: int, width: int, stride: int, grid: Grid | None, rngs: nnx.Rngs):
        self.activation, shared = o.activation, {"dtype": o.dtype, "rngs": rngs}
        linear = {"activation": None, **shared}
        self.conv1 = ConvNorm(channels, width, size=3, stride=stride, activation=o.activation, **shared)
        self.conv2 = ConvNorm(width, width, size=3, **linear) if grid is None else None
        own = {"shared": {"dropout": o.attention_dropout, "dtype": o.dtype}, "options": o.attention_options}
        self.attn = None if grid is None else make_attention(o.attention, width, o.heads, **own, grid=grid, rngs=rngs)
        changes = channels != width or stride != 1
        self.shortcut = ConvNorm(channels, width, stride=stride, **linear) if changes else None

    def __call__(self, x: Float[Array, "B ... C"], call: Call) -> Float[Array, "B ... O"]:
        """A map, or the tokens of one."""
        tokens, places = x.ndim == 3, x.reshape(x.shape[0], *call.grid.shape, -1)
        y = self.conv1(places, train=call.train)
        if self.conv2 is not None:
            y = self.conv2(y, train=call.train)
        if self.attn is not None:
            inside = call.at("attn", grid=Grid(y.shape[1:3]))
            y = self.attn(y.reshape(y.shape[0], -1, y.shape[-1]), inside).reshape(y.shape)
        y = drop_path(y, call.drop_path, train=call.train, key=call.key_for("drop_path"))
        y = y + (places if self.shortcut is None else self.shortcut(places, train=call.train))
        y = ACTIVATIONS[self.activation](y)
        out = call.emit("block.out", y.reshape(y.shape[0], -1, y.shape[-1]), TOKENS)
        return out if tokens else out.reshape(y.shape)


class ResNet(Hierarchy):
    """Stem to a quarter of the sides, stages of basic blocks that begin with a stride, mean, head."""

    Options = ResNetOptions
    options: ResNetOptions

    def __init__(self, options: ResNetOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        self.dropout, self.head_dropout, self.drop_path = 0.0, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        self.patch_embed = HaloStem(
            o.channels, o.widths[:1], size=7, pool="max", activation=o.activation, dtype=o.dtype, rngs=rngs
        )
        firsts, rests, channels, sides = [], [], o.widths[0], [-(-side // 4) for side in pair(o.image_size)]
        for stage, width in enumerate(o.widths):
            sides = [-(-side // 2) for side in sides] if stage else sides
            grid = Grid(tuple(sides)) if stage in o.attended else None
            firsts.append(BasicBlock(o, channels, width, 2 if stage else 1, grid, rngs))
            rests.append([partial(BasicBlock, o, width, width, 1, grid)])
            channels = width
        stacks = stack_stages(rests, o.depths, rngs=rngs, scan=o.scan, remat=o.remat, own_first=True)
        self.stages = nnx.List([Stage(None, *parts) for parts in zip(stacks, firsts, strict=True)])
        head = {"kernel_init": normal(0.01), "dtype": o.dtype, "rngs": rngs}
        self.head = Head(channels, o.num_classes, **head) if o.num_classes else None

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        """There is no norm behind the stages."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return tokens, tokens.mean(axis=1)


def resnet_table(model: ResNet) -> Table:
    """torchvision's names, which are timm's too."""
    rows = [*_normed("conv1", "bn1", "patch_embed.convs.0", conv)]
    for number, stage in enumerate(model.stages):
        for layer in range(stage.depth):
            theirs = f"layer{number + 1}.{layer}"
            ours = f"stages.{number}.blocks.{layer - 1}" if layer else f"stages.{number}.first"
            for part in (1, 2):
                rows += _normed(f"{theirs}.conv{part}", f"{theirs}.bn{part}", f"{ours}.conv{part}", conv)
            rows += _normed(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut", pointwise)
            rows += [
                *linear(f"{theirs}.attn.qkv", f"{ours}.attn.qkv"),
                *linear(f"{theirs}.attn.proj", f"{ours}.attn.proj"),
            ]
    return Table(iter(rows), linear("fc", "head"))


def _normed(theirs: str, norm: str, ours: str, kind: type) -> Iterator[Row]:
    yield from kind(theirs, f"{ours}.conv")
    yield from batch_norm(norm, f"{ours}.norm")


RESNET = Family(
    "resnet", ResNet, {"resnet18": {}, "resnet34": {"depths": (3, 4, 6, 3)}}, layouts={"torch": resnet_table}
)
