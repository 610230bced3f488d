"""Stems: what takes images to the first map of a model.

A stem is made as `stem(channels, width, ...)`, keeps a map a map, `[B, Y, X, C]`, of any sides, and is called with
`train`, which batch statistics depend on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from models.core.errors import unknown_name
from models.core.init import scheme
from models.layers.activation import ACTIVATIONS
from models.layers.checks import check_map
from models.layers.conv import Conv
from models.layers.conv_norm import HE, ConvNorm
from models.layers.linear import DType
from models.layers.mbconv import MBConvOptions
from models.layers.norm import NORMS, BatchNorm, LayerNorm, normed
from models.layers.pad import to_multiple
from models.layers.patch import MapPatches, PatchEmbed
from models.layers.pool import POOLS, pool_half


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
        check_map("patch embedding", images, self.proj.kernel.shape[2])
        images = to_multiple(images, self.proj.patch)
        x = self.proj(images)
        x = x.reshape(x.shape[0], *self.proj.grid_shape(*images.shape[1:3]), -1)
        return x if self.norm is None else self.norm(x)


STEMS: dict[str, Callable[..., nnx.Module]] = {"convolutions": ConvStem, "patches": PatchStem}
"""Name -> stem, made as `stem(channels, width, *, norm, norm_eps, init, dtype, rngs)`."""


# --- stems and downsampling -------------------------------------------------------------------------------------------


class NormedConvStem(nnx.Module):
    """Two 3 x 3 convolutions of stride 2, each with a batch norm, and GELU between them."""

    def __init__(self, channels: int, width: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        shared = {"size": 3, "stride": 2, "kernel_init": scheme(init).patch, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(channels, width // 2, **shared)
        self.norm1 = NORMS[norm](width // 2, dtype=dtype)
        self.conv2 = Conv(width // 2, width, **shared)
        self.norm2 = NORMS[norm](width, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(ceil(n / 2) / 2)`."""
        x = ACTIVATIONS["gelu"](normed(self.norm1, self.conv1(images), train=train))
        return normed(self.norm2, self.conv2(x), train=train)


class NormedPatchStem(nnx.Module):
    """Patches of 4 x 4 pixels, each mapped to `width` channels, then a norm (Swin's layout)."""

    def __init__(self, channels: int, width: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv(
            channels,
            width,
            size=4,
            stride=4,
            padding="valid",
            kernel_init=scheme(init).patch,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = NORMS[norm](width, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `floor(n / 4)`: what is left over at the right and the bottom is not seen, as officially."""
        return normed(self.norm, self.conv(images), train=train)


class OverlappingStem(nnx.Module):
    """A 7 x 7 convolution of stride 4, then a norm."""

    def __init__(self, channels: int, width: int, *, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs):
        kernel_init = scheme(init).patch
        self.conv = Conv(channels, width, size=7, stride=4, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(n / 4)`."""
        return self.norm(self.conv(images))


class MaxViTStem(nnx.Module):
    """A 3 x 3 convolution of stride 2, batch norm, activation, a 3 x 3 convolution (arXiv:2204.01697, appendix A.1)."""

    def __init__(
        self,
        channels: int,
        widths: tuple[int, int],
        *,
        use_bias: bool,
        options: MBConvOptions,
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.activation = options.activation
        shared: dict[str, Any] = {"size": 3, "padding": options.padding, "use_bias": use_bias}
        shared |= {"kernel_init": scheme(init).patch, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(channels, widths[0], stride=2, **shared)
        self.norm1 = BatchNorm(widths[0], eps=options.norm_eps, momentum=options.momentum, dtype=dtype)
        self.conv2 = Conv(widths[0], widths[1], **shared)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(n / 2)`."""
        return self.conv2(ACTIVATIONS[self.activation](self.norm1(self.conv1(images), train=train)))


class VoloStem(nnx.Module):
    """A 7 x 7 convolution of stride 2 and two of 3 x 3, each with batch norm and ReLU, then patches.

    Args:
      hidden: channels of the convolutions.
      patch: side of a patch in pixels, even.
    """

    def __init__(self, channels: int, width: int, *, hidden: int, patch: int, init: str, dtype: DType, rngs: nnx.Rngs):
        if patch < 2 or patch % 2:
            raise ValueError(f"patch_size={patch}; allowed: an even number, half of which the convolutions take")
        shared = {"kernel_init": scheme(init).patch, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(channels, hidden, size=7, stride=2, use_bias=False, **shared)
        self.conv2 = Conv(hidden, hidden, size=3, use_bias=False, **shared)
        self.conv3 = Conv(hidden, hidden, size=3, use_bias=False, **shared)
        self.norm1, self.norm2, self.norm3 = (BatchNorm(hidden, dtype=dtype) for _ in range(3))
        self.proj = MapPatches((patch // 2, patch // 2), hidden, width, **shared)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `floor(ceil(n / 2) / (patch / 2))`."""
        x = images
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3)):
            x = jax.nn.relu(norm(conv(x), train=train))
        return self.proj(x)

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns for an image, of at least one place each."""
        side = self.proj.patch[0]
        return max(1, -(-height // 2) // side), max(1, -(-width // 2) // side)


class HaloStem(nnx.Module):
    """Convolutions with norm and activation, the first of stride 2, then a pool; a quarter of the sides.

    Without a pool the last one of several has stride 2, too; one convolution alone gives half of the sides.

    Args:
      widths: channels of the convolutions: (64,) with `size` 7 is ResNet's stem, (24, 32, 64) with 3 that of "tiered".
      size: of their kernels.
      pool: `"max"` or `"avg"` of 3 x 3 places, `"max2"` or `"avg2"` of 2 x 2, or None.
      plain: so many of the first convolutions have neither norm nor activation.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        size: int = 3,
        pool: str | None = "max",
        plain: int = 0,
        activation: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        if pool is not None and pool not in POOLS:
            raise ValueError(unknown_name("stem_pool", pool, POOLS))
        if not widths or not 0 <= plain <= len(widths):
            raise ValueError(f"stem={tuple(widths)} with stem_plain={plain}: at least one convolution is needed")
        self.pool = pool
        strides = [2] + [1] * (len(widths) - 1)
        if pool is None and len(widths) > 1:
            strides[-1] = 2
        self.stride = 4 if pool or len(widths) > 1 else 2
        shared: dict[str, Any] = {"size": size, "dtype": dtype, "rngs": rngs}
        convolutions: list[nnx.Module] = []
        for number, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            if number < plain:
                convolutions.append(Conv(channels, width, stride=stride, use_bias=False, kernel_init=HE, **shared))
            else:
                convolutions.append(ConvNorm(channels, width, stride=stride, activation=activation, **shared))
            channels = width
        self.convs = nnx.List(convolutions)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(ceil(n / 2) / 2)`; `floor` for the pools of 2 x 2."""
        x = images
        for convolution in self.convs:
            x = convolution(x, train=train) if isinstance(convolution, ConvNorm) else convolution(x)
        return x if self.pool is None else pool_half(x, self.pool, "centred")
