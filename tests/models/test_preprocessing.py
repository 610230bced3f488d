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
import models
from benchmarks import preprocessing as page
from benchmarks.timm_models import timm_name
from configs import from_dict, replace, transforms
from data.source import EncodedImage
from models.core.registry import image_size
from models.weights import preprocessing
from models.weights.files import write_safetensors
from models.weights.preprocessor_config import from_transformers
from models.weights.stated import of_file
from tasks.preprocessing import for_file

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
    config = replace(from_dict({}), data__image_size=size, data__eval_transforms=found.transforms)
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


def test_of_each_variant_it_is_what_timm_says():
    said = json.loads(str(STORED["timm"]))
    compared = set()
    for name in models.names():
        found = models.preprocessing(name)
        side = image_size(name)
        assert found.image_size == (side, side), name
        theirs = said.get(timm_name(name))
        if found.source == "timm" and theirs:
            compared.add(name)
            # A variant may be for another size than timm's model of that name.
            assert found == preprocessing.from_timm(theirs | {"input_size": (3, side, side)}), name
    assert len(compared) > 80


def test_of_each_file_of_torchvision_it_is_what_torchvision_says(tmp_path):
    for name, settings in json.loads(str(STORED["torchvision"])).items():
        (tmp_path / name).touch()
        assert of_file(tmp_path / name) == preprocessing.from_torchvision(settings), name
    (tmp_path / "vit_b_16.pth").touch()
    assert of_file(tmp_path / "vit_b_16.pth") is None


def test_a_name_of_timm_is_that_of_its_first_weights():
    own = models.preprocessing("vit_s16")
    assert models.preprocessing("vit_small_patch16_224") == own
    assert models.preprocessing("vit_small_patch16_224.augreg_in21k_ft_in1k") == own
    for other in ("vit_base_patch16_384", "google/vit-base-patch16-224", "vit_small_patch16_224.dino"):
        with pytest.raises(ValueError, match="is said by a file of its weights only"):
            models.preprocessing(other)


def test_the_page_has_every_variant():
    text = page.PAGE.read_text()
    assert f"<!-- table: begin -->\n{page.table()}\n<!-- table: end -->" in text


def test_a_share_is_the_number_of_pixels_and_follows_another_size():
    assert preprocessing.share((224, 224), (256, 256)) == "{size//0.875}"
    for wanted in range(225, 300):
        text = preprocessing.share((224, 224), (wanted, wanted))
        found = preprocessing.Preprocessing((224, 224), text)
        assert filled(found) == str(wanted)
        assert abs(int(filled(found, (448, 448))) - 2 * wanted) <= 6
    assert preprocessing.share((224, 160), (224, 160)) == "{size}"
    assert preprocessing.share((224, 160), (300, 161)) == "(300, 161)"


