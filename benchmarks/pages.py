"""Tables of Markdown, and the places of a page in docs/ that a benchmark writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows under the names of their cells."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(one[name] for name in names)} |" for one in rows)])


def marks(title: str) -> tuple[str, str]:
    """What stands before and behind the text of this title."""
    return f"<!-- {title}: begin -->", f"<!-- {title}: end -->"


def write_between(page: Path, title: str, text: str) -> None:
    """Puts text into a page between the marks of this title. ValueError for a page without them."""
    (begin, end), before = marks(title), page.read_text()
    if begin not in before:
        raise ValueError(f"{page.name} has no mark {begin}")
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", before, flags=re.DOTALL))
