"""Isotropic NAT, isotropic DiNAT and ViT-rpb: Vision Transformers in which nothing but the attention differs.

Paper: arXiv:2209.15001 (DiNAT). Variants are in `models/families/nat/variants.py`.
"""

from typing import Any

from flax import nnx

from models.families.nat.model import largest_dilation
from models.hosts.isotropic import VisionTransformer
from models.layers.linear import DType


class IsotropicTransformer(VisionTransformer):
    """Patches, norm, blocks on one map, norm, mean, head: no class token and no positions but a relative bias.

    Args:
      attention: `"neighborhood"` (NAT, DiNAT), or `"dense"`: all tokens, with a bias by relative position (ViT-rpb).
        Another mechanism takes no options from here. attention_options: further ones, as in `VisionTransformer`.
      window: side of the neighborhood.
      dilation: of every other layer, beginning with the second; `"largest"` for the largest whose window fits the map.
      patch_norm: a norm after the patch embedding.
      image_size: side in pixels, or (height, width). The relative bias of dense attention is for its grid, and is
        resampled for other images.

    Everything else is as in `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        mlp_width: int | None = None,
        attention: str = "neighborhood",
        attention_options: dict[str, Any] | None = None,
        window: int = 7,
        dilation: int | str = 1,
        patch_norm: bool = True,
        activation: str = "gelu",
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = (sides[0] // patch_size, sides[1] // patch_size)
        if dilation == "largest":
            dilation = largest_dilation(grid, window)
        if isinstance(dilation, str):
            raise ValueError(f"dilation={dilation!r}; allowed: an integer of at least 1, or 'largest'")
        options: list[dict[str, Any]] = [{}]
        if attention == "neighborhood":
            dilations = (1,) if dilation == 1 or depth == 1 else (1, dilation)
            options = [{"window": window, "dilation": own} for own in dilations]
        elif attention == "dense":
            options = [{"relative_bias": grid}]
        super().__init__(
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            image_size=image_size,
            num_classes=num_classes,
            channels=channels,
            mlp_width=mlp_width,
            activation=activation,
            class_token=False,
            position="none",
            pre_norm=patch_norm,
            patch_bias=True,
            fc_norm=False,
            norm_eps=norm_eps,
            pool="avg",
            attention=attention,
            attention_options=[own | (attention_options or {}) for own in options],
            qkv_bias=qkv_bias,
            drop_path=drop_path,
            dropout=dropout,
            attention_dropout=attention_dropout,
            init=init,
            scan=scan,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
