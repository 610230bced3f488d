"""Differential attention as a module (arXiv:2410.05258)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, dense_attention
from models.attention.mechanism import Declaration, Entry, ProjectedMechanism, attended, token_index
from models.core.call import Call
from models.core.init import normal, scheme
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm, RMSNorm


class DifferentialAttention(ProjectedMechanism):
    """Difference of two softmax maps per head (Differential Transformer, arXiv:2410.05258, eq. 1-3), as in timm.

    `heads` counts pairs: queries and keys have `2 * heads` heads of half the width. `lambda_init` depends on the layer.
    At the sites the two maps of a pair are neighbouring heads, `2 * heads` in all.
    """

    declaration = Declaration(
        summary="difference of two softmax maps per head",
        paper="arXiv:2410.05258",
        operator="dense_attention",
        cost="4 N C^2 + 3 N^2 C",
        prefix=True,
        memory=True,
        masks=("boolean", "lengths", "causal", "window"),
        axes=(1, 2, 3),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % (2 * heads):
            raise ValueError(f"differential attention: width {width} is not divisible by twice the {heads} heads")
        self.heads, self.dropout, self.implementation = heads, dropout, implementation
        half = width // heads // 2
        start = scheme(init)
        # Units are pairs, which stay on one device.
        units: dict[str, Any] = {"units": (heads, "pairs of heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **units)
        self.q_norm = LayerNorm(half, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(half, eps=norm_eps, dtype=dtype) if qk_norm else None
        initial = normal(0.1)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nnx.Param(initial(rngs.params(), (half,), jnp.float32)) for _ in range(4)
        )
        self.sub_norm = RMSNorm(2 * half, eps=1e-5, dtype=dtype)
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if scale_norm else None
        self.proj = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **units)

    def inputs(self, x: Float[Array, "B N C"], memory: Any = None) -> tuple[Array, Array, Array]:
        """Queries and keys of `2 * heads` heads, and for both maps of a pair the same, twice as wide, values."""
        pairs = self.heads
        q, k, v = super().inputs_of(x, memory, 2 * pairs)
        return q, k, jnp.repeat(v.reshape(*v.shape[:2], pairs, -1), 2, axis=2)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """As `DenseAttention`."""
        q, k, v = self.inputs(x, call.memory)
        index = token_index(call.grid, k.shape[1]) if call.wants("logits", "probs") else None

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            own = {"implementation": self.implementation, **self.noise(call)}
            return dense_attention(q, k, v, mask=call.mask, **own, **options)

        both = attended(call, attend, q, k, v, index=index)
        both = both.reshape(*x.shape[:2], self.heads, 2, -1)
        lambda_init = 0.8 - 0.6 * jnp.exp(-0.3 * call.layer)
        first = jnp.exp(jnp.sum(self.lambda_q1[...] * self.lambda_k1[...]))
        second = jnp.exp(jnp.sum(self.lambda_q2[...] * self.lambda_k2[...]))
        # Both factors in float32: rounded to bfloat16 they would scale every head by the same wrong share.
        wide = both.astype(jnp.float32)
        heads = self.sub_norm(wide[..., 0, :] - (first - second + lambda_init) * wide[..., 1, :])
        heads = (heads * (1 - lambda_init)).astype(both.dtype)
        return self.output(heads)

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration: both maps weigh values that are twice as wide."""
        count = grid.tokens
        return self.projections(count, count) + 3 * count**2 * self.proj.kernel.shape[0]


MECHANISMS = (Entry("differential", DifferentialAttention, DifferentialAttention.declaration),)
