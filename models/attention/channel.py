"""Attention between channels as a module (DaViT, arXiv:2204.03645)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, channel_attention
from models.attention.mechanism import Declaration, Entry, ProjectedMechanism, check_divides, emit_qkv
from models.core.call import Call
from models.layers.linear import DType

VERSIONS = (1, 2)


class ChannelAttention(ProjectedMechanism):
    """Softmax attention between the channels of each group (section 3.3), projections as in `DenseAttention`.

    Args:
      heads: groups of channels.
      version: 1, DaViT's: the scale is `group width ** -0.5`, and the parts of the fused projection are values, queries
        and keys, which the published weights depend on. 2, Florence-2's (arXiv:2311.06242): the scale is
        `tokens ** -0.5`, and the parts are queries, keys and values.
      dropout: on probabilities.
      implementation: see `attn.channel_attention`.

    Queries, keys, values and heads are `[B, N, G, D]` at their sites, maps `[B, G, D, D]` of channels for channels.
    """

    declaration = Declaration(
        summary="attention between the channels of a group, over all places",
        paper="arXiv:2204.03645",
        operator="channel_attention",
        cost="4 N C^2 + 2 N C^2 / H",
        prefix=True,
        axes=(1, 2, 3),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        version: int = 1,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        if version not in VERSIONS:
            raise ValueError(f"version={version!r} of channel attention; allowed: {', '.join(map(str, VERSIONS))}")
        self.version, self.dropout, self.implementation = version, dropout, implementation
        shared: dict[str, Any] = {"init": init, "dtype": dtype, "rngs": rngs}
        self.make_inputs(width, heads, width // heads, qkv_bias=qkv_bias, **shared)
        self.make_output(width, width, proj_bias=proj_bias, **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens; prefix tokens count like places."""
        parts = self.inputs(x)
        v, q, k = parts if self.version == 1 else (parts[2], *parts[:2])
        q, k, v = emit_qkv(call, q, k, v)
        found = channel_attention(
            q,
            k,
            v,
            scale=None if self.version == 1 else x.shape[1] ** -0.5,
            edit=call.edit("batch heads queries keys"),
            return_lse=call.wants("lse"),
            implementation=self.implementation,
            **self.noise(call),
        )
        if call.wants("lse"):
            found, lse = found
            call.emit("lse", lse, "batch dim heads")
        return self.output(call.emit("heads", found, "batch tokens heads dim"))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        width = self.proj.kernel.shape[0]
        return self.projections(grid.tokens, grid.tokens) + 2 * grid.tokens * width**2 // self.heads


MECHANISMS = (Entry("channel", ChannelAttention, ChannelAttention.declaration),)
