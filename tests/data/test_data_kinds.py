"""What geometry and colours do to each kind of field, by cases that were computed by hand; and what is refused."""

import io
import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import tiny
from PIL import Image

import configs
import data
from data.kinds import KINDS, MOVED, PICTURES, SIZED, without_size
from data.position import check_record
from data.source import EncodedImage, ExampleError
from data.transforms import TRANSFORMS, parse_transforms
from data.warp import Affine, Flip, Resample, Window, warp_field

pytestmark = pytest.mark.smoke

# 2 x 4: nothing was measured at the zero.
DEPTH = np.array([[1, 2, 3, 4], [5, 0, 7, 8]], np.float32)
HALVES = Resample((2, 1), (0, 0, 4, 2), "bicubic")
LEFT_HALF = Resample((4, 2), (0, 0, 2, 2), "bicubic")


def run(text, kinds, seed=0, **values):
    return parse_transforms(text, mean=0.0)({"index": 0, **values}, kinds, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("warp", "depth"),
    [
        (HALVES, [[0, 8]]),  # the pixel at the centre of each block, never a mean of some
        (LEFT_HALF, [[1, 1, 2, 2], [5, 5, 0, 0]]),
        (Flip((4, 2)), [[4, 3, 2, 1], [8, 7, 0, 5]]),
        (Window((2, 2), (3, -1)), [[0, 0], [4, 0]]),
        (Window((4, 1), (0, -1), mirror=True), [[5, 0, 7, 8]]),
        (Affine((4, 2), (1, 0, 1, 0, 1, 0), "bilinear"), [[2, 3, 4, 0], [0, 7, 8, 0]]),
    ],
)
def test_depth_is_moved_and_never_mixed(warp, depth):
    assert warp_field(warp, "depth", DEPTH, 128.0).tolist() == depth


@pytest.mark.parametrize(
    ("warp", "disparity"),
    [
        (HALVES, [[0, 4]]),  # half as wide, half the pixels
        (LEFT_HALF, [[2, 2, 4, 4], [10, 10, 0, 0]]),
        (Window((2, 2), (1, 0)), [[2, 3], [0, 7]]),
        (Window((2, 2), (-1, 0), mirror=True), [[0, 1], [0, 5]]),  # a mirrored border has no disparity of this sign
    ],
)
def test_disparity_is_stretched_with_the_width(warp, disparity):
    assert warp_field(warp, "disparity", DEPTH, 128.0).tolist() == disparity


@pytest.mark.parametrize(
    ("warp", "first"),
    [
        # Weights 3/7, 3/7, 1/7 across, and the mean of both rows.
        (Resample((2, 1), (0, 0, 4, 2), "lanczos"), [[17 / 7, 34 / 7]]),
        (Flip((4, 2)), [[4, 3, 2, 1], [8, 7, 0, 5]]),
        (Window((2, 1), (3, 0)), [[4, 0]]),
        (Affine((4, 2), (1, 0, 0.5, 0, 1, 0), "nearest"), [[1.5, 2.5, 3.5, 0], [2.5, 3.5, 7.5, 0]]),
    ],
)
def test_a_heat_map_is_mixed_bilinearly_and_outside_it_is_zero(warp, first):
    """Whatever the interpolation of images is: a sharper one gives values below zero."""
    found = warp_field(warp, "heatmap", np.stack([DEPTH, 10 * DEPTH], -1), 128.0)
    np.testing.assert_allclose(found[..., 0], first, rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], 10 * found[..., 0], rtol=1e-6)


CAMERA = np.array([[100, 0, 30], [0, 100, 20], [0, 0, 1]], np.float32)


