"""A learned factor per channel on a residual branch."""

from flax import nnx
from jaxtyping import Array, Float

from models.core.draw import full


class LayerScale(nnx.Module):
    """Learned factor per channel on a residual branch (CaiT, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float):
        self.gamma = nnx.Param(full((width,), initial))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In the dtype of x."""
        return x * self.gamma[...].astype(x.dtype)
