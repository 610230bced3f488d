"""Rematerialization by name: what the forward pass of a block keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_policies as policies

from models.core.errors import unknown_name


def _linear_layers(primitive: Any, *given: Any, **parameters: Any) -> bool:
    return primitive is lax.conv_general_dilated_p or policies.dots_with_no_batch_dims_saveable(
        primitive, *given, **parameters
    )


REMAT: dict[str, tuple[str, Callable | None]] = {
    "auto": ("`linear` in a scanned stack, `none` elsewhere", None),
    "linear": (
        "keep what linear layers and convolutions give, and per-head outputs; recompute scores and elementwise work",
        policies.save_from_both_policies(
            _linear_layers, policies.save_only_these_names("attention_heads", "attention_lse")
        ),
    ),
    "none": ("keep what differentiation asks for; no recomputation", None),
    "full": ("keep only each block's input; recompute the block", policies.nothing_saveable),
    "dots": ("keep the results of all matrix products, attention logits included", policies.dots_saveable),
    "dots_no_batch": (
        "keep matrix products without batch axes (the linear layers); recompute attention logits and elementwise work",
        policies.dots_with_no_batch_dims_saveable,
    ),
    "attention": (
        "keep projections, per-head outputs and MLP hidden units; recompute the score matrices and elementwise work",
        policies.save_only_these_names("attention_qkv", "attention_heads", "attention_lse", "mlp_hidden"),
    ),
}
"""Name -> (meaning, policy of `jax.checkpoint`).

What a scan keeps is written to stacks of all layers and read from there, which takes longer than to compute norms and
activations again (docs/benchmarks.md).
"""


def rematerialized(function: Callable, remat: str, *, inside_scan: bool) -> Callable:
    """`function` under the named policy. ValueError for an unknown name."""
    if remat not in REMAT:
        raise ValueError(unknown_name("remat policy", remat, REMAT))
    if remat == "auto":
        remat = "linear" if inside_scan else "none"
    if remat == "none":
        return function
    # A scan body cannot be merged with its recomputation by common-subexpression elimination, so it needs no barrier.
    return jax.checkpoint(function, policy=REMAT[remat][1], prevent_cse=not inside_scan)
