"""Diffusion (as DDIM, arXiv:2010.02502): clean images are predicted in training; samples are drawn when compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from configs import Field
from tasks import Chart, Task, metrics
from tasks.base import Picture

SIDE = 4


def open_patterns(argument, split, directory=None):
    """A bright left half or a bright right half."""
    random = np.random.default_rng(len(split))
    count = 128 if split == "train" else 16
    left = random.integers(0, 2, count)
    image = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    image[left == 0, :, : SIDE // 2] = 255
    image[left == 1, :, SIDE // 2 :] = 255
    return data.ArraySource({"image": image}, fields={"image": "image"}, name="patterns", split=split)


class Clean(nnx.Module):
    """The clean image in a noisy one, given how much noise there is."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 64

    def __init__(self, options, *, rngs):
        pixels = SIDE * SIDE * 3
        self.first = nnx.Linear(pixels + 1, options.width, rngs=rngs)
        self.second = nnx.Linear(options.width, options.width, rngs=rngs)
        self.last = nnx.Linear(options.width, pixels, rngs=rngs)

    def __call__(self, images, time):
        flat = jnp.concatenate([images.reshape(images.shape[0], -1), time[:, None]], axis=1)
        return self.last(nnx.gelu(self.second(nnx.gelu(self.first(flat))))).reshape(images.shape)


class Contrast:
    """How far the two halves of a sample are apart: 1 for what the data look like."""

    def __init__(self):
        self.found = []

    def update(self, predictions, source):
        halves = predictions["sample"].reshape(-1, SIDE, 2, SIDE // 2, 3).mean((1, 3, 4))
        self.found += np.abs(halves[:, 0] - halves[:, 1]).tolist()

    def finish(self):
        return float(np.mean(self.found))


class Diffusion(Task):
    """Mean squared error of the clean image; samples are measured and shown."""

    samples = 6
    best_metric = ("contrast", "max")
    known_options = {"sampling_steps": Field(10, "Steps of a sample.", low=1)}  # noqa: RUF012

    def forward(self, model, batch, *, train, key, partners):
        images = batch["image"]
        if key is None:  # a headline or an export: half noise
            return {"clean": model(images, jnp.full(len(images), 0.5))}
        keys = jax.random.split(key, len(images)) if train else key
        time = jax.vmap(jax.random.uniform)(keys)
        noise = jax.vmap(lambda own: jax.random.normal(jax.random.fold_in(own, 1), images.shape[1:]))(keys)
        angle = time[:, None, None, None] * jnp.pi / 2
        found = model(jnp.cos(angle) * images + jnp.sin(angle) * noise, time)
        return {"error": jnp.mean((found - images) ** 2, axis=(1, 2, 3))}

    def loss(self, outputs, batch):
        return metrics.weighted_mean(outputs["error"], batch), {}

    def generate(self, model, batch, key, partners):
        steps = self.options.sampling_steps
        start = jax.vmap(lambda own: jax.random.normal(own, batch["image"].shape[1:]))(key)

        def step(images, times):
            now, after = times * jnp.pi / 2
            clean = jnp.clip(model(images, jnp.broadcast_to(times[0], len(images))), -1, 1)
            noise = (images - jnp.cos(now) * clean) / jnp.sin(now)
            return jnp.cos(after) * clean + jnp.sin(after) * noise, None

        times = jnp.linspace(0.98, 0.0, steps + 1)
        sample, _ = jax.lax.scan(step, start, jnp.stack([times[:-1], times[1:]], 1))
        return {"sample": sample / 2 + 0.5}

    def sample_metrics(self):
        return {"contrast": Contrast()}

    def predictions(self, outputs, batch):
        return {"error": outputs["error"]}

    def report(self, results, source, samples):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 1.5))
        for place, pixels in zip(figure.subplots(1, len(samples["sample"])), samples["sample"], strict=True):
            place.imshow(Picture(pixels).pixels.clip(0, 1))
            place.axis("off")
        return [Chart("Samples", "Drawn from noise.", figure)]
