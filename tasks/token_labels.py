"""Token labels: every token of an image has a target of its own besides the image's (Token Labeling, arXiv:2104.10858).

A model that takes part answers in training with `token_logits` `[B, N, C]` beside `logits` and, if it exchanged a box
of tokens between examples i and B-1-i (mix-token), with `own_share` `[B]`: what is left of each example in the tokens
that its class token saw. Its token logits are exchanged back: at every place those of example i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tasks.base import Outputs


def shared_target(target: Float[Array, "B C"], outputs: Outputs) -> Float[Array, "B C"]:
    """Class probabilities of what the class token saw: after mix-token, those of both examples (section 3.3)."""
    if "own_share" not in outputs:
        return target
    own = outputs["own_share"][:, None]
    return own * target + (1 - own) * target[::-1]


def token_label_loss(
    outputs: Outputs,
    target: Float[Array, "B C"],
    loss: Callable[[Float[Array, "M C"], Float[Array, "M C"]], Float[Array, " M"]],
) -> Float[Array, " B"]:
    """Mean loss of the tokens of each example (eq. 4 without its weight).

    Args:
      outputs: with `token_logits`; their targets are the probabilities of `teacher_token_logits` where there are these,
        and else the image's own `target` for every token.
      target: class probabilities before mix-token.
      loss: of rows of logits against rows of probabilities.

    Raises:
      ValueError: the outputs have no token logits, or the teacher's are of another number of tokens or classes.
    """
    if "token_logits" not in outputs:
        raise ValueError(
            "config.task.options.token_labels needs a model that gives logits of its tokens in training, such as "
            "volo_d1 with config.model.options.dense=True"
        )
    logits = outputs["token_logits"]
    batch, tokens, classes = logits.shape
    if "teacher_token_logits" in outputs:
        theirs = jax.lax.stop_gradient(outputs["teacher_token_logits"].astype(jnp.float32))
        if theirs.shape != logits.shape:
            raise ValueError(
                f"config.task.options.teacher gives {theirs.shape[1]} tokens of {theirs.shape[2]} classes, the model "
                f"{tokens} of {classes}: token labels need the same"
            )
        targets = jax.nn.softmax(theirs)
    else:
        targets = jnp.broadcast_to(target[:, None], logits.shape)
    return loss(logits.reshape(-1, classes), targets.reshape(-1, classes)).reshape(batch, tokens).mean(axis=1)


def dense_predictions(teacher: Any, images: Float[Array, "B Y X c"]) -> Float[Array, "B N C"]:
    """Token logits of a frozen teacher for whole images. ValueError for a teacher that has none."""
    found = teacher.features(images)
    if "token_logits" not in found:
        raise ValueError(
            f"config.task.options.teacher is a {type(teacher).__name__} without logits of its tokens: token labels "
            "take a teacher that has them, or none"
        )
    return found["token_logits"]
