"""Layers that take a map to a coarser one: stems from pixels, and what stands between the stages of a hierarchy.

A stem is made as `stem(channels, width, ...)` and takes images to a quarter of their sides; a downsampling layer is
made as `layer(width, width_out, ...)` and halves them. Both keep a map a map, `[B, Y, X, C]`, of any sides, and are
called with `train`, which batch statistics depend on.
"""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from models.convolution import Conv
from models.init import scheme
from models.layers import DType, LayerNorm, Linear, PatchEmbed
from models.padding import to_multiple


class ConvStem(nnx.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between them, then a norm (NAT, arXiv:2204.07143)."""

    def __init__(
        self, channels: int, width: int, *, norm: bool, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs
    ):
        shared = {"size": 3, "stride": 2, "kernel_init": scheme(init).patch, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(channels, width // 2, **shared)
        self.conv2 = Conv(width // 2, width, **shared)
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if norm else None

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(ceil(n / 2) / 2)`."""
        x = self.conv2(self.conv1(images))
        return x if self.norm is None else self.norm(x)


class PatchStem(nnx.Module):
    """Patches of 4 x 4 pixels, each mapped to `width` channels, then a norm (Swin, arXiv:2103.14030)."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        norm: bool,
        norm_eps: float,
        patch: tuple[int, int] = (4, 4),
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.proj = PatchEmbed(patch, channels, width, kernel_init=scheme(init).patch, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if norm else None

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(n / 4)` (of another patch accordingly): zeros fill the last patches."""
        images = to_multiple(images, self.proj.patch)
        x = self.proj(images)
        x = x.reshape(x.shape[0], *self.proj.grid_shape(*images.shape[1:3]), -1)
        return x if self.norm is None else self.norm(x)


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
        x = to_multiple(x, (2, 2))
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, rows // 2, columns // 2, 4 * width)))


STEMS: dict[str, Callable[..., nnx.Module]] = {"convolutions": ConvStem, "patches": PatchStem}
"""Name -> stem, made as `stem(channels, width, *, norm, norm_eps, init, dtype, rngs)`."""

DOWNSAMPLERS: dict[str, Callable[..., nnx.Module]] = {"convolution": ConvDownsample, "merging": PatchMerging}
"""Name -> layer between stages, made as `layer(width, width_out, *, norm_eps, init, dtype, rngs)`."""
