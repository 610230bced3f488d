"""Sets in the formats of other projects: saved by Hugging Face's datasets, parquet, and WebDataset's tar files.

Those of tests/files/sets were written by these projects (`tests/files/make_sets.py`).
"""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from data.source import ExampleError

SETS = Path(__file__).resolve().parents[1] / "files" / "sets"
NAMES = ("apple", "bear", "cat")
KINDS = {"hf": "saved", "parquet": "parquet", "tar": "tars"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(name, split="train", error=ValueError):
    with pytest.raises(error) as caught:
        data.open_source(name, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(kind, tmp_path):
    return Path(shutil.copytree(SETS / KINDS[kind], tmp_path / kind))


def check(source, numbers):
    """Every record is what `make_sets.py` says, whatever the order in which they are read."""
    assert len(source) == len(numbers)
    for index in reversed(range(len(numbers))):
        record, n = source[index], numbers[index]
        pixels = np.random.default_rng(n).integers(0, 255, (6 + n % 3, 8, 3), dtype=np.uint8)
        np.testing.assert_array_equal(np.asarray(record["image"]), pixels)
        assert (record["index"], record["label"]) == (index, n % 3)
        assert f"number {n}" in record.values()


@pytest.mark.parametrize("kind", KINDS)
def test_sets_of_other_projects_are_read_as_they_were_written(kind):
    name = f"{kind}:{SETS / KINDS[kind]}"
    source = data.open_source(name, "train")
    assert source.info.class_names == NAMES
    assert sorted(source.info.splits.values()) == [3, 5]
    assert sorted(source.info.kinds.values()) == ["image", "label", "text"]
    check(source, range(5))
    check(pickle.loads(pickle.dumps(source)), range(5))
    for split in ("val", "validation", "valid"):
        check(data.open_source(name, split), range(100, 103))
    check(data.open_source(name, "train[40%:]+val[:1]"), [2, 3, 4, 100])
    assert re.search(r"allowed: train, val(idation)?$", refusal(name, "test"))
    assert data.open_source(f"{kind}:{KINDS[kind]}", "train", directory=str(SETS)).info.num_examples == 5


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("hf", "record 1 of .*data-00001-of-00002.arrow"),
        ("parquet", "record 4 of .*train-00000-of-00001.parquet"),
        ("tar", "part/0004 in .*train-000001.tar"),
    ],
)
def test_an_example_is_named_by_its_file_and_place(kind, place):
    assert re.fullmatch(place, data.open_source(f"{kind}:{SETS / KINDS[kind]}", "train").describe(4))


@pytest.mark.parametrize("kind", KINDS)
def test_they_train(kind):
    source = data.open_source(f"{kind}:{SETS / KINDS[kind]}", "train")
    stream = data.train_stream(source, transforms="resize((8, 8))|flip|normalize", batch_size=4, seed=0)
    batch = next(stream)
    stream.close()
    assert batch["image"].shape == (4, 8, 8, 3)
    assert set(batch) == {"index", "image", "label"}


def test_one_saved_split_needs_no_dictionary():
    check(data.open_source(f"hf:{SETS / 'saved' / 'validation'}", "train"), range(100, 103))
    check(data.open_source(f"tar:{SETS / 'tars' / 'val-000000.tar'}", "train"), range(100, 103))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (",label=size", r"label=size: a column of list<.*int64> is no label$"),
        (",label=knd", r"label=knd: unknown column 'knd'; nearest: 'kind'; allowed: caption, img, kind, size"),
        (",lable=kind", r"unknown option 'lable'; nearest: 'label'; allowed: image, label, mask"),
        (",image=caption", r"image=caption: a column of string is no image"),
        (",label=", r"label= needs the name of a column"),
    ],
)
def test_columns_that_cannot_be_are_one_line(options, said):
    for kind in ("hf", "parquet"):
        assert re.search(said, refusal(f"{kind}:{SETS / KINDS[kind]}{options}"))


def table(place, columns):
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), place)
    return place


def png(n):
    return data.open_source(f"tar:{SETS / 'tars'}", "train")[n]["image"].content


def test_parquet_of_anybody(tmp_path):
    images = [png(n) for n in range(3)]
    place = table(tmp_path / "a" / "train.parquet", {"picture": images, "label": ["b", "a", "b"], "weight": [0.5] * 3})
    table(tmp_path / "a" / "dev.parquet", {"picture": images[:2], "label": ["a", "z"], "weight": [0.5] * 2})
    source = data.open_source(f"parquet:{tmp_path / 'a'}", "train")
    assert source.info.class_names == ("a", "b")
    assert [source[i]["label"] for i in range(3)] == [1, 0, 1]
    assert set(source.info.fields) == {"image", "label"}
    held_out = data.open_source(f"parquet:{tmp_path / 'a'}", "val")
    assert held_out[0]["label"] == 0
    with pytest.raises(ExampleError, match=r"record 1 of .*dev.parquet: unknown class 'z'.*allowed: a, b"):
        held_out[1]
    numbers = table(tmp_path / "b.parquet", {"image": images, "label": [0, 4, None]})
    source = data.open_source(f"parquet:{numbers}", "train")
    assert (source.info.num_classes, source.info.class_names) == (5, ())
    with pytest.raises(ExampleError, match=r"record 2 of .*b.parquet has nothing in its column 'label'"):
        source[2]
    two = table(tmp_path / "c.parquet", {"left": images, "right": images})
    assert "several columns that may be the image: left, right; choose one, as in data.name='parquet:" in refusal(
        f"parquet:{two}"
    )
    chosen = data.open_source(f"parquet:{two},image=right", "train")
    assert set(chosen.info.fields) == {"image", "left"}
    none = table(tmp_path / "d.parquet", {"label": [1]})
    assert refusal(f"parquet:{none}").endswith("d.parquet has no column of images; there are: label")
    table(tmp_path / "a" / "train-2.parquet", {"picture": images})
    said = refusal(f"parquet:{place.parent}")
    assert re.search("train.parquet has the columns picture, label, weight, and .*train-2.parquet has picture$", said)


