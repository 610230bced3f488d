"""What others do to images before their models see them: read from what they say, and done to the bit."""

import functools
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from configs import base, from_dict, replace, transforms
from data.source import EncodedImage
from models.weights import preprocessing
from models.weights.preprocessor_config import from_transformers

FILES = Path(__file__).resolve().parents[1] / "files"
sys.path.insert(0, str(FILES))
from make_preprocessing import picture  # noqa: E402

pytestmark = pytest.mark.smoke

STORED = np.load(FILES / "preprocessing.npz")
CASES = json.loads(str(STORED["cases"]))
READERS = {
    "timm": preprocessing.from_timm,
    "transformers": from_transformers,
    "torchvision": preprocessing.from_torchvision,
}


def filled(found, size=None):
    """The text of the transforms at a size, as an evaluation reads it."""
    size = size or found.image_size
    config = from_dict(base.get_config().to_dict())
    config = replace(config, data__image_size=size, data__eval_transforms=found.transforms)
    return transforms(config, "eval_transforms")


@functools.cache
def original(shape):
    return picture(*shape)


def seen(found, image, normalized=True):
    """What the transforms of `data` make of an image: what a model gets, or the pixels before they are normalized."""
    text = filled(found) if normalized else filled(found).removesuffix("|normalize")
    pipeline = data.parse_transforms(text, found.mean, found.std)
    return pipeline({"index": 0, "image": image}, {"image": "image"}, np.random.default_rng(0))["image"]


@pytest.mark.parametrize("name", sorted({f"{case['library']} {case['name']}" for case in CASES}))
def test_pixels_are_those_of_the_library(name):
    cases = [case for case in CASES if f"{case['library']} {case['name']}" == name]
    for case in cases:
        found = READERS[case["library"]](case["settings"])
        pixels = seen(found, original(tuple(case["shape"])), normalized=False)
        key = f"{name} {case['shape'][0]}x{case['shape'][1]}"
        assert list(pixels.shape) == case["made"], key
        if key in STORED:
            np.testing.assert_array_equal(pixels, STORED[key], err_msg=key)
        assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == case["sha256"], key
        if "normalized" in case:
            middle = seen(found, original(tuple(case["shape"])))[pixels.shape[0] // 2, :16].T
            np.testing.assert_allclose(middle, np.array(case["normalized"], np.float32), rtol=1e-6, atol=1e-6)


def test_a_large_jpeg_is_decoded_whole():
    """As the libraries do; without `like` a quarter of its sides is decoded, which is faster and gives other pixels."""
    buffer = io.BytesIO()
    Image.fromarray(original((225, 1000))).save(buffer, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    found = preprocessing.cropped(32)

    def pixels(image, text):
        return data.parse_transforms(text)({"index": 0, "image": image}, {"image": "image"}, np.random.default_rng(0))

    encoded = EncodedImage(buffer.getvalue(), "a.jpg")
    np.testing.assert_array_equal(seen(found, encoded), seen(found, whole))
    quick = pixels(encoded, "resize(36)|center_crop(32)")["image"]
    assert (quick != pixels(whole, "resize(36)|center_crop(32)")["image"]).mean() > 0.1
