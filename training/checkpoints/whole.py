"""Files that are written in one piece."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