@pytest.mark.parametrize(
    ("text", "camera"),
    [
        ("center_crop((20, 30))", [[100, 0, 15], [0, 100, 10], [0, 0, 1]]),
        ("pad(5)", [[100, 0, 35], [0, 100, 25], [0, 0, 1]]),
        ("resize((80, 30))", [[50, 0, 15], [0, 200, 40], [0, 0, 1]]),
        ("resize(20)", [[50, 0, 15], [0, 50, 10], [0, 0, 1]]),
        ("center_crop((40, 20))|flip(1.0)", [[-100, 0, 10], [0, 100, 20], [0, 0, 1]]),
    ],
)
def test_a_camera_follows_its_pixels(text, camera):
    kinds = {"image": "image", "camera": "camera", "cameras": "camera"}
    image = np.zeros((40, 60, 3), np.uint8)
    found = run(text, kinds, image=image, camera=CAMERA, cameras=np.stack([CAMERA, 2 * CAMERA]))
    np.testing.assert_allclose(found["camera"], camera, atol=1e-5)
    np.testing.assert_allclose(found["cameras"], [found["camera"], 2 * found["camera"]], atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_camera_projects_lies_where_points_are_moved_to(seed):
    """Under every geometric transform, rotations and flips as well: three places in front of the camera."""
    places = np.array([[0.1, -0.05, 2], [-0.3, 0.1, 4], [0, 0, 1]])
    seen = places @ CAMERA.T
    points = (seen[:, :2] / seen[:, 2:]).astype(np.float32)
    kinds = {"image": "image", "camera": "camera", "points": "points"}
    text = "flip|randaugment(3, 9)|random_resized_crop((16, 24))|flip|pad(2)|random_crop(15)"
    found = run(text, kinds, seed, image=np.zeros((40, 60, 3), np.uint8), camera=CAMERA, points=points)
    seen = places @ found["camera"].T
    np.testing.assert_allclose(seen[:, :2] / seen[:, 2:], found["points"], atol=1e-3)


def test_cameras_of_views_count_the_pixels_of_the_views():
    kinds = {"image": "image", "views": "views", "camera": "camera", "cameras": "camera"}
    found = run(
        "resize((20, 20))",
        kinds,
        image=np.zeros((40, 40, 3), np.uint8),
        views=np.zeros((2, 10, 10, 3), np.uint8),
        camera=CAMERA,
        cameras=np.stack([CAMERA, CAMERA]),
    )
    assert found["camera"][:2].tolist() == [[50, 0, 15], [0, 50, 10]]
    assert found["cameras"][1, :2].tolist() == [[200, 0, 60], [0, 200, 40]]


def some_images(count=3, height=12, width=18):
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", ["views", "video"])
@pytest.mark.parametrize(
    "text",
    [
        "random_resized_crop((6, 8))|flip|normalize",
        "random_crop((6, 8), padding=2)|value_range(-1, 1)",
        "pad(2)|three_augment|normalize",
        "color_jitter(0.5, hue=0.2)|resize((6, 8))",
        "randaugment(3, 9)|center_crop((6, 8))|normalize",
        "to_gray(1)|to_rgb|normalize",
        "normalize|erase(1.0)",
        "normalize|resize((6, 8))|flip",
    ],
)
def test_all_images_of_views_and_videos_are_changed_by_the_same_draws(kind, text):
    """Exactly as each would be alone with these draws: three times the same image stays so, and differs by seed."""
    images = some_images()
    for seed in range(3):
        found = run(text, {"frames": kind}, seed, frames=images)["frames"]
        alone = [run(text, {"image": "image"}, seed, image=image)["image"] for image in images]
        if "erase" in text:  # the draws come after the first image in both
            assert (found == run("normalize", {"frames": kind}, frames=images)["frames"]).all((0, 3)).mean() > 0.5
        np.testing.assert_array_equal(found, np.stack(alone))


def test_views_may_be_files_and_have_one_size():
    images, files = some_images(2), []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(EncodedImage(buffer.getvalue(), "a view"))
    source = data.ArraySource({"views": [files, files]}, fields={"views": "views"})
    with data.train_stream(source, transforms="flip(1.0)", batch_size=2, seed=0) as stream:
        np.testing.assert_array_equal(next(stream)["views"], np.stack([images[:, :, ::-1]] * 2))
    with pytest.raises(ExampleError, match=r"'views' \(views\) must hold images of one size, and has 12x18, 18x12"):
        run("", {"views": "views"}, views=[images[0], images[0].swapaxes(0, 1)])


UNTOUCHED = {"voxels": np.arange(5.0), "words": np.array([3, 1, 0]), "label": 2}


def test_arrays_tokens_and_labels_are_never_touched():
    kinds = {"image": "image", "voxels": "array", "words": "tokens", "label": "label"}
    text = "view('second')|randaugment(4, 9)|random_resized_crop(8)|flip(1.0)|pad(1)|normalize|erase(1.0)|tokenize(2)"
    found = run(text, kinds, image=some_images()[0], **UNTOUCHED)
    for name, value in UNTOUCHED.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_view_copies_a_field_of_any_kind_with_a_geometry_of_its_own():
    kinds = {"image": "image", "depth": "depth"}
    found = run("view('far', 'depth')|flip(1.0, on='far')", kinds, image=some_images()[0], depth=DEPTH)
    assert found["depth"].tolist() == DEPTH.tolist()
    assert found["far"].tolist() == DEPTH[:, ::-1].tolist()
    with pytest.raises(ValueError, match=r"unknown field that 'view' copies: 'dept'; nearest: 'depth'"):
        parse_transforms("view('far', 'dept')").kinds(kinds)


def test_no_truth_is_zero_in_a_batch():
    depth = DEPTH.copy()
    depth[0] = [np.nan, np.inf, -np.inf, 4]
    source = data.ArraySource({"depth": depth[None]}, fields={"depth": "depth"})
    with data.train_stream(source, transforms="", batch_size=1, seed=0) as stream:
        assert next(stream)["depth"][0].tolist() == [[0, 0, 0, 4], [5, 0, 7, 8]]


# Stereo pairs

STEREO = {"left": "image", "right": "image", "left_disparity": "disparity", "right_disparity": "disparity"}
SWAP = "swap=('left', 'right', 'left_disparity', 'right_disparity')"


def stereo():
    """One bright column at 9 in the left picture, and 3 pixels further left in the right one."""
    pictures = np.zeros((2, 4, 16, 3), np.uint8)
    pictures[0, :, 9], pictures[1, :, 6] = 255, 255
    disparity = np.where(pictures[..., 0] > 0, np.float32(3), np.float32(0))
    return dict(left=pictures[0], right=pictures[1], left_disparity=disparity[0], right_disparity=disparity[1])


@pytest.mark.parametrize(
    ("text", "disparity"),
    [
        (f"flip(1.0, {SWAP})", 3),
        (f"flip({SWAP})|pad(2)", 3),
        ("resize((4, 32))", 6),
        ("random_crop((3, 12), padding=2)|resize((6, 12))", 3),
        (f"random_crop((3, 12))|flip({SWAP})|resize((3, 24))", 6),
    ],
)
def test_a_stereo_pair_stays_one(text, disparity):
    """The column of the left picture lies in the right one where the disparity says, and the reverse."""
    places = set()
    for seed in range(12):
        found = run(text, STEREO, seed, **stereo())
        left, right, of_left, of_right = (found[name][2] for name in STEREO)
        assert set(of_left) | set(of_right) <= {0, disparity}
        for ours, other, values, step in ((left, right, of_left, -disparity), (right, left, of_right, disparity)):
            for place in np.nonzero(values)[0]:
                assert ours[place, 0] > 128
                if 0 <= place + step < len(other):
                    assert other[place + step, 0] > 128
                    places.add(int(place))
    assert len(places) > 1


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        ("flip", STEREO, "transform 'flip' mirrors pictures, and 'left_disparity' (disparity) holds only for the pair"),
        ("flip(0.5, on='left')", STEREO, "transform 'flip' mirrors pictures, and 'left_disparity'"),
        ("flip(swap=('left', 'right'))", STEREO, "give the fields to exchange, with the disparity of both pictures"),
        ("flip(swap=('left', 'rihgt'))", STEREO, "cannot swap: unknown field 'rihgt'; nearest: 'right'"),
        ("flip(swap=('left', 'right_disparity'))", STEREO, "'left' (image) with 'right_disparity' (disparity)"),
        ("flip(swap=('left', 'words'))", {**STEREO, "words": "tokens"}, "cannot swap 'words' (tokens)"),
        ("flip(swap=('left', 'right'), on='left')", STEREO, "cannot swap 'right' (image), which it does not mirror"),
        ("randaugment(2, 9)", STEREO, "transform 'randaugment' turns images, and a displacement along rows such as"),
        (
            "resize(4, on='words')",
            {"image": "image", "words": "tokens"},
            "'resize' does not act on tokens (on='words')",
        ),
        (
            "normalize(on='mask')",
            {"image": "image", "mask": "mask"},
            "'normalize' does not act on mask (on='mask'), but",
        ),
        ("randaugment(2, 9, on='mask')", {"image": "image", "mask": "mask"}, "'randaugment' finds no picture"),
        ("tokenize(4, on='image')", {"image": "image"}, "'tokenize' does not act on image"),
    ],
)
def test_what_a_transform_cannot_act_on_is_refused_by_name(text, kinds, message):
    for refused in (lambda pipeline: pipeline.kinds(kinds), lambda p: p({"index": 0}, kinds, np.random.default_rng(0))):
        with pytest.raises(ValueError, match=r".") as caught:
            refused(parse_transforms(text))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("swap", ["('left',)", "('left', 'right', 'left', 'top')"])
