"""No attention: the control for "does attention do anything here?"."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.attention.mechanism import QUERIES, Declaration, Entry, Mechanism, check_divides
from models.core.call import Call
from models.core.init import scheme
from models.layers.linear import DType, Linear


class IdentityAttention(Mechanism):
    """Mixes no tokens: value and output projection only. Each token sees itself, whatever memory and mask say."""

    declaration = Declaration(
        summary="mixes no tokens: value and output projection only, a control",
        paper="",
        operator="",
        cost="2 N C^2",
        prefix=True,
        memory=True,
        masks=("boolean", "lengths", "causal", "window"),
        axes=(1, 2, 3),
        sites=("v", "heads"),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        self.heads = heads
        shared: dict[str, Any] = {"kernel_init": scheme(init).linear, "units": (heads, "heads")}
        shared |= {"dtype": dtype, "rngs": rngs}
        self.value = Linear(width, width, use_bias=qkv_bias, split="out", **shared)
        self.proj = Linear(width, width, use_bias=proj_bias, split="in", **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """Each token by itself."""
        v = call.emit("v", self.value(x).reshape(*x.shape[:2], self.heads, -1), QUERIES)
        return self.proj(call.emit("heads", v, QUERIES).reshape(x.shape))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        return grid.tokens * (self.value.kernel.size + self.proj.kernel.size)


MECHANISMS = (Entry("identity", IdentityAttention, IdentityAttention.declaration),)
