"""Transform strings, and what each transform does to pixels."""

import numpy as np
import pytest

from data.randaugment import Strength
from data.transforms import TRANSFORMS, parse_transforms

pytestmark = pytest.mark.smoke

IMAGE = {"image": "image"}


def picture(height=40, width=60, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def run(text, image=None, fields=None, seed=0, mean=0.5, std=0.5, **more):
    values = {"index": 7, "image": picture() if image is None else image, **more}
    return parse_transforms(text, mean, std)(values, fields or IMAGE, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", "unknown transform 'flop'; nearest: 'flip'"),
        ("resize(32)|normalise", "nearest: 'normalize'"),
        ("resize(32, interpolatoin='bilinear')", "nearest: 'interpolation'"),
        ("resize(32, interpolation='bicubik')", "nearest: 'bicubic'"),
        ("resize", "transform 'resize': missing a required argument: 'size'"),
        ("resize(1, 'bicubic', 3)", "too many positional arguments"),
        ("resize('big')", "argument 'size' of transform 'resize' must be"),
        ("resize(32.5)", "argument 'size' of transform 'resize' must be"),
        ("flip(True)", "argument 'probability' of transform 'flip' must be"),
        ("random_resized_crop(8, scale=(0.1, 0.2, 0.3))", "argument 'scale'"),
        ("resize(0)", "at least 1 pixel"),
        ("resize(8, like='tim')", "unknown like of 'resize': 'tim'; nearest: 'timm'"),
        ("resize(8, fit='strech')", "nearest: 'stretch'"),
        ("center_crop(8, like='torch')", "nearest: 'torchvision'"),
        ("resize(open('x'))", "must be numbers, strings or tuples"),
        ("resize(32)||flip", "cannot read transforms"),
        ("__import__('os').system('x')", "cannot read transforms"),
        ("resize(32) + flip", "cannot read transforms"),
        ("erase(mode='rainbow')", "'noise' or 'zero'"),
    ],
)
def test_a_wrong_string_ends_in_one_line(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_transforms(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_on_must_name_a_field():
    with pytest.raises(ValueError, match="nearest: 'image'"):
        parse_transforms("flip(on='imag')").kinds(IMAGE)
    assert parse_transforms("view('second')|flip(on='second')").kinds(IMAGE) == {"image": "image", "second": "image"}


def test_an_empty_string_changes_nothing():
    image = picture()
    np.testing.assert_array_equal(run("", image)["image"], image)


def test_normalize_is_mean_and_deviation_of_the_unit_range():
    image = picture()
    got = run("normalize", image, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))["image"]
    np.testing.assert_allclose(got, (image / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7], atol=1e-6)
    assert got.dtype == np.float32
    unit = run("normalize", image.astype(np.float32) / 255, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))["image"]
    np.testing.assert_allclose(unit, got, atol=1e-6)
    np.testing.assert_allclose(run("normalize((0.5,), 0.25)", image)["image"], (image / 255.0 - 0.5) / 0.25, atol=1e-6)


def test_normalize_refuses_the_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"1 channels, but data\.mean has 3"):
        run("normalize", picture(channels=1), mean=(0.1, 0.2, 0.3))
    assert run("to_rgb|normalize", picture(channels=1), mean=(0.1, 0.2, 0.3))["image"].shape == (40, 60, 3)


def test_value_range_covers_its_ends():
    got = run("value_range(-1, 1)", np.array([[[0], [255]]], np.uint8))["image"]
    np.testing.assert_allclose(got.ravel(), [-1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("resize(20)", (20, 30, 3)),
        ("resize((16, 24))", (16, 24, 3)),
        ("resize(20, fit='stretch')", (20, 20, 3)),
        ("resize((30, 30), fit='contain')", (20, 30, 3)),
        ("resize((30, 15), fit='cover')", (30, 45, 3)),
        ("center_crop(32)", (32, 32, 3)),
        ("random_crop(32, padding=4)", (32, 32, 3)),
        ("random_crop(48, padding=4, mirror=True)", (48, 48, 3)),
        ("random_resized_crop(24)", (24, 24, 3)),
        ("inception_crop((24, 16))", (24, 16, 3)),
        ("pad(4)", (48, 68, 3)),
        ("to_gray", (40, 60, 3)),
        ("to_gray(1)", (40, 60, 1)),
    ],
)
def test_shapes(text, shape):
    assert run(text)["image"].shape == shape


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "text",
    [
        "randaugment(4, 10, probability=1)",
        "three_augment",
        "color_jitter(0.4, hue=0.1)",
        "random_resized_crop(16)|flip",
    ],
)
def test_random_transforms_depend_on_the_generator_alone(text, channels):
    image = picture(channels=channels)
    different = set()
    for seed in range(12):
        first, second = run(text, image, seed=seed)["image"], run(text, image, seed=seed)["image"]
        np.testing.assert_array_equal(first, second)
        assert first.shape[-1] == channels
        different.add(first.tobytes())
    assert len(different) > 3


