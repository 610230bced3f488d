"""Rematerialization by name: what the forward pass of a block keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_policies as policies

from models.core.errors import unknown_name

LINEAR = "linear_layer"
"""What a linear layer gives is called. Its product may be inside of a function with a derivative of its own."""


def _convolutions(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive is lax.conv_general_dilated_p


def _either(*kinds: Callable | str) -> Callable:
    """A policy that keeps what one of several does, or what has one of these names."""
    names = [one for one in kinds if isinstance(one, str)]
    found: Callable = policies.save_only_these_names(*names)
    for one in kinds:
        found = found if isinstance(one, str) else policies.save_from_both_policies(found, one)
    return found


REMAT: dict[str, tuple[str, Callable | None]] = {
    "auto": ("`linear` in a scanned stack, `none` elsewhere", None),
    "linear": (
        "keep what linear layers and convolutions give, and per-head outputs; recompute scores and elementwise work",
        _either(
            *(LINEAR, "attention_heads", "attention_lse"), _convolutions, policies.dots_with_no_batch_dims_saveable
        ),
    ),
    "none": ("keep what differentiation asks for; no recomputation", None),
    "full": ("keep only each block's input; recompute the block", policies.nothing_saveable),
    "dots": (
        "keep the results of all matrix products, attention logits included",
        _either(LINEAR, policies.dots_saveable),
    ),
    "dots_no_batch": (
        "keep matrix products without batch axes (the linear layers); recompute attention logits and elementwise work",
        _either(LINEAR, policies.dots_with_no_batch_dims_saveable),
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
