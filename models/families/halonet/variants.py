"""HaloNets by name: `halonet_h0` to `halonet_h7` of the paper, and the members of timm's byoanet with halo attention.

Figures are in docs/families/halonet.md. The paper has no official code and no weights; what it leaves open is as in
timm's `halonet_h1`. That model has 8 heads in its first stage as well, where the paper's have 4 (`heads=(4, 8, 8, 8)`).
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]

_WIDTHS = (64, 128, 256, 512)


def _paper(
    block: int, halo: int, values: float, outputs: float, third: int, features: int, image_size: int, **own: Any
) -> Options:
    """A row of the table of the family in arXiv:2103.12731: b, h, r_v, r_b, layers of the third stage, d_f, s."""
    return {
        "block_size": block,
        "halo_size": halo,
        "value_ratio": values,
        "qk_ratio": 1 / values,  # queries and keys have the inner channels, whatever the values have
        "widths": tuple(int(outputs * width) for width in _WIDTHS),
        "ratio": 1 / outputs,
        "depths": (3, 3, third, 3),
        "heads": (4, 8, 8, 8),
        "features": features,
        "image_size": image_size,
    } | own


PAPER: dict[str, Options] = {
    "halonet_h0": _paper(8, 3, 1.0, 0.5, 7, 0, 256),
    "halonet_h1": _paper(8, 3, 1.0, 1.0, 10, 0, 256, heads=8),
    "halonet_h2": _paper(8, 3, 1.0, 1.25, 11, 0, 256),
    "halonet_h3": _paper(10, 3, 1.0, 1.5, 12, 1024, 320),
    "halonet_h4": _paper(12, 2, 1.0, 3.0, 12, 1280, 384),
    "halonet_h5": _paper(14, 2, 2.5, 2.0, 23, 1536, 448),
    "halonet_h6": _paper(8, 4, 3.0, 2.75, 24, 1536, 512),
    # Maps of 75, 38 and 19 places are no multiples of 10, and the paper does not say what becomes of the rest.
    "halonet_h7": _paper(10, 3, 4.0, 3.5, 26, 2048, 600, padding=True),
}

_TIERED: Options = {"stem": (24, 32, 64), "stem_size": 3}
_WIDE: Options = {"widths": (256, 512, 1024, 2048), "ratio": 0.25}
_CONV, _MIXED, _ATTENTION = ("conv",), ("conv", "attention"), ("attention",)
_GLOBAL: Options = {"attention": "bottleneck", "heads": 4}

HYBRIDS: dict[str, Options] = {
    "halonet26t": {
        **_TIERED,
        **_WIDE,
        "depths": (2, 2, 2, 2),
        "layers": (_CONV, _CONV, _MIXED, _ATTENTION),
        "halo_size": 2,
    },
    "sehalonet33ts": {
        **_TIERED,
        "stem_pool": None,
        "widths": (256, 512, 1024, 1536),
        "ratio": (0.25, 0.25, 0.25, 0.333),
        "depths": (2, 3, 3, 2),
        "layers": (_CONV, ("conv", "conv", "attention"), ("conv", "conv", "attention"), _ATTENTION),
        "features": 1280,
        "gate": "se",
        "activation": "silu",
    },
    "halonet50ts": {
        **_TIERED,
        **_WIDE,
        "depths": (3, 4, 6, 3),
        "layers": (_CONV, ("conv", "conv", "conv", "attention"), _MIXED, _MIXED),
        "heads": (8, 4, 8, 8),
        "activation": "silu",
    },
    "eca_halonext26ts": {
        **_TIERED,
        **_WIDE,
        "depths": (2, 2, 2, 2),
        "layers": (_CONV, _CONV, _MIXED, _ATTENTION),
        "halo_size": 2,
        "head_width": 16,
        "group_width": 16,
        "gate": "eca",
        "activation": "silu",
    },
    "haloregnetz_b": {
        "stem": (32,),
        "stem_size": 3,
        "stem_pool": None,
        "widths": (48, 96, 192, 288),
        "ratio": 3.0,
        "ratio_of_input": True,
        "depths": (2, 6, 12, 2),
        "strides": (2, 2, 2, 2),
        "layers": (_CONV, _CONV, ("conv", "conv", "conv", "attention"), _ATTENTION),
        "block_size": 7,
        "halo_size": 2,
        "qk_ratio": 0.33,
        "group_width": 16,
        "gate": "se",
        "gate_options": {"ratio": 0.25},
        "shortcut": "none",
        "linear_out": True,
        "features": 1536,
        "activation": "silu",
        "image_size": 224,
    },
    "halo2botnet50ts": {
        **_TIERED,
        **_WIDE,
        "stem_pool": None,
        "depths": (3, 4, 6, 3),
        "layers": (_CONV, _MIXED, _MIXED, ("conv", _GLOBAL)),
        "activation": "silu",
    },
}

VARIANTS = PAPER | HYBRIDS

_TIMM, _ARXIV = "timm", "arXiv:2103.12731"
PUBLISHED: dict[str, Published] = {
    "halonet_h0": Published(parameters="5.5", top1="77.9", image_size=256, source=_ARXIV),
    "halonet_h1": Published(parameters="8.1", top1="79.9", image_size=256, source=_ARXIV),
    "halonet_h2": Published(parameters="9.4", top1="80.4", image_size=256, source=_ARXIV),
    "halonet_h3": Published(parameters="11.8", top1="81.9", image_size=320, source=_ARXIV),
    "halonet_h4": Published(parameters="19.1", top1="83.3", image_size=384, source=_ARXIV),
    "halonet_h5": Published(parameters="30.7", top1="84.0", image_size=448, source=_ARXIV),
    "halonet_h6": Published(parameters="43.4", top1="84.4", image_size=512, source=_ARXIV),
    "halonet_h7": Published(parameters="67.4", top1="84.9", image_size=600, source=_ARXIV),
    "halonet26t": Published("3.2", "79.13", "12.48", 256, _TIMM),
    "sehalonet33ts": Published("3.55", "80.98", "13.69", 256, _TIMM),
    "halonet50ts": Published("5.3", "81.64", "22.73", 256, _TIMM),
    "eca_halonext26ts": Published("2.4", "79.5", "10.7", 256, _TIMM),
    "haloregnetz_b": Published("1.97", "81.06", "11.68", 224, _TIMM),
    "halo2botnet50ts": Published("5.0", "82.08", "22.64", 256, _TIMM),
}
