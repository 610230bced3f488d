"""Isotropic NAT, isotropic DiNAT and ViT-rpb: Vision Transformers in which nothing but the attention differs.

Paper: arXiv:2209.15001 (DiNAT). Variants are in `models/families/nat/variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from attn import Grid
from models.core.options import Count, Flag, Positive
from models.families.nat.model import largest_dilation
from models.hosts.isotropic import VisionTransformer, VitOptions
from models.hosts.options import WINDOWED, windowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsotropicOptions(VitOptions):
    """Options of a Vision Transformer with other defaults: no class token, no positions but a relative bias, norm after
    the patches, mean of the tokens.

    Attributes:
      attention: `"neighborhood"` (NAT, DiNAT); or `"dense"`, with a bias by relative position (ViT-rpb).
      window: side of the neighborhood (or of the windows of another mechanism that has some).
      dilation: of neighborhood attention in every other layer, beginning with the second; `"largest"` for the largest
        whose window fits the map.
    """

    class_token: Flag = False
    position: str = "none"
    pre_norm: Flag = True
    patch_bias: Flag | None = True
    fc_norm: Flag | None = False
    norm_eps: Positive = 1e-5
    pool: str = "avg"
    attention: str = "neighborhood"
    window: Count | tuple[Count, Count] = 7
    dilation: Count | str = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.dilation, str) and self.dilation != "largest":
            raise ValueError(f"dilation={self.dilation!r}; allowed: an integer of at least 1, or 'largest'")

    def attention_defaults(self, layer: int, grid: Grid) -> Mapping[str, Mapping[str, Any]]:
        """Window and, in every other layer, dilation; the relative bias of dense attention is for the model's grid, and
        is resampled for other images.
        """
        dilation = largest_dilation(grid.shape, self.window) if isinstance(self.dilation, str) else self.dilation
        neighborhood = {"dilation": dilation if layer % 2 else 1}
        return {**windowed(self.window, neighborhood=neighborhood), "dense": {"relative_bias": tuple(grid.shape)}}

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows and dilation are for attention that has some."""
        return {"window": WINDOWED, "dilation": ("neighborhood",)}


class IsotropicTransformer(VisionTransformer):
    """Patches, norm, blocks on one map, norm, mean, head."""

    Options = IsotropicOptions
