"""Variants of the BiFormer paper by name: `biformer_tiny`, `biformer_small`, `biformer_base`, `biformer_stl`.

Drop path belongs to the recipe (`configs/recipes/biformer.py`), as for every model.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(depths: tuple[int, ...], width: int, **own: Any) -> Options:
    """Heads are 32 wide in the first three stages; the last has 8 in every model."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    return {"depths": depths, "widths": widths, "heads": (*(channels // 32 for channels in widths[:-1]), 8)} | own


VARIANTS: dict[str, Options] = {
    "biformer_tiny": _size((2, 2, 8, 2), 64),
    "biformer_small": _size((4, 4, 18, 4), 64),
    "biformer_base": _size((4, 4, 18, 4), 96),
    # As Swin-T, with the attention exchanged.
    "biformer_stl": _size((2, 2, 6, 2), 96, mlp_ratio=4, layout="patches", positions=False),
}

_SOURCE = "arXiv:2303.08810"

PUBLISHED: dict[str, Published] = {
    "biformer_tiny": Published(multiply_adds="2.2", top1="81.4", parameters="13.1", source=_SOURCE),
    "biformer_small": Published(multiply_adds="4.5", top1="83.8", parameters="25.5", source=_SOURCE),
    "biformer_base": Published(multiply_adds="9.8", top1="84.3", parameters="56.8", source=_SOURCE),
    "biformer_stl": Published(multiply_adds="4.6", top1="82.7", parameters="28.4", source=_SOURCE),
}