def test_fields_to_swap_come_in_pairs(swap):
    with pytest.raises(ValueError, match=r"swap of 'flip' must be pairs of fields"):
        parse_transforms(f"flip(swap={swap})")


# What is known of a field


def test_an_array_source_knows_shapes_and_types_of_its_columns():
    columns = {
        "image": np.zeros((2, 4, 6, 3), np.uint8),
        "points": [np.zeros((1, 2), np.float32), np.zeros((5, 2), np.float32)],
        "label": [0, 1],
        "caption": ["a", "b"],
        "mixed": [np.zeros(3), np.zeros((3, 1), np.float32)],
    }
    kinds = {"image": "image", "points": "points", "label": "label", "caption": "text", "mixed": "array"}
    info = data.ArraySource(columns, fields=kinds).info
    assert info.kinds == kinds
    assert info.fields == {
        "image": data.FieldSpec("image", (4, 6, 3), "uint8"),
        "points": data.FieldSpec("points", (None, 2), "float32"),
        "label": data.FieldSpec("label", (), "int64"),
        "caption": data.FieldSpec("text"),
        "mixed": data.FieldSpec("array"),
    }
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize(
    ("column", "spec", "message"),
    [
        (np.zeros((2, 3)), "picture", "field 'a' of 'arrays': unknown kind 'picture'; nearest"),
        (np.zeros((2, 4, 4, 1)), "depth", "has 3 axes, and a field of kind 'depth' has 2"),
        (np.zeros((2, 4, 4), np.uint16), "depth", "is uint16, and a field of kind 'depth' holds floating point"),
        (np.zeros((2, 4)), "tokens", "is float64, and a field of kind 'tokens' holds integers"),
        (np.zeros((2, 3)), "camera", "has 1 axes, and a field of kind 'camera' has 2 or 3"),
        (
            np.zeros((2, 3)),
            data.FieldSpec("array", (4,)),
            r"field 'a' of 'arrays': its shape is (3,), and its spec says (4,)",
        ),
        (np.zeros((2, 3)), data.FieldSpec("array", (3,), "float32"), "it is float64, and its spec says float32"),
    ],
)
def test_a_column_that_is_not_of_its_kind_is_refused(column, spec, message):
    with pytest.raises(ValueError, match=r".") as caught:
        data.ArraySource({"a": column}, fields={"a": spec})
    assert message in str(caught.value)


