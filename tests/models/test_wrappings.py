"""What training scripts put around weights, in every format and in mappings: several sets, dictionaries, prefixes."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from official import assert_same, build, loaded, official
from torch_writer import saved

import models
from models.weights import family, table
from models.weights.files import read, read_weights, write_safetensors
from models.weights.wrappings import unwrap

A, B, C = np.float32([1, 2]), np.float32([3, 4]), np.float32([5, 6])
COUNT = np.asarray(7, np.int64)
FORMATS = ["mapping", "safetensors", "npz", "pth"]


def written(kind, folder, arrays):
    """A flat dictionary as a source of weights."""
    if kind == "mapping":
        return arrays
    path = folder / f"weights.{kind}"
    if kind == "safetensors":
        write_safetensors(path, arrays)
    elif kind == "npz":
        np.savez(path, **arrays)
    else:
        saved(path, arrays)
    return path


# --- several sets -----------------------------------------------------------------------------------------------------

RAW_FIRST, EMA_FIRST = "which='raw' or which='ema'", "which='ema' or which='raw'"
# (tree, what the line says, {which: (array, note)})
SEVERAL = [
    (
        {"state_dict": {"w": A}, "state_dict_ema": {"w": B}, "epoch": 3},
        f"state_dict (raw), state_dict_ema (averaged); choose by {RAW_FIRST}",
        {
            "raw": (A, "the weights below state_dict are taken, not those below state_dict_ema"),
            "ema": (B, "the averaged weights below state_dict_ema are taken, not those below state_dict"),
        },
    ),
    (
        {"model_ema": {"module.w": B, "n_averaged": COUNT}, "model": {"module.w": A}},
        f"model_ema (averaged), model (raw); choose by {EMA_FIRST}",
        {"raw": (A, "the weights below model are"), "ema": (B, "the averaged weights below model_ema are")},
    ),
    (
        {"student": {"module.w": A}, "teacher": {"w": B}},
        f"student (raw), teacher (averaged); choose by {RAW_FIRST}",
        {"raw": (A, "the weights below student are"), "teacher": (B, "the averaged weights below teacher are")},
    ),
    # As FSDP saves DINO's.
    (
        {"model": {"student.w": A, "teacher.w": B}, "iteration": 5},
        f"model.student (raw), model.teacher (averaged); choose by {RAW_FIRST}",
        {"raw": (A, "below model.student are"), "model.teacher": (B, "the averaged weights below model.teacher are")},
    ),
    (
        {"state_dict": {"model.w": A, "model_ema.module.w": B, "model_ema.n_averaged": COUNT}},
        f"state_dict.model (raw), state_dict.model_ema (averaged); choose by {RAW_FIRST}",
        {"raw": (A, "below state_dict.model are"), "ema": (B, "the averaged weights below state_dict.model_ema are")},
    ),
    (
        {"net.w": A, "ema.w": B},
        f"net (raw), ema (averaged); choose by {RAW_FIRST}",
        {"raw": (A, "the weights below net are"), "ema": (B, "the averaged weights below ema are")},
    ),
    (
        {"module": {"w": A}, "ema": {"model": {"w": B}}},
        f"module (raw), ema.model (averaged); choose by {RAW_FIRST}",
        {"raw": (A, "the weights below module are"), "ema": (B, "the averaged weights below ema.model are")},
    ),
    (
        {"model": {"w": A}, "module": {"w": B}, "ema": {"w": C}},
        "model (raw), module (raw), ema (averaged); choose by which='model' or which='module' or which='ema'",
        {
            "model": (A, "the weights below model are"),
            "module": (B, "below module"),
            "ema": (C, "averaged weights below"),
        },
    ),
]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("tree", "said", "choices"), SEVERAL, ids=lambda value: value if isinstance(value, str) else ""
)
def test_several_sets_are_refused_until_one_is_chosen(tmp_path, as_file, tree, said, choices):
    source = saved(tmp_path / "a.pth", tree) if as_file else tree
    what = str(source) if as_file else "the mapping"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{what} holds several sets of weights: {said}')}$"):
        read(source)
    for which, (array, note) in choices.items():
        found = read(source, which)
        assert_same(found.arrays, {"w": array})
        assert found.kind == ("ema" if "averaged weights" in note else "raw")
        assert note in found.notes[0]
        assert_same(read_weights(source, which), {"w": array})


def test_sets_of_one_kind_are_chosen_by_their_keys():
    tree = {"model": {"w": A}, "module": {"w": B}, "ema": {"w": C}}
    with pytest.raises(ValueError, match=r"choose by which='model' or which='module'$"):
        read(tree, "raw")
    with pytest.raises(ValueError, match=r"which='module' of models\.load_weights$"):
        read(tree, "raw", choice="--{}")
    with pytest.raises(ValueError, match=r"unknown set of weights 'modul'; nearest: module, model; allowed: raw, ema"):
        read(tree, "modul")


@pytest.mark.parametrize(
    ("tree", "kind", "notes"),
    [
        ({"w": A}, "raw", []),
        ({"model": {"w": A}}, "raw", []),
        ({"model": {"w": A}, "epoch": 3}, "raw", ["the weights below model are taken"]),
        ({"module": {"w": A}, "optimizer": {"state": {0: B}}}, "raw", ["the weights below module are taken"]),
        ({"model_ema": {"w": A}}, "ema", ["the averaged weights below model_ema are taken"]),
        ({"teacher": {"w": A}, "epoch": 3}, "ema", ["the averaged weights below teacher are taken"]),
        ({"module.w": A, "n_averaged": COUNT}, "ema", ["the weights are averaged ones: n_averaged is beside them"]),
        ({"model": {"w": A}, "ema": {"decay": COUNT}}, "raw", ["the weights below model are taken"]),
        ({"model": {"w": A}, "params": {"lr": 0.1}}, "raw", ["the weights below model are taken"]),
        (
            {"w": A, "total_ops": COUNT, "n.total_params": COUNT},
            "raw",
            ["2 counters are left out: total_ops, total_params"],
        ),
    ],
)
def test_the_only_set_is_taken_and_said(tree, kind, notes):
    found = read(tree)
    assert_same(found.arrays, {"w": A})
    assert (found.kind, found.notes) == (kind, notes)
    assert read(tree, kind).notes == notes
    other = {"raw": "ema", "ema": "raw"}[kind]
    with pytest.raises(
        ValueError, match=rf"which='{other}': the mapping has no (moving average|raw weights) by its names"
    ):
        read(tree, other)


def test_a_model_takes_the_chosen_set():
    timm = official()
    average = {name: value + 1 for name, value in timm.items()}
    tree = {"model": timm, "model_ema": average, "epoch": 1}
    model = build()
    with pytest.raises(ValueError, match=r"model \(raw\), model_ema \(averaged\)"):
        models.load_weights(model, tree)
    assert models.load_weights(model, tree, "ema") == [
        "the averaged weights below model_ema are taken, not those below model"
    ]
    assert_same(models.unstack(models.split(model)[1]), loaded(average)[0])
    assert_same(models.convert_weights(model, tree, which="raw")[0], loaded(timm)[0])


def test_averages_of_tensorflow_can_be_left_out():
    """Official evaluation takes them, and so does a model that is not told otherwise; it is said."""
    arrays = models.export_weights(tiny_models.create("maxvit"), layout="tensorflow")
    both = arrays | {f"{name}/ExponentialMovingAverage": value + 1 for name, value in arrays.items()}
    model = tiny_models.abstract("maxvit")
    for which in (None, "ema"):
        params, _, notes = models.convert_weights(model, both, which)
        assert notes[1] == f"moving averages are taken for {len(arrays)} of {len(arrays)} arrays"
        np.testing.assert_array_equal(params["head.kernel"], arrays["cls_head/logit_dense/weight"] + 1)
    params, _, notes = models.convert_weights(model, both, "raw")
    assert notes[0] == f"{len(arrays)} moving averages are left out"
    np.testing.assert_array_equal(params["head.kernel"], arrays["cls_head/logit_dense/weight"])
    with pytest.raises(ValueError, match="has no moving average by its names"):
        models.convert_weights(model, arrays, "ema")


# --- prefixes ---------------------------------------------------------------------------------------------------------

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net."]
PREFIXES += ["model._orig_mod.", "module.model.", "_forward_module.net._orig_mod.", "backbone.", "network.module."]


@pytest.mark.parametrize("kind", FORMATS)
def test_prefixes_of_every_name_go_away(tmp_path, kind):
    timm, model = official(depth=1, num_classes=2), build(depth=1, num_classes=2)
    expected = models.convert_weights(model, timm)[0]
    averaged = ["the weights are averaged ones: n_averaged is beside them"]
    for number, prefix in enumerate(PREFIXES):
        for counters, said in (({}, []), ({"n_averaged": COUNT}, averaged)):
            folder = tmp_path / f"{number}{len(said)}"
            folder.mkdir()
            source = written(kind, folder, {f"{prefix}{name}": value for name, value in timm.items()} | counters)
            params, _, notes = models.convert_weights(model, source)
            assert_same(params, expected)
            assert notes == said


@pytest.mark.parametrize("kind", ["mapping", "pth"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_a_training_checkpoint_go_away(tmp_path, kind, prefix):
    """Lightning's, torchvision's and whoever else's."""
    tree = {"state_dict": {f"{prefix}w.a": A, f"{prefix}v": B, f"{prefix}n_averaged": COUNT}, "epoch": 3}
    source = tree if kind == "mapping" else saved(tmp_path / "a.pth", tree)
    assert_same(read(source).arrays, {"w.a": A, "v": B})


