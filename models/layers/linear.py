"""Linear layers on the last axis. Parameters are float32; `dtype` is what is computed in."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.core import sharding
from models.core.init import Initializer, zeros
from models.core.sharding import BATCH, TENSOR, Split
from models.layers.checks import check_channels

DType = Any


def computed(dtype: DType) -> np.dtype:
    """What a layer computes in and gives, whatever its input is: float32 unless said otherwise.

    Raises:
      ValueError: for what is no floating point.
    """
    try:
        found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype={found or dtype} of a computation; allowed: floating point, None is float32")
    return found


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
        bias_init: Initializer = zeros,
        use_bias: bool = True,
        split: str | None = None,
        units: tuple[int, str] | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.split = computed(dtype), split
        self.result = self.dtype
        count, what = units or (features_out if split == "out" else features_in, "features")
        # A fused kernel is stored split along its input: contiguous pieces of its output would not be whole parts.
        axis = None if split is None else -1 if split == "out" else -2
        kernel = kernel_init(rngs.params(), (features_in, features_out), jnp.float32)
        self.kernel = sharding.parameter(kernel, None if axis is None else Split(axis, count, what))
        bias = bias_init(rngs.params(), (features_out,), jnp.float32) if use_bias else None
        bias_split = Split(-1, count, what) if split == "out" else None
        self.bias = None if bias is None else sharding.parameter(bias, bias_split)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """In `dtype`."""
        y, bias = self.unbiased(x)
        return y if bias is None else y + bias.astype(self.result)

    def unbiased(self, x: Float[Array, "... I"]) -> tuple[Float[Array, "... O"], Float[Array, " O"] | None]:
        """The product, and the bias that is still to be added."""
        check_channels("linear layer", x, self.kernel.shape[0])
        y = sharding.product(x, self.kernel, self.dtype, result=self.result)
        last = TENSOR if self.split == "out" else None
        y = sharding.constrain(y, BATCH, *[None] * (y.ndim - 2), last)
        return y, None if self.bias is None else self.bias[...]

    def parts(
        self, x: Float[Array, "... I"], parts: int, units: int, taken: slice = slice(None)
    ) -> Float[Array, "... P U D"]:
        """The output of a fused layer as `parts` of `units` of equal width, split over `tensor` by units.

        Args:
          taken: which of the parts; no others are computed.
        """
        if sharding.tensor_ways() == 1 and taken == slice(None):
            return self(x).reshape(*x.shape[:-1], parts, units, -1)
        check_channels("linear layer", x, self.kernel.shape[0])

        def by_units(kernel: Array) -> Array:
            # From pieces of the input axis to whole units: weights change places, which is less than activations.
            kernel = kernel.reshape(x.shape[-1], parts, units, -1)[:, taken]
            kernel = sharding.constrain(kernel, TENSOR, None, None, None)
            return sharding.constrain(kernel, None, None, TENSOR, None)

        y = sharding.product(x, self.kernel, self.dtype, by_units)
        if self.bias is not None:
            bias = self.bias[...].astype(self.dtype).reshape(parts, units, -1)[taken]
            y = y + sharding.constrain(bias, None, TENSOR, None)
        return sharding.constrain(y, BATCH, *[None] * (y.ndim - 3), TENSOR, None)


class Head(Linear):
    """A linear layer whose result is float32: factors are in `dtype`, their products are summed in float32, and there
    the bias is added.

    Logits rounded to bfloat16 have eight bits, with which many of a thousand classes are equal.
    """

    def __init__(self, features_in: int, classes: int, **options: Any):
        super().__init__(features_in, classes, **options)
        self.result = jnp.promote_types(self.dtype, jnp.float32)
