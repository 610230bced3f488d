"""No attention: the control for "does attention do anything here?"."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models.core.init import scheme
from models.layers.linear import DType, Linear


class IdentityAttention(nnx.Module):
    """Mixes no tokens: value and output projection only. The control for "does attention do anything here?"."""

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, init: str = "timm", dtype: DType = None, rngs: nnx.Rngs
    ):
        self.heads = heads
        start = scheme(init)
        shared = {"kernel_init": start.linear, "units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.value = Linear(width, width, use_bias=qkv_bias, split="out", **shared)
        self.proj = Linear(width, width, split="in", **shared)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Array | None = None,
        mask: Array | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """Each token sees itself only, whatever `context` and `mask` say. Hook sites: `"v"`, `"heads"`."""
        v = self.value(x).reshape(*x.shape[:2], self.heads, -1)
        if hook is not None:
            v = hook("heads", hook("v", v, layer), layer)
        return self.proj(v.reshape(x.shape))
