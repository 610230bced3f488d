"""Loops inside the compiled evaluation: generation with a cache, and gradient descent on a latent at test time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_tasks
from flax import nnx

import models
from tasks import metrics
from tasks.base import Task
from training.evaluation import generate, trained
from training.run import evaluate

SOURCE = tiny_tasks.restoration_source(12)
SETTINGS = {
    **tiny.OWN_MODEL,
    "data__image_size": 8,
    "data__eval_transforms": "value_range(0, 1)",
}
WORDS, LENGTH, WIDTH = 7, 6, 8


class Text(nnx.Module):
    """One causal attention over words, begun by the colour of an image."""

    def __init__(self, rngs):
        self.word, self.place = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.colour, self.qkv = nnx.Linear(3, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.next = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def parts(self, words, place, colour):
        return jnp.split(self.qkv(self.word(words) + self.place(place) + self.colour(colour)), 3, axis=-1)

    def logits(self, query, keys, values, seen):
        scores = jnp.where(seen, jnp.einsum("...d,...nd->...n", query, keys), -jnp.inf)
        return self.next(jnp.einsum("...n,...nd->...d", jax.nn.softmax(scores), values))


class Captions(Task):
    """Text by `jax.lax.scan`, with keys and values in its carry."""

    trains = False

    def build_model(self, rngs):
        return Text(rngs)

    def metrics(self):
        return {}

    def generate(self, model, batch, key, partners):
        colour, count = batch["image"].mean((1, 2)), len(batch["image"])
        keys = jax.vmap(lambda own: jax.random.split(own, LENGTH))(key)

        def step(carry, place):
            keys_before, values_before, words = carry
            query, key, value = model.parts(words, place, colour)
            cache = keys_before.at[:, place].set(key), values_before.at[:, place].set(value)
            logits = model.logits(query, *cache, jnp.arange(LENGTH) <= place)
            words = jax.vmap(jax.random.categorical)(keys[:, place], logits)
            return (*cache, words), words

        empty = jnp.zeros((count, LENGTH, WIDTH))
        begin = (empty, empty, jnp.zeros(count, jnp.int32))
        return {"text": jax.lax.scan(step, begin, jnp.arange(LENGTH))[1].T}


def without_cache(model, colour, key):
    """The words of one example, each from all before it."""

    @jax.jit
    def next_word(words, place, key):
        queries, keys, values = model.parts(words, jnp.arange(LENGTH), colour)
        return jax.random.categorical(key, model.logits(queries, keys, values, jnp.tri(LENGTH, dtype=bool))[place])

    words = np.zeros(LENGTH + 1, np.int32)
    for place, own in enumerate(jax.random.split(key, LENGTH)):
        words[place + 1] = next_word(words[:-1], place, own)
    return words[1:]


def test_text_is_generated_with_a_cache_inside_the_program(tmp_path):
    found = []
    for size in (8, 5):
        config = tiny.config(**SETTINGS, eval__batch_size=size)
        ready = trained.load(None, config, info=SOURCE.info, task=Captions(config, SOURCE.info))
        found.append(np.load(generate.generate(ready, SOURCE, 14, tmp_path / f"{size}.npz"))["text"])
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (14, LENGTH)
    model = models.merge(ready.evaluator.graph, ready.params, ready.model_state)
    for number in (1, 13):  # two samples of one example
        key = jax.random.fold_in(evaluate._set_key(config.seed, SOURCE), number)
        colour = np.asarray(SOURCE[number % 12]["image"]).mean((0, 1))
        np.testing.assert_array_equal(found[0][number], without_cache(model, colour, key))


class Fitted(Task):
    """The latent of each example by gradient descent, inside `forward`."""

    trains = False

    def build_model(self, rngs):
        return nnx.Linear(2, 3, rngs=rngs)

    def forward(self, model, batch, *, train, key, partners):
        colour = batch["image"].mean((1, 2))

        def error(latent):
            return jnp.square(model(latent) - colour).sum(-1)

        def step(latent, _):
            return latent - 0.2 * jax.grad(lambda z: error(z).sum())(latent), None

        begin = jax.vmap(lambda own: jax.random.normal(own, 2))(key)
        latent = jax.lax.scan(step, begin, None, length=300)[0]
        return {"before": error(begin), "after": error(latent)}

    def metrics(self):
        return {name: metrics.mean(lambda outputs, _, name=name: outputs[name]) for name in ("before", "after")}


def test_an_evaluation_may_descend_a_gradient():
    config = tiny.config(**SETTINGS, eval__batch_size=5)
    ready = trained.load(None, config, info=SOURCE.info, task=Fitted(config, SOURCE.info))
    found = ready.evaluate(SOURCE)
    colours = np.stack([np.asarray(SOURCE[i]["image"]).mean((0, 1)) for i in range(12)])
    target = (colours - np.asarray(ready.params["bias"])).T
    residuals = np.linalg.lstsq(np.asarray(ready.params["kernel"]).T, target, rcond=None)[1]
    assert found["after"] == pytest.approx(residuals.mean(), rel=1e-3)
    assert found["before"] > 2 * found["after"]