def test_random_resized_crop_covers_the_areas_it_promises():
    """On an image of x coordinates, the width of a crop can be read off; its area must stay within `scale`."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.float32)[None, :, None], (200, 200, 1))
    rise = ramp.transpose(1, 0, 2)
    transform = parse_transforms("random_resized_crop(50, scale=(0.25, 0.5), ratio=(0.5, 2.0), interpolation='box')")
    areas, ratios = [], []
    for seed in range(300):
        crop = transform({"index": 0, "image": np.concatenate([ramp, rise], -1)}, IMAGE, np.random.default_rng(seed))
        width = (crop["image"][0, -1, 0] - crop["image"][0, 0, 0]) * 50 / 49
        height = (crop["image"][-1, 0, 1] - crop["image"][0, 0, 1]) * 50 / 49
        areas.append(width * height / 200**2)
        ratios.append(width / height)
    assert 0.235 < min(areas) < 0.28
    assert 0.47 < max(areas) < 0.515
    assert abs(np.mean(areas) - 0.375) < 0.02
    assert abs(np.mean(np.log(ratios))) < 0.06


def test_randaugment_draws_every_change(monkeypatch):
    from data import randaugment

    drawn = set()
    for name, change in list(randaugment.COLOUR_CHANGES.items()):

        def recorded(image, strength, name=name, change=change):
            drawn.add(name)
            assert 0 <= strength.level <= 1
            return change(image, strength)

        monkeypatch.setitem(randaugment.COLOUR_CHANGES, name, recorded)
    for seed in range(80):
        run("randaugment(2, 9, std=0.5)", seed=seed)
    assert drawn == set(randaugment.COLOUR_CHANGES)


def test_randaugment_strengths_are_those_of_the_paper_and_of_timm():
    """At magnitudes 0, 5 and 10: the paper's tables (TensorFlow's autoaugment.py) and timm's "increasing" ones."""
    paper = [Strength(level, -1.0, False) for level in (0.0, 0.5, 1.0)]
    assert [strength.factor for strength in paper] == pytest.approx([0.1, 1.0, 1.9])
    assert [strength.threshold for strength in paper] == [0, 128, 256]
    assert [strength.bits for strength in paper] == [1, 2, 4]
    timm = [Strength(level, -1.0, True) for level in (0.0, 0.5, 1.0)]
    assert [strength.factor for strength in timm] == pytest.approx([1.0, 0.55, 0.1])
    assert [strength.threshold for strength in timm] == [256, 128, 0]
    assert [strength.bits for strength in timm] == [4, 2, 1]


def test_randaugment_with_probability_zero_changes_nothing():
    image = picture()
    np.testing.assert_array_equal(run("randaugment(2, 9, probability=0.0)", image)["image"], image)


def test_erase_covers_the_stated_share_with_unit_noise():
    shares, noise = [], []
    for seed in range(200):
        got = run("normalize|erase(1.0)", np.full((64, 64, 3), 128, np.uint8), seed=seed)["image"]
        erased = np.abs(got - np.float32(128 / 127.5 - 1)).max(-1) > 1e-5
        shares.append(erased.mean())
        noise.append(got[erased])
    assert min(shares) > 0.01
    assert 0.25 < max(shares) < 0.36
    values = np.concatenate([part.ravel() for part in noise])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    rate = np.mean(
        [
            np.ptp(run("normalize|erase(0.25)", np.full((64, 64, 3), 128, np.uint8), seed=s)["image"]) > 0
            for s in range(400)
        ]
    )
    assert 0.18 < rate < 0.32


def test_erase_needs_a_normalized_image():
    with pytest.raises(ValueError, match="'erase' comes after 'normalize'"):
        run("erase(1.0)")
    with pytest.raises(ValueError, match="put it before 'normalize'"):
        run("normalize|color_jitter(0.3)")


def test_color_jitter_scales_brightness_within_its_range():
    image = np.full((8, 8, 3), 100, np.uint8)
    values = [int(run("color_jitter(0.3, 0.0, 0.0)", image, seed=seed)["image"][0, 0, 0]) for seed in range(200)]
    assert 70 <= min(values) < 75
    assert 125 < max(values) <= 130


def test_hue_jitter_turns_colours_and_spares_grey():
    red, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 90, np.uint8)
    red[..., 0] = 200
    turned = [tuple(run("color_jitter(0.0, hue=0.5)", red, seed=seed)["image"][0, 0].tolist()) for seed in range(10)]
    assert len(set(turned)) > 5
    np.testing.assert_array_equal(run("color_jitter(0.0, hue=0.5)", grey)["image"], grey)


def test_three_augment_uses_its_three_changes():
    kinds = set()
    image = picture()
    for seed in range(40):
        got = run("three_augment", image, seed=seed)["image"]
        if (got[..., 0] == got[..., 1]).all():
            kinds.add("grey")
        elif np.array_equal(got[image < 128], image[image < 128]):
            kinds.add("solarized")
        else:
            kinds.add("blurred")
    assert kinds == {"grey", "solarized", "blurred"}


def test_a_second_view_has_a_shared_and_its_own_geometry():
    shared = run("view('second')|random_resized_crop(16)|flip")
    np.testing.assert_array_equal(shared["image"], shared["second"])
    own = run("view('second')|random_resized_crop(16, on='image')|random_resized_crop(12, on=('second',))|flip")
    assert own["image"].shape == (16, 16, 3)
    assert own["second"].shape == (12, 12, 3)


def test_pad_rows_gives_boxes_one_shape():
    fields = {"image": "image", "boxes": "boxes"}
    pipeline = parse_transforms("pad_rows(3)")
    for count in (0, 2, 5):
        values = {"index": 0, "image": picture(), "boxes": np.ones((count, 4), np.float32)}
        record = pipeline(values, fields, np.random.default_rng(0))
        assert record["boxes"].shape == (3, 4)
        assert record["boxes_valid"].sum() == min(count, 3)
    assert pipeline.kinds(fields)["boxes_valid"] == "label"


def test_text_becomes_bytes_or_is_left_out():
    fields = {"image": "image", "caption": "text"}
    record = run("tokenize(5)", fields=fields, caption="añ")
    assert record["caption"].tolist() == [98, 196, 178, 0, 0]
    assert record["caption"].dtype == np.int32
    assert "caption" not in run("", fields=fields, caption="a dog")


def test_every_transform_is_documented():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, transform in TRANSFORMS.items():
        assert f"`{name}" in text
        assert transform.__doc__
