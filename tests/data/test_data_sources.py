"""Sources: built-in, prepared, folders, synthetic; what they hold and what they say when something is wrong."""

import gzip
import io
import struct
import subprocess
import sys
from pathlib import Path

import generated
import numpy as np
import pytest
from PIL import Image

import data
from data.source import EncodedImage
from data.split import parse_split
from data.tfds_source import open_tfds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def save(path, size=(12, 8), level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


# Splits


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [("train", range(100))]),
        ("train[:90%]", [("train", range(90))]),
        ("train[90%:]", [("train", range(90, 100))]),
        ("train[10:20]", [("train", range(10, 20))]),
        ("train[-5:]", [("train", range(95, 100))]),
        ("train[-10%:]+test[:3]", [("train", range(90, 100)), ("test", range(3))]),
        ("test[:1000]", [("test", range(7))]),
    ],
)
def test_split_slices(split, expected):
    assert parse_split(split, {"train": 100, "test": 7}) == expected


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tran", "unknown split 'tran'; nearest: 'train'; allowed: test, train"),
        ("train[50:50]", "holds no example"),
        ("train[1:2:3]", "must be NAME"),
        ("train[", "must be NAME"),
        ("", "must be NAME"),
    ],
)
def test_wrong_splits_end_in_one_line(split, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_split(split, {"train": 100, "test": 7})
    assert message in str(caught.value)


# The digits


def test_digits_are_the_scikit_learn_images_divided_once_and_for_all(cache):
    from sklearn.datasets import load_digits

    train, test = (data.open_source("digits", split, cache) for split in ("train", "test"))
    assert (len(train), len(test)) == (1442, 355)
    assert train.info.class_names == tuple("0123456789")
    assert train.info.kinds == {"image": "image", "label": "label"}
    assert train.info.fields["image"].shape == (8, 8, 1)
    assert train.info.splits == {"train": 1442, "test": 355}
    original = load_digits()
    pixels = {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    }
    records = [source[index] for source in (train, test) for index in range(len(source))]
    assert {(record["image"].tobytes(), int(record["label"])) for record in records} == pixels
    counts = np.bincount([test[index]["label"] for index in range(len(test))])
    assert counts.min() >= 34
    assert counts.max() <= 37
    # A change of which images are held out, or of their order, would make old and new results incomparable.
    assert sum(int(test[index]["label"]) * (index + 1) for index in range(len(test))) == 285951


def test_digits_are_a_real_tfds_set(cache):
    """The generic reader opens what the digits prepared, with slices and lazily decoded images."""
    memory = data.open_source("digits", "test", cache)
    prepared = open_tfds("digits:1.0.0", "test[10:20]", cache)
    assert len(prepared) == 10
    assert isinstance(prepared[3]["image"], EncodedImage)
    np.testing.assert_array_equal(np.asarray(prepared[3]["image"]), memory[13]["image"])
    assert prepared[3]["label"] == memory[13]["label"]
    assert prepared[3]["index"] == 3
    assert "record 13 of digits/1.0.0 test" in prepared.describe(3)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_prepare_the_digits_at_once(tmp_path):
    code = (
        "import sys, data; source = data.open_source('digits', 'train', sys.argv[1]); "
        "print(len(source), int(source[5]['image'].sum()), 'tensorflow' in sys.modules)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {run.communicate(timeout=120)[0] for run in runs}
    assert len(outputs) == 1
    assert outputs.pop().split()[::2] == ["1442", "False"]
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["1.0.0"]


def test_an_interrupted_preparation_leaves_nothing_in_place(tmp_path, monkeypatch):
    from data.digits.digits_dataset_builder import Builder

    def interrupted(self, held_out):
        yield 0, next(original(self, held_out))[1]
        raise KeyboardInterrupt

    original = Builder._generate_examples
    monkeypatch.setattr(Builder, "_generate_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.open_source("digits", "train", str(tmp_path))
    monkeypatch.undo()
    assert list((tmp_path / "digits").iterdir()) == []
    assert len(data.open_source("digits", "train", str(tmp_path))) == 1442


# Prepared sets


def test_an_unknown_set_lists_the_nearest_prepared_one(cache):
    data.open_source("digits", "train", cache)
    with pytest.raises(FileNotFoundError, match="unknown data set 'digitss'; nearest: 'digits'"):
        data.open_source("digitss", "train", cache)
    with pytest.raises(FileNotFoundError, match=r"unknown version of digits '2.0.0'.*allowed: 1.0.0"):
        open_tfds("digits:2.0.0", "train", cache)


@pytest.mark.parametrize(
    ("name", "more"), [("cifar10", ""), ("imagenet2012", " --manual_dir=DIR"), ("cifar100:3.0.2", "")]
)
def test_a_set_of_a_shipped_configuration_says_how_it_is_prepared(tmp_path, name, more):
    known = name.partition(":")[0]
    with pytest.raises(FileNotFoundError) as caught:
        open_tfds(name, "train", str(tmp_path))
    assert str(caught.value) == (
        f"{known!r} is not prepared in {tmp_path} (see data.directory): `tfds build {known} --file_format=array_record"
        f"{more}` does it once, in an environment with the extra `prepare` (docs/data.md)"
    )
    with pytest.raises(FileNotFoundError, match=r"unknown data set 'cifar11'.*see data.directory, and docs/data.md"):
        open_tfds("cifar11", "train", str(tmp_path))


def test_all_kinds_of_tfds_features(tmp_path):
    """A set with text, mask, file name and features of no kind: written without TensorFlow, read by name/config."""
    import tensorflow_datasets as tfds

    def png(array):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "segmentation": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
        "label": tfds.features.ClassLabel(num_classes=5),
        "caption": tfds.features.Text(),
        "file_name": tfds.features.Text(),
        "weights": tfds.features.Tensor(shape=(2,), dtype=np.float32),
    }
    mask = np.array([[0, 1], [2, 1]], np.uint8)
    example = {
        "image": png(np.full((2, 2, 3), 9, np.uint8)),
        "segmentation": png(mask),
        "label": 3,
        "caption": "a thing",
        "file_name": "thing.png",
        "weights": np.zeros(2, np.float32),
    }
    generated.write(tmp_path, "scenes", "1.2.0", features, {"train": [example] * 2}, config="small")
    source = data.open_source("scenes/small", "train", str(tmp_path))
    kinds = {"image": "image", "segmentation": "mask", "label": "label", "caption": "text"}
    assert source.info.kinds == kinds
    assert source.info.num_classes == 5
    record = source[1]
    np.testing.assert_array_equal(record["segmentation"], mask)
    assert (record["caption"], record["label"]) == ("a thing", 3)
    assert "thing.png" in source.describe(1)
    assert len(data.open_source("scenes", "train", str(tmp_path))) == 2


# Folders


def test_class_folders_with_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                save(tmp_path / split / name / f"{index}.png", level=10 * label)
    train = data.open_source(f"folder:{tmp_path}", "train")
    assert train.info.class_names == ("cat", "dog")
    assert train.info.splits == {"train": 6, "val": 4}
    for index in range(6):
        record = train[index]
        assert np.asarray(record["image"])[0, 0, 0] == 10 * record["label"]
        assert train.info.class_names[record["label"]] in train.describe(index)
    names = [data.open_source(f"folder:{tmp_path}", split).describe(0) for split in ("val", "test")]
    assert names[0] == names[1]


def test_class_folders_without_splits_are_divided_by_name(tmp_path):
    for name in ("a", "b"):
        for index in range(100):
            save(tmp_path / name / f"{index}.png", size=(2, 2))

    def files(split):
        source = data.open_source(f"folder:{tmp_path}", split)
        return [source.describe(index) for index in range(len(source))]

    train, test = files("train"), files("test")
    assert set(train) | set(test) == {str(tmp_path / name / f"{index}.png") for name in "ab" for index in range(100)}
    assert not set(train) & set(test)
    assert 8 <= len(test) <= 35
    half = files("train[:50%]")
    assert half == train[: len(half)]
    assert 0.3 < np.mean(["/a/" in name for name in half]) < 0.7
    save(tmp_path / "a" / "another.png", size=(2, 2))
    assert set(test) - set(files("test")) == set()


def test_nested_upper_case_and_hidden_files(tmp_path):
    save(tmp_path / "train" / "a" / "deep" / "x.PNG")
    save(tmp_path / "train" / "a" / ".hidden.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".git").mkdir()
    source = data.open_source(f"folder:{tmp_path}", "train")
    assert [source.describe(index) for index in range(len(source))] == [str(tmp_path / "train/a/deep/x.PNG")]


@pytest.mark.parametrize("case", ["missing", "file", "no classes", "empty class", "strange class", "no path", "split"])
def test_wrong_folders_end_in_one_line(tmp_path, case):
    root, split = tmp_path / "set", "train"
    save(root / "train" / "a" / "0.png")
    if case == "missing":
        root, error, message = tmp_path / "gone", FileNotFoundError, "does not exist"
    elif case == "file":
        root, error, message = root / "train" / "a" / "0.png", FileNotFoundError, "is a file"
    elif case == "no classes":
        root, error, message = root / "train" / "a", ValueError, "no class folder"
    elif case == "empty class":
        (root / "train" / "b").mkdir()
        error, message = ValueError, f"class folder {root / 'train' / 'b'} holds no image"
    elif case == "strange class":
        save(root / "test" / "c" / "0.png")
        save(root / "test" / "a" / "0.png")
        split, error, message = "test", ValueError, "classes that the training folder lacks: c"
    elif case == "no path":
        root, error, message = "", ValueError, "folder:PATH"
    else:
        split, error, message = "vall", ValueError, "unknown split 'vall'"
    with pytest.raises(error, match=r".") as caught:
        data.open_source(f"folder:{root}", split)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_folder_for_prediction(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png"):
        save(tmp_path / name)
    source = data.open_source(f"images:{tmp_path}", "all")
    assert [Path(source.describe(index)).name for index in range(3)] == ["a.png", "b.png", "c.png"]
    assert source.info.kinds == {"image": "image"}
    with pytest.raises(ValueError, match="holds no image"):
        data.open_source(f"images:{(tmp_path / 'empty').mkdir() or tmp_path / 'empty'}", "all")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_names_its_file(tmp_path, content):
    save(tmp_path / "train" / "a" / "0.jpg", size=(64, 64))
    file = tmp_path / "train" / "a" / "0.jpg"
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    record = data.open_source(f"folder:{tmp_path}", "train")[0]
    with pytest.raises(data.ExampleError, match=r".") as caught:
        np.asarray(record["image"])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content != b"" or "0 bytes" in str(caught.value)


# MNIST's files


def idx_file(path, values, pack=False):
    content = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    (path.with_name(path.name + ".gz") if pack else path).write_bytes(gzip.compress(content) if pack else content)


def idx_set(root, train=6, test=4):
    images = np.arange((train + test) * 3 * 5, dtype=np.uint8).reshape(-1, 3, 5)
    for first, chosen, pack in (("train", slice(train), True), ("t10k", slice(train, None), False)):
        idx_file(root / f"{first}-images-idx3-ubyte", images[chosen], pack)
        idx_file(root / f"{first}-labels-idx1-ubyte", (np.arange(train + test, dtype=np.uint8) % 3)[chosen], pack)
    return images


def test_files_of_mnist_packed_or_not(tmp_path):
    images = idx_set(tmp_path)
    train, test = (data.open_source(f"idx:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test), train.info.num_classes) == (6, 4, 3)
    assert train.info.fields["image"].shape == (3, 5, 1)
    assert train.info.splits == {"train": 6, "test": 4}
    np.testing.assert_array_equal(train[4]["image"], images[4, ..., None])
    np.testing.assert_array_equal(test[1]["image"], images[7, ..., None])
    assert [test[index]["label"] for index in range(4)] == [0, 1, 2, 0]
    joined = data.open_source(f"idx:{tmp_path.name}", "train[4:]+test[:1]", str(tmp_path.parent))
    assert [joined[index]["label"] for index in range(3)] == [1, 2, 0]
    batch = next(data.train_stream(train, transforms="to_rgb|resize(8)|normalize", batch_size=2, seed=0))
    assert batch["image"].shape == (2, 8, 13, 3)


def test_damaged_files_of_mnist_are_named(tmp_path):
    name = f"idx:{tmp_path}"
    with pytest.raises(FileNotFoundError, match=r"has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
        data.open_source(name, "train")
    with pytest.raises(ValueError, match=r"'idx' needs the path of a folder"):
        data.open_source("idx", "train")
    idx_set(tmp_path)
    labels, images = tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "t10k-images-idx3-ubyte"
    good = labels.read_bytes()
    for content, message in (
        (good[:-1], r"holds 3 bytes but says that its shape is \(4,\)"),
        (bytes((0, 0, 9, 1)) + good[4:], "does not begin as an IDX file of bytes with 1 axes"),
        (b"", "does not begin as an IDX file"),
        (bytes((0, 0, 8, 1, 0, 0, 0, 3)) + good[8:-1], "has 4 images but 3 labels for test"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.open_source(name, "test")
    labels.write_bytes(good)
    images.unlink()
    images.with_name(images.name + ".gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(ValueError, match="cannot unpack"):
        data.open_source(name, "test")


# Synthetic, registered and cached sets


def test_synthetic_is_a_function_of_its_options():
    source = data.open_source("synthetic:classes=3,examples=8,size=16", "train")
    assert (len(source), source.info.num_classes, source.info.fields["image"].shape) == (8, 3, (16, 16, 3))
    assert source[5]["label"] == 2
    np.testing.assert_array_equal(
        source[5]["image"], data.open_source("synthetic:classes=3,examples=8,size=16", "train")[5]["image"]
    )
    test = data.open_source("synthetic:classes=3,examples=8,size=16", "test")
    assert len(test) == 2
    assert not np.array_equal(test[1]["image"], source[1]["image"])
    with pytest.raises(ValueError, match="nearest: 'classes'"):
        data.open_source("synthetic:clases=3", "train")
    with pytest.raises(ValueError, match="integer above 0"):
        data.open_source("synthetic:size=0", "train")


def test_synthetic_classes_can_be_told_apart():
    source = data.open_source("synthetic:classes=4,examples=400,size=16", "train")
    spectra = np.stack([np.abs(np.fft.fft2(source[index]["image"].mean(-1))).ravel() for index in range(400)])
    labels = np.array([source[index]["label"] for index in range(400)])
    centres = np.stack([spectra[:200][labels[:200] == label].mean(0) for label in range(4)])
    distance = ((spectra[200:, None] - centres) ** 2).sum(-1)
    assert (distance.argmin(-1) == labels[200:]).mean() > 0.95


def test_a_registered_set_opens_by_name():
    def opener(argument, split, directory=None):
        return data.ArraySource({"label": np.arange(int(argument))}, fields={"label": "label"}, split=split)

    data.register_source("counting", opener)
    assert len(data.open_source("counting:4", "train")) == 4


def test_decoded_examples_are_kept_where_asked(tmp_path):
    save(tmp_path / "train" / "a" / "0.png")
    lazy = data.open_source(f"folder:{tmp_path}", "train")
    kept = data.open_source(f"folder:{tmp_path}", "train", cache="memory")
    assert isinstance(lazy[0]["image"], EncodedImage)
    first = kept[0]["image"]
    (tmp_path / "train" / "a" / "0.png").unlink()
    assert kept[0]["image"] is first
    with pytest.raises(ValueError, match=r"data\.cache"):
        data.open_source("synthetic", "train", cache="disk")


def test_columns_must_fit_together():
    with pytest.raises(ValueError, match="all of one length"):
        data.ArraySource({"a": [1, 2], "b": [1]}, fields={"a": "label", "b": "label"})
    with pytest.raises(ValueError, match="kind 'picture'"):
        data.ArraySource({"a": [1, 2]}, fields={"a": "picture"})


def test_a_set_of_the_users_opens_by_module_and_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_sets.py").write_text(
        "import data\n\n\ndef open_it(argument, split, directory=None):\n"
        "    return data.ArraySource({'label': [1, 2]}, fields={'label': 'label'}, name=argument, split=split)\n"
    )
    source = data.open_source("their_sets:open_it:some/where:else", "train")
    assert (source.info.name, source.info.split, len(source)) == ("some/where:else", "train", 2)
    with pytest.raises(ValueError, match=r"their_sets has no 'open_them' \(nearest: open_it\)"):
        data.open_source("their_sets:open_them", "train")
    with pytest.raises(ValueError, match=r"no module 'foldr'.*\(nearest: folder\)"):
        data.open_source("foldr:cats", "train")
