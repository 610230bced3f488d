"""Dense attention beside a depthwise convolution (BiFormer, arXiv:2303.08810, official code)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, dense_attention
from attn.core.arguments import check_counts
from models.attention.mechanism import Declaration, Entry, ProjectedMechanism, attended, check_divides, token_index
from models.core.call import Call
from models.core.errors import unknown_name
from models.core.init import scheme
from models.layers.conv import Conv
from models.layers.linear import DType

LOCAL_OF = ("input", "values")


class LocalDenseAttention(ProjectedMechanism):
    """Softmax attention over all tokens, plus a depthwise convolution, then the output projection.

    Args:
      local: side of the depthwise kernel; 0 for none.
      local_of: what it convolves: the `"input"` of the module, as in the last stage of the published models, or the
        `"values"`, as in the paper.
      scale: of the logits; `head width ** -0.5` unless given.
      dropout: on probabilities.
      implementation: see `attn.dense_attention`.

    It takes no masks: the convolution sees neighbours that a mask would hide.
    """

    declaration = Declaration(
        summary="softmax attention between all tokens, beside a depthwise convolution",
        paper="arXiv:2303.08810",
        operator="dense_attention",
        cost="4 N C^2 + 2 N^2 C + 25 N C",
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        local: int = 5,
        local_of: str = "input",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        check_counts(0, local=local)
        if local_of not in LOCAL_OF:
            raise ValueError(unknown_name("local_of", local_of, LOCAL_OF))
        self.scale, self.dropout, self.local_of, self.implementation = scale, dropout, local_of, implementation
        shared: dict[str, Any] = {"init": init, "dtype": dtype, "rngs": rngs}
        self.make_inputs(width, heads, width // heads, qkv_bias=qkv_bias, **shared)
        kernel_init = scheme(init).patch
        self.local = (
            Conv(width, width, size=local, groups=width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
            if local
            else None
        )
        self.make_output(width, width, proj_bias=proj_bias, **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        q, k, v = self.inputs(x)

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            own = {"scale": self.scale, "implementation": self.implementation, **self.noise(call)}
            return dense_attention(q, k, v, **own, **options)

        index = token_index(call.grid) if call.wants("logits", "probs") else None
        heads = attended(call, attend, q, k, v, index=index).reshape(x.shape)
        if self.local is not None:
            near = x if self.local_of == "input" else v
            heads = heads + self.local(near.reshape(x.shape[0], *call.grid.shape, -1)).reshape(x.shape)
        return self.output(heads)

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        count = grid.tokens
        local = 0 if self.local is None else self.local.kernel.size * count
        return self.projections(count, count) + 2 * count**2 * self.proj.kernel.shape[0] + local


MECHANISMS = (Entry("local_dense", LocalDenseAttention, LocalDenseAttention.declaration),)
