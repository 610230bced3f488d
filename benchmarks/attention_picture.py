"""The picture in docs/attention_maps.md: what one place looks at, by mechanism, brought to the grid of the image.

python -m benchmarks.attention_picture --output=docs/attention_maps.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from matplotlib.figure import Figure

import data
import models
from models.core.map_picture import draw

PLACE = (5, 9)
SIDE = 64
MECHANISMS = {
    "dense": ("dense", {}),
    "window": ("window", {"window": 4}),
    "shifted window": ("shifted_window", {"window": 4}),
    "grid": ("grid", {"window": 4}),
    "neighborhood": ("neighborhood", {"window": 5}),
    "dilated neighborhood": ("neighborhood", {"window": 5, "dilation": 3}),
    "routed regions": ("bilevel_routing", {"regions": 4, "topk": 4}),
    "outlook": ("outlook", {"window": 3}),
}
"""Panel -> mechanism and its options."""


def looked_at(name: str, options: dict, image: Float[np.ndarray, "Y X I"]) -> models.AttentionMap:
    """Of a model of one layer with a map of 16 x 16 places, as it starts."""
    model = models.create(
        "vit_mu16",
        attention=name,
        attention_options=options,
        depth=1,
        patch_size=SIDE // 16,
        image_size=SIDE,
        class_token=False,
        pool="avg",
        rngs=nnx.Rngs(0),
    )
    return models.attention_map(model, jnp.asarray(image), head="mean", query=PLACE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    source = data.open_source("digits", "test")
    batches = data.eval_batches(source, transforms=f"to_rgb|resize({SIDE})|normalize", batch_size=8)
    image = next(iter(batches))["image"][3]
    figure = Figure(figsize=(8.4, 4.5), layout="constrained")
    for axes, (title, (name, given)) in zip(figure.subplots(2, 4).flat, MECHANISMS.items(), strict=True):
        one = looked_at(name, given, image)
        draw(axes, one, 0, image / 2 + 0.5)
        axes.set_title(title, fontsize=9)
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
