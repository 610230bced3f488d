"""Causal text: the next token, in training from all before it, in generation with a cache of keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from tasks import Task, metrics

LENGTH, PROMPT, WORDS = 12, 4, 10


def open_rows(argument, split, directory=None):
    """Rows such as 3 5 7 9 1 3 ...: a start and a stride, modulo the number of words."""
    random = np.random.default_rng(len(split))
    count = 256 if split == "train" else 20
    start, stride = random.integers(0, WORDS, (count, 1)), random.choice([1, 3], (count, 1))
    rows = (start + stride * np.arange(LENGTH)) % WORDS
    return data.ArraySource({"text": rows.astype(np.int32)}, fields={"text": "tokens"}, name="rows", split=split)


class Causal(nnx.Module):
    """One layer of causal attention over the last two tokens' embeddings."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 32

    def __init__(self, options, *, rngs):
        width = self.width = options.width
        self.word, self.place = nnx.Embed(WORDS, width, rngs=rngs), nnx.Embed(LENGTH, width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.first, self.last = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, WORDS, rngs=rngs)

    def __call__(self, tokens):
        """Logits `[B, L, W]` of the token after each."""
        length = tokens.shape[1]
        x = self.word(tokens) + self.place(jnp.arange(length))
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        mask = jnp.tril(jnp.ones((length, length), bool))
        return self._answer(x, q, k, v, mask)

    def _answer(self, x, q, k, v, mask):
        weights = jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(-1, -2) / self.width**0.5, -1e9))
        x = x + self.out(weights @ v)
        return self.last(nnx.gelu(self.first(x)))

    def step(self, token, place, cache):
        """Logits `[B, W]` after one more token `[B]` at a place, and the cache with it."""
        x = (self.word(token) + self.place(place))[:, None]
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=1) for old, new in zip(cache, (k, v), strict=True)
        )
        return self._answer(x, q, *cache, jnp.arange(LENGTH) <= place)[:, 0], cache


class ExactRows:
    """Share of the rows that were continued as they should."""

    def __init__(self):
        self.right = []

    def update(self, predictions, source):
        for index, row in zip(predictions["index"], predictions["row"], strict=True):
            self.right.append(np.array_equal(row, source[int(index)]["text"]))

    def finish(self):
        return float(np.mean(self.right))


class NextToken(Task):
    """Cross-entropy of every next token; rows are continued from their beginning."""

    inputs = ("text",)
    unit = "tokens"
    samples = 8
    best_metric = ("exact", "max")

    def units_per_example(self):
        return LENGTH

    def batch_spec(self, batch_size, *, train, info=None):
        return {
            "text": jax.ShapeDtypeStruct((batch_size, LENGTH), jnp.int32),
            "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def forward(self, model, batch, *, train, key, partners):
        return {"logits": model(batch["text"])}

    def loss(self, outputs, batch):
        scores = jax.nn.log_softmax(outputs["logits"][:, 1:-1])  # the stride is known from the second token on
        picked = jnp.take_along_axis(scores, batch["text"][:, 2:, None], axis=2)[..., 0]
        return metrics.weighted_mean(-picked.mean(1), batch), {}

    def predictions(self, outputs, batch):
        return {"next": jnp.argmax(outputs["logits"][:, -1], axis=-1)}

    def generate(self, model, batch, key, partners):
        prompt = batch["text"]
        empty = jnp.zeros((len(prompt), LENGTH, model.width))

        def step(carry, place):
            token, cache = carry
            logits, cache = model.step(token, place, cache)
            known = jnp.take(prompt, place + 1, axis=1)
            token = jnp.where(place + 1 < PROMPT, known, jnp.argmax(logits, axis=-1))
            return (token, cache), token

        _, made = jax.lax.scan(step, (prompt[:, 0], (empty, empty)), jnp.arange(LENGTH - 1))
        return {"row": jnp.concatenate([prompt[:, :1], made.T], axis=1)}

    def sample_metrics(self):
        return {"exact": ExactRows()}
