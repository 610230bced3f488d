"""Files that are written in one piece."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    # A name of a file that is not UTF-8 must not lose the results that mention it.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)
