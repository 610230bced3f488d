"""A block of class attention (CaiT, arXiv:2103.17239, section 4)."""

import jax.numpy as jnp
from flax import nnx

from models.attention.class_attention import ClassAttention
from models.hosts.block import Block, BlockOptions


class ClassBlock(Block):
    """With t the first token of x: `t += attn(norm1(x))`, then `t += mlp(norm2(t))`; the other tokens stay.

    Args:
      options: `attention` is `"identity"` for the control, in which the class token sees itself only; all others leave
        class attention as it is.
    """

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.norm1, self.norm2 = options.make_norm(), options.make_norm()
        self.attn = (
            options.make_attention(rngs)
            if options.attention == "identity"
            else ClassAttention(
                options.width,
                options.heads,
                qkv_bias=options.qkv_bias,
                dropout=options.attention_dropout,
                init=options.init,
                dtype=options.dtype,
                rngs=rngs,
            )
        )
        self.mlp = options.make_mlp(rngs)

    def forward(self, x, run):
        token = x[:, :1] + run.drop(run.attend("attn", self.norm1(x))[:, :1])
        token = token + run.drop(run.feed("mlp", self.norm2(token)))
        return jnp.concatenate([token, x[:, 1:]], axis=1)
