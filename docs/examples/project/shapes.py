"""A project of its own: a data set, a model and a task that Fovea runs by their names, `shapes:open_squares` and so on.

How many bright squares are in an image? docs/your_project.md walks through it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from configs import Field
from tasks import Task, metrics

SIDE = 16


def open_squares(argument, split, directory=None):
    """Images with 0 to 4 bright squares, and how many there are; `shapes:open_squares:500` has 500 of them."""
    examples = int(argument or 200) // (1 if split == "train" else 4)
    random = np.random.default_rng(0 if split == "train" else 1)
    count = random.integers(0, 5, examples)
    places = np.argsort(random.random((examples, 16)), axis=1) < count[:, None]  # of a grid of 4 x 4
    image = np.kron(places.reshape(-1, 4, 4), np.ones((4, 4)))[..., None].repeat(3, -1)
    return data.ArraySource(
        {"image": (255 * image).astype(np.uint8), "count": count.astype(np.float32)},
        fields={"image": "image", "count": "label"},
        name="squares",
        split=split,
    )


class Convolutions(nnx.Module):
    """Three layers and a mean."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What `--config.model.options.width=32` sets."""

        width: int = 16

    def __init__(self, options, *, rngs):
        self.first = nnx.Conv(3, options.width, (4, 4), strides=4, rngs=rngs)
        self.second = nnx.Linear(options.width, options.width, rngs=rngs)
        self.last = nnx.Linear(options.width, 1, rngs=rngs)

    def __call__(self, images):
        """Numbers `[B]` for images `[B, Y, X, 3]`."""
        maps = nnx.gelu(self.second(nnx.gelu(self.first(images))))
        return self.last(maps).sum((1, 2, 3))


class Counting(Task):
    """A number for each image, by the mean absolute error."""

    best_metric = ("error", "min")
    known_options = {"power": Field(2.0, "Power of the error that is minimised.", low=1.0)}  # noqa: RUF012

    def batch_spec(self, batch_size, *, train, info=None):
        """An image batch with `count` `[B]` float32."""
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "count": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def forward(self, model, batch, *, train, key, partners):
        """The number that the model says."""
        return {"count": model(batch["image"])}

    def loss(self, outputs, batch):
        """The mean of |error| to a power."""
        return metrics.weighted_mean(jnp.abs(outputs["count"] - batch["count"]) ** self.options.power, batch), {}

    def metrics(self):
        """The mean absolute error besides the loss."""
        error = metrics.mean(lambda outputs, batch: jnp.abs(outputs["count"] - batch["count"]))
        return {**super().metrics(), "error": error}
