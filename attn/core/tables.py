"""Tables as a notebook shows them. Colours are those of the page around, so that they can be read on light and dark."""

from collections.abc import Sequence
from html import escape

_CELL = "padding:2px 10px;border:0;vertical-align:top;white-space:pre-wrap;"
_RULE = "border-bottom:1px solid currentColor;"


def html_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), note: str = ""
) -> str:
    """A table as HTML; texts are escaped, and their line breaks kept.

    Args:
      numbers: which columns stand on the right.
      note: what is said below.
    """

    def row(cells: Sequence[str], tag: str, style: str = "") -> str:
        sides = ["right" if column in numbers else "left" for column in range(len(cells))]
        inside = (
            f'<{tag} style="{_CELL}text-align:{side};{style}">{escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f'<tr style="background:none">{"".join(inside)}</tr>'

    body = "".join(row(cells, "td") for cells in rows)
    below = f'<div style="opacity:0.7">{escape(note)}</div>' if note else ""
    return (
        f'<div style="font-size:90%;margin:4px 0 10px"><b>{escape(title)}</b>'
        f'<table style="color:inherit;border-collapse:collapse;font-variant-numeric:tabular-nums;margin:4px 0">'
        f"<thead>{row(header, 'th', _RULE)}</thead><tbody>{body}</tbody></table>{below}</div>"
    )
