"""Class attention: the class token looks at all tokens, which stay (CaiT, arXiv:2103.17239, section 4)."""

from typing import Any

import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Grid, dense_attention
from models.attention.mechanism import Declaration, Mechanism, attended, check_divides
from models.core.call import Call
from models.core.init import scheme
from models.core.tap import TokenIndex
from models.layers.linear import DType, Linear


class ClassAttention(Mechanism):
    """Softmax attention of the first token to all tokens; gives what is new for it, `[B, 1, C]`. No name of its own: it
    is what a block of class attention (`models/hosts/class_block.py`) is made of.
    """

    declaration = Declaration(
        summary="softmax attention of the class token to all tokens",
        paper="arXiv:2103.17239",
        operator="dense_attention",
        cost="2 N C^2 + 2 C^2 + 2 N C",
        prefix=True,
        masks=("boolean", "lengths"),
        axes=(1, 2, 3),
        shape="heads",
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        self.heads, self.dropout = heads, dropout
        start = scheme(init)
        shared: dict[str, Any] = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.q = Linear(width, width, use_bias=qkv_bias, kernel_init=start.linear, split="out", **shared)
        self.kv = Linear(width, 2 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **shared)
        self.proj = Linear(width, width, kernel_init=start.linear, split="in", **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B 1 C"]:
        """What is new for the class token."""
        batch, count, width = x.shape
        q = self.q(x[:, :1]).reshape(batch, 1, self.heads, -1)
        fused = checkpoint_name(self.kv.parts(x, 2, self.heads), "attention_qkv")

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            dropout = self.dropout if call.train else 0.0
            return dense_attention(q, k, v, mask=call.mask, dropout=dropout, key=call.key, **options)

        index = TokenIndex(np.zeros(1, int), np.arange(count), (call.grid, call.grid))
        heads = attended(call, attend, q, fused[:, :, 0], fused[:, :, 1], index=index)
        return self.proj(heads.reshape(batch, 1, width))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        width = self.proj.kernel.shape[0]
        return self.q.kernel.size + self.proj.kernel.size + grid.tokens * (self.kv.kernel.size + 2 * width)