def test_a_copy_is_made_once_and_again_when_the_file_changes(tmp_path, cache):
    place = copied("parquet", tmp_path)
    data.open_source(f"parquet:{place}", "train")
    made = {path: path.stat().st_mtime_ns for path in (cache / "parquet").iterdir()}
    assert [path.suffix for path in made] == [".arrow", ".arrow"]
    data.open_source(f"parquet:{place}", "train")
    assert {path: path.stat().st_mtime_ns for path in (cache / "parquet").iterdir()} == made
    os.utime(place / "data" / "train-00000-of-00001.parquet", (1, 1))
    check(data.open_source(f"parquet:{place}", "train"), range(5))
    assert len(list((cache / "parquet").iterdir())) == 3


def cut(path, size=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("hf", lambda p: cut(p / "train/data-00001-of-00002.arrow"), "data-00001-of-00002.arrow is damaged"),
        ("hf", lambda p: (p / "train/data-00000-of-00002.arrow").write_bytes(b""), "00000-of-00002.arrow is damaged"),
        ("hf", lambda p: (p / "train/state.json").write_text("{"), "state.json is damaged or missing"),
        ("hf", lambda p: (p / "dataset_dict.json").unlink(), "save_to_disk .*; in it there is train, validation;"),
        ("parquet", lambda p: cut(p / "data/train-00000-of-00001.parquet"), "train-.*parquet is damaged"),
        ("parquet", lambda p: (p / "data/more.parquet").write_bytes(b"x"), "more.parquet is of no split, and others"),
        ("tar", lambda p: cut(p / "train-000001.tar", 0.1), "train-000001.tar is damaged.*does not end"),
        ("tar", lambda p: (p / "val-000000.tar").write_bytes(b"x" * 2000 + bytes(1024)), "val-000000.tar is damaged"),
        ("tar", lambda p: (p / "train-000002.tar.gz").write_bytes(b"x"), "tar.gz is packed, .*: unpack it"),
        ("tar", lambda p: (p / "classes.txt").write_text("a\nb\n"), "names 2 classes, and there is a label 2"),
    ],
)
def test_what_is_damaged_is_named_in_one_line(kind, damage, said, tmp_path):
    place = copied(kind, tmp_path)
    damage(place)
    assert re.search(said, refusal(f"{kind}:{place}"))


def test_a_missing_file_is_named(tmp_path):
    place = copied("hf", tmp_path)
    (place / "train" / "data-00000-of-00002.arrow").unlink()
    assert "which" in refusal(f"hf:{place}", error=FileNotFoundError)
    for kind in KINDS:
        assert refusal(f"{kind}:{tmp_path / 'nowhere'}", error=FileNotFoundError).endswith(
            f"nowhere does not exist (data.name='{kind}:PATH')"
        )
        assert refusal(f"{kind}:") == f"{kind!r} needs a path: data.name='{kind}:PATH'"
        (tmp_path / "empty").mkdir(exist_ok=True)
    assert "holds no .tar file" in refusal(f"tar:{tmp_path / 'empty'}")


def archive(place, files):
    with tarfile.open(place, "w") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return place


def test_examples_of_a_tar_that_lack_something(tmp_path):
    image = png(0)
    files = {"0.png": image, "0.cls": b"1\n", "1.PNG": image, "2.cls": b"0", "._0.png": b"junk", "notes": b"x"}
    source = data.open_source(f"tar:{archive(tmp_path / 'a.tar', files)}", "train")
    assert (len(source), source.info.num_classes, source[0]["label"]) == (3, 2, 1)
    with pytest.raises(ExampleError, match=r"1 in .*a.tar has no label \(.cls\)"):
        source[1]
    with pytest.raises(ExampleError, match=r"2 in .*a.tar has no image \(.jpg, "):
        source[2]
    for name, files, said in (
        ("b", {"x.png": image, "x.jpg": image}, "b.tar holds two files for the image of x"),
        ("c", {"y.png": image, "y.cls": b"cat"}, "c.tar: y.cls holds 'cat', and a class is a number from 0 on"),
        ("d", {"y.cls": b"1"}, "holds no image for the split 'train'"),
    ):
        assert said in refusal(f"tar:{archive(tmp_path / f'{name}.tar', files)}")
    damaged = data.open_source(f"tar:{archive(tmp_path / 'e.tar', {'z.png': image[:20], 'z.cls': b'0'})}", "train")
    with pytest.raises(ExampleError, match=r"cannot decode image z in .*e.tar"):
        np.asarray(damaged[0]["image"])


def test_rows_in_another_order_are_refused(tmp_path):
    place = copied("hf", tmp_path)
    state = place / "train" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_indices_data_files": [{"filename": "i.arrow"}]}))
    assert "rows in another order than the files" in refusal(f"hf:{place}")
