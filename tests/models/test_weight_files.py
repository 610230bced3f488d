"""Files of weights: what real PyTorch wrote is read bit for bit, and a pickle that wants to run code is refused."""

import os
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_writer import LAYOUTS, Call, Storage, pickled, saved, tensor, write_zip

from models.weights import torch_pickle
from models.weights.files import SUFFIXES, is_weight_file, read_weights, write_safetensors

DATA = Path(__file__).resolve().parents[1] / "files"
REAL = [DATA / "torch_zip.pth", DATA / "torch_legacy.pth"]


def expected(newer):
    """What tests/files/make_torch_files.py saves."""
    base = np.arange(30, dtype=np.float32).reshape(6, 5) / np.float32(7)
    arrays = {
        "base": base,
        "transposed": base.T,
        "view": base[2:4, 1::2],
        "expanded": np.full((3, 2), base[0, 1]),
        "number": np.int64(7),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": base[0],
    }
    kinds = ["bool", "uint8", "int8", "int16", "int32", "float16", "bfloat16", "float64", "complex64"]
    for kind in kinds + (["uint16", "float8_e4m3fn"] if newer else []):
        arrays[kind] = np.arange(4).astype(getattr(ml_dtypes, kind, kind))
    return {name: np.asarray(array) for name, array in arrays.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.smoke
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_files_of_real_torch_are_read_bit_for_bit(path):
    assert_same(read_weights(path), expected(newer="zip" in path.stem))


# Pickles that want to run code.


class Reduce:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def programs(command):
    """Pickles that run a command in a shell, by every operation that calls something."""
    text = command.encode()
    call = pickle.dumps(Reduce(os.system, command), 2)
    stack_global = pickle.dumps(Reduce(os.system, command), 4)
    instance = b"(S'" + text + b"'\niposix\nsystem\n."
    made_object = b"(cposix\nsystem\nS'" + text + b"'\no."
    # BUILD calls __setstate__, which a pickle may give to an object that it has just made.
    build = (
        b"ctypes\nSimpleNamespace\n)R}S'__setstate__'\ncposix\nsystem\nsbS'" + text + b"'\nb."  # then with the command
    )
    getattr_chain = b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR(S'" + text + b"'\ntR."
    evaluated = pickle.dumps(Reduce(eval, f"__import__('os').system({command!r})"), 2)
    nested = pickle.dumps({"model": OrderedDict(w=1, x=[{"deep": Reduce(os.system, command)}])}, 2)
    twice = pickle.dumps({"model": Reduce(pickle.loads, call)}, 2)
    partial = b"cfunctools\npartial\n(cposix\nsystem\nS'" + text + b"'\ntR)R."
    return {
        "reduce": (call, "posix.system"),
        "stack_global": (stack_global, "posix.system"),
        "inst": (instance, "posix.system"),
        "obj": (made_object, "posix.system"),
        "build": (build, "posix.system"),
        "getattr": (getattr_chain, "builtins.getattr"),
        "eval": (evaluated, "builtins.eval"),
        "nested": (nested, "posix.system"),
        "pickle in a pickle": (twice, "pickle.loads"),
        "partial": (partial, "functools.partial"),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("kind", programs(""))
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, kind):
    trace = tmp_path / "trace"
    program, named = programs(f"touch {trace}")[kind]
    pickle.loads(program)  # it does work
    assert trace.exists()
    trace.unlink()
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=rf"weights\.pth: .* asks for _?{re.escape(named)};") as refused:
            read_weights(layout(tmp_path / "weights.pth", program))
        assert "\n" not in str(refused.value)
        assert not trace.exists()
    (tmp_path / "weights.pth").write_bytes(program)  # a bare pickle, as .bin and .pt may be
    with pytest.raises(ValueError, match="asks for"):
        read_weights(tmp_path / "weights.pth")
    assert not trace.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_cannot_change_the_reader(tmp_path, layout, name):
    """BUILD with a pair sets attributes: here those of a function that the reader lends."""
    change = b"ctorch._utils\n" + name.encode() + b"\n(N}S'_function'\nccollections\nOrderedDict\nstb."
    with pytest.raises(ValueError, match="change a function"):
        read_weights(layout(tmp_path / "a.pth", change))
    attribute = b"ccollections\nOrderedDict\n(N}S'items'\nNstb."
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_weights(layout(tmp_path / "a.pth", attribute))
    for path in REAL:
        assert_same(read_weights(path), expected(newer="zip" in path.stem))


def test_what_holds_no_weights_becomes_a_placeholder_without_content():
    """None of the names that are let through is an object of another module."""
    own = [value for value in torch_pickle._GLOBALS.values() if not isinstance(value, str)]
    assert {type(value) for value in own if not isinstance(value, type)} == {torch_pickle._Function}
    assert {value for value in own if isinstance(value, type)} == {torch_pickle._Inert, torch_pickle._Dictionary, tuple}
    inert = torch_pickle._Inert("x", y=1)
    inert.__setstate__({"append": 1})
    inert["key"] = 1
    assert not hasattr(inert, "__dict__")
    dictionary = torch_pickle._Dictionary(a=1)
    dictionary.__setstate__({"items": None})
    assert list(dictionary.items()) == [("a", 1)]


# Trees.

A, B = np.float32([1, 2]), np.float32([3, 4])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tree",
    [
        {"w": A},
        {"model": {"w": A}, "optimizer": {"state": {0: B}}},
        {"state_dict": OrderedDict({"module.w": A})},
        {"state_dict": {"_orig_mod.w": A}},
        {"model": None, "model_ema": {"module.w": A}},
        {"model": {"model": {"w": A}}, "loss": B},
        {"teacher": {"w": A}, "optimizer": {"state": {0: B}}},
        {"model": {"w": Call("torch._utils", "_rebuild_parameter", A, True, OrderedDict())}},
        {"w": A, "args": Call("argparse", "Namespace", state={"lr": 0.1}), "epoch": 3},
        {"w": A, "config": Call("yacs.config", "CfgNode", state={"depth": 3})},
    ],
)
def test_the_weights_are_found_in_a_training_checkpoint(tmp_path, layout, tree):
    assert_same(read_weights(saved(tmp_path / "a.pth", tree, layout)), {"w": A})


