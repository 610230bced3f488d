"""Class folders as people have them: how splits are spelt, what is hidden, links, names, and sets that lack classes."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

import data


def save(path, level=100):
    path = os.fsdecode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", (12, 8), (level, level, level)).save(path, "PNG")


def fill(root, splits=("train", "val"), classes=("a", "b"), count=2):
    for split in splits:
        for label, name in enumerate(classes):
            for index in range(count):
                save(root / split / name / f"{index}.png", level=10 * label)


def files(root, split):
    source = data.open_source(f"folder:{root}", split)
    return [source.describe(index) for index in range(len(source))]


def refusal(root, split):
    with pytest.raises(ValueError, match=r".") as caught:
        data.open_source(f"folder:{root}", split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Splits


@pytest.mark.parametrize(
    ("train", "held_out", "split"),
    [
        ("Training", "Testing", "test"),
        ("TRAIN", "Val", "val"),
        ("train_set", "dev", "val"),
        ("training-set", "Validation", "valid"),
        ("Train", "evaluation", "test"),
        ("train", "valid", "test"),
    ],
)
def test_splits_are_found_in_any_usual_spelling(tmp_path, train, held_out, split):
    fill(tmp_path, (train,), count=3)
    fill(tmp_path, (held_out,))
    source = data.open_source(f"folder:{tmp_path}", "train")
    assert (source.info.class_names, len(source)) == (("a", "b"), 6)
    assert sorted(source.info.splits.values()) == [4, 6]
    assert all(f"{os.sep}{held_out}{os.sep}" in name for name in files(tmp_path, split))
    assert files(tmp_path, f"{held_out}[:50%]") == files(tmp_path, split)[:2]


def test_a_split_of_any_set_may_be_spelt_as_usual():
    assert len(data.open_source("synthetic:examples=8", "Training[:50%]")) == 4
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*allowed: test, train"):
        data.open_source("synthetic", "dev")


def test_two_folders_for_one_split_are_refused(tmp_path):
    fill(tmp_path, ("train", "Training", "val"))
    message = refusal(tmp_path, "val")
    assert str(tmp_path) in message
    assert "'Training' and 'train'" in message
    assert "data.train_split" in message


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "plane"):
        for index in range(30):
            save(tmp_path / name / f"{index}.png")
    assert data.open_source(f"folder:{tmp_path}", "train").info.class_names == ("plane", "train")


def test_a_split_that_cannot_be_used_is_an_error_where_it_is_asked_for(tmp_path):
    """Unlabelled images of a competition in `test`, in one folder or in none."""
    fill(tmp_path)
    save(tmp_path / "test" / "images" / "0.png")
    assert len(data.open_source(f"folder:{tmp_path}", "train")) == len(files(tmp_path, "val")) == 4
    message = refusal(tmp_path, "test")
    assert f"{tmp_path / 'test'} has classes that the training folder lacks: images" in message
    assert "data.eval_split" in message
    (tmp_path / "test" / "images" / "0.png").rename(tmp_path / "test" / "0.png")
    (tmp_path / "test" / "images").rmdir()
    message = refusal(tmp_path, "test")  # and not `val` in its place
    assert f"{tmp_path / 'test'} holds no class folder" in message
    assert "data.eval_split" in message


def test_a_missing_split_names_the_folder_and_the_keys(tmp_path):
    fill(tmp_path, ("train",))
    message = refusal(tmp_path, "test")
    assert "unknown split 'test'; allowed: train" in message.replace("; nearest: 'train'", "")
    assert str(tmp_path) in message
    assert "data.train_split and data.eval_split" in message


# Classes


def test_a_held_out_set_may_lack_a_class_and_says_so(tmp_path):
    fill(tmp_path, ("train",), ("a", "b", "c"))
    fill(tmp_path, ("val",), ("a", "c"))
    source = data.open_source(f"folder:{tmp_path}", "val")
    labels = [source[index]["label"] for index in range(len(source))]
    assert sorted(labels) == [0, 0, 2, 2]
    assert all(np.asarray(source[i]["image"])[0, 0, 0] == 10 * bool(label) for i, label in enumerate(labels))
    assert source.info.class_names == ("a", "b", "c")
    assert source.info.notes == (f"split 'val' of {tmp_path / 'val'} has no image of 1 of 3 classes: b",)
    assert data.open_source(f"folder:{tmp_path}", "train").info.notes == ()
    (tmp_path / "val" / "b").mkdir()
    assert len(data.open_source(f"folder:{tmp_path}", "val")) == 4
    (tmp_path / "val" / "b" / "0.heic").write_bytes(b"x")
    assert f"class folder {tmp_path / 'val' / 'b'} holds no image" in refusal(tmp_path, "val")


def test_a_class_that_is_written_otherwise_is_named_with_the_nearest(tmp_path):
    fill(tmp_path, ("train",), ("red", "blue"))
    fill(tmp_path, ("val",), ("Red", "blue"))
    message = refusal(tmp_path, "val")
    assert f"folder {tmp_path / 'val'} has classes that the training folder lacks: Red; nearest: 'red'" in message


def test_accents_are_the_same_composed_and_decomposed(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    fill(tmp_path, ("train",), ("a", decomposed))
    fill(tmp_path, ("val",), ("a", composed))
    for split in ("train", "val"):
        source = data.open_source(f"folder:{tmp_path}", split)
        assert source.info.class_names == ("a", composed)
        assert {np.asarray(source[i]["image"])[0, 0, 0] for i in range(4) if source[i]["label"] == 1} == {10}
    save(tmp_path / "val" / decomposed / "0.png")
    assert "two class folders whose names look alike" in refusal(tmp_path, "val")


# What lies inside


def test_hidden_folders_hold_no_examples(tmp_path):
    fill(tmp_path)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "a", tmp_path / "train" / "a" / "deep"):
            save(place / hidden / "0-checkpoint.png")
    save(tmp_path / "train" / "a" / "deep" / "3.png")
    assert data.open_source(f"folder:{tmp_path}", "train").info.class_names == ("a", "b")
    names = sorted(os.path.relpath(name, tmp_path / "train") for name in files(tmp_path, "train"))
    assert names == ["a/0.png", "a/1.png", "a/deep/3.png", "b/0.png", "b/1.png"]
    everything = data.open_source(f"images:{tmp_path / 'train'}", "all")
    assert len(everything) == 5


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    fill(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "more.png")
    train = tmp_path / "train"
    (train / "a" / "more").symlink_to(tmp_path / "elsewhere")
    for name, target in (("a/up", ".."), ("a/here", "."), ("all", "."), ("a/self", "self"), ("a/root", tmp_path)):
        (train / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(train)
    save(tmp_path / "outside" / "0.png")
    (train / "c").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(train)
    names = sorted(os.path.relpath(name, train) for name in files(tmp_path, "train"))
    assert names == ["a/0.png", "a/1.png", "a/more/more.png", "b/0.png", "b/1.png", "c/0.png"]
    assert data.open_source(f"folder:{tmp_path}", "train").info.class_names == ("a", "b", "c")


def test_names_that_are_not_utf8(tmp_path):
    """Old archives hold names in other encodings; they are read, and written with escapes wherever they are shown."""
    root = tmp_path / os.fsdecode(b"s\xe9t")
    fill(root)
    save(root / "train" / "b" / os.fsdecode(b"mu\xf1oz.png"), level=10)
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / os.fsdecode(b"\xe9"))
    source = data.open_source(f"folder:{root}", "train")
    assert source.info.class_names == ("\\xe9", "a")
    names = [source.describe(index) for index in range(5)]
    (index,) = [number for number, name in enumerate(names) if name.endswith("s\\xe9t/train/\\xe9/mu\\xf1oz.png")]
    record = source[index]
    assert record["label"] == 0
    assert np.asarray(record["image"])[0, 0, 0] == 10
    for text in (*names, source.info.name, *source.info.class_names):
        text.encode()
    with pytest.raises(FileNotFoundError, match="gone does not exist") as caught:
        data.open_source(f"folder:{root}gone", "train")
    str(caught.value).encode()


def test_undivided_folders_take_val_for_what_is_held_out(tmp_path):
    for name in ("a", "b"):
        for index in range(30):
            save(tmp_path / name / f"{index}.png")
    assert files(tmp_path, "val") == files(tmp_path, "test") == files(tmp_path, "validation")
    assert 0 < len(files(tmp_path, "val")) < 20
    assert not set(files(tmp_path, "val")) & set(files(tmp_path, "train"))
    assert set(data.open_source(f"folder:{tmp_path}", "val").info.splits) == {"train", "test"}


def plain(root, split):
    source = data.open_source(f"images:{root}", split)
    assert source.info.kinds == {"image": "image"}
    return {os.path.relpath(source.describe(index), root) for index in range(len(source))}


def test_images_without_classes_take_val(tmp_path):
    for index in range(60):
        save(tmp_path / f"{index}.png")
    everything = plain(tmp_path, "all")
    assert len(everything) == 60
    assert plain(tmp_path, "val") == plain(tmp_path, "test")
    assert plain(tmp_path, "val") | plain(tmp_path, "train") == everything
    assert 0 < len(plain(tmp_path, "val")) < 20
    assert not plain(tmp_path, "val") & plain(tmp_path, "train")


def test_images_without_classes_are_divided_by_folders_named_as_splits(tmp_path):
    for split, count in (("Train", 3), ("val", 2)):
        for index in range(count):
            save(tmp_path / split / "deep" / f"{index}.png")
    save(tmp_path / "loose.png")
    assert plain(tmp_path, "train") == {f"Train/deep/{index}.png" for index in range(3)}
    assert plain(tmp_path, "validation") == {f"val/deep/{index}.png" for index in range(2)}
    assert len(plain(tmp_path, "all")) == 6
    with pytest.raises(ValueError, match=r"unknown split 'test'; .*allowed: all, train, val"):
        plain(tmp_path, "test")
