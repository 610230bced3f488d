"""Convolution on maps `[B, Y, X, C]`. The parameter is float32; `dtype` is what is computed in."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.neighborhood.pattern import per_axis
from models.core import sharding
from models.core.draw import full
from models.core.errors import unknown_name
from models.core.init import Initializer
from models.layers.checks import check_map
from models.layers.depthwise import MOST, Pads, depthwise, same_pads, spans
from models.layers.linear import DType, computed

PADDINGS = ("centred", "valid", "same")
PerAxis = int | tuple[int, int]
Padding = str | PerAxis | Pads


class Conv(nnx.Module):
    """2-D convolution, kernel `[k, l, in / groups, out]`: rows, then columns.

    Args:
      size, stride, dilation: one number, or (rows, columns).
      padding: zeros around the map. `"centred"`: `dilation * (size // 2)` on every side (PyTorch's `padding=k // 2`),
        so that an odd kernel of stride 2 gives `ceil(n / 2)` places, centred on every other one. `"same"`:
        TensorFlow's, and XLA's, which gives as many places but with an odd number of zeros has one more behind than
        before the map. `"valid"`: none. A number: as many on every side; (rows, columns): as many above and below, as
        many left and right; a pair of pairs: before and after along each axis.
      groups: of channels that do not mix, a divisor of both numbers of channels; `channels` for a depthwise
        convolution.

    Raises:
      ValueError: for groups that do not divide the channels, and for sizes and paddings that mean nothing.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        padding: Padding = "centred",
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if groups < 1 or channels % groups or width % groups:
            raise ValueError(f"groups={groups} of a convolution: must divide {channels} channels and {width} outputs")
        self.size = per_axis("size", size, 2, 1)
        self.stride, self.dilation = per_axis("stride", stride, 2, 1), per_axis("dilation", dilation, 2, 1)
        self.padding = _pads(padding, self.size, self.dilation)
        self.groups, self.dtype = groups, computed(dtype)
        kernel = kernel_init(rngs.params(), (*self.size, channels // groups, width), jnp.float32)
        self.kernel = sharding.parameter(kernel)
        self.bias = sharding.parameter(full((width,), 0)) if use_bias else None

    def __call__(self, x: Float[Array, "B Y X I"]) -> Float[Array, "B V U O"]:
        """In `dtype`. ValueError for another number of channels, and for a map smaller than the kernel."""
        kernel = sharding.gathered(self.kernel, self.dtype)
        channels = self.groups * kernel.shape[2]
        check_map("convolution", x, channels)
        x, pads = x.astype(self.dtype), self._around(x.shape[1:3])
        if self.groups == channels == kernel.shape[-1] and self.size[0] * self.size[1] <= MOST:
            y = depthwise(x, kernel, self.stride, pads, self.dilation)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                self.stride,
                pads,
                rhs_dilation=self.dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return sharding.over_batch(y if self.bias is None else y + self.bias[...].astype(self.dtype))

    def _around(self, shape: tuple[int, ...]) -> Pads:
        """Zeros around a map. ValueError if the kernel does not fit what there is with them."""
        if self.padding == "same":
            return same_pads(shape, self.size, self.stride, self.dilation)
        for side, span, pads in zip(shape, spans(self.size, self.dilation), self.padding, strict=True):
            if side + sum(pads) < span:
                raise ValueError(
                    f"a map of {shape[0]} x {shape[1]} with zeros of {self.padding} around it is smaller than a "
                    f"convolution of {self.size} with dilation {self.dilation}"
                )
        return self.padding


def _pads(padding: Any, size: tuple[int, int], dilation: tuple[int, int]) -> Any:
    """(before, after) along both axes, or `"same"`, for which it takes the map to know."""
    if isinstance(padding, str):
        if padding not in PADDINGS:
            raise ValueError(unknown_name("padding of a convolution", padding, (*PADDINGS, "numbers")))
        if padding == "same":
            return padding
        padding = (0, 0) if padding == "valid" else tuple(d * (n // 2) for d, n in zip(dilation, size, strict=True))
    each = padding if isinstance(padding, tuple | list) else (padding, padding)
    try:
        rows, columns = (per_axis("padding", one, 2, 0) for one in each)
    except ValueError:
        raise ValueError(
            f"padding={padding!r} of a convolution; allowed: {', '.join(PADDINGS)}, a number of at least 0, "
            "(rows, columns), or a pair (before, after) for each axis"
        ) from None
    return rows, columns
