"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of a whole batch on the device.

Image i is mixed with image B-1-i of the same global batch, targets with the same share. As in timm, one share and one
box are drawn for the batch, and with both methods on, a coin decides which one a batch gets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers.cutmix import cut_box


def mix(
    images: Float[Array, "B H W c"],
    targets: Float[Array, "B C"],
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> tuple[Float[Array, "B H W c"], Float[Array, "B C"]]:
    """The mixed images and targets.

    Args:
      images: one batch.
      targets: class probabilities, such as one-hot labels.
      key: the randomness of this batch.
      mixup: alpha of the Beta(alpha, alpha) from which mixup draws its share; 0 turns mixup off.
      cutmix: the same for CutMix.
      probability: how often a batch is mixed at all.
      switch_probability: how often CutMix is taken when both are on.
    """
    if not mixup and not cutmix:
        return images, targets
    apply_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    height, width = images.shape[1:3]
    use_cutmix = jax.random.bernoulli(switch_key, switch_probability) if mixup and cutmix else jnp.bool_(cutmix > 0)
    # `own` is the share of the image that each pixel keeps: one number for mixup, 0 or 1 by pixel for CutMix.
    own = jnp.ones((height, width))
    if mixup:
        own = own * jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        box = cut_box(box_key, jax.random.beta(cutmix_key, cutmix, cutmix), height, width)
        own = jnp.where(use_cutmix, 1.0 - box, own)
    own = jnp.where(jax.random.bernoulli(apply_key, probability), own, 1.0)
    # The share of the target is what is left of the area: a clipped box is smaller than the drawn one.
    share = jnp.mean(own)
    own = own[None, :, :, None].astype(images.dtype)
    return images * own + images[::-1] * (1 - own), targets * share + targets[::-1] * (1 - share)
