"""Contrastive image and text: two towers whose embeddings of one pair are alike (as CLIP, arXiv:2103.00020)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from tasks import Task, metrics

LENGTH, WORDS = 3, 9


def open_captions(argument, split, directory=None):
    """Two colours side by side, and their names."""
    random = np.random.default_rng(len(split))
    colours = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.uint8)
    count = 128 if split == "train" else 30
    pairs = random.permutation(64)[np.arange(count) % 64]
    left, right = pairs // 8, pairs % 8
    image = np.repeat(np.stack([colours[left], colours[right]], 1), 4, axis=1)[:, None].repeat(8, axis=1)
    text = np.stack([left, right, np.full(count, 8)], 1).astype(np.int32)
    return data.ArraySource(
        {"image": image, "text": text}, fields={"image": "image", "text": "tokens"}, name="captions", split=split
    )


class Towers(nnx.Module):
    """One embedding for an image, one for a text."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 16

    def __init__(self, options, *, rngs):
        self.image = nnx.Linear(8 * 8 * 3, options.width, rngs=rngs)
        self.word = nnx.Embed(WORDS, 16, rngs=rngs)
        self.text = nnx.Linear(LENGTH * 16, options.width, rngs=rngs)
        self.scale = nnx.Param(jnp.full((), 2.0))

    def __call__(self, images, text):
        def unit(x):
            return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

        of_image = self.image(images.reshape(images.shape[0], -1))
        of_text = self.text(self.word(text).reshape(text.shape[0], -1))
        return unit(of_image), unit(of_text), self.scale[...]


class Contrastive(Task):
    """Which text belongs to which image, among all of a batch; measured among all of a set."""

    inputs = ("image", "text")
    best_metric = ("recall", "max")
    couples_batch = True

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "text": jax.ShapeDtypeStruct((batch_size, LENGTH), jnp.int32)}

    def forward(self, model, batch, *, train, key, partners):
        image, text, scale = model(batch["image"], batch["text"])
        return {"image": image, "text": text, "scale": jnp.broadcast_to(scale, image.shape[:1])}

    def loss(self, outputs, batch):
        weights = metrics.example_weights(batch)
        logits = jnp.exp(outputs["scale"][0]) * outputs["image"] @ outputs["text"].T
        logits = jnp.where(weights > 0, logits, -1e9)
        rows = -jnp.diagonal(jax.nn.log_softmax(logits))
        return metrics.weighted_mean(rows, batch), {}

    def metrics(self):
        """Recall at 1 over the whole set, whose embeddings the state keeps."""

        def of_set(info):
            width = self.config.model.options.get("width", 16)
            return {name: jnp.zeros((info.num_examples, width)) for name in ("image", "text")}

        def update(state, outputs, batch):
            weights = metrics.example_weights(batch)[:, None]
            return {name: state[name].at[batch["index"]].add(weights * outputs[name]) for name in state}

        def finish(state):
            best = np.argmax(state["image"] @ state["text"].T, axis=1)
            alike = np.abs(state["text"][best] - state["text"]).max(axis=1) < 1e-5  # one text may come several times
            return float(np.mean(alike))

        recall = metrics.Metric(dict, update, metrics.add_states, finish, of_set)
        return {**super().metrics(), "recall": recall}