@pytest.mark.parametrize(
    ("library", "settings", "message"),
    [
        ("timm", {"interpolation": "bicubc"}, "unknown interpolation 'bicubc'; nearest: 'bicubic'"),
        ("timm", {"crop_mode": "centre"}, "unknown crop_mode 'centre'; nearest: 'center'"),
        ("timm", {"crop_pct": -1}, "crop_pct=-1.0 of 224x224 pixels"),
        ("timm", {"crop_pct": "all"}, "crop_pct='all': takes a number"),
        ("timm", {"input_size": [224, 224]}, r"input_size=\[224, 224\]: takes 3 numbers"),
        ("timm", {"mean": [0.5]}, r"mean=\[0.5\]: takes 3 numbers"),
        (
            "transformers",
            {"image_processor_type": "BeitImageProcessor"},
            "unknown image processor 'BeitImageProcessor'",
        ),
        ("transformers", {"do_rescale": False}, "do_rescale"),
        ("transformers", {"rescale_factor": 1 / 127.5}, "divided by 255"),
        ("transformers", {"resample": 5}, "resample=5: known are 0"),
        ("transformers", {"size": {"longest_edge": 384}}, "size={'longest_edge': 384}: takes height and width"),
        ("transformers", {"size": {"shortest_edge": 224}}, "different shapes"),
        ("transformers", {"image_mean": "half"}, "image_mean='half': takes 3 numbers"),
        ("torchvision", {"crop_size": [224]}, "resize_size is missing"),
    ],
)
def test_what_there_is_not_here_is_one_line(library, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        READERS[library](settings)
    assert "\n" not in str(caught.value)


def test_a_processor_may_leave_steps_out():
    found = from_transformers({"do_normalize": False, "size": {"height": 8, "width": 12}})
    assert (found.mean, found.std, found.image_size) == ((0.0,) * 3, (1.0,) * 3, (8, 12))
    unset = {"resample": None, "crop_size": None, "do_center_crop": None, "image_mean": None}
    assert from_transformers(unset) == from_transformers({})
    cut = from_transformers({"image_processor_type": "CLIPImageProcessor", "do_resize": False})
    assert cut.transforms == "center_crop({size}, like='transformers')|normalize"


ARRAYS = {"a": np.zeros(2, np.float32)}
TIMM = {"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.8}}


def test_a_file_says_it_in_its_header_or_beside_it(tmp_path):
    own = models.Preprocessing((16, 24), "resize({size})|normalize", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    file, other = tmp_path / "a.safetensors", tmp_path / "model.safetensors"
    write_safetensors(file, ARRAYS, ("x", "y"), own)
    write_safetensors(other, ARRAYS)
    assert of_file(file) == own
    assert of_file(other) is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    assert (
        models.preprocessing(other).transforms
        == "resize({size}, 'bilinear', fit='stretch', like='transformers')|normalize"
    )
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViT"]}))  # Hugging Face's says nothing
    assert of_file(other).image_size == (32, 32)
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    assert of_file(other) == of_file(tmp_path) == preprocessing.cropped(64, 0.8)
    assert of_file(file) == own
    # Of several files in a folder those beside are about the one with the usual name.
    write_safetensors(tmp_path / "b.safetensors", ARRAYS)
    assert of_file(tmp_path / "b.safetensors") is None
    with pytest.raises(ValueError, match="nothing in it or beside it says"):
        models.preprocessing(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="unknown model or file of weights 'swin_tinny'; nearest: swin_tiny"):
        models.preprocessing("swin_tinny")
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        models.preprocessing(tmp_path / "c.safetensors")


@pytest.mark.parametrize("text", ["{", '{"pretrained_cfg": {"input_size": 3}}', '{"input_size": [3, 8, 8], "mean": 1}'])
def test_what_a_file_says_wrongly_is_said(tmp_path, text):
    write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config.json: .*eval.preprocessing=config takes data.eval_transforms"
    ) as caught:
        for_file(from_dict({}), str(tmp_path / "model.safetensors"), ())
    assert "\n" not in str(caught.value)
    config = from_dict({}, {"eval.preprocessing": "config"})
    assert for_file(config, str(tmp_path / "model.safetensors"), ())[0] == config


def test_the_line_says_what_an_evaluation_takes(tmp_path):
    """The command line, the file, the configuration file, the variant, the defaults, in this order."""
    plain, file = tmp_path / "plain.npz", tmp_path / "a.safetensors"
    np.savez(plain, **ARRAYS)
    own = models.Preprocessing((64, 64), "resize({size})|normalize", (0.1,) * 3, (0.2,) * 3)
    write_safetensors(file, ARRAYS, (), own)

    def taken(path, model="deit_s16", given=(), **changes):
        overrides = {"model.name": model, **{key.replace("__", "."): value for key, value in changes.items()}}
        config, note = for_file(from_dict({}, overrides), str(path), [key.replace("__", ".") for key in given])
        return transforms(config, "eval_transforms"), config.data.mean[0], config.data.image_size, note

    variant = "resize(248, 'bicubic', like='timm')|center_crop(224, like='timm')|normalize"
    default = "resize(256)|center_crop(224)|normalize"
    by_file = "images as its header says: resize(64)|normalize, mean 0.1 0.1 0.1, std 0.2 0.2 0.2"
    assert taken(file) == ("resize(64)|normalize", 0.1, 64, by_file)
    assert taken(file, data__eval_transforms="normalize")[0] == "resize(64)|normalize"
    assert taken(plain)[:3] == (variant, 0.485, 224)
    assert "as the published deit_s16 takes them (timm): resize(248" in taken(plain)[3]
    assert taken(plain, "vit_s16")[1] == 0.5
    changed = taken(plain, data__mean="0.3,0.3,0.3")
    assert changed[:2] == (default, 0.3)
    assert "images as the configuration says: resize(256)" in changed[3]
    assert taken(plain, "models.hosts.isotropic:VisionTransformer")[0] == default
    by_hand = taken(plain, given=["data__mean"], data__mean="0.3,0.3,0.3")
    assert by_hand[:2] == (variant, 0.3)
    assert "(timm) and --config.data.mean: resize(248" in by_hand[3]
    assert taken(file, given=["data__image_size"], data__image_size=32)[0] == "resize(32)|normalize"
    assert taken(file, eval__preprocessing="config")[0] == default
