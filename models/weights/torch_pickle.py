"""PyTorch's weight files without PyTorch, and without running what is in them.

A `.pth` file is a pickle, which is a program: reading one may call any function of any package. The reader here knows
a short list of names (tensors and their storages, plain containers, records of training arguments) and refuses a file
that asks for another before anything is called. What is no tensor and no dictionary becomes a placeholder without
content, so nothing in a file can reach an object of this process.

Both layouts of `torch.save` are read: the zip archive (`<any folder>/data.pkl` and one member per storage) and the
older one (pickles, then the storages' bytes one after another).
"""

import contextlib
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from typing_extensions import override

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_NEW_TYPES = (
    *("uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_INERT = {
    "_codecs": ("encode",),
    "argparse": ("Namespace",),
    "builtins": ("bytearray", "complex", "frozenset", "range", "set", "slice"),
    "collections": ("Counter", "defaultdict", "deque"),
    "easydict": ("EasyDict",),
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "torch": ("device",),
    "types": ("SimpleNamespace",),
    "yacs.config": ("CfgNode",),
}


class _Storage(NamedTuple):
    key: str
    dtype: str


class Tensor(NamedTuple):
    """A view of a storage, in elements. A tuple, because a pickle can change the attributes of other objects."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Dictionary(dict):
    """In place of OrderedDict: attributes that a pickle wants to set on it are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Inert:
    """In place of whatever holds no weights: may be built in every way that a pickle knows, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *arguments: Any, **options: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Function:
    """A function that a pickle may call and cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("its pickle tries to change a function")


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return _tensor(storage, offset, size, stride, storage.dtype)


def _rebuild_typed_tensor(
    storage: _Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *_: Any
) -> Tensor:
    return _tensor(storage, offset, size, stride, dtype)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, dtype: str) -> Tensor:
    numbers = [offset, *size, *stride]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor has offset {offset}, size {tuple(size)} and stride {tuple(stride)}")
    return Tensor(storage.key, dtype, offset, tuple(size), tuple(stride))


_GLOBALS: dict[tuple[str, str], Any] = {
    **{(module, name): _Inert for module, names in _INERT.items() for name in names},
    **{("torch", name): dtype for name, dtype in _TYPES.items()},
    ("torch.storage", "UntypedStorage"): "uint8",
    **{("torch", dtype): dtype for dtype in (*_TYPES.values(), *_NEW_TYPES)},
    ("collections", "OrderedDict"): _Dictionary,
    ("builtins", "dict"): _Dictionary,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self.storage_types: dict[str, str] = {}

    @override
    def find_class(self, module: str, name: str) -> Any:
        known = "builtins" if module == "__builtin__" else module, name  # as Python 2, and so torch, spells it
        if known not in _GLOBALS:
            raise ValueError(
                f"its pickle asks for {'.'.join(known)}; refused, since only tensors, plain containers and records of "
                "training arguments are read (a whole saved module is not: save its state_dict())"
            )
        return _GLOBALS[known]

    @override
    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise ValueError(f"its pickle asks for an object that is no storage: {str(pid)[:80]}")
        key, dtype = str(pid[2]), pid[1]
        if dtype not in (*_TYPES.values(), *_NEW_TYPES):
            raise ValueError(f"storage {key} is of the unknown type {dtype}")
        self.storage_types[key] = dtype
        return _Storage(key, dtype)


def read_tensors(path: Path, choose: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Arrays of a file that `torch.save` wrote, by name. They may be read-only, and share memory where the tensors did.

    Args:
      choose: `what was saved -> {name: tensor}`; only these are read. Its errors pass.

    Raises:
      ValueError: the file is no such file, is damaged, `choose` finds nothing in it, or its pickle asks for something
        that is not data.
    """
    with path.open("rb") as file:
        with _one_line(path):
            tree, read = (_open_archive if zipfile.is_zipfile(file) else _open_stream)(file)
        tensors = choose(tree)
        if not tensors:
            raise ValueError(f"{path}: holds {_kind(tree)}")
        with _one_line(path):
            raw = {key: read(key) for key in dict.fromkeys(tensor.storage for tensor in tensors.values())}
            return {name: _array(name, tensor, raw[tensor.storage]) for name, tensor in tensors.items()}


# What pickle and zipfile raise on bytes that are something else.
_DAMAGED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, MemoryError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as PyTorch weights: {error or type(error).__name__}") from error


def _open_archive(file: Any) -> tuple[Any, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} members named data.pkl, where torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    with contextlib.suppress(KeyError):
        if archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
    with archive.open(pickles[0]) as program:
        tree = _Unpickler(program).load()
    return tree, lambda key: archive.read(f"{folder}data/{key}")


def _open_stream(file: Any) -> tuple[Any, Callable[[str], bytes]]:
    file.seek(0)
    magic, protocol = _Unpickler(file).load(), None
    if magic == _MAGIC:
        protocol = _Unpickler(file).load()
    if protocol != _PROTOCOL:
        raise ValueError("neither a zip archive nor the older layout of torch.save")
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("it was written on a big-endian machine")
    unpickler = _Unpickler(file)
    tree = unpickler.load()
    places: dict[str, tuple[int, int]] = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        start, length = file.tell(), count * _dtype(unpickler.storage_types[key]).itemsize
        if start + length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"the file ends within storage {key}")
        places[key] = start, length
        file.seek(start + length)

    def read(key: str) -> bytes:
        start, length = places[key]
        file.seek(start)
        return file.read(length)

    return tree, read


def _array(name: str, tensor: Tensor, content: bytes) -> np.ndarray:
    dtype = _dtype(tensor.dtype)
    flat = np.frombuffer(content, dtype)
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    end = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    if end > flat.size:
        raise ValueError(f"{name} reaches element {end} of a storage of {flat.size}")
    strides = [step * dtype.itemsize for step in tensor.stride]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.asarray(view, order="C")


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _kind(tree: Any) -> str:
    """What there is instead of arrays by name."""
    if isinstance(tree, Tensor):
        return "a single tensor without a name"
    if not isinstance(tree, dict):
        return f"no arrays, but a {type(tree).__name__.strip('_').lower()}"
    if not tree:
        return "no arrays, but an empty dictionary"
    names = [str(key) for key in tree]
    return f"no arrays, but a dictionary of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
