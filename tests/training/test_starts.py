"""A model that starts from several runs and files: whose parameters go where, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_tasks
from flax import nnx

import configs
import data
import models
import tasks
from training.checkpoints import checkpoint, starts
from training.run import loop

OPTIONS = {**tiny.TINY["model.options"], "image_size": 16}
INFO = data.open_source("synthetic:classes=4,examples=8,size=16", "train").info
BLOCK = "blocks.1.mlp.fc1.kernel"


class Towers(nnx.Module):
    """Two ViTs, a layer of text and what joins them."""

    def __init__(self, seed, width=3):
        rngs = nnx.Rngs(seed)
        self.image = models.create("vit_mu16", num_classes=0, rngs=rngs, **OPTIONS)
        self.teacher = models.create("vit_mu16", num_classes=4, rngs=rngs, **OPTIONS)
        self.text = nnx.Linear(2, width, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.join = nnx.Linear(2, 2, rngs=rngs)


def saved(params, state=None, ema=None):
    """What a checkpoint of a run with these parameters gives."""
    averages = {"params": ema, "model_state": state or {}} if ema else None
    about = {"config": configs.as_dict(tiny.config()), "metadata": {"info": dataclasses.asdict(INFO)}}
    return {"params": params, "model_state": state or {}, "ema": averages, **about}


def arrays(module):
    _, params, state = models.split(module)
    return {name: np.asarray(value) for name, value in models.unstack({**params, **state}).items()}


VIT = arrays(models.create("vit_mu16", num_classes=4, rngs=nnx.Rngs(1), **OPTIONS))
OTHER = arrays(Towers(2))
SAVED = {
    "vit": saved(VIT, ema={name: value + 1 for name, value in VIT.items()}),
    "text": saved(
        {
            f"encoder.{name}": np.full(shape, 5.0, np.float32)
            for name, shape in (("kernel", (2, 3)), ("bias", 3), ("more", 1))
        }
    ),
    "towers": saved(
        {name: value for name, value in OTHER.items() if name not in ("norm.mean", "norm.var")},
        {name: OTHER[name] + 7 for name in ("norm.mean", "norm.var")},
    ),
    "wide": saved({"text.kernel": np.zeros((2, 9), np.float32)}),
}


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """`begin(*entries) -> (arrays after, arrays before)`."""
    monkeypatch.setattr(checkpoint, "find", lambda path: None)
    monkeypatch.setattr(checkpoint, "restore_for_eval", lambda path: SAVED[path])
    model = Towers(0)
    before = arrays(model)

    def run(*entries, **keys):
        config = tiny.config(model__init_from=entries, **keys)
        _, params, state = models.split(model)
        found = starts.of_config(config)
        starts.check(found, params)
        params, state = starts.start_from(found, tasks.create(config, INFO), params, state, model)
        return models.unstack({**params, **state}), before

    return run


def test_each_part_starts_from_its_own_place(begin, capsys):
    after, before = begin(
        {"source": "vit", "prefix": {"": "image."}, "weights": "raw"},
        {"source": "vit", "prefix": {"": "teacher"}},
        {"source": "text", "prefix": {"encoder": "text"}},
        {"source": "towers", "only": "norm"},
    )
    np.testing.assert_array_equal(after[f"image.{BLOCK}"], VIT[BLOCK])
    np.testing.assert_array_equal(after[f"teacher.{BLOCK}"], VIT[BLOCK] + 1)
    np.testing.assert_array_equal(after["teacher.head.kernel"], VIT["head.kernel"] + 1)
    np.testing.assert_array_equal(after["text.kernel"], np.full((2, 3), 5))
    np.testing.assert_array_equal(after["norm.scale"], OTHER["norm.scale"])
    np.testing.assert_array_equal(after["norm.mean"], OTHER["norm.mean"] + 7)
    np.testing.assert_array_equal(after["join.kernel"], before["join.kernel"])
    assert after.keys() == before.keys()
    said = capsys.readouterr().err
    assert f"init_from: 2 of {len(before)} parameters start anew: join.bias, join.kernel" in said
    assert "init_from vit: the raw weights are taken" in said
    assert "init_from vit: the averaged weights are taken" in said
    assert "init_from vit: head with 4 classes is left out" in said
    assert "init_from text: 1 of its parameters have no place here: text.more" in said


def test_texts_give_what_the_model_has_by_name(begin, capsys):
    after, _ = begin("towers", model__init_weights="raw")
    np.testing.assert_array_equal(after["norm.var"], OTHER["norm.var"] + 7)
    assert "anew" not in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"^config\.model\.init_from=vit: image\..* is started by towers already; each"
    ):
        begin("towers", {"source": "vit", "prefix": {"": "image"}})
    after, _ = begin({"source": "towers", "only": "(?!image).*"}, {"source": "vit", "prefix": {"": "image"}})
    np.testing.assert_array_equal(after[f"image.{BLOCK}"], VIT[BLOCK] + 1)
    np.testing.assert_array_equal(after[f"teacher.{BLOCK}"], OTHER[f"teacher.{BLOCK}"])


def test_a_classifier_for_other_classes_starts_anew_and_is_nobodys(begin, capsys):
    five = arrays(models.create("vit_mu16", num_classes=5, rngs=nnx.Rngs(1), **OPTIONS))
    SAVED["five"] = saved(five)
    after, before = begin({"source": "five", "prefix": {"": "teacher"}, "only": "teacher"})
    np.testing.assert_array_equal(after[f"teacher.{BLOCK}"], five[BLOCK])
    np.testing.assert_array_equal(after["teacher.head.kernel"], before["teacher.head.kernel"])
    assert "head starts anew: 5 classes there, 4 here" in capsys.readouterr().err
    entries = {"source": "five", "prefix": {"": "teacher"}}, {"source": "vit", "prefix": {"head": "teacher.head"}}
    after, _ = begin(*entries, model__init_weights="raw")
    np.testing.assert_array_equal(after["teacher.head.kernel"], VIT["head.kernel"])


def test_layers_of_a_stack_start_by_pattern_and_by_prefix(begin):
    after, before = begin(
        {"source": "vit", "prefix": {"": "image"}, "only": r"image\.blocks\.0"},
        {"source": "vit", "prefix": {"blocks.0": "image.blocks.1", "head": "teacher.head"}, "weights": "raw"},
    )
    first, second = (f"image.blocks.{i}.mlp.fc1.kernel" for i in range(2))
    np.testing.assert_array_equal(after[first], VIT["blocks.0.mlp.fc1.kernel"] + 1)
    np.testing.assert_array_equal(after[second], VIT["blocks.0.mlp.fc1.kernel"])
    np.testing.assert_array_equal(after["teacher.head.kernel"], VIT["head.kernel"])
    np.testing.assert_array_equal(after["image.norm.scale"], before["image.norm.scale"])


def test_a_file_of_weights_goes_to_the_part_of_its_family(begin, tmp_path):
    model = models.create("vit_mu16", num_classes=4, rngs=nnx.Rngs(1), **OPTIONS)
    file = str(tmp_path / "vit.safetensors")
    models.export_weights(model, file)
    after, _ = begin({"source": file, "prefix": {"": "image"}}, {"source": file, "prefix": {"": "teacher"}})
    np.testing.assert_array_equal(after[f"image.{BLOCK}"], VIT[BLOCK])
    np.testing.assert_array_equal(after["teacher.head.kernel"], VIT["head.kernel"])
    for prefix, said in (
        (None, r"it is for a part of the model: prefix=\{'': 'image'\} \(there are image, teacher\)"),
        ({"": "image.blocks.0"}, r"'image\.blocks\.0' is no part of the model that can be of a family"),
        ({"": "text"}, r"there is no table of official weight names for Linear"),
        ({"blocks": "image.blocks"}, r"official weights are for a whole model of their family; takes \{'': PART\}"),
    ):
        entry = {"source": file} | ({"prefix": prefix} if prefix else {})
        with pytest.raises(ValueError, match=f"^config.model.init_from={file}: .*{said}"):
            begin(entry, "text")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"source": "vit", "prefix": {"": "imgae"}},
            r"the model has nothing that begins with 'imgae' \(nearest: image",
        ),
        (
            {"source": "text", "prefix": {"encodr": "text"}},
            r"it has nothing that begins with 'encodr' \(nearest: encoder",
        ),
        ({"source": "vit", "only": "imagee"}, r"only: 'imagee' matches no parameter .*; nearest: image"),
        (
            {"source": "text", "prefix": {"encoder": "text"}, "only": "text|join"},
            r"names join\.bias, which it does not",
        ),
        (
            {"source": "text", "prefix": {"encoder": "image.blocks"}},
            r"it has nothing that the model has: image\.blocks",
        ),
        ({"source": "wide", "only": r"text\.kernel"}, r"do not fit the model: 1 of another shape.*text\.kernel"),
        ({"source": "text", "prefix": {"": "text"}, "weights": "ema"}, r"weights=ema: it has no moving average"),
    ],
)
def test_what_starts_nothing_is_one_line(begin, entry, said):
    with pytest.raises(ValueError, match=f"^config.model.init_from={entry['source']}: .*{said}") as error:
        begin(entry)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("runs/a", "runs/a"),
        ("", ""),
        ("a, b", ("a", "b")),
        (["a"], "a"),
        ("['a,b']", ("a,b",)),
        ('[{"source": "a", "prefix": {"": "image."}}, "b"]', ({"source": "a", "prefix": {"": "image"}}, "b")),
        ("{'source': 'a', 'only': 'x\\.y', 'weights': 'raw'}", ({"source": "a", "only": r"x\.y", "weights": "raw"},)),
    ],
)
def test_the_key_takes_one_text_or_a_list(value, expected):
    config = configs.from_dict({}, {"model.init_from": value})
    assert config.model.init_from == expected
    again = configs.from_dict(json.loads(json.dumps(configs.as_dict(config))))
    assert again.model.init_from == expected
    assert not configs.differences(configs.as_dict(config), again)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "takes a workdir, a checkpoint or a file"),
        ([3], "takes a workdir, a checkpoint or a file"),
        ("[{'source': 'a'", "cannot be read as Python or JSON"),
        ([{"prefix": {"": "image"}}], "has no 'source'"),
        (
            [{"source": "a", "prefx": {}}],
            "unknown key 'prefx'; nearest: 'prefix'; allowed: only, prefix, source, weights",
        ),
        ([{"source": "a", "prefix": "image"}], "takes a mapping of beginnings of names"),
        ([{"source": "a", "prefix": {"a": 1}}], "takes text"),
        ([{"source": "a", "only": "(b"}], "is not a regular expression"),
        ([{"source": "a", "weights": "rwa"}], "unknown weights 'rwa'; nearest: 'raw'"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(value, said):
    with pytest.raises(ValueError, match=r"^config\.model\.init_from") as error:
        configs.from_dict({}, {"model.init_from": value})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_file_may_have_a_list(tmp_path):
    file = tmp_path / "joined.py"
    file.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.init_from = ({'source': 'a', 'prefix': {'': 'image.', 'b.c': 'd'}}, 'b')\n    return config\n"
    )
    expected = ({"source": "a", "prefix": {"": "image", "b.c": "d"}}, "b")
    assert configs.load(str(file)).model.init_from == expected


def test_a_run_resumes_without_the_places_it_began_from(tmp_path, capsys):
    source = tiny_tasks.restoration_source(16)

    def play(workdir, steps, **settings):
        transforms = dict.fromkeys(("data__train_transforms", "data__eval_transforms"), "value_range(0, 1)")
        config = tiny.config(**tiny.OWN_MODEL, **transforms, data__image_size=8, train__steps=steps, **settings)
        task, sources = tiny_tasks.MeanGame(config, source.info), {"train": source}
        return loop.train(config, workdir, task=task, sources=sources, terminal=tiny.quiet())["step"]

    play(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    entries = [{"source": str(tmp_path / name), "only": only} for name, only in (("a", "generator"), ("b", ".*bias"))]
    play(tmp_path / "run", 1, model__init_from=entries)  # a step of the other player
    assert "init_from: 1 of 3 parameters start anew: discriminator.kernel" in capsys.readouterr().err
    there, here = (checkpoint.restore_for_eval(tmp_path / name)["params"] for name in ("a", "run"))
    np.testing.assert_array_equal(here["generator.shift"], there["generator.shift"])
    assert there["generator.shift"] != 0
    shutil.rmtree(tmp_path / "a")
    assert play(tmp_path / "run", 2, model__init_from=entries) == 2
    with pytest.raises(FileNotFoundError, match=r"no workdir or checkpoint .*a"):
        play(tmp_path / "other", 2, model__init_from=entries)


def test_the_longest_beginning_of_a_name_counts():
    flat = {"b.x": 1, "b.c.x": 2, "bc": 3, "d": 4}
    for prefix in ({"": "", "b": "e", "b.c": "f"}, {"b.c": "f", "b": "e", "": ""}):
        found = {piece.part: piece.params for piece in starts._renamed(prefix, flat, {})}
        assert found == {"": {"bc": 3, "d": 4}, "e": {"x": 1}, "f": {"x": 2}}
