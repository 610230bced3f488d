"""Sets that Hugging Face's `datasets` saved to disk (`save_to_disk`), read without it."""

from __future__ import annotations

from pathlib import Path

from data import arrow
from data.names import printable
from data.source import Source
from data.split import select
from data.stored import find_path, json_of, options_of


def open_hf(argument: str, split: str, directory: str | None = None) -> Source:
    """`hf:PATH`: a folder that `save_to_disk` of Hugging Face's datasets wrote, one split or several.

    `hf:PATH,image=COLUMN,label=COLUMN` says which columns are the image and the label.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no such folder, a file is damaged, or there is no such split or column.
    """
    path, renamed = options_of("hf", argument, ("image", "label", "mask"))
    root = find_path("hf", path, directory)
    name = f"hf:{printable(str(root))}"
    rows = {key: arrow.Rows(files) for key, files in _splits(root).items()}
    fields = arrow.fields_of(rows, renamed, name)
    sizes = {key: len(one) for key, one in rows.items()}
    return select(split, sizes, lambda key: arrow.ArrowRecords(rows[key], fields, name, key, sizes))


def _splits(root: Path) -> dict[str, list[Path]]:
    """The files of each split."""
    if (root / "dataset_dict.json").is_file():
        return {key: _files(root / key) for key in json_of(root / "dataset_dict.json", "splits")}
    if (root / "state.json").is_file():
        return {json_of(root / "state.json", "_split") or "train": _files(root)}
    inner = [
        found.parent.name for found in sorted(root.glob("*/dataset_dict.json")) + sorted(root.glob("*/state.json"))
    ]
    near = f"; in it there is {', '.join(inner[:3])}" if inner else ""
    raise ValueError(
        f"{printable(str(root))} is no folder that save_to_disk of Hugging Face's datasets wrote (it has no state.json "
        f"and no dataset_dict.json){near}; for folders of parquet files there is parquet:PATH"
    )


def _files(folder: Path) -> list[Path]:
    """The Arrow files of one split, in the order of its rows."""
    state = folder / "state.json"
    if json_of(state, "_indices_data_files", None):
        raise ValueError(f"{printable(str(state))}: rows in another order than the files; save it again, flattened")
    files = [folder / one["filename"] for one in json_of(state, "_data_files")]
    if missing := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"{printable(str(missing))} is missing, which {printable(str(state))} names")
    return files
