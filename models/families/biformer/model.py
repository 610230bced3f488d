"""BiFormer: stages of bi-level routing attention, the last of dense attention (arXiv:2303.08810).

Variants are in `models/families/biformer/variants.py`.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from models.attention.registry import ATTENTION
from models.core.errors import keyword_options, unknown_name
from models.core.init import scheme
from models.families.biformer.block import BIFORMER_BLOCKS, LAYOUTS
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.linear import DType, Linear
from models.layers.norm import NORMS, normed

MLPS = ("mlp", "depthwise")


class BiFormer(Hierarchy):
    """Stem to a quarter of the sides, stages of blocks with downsampling between them, batch norm, mean, head.

    Args:
      widths, depths, heads: channels, layers and attention heads, by stage.
      mlp_ratios: hidden units of the MLP over channels, by stage.
      attention: mechanism by name, one for all stages or one for each; by default `"bilevel_routing"` where `topk` is
        not 0, and `"local_dense"` where it is. attention_options: for the stages whose mechanism has them.
      regions: rows and columns of regions of a stage's map, or a number for both; a sequence of the stages' numbers.
      topk: regions that each region is routed to, by stage; 0 where a stage routes none.
      qk_widths: channels of queries and keys, by stage; those of the stage unless given.
      local: side of the depthwise kernel beside attention; 0 for none.
      routing, pooling, scale, projection: see `models.attention.bilevel_routing.BiLevelRoutingAttention`. pool_sizes:
        by stage.
      auto_pad: a map that the regions do not divide is padded with zeros before the projections; without, it is an
        error. Sides that are multiples of 112 need none, with 7 regions in three stages.
      layout: stem and layers between stages, `"convolutions"`, or `"patches"` as in Swin (see
        `models.families.biformer.block`).
      norm, head_norm: of these layers, and before the mean: `"batch"` or `"layer"`.
      block: `"pre_norm"`, or `"norm_after"` with norms on the sums.
      positions: a depthwise convolution before every attention.
      mlp: `"mlp"`, or `"depthwise"` with a 3 x 3 convolution inside.
      activation, init: by name, as in `models.hosts.isotropic.VisionTransformer`.
      qkv_bias: of bi-level routing; the dense attention of the published models has none.
      drop_path: rate of the last layer; layer i of n has `drop_path * i / (n - 1)`.
      dropout: after the stem and in attention projections and MLPs. attention_dropout: on probabilities.
      layer_scale: initial value; None for no layer scale.
      image_size: accepted, as by every model, and not needed: images may have any size that `auto_pad` allows.
      scan, remat, dtype: as in `models.hosts.isotropic.VisionTransformer`.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        attention: str | Sequence[str] | None = None,
        attention_options: dict[str, Any] | None = None,
        regions: int | Sequence[int] = 7,
        topk: Sequence[int] = (1, 4, 16, 0),
        qk_widths: Sequence[int] | None = None,
        local: int = 5,
        local_of: str = "input",
        routing: str = "hard",
        pooling: str | None = None,
        pool_sizes: Sequence[int] | None = None,
        scale: float | None = None,
        projection: bool = True,
        auto_pad: bool = False,
        layout: str = "convolutions",
        norm: str = "batch",
        head_norm: str = "batch",
        block: str = "pre_norm",
        positions: bool = True,
        mlp: str = "mlp",
        activation: str = "gelu",
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        for option, value, allowed in (
            ("layout", layout, LAYOUTS),
            ("norm", norm, NORMS),
            ("head_norm", head_norm, NORMS),
            ("block", block, BIFORMER_BLOCKS),
            ("mlp", mlp, MLPS),
        ):
            if value not in allowed:
                raise ValueError(unknown_name(option, value, allowed))
        count = len(depths)
        if attention is None:
            attention = ["bilevel_routing" if chosen else "local_dense" for chosen in topk]
        by_stage: dict[str, Sequence[Any]] = {
            "widths": widths,
            "heads": heads,
            "mlp_ratios": mlp_ratios,
            "attention": (attention,) * count if isinstance(attention, str) else attention,
            "regions": (regions,) * count if isinstance(regions, int) else regions,
            "topk": topk,
            "qk_widths": widths if qk_widths is None else qk_widths,
            "pool_sizes": (1,) * count if pool_sizes is None else pool_sizes,
        }
        for option, values in by_stage.items():
            if len(values) != count:
                raise ValueError(f"{option}={values!r}: one entry for each of the {count} stages is needed")
        self.dropout, self.drop_path, self.dtype, self.num_classes = dropout, drop_path, dtype, num_classes
        self.layout, self.norm_kind, self.head_norm, self.local_of = layout, norm, head_norm, local_of
        self.attention = tuple(by_stage["attention"])
        common = {"norm": norm, "init": init, "dtype": dtype, "rngs": rngs}
        stem, downsample = LAYOUTS[layout]
        self.patch_embed = stem(channels, widths[0], **common)
        make_block = partial(BIFORMER_BLOCKS[block], positions=positions, depthwise=mlp == "depthwise")
        shared = {
            "local": local,
            "local_of": local_of,
            "routing": routing,
            "pooling": pooling,
            "projection": projection,
            "padding": "input" if auto_pad else None,
        }
        chosen = _options_by_stage(self.attention, attention_options or {})
        makers = []
        for stage in range(count):
            own = {option: values[stage] for option, values in by_stage.items()}
            routed = own["attention"] == "bilevel_routing"
            defaults = shared | {name: own[name] for name in ("regions", "topk")}
            defaults |= {"qk_width": own["qk_widths"], "pool_size": own["pool_sizes"]}
            # The official scale is that of routing alone.
            defaults |= {"scale": scale} if routed else {}
            options = BlockOptions(
                width=own["widths"],
                heads=own["heads"],
                mlp_width=int(own["mlp_ratios"] * own["widths"]),
                activation=activation,
                attention=own["attention"],
                attention_options=chosen[stage],
                attention_defaults=defaults,
                qkv_bias=own["attention"] not in ("dense", "local_dense"),
                layer_scale=layer_scale,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
                init=init,
                dtype=dtype,
            )
            makers.append([partial(make_block, options)])
        stacks = stack_stages(makers, depths, rngs=rngs, scan=scan, remat=remat)
        between = [None, *(downsample(*pair, **common) for pair in itertools.pairwise(widths))]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = NORMS[head_norm](widths[-1], dtype=dtype)
        head = {"kernel_init": scheme(init).head, "dtype": dtype, "rngs": rngs}
        self.head = Linear(widths[-1], num_classes, **head) if num_classes else None

    def pool(self, x: Float[Array, "B Y X C"], *, train: bool) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        """Final tokens and the pooled features: norm of the map, then mean."""
        tokens = normed(self.norm, x, train=train).reshape(x.shape[0], -1, x.shape[-1])
        return tokens, tokens.mean(axis=1)


def _options_by_stage(mechanisms: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each stage's mechanism has of the options; ValueError for an option that none has."""
    accepted = [keyword_options(ATTENTION[name]) if name in ATTENTION else [] for name in mechanisms]
    known = sorted(set(itertools.chain(*accepted)))
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of attention {', '.join(dict.fromkeys(mechanisms))}", option, known))
    return [{name: value for name, value in options.items() if name in own} for own in accepted]
