"""Files as `torch.save` writes them, made without torch and with any content: for the tests of their reader."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


class Global:
    """Pickles as a name of a module."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call(Global):
    """Pickles as a call of what such a name means; `state` is then handed to the result."""

    def __init__(self, module, name, *arguments, state=None):
        super().__init__(module, name)
        self.arguments, self.state = arguments, state


class Storage(tuple):
    """Pickles as an object that is kept outside of the pickle."""


class Pickler(pickle._Pickler):
    """Pickles arrays as tensors, each with a storage of its own, in `storages`."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = {}

    def persistent_id(self, thing):
        return tuple(thing) if isinstance(thing, Storage) else None

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, np.ndarray):
            key = str(len(self.storages))
            self.storages[key] = thing = np.array(thing, order="C")
            stride = tuple(step // thing.itemsize for step in thing.strides)
            kind = KINDS[thing.dtype.name]
            self.save(tensor(key, thing.size, 0, thing.shape, stride, kind))
        elif isinstance(thing, Global):
            self.write(pickle.GLOBAL + f"{thing.module}\n{thing.name}\n".encode())
            if isinstance(thing, Call):
                self.save(thing.arguments)
                self.write(pickle.REDUCE)
            if getattr(thing, "state", None) is not None:
                self.save(thing.state)
                self.write(pickle.BUILD)
        else:
            super().save(thing, save_persistent_id)


def tensor(key, count, offset, size, stride, kind="FloatStorage"):
    """A tensor as a view of storage `key` with `count` elements."""
    storage = Storage(("storage", Global("torch", kind), key, "cpu", count))
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, OrderedDict())


def pickled(tree):
    """(program, storages by key)."""
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(tree)
    return file.getvalue(), pickler.storages


def write_zip(path, program, storages=(), **members):
    """The layout of today."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, array in dict(storages).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


def write_legacy(path, program, storages=()):
    """The layout before torch 1.6."""
    storages = dict(storages)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    content = b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps(list(storages), 2)
    for array in storages.values():
        content += array.size.to_bytes(8, "little") + array.tobytes()
    path.write_bytes(content)
    return path


LAYOUTS = [write_zip, write_legacy]


def saved(path, tree, layout=write_zip):
    """Writes a tree of containers and arrays."""
    return layout(path, *pickled(tree))
