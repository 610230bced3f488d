"""A sequence of points for an image: where somebody looks, one fixation after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from tasks import Task, metrics

SIDE, MOST = 8, 4


def open_fixations(argument, split, directory=None):
    """From one bright pixel to the middle in 2 to 4 fixations."""
    random = np.random.default_rng(len(split))
    count = 96 if split == "train" else 12
    start = random.integers(0, SIDE, (count, 2))
    image = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    image[np.arange(count), start[:, 1], start[:, 0]] = 255
    points = []
    for x, y in start + 0.5:
        steps = 2 + int(x) % 3
        share = np.linspace(0, 1, steps)[:, None]
        points.append(((1 - share) * (x, y) + share * SIDE / 2).astype(np.float32))
    return data.ArraySource(
        {"image": image, "points": points}, fields={"image": "image", "points": "points"}, name="gaze", split=split
    )


class Gaze(nnx.Module):
    """All fixations and whether each is there."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 64

    def __init__(self, options, *, rngs):
        self.first = nnx.Linear(SIDE * SIDE * 3, options.width, rngs=rngs)
        self.last = nnx.Linear(options.width, 3 * MOST, rngs=rngs)

    def __call__(self, images):
        made = self.last(nnx.gelu(self.first(images.reshape(images.shape[0], -1)))).reshape(-1, MOST, 3)
        return made[..., :2], made[..., 2]


def path(points, there):
    """The fixations until the first that is not there, at least one."""
    count = int(np.argmin(np.append(there > 0, False)))
    return points[: max(count, 1)]


class Distance:
    """Mean distance in pixels between sequences, as far as both go, and how often their lengths agree."""

    def __init__(self):
        self.distances, self.lengths = [], []

    def update(self, predictions, source):
        for index, points, there in zip(*(predictions[n] for n in ("index", "points", "there")), strict=True):
            found, truth = path(points, there), source[int(index)]["points"]
            both = min(len(found), len(truth))
            self.distances.append(np.linalg.norm(found[:both] - truth[:both], axis=1).mean())
            self.lengths.append(len(found) == len(truth))

    def finish(self):
        return {"distance": float(np.mean(self.distances)), "length": float(np.mean(self.lengths))}


class Scanpath(Task):
    """Squared distances of the fixations that are there, and which are."""

    best_metric = ("path/distance", "min")

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {
            **spec,
            "points": jax.ShapeDtypeStruct((batch_size, MOST, 2), jnp.float32),
            "points_valid": jax.ShapeDtypeStruct((batch_size, MOST), jnp.float32),
        }

    def forward(self, model, batch, *, train, key, partners):
        points, there = model(batch["image"])
        return {"points": points, "there": there}

    def loss(self, outputs, batch):
        valid = batch["points_valid"]
        squared = jnp.sum(valid[..., None] * (outputs["points"] - batch["points"]) ** 2, axis=(1, 2)) / valid.sum(1)
        ends = jnp.mean(jax.nn.softplus(-(2 * valid - 1) * outputs["there"]), axis=1)
        where, when = metrics.weighted_mean(squared, batch), metrics.weighted_mean(ends, batch)
        return where + when, {"where": where, "when": when}

    def predictions(self, outputs, batch):
        return {"points": outputs["points"], "there": outputs["there"]}

    def host_metrics(self):
        return {"path": Distance()}

    def written(self, prediction):
        return {"points": np.round(path(prediction["points"], prediction["there"]), 2).tolist()}
