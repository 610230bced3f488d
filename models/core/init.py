"""Initialization schemes by name: which distribution each kind of parameter starts from.

An initializer is a function `(key, shape, dtype) -> array`; those of `jax.nn.initializers` fit as well. The ones here
draw the same numbers as their namesakes there, and do not compile a program for each shape (`models.core.draw`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.core.draw import draw, full
from models.core.errors import unknown_name

Initializer = Callable[..., jax.Array]
Shape = tuple[int, ...]


def constant(value: float) -> Initializer:
    """The same value everywhere."""

    def initialize(key, shape, dtype=jnp.float32):
        return full(shape, value, dtype)

    return initialize


zeros = constant(0.0)


def scaled(distribution: str, scale: Callable[[Shape, Any], Any]) -> Initializer:
    """A distribution of `models.core.draw` times `scale(shape, dtype)`."""

    def initialize(key, shape, dtype=jnp.float32):
        return draw(distribution, key, shape, dtype, scale=scale(shape, dtype))

    return initialize


def normal(deviation: float) -> Initializer:
    """Normal with mean 0."""
    return scaled("normal", lambda shape, dtype: deviation)


def uniform(limit: Callable[[Shape], float]) -> Initializer:
    """Uniform between -limit and limit, which depends on the shape."""
    return scaled("uniform", lambda shape, dtype: limit(shape))


def he_normal_fan_out() -> Initializer:
    """Normal with variance `2 / fan_out` (arXiv:1502.01852)."""
    return scaled("normal", lambda shape, dtype: np.sqrt(np.asarray(2.0 / fan_out(shape), dtype)))


def lecun_normal() -> Initializer:
    """Normal, cut at two deviations, which has variance `1 / fan_in` after the cut."""

    def scale(shape: Shape, dtype: Any) -> Any:
        # The deviation of a normal distribution that is cut at two deviations.
        return np.sqrt(np.asarray(1.0 / fan_in(shape), dtype)) / np.asarray(0.87962566103423978, dtype)

    return scaled("truncated_normal", scale)


def xavier_uniform() -> Initializer:
    """Uniform with variance `2 / (fan_in + fan_out)`."""

    def scale(shape: Shape, dtype: Any) -> Any:
        return np.sqrt(np.asarray(3, dtype) * np.asarray(2.0 / (fan_in(shape) + fan_out(shape)), dtype))

    return scaled("uniform", scale)


def fan_in(shape: Shape) -> int:
    """Inputs of one unit, of a kernel `[..., in, out]`."""
    return math.prod(shape[:-1])


def fan_out(shape: Shape) -> int:
    """Units that one input goes to, over all places of a kernel `[..., in, out]`."""
    return math.prod(shape[:-2]) * shape[-1]


@dataclasses.dataclass(frozen=True)
class InitScheme:
    """Initializers by kind of parameter. `qkv` is the fused kernel `[C, 3C]`, so fan-out is not its last axis."""

    linear: Initializer
    qkv: Initializer
    mlp_bias: Initializer
    patch: Initializer
    position: Initializer
    token: Initializer
    latent: Initializer
    pre_logits: Initializer
    head: Initializer


# timm's trunc_normal_(std=0.02) cuts at an absolute 2.0, a hundred deviations away: it is a plain normal.
_NORMAL_002 = normal(0.02)
_BY_WIDTH = scaled("normal", lambda shape, dtype: shape[-1] ** -0.5)

SCHEMES: dict[str, InitScheme] = {
    "timm": InitScheme(
        linear=_NORMAL_002,
        qkv=_NORMAL_002,
        mlp_bias=zeros,
        patch=uniform(lambda shape: fan_in(shape) ** -0.5),
        position=_NORMAL_002,
        token=normal(1e-6),
        latent=_BY_WIDTH,
        pre_logits=_NORMAL_002,
        head=_NORMAL_002,
    ),
    "big_vision": InitScheme(
        linear=xavier_uniform(),
        qkv=uniform(lambda shape: (6 / (2 * shape[0])) ** 0.5),
        mlp_bias=normal(1e-6),
        patch=lecun_normal(),
        position=_BY_WIDTH,
        token=zeros,
        latent=xavier_uniform(),
        pre_logits=lecun_normal(),
        head=zeros,
    ),
    "normal": InitScheme(
        linear=_NORMAL_002,
        qkv=_NORMAL_002,
        mlp_bias=zeros,
        patch=_NORMAL_002,
        position=_NORMAL_002,
        token=_NORMAL_002,
        latent=_NORMAL_002,
        pre_logits=_NORMAL_002,
        head=_NORMAL_002,
    ),
}
"""`"timm"`: weight_init='' of timm's VisionTransformer. `"big_vision"`: models/hosts/isotropic.py of big_vision.
`"normal"`: a deviation 0.02 for all kernels, convolutions among them, as in google-research/maxvit."""


def scheme(name: str) -> InitScheme:
    """The scheme of that name. ValueError listing the nearest otherwise."""
    if name not in SCHEMES:
        raise ValueError(unknown_name("init", name, SCHEMES))
    return SCHEMES[name]
