"""Image pairs: a noisy image and the clean one, trained on crops, evaluated on whole images in tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data
from configs import Field
from tasks import Chart, Task, metrics
from tasks.base import Picture

HEIGHT, WIDTH = 20, 28  # of the whole images


def open_pairs(argument, split, directory=None):
    """Stripes of one colour, and the same with noise."""
    random = np.random.default_rng(len(split))
    count = 48 if split == "train" else 10
    colour = random.integers(40, 200, (count, 1, 1, 3))
    stripes = 40 * (np.arange(WIDTH)[None, None, :, None] // 4 % 2)
    clean = np.broadcast_to(colour + stripes, (count, HEIGHT, WIDTH, 3))
    noisy = np.clip(clean + random.normal(size=clean.shape) * 25, 0, 255)
    return data.ArraySource(
        {"image": noisy.astype(np.uint8), "clean": clean.astype(np.uint8)},
        fields={"image": "image", "clean": "image"},
        name="pairs",
        split=split,
    )


class Smooth(nnx.Module):
    """An image and a convolution of it."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 5

    def __init__(self, options, *, rngs):
        zeros = nnx.initializers.zeros_init()
        self.conv = nnx.Conv(3, 3, (options.size, options.size), kernel_init=zeros, rngs=rngs)

    def __call__(self, images):
        return images + self.conv(images)


class Denoising(Task):
    """PSNR of what the model makes of noisy images."""

    best_metric = ("psnr", "max")
    samples = 2
    known_options = {"tile": Field(0, "Side of the tiles of an evaluation; 0 takes whole images.", low=0)}  # noqa: RUF012

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        if not train:  # whole images of that set, as far as their sizes are known
            known = (info or self.info).fields["image"].shape
            shape = [there or own for there, own in zip(known, spec["image"].shape[1:], strict=True)]
            spec["image"] = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
        return {**spec, "clean": spec["image"]}

    def forward(self, model, batch, *, train, key, partners):
        side = self.options.tile
        if train or not side:
            return {"restored": model(batch["image"])}
        images = batch["image"]
        count, height, width, channels = images.shape
        rows, columns = -(-height // side), -(-width // side)
        padded = jnp.pad(images, ((0, 0), (0, rows * side - height), (0, columns * side - width), (0, 0)), "edge")
        tiles = padded.reshape(count, rows, side, columns, side, channels).swapaxes(2, 3)
        made = model(tiles.reshape(-1, side, side, channels)).reshape(tiles.shape)
        whole = made.swapaxes(2, 3).reshape(padded.shape)
        return {"restored": whole[:, :height, :width]}

    def loss(self, outputs, batch):
        squared = jnp.mean((outputs["restored"] - batch["clean"]) ** 2, axis=(1, 2, 3))
        return metrics.weighted_mean(squared, batch), {}

    def metrics(self):
        return {**super().metrics(), "psnr": metrics.psnr(1.0, prediction="restored", target="clean")}

    def predictions(self, outputs, batch):
        return {"restored": outputs["restored"]}

    def written(self, prediction):
        return {"brightness": float(prediction["restored"].mean()), "restored": Picture(prediction["restored"])}

    def report(self, results, source, samples):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 2 * len(samples["index"])))
        axes = figure.subplots(len(samples["index"]), 3)
        for row, index, restored in zip(axes, samples["index"], samples["restored"], strict=True):
            record = source[int(index)]
            for place, (name, pixels) in zip(
                row,
                {"noisy": record["image"], "restored": restored.clip(0, 1), "clean": record["clean"]}.items(),
                strict=True,
            ):
                place.imshow(pixels)
                place.set_title(name)
                place.axis("off")
        return [Chart("Restored images", "Noisy, restored and clean, of the first examples.", figure)]
