"""scikit-learn's digits (1,797 real 8x8 grey images) as a TensorFlow Datasets builder, prepared without TensorFlow.

Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; scikit-learn ships its test part.
"""

import io
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

HOLD_OUT_EVERY = 5


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits `train` (1,442 images) and `test` (355), fixed for ever: every fifth image of each class is held out."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset",
            description="8x8 grey images of handwritten digits.",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # the images come with scikit-learn
        return {"train": self._generate_examples(held_out=False), "test": self._generate_examples(held_out=True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict]]:
        digits = load_digits()
        seen: Counter = Counter()
        for key, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            seen[label] += 1
            if (seen[label] % HOLD_OUT_EVERY == 0) == held_out:
                yield key, {"image": _png(image), "label": label}


def _png(image: np.ndarray) -> io.BytesIO:
    """PNG bytes of an 8x8 image of levels 0 to 16; TFDS would need TensorFlow to encode an array itself."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
    buffer.seek(0)
    return buffer
