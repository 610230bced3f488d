"""One tiny configuration per family, for tests that run every registered model: `create("swin")`.

A family adds one row: the variant it starts from, and options that make it small: a model of two stages or so, 8 to 16
channels, images of 32 to 64 pixels, 5 classes. Every kind of layer of the family has to be in it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from models.core.registry import _lookup

TINY: dict[str, tuple[str, dict]] = {
    "vit": ("vit_mu16", dict(image_size=32, patch_size=8, width=16, depth=3, heads=2, mlp_width=32)),
    "nat": (
        "dinat_mini",
        dict(width=8, depths=(3, 2), heads=(1, 2), window=3, image_size=32, layer_scale=0.5)
        | {"attention_options": {"implementation": "reference"}},
    ),
    "biformer": (
        "biformer_tiny",
        dict(widths=(8, 16), depths=(3, 2), heads=(2, 4), mlp_ratio=2, image_size=32)
        | {"regions": 2, "topk": (2, 0), "auto_pad": True},
    ),
    "halonet": (
        "halonet26t",
        dict(widths=(8, 16), depths=(2, 3), strides=(1, 2), stem=(4, 4, 8), heads=2, image_size=32)
        | dict(block_size=2, halo_size=1)
        | dict(layers=(("conv", {"gate": "eca"}), ("attention", "conv", "attention")), gate="se", features=12),
    ),
    "maxvit": (
        "maxvit_tiny",
        dict(widths=(8, 16), depths=(2, 3), stem_widths=8, head_width=4, window=2, pre_logits=12, image_size=32),
    ),
    "volo": (
        "volo_d1",
        # Heads of 16 channels, which the kernel of outlook attention takes.
        dict(depths=(2, 3), widths=(32, 16), heads=(2, 2), downsamples=(True, False), outlook=(True, False))
        | dict(stem_width=8, patch_size=4, image_size=32),
    ),
    "swin": ("swin_tiny", dict(width=8, depths=(3, 2), heads=(2, 4), window=4, image_size=32)),
    "davit": ("davit_tiny", dict(widths=(8, 16), depths=(1, 2), heads=(2, 4), window=3, image_size=32)),
    "nat_isotropic": ("nat_iso_s", dict(patch_size=8, width=16, depth=3, heads=2, window=3, image_size=32)),
}
"""Family -> (variant, options). The image size is the one that the family's tests run at first."""


def abstract(family: str, **options) -> nnx.Module:
    """The tiny model of a family as shapes only. What it says to its own mechanism is left out where another one is
    asked for (`attention`).
    """
    name, own = TINY[family]
    if "attention" in options:
        own = {option: value for option, value in own.items() if option != "attention_options"}
        kind = _lookup(name)[0].Options
        unused = kind(**models.variant(name) | own | options).unused()
        own = {option: value for option, value in own.items() if option not in unused}
    return nnx.eval_shape(lambda: models.create(name, num_classes=5, rngs=nnx.Rngs(0), **own | options))


def create(family: str, **options) -> nnx.Module:
    """The tiny model with random parameters, the same for a scanned model and its unrolled twin, without compiling any
    initializer: none is left at zero or one, so every layer has an effect.
    """
    graph, params, state = models.split(abstract(family, **options))
    return models.merge(graph, numbers(params), numbers(state))


def numbers(flat):
    """Random values for the shapes of a flat dictionary; one layer has the same whether it is scanned or not."""
    rng = np.random.default_rng(0)
    zeros = {name: np.zeros(value.shape, np.float32) for name, value in flat.items()}
    found = {}
    for name, value in sorted(models.unstack(zeros).items()):
        std = np.prod(value.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.3
        noise = rng.normal(size=value.shape)
        number = 1 + 0.3 * np.abs(noise) if name.endswith("var") else std * noise + name.endswith("scale")
        found[name] = np.asarray(number, np.float32)
    return {name: jnp.asarray(value) for name, value in models.stack(found, like=flat).items()}


def images(*sides, batch=2, channels=3):
    """Standard normal pixels."""
    return jax.random.normal(jax.random.key(1), (batch, *sides, channels))
