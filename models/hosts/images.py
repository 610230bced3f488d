"""What every model asks of the images that it is called with, in one line each, before any of its layers sees them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def checked_images(images: Float[Array, "B Y X I"], channels: int) -> Float[Array, "B Y X I"]:
    """The images as an array; there may be none of them.

    Args:
      channels: of the model.

    Raises:
      ValueError: for integers, which a layer would convert its weights to; for images without a batch axis, with
        channels first, of another number of channels, or without a pixel.
    """
    images = jnp.asarray(images)
    shape = tuple(images.shape)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}: normalize them to floating point first, (images / 255 - mean) / std, as the "
            "transform 'normalize' does"
        )
    if len(shape) != 4:
        raise ValueError(f"images of {shape}; allowed: (batch, rows, columns, {channels}){_hint(shape, channels)}")
    if shape[3] != channels:
        if shape[1] == channels:
            raise ValueError(
                f"images of {shape} have their channels first; allowed: (batch, rows, columns, {channels}), "
                "images.transpose(0, 2, 3, 1)"
            )
        raise ValueError(f"image of {shape[3]} channels for a model of {channels}; images are NHWC")
    if 0 in shape[1:3]:
        raise ValueError(f"images of {shape[1]} x {shape[2]} pixels; allowed: at least one along each axis")
    return images


def _hint(shape: tuple[int, ...], channels: int) -> str:
    if len(shape) != 3:
        return ""
    if channels == 1 and shape[-1] != 1:
        return "; the axis of channels is missing, images[..., None] has it"
    return "; the batch axis is missing, images[None] is a batch of one"
