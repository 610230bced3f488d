"""Three small tasks that show what a task can be; nothing in `training/` knows of them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from tasks import metrics
from tasks.base import Task
from tasks.losses import Loss


class Restoration(Task):
    """Image to image: a noisy image and the clean one, measured by PSNR; two optimizers."""

    best_metric = ("psnr", "max")

    class Model(nnx.Module):
        """A 3 x 3 convolution and a gain."""

        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.gain = nnx.Param(jnp.ones(3))

        def __call__(self, images):
            return self.gain * self.conv(images)

    def build_model(self, rngs):
        return self.Model(rngs)

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "clean": spec["image"]}

    def forward(self, model, batch, *, train, key, partners):
        return {"restored": model(batch["image"])}

    def loss(self, outputs, batch):
        squared = jnp.mean((outputs["restored"] - batch["clean"]) ** 2, axis=(1, 2, 3))
        return metrics.weighted_mean(squared, batch), {}

    def metrics(self):
        return {**super().metrics(), "psnr": metrics.psnr(1.0, prediction="restored", target="clean")}

    def predictions(self, outputs, batch):
        return {"restored": outputs["restored"]}

    def optimizers(self):
        return {"gain": ("gain", {"learning_rate": 0.0})}


class ImageText(Task):
    """Image and text tokens: which of two questions does the image answer with yes?"""

    best_metric = ("accuracy", "max")
    inputs = ("image", "text")
    words, length = 5, 4

    class Model(nnx.Module):
        """Mean colour and mean word, multiplied."""

        def __init__(self, words, rngs):
            self.word = nnx.Embed(words, 8, rngs=rngs)
            self.colour = nnx.Linear(3, 8, rngs=rngs)

        def __call__(self, images, tokens):
            return jnp.sum(self.colour(images.mean((1, 2))) * self.word(tokens).mean(1), axis=1)

    def build_model(self, rngs):
        return self.Model(self.words, rngs)

    def batch_spec(self, batch_size, *, train, info=None):
        text = jax.ShapeDtypeStruct((batch_size, self.length), jnp.int32)
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "text": text, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def forward(self, model, batch, *, train, key, partners):
        return {"yes": model(batch["image"], batch["text"])}

    def loss(self, outputs, batch):
        sign = 2.0 * batch["label"] - 1
        return metrics.weighted_mean(jax.nn.softplus(-sign * outputs["yes"]), batch), {}

    def metrics(self):
        def correct(outputs, batch):
            return ((outputs["yes"] > 0) == (batch["label"] == 1)).astype(jnp.float32)

        return {**super().metrics(), "accuracy": metrics.mean(correct)}


class MeanBrightness(Task):
    """A measurement: nothing to learn, no parameters, and a partner that does the work."""

    trains = False

    class Model(nnx.Module):
        """Brightness of each image."""

        def __call__(self, images):
            return images.mean((1, 2, 3))

    def build_model(self, rngs):
        return nnx.Module()

    def partners(self, load, *, train=True):
        return {"meter": self.Model()}

    def forward(self, model, batch, *, train, key, partners):
        return {"brightness": partners["meter"](batch["image"])}

    def metrics(self):
        return {"brightness": metrics.mean(lambda outputs, batch: outputs["brightness"])}


def restoration_source(count=40, size=8, seed=0):
    """Clean images of one colour and the same with noise, float32 from 0 to 1."""
    random = np.random.default_rng(seed)
    clean = np.broadcast_to(random.uniform(0.2, 0.8, (count, 1, 1, 3)), (count, size, size, 3)).astype(np.float32)
    noisy = np.clip(clean + random.normal(size=clean.shape) * 0.1, 0, 1).astype(np.float32)
    return data.ArraySource({"image": noisy, "clean": clean}, fields={"image": "image", "clean": "image"})


def image_text_source(count=40, size=8, seed=0):
    """The question is word 1 ("is it red?") or word 2 ("is it blue?"); other words are noise."""
    random = np.random.default_rng(seed)
    red, asks_red = random.integers(0, 2, count), random.integers(0, 2, count)
    image = np.zeros((count, size, size, 3), np.float32)
    image[np.arange(count), ..., 0], image[np.arange(count), ..., 2] = red[:, None, None], 1 - red[:, None, None]
    text = random.integers(3, 5, (count, ImageText.length)).astype(np.int32)
    text[:, 0] = np.where(asks_red, 1, 2)
    columns = {"image": image, "text": text, "label": (red == asks_red).astype(np.int64)}
    return data.ArraySource(columns, fields={"image": "image", "text": "text", "label": "label"}, num_classes=2)


class MeanGame(Task):
    """Two players in one dimension: a generator of numbers and who tells them from the brightness of images.

    The discriminator is linear, so that its gradient penalty (arXiv:1801.04406) is the square of its slope.
    """

    every = 2

    class Model(nnx.Module):
        """The generator shifts noise."""

        def __init__(self, rngs):
            self.generator, self.discriminator = nnx.Module(), nnx.Linear(1, 1, rngs=rngs)
            self.generator.shift = nnx.Param(jnp.zeros(1))

    def build_model(self, rngs):
        return self.Model(rngs)

    def forward(self, model, batch, *, train, key, partners):
        real = batch["image"].mean((1, 2))[:, :1]
        noise = jax.random.normal(key, real.shape) if train else jax.vmap(lambda own: jax.random.normal(own, (1,)))(key)
        fake = model.generator.shift + 0.05 * noise
        slope = jnp.broadcast_to(model.discriminator.kernel, (len(real), 1))
        logits = {"real": model.discriminator(real), "fake": model.discriminator(fake)}
        return {**logits, "sample": fake, "slope": slope, "place": jnp.arange(len(real))}

    def losses(self):
        def generator(outputs, batch):
            return jax.nn.softplus(-outputs["fake"]).mean(), {}

        def discriminator(outputs, batch):
            real, fake = jax.nn.softplus(-outputs["real"]).mean(), jax.nn.softplus(outputs["fake"]).mean()
            return real + fake + jnp.square(outputs["slope"]).mean(), {"real": real, "fake": fake}

        return {
            "discriminator": Loss(discriminator, "discriminator", every=self.every),
            "generator": Loss(generator, "generator", every=self.every, offset=self.every - 1),
        }

    def optimizers(self):
        return {"fast": ("generator", {"learning_rate": 0.05})}

    def metrics(self):
        return {"mean": metrics.mean(lambda outputs, batch: outputs["sample"][:, 0])}
