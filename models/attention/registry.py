"""Attention modules by name. Any of them can stand in for any other in a block.

A module is made as `make_attention(name, width, heads, ...)` and called as
`module(x, grid, *, context=None, mask=None, hook=None, layer=None, train=False, key=None) -> x`.
`docs/model_interface.md` shows how to add one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from models.attention.bilevel_routing import BiLevelRoutingAttention
from models.attention.bottleneck import BottleneckAttention
from models.attention.channel import ChannelAttention
from models.attention.convolution import ConvolutionMixer
from models.attention.dense import DenseAttention
from models.attention.differential import DifferentialAttention
from models.attention.halo import HaloAttention
from models.attention.identity import IdentityAttention
from models.attention.local_dense import LocalDenseAttention
from models.attention.neighborhood import NeighborhoodAttention
from models.attention.outlook import OutlookAttention
from models.attention.window import WindowAttention
from models.core.errors import keyword_options, unknown_name

ATTENTION: dict[str, Callable[..., nnx.Module]] = {
    "dense": DenseAttention,
    "identity": IdentityAttention,
    "differential": DifferentialAttention,
    "neighborhood": NeighborhoodAttention,
    "bilevel_routing": BiLevelRoutingAttention,
    "local_dense": LocalDenseAttention,
    "convolution": ConvolutionMixer,
    "outlook": OutlookAttention,
    "window": WindowAttention,
    "shifted_window": partial(WindowAttention, shift="half"),
    "grid": partial(WindowAttention, grid=True),
    "channel": ChannelAttention,
    "halo": HaloAttention,
    "bottleneck": BottleneckAttention,
}
"""Name -> module. A mechanism is added here and is then a value of the config key `model.attention`."""


def make_attention(
    name: str, width: int, heads: int, *, shared: dict[str, Any], options: dict[str, Any] | None = None, rngs: nnx.Rngs
) -> nnx.Module:
    """The named attention module.

    Args:
      shared: what the model says to every mechanism (`qkv_bias`, `init` ...); a mechanism takes what it has a use for.
      options: what the user says to this one; an option it does not have is a ValueError.
    """
    if name not in ATTENTION:
        raise ValueError(unknown_name("attention", name, ATTENTION))
    accepted = keyword_options(ATTENTION[name])
    for option in options or {}:
        if option not in accepted:
            raise ValueError(unknown_name(f"option of attention {name!r}", option, accepted))
    arguments = {option: value for option, value in shared.items() if option in accepted} | (options or {})
    return ATTENTION[name](width, heads, **arguments, rngs=rngs)