def test_a_spec_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"unknown kind 'voxels'; .*allowed: array, boxes"):
        data.FieldSpec("voxels")
    with pytest.raises(ValueError, match="dtype 'floaty' is no type of numbers"):
        data.FieldSpec("array", (3,), "floaty")
    assert data.FieldSpec("array", [3, None], np.float32) == data.FieldSpec("array", (3, None), "float32")


def test_a_value_that_is_not_of_its_kind_is_an_example_that_cannot_be_used():
    columns = {"depth": [np.zeros((4, 4), np.float32), np.zeros((4, 4, 1), np.float32)], "x": ["", ""]}
    source = data.ArraySource(columns, fields={"depth": "depth", "x": "text"})
    check_record(source[0], source, 0)
    with pytest.raises(ExampleError, match="field 'depth' of example 1 of arrays train has 3 axes"):
        check_record(source[1], source, 1)


def test_the_saved_info_of_a_run_is_the_one_that_it_had():
    source = data.ArraySource({"image": np.zeros((2, 4, 6, 3), np.uint8)}, fields={"image": "image"}, num_classes=3)
    saved = json.loads(json.dumps(asdict(source.info)))
    assert data.Info.of_json(saved) == source.info
    before = {**saved, "fields": {"image": "image"}, "image_shape": [4, 6, 3]}
    assert data.Info.of_json(before).fields == {"image": data.FieldSpec("image", (4, 6, 3))}


def test_every_kind_is_documented_and_has_one_place():
    from pathlib import Path

    import data.source

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for kind in KINDS:
        assert f"\n| {kind} |" in page
        assert f"    {kind} " in data.source.__doc__
    assert set(PICTURES) < set(SIZED) < set(MOVED) < set(KINDS)
    assert without_size("views", (2, 8, 9, 3)) == (2, 3)
    assert without_size("image", (8, 9, 3)) == (3,)
    assert without_size("array", (8, 9, 3)) == (8, 9, 3)


# Rectangles

OF_A_SIZE = ["resize", "center_crop", "random_crop", "random_resized_crop", "inception_crop"]


def test_all_transforms_that_take_a_size_take_a_rectangle():
    takes = {name for name, kind in TRANSFORMS.items() if "size" in kind.__dataclass_fields__}
    assert takes == set(OF_A_SIZE)


@pytest.mark.parametrize("name", OF_A_SIZE)
def test_a_rectangular_size_is_height_and_width(name):
    text = f"{name}({{size}})|flip|pad(2)|center_crop({{size}})|normalize|erase(1.0)"
    text = configs.transforms(tiny.config(data__train_transforms=text, data__image_size=(16, 22)), "train_transforms")
    kinds = {"image": "image", "mask": "mask", "depth": "depth", "views": "views"}
    images = some_images(2, 40, 30)
    found = run(text, kinds, image=images[0], views=images, mask=images[0, ..., 0], depth=np.ones((40, 30)))
    assert [found[kind].shape for kind in kinds] == [(16, 22, 3), (16, 22), (16, 22), (2, 16, 22, 3)]
