"""Geometry: what is drawn on an image stays on it, whatever moves the image."""

import io

import numpy as np
import pytest
from PIL import Image

from data.randaugment import inverse_map
from data.source import EncodedImage, ExampleError
from data.transforms import parse_transforms
from data.warp import NO_TRUTH, Affine, Flip, Resample, Window, warp_field

WIDTH, HEIGHT = 60, 40
BOX = (20.0, 10.0, 32.0, 26.0)
FIELDS = {
    "image": "image",
    "float_image": "image",
    "mask": "mask",
    "boxes": "boxes",
    "points": "points",
    "flow": "flow",
    "label": "label",
}
GEOMETRIC = [
    "resize(80)",
    "resize((30, 90))",
    "center_crop(36)",
    "center_crop((30, 70))",
    "random_crop(40, padding=6)",
    "pad(5)",
    "flip(1.0)",
    "random_resized_crop(48, scale=(0.6, 1.0))",
    "flip|random_resized_crop((64, 48), scale=(0.7, 1.0))|flip|pad(3)",
]


def bright_square():
    """A record whose mask, box, corner points and flow all follow one bright rectangle."""
    x_min, y_min, x_max, y_max = (int(value) for value in BOX)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[y_min:y_max, x_min:x_max] = 255
    flow = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    flow[..., 0], flow[..., 1] = 3.0, -2.0
    return {
        "index": 0,
        "image": image,
        "float_image": image.astype(np.float32) / 255,
        "mask": (image[..., 0] > 0).astype(np.uint8),
        "boxes": np.array([BOX], np.float32),
        "points": np.array([[x_min, y_min, 1], [x_max, y_max, 1]], np.float32),
        "flow": flow,
        "label": 4,
    }


def bounds(plane):
    rows, columns = np.nonzero(plane > 0.5)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", GEOMETRIC)
def test_everything_follows_the_bright_square(text, seed):
    record = parse_transforms(text, mean=0.0)(bright_square(), FIELDS, np.random.default_rng(seed))
    height, width = record["image"].shape[:2]
    for name in ("float_image", "mask", "flow"):
        assert record[name].shape[:2] == (height, width)
    seen = bounds(record["image"][..., 0] / 255)
    np.testing.assert_array_equal(seen, bounds(record["float_image"][..., 1]))
    np.testing.assert_allclose(record["boxes"][0], seen, atol=1.0)
    np.testing.assert_allclose(bounds(record["mask"] == 1), seen, atol=1.0)
    corners = record["points"][:, :2]
    clipped = np.clip([*corners.min(0), *corners.max(0)], 0, [width, height, width, height])
    np.testing.assert_allclose(clipped, record["boxes"][0], atol=1e-4)
    assert record["points"][:, 2].tolist() == [1, 1]
    assert record["label"] == 4


def test_flow_turns_and_stretches_with_the_image():
    record = parse_transforms("resize((80, 180))|flip(1.0)")(bright_square(), FIELDS, np.random.default_rng(0))
    np.testing.assert_allclose(record["flow"][40, 90], [-3.0 * 180 / WIDTH, -2.0 * 80 / HEIGHT], rtol=1e-6)


def test_resized_coordinates_are_exact():
    record = parse_transforms("resize((80, 120))")(bright_square(), FIELDS, np.random.default_rng(0))
    np.testing.assert_allclose(record["boxes"][0], 2 * np.array(BOX), rtol=1e-6)
    np.testing.assert_array_equal(bounds(record["mask"]), 2 * np.array(BOX))


def test_padding_is_marked_as_no_truth_in_masks_and_mean_in_images():
    fields = {"image": "image", "mask": "mask"}
    values = {"index": 0, "image": np.zeros((4, 4, 3), np.uint8), "mask": np.zeros((4, 4), np.int32)}
    record = parse_transforms("pad(2)", mean=(0.2, 0.4, 0.6))(values, fields, np.random.default_rng(0))
    assert record["image"][0, 0].tolist() == [51, 102, 153]
    assert record["mask"][0, 0] == NO_TRUTH
    assert record["mask"][3, 3] == 0
    assert record["mask"].dtype == np.int32


