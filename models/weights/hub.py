"""Weights by name: in the Hugging Face cache, in a folder of the user's, or downloaded when that is asked for.

The cache is `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`; it holds
`models--OWNER--NAME/snapshots/REVISION/FILES`, where a file is a link to a blob that is named by its hash.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import naming
from models.core.aliases import repository
from models.weights.files import is_weight_file

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
"""What a folder of Hugging Face has its weights in, best first."""
INDEX = "model.safetensors.index.json"
"""Which of several files has what, for weights that are in several."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Found:
    """Files of weights.

    Attributes:
      files: that together hold them.
      config: what `config.json` beside them says; empty without one.
      note: a sentence that says where they were found; empty for a path that was given.
    """

    files: Sequence[Path]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def find(source: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, download: bool = False) -> Found:
    """The files that a path or a name stands for.

    Args:
      source: a file; a folder as `save_pretrained` writes it; or the name of a repository (`facebook/dinov2-small`),
        or of timm's (`vit_small_patch16_224.dino`).
      folder: where names are looked for, in place of the cache: one that holds `OWNER/NAME`, `NAME`,
        `models--OWNER--NAME`, or a file of that name.
      download: fetch what is not there with `huggingface_hub`.

    Raises:
      FileNotFoundError: nothing is there; the line says where it was looked for.
      ValueError: a folder without weights, files that are not what their hash says, or `huggingface_hub` is absent.
      OSError: the download failed.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    name = repository(str(source))
    if is_weight_file(path) or (name is None and not _REPOSITORY.fullmatch(str(source))):
        return Found([path])
    name = name or str(source)
    places = list(_places(name, Path(folder) if folder else None))
    for place in places:
        if place.is_file():
            return Found([place], note=f"{name} is {place}")
        if place.is_dir():
            snapshot = _snapshot(place, name)
            return dataclasses.replace(_in_folder(snapshot), note=f"{name} is {snapshot}")
    if download:
        snapshot = _downloaded(name, folder)
        return dataclasses.replace(_in_folder(snapshot), note=f"{name} was downloaded to {snapshot}")
    where = ", ".join(dict.fromkeys(str(place.parent) for place in places))
    raise FileNotFoundError(
        f"no file of weights {source}{naming.beside(path)}, and no {name} in {where}; download=True fetches it"
    )


def cache() -> Path:
    """The folder of the Hugging Face cache."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _places(name: str, folder: Path | None) -> Iterator[Path]:
    """Where a repository may be."""
    kept = f"models--{name.replace('/', '--')}"
    if folder is None:
        yield cache() / kept
        return
    short = name.rpartition("/")[2]
    yield from (folder / kept, folder / name, folder / short)
    yield from (folder / f"{short}{ending}" for ending in (".safetensors", ".bin", ".pth"))


def _snapshot(place: Path, name: str) -> Path:
    """The revision of a folder of the cache that `main` is, or the only one; another folder is one itself."""
    snapshots = place / "snapshots"
    if not snapshots.is_dir():
        return place
    main = place / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    there = sorted(one for one in snapshots.iterdir() if one.is_dir())
    if len(there) != 1:
        raise ValueError(
            f"{snapshots} has {len(there)} revisions of {name}, and refs/main is none; give one as a folder"
        )
    return there[0]


def _in_folder(folder: Path) -> Found:
    """The weights of a folder, whole."""
    names = list(FILES)
    if (folder / INDEX).is_file():
        names.insert(1, INDEX)
    for name in names:
        if (folder / name).exists():
            files = _parts(folder / name) if name == INDEX else [folder / name]
            for file in files:
                _check(file)
            return Found(files, _json(folder / CONFIG))
        if (folder / name).is_symlink():
            raise ValueError(f"{folder / name} is a link to a file that is not there; download=True fetches it again")
    there = sorted(file.name for file in folder.iterdir())[:8]
    raise ValueError(f"{folder}: a folder without {' or '.join(FILES)}; it holds {', '.join(there) or 'nothing'}")


def _parts(index: Path) -> list[Path]:
    """The files that an index names. ValueError for one that is not there."""
    files = [index.parent / name for name in dict.fromkeys(_json(index).get("weight_map", {}).values())]
    lacking = [file.name for file in files if not file.is_file()]
    if lacking or not files:
        raise ValueError(f"{index}: {', '.join(lacking) or 'no file'} is not there")
    return files


def _check(file: Path) -> None:
    """Compares a file of the cache with the hash that its blob is named by: SHA-256, or Git's of small files.

    Raises:
      ValueError: it is another, as one is that was cut off.
    """
    blob = file.resolve()
    known = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", known):
        return
    size = blob.stat().st_size
    digest = hashlib.sha256() if len(known) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with blob.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != known:
        raise ValueError(
            f"{file}: its {size} bytes are not those that were published (hash {digest.hexdigest()[:8]}, not "
            f"{known[:8]}): cut off or changed; remove {blob} and download it again"
        )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a dictionary, but {type(found).__name__}")
    return found


def _downloaded(name: str, folder: str | os.PathLike[str] | None) -> Path:
    """The folder that a repository was downloaded to: its weights in the best of its files, and its config."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"download=True for {name}: needs huggingface_hub; pip install huggingface_hub") from error
    where = cache() if folder is None else Path(folder)
    try:
        there = set(huggingface_hub.list_repo_files(name))
        weights = next((file for file in (FILES[0], INDEX, FILES[1]) if file in there), None)
        if weights is None:
            raise ValueError(f"{name} at the Hub has no {' or '.join(FILES)}")
        wanted = [CONFIG, weights] + (["*.safetensors"] if weights == INDEX else [])
        return Path(huggingface_hub.snapshot_download(name, cache_dir=where, allow_patterns=wanted))
    except ValueError:
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{name} cannot be downloaded: {said}") from error
