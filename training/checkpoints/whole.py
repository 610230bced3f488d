"""Files that are written in one piece."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    # A name of a file that is not UTF-8 must not lose the results that mention it.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def set_aside(path: Path) -> Path:
    """Renames something that is in the way, so that nothing is lost, and returns its new name."""
    place, number = path.with_name(path.name + ".damaged"), 1
    while place.exists():
        place, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    return path.rename(place)