def test_a_box_that_leaves_the_image_has_no_area():
    boxes = np.array([[0, 0, 5, 5], [50, 30, 60, 40]], np.float32)
    moved = warp_field(Window((20, 20), (0, 0)), "boxes", boxes, 0)
    assert moved.tolist() == [[0, 0, 5, 5], [20, 20, 20, 20]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("move", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_randaugment_moves_all_fields(monkeypatch, move, seed):
    monkeypatch.setattr("data.randaugment.CHANGES", (move,))
    augment = parse_transforms("randaugment(1, 4, std=0, probability=1)", mean=0.0)
    fields = {name: kind for name, kind in FIELDS.items() if name != "float_image"}
    values = {name: value for name, value in bright_square().items() if name != "float_image"}
    record = augment(values, fields, np.random.default_rng(seed))
    seen = bounds(record["mask"] == 1)
    assert np.abs(bounds(record["image"][..., 0] / 255) - seen).max() <= 1
    centre = record["points"][:, :2].mean(0)
    np.testing.assert_allclose(centre, [(seen[0] + seen[2]) / 2, (seen[1] + seen[3]) / 2], atol=1.0)
    assert not np.array_equal(record["image"], values["image"])


def test_rotation_is_about_the_centre_and_by_thirty_degrees():
    a, b, c, d, e, f = inverse_map("rotate", 1.0, 60, 40)
    np.testing.assert_allclose([a * 30 + b * 20 + c, d * 30 + e * 20 + f], [30, 20])
    np.testing.assert_allclose([a, e, d], [np.cos(np.pi / 6), np.cos(np.pi / 6), 0.5])


def test_affine_matrix_and_inverse_agree():
    warp = Affine((50, 50), (0.9, 0.2, 3.0, -0.1, 1.1, -2.0), "bilinear")
    back = np.array(warp.inverse).reshape(2, 3)
    point = np.array([7.0, 11.0])
    there = warp.matrix[:, :2] @ point + warp.matrix[:, 2]
    np.testing.assert_allclose(back[:, :2] @ there + back[:, 2], point, rtol=1e-12)


@pytest.mark.parametrize("start", [-3, 0, 2])
def test_mirrored_window_is_numpy_reflection(start):
    image = np.arange(36, dtype=np.uint8).reshape(6, 6)
    cut = Window((8, 8), (start, start), mirror=True).pixels(Image.fromarray(image), nearest=True, fill=0)
    padded = np.pad(image, 8, mode="reflect") if start else np.pad(image, 4, mode="reflect")
    margin = 8 if start else 4
    first = margin + start
    np.testing.assert_array_equal(np.asarray(cut), padded[first : first + 8, first : first + 8])


def test_flip_twice_is_nothing():
    image = Image.fromarray(bright_square()["image"])
    warp = Flip(image.size)
    once = warp.pixels(image, nearest=False, fill=0)
    assert warp.pixels(once, nearest=False, fill=0).tobytes() == image.tobytes()
    assert once.tobytes() != image.tobytes()


def test_reduced_jpeg_decoding_shows_the_same_picture():
    """A crop resized from a JPEG decoded at half size looks like the one from the full size, at the same place."""
    y, x = np.mgrid[:480, :640]
    picture = np.stack([x * 255 / 639, y * 255 / 479, 128 + 100 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    warp = Resample((64, 64), (101, 53, 597, 431), "bicubic")
    reduced = warp_field(warp, "image", EncodedImage(buffer.getvalue(), "picture"), 0)
    full = warp_field(warp, "image", EncodedImage(buffer.getvalue(), "picture").decode(), 0)
    opened, _ = warp.open(EncodedImage(buffer.getvalue(), "picture"))
    assert opened.width < 640
    difference = np.abs(np.asarray(reduced, np.float32) - np.asarray(full, np.float32))
    assert difference.mean() < 1.5


def test_images_of_two_sizes_share_their_draws():
    fields = {"image": "image", "small": "image"}
    values = {"index": 0, "image": np.zeros((40, 60, 3), np.uint8), "small": np.zeros((20, 30, 3), np.uint8)}
    values["image"][:, :30] = 255
    values["small"][:, :15] = 255
    flips = set()
    for seed in range(8):
        record = parse_transforms("flip")(values, fields, np.random.default_rng(seed))
        assert record["image"][0, 0, 0] == record["small"][0, 0, 0]
        flips.add(int(record["image"][0, 0, 0]))
    assert flips == {0, 255}


PAIR = {"image": "image", "clean": "image", "mask": "mask"}


def pair(scale=3, width=12, height=9):
    """An input, a target `scale` times as large with the same pixels, and a mask as large as the target."""
    small = np.random.default_rng(5).integers(0, 250, (height, width, 3), np.uint8)
    large = small.repeat(scale, 0).repeat(scale, 1)
    return {"index": 0, "image": small, "clean": large, "mask": large[..., 0].copy()}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "random_crop(6)",
        "random_crop((6, 9), padding=3, mirror=True)",
        "random_crop(6, padding=3)",
        "center_crop(6)",
        "center_crop((15, 6))",
        "pad(3)",
        "pad(6, mirror=True)",
        "flip",
        "pad(3)|random_crop(6)|flip",
    ],
)
def test_a_pair_of_two_sizes_is_cut_at_one_place(text, swapped):
    """Exactly, in 200 draws; whichever of the two is called `image`, to whose pixels the numbers belong."""
    record = pair()
    if swapped:
        record |= {"image": record["clean"], "clean": record["image"]}
    pipeline, places = parse_transforms(text, mean=1.0), set()
    for seed in range(200):
        got = pipeline(record, PAIR, np.random.default_rng(seed))
        small, large = (got["clean"], got["image"]) if swapped else (got["image"], got["clean"])
        np.testing.assert_array_equal(small.repeat(3, 0).repeat(3, 1), large)
        np.testing.assert_array_equal(np.where(got["mask"] == NO_TRUTH, 255, large[..., 0]), got["mask"])
        places.add(small.tobytes())
    assert len(places) > 1 or "random" not in text
    if text.startswith("random_crop(6"):
        assert got["image"].shape == (6, 6, 3)


def test_a_resized_crop_of_a_pair_shows_the_same_part():
    """A ramp says which part of the picture each of the two shows, to a sixth of a pixel (0.025)."""
    ramps = {name: np.linspace(0.5 / n, 1 - 0.5 / n, n, dtype=np.float32) for name, n in (("image", 40), ("clean", 80))}
    record = {"index": 0} | {
        name: np.broadcast_to(ramp[None, :, None], (len(ramp), len(ramp), 1)) for name, ramp in ramps.items()
    }
    for seed in range(20):
        pipeline = parse_transforms("random_resized_crop(16, scale=(0.1, 0.6), interpolation='bilinear')")
        got = pipeline(record, {"image": "image", "clean": "image"}, np.random.default_rng(seed))
        assert got["clean"].shape == (32, 32, 1)
        inner = got["clean"].reshape(16, 2, 16, 2).mean((1, 3))
        np.testing.assert_allclose(inner[:, 2:-2], got["image"][:, 2:-2, 0], atol=4e-3)


@pytest.mark.parametrize(
    ("size", "text"),
    [((19, 24), "random_crop(6)"), ((27, 24), "center_crop(6)"), ((18, 30), "pad(2)"), ((13, 24), "inception_crop(6)")],
)
def test_a_pair_whose_ratio_is_not_one_whole_number_is_refused(size, text):
    record = {"index": 4, "image": np.zeros((9, 12, 3), np.uint8), "clean": np.zeros((*size, 3), np.uint8)}
    fields = {"image": "image", "clean": "image"}
    with pytest.raises(
        ExampleError, match=rf"example 4: {text.split('(')[0]} cuts 'image' of 12x9 and 'clean' of {size[1]}x{size[0]}"
    ):
        parse_transforms(text)(record, fields, np.random.default_rng(0))
    alone = parse_transforms(text[:-1] + ", on='clean')")(record, fields, np.random.default_rng(0))
    assert alone["image"].shape == (9, 12, 3)
    whole = parse_transforms("flip|resize((8, 8))")(record, fields, np.random.default_rng(0))
    assert whole["clean"].shape == whole["image"].shape == (8, 8, 3)


def test_a_crop_that_the_smaller_image_has_no_pixels_for_is_refused():
    record = pair(scale=2)
    record |= {"image": record["clean"], "clean": record["image"]}
    with pytest.raises(ValueError, match="size=7 of random_crop: must be a multiple of 2, as 'image' is 2 times"):
        parse_transforms("random_crop(7)")(record, PAIR, np.random.default_rng(0))


@pytest.mark.parametrize("move", ["rotate", "translate_x"])
def test_randaugment_moves_a_pair_alike(monkeypatch, move):
    monkeypatch.setattr("data.randaugment.CHANGES", (move,))
    record = pair(scale=3, width=60, height=40)
    record["image"][:], record["clean"][:], record["mask"][:] = 0, 0, 0
    record["image"][10:26, 20:32], record["clean"][30:78, 60:96], record["mask"][30:78, 60:96] = 255, 255, 1
    got = parse_transforms("randaugment(1, 9)", mean=0.0)(record, PAIR, np.random.default_rng(1))
    large = bounds(got["clean"][..., 0] / 255)
    np.testing.assert_allclose(bounds(got["image"][..., 0] / 255) * 3, large, atol=4)
    np.testing.assert_allclose(bounds(got["mask"] == 1), large, atol=1)
    assert bounds(record["clean"][..., 0]).tolist() != large.tolist()
    odd = {**record, "mask": np.zeros((60, 60), np.uint8)}
    with pytest.raises(ExampleError, match=r"turns images of 60x40 and 'mask' of 60x60 together"):
        parse_transforms("randaugment(1, 9)")(odd, PAIR, np.random.default_rng(1))
