"""Initialization schemes by name: which distribution each kind of parameter starts from."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers

from models.core.errors import unknown_name

Initializer = Callable[..., jax.Array]


def _uniform(limit: Callable[[tuple[int, ...]], float]) -> Initializer:
    def initialize(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * limit(shape)

    return initialize


def _normal_by_width(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def _fan_in(shape: tuple[int, ...]) -> int:
    fan = 1
    for size in shape[:-1]:
        fan *= size
    return fan


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
_NORMAL_002 = initializers.normal(0.02)

SCHEMES: dict[str, InitScheme] = {
    "timm": InitScheme(
        linear=_NORMAL_002,
        qkv=_NORMAL_002,
        mlp_bias=initializers.zeros,
        patch=_uniform(lambda shape: _fan_in(shape) ** -0.5),
        position=_NORMAL_002,
        token=initializers.normal(1e-6),
        latent=_normal_by_width,
        pre_logits=_NORMAL_002,
        head=_NORMAL_002,
    ),
    "big_vision": InitScheme(
        linear=initializers.xavier_uniform(),
        qkv=_uniform(lambda shape: (6 / (2 * shape[0])) ** 0.5),
        mlp_bias=initializers.normal(1e-6),
        patch=initializers.lecun_normal(),
        position=_normal_by_width,
        token=initializers.zeros,
        latent=initializers.xavier_uniform(),
        pre_logits=initializers.lecun_normal(),
        head=initializers.zeros,
    ),
    "normal": InitScheme(
        linear=_NORMAL_002,
        qkv=_NORMAL_002,
        mlp_bias=initializers.zeros,
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
