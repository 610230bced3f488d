"""DaViT: layers of attention between places and of attention between channels in turn (arXiv:2204.03645).

Variants are in `models/families/davit/variants.py`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.core.errors import unknown_name
from models.core.init import scheme
from models.families.davit.block import PositionedBlock
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.downsample import NormedDownsample
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import OverlappingStem

DUAL = ("window", "channel")


class DualAttentionTransformer(Hierarchy):
    """Stem to a quarter of the sides, stages of pairs of blocks with downsampling between them, mean, norm, head.

    Args:
      widths: channels by stage.
      depths: pairs of layers by stage: a stage has twice as many layers.
      heads: attention heads, and groups of channels, of a layer by stage.
      window: side of a window, or (rows, columns); no bias by position.
      channel_version: of the attention between channels, see `models.attention.channel.ChannelAttention`.
      attention: mechanisms of the layers in turn, by name. One name is that of both layers of a pair.
      attention_options: for each mechanism its own options; a single dictionary is for all.
      feed_forward: blocks have an MLP.
      positions: blocks have their two depthwise convolutions for positions.
      position_activation: of these, by name; None for none.
      downsample_size: side of the kernel between stages, see `models.layers.downsample.NormedDownsample`.
      norm_first: the norm at the end acts on tokens and not on what is pooled.
      pool: see `models.layers.pool.GLOBAL_POOLS`; `"catavgmax"` needs `norm_first`.
      named_blocks: the layers of a pair have names in place of numbers in official weights (Florence-2's in timm).
      image_size: what the variant is for; images may have any size.
      num_classes: 0 for no head; the model then returns pooled features.
      mlp_ratio, mlp, activation, init: as in `models.families.swin.model.SwinTransformer`.
      drop_path: rate of the last pair. Both layers of pair i of n have `drop_path * i / (n - 1)`, as in timm; the
        official code lets it grow from layer to layer.
      dropout: after attention projection and both MLP layers. attention_dropout: on probabilities. head_dropout: before
        the head.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    norm: LayerNorm

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: float = 4.0,
        window: int | tuple[int, int] = 7,
        channel_version: int = 1,
        attention: str | Sequence[str] = DUAL,
        attention_options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        feed_forward: bool = True,
        positions: bool = True,
        position_activation: str | None = None,
        downsample_size: int = 2,
        norm_first: bool = False,
        pool: str = "avg",
        named_blocks: bool = False,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        mlp: str = "mlp",
        activation: str = "gelu",
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        head_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if not len(widths) == len(depths) == len(heads):
            given = f"widths={tuple(widths)}, depths={tuple(depths)} and heads={tuple(heads)}"
            raise ValueError(f"{given}: one entry for each stage is needed")
        pools = tuple(name for name in GLOBAL_POOLS if norm_first or name != "catavgmax")
        if pool not in pools:
            raise ValueError(unknown_name("pool", pool, pools))
        mechanisms = (attention,) * len(DUAL) if isinstance(attention, str) else tuple(attention)
        one = attention_options is None or isinstance(attention_options, dict)
        own: list[Any] = [attention_options] * len(mechanisms) if one else list(attention_options or ())
        if len(own) != len(mechanisms):
            raise ValueError(f"attention_options: {len(own)} entries for the mechanisms {', '.join(mechanisms)}")
        common = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        self.dropout, self.head_dropout, self.drop_path = 0.0, head_dropout, drop_path
        self.dtype, self.num_classes, self.global_pool = dtype, num_classes, pool
        self.norm_first, self.named_blocks, self.attention = norm_first, named_blocks, mechanisms

        self.patch_embed = OverlappingStem(channels, widths[0], **common)
        makers = []
        for width, heads_here in zip(widths, heads, strict=True):
            options = BlockOptions(
                width=width,
                heads=heads_here,
                mlp_width=int(width * mlp_ratio),
                mlp=mlp,
                activation=activation,
                qkv_bias=qkv_bias,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
                init=init,
                dtype=dtype,
            )
            defaults = {"window": window, "version": channel_version}
            replaced = [
                dataclasses.replace(
                    options,
                    attention=name,
                    attention_options=chosen,
                    attention_defaults=defaults | ({"relative_bias": False} if name == "window" else {}),
                )
                for name, chosen in zip(mechanisms, own, strict=True)
            ]
            make = partial(
                PositionedBlock,
                feed_forward=feed_forward,
                positions=positions,
                position_activation=position_activation,
            )
            makers.append([partial(make, one) for one in replaced])
        layers = [len(mechanisms) * depth for depth in depths]
        stacks = stack_stages(makers, layers, rngs=rngs, scan=scan, remat=remat)
        between = [
            None,
            *(
                NormedDownsample(before, after, size=downsample_size, **common)
                for before, after in itertools.pairwise(widths)
            ),
        ]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=norm_eps, dtype=dtype)
        pooled = widths[-1] * (2 if pool == "catavgmax" else 1)
        start = scheme(init)
        self.head = Linear(pooled, num_classes, kernel_init=start.head, dtype=dtype, rngs=rngs) if num_classes else None

    def drop_rates(self) -> np.ndarray:
        """The same rate for both layers of a pair."""
        members = len(self.attention)
        return np.repeat(np.linspace(0.0, self.drop_path, self.depth // members), members)

    def pool(self, x: Float[Array, "B Y X C"], *, train: bool) -> tuple[Float[Array, "B N C"], Float[Array, "B P"]]:
        """Pooling, then the norm, or with `norm_first` the norm before."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        pool = GLOBAL_POOLS[self.global_pool]
        if self.norm_first:
            tokens = self.norm(tokens)
            return tokens, pool(tokens)
        return tokens, self.norm(pool(tokens))
