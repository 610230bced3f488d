"""Boxes of a map, and what is exchanged inside them between the examples of a batch (CutMix, mix-token)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def cut_box(key: PRNGKeyArray, share: Float[Array, ""], height: int, width: int) -> Bool[Array, "H W"]:
    """True inside a box of about `1 - share` of the area, its centre uniform over the map and its sides clipped to the
    map (CutMix, arXiv:1905.04899, section 3.1)."""
    row_key, column_key = jax.random.split(key)
    scale = jnp.sqrt(1.0 - share)

    def inside(key: PRNGKeyArray, size: int) -> Bool[Array, " size"]:
        half = jnp.floor(size * scale).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        place = jnp.arange(size)
        return (place >= centre - half) & (place < centre + half)

    return inside(row_key, height)[:, None] & inside(column_key, width)[None, :]


def token_box(key: PRNGKeyArray, shape: tuple[int, int]) -> Bool[Array, "V U"]:
    """The box of mix-token, with a share from Beta(1, 1) (Token Labeling, arXiv:2104.10858, section 3.3; VOLO)."""
    share_key, box_key = jax.random.split(key)
    # Beta(1, 1) is the uniform distribution.
    return cut_box(box_key, jax.random.uniform(share_key), *shape)


def exchange(x: Float[Array, "B Y X C"], box: Bool[Array, "V U"], cell: int = 1) -> Float[Array, "B Y X C"]:
    """Inside the box, the places of example B-1-i in place of those of example i. Twice is as before.

    Args:
      cell: rows and columns of the map for one of the box; places behind the last whole cell stay.
    """
    box = jnp.repeat(jnp.repeat(box, cell, 0), cell, 1)
    box = jnp.pad(box, [(0, whole - part) for whole, part in zip(x.shape[1:3], box.shape, strict=True)])
    return jnp.where(box[None, :, :, None], x[::-1], x)
