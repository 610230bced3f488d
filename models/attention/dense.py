"""Dense attention as a module: every token sees all tokens."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Grid, dense_attention, packed_attention
from attn.common.relative import relative_position_bias, resample_relative_bias
from models.attention.cache import extended
from models.attention.mechanism import (
    Declaration,
    Entry,
    ProjectedMechanism,
    attended,
    check_divides,
    token_index,
)
from models.core import sharding
from models.core.call import Call
from models.layers.linear import DType
from models.layers.position import relative_bias_table
from models.layers.rotary import rotated


class DenseAttention(ProjectedMechanism):
    """Multi-head softmax attention over all tokens, projections fused as `[q, k, v]` (arXiv:2010.11929).

    Queries and keys are turned by `call.positions` where there are some (`models/layers/rotary.py`). With a
    `call.state`, keys and values of earlier tokens (`models/attention/cache.py`), those of this call are put behind
    them, and the result is `(tokens, new state)`.

    Args:
      relative_bias: (rows, columns) of the grid that a learned bias of each head by relative position is for, as in
        Swin (arXiv:2103.14030, eq. 4) and ViT-rpb (arXiv:2209.15001); None for no bias. On another grid
        its table is resampled. Prefix tokens have none.
      scale: of the logits; `head width ** -0.5` unless given.
      memory_width: channels of a memory; with it queries and keys have projections of their own.
      dropout: on probabilities.
      implementation: see `attn.dense_attention`.
    """

    declaration = Declaration(
        summary="softmax attention between all tokens",
        paper="arXiv:1706.03762",
        operator="dense_attention",
        cost="4 N C^2 + 2 N^2 C",
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
        relative_bias: tuple[int, int] | None = None,
        scale: float | None = None,
        memory_width: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        self.dropout, self.scale, self.implementation = dropout, scale, implementation
        shared: dict[str, Any] = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        inputs = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "memory_width": memory_width, **shared}
        self.make_inputs(width, heads, width // heads, **inputs)
        self.relative_bias = (
            None if relative_bias is None else relative_bias_table(heads, [2 * n - 1 for n in relative_bias], rngs)
        )
        self.make_output(width, width, proj_bias=proj_bias, scale_norm=scale_norm, **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Any:
        """Tokens attend to each other, or to a memory; a relative bias does not go with one."""
        if self._stays_packed(call):
            fused, bias = self.qkv.unbiased(x)
            own: dict[str, Any] = {"scale": self.scale, "implementation": self.implementation}
            fused = checkpoint_name(fused, "attention_qkv")
            return self.output(packed_attention(fused, bias, heads=self.heads, **own))
        q, k, v = self.inputs(x, call.memory)
        if call.positions is not None:
            q, k = rotated(q, call.positions), rotated(k, call.positions)
        state, mask = None, call.mask
        if call.state is not None:
            k, v, mask, state = extended(call.state, k, v, mask)
        bias = self._bias(call)
        index = token_index(call.grid, k.shape[1]) if call.wants("logits", "probs") else None

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            own = {"scale": self.scale, "implementation": self.implementation, **self.noise(call)}
            return dense_attention(q, k, v, mask=mask, bias=bias, **own, **options)

        y = self.output(attended(call, attend, q, k, v, index=index))
        return y if state is None else (y, state)

    def _stays_packed(self, call: Call) -> bool:
        """Whether nobody asks for queries, keys and values by themselves."""
        nothing = (call.memory, call.positions, call.state, call.mask, self.q_norm, self.k_norm, self.relative_bias)
        return (
            getattr(self, "qkv", None) is not None
            and all(one is None for one in nothing)
            and not (call.train and self.dropout)
            and not call.wants("q", "k", "v", "logits", "probs", "lse", "heads")
            and sharding.tensor_ways() == 1
        )

    def _bias(self, call: Call) -> Float[Array, "1 H N N"] | None:
        if self.relative_bias is None:
            return None
        if call.memory is not None:
            raise ValueError("a relative position bias has no meaning for a memory: its tokens have no places")
        grid = call.grid
        table = sharding.gathered(self.relative_bias, jnp.float32)
        extents = [2 * n - 1 for n in grid.shape]
        if list(table.shape[1:]) != extents:
            table = jnp.asarray(resample_relative_bias(table, extents))
        bias = relative_position_bias(table, grid.shape)
        return jnp.pad(bias, ((0, 0), (grid.prefix, 0), (grid.prefix, 0)))[None]

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        count = grid.tokens
        return self.projections(count, count) + 2 * count**2 * self.proj.kernel.shape[0]


MECHANISMS = (Entry("dense", DenseAttention, DenseAttention.declaration),)
