"""The small layers every model is made of. Parameters are float32; `dtype` is what is computed in."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from models import partition
from models.init import Initializer
from models.partition import BATCH, TENSOR, Split

DType = Any


class Linear(nnx.Module):
    """`x @ kernel + bias` on the last axis, kernel `[in, out]`.

    Two layers of a pair can share their work over the mesh axis `tensor`: the first has its output split
    (`split="out"`), the second its input (`split="in"`), and one sum over devices follows the second.

    Args:
      split: `"out"`, `"in"`, `"parts"` for a fused layer whose output is several parts of units each (queries, keys and
        values; gate and value) and is taken by `parts`, or None.
      units: what cannot be cut along the split axis, and its name: `(heads, "heads")`; the features unless given.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        kernel_init: Initializer,
        bias_init: Initializer = jax.nn.initializers.zeros,
        use_bias: bool = True,
        split: str | None = None,
        units: tuple[int, str] | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.split = dtype, split
        count, what = units or (features_out if split == "out" else features_in, "features")
        # A fused kernel is stored split along its input: contiguous pieces of its output would not be whole parts.
        axis = None if split is None else -1 if split == "out" else -2
        kernel = kernel_init(rngs.params(), (features_in, features_out), jnp.float32)
        self.kernel = partition.parameter(kernel, None if axis is None else Split(axis, count, what))
        bias = bias_init(rngs.params(), (features_out,), jnp.float32) if use_bias else None
        bias_split = Split(-1, count, what) if split == "out" else None
        self.bias = None if bias is None else partition.parameter(bias, bias_split)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """In `dtype`, or that of x."""
        dtype = self.dtype or x.dtype
        # As one matrix of rows: XLA's CPU backend then takes 12 to 18% off a ViT's train step (docs/benchmarks.md).
        y = partition.product(x.reshape(-1, x.shape[-1]), self.kernel, dtype)
        y = y if self.bias is None else y + self.bias[...].astype(dtype)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        last = TENSOR if self.split == "out" else None
        return partition.constrain(y, BATCH, *[None] * (y.ndim - 2), last)

    def parts(self, x: Float[Array, "... I"], parts: int, units: int) -> Float[Array, "... P U D"]:
        """The output of a fused layer as `parts` of `units` of equal width, split over `tensor` by units."""
        if partition.tensor_ways() == 1:
            return self(x).reshape(*x.shape[:-1], parts, units, -1)
        dtype = self.dtype or x.dtype

        def by_units(kernel: Array) -> Array:
            # From pieces of the input axis to whole units: weights change places, which is less than activations.
            kernel = kernel.reshape(x.shape[-1], parts, units, -1)
            kernel = partition.constrain(kernel, TENSOR, None, None, None)
            return partition.constrain(kernel, None, None, TENSOR, None)

        y = partition.product(x, self.kernel, dtype, by_units)
        if self.bias is not None:
            bias = self.bias[...].astype(dtype).reshape(parts, units, -1)
            y = y + partition.constrain(bias, None, TENSOR, None)
        return partition.constrain(y, BATCH, *[None] * (y.ndim - 3), TENSOR, None)


def project_qkv(
    qkv: Linear, x: Float[Array, "B N C"], context: Float[Array, "B M C"] | None, heads: int
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M H D"], Float[Array, "B M H D"]]:
    """Queries from x, keys and values from the context (x itself unless given), through one fused projection."""
    if context is None:
        fused = checkpoint_name(qkv.parts(x, 3, heads), "attention_qkv")
        return fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
    q = checkpoint_name(qkv.parts(x, 3, heads)[:, :, 0], "attention_qkv")
    fused = checkpoint_name(qkv.parts(context, 3, heads)[:, :, 1:], "attention_qkv")
    return q, fused[:, :, 0], fused[:, :, 1]


def relative_bias_table(heads: int, extents: Sequence[int], rngs: nnx.Rngs) -> nnx.Param:
    """A learned bias of each head by relative position, `[H, *extents]`, split over `tensor` by heads."""
    table = jax.nn.initializers.normal(0.02)(rngs.params(), (heads, *extents), jnp.float32)
    return partition.parameter(table, Split(-1 - len(extents), heads, "heads"))


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis (arXiv:1607.06450); statistics in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6, scale: float = 1.0, dtype: DType = None):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.full((width,), scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In float32, returned in `dtype` or that of x."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype or x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization over the last axis (arXiv:1910.07467); statistics in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6, dtype: DType = None):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In float32, returned in `dtype` or that of x."""
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return y.astype(self.dtype or x.dtype)


class LayerScale(nnx.Module):
    """Learned factor per channel on a residual branch (CaiT, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float):
        self.gamma = nnx.Param(jnp.full((width,), initial, jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In the dtype of x."""
        return x * self.gamma[...].astype(x.dtype)


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
        self.patch, self.dtype = patch, dtype
        self.kernel = partition.parameter(kernel_init(rngs.params(), (*patch, channels, width), jnp.float32))
        self.bias = partition.parameter(jnp.zeros((width,), jnp.float32)) if use_bias else None

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. ValueError if the image is not divisible."""
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"image of {height} x {width} is not divisible by the patch of {self.patch[0]} x {self.patch[1]}"
            )
        return height // self.patch[0], width // self.patch[1]

    def __call__(self, images: Float[Array, "B Y X I"]) -> Float[Array, "B N C"]:
        """Tokens; ValueError for an image that is not divisible by the patch or has other channels."""
        batch, height, width, channels = images.shape
        rows, columns = self.grid_shape(height, width)
        if channels != self.kernel.shape[2]:
            raise ValueError(f"image of {channels} channels for a model of {self.kernel.shape[2]}; images are NHWC")
        dtype = self.dtype or images.dtype
        # A reshape and one matrix product: the same numbers as the strided convolution, faster on CPUs.
        x = images.astype(dtype).reshape(batch, rows, self.patch[0], columns, self.patch[1], channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        y = x @ partition.gathered(self.kernel, dtype).reshape(x.shape[-1], -1)
        return partition.over_batch(y if self.bias is None else y + self.bias[...].astype(dtype))


def fold_key(key: PRNGKeyArray | None, number: int) -> PRNGKeyArray | None:
    """An independent key for each use of randomness in a call; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def dropout(x: Array, rate: float, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each element is zero with probability `rate`, the rest scaled up, when training."""
    return _drop(x, rate, x.shape, "dropout", train, key)


def drop_path(x: Array, rate: float | Array, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each example's residual branch is zero with probability `rate` when training (arXiv:1603.09382).

    The rate may be traced, as it is for scanned blocks.
    """
    return _drop(x, rate, (x.shape[0],) + (1,) * (x.ndim - 1), "drop path", train, key)


def _drop(x, rate, shape, name, train, key):
    if not train or (isinstance(rate, int | float | np.number) and rate == 0):
        return x
    if key is None:
        raise ValueError(f"{name} needs a key in training: call the model with key=...")
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, shape)
    return x * (kept / keep).astype(x.dtype)
