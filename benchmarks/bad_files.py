"""Broken files for `python -m benchmarks.reliability bad`: pictures, weights, configuration files, and each file of a
workdir.

A case is `(group, name, words, heals)` of `benchmarks.bad_input.Case`; `words(scene)` writes the file and gives the
command that reads it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Words = Callable[[Any], list[str]]
Made = tuple[str, str, Words, bool]


def cases() -> Iterator[Made]:
    """All of them."""
    yield from pictures()
    yield from sets()
    yield from weights()
    yield from config_files()
    yield from logs()
    yield from checkpoints()


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (image or picture(1)).save(file, kind)
    return file.getvalue()


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A part of a PNG file."""
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(
    width: int = 16, height: int = 16, depth: int = 8, content: bytes | None = None, crc: int | None = None
) -> bytes:
    """A grey PNG whose header says what it is told to."""
    pixels = zlib.compress(b"\0" * 17 * 16) if content is None else content
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0), crc)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(values: np.ndarray) -> bytes:
    return encoded("TIFF", Image.fromarray(values))


def broken_pictures() -> dict[str, tuple[str, bytes]]:
    """File names and contents by what is wrong."""
    whole_png, whole_jpeg = encoded("PNG"), encoded("JPEG")
    grey = np.zeros((16, 16), np.float32)
    nan, infinite, negative, deep, wide = (
        grey.copy(),
        grey.copy(),
        grey - 5,
        grey.astype(np.uint16),
        grey.astype(np.int32),
    )
    nan[3, 3], infinite[3, 3], deep[0, 0], wide[0, 0] = np.nan, np.inf, 4000, 2**30
    return {
        "empty": ("x.png", b""),
        "one byte": ("x.png", b"\x89"),
        "text": ("x.png", b"hello\n"),
        "HTML": ("x.jpg", b"<!doctype html><html><body>404 Not Found</body></html>"),
        "PNG cut in its header": ("x.png", whole_png[:20]),
        "PNG cut in the middle": ("x.png", whole_png[: len(whole_png) // 2]),
        "JPEG cut in its header": ("x.jpg", whole_jpeg[:30]),
        "JPEG cut in the middle": ("x.jpg", whole_jpeg[: len(whole_jpeg) - 100]),
        "JPEG of its first bytes": ("x.jpg", whole_jpeg[:4]),
        "GIF cut": ("x.gif", encoded("GIF")[:40]),
        "BMP cut": ("x.bmp", encoded("BMP")[:60]),
        "WebP cut": ("x.webp", encoded("WEBP")[:40]),
        "TIFF cut": ("x.tif", encoded("TIFF")[:30]),
        "PNG with a wrong sum of its header": ("x.png", png(crc=1)),
        "PNG with broken pixels": ("x.png", png(content=b"no zlib")),
        "PNG with too few pixels": ("x.png", png(content=zlib.compress(b"\0" * 20))),
        "PNG of no pixels": ("x.png", png(width=0)),
        "PNG of 4 billion pixels": ("x.png", png(width=2**16, height=2**16)),
        "PNG with a width beyond all": ("x.png", png(width=2**31 - 1, height=2**31 - 1)),
        "PNG of 3 bits": ("x.png", png(depth=3)),
        "PNG without its end and pixels": ("x.png", png()[:33]),
        "zeros": ("x.png", bytes(4096)),
        "TIFF with NaN": ("x.tif", tiff(nan)),
        "TIFF with infinity": ("x.tif", tiff(infinite)),
        "TIFF below zero": ("x.tif", tiff(negative)),
        "12 bits in 16": ("x.tif", tiff(deep)),
        "32 bits": ("x.tif", tiff(wide)),
        "pixels of a NumPy file": ("x.png", b"\x93NUMPY" + bytes(100)),
    }


def pictures() -> Iterator[Made]:
    """A broken picture among good ones: of a class, of a held-out class, and in a folder to predict."""
    for number, (name, (file, content)) in enumerate(broken_pictures().items()):
        place = ("train", "test", "predict")[number % 3]
        words = functools.partial(_picture, place=place, file=file, content=content)
        yield "picture", f"{name} in {place}", words, False
    for name, make in {
        "a folder named as a picture": lambda path: path.mkdir(),
        "a link to nowhere": lambda path: path.symlink_to("nowhere.png"),
        "a link to itself": lambda path: path.symlink_to(path),
    }.items():
        yield "picture", name, functools.partial(_special, make=make), False


def folders(root: Path, count: int = 8) -> Path:
    for split, label in ((split, label) for split in ("train", "test") for label in ("cat", "dog")):
        (root / split / label).mkdir(parents=True)
        for i in range(count):
            picture(i).save(root / split / label / f"{i}.png")
    return root


def _picture(scene: Any, place: str, file: str, content: bytes) -> list[str]:
    if place == "predict":
        (scene.folder / "images").mkdir()
        picture().save(scene.folder / "images" / "0.png")
        (scene.folder / "images" / file).write_bytes(content)
        return ["eval.py", f"--workdir={scene.run()}", f"--predict={scene.folder / 'images'}"]
    root = folders(scene.folder / "images")
    (root / place / "cat" / file).write_bytes(content)
    return _with_folders(scene, root)


def _special(scene: Any, make: Callable[[Path], Any]) -> list[str]:
    """It is the only thing in its class."""
    root = folders(scene.folder / "images")
    (root / "train" / "bird").mkdir()
    make(root / "train" / "bird" / "x.png")
    return _with_folders(scene, root)


def _with_folders(scene: Any, root: Path) -> list[str]:
    return scene.train(data__name=f"folder:{root}", data__batch_size=8, data__eval_transforms="resize(16)|normalize")


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def sets() -> Iterator[Made]:
    """MNIST's files, and folders of classes as a whole."""
    images = idx(np.zeros((16, 16, 16), np.uint8))
    for name, content in {
        "empty": b"",
        "cut": images[:-1],
        "text": b"hello, world, this is text",
        "of 32 bits": b"\0\0\x0c\x03" + images[4:],
        "of one axis": idx(np.zeros(16, np.uint8)),
        "of fewer images": idx(np.zeros((8, 16, 16), np.uint8)),
        "with a shape beyond all": images[:4] + b"\xff" * 12 + images[16:],
    }.items():
        yield "set", f"IDX {name}", functools.partial(_idx, content=content), False
    yield "set", "IDX not compressed", functools.partial(_idx, content=images, end=".gz"), False
    for name, change in {
        "nothing in it": lambda root: _without(root.glob("*")),
        "no class in it": lambda root: _without(root.glob("train/*")),
        "a class that is empty": lambda root: (root / "train" / "bird").mkdir(),
        "a class that is only held out": lambda root: (root / "test" / "cat").rename(root / "test" / "cow"),
        "two folders of one split": lambda root: shutil.copytree(root / "test", root / "Testing"),
        "another extension": lambda root: [p.rename(p.with_suffix(".psd")) for p in list(root.rglob("cat/*.png"))],
    }.items():
        yield "set", f"folders: {name}", functools.partial(_folders, change=change), False


def _without(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path)


def _idx(scene: Any, content: bytes, end: str = "") -> list[str]:
    root = scene.folder / "idx"
    root.mkdir()
    for first in ("train", "t10k"):
        (root / f"{first}-labels-idx1-ubyte").write_bytes(idx(np.arange(16, dtype=np.uint8) % 4))
        (root / f"{first}-images-idx3-ubyte{end}").write_bytes(content)
    return scene.train(data__name=f"idx:{root}", data__mean="0.5", data__std="0.5")


def _folders(scene: Any, change: Callable[[Path], Any]) -> list[str]:
    root = folders(scene.folder / "images")
    change(root)
    return _with_folders(scene, root)


def weights() -> Iterator[Made]:
    """Files of weights that start a run, teach it, or are evaluated."""
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    safe = struct.pack("<Q", len(header)) + header + bytes(16)
    numpy_file, zipped = io.BytesIO(), io.BytesIO()
    np.savez(numpy_file, weights=np.zeros(4, np.float32))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", b"no pickle")
    objects = io.BytesIO()
    np.savez(objects, weights=np.array([{}, 1], object))
    contents = {
        "x.safetensors": {
            "empty": b"",
            "cut": safe[:-9],
            "cut in its header": safe[:20],
            "text": b"hello, this is no file of weights",
            "a header beyond all": struct.pack("<Q", 2**62) + header,
            "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(16),
            "offsets beyond the file": safe.replace(b"16]", b"99]"),
            "other names": safe,
            "an unknown type": safe.replace(b"F32", b"Q99"),
        },
        "x.pth": {
            "empty": b"",
            "text": b"hello",
            "a pickle of code": pickle.dumps(os.system),
            "a pickle of a list": pickle.dumps([1, 2]),
            "cut": pickle.dumps({"a": bytes(1000)})[:100],
            "an archive without tensors": zipped.getvalue(),
            "a cut archive": zipped.getvalue()[:-30],
            "a page of an error": b"<html>404</html>",
        },
        "x.npz": {
            "empty": b"",
            "cut": numpy_file.getvalue()[:-40],
            "text": b"hello",
            "objects": objects.getvalue(),
            "other names": numpy_file.getvalue(),
        },
    }
    number = 0
    for file, kinds in contents.items():
        for name, content in kinds.items():
            use, number = ("init_from", "checkpoint", "teacher")[number % 3], number + 1
            words = functools.partial(_weights, file=file, content=content, use=use)
            yield "weights", f"{file[1:]} {name} as {use}", words, False


def _weights(scene: Any, file: str, content: bytes, use: str) -> list[str]:
    path = scene.folder / file
    path.write_bytes(content)
    if use == "init_from":
        return scene.train(vit=True, model__init_from=path)
    if use == "teacher":
        teacher = f"configs/vit_ti16_imagenet.py:{path}"
        return scene.train(vit=True, task__options__teacher=teacher, task__options__distill="soft")
    data = ["--config.data.name=synthetic:classes=4,examples=64,size=16", f"--output={scene.folder / 'out'}"]
    return ["eval.py", f"--checkpoint={path}", "--config=configs/vit_ti16_imagenet.py", *data]


def config_files() -> Iterator[Made]:
    """Python files that give no configuration."""
    begin = b"from configs import base\ndef get_config(arg=''):\n    config = base.get_config()\n"
    for name, content in {
        "empty": b"",
        "a syntax error": b"def get_config(:\n",
        "wrong indentation": b"def get_config():\npass\n",
        "not UTF-8": begin + b"    config.log.wandb = 'caf\xe9'\n    return config\n",
        "zeros": bytes(100),
        "a picture": png(),
        "JSON": b'{"optim": {"learning_rate": null}}',
        "nothing returned": begin,
        "a number returned": b"def get_config():\n    return 5\n",
        "a dictionary returned": b"def get_config():\n    return {'seed': 1}\n",
        "no function": b"get_config = 5\n",
        "an argument too many": b"def get_config(a, b):\n    return a\n",
        "a key that is not there": begin + b"    config.optim.lr = 1\n    return config\n",
        "a group that is not there": begin + b"    config.optimizer.name = 'sgd'\n    return config\n",
        "a value of a wrong type": begin + b"    config.optim.learning_rate = 'big'\n    return config\n",
        "a value that no JSON holds": begin + b"    config.model.options.a = {1, 2}\n    return config\n",
        "a group for a value": begin + b"    config.seed = {'a': 1}\n    return config\n",
        "a value for a group": begin + b"    config.optim = 5\n    return config\n",
        "a module that is not there": b"import nowhere_at_all\n",
        "a division by zero": begin + b"    return 1 / 0\n",
        "a recursion without end": b"def get_config():\n    return get_config()\n",
        "an assertion": begin + b"    assert False\n",
        "an exit": b"import sys\nsys.exit(3)\n",
        "an exit with a word": begin + b"    raise SystemExit('no')\n",
    }.items():
        yield "configuration file", name, functools.partial(_config_file, content=content), False


def _config_file(scene: Any, content: bytes) -> list[str]:
    (scene.folder / "config.py").write_bytes(content)
    return ["train.py", f"--config={scene.folder / 'config.py'}", f"--workdir={scene.folder / 'run'}"]


def _folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: max(path.stat().st_size // 2, 1)]),
    "zeros": lambda path: path.write_bytes(bytes(200)),
    "not UTF-8": lambda path: path.write_bytes(b'{"\xff\xfe": 1}\n'),
    "another type": lambda path: path.write_text("[1, 2]\n"),
    "another word": lambda path: path.write_text('{"word": 5}\n'),
    "nested without end": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: _folder_for(path),
}


def logs() -> Iterator[Made]:
    """The small files of a workdir: what a run can do without heals, the rest is refused."""
    for file in ("config.json", "overrides.json", "data.json", "run.json", "goodput.json", "metrics.jsonl", "lock"):
        for name in DAMAGE:
            words = functools.partial(_log, file=file, damage=name)
            yield "file of a workdir", f"{file}: {name}", words, True
    for name in DAMAGE:
        words = functools.partial(_log, file="summary.json", damage=name)
        yield "file of a workdir", f"summary.json: {name}", words, True
    for file in ("config.json", "metrics.jsonl"):
        yield "file of a workdir", f"{file}: gone", functools.partial(_log, file=file, damage="gone"), True


def _log(scene: Any, file: str, damage: str) -> list[str]:
    workdir = scene.run()
    path = workdir / file
    if not path.exists():
        path.write_text('{"step": 4}')
    if damage == "gone":
        path.unlink()
    else:
        DAMAGE[damage](path)
    return scene.train(checkpoint__every_steps=2, optim__ema=0.9)


def checkpoints() -> Iterator[Made]:
    """Every file of the only checkpoint of a run, by number since their names are hashes."""
    for number in range(14):
        for name in ("gone", "cut", "zeros"):
            command = ("train.py", "eval.py")[number % 2]
            words = functools.partial(_checkpoint, number=number, damage=name, command=command)
            yield "checkpoint", f"file {number}: {name}, {command}", words, True


def _checkpoint(scene: Any, number: int, damage: str, command: str) -> list[str]:
    workdir = scene.run()
    files = sorted(path for path in (workdir / "checkpoints" / "2").rglob("*") if path.is_file())
    file = files[number % len(files)]
    if damage == "gone":
        file.unlink()
    elif file.stat().st_size:
        DAMAGE[damage](file)
    if command == "eval.py":
        return ["eval.py", f"--workdir={workdir}"]
    return scene.train(checkpoint__every_steps=2, optim__ema=0.9)
