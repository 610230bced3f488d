"""Patches of an image or of a map, each mapped to as many channels as are wanted."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.core import sharding
from models.core.draw import full
from models.core.init import Initializer
from models.layers.checks import check_map
from models.layers.linear import DType, computed


class PatchEmbed(nnx.Module):
    """Non-overlapping patches in row-major order, each mapped to `width` channels; kernel `[p, p, in, C]`."""

    def __init__(
        self,
        patch: tuple[int, int],
        channels: int,
        width: int,
        *,
        kernel_init: Initializer,
        use_bias: bool = True,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.patch, self.dtype = patch, computed(dtype)
        self.kernel = sharding.parameter(kernel_init(rngs.params(), (*patch, channels, width), jnp.float32))
        self.bias = sharding.parameter(full((width,), 0)) if use_bias else None

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. ValueError if the image is not divisible."""
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"image of {height} x {width} is not divisible by the patch of {self.patch[0]} x {self.patch[1]}"
            )
        return height // self.patch[0], width // self.patch[1]

    def __call__(self, images: Float[Array, "B Y X I"]) -> Float[Array, "B N C"]:
        """Tokens; ValueError for an image that is not divisible by the patch or has other channels."""
        check_map("patch embedding", images, self.kernel.shape[2])
        batch, height, width, channels = images.shape
        rows, columns = self.grid_shape(height, width)
        # A reshape and one matrix product: the same numbers as the strided convolution, faster on CPUs.
        x = images.astype(self.dtype).reshape(batch, rows, self.patch[0], columns, self.patch[1], channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        y = x @ sharding.gathered(self.kernel, self.dtype).reshape(x.shape[-1], -1)
        return sharding.over_batch(y if self.bias is None else y + self.bias[...].astype(self.dtype))


class MapPatches(PatchEmbed):
    """Patches of a map, as a map. Rows and columns behind the last whole patch are not seen, as in a convolution."""

    def __call__(self, x: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `floor(n / patch)`. ValueError for a map smaller than a patch."""
        check_map("patch embedding", x, self.kernel.shape[2])
        rows, columns = (size // side for size, side in zip(x.shape[1:3], self.patch, strict=True))
        if not rows or not columns:
            raise ValueError(f"a map of {x.shape[1]} x {x.shape[2]} is smaller than a patch of {self.patch}")
        x = super().__call__(x[:, : rows * self.patch[0], : columns * self.patch[1]])
        return x.reshape(x.shape[0], rows, columns, -1)
