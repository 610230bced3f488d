"""Brain encoding: the answer of every voxel to an image, measured by its correlation over a set."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from tasks import Task, metrics

SIDE = 4


def open_voxels(argument, split, directory=None):
    """Voxels that see random sums of pixels, with noise; the last one sees nothing."""
    random = np.random.default_rng(len(split))
    count, voxels = (200, 6) if split == "train" else (40, 6)
    weights = np.random.default_rng(7).normal(size=(SIDE * SIDE * 3, voxels))
    weights[:, -1] = 0
    image = random.integers(0, 255, (count, SIDE, SIDE, 3)).astype(np.uint8)
    seen = (image.reshape(count, -1) / 255 - 0.5) @ weights
    answers = (seen + random.normal(size=seen.shape) * 0.5).astype(np.float32)
    return data.ArraySource(
        {"image": image, "voxels": answers}, fields={"image": "image", "voxels": "array"}, name="voxels", split=split
    )


class Readout(nnx.Module):
    """A linear map of all pixels."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        voxels: int = 6

    def __init__(self, options, *, rngs):
        self.map = nnx.Linear(SIDE * SIDE * 3, options.voxels, rngs=rngs)

    def __call__(self, images):
        return self.map(images.reshape(images.shape[0], -1))


def correlation(count):
    """Pearson's correlation of every voxel over a set, and its mean."""
    names = ("n", "x", "y", "xx", "yy", "xy")

    def init():
        return {name: jnp.zeros(count) for name in names}

    def update(state, outputs, batch):
        weights = metrics.example_weights(batch)[:, None]
        x, y = (jnp.where(weights > 0, v, 0.0) for v in (outputs["voxels"], batch["voxels"]))
        more = {"n": jnp.broadcast_to(weights, x.shape), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
        return {name: state[name] + more[name].sum(0) for name in names}

    def finish(state):
        n, x, y, xx, yy, xy = (np.asarray(state[name], np.float64) for name in names)
        spread = np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 1e-12))
        found = (n * xy - x * y) / spread
        return {"mean": float(found[:-1].mean()), "voxels": found.tolist()}

    return metrics.Metric(init, update, metrics.add_states, finish)


class Encoding(Task):
    """Squared error of every voxel."""

    best_metric = ("correlation/mean", "max")
    columns = ("correlation/mean", "loss")

    @property
    def voxels(self):
        return self.info.fields["voxels"].shape[0]

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "voxels": jax.ShapeDtypeStruct((batch_size, self.voxels), jnp.float32)}

    def forward(self, model, batch, *, train, key, partners):
        return {"voxels": model(batch["image"])}

    def loss(self, outputs, batch):
        return metrics.weighted_mean(jnp.mean((outputs["voxels"] - batch["voxels"]) ** 2, axis=1), batch), {}

    def metrics(self):
        return {**super().metrics(), "correlation": correlation(self.voxels)}

    def predictions(self, outputs, batch):
        return {"voxels": outputs["voxels"]}
