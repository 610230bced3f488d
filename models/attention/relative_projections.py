"""What halo and bottleneck attention have in common: projections, and tables of relative positions shared by heads.

Neither has an output projection: in a bottleneck block the pointwise convolution behind takes its place.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.attention.mechanism import Mechanism, check_divides
from models.core import sharding
from models.core.call import Call
from models.core.init import normal
from models.layers.gate import rounded_channels
from models.layers.linear import DType, Linear
from models.layers.pool import pool_half


class RelativeAttention(Mechanism):
    """Widths of heads, and tables of relative positions shared by heads.

    Attributes:
      width_out: channels of the result.
      stride: by how much the map becomes smaller.
      multiple: what the sides of a map have to be multiples of.
    """

    dropout: float
    height_rel: nnx.Param
    width_rel: nnx.Param

    def __init__(self, width: int, heads: int, width_out: int, head_width: int | None, qk_ratio: float, stride: int):
        check_divides(width_out, heads, "width_out of an attention")
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} of an attention; allowed: 1, 2")
        self.width, self.heads, self.width_out, self.stride = width, heads, width_out, stride
        self.head_width = head_width or rounded_channels(width_out * qk_ratio) // heads
        self.value_width = width_out // heads
        if not self.head_width:
            raise ValueError(f"qk_ratio={qk_ratio}: gives {heads} heads no channels")

    @property
    def multiple(self) -> int:
        """What the sides of a map have to be multiples of."""
        raise NotImplementedError

    def linear(self, parts: int, use_bias: bool, split: str | None, dtype: DType, rngs: nnx.Rngs) -> Linear:
        """A projection to `parts` channels for each head."""
        return Linear(
            self.width,
            self.heads * parts,
            use_bias=use_bias,
            kernel_init=normal(self.width**-0.5),
            split=split,
            units=(self.heads, "heads") if split else None,
            dtype=dtype,
            rngs=rngs,
        )

    def tables(self, sides: Sequence[int], rngs: nnx.Rngs) -> list[nnx.Param]:
        """Embeddings of relative positions along each axis, `[2 n - 1, D]`."""
        initial = normal(self.head_width**-0.5)
        return [
            sharding.parameter(initial(rngs.params(), (2 * side - 1, self.head_width), jnp.float32)) for side in sides
        ]

    def positions(self) -> dict[str, Any]:
        """The tables as an operator takes them."""
        return {
            "height_rel": sharding.gathered(self.height_rel, jnp.float32),
            "width_rel": sharding.gathered(self.width_rel, jnp.float32),
        }

    def noise(self, call: Call) -> dict[str, Any]:
        """Dropout of probabilities, as an operator takes it."""
        return {"dropout": self.dropout if call.train else 0.0, "key": call.key}


def side_by_side(heads: Float[Array, "B Y X H E"], average: bool, sides: Sequence[int]) -> Float[Array, "B N O"]:
    """Heads side by side, averaged if asked for, without what was padded."""
    out = heads.reshape(*heads.shape[:3], -1)
    out = pool_half(out, "avg2", "centred") if average else out
    return out[:, : sides[0], : sides[1]].reshape(out.shape[0], sides[0] * sides[1], -1)
