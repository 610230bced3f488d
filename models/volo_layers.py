"""VOLO's stem and the layer between its stages (arXiv:2106.13112, section 3.3)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from models.batch_norm import BatchNorm
from models.convolution import Conv
from models.init import scheme
from models.layers import DType, PatchEmbed


class MapPatches(PatchEmbed):
    """Patches of a map, as a map. Rows and columns behind the last whole patch are not seen, as in a convolution."""

    def __call__(self, x: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `floor(n / patch)`. ValueError for a map smaller than a patch."""
        rows, columns = (size // side for size, side in zip(x.shape[1:3], self.patch, strict=True))
        if not rows or not columns:
            raise ValueError(f"a map of {x.shape[1]} x {x.shape[2]} is smaller than a patch of {self.patch}")
        x = super().__call__(x[:, : rows * self.patch[0], : columns * self.patch[1]])
        return x.reshape(x.shape[0], rows, columns, -1)


class VoloStem(nnx.Module):
    """A 7 x 7 convolution of stride 2 and two of 3 x 3, each with batch norm and ReLU, then patches.

    Args:
      hidden: channels of the convolutions.
      patch: side of a patch in pixels, even.
    """

    def __init__(
        self, channels: int, width: int, *, hidden: int, patch: int, init: str, dtype: DType, rngs: nnx.Rngs
    ):
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
