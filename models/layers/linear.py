"""Linear layers on the last axis. Parameters are float32; `dtype` is what is computed in."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from models.core import sharding
from models.core.init import Initializer
from models.core.sharding import BATCH, TENSOR, Split

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
        self.kernel = sharding.parameter(kernel, None if axis is None else Split(axis, count, what))
        bias = bias_init(rngs.params(), (features_out,), jnp.float32) if use_bias else None
        bias_split = Split(-1, count, what) if split == "out" else None
        self.bias = None if bias is None else sharding.parameter(bias, bias_split)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """In `dtype`, or that of x."""
        dtype = self.dtype or x.dtype
        # As one matrix of rows: XLA's CPU backend then takes 12 to 18% off a ViT's train step (docs/benchmarks.md).
        y = sharding.product(x.reshape(-1, x.shape[-1]), self.kernel, dtype)
        y = y if self.bias is None else y + self.bias[...].astype(dtype)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        last = TENSOR if self.split == "out" else None
        return sharding.constrain(y, BATCH, *[None] * (y.ndim - 2), last)

    def parts(self, x: Float[Array, "... I"], parts: int, units: int) -> Float[Array, "... P U D"]:
        """The output of a fused layer as `parts` of `units` of equal width, split over `tensor` by units."""
        if sharding.tensor_ways() == 1:
            return self(x).reshape(*x.shape[:-1], parts, units, -1)
        dtype = self.dtype or x.dtype

        def by_units(kernel: Array) -> Array:
            # From pieces of the input axis to whole units: weights change places, which is less than activations.
            kernel = kernel.reshape(x.shape[-1], parts, units, -1)
            kernel = sharding.constrain(kernel, TENSOR, None, None, None)
            return sharding.constrain(kernel, None, None, TENSOR, None)

        y = sharding.product(x, self.kernel, dtype, by_units)
        if self.bias is not None:
            bias = self.bias[...].astype(dtype).reshape(parts, units, -1)
            y = y + sharding.constrain(bias, None, TENSOR, None)
        return sharding.constrain(y, BATCH, *[None] * (y.ndim - 3), TENSOR, None)


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