def test_wrappers_of_modules_inside_go_away():
    names = ["blocks.0._orig_mod.attn.w", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module.attn.w", "w"]
    assert list(read(dict.fromkeys(names, A)).arrays) == ["blocks.0.attn.w", "blocks.1.attn.w", "w"]
    with pytest.raises(ValueError, match=r"the mapping holds two arrays that are named blocks\.0\.w"):
        read({"blocks.0.w": A, "blocks.0._orig_mod.w": B})


def test_a_prefix_of_some_names_stays():
    for names in (
        ["module.w", "v"],
        ["model.w", "criterion.v"],
        ["backbone.w", "head.v"],
        ["w"],
        ["module", "module.w"],
    ):
        assert list(read(dict.fromkeys(names, A)).arrays) == names
    with pytest.raises(ValueError, match=r"43 missing: .*; 43 left over: module\."):
        loaded({f"module.{name}" if number else name: value for number, (name, value) in enumerate(official().items())})


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_no_name_of_a_family_is_a_wrapping(name):
    model = tiny_models.create(name)
    for layout in family.family_of(model).layouts:
        arrays = models.export_weights(model, layout=layout)
        assert read(arrays).arrays.keys() == arrays.keys()
        # Also as a tree, where VOLO's `network` is a dictionary like those of training scripts.
        tree = {}
        for entry, array in arrays.items():
            *path, leaf = entry.split(".")
            place = tree
            for key in path:
                place = place.setdefault(key, {})
            place[leaf] = array
        known = family.family_of(model).layouts["torch"](model).knows
        assert unwrap(tree, knows=known).arrays.keys() == arrays.keys()


class Wrapped(nnx.Module):
    """A model whose official names begin with what is a wrapping elsewhere."""

    def __init__(self):
        self.scale, self.shift = nnx.Param(jnp.zeros(2)), nnx.Param(jnp.zeros(2))


def test_names_of_the_models_table_are_no_wrappings(monkeypatch):
    rows = family.Family(
        "wrapped",
        Wrapped,
        layouts={
            "torch": lambda model: table.Table(table.copy("model.scale", "scale"), table.copy("net.shift", "shift"))
        },
    )
    monkeypatch.setitem(family.FAMILIES, "wrapped", rows)
    names = {"model.scale": A, "net.shift": B}
    with pytest.raises(ValueError, match=r"several sets of weights: model \(raw\), net \(raw\)"):
        read(names)
    nested = {"model": {"scale": A}, "net": {"shift": B}}
    for source in (names, {f"module.{name}": value for name, value in names.items()}, {"state_dict": names}, nested):
        params, _, notes = models.convert_weights(Wrapped(), source)
        assert_same(params, {"scale": A, "shift": B})
        assert notes == []


# --- mappings that are something else ---------------------------------------------------------------------------------


class Strange:
    """As PyTorch's tensors of types without a counterpart in NumPy, or with a gradient."""

    shape, dtype = (2,), "float32"

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType")


def test_what_holds_no_weights_is_one_line(tmp_path):
    for source in ({}, {"epoch": 3}, {"model": {}}, {"model": {"w": [1.0]}}, {"ema": {"decay": COUNT}}):
        with pytest.raises(ValueError, match=r"^the mapping holds no arrays$"):
            read(source)
    with pytest.raises(ValueError, match=r"^w of the mapping cannot be read as an array: Got unsupported"):
        read({"w": Strange()})
    itself = {"w": A}
    itself["model"] = itself
    with pytest.raises(ValueError, match="the mapping holds a dictionary that holds itself"):
        read(itself)
    np.savez(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz: holds no arrays"):
        read(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.pth holds two arrays that are named a\.b"):
        read(saved(tmp_path / "a.pth", {"a": {"b": A}, "a.b": B}))
    with pytest.raises(ValueError, match=r"a\.pth: holds a single tensor without a name"):
        read(saved(tmp_path / "a.pth", A))
