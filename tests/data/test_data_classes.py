"""Classes are matched by name, whatever their order, spelling or, for ImageNet, kind of name."""

import numpy as np
import pytest

import data
from data import classes


def info(*names, count=None, name="set"):
    fields = {"image": "image", "label": "label"}
    return data.Info(name, "train", fields, 1, num_classes=count or len(names), class_names=names)


@pytest.mark.parametrize(
    ("names", "among", "found"),
    [
        (("b", "a"), ("a", "b"), (1, 0)),
        (("red",), ("blue", "Red"), (1,)),
        (("Golden_Retriever", "cafe\u0301"), ("caf\u00e9", "golden retriever"), (1, 0)),
        (("a", "A"), ("A", "a"), (1, 0)),
        (("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"), tuple("abcdefghijk"), (0, 1, 10, *range(2, 10))),
        (tuple("abc"), ("2", "0", "1"), (1, 2, 0)),
        (("n01443537", "tench"), ("goldfish, Carassius auratus", "n01440764"), (0, 1)),
        (("English springer", "n03126707"), classes.imagenet(), (217, 517)),
    ],
)
def test_names_are_found(names, among, found):
    assert classes.locate(names, among) == found


@pytest.mark.parametrize(
    ("names", "among", "said"),
    [
        (("red", "gray"), ("red", "grey"), "'gray' is not among 'red', 'grey'; nearest: 'grey'"),
        (("a", "A"), ("A", "b"), "'a' is not|cannot be told apart"),
        (("crane",), classes.imagenet(), "'crane' is not among"),
        (("0", "1"), classes.imagenet(), "'0' is not among"),
    ],
)
def test_others_are_named(names, among, said):
    with pytest.raises(ValueError, match=said):
        classes.locate(names, among)


def test_a_whole_list_of_imagenet_names_knows_its_two_cranes():
    first_words = [words.split(",")[0] for _, words in classes._imagenet()]
    assert len(set(first_words)) < 1000
    assert classes.locate(first_words, classes.imagenet()) == tuple(range(1000))
    assert classes.locate(tuple(map(str, range(1000))), classes.imagenet()) == tuple(range(1000))


def test_a_side_without_names_is_matched_by_number():
    assert classes.places(info("a", "b"), info(count=2)) == (0, 1)
    with pytest.raises(ValueError, match=r"'set' has 2 classes, the model 3"):
        classes.places(info("a", "b"), info(count=3))


def test_labels_and_masks_become_those_of_the_model():
    labels = data.ArraySource(
        {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.array([0, 1])},
        fields={"image": "image", "label": "label"},
        class_names=("b", "c"),
    )
    assert classes.labelled_as(labels, labels.info) is labels
    renamed = classes.labelled_as(labels, info("a", "b", "c"))
    assert [renamed[i]["label"] for i in range(2)] == [1, 2]
    assert renamed.info.class_names == ("a", "b", "c")
    masks = data.ArraySource(
        {"mask": np.array([[[0, 1], [255, 0]]], np.uint8)}, fields={"mask": "mask"}, class_names=("b", "a")
    )
    found = classes.labelled_as(masks, info("a", "b"))[0]["mask"]
    assert found.dtype == np.uint8
    assert found.tolist() == [[1, 0], [255, 1]]
