"""Layers that halve a map, which stand between the stages of a hierarchy.

One is made as `layer(width, width_out, ...)`, keeps a map a map, `[B, Y, X, C]`, of any sides, and is called with
`train`, which batch statistics depend on.
"""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from models.core.init import scheme
from models.layers.checks import check_map
from models.layers.conv import Conv
from models.layers.linear import DType, Linear
from models.layers.norm import NORMS, LayerNorm, normed
from models.layers.pad import to_multiple


class ConvDownsample(nnx.Module):
    """A 3 x 3 convolution of stride 2 without bias, then a norm (NAT, arXiv:2204.07143)."""

    def __init__(self, width: int, width_out: int, *, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv(
            width,
            width_out,
            size=3,
            stride=2,
            use_bias=False,
            kernel_init=scheme(init).patch,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(width_out, eps=norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)`."""
        return self.norm(self.conv(x))


class PatchMerging(nnx.Module):
    """Four neighbours side by side, a norm, and a linear layer without bias (Swin, arXiv:2103.14030).

    Their order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(self, width: int, width_out: int, *, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, eps=norm_eps, dtype=dtype)
        self.reduction = Linear(
            4 * width, width_out, use_bias=False, kernel_init=scheme(init).linear, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)`: zeros fill the last neighbours."""
        check_map("merging of patches", x, self.norm.scale.shape[0] // 4)
        x = to_multiple(x, (2, 2))
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, rows // 2, columns // 2, 4 * width)))


DOWNSAMPLERS: dict[str, Callable[..., nnx.Module]] = {"convolution": ConvDownsample, "merging": PatchMerging}
"""Name -> layer between stages, made as `layer(width, width_out, *, norm_eps, init, dtype, rngs)`."""


class NormedConvDownsample(nnx.Module):
    """A 3 x 3 convolution of stride 2, then a batch norm."""

    def __init__(self, width: int, width_out: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        kernel_init = scheme(init).patch
        self.conv = Conv(width, width_out, size=3, stride=2, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm = NORMS[norm](width_out, dtype=dtype)

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)`."""
        return normed(self.norm, self.conv(x), train=train)


class NormFirstDownsample(nnx.Module):
    """A norm, then squares of 2 x 2 places, each mapped to the new channels (Swin's layout)."""

    def __init__(self, width: int, width_out: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        self.norm = NORMS[norm](width, dtype=dtype)
        kernel_init = scheme(init).patch
        self.conv = Conv(
            width, width_out, size=2, stride=2, padding="valid", kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `floor(n / 2)`, as officially."""
        return self.conv(normed(self.norm, x, train=train))


class NormedDownsample(nnx.Module):
    """A norm, then a convolution of stride 2.

    Args:
      size: of the kernel. An odd one overlaps its neighbours and is centred on every other place; an even one begins
        there, and zeros at the right and at the bottom fill the map up to a multiple of it.
    """

    def __init__(
        self, width: int, width_out: int, *, size: int, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs
    ):
        self.size = size
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype)
        self.conv = Conv(
            width,
            width_out,
            size=size,
            stride=2,
            padding="centred" if size % 2 else "valid",
            kernel_init=scheme(init).patch,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)` with a kernel of 2 or an odd one."""
        x = self.norm(x)
        return self.conv(x if self.size % 2 else to_multiple(x, (self.size, self.size)))