def test_dictionaries_in_dictionaries_give_dotted_names(tmp_path):
    found = read_weights(saved(tmp_path / "a.pt", {"backbone": {"w": A, 3: B}, "head": {"w": B}}))
    assert_same(found, {"backbone.w": A, "backbone.3": B, "head.w": B})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dictionary_that_holds_itself_is_one_line(tmp_path, layout):
    tree = {"w": A}
    tree["more"] = {"model": tree}
    with pytest.raises(ValueError, match=r"a\.pth holds a dictionary that holds itself$"):
        read_weights(saved(tmp_path / "a.pth", tree, layout))


# Damage.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("offset", "size", "stride", "said"),
    [
        (1, (2,), (1,), "w reaches element 3 of a storage of 2"),
        (0, (2, 2), (1, 1), "reaches element 3"),
        (0, (-1,), (1,), r"size \(-1,\)"),
        (-1, (1,), (1,), "offset -1"),
        (0, (2,), (-1,), r"stride \(-1,\)"),
        (0, (2,), (1, 1), r"stride \(1, 1\)"),
        (0, (1.5,), (1,), r"size \(1.5,\)"),
        (0, (2**62,), (2**62,), "reaches element"),
    ],
)
def test_a_view_stays_inside_its_storage(tmp_path, layout, offset, size, stride, said):
    path = layout(tmp_path / "a.pth", pickled({"w": tensor("0", 2, offset, size, stride)})[0], {"0": A})
    with pytest.raises(ValueError, match=said):
        read_weights(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("Not found"), "cannot be read"),
        (lambda path: path.write_bytes(pickle.dumps({"w": 1}, 2)), "neither a zip archive nor"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "0 members named data.pkl"),
        (lambda path: saved(path, {"epoch": 3, "lr": 0.1}), "holds no arrays, but a dictionary of epoch, lr"),
        (lambda path: saved(path, {}), "holds no arrays, but an empty dictionary"),
        (lambda path: saved(path, [A]), "holds no arrays, but a list"),
        (lambda path: write_zip(path, *pickled({"w": A}), byteorder="big"), "big-endian"),
        (lambda path: write_zip(path, pickled({"w": A})[0]), "archive/data/0"),
        (lambda path: write_zip(path, pickled({"w": tensor("0", 2, 0, (2,), (1,), "QInt8Storage")})[0]), "QInt8"),
        (lambda path: write_zip(path, pickled(Storage(("module", 1, 2, 3)))[0]), "no storage"),
    ],
)
def test_a_damaged_or_other_file_is_one_line(tmp_path, make, said):
    make(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: .*{re.escape(said)}") as error:
        read_weights(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_no_damage_is_worse_than_a_value_error(path, tmp_path):
    """Every truncation and every flipped byte, in steps: the arrays are read or one line says why not."""
    content = path.read_bytes()
    cases = [content[:end] for end in range(0, len(content), 61)]
    for place in range(0, len(content), 13):
        changed = bytearray(content)
        changed[place] ^= 0x15
        cases.append(bytes(changed))
    said = []
    for case in cases:
        (tmp_path / "a.pth").write_bytes(case)
        try:
            read_weights(tmp_path / "a.pth")
        except ValueError as error:
            said.append(str(error))
    assert len(said) > len(cases) / 4
    assert all("a.pth: " in line for line in said)


# The other formats.


def arrays():
    return {
        "half": np.arange(3).astype(np.float16),
        "brain": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "number": np.asarray(3, np.int64),
        "empty": np.zeros((0, 2), np.float32),
        "flag": np.asarray([True, False]),
    }


@pytest.mark.smoke
def test_safetensors_come_back_as_they_were(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", arrays())
    assert_same(read_weights(tmp_path / "a.safetensors"), arrays())
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        write_safetensors(tmp_path / "b.safetensors", {"text": np.asarray(["a"])})
    with pytest.raises(OSError):
        write_safetensors(tmp_path / "nowhere" / "b.safetensors", {"w": A})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_npz_come_back_as_they_were(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    assert_same(read_weights(tmp_path / "a.npz"), arrays())
    np.savez(tmp_path / "b.npz", w=np.asarray([types.SimpleNamespace()], dtype=object))
    with pytest.raises(ValueError, match=r"b\.npz: .*allow_pickle"):
        read_weights(tmp_path / "b.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_not_there_or_are_something_else(tmp_path, suffix):
    assert is_weight_file(f"runs/a{suffix}")
    (tmp_path / f"model{suffix}").write_text("<html>")
    with pytest.raises(ValueError, match=f"model{suffix}: cannot be read"):
        read_weights(tmp_path / f"model{suffix}")
    with pytest.raises(FileNotFoundError, match=f"modle{suffix}; nearest: .*model{suffix}"):
        read_weights(tmp_path / f"modle{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert not is_weight_file(tmp_path / f"folder{suffix}")


def test_another_ending_says_which_there_are(tmp_path):
    assert not is_weight_file("runs/a/checkpoints/500")
    (tmp_path / "a.ckpt").touch()
    assert is_weight_file(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: .*\.safetensors, \.npz"):
        read_weights(tmp_path / "a.ckpt")
