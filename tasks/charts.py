"""Pictures of a classifier's results for the evaluation report. The style is shared with
`training/evaluation/report.py`.

Figures are drawn without pyplot, so nothing global is touched and no display is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from tasks.base import Chart

TEXT, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
BLUE, ORANGE, GREEN, PURPLE = "#2563a8", "#c8541c", "#2a7f4f", "#7a4ea3"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
EDGE, INTERVAL, CELLS = "#b8c0c8", "#a9c4e0", "#eef1f4"
# From nothing to blue, so that what is small shows the page, light or dark.
COUNTS = LinearSegmentedColormap.from_list("counts", [f"{BLUE}00", f"{BLUE}40", f"{BLUE}99", BLUE, "#123a66"])
DARK = {
    TEXT: "#dfe5ea",
    MUTED: "#9aa7b3",
    GRID: "#2c343c",
    EDGE: "#4a545e",
    INTERVAL: "#3c5f85",
    CELLS: "#242b32",
    BLUE: "#6ea8e6",
    ORANGE: "#f08a5d",
    GREEN: "#5cc08b",
    PURPLE: "#b892dd",
}
"""Colour of a picture -> what it becomes where a reader has asked for dark pages."""

# Larger matrices have unreadable cells: numbers up to the first, the whole matrix up to the second.
MOST_NUMBERED_CLASSES, MOST_MATRIX_CLASSES = 20, 120
MOST_ROWS = 30
# Inches. Two figures of this width stand side by side in the report, one of the other fills the line.
HALF, WHOLE = 5.2, 10.6

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": EDGE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
percent = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Light layout and dark text for the figures drawn inside."""
    with matplotlib.rc_context(STYLE):
        yield


def classification_charts(results: Mapping[str, Any], source: Any, info: Any) -> list[Chart]:
    """Accuracy by class, confusion, reliability and the worst mistakes of one evaluated set."""
    names = class_labels(info)
    charts = []
    with style():
        charts.append(per_class_chart(results["per_class/accuracy"], results["per_class/count"], names))
        charts.append(reliability_chart(results))
        if "confusion" in results:
            charts += confusion_charts(np.asarray(results["confusion"]), names)
        if results["worst"]:
            charts.append(mistakes_chart(results["worst"], source, names))
    return charts


def class_labels(info: Any) -> list[str]:
    """The names of the classes, or their numbers where the source has no names."""
    return list(info.class_names) if info.class_names else [str(number) for number in range(info.num_classes)]


def shorten(name: str, length: int = 24) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def wilson_interval(correct: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """The 95% Wilson score interval of a fraction, which stays inside [0, 1] for few examples (Wilson 1927)."""
    fraction, scale = correct / count, 1 + z**2 / count
    centre = (fraction + z**2 / (2 * count)) / scale
    half = z / scale * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def per_class_chart(accuracy: Sequence[float | None], count: Sequence[int], names: Sequence[str]) -> Chart:
    """Accuracy of each class with its interval, lowest first; of many classes the lowest."""
    present = [place for place, total in enumerate(count) if total]
    order = sorted(present, key=lambda place: (accuracy[place], names[place]))[:MOST_ROWS]
    values, totals = np.array([accuracy[place] for place in order], float), np.array([count[place] for place in order])
    low, high = wilson_interval(values * totals, totals)
    rows = np.arange(len(order))
    figure = Figure(figsize=(HALF, 0.8 + 0.25 * max(len(order), 4)), layout="constrained")
    axes = figure.add_subplot()
    axes.hlines(rows, low, high, color=INTERVAL, linewidth=3)
    axes.plot(values, rows, "o", color=BLUE, markersize=5.5)
    axes.set_yticks(rows, [f"{shorten(names[place])}  ({count[place]})" for place in order])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(max(0.0, float(low.min()) - 0.02), 1.005)
    axes.xaxis.set_major_formatter(percent)
    axes.set_xlabel("top-1 accuracy, with 95% interval")
    more = f" The {len(order)} lowest of {len(present)} classes." if len(present) > len(order) else ""
    caption = f"Number of examples in brackets; classes in order of accuracy, the axis does not start at zero.{more}"
    return Chart("Accuracy by class", caption, figure)


def confusion_charts(matrix: np.ndarray, names: Sequence[str]) -> list[Chart]:
    """The confusion matrix where it can be read, and the pairs of classes that are confused most."""
    charts = []
    if len(matrix) <= MOST_MATRIX_CLASSES:
        charts.append(_matrix_chart(matrix, names))
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    if wrong.any():
        charts.append(_pairs_chart(wrong, matrix.sum(1), names))
    return charts


def _matrix_chart(matrix: np.ndarray, names: Sequence[str]) -> Chart:
    classes = len(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    numbered = classes <= MOST_NUMBERED_CLASSES
    width = max(HALF, 1.9 + 0.36 * classes) if numbered else 0.8 * WHOLE
    figure = Figure(figsize=(width, 0.88 * width), layout="constrained")
    axes = figure.add_subplot()
    # The square root keeps single mistakes visible beside a full diagonal.
    image = axes.imshow(np.sqrt(share), cmap=COUNTS, vmin=0, vmax=1, interpolation="nearest")
    step = 1 if classes <= 40 else int(np.ceil(classes / 40))
    ticks = list(range(0, classes, step))
    labels = [shorten(names[place], 16) for place in ticks]
    upright = max(map(len, labels)) <= 2 or (numbered and max(map(len, labels)) <= 4)
    axes.set_xticks(ticks, labels, rotation=0 if upright else 90)
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbered:
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=CELLS, linewidth=0.8, visible=True)
        axes.tick_params(which="minor", length=0)
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                colour = "white" if share[row, column] > 0.3 else TEXT
                axes.text(column, row, str(number), ha="center", va="center", fontsize=8.5, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=np.sqrt([0, 0.01, 0.05, 0.2, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    cells = "Cells are numbers of examples; colour" if numbered else "Colour"
    caption = f"{cells} is the share of the row, on a square-root scale so that single mistakes can be seen."
    return Chart("Confusion", caption, figure)


def _pairs_chart(wrong: np.ndarray, totals: np.ndarray, names: Sequence[str], most: int = 15) -> Chart:
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [pair for pair in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[pair]]
    figure = Figure(figsize=(HALF, 0.8 + 0.25 * max(len(pairs), 4)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(pairs))
    axes.barh(rows, [wrong[pair] for pair in pairs], color=BLUE, height=0.62)
    for row, (true, predicted) in enumerate(pairs):
        axes.text(wrong[true, predicted], row, f"  of {totals[true]}", va="center", fontsize=8.5, color=MUTED)
    axes.set_yticks(rows, [f"{shorten(names[true], 22)} → {shorten(names[other], 22)}" for true, other in pairs])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.12)
    axes.set_xlabel("examples")
    return Chart("Most confused classes", "True class → predicted class, by number of examples.", figure)


def reliability_chart(results: Mapping[str, Any]) -> Chart:
    """Accuracy against confidence, as the model is and with its temperature, over a histogram of confidence."""
    figure = Figure(figsize=(HALF, HALF), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
    curves = [
        (f"model as it is, ECE {results['ece']:.4f}", BLUE, "o", _curve(results, "reliability")),
        (
            f"temperature {results['calibrated/temperature']:.2f}, ECE {results['calibrated/ece']:.4f}",
            ORANGE,
            "D",
            results["calibrated/reliability"],
        ),
    ]
    for label, colour, marker, curve in curves:
        filled = [place for place, count in enumerate(curve["count"]) if count]
        confidence = [curve["confidence"][place] for place in filled]
        accuracy = [curve["accuracy"][place] for place in filled]
        sizes = [12 + 70 * np.sqrt(curve["count"][place] / sum(curve["count"])) for place in filled]
        upper.plot(confidence, accuracy, color=colour, linewidth=1.2, alpha=0.35)
        upper.scatter(confidence, accuracy, sizes, colour, marker, label=label, zorder=3, linewidth=0, clip_on=False)
    bins = len(curves[0][3]["count"])
    edges = np.arange(bins) / bins
    width = 0.4 / bins
    for place, (_, colour, _, curve) in enumerate(curves):
        left = edges + (0.1 + 0.4 * place) / bins
        lower.bar(left, curve["count"], width=width, align="edge", color=colour, alpha=0.85)
    upper.set_ylabel("accuracy of the predictions")
    upper.set_ylim(-0.02, 1.03)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, fontsize=8.5)
    lower.set_xlabel("confidence (largest probability)")
    lower.set_ylabel("examples")
    lower.set_yscale("symlog", linthresh=1)
    lower.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1))
    lower.yaxis.set_major_formatter(thousands)
    lower.set_xlim(0, 1)
    caption = (
        "Points below the dashed line are over-confident; their size grows with the number of examples. "
        "The temperature for one half of the set is chosen on the other half."
    )
    return Chart("Reliability", caption, figure)


def mistakes_chart(mistakes: Sequence[Mapping[str, Any]], source: Any, names: Sequence[str], columns: int = 8) -> Chart:
    """The images of the most confident mistakes."""
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(WHOLE, (WHOLE / columns + 0.52) * rows), layout="constrained")
    for place, mistake in enumerate(mistakes):
        axes = figure.add_subplot(rows, columns, place + 1)
        show_image(axes, np.asarray(source[mistake["index"]]["image"]))
        true, predicted = names[mistake["label"]], names[mistake["predicted"]]
        short = len(true) + len(predicted) <= 14
        title = f"{shorten(true, 17)}{' ' if short else chr(10)}→ {shorten(predicted, 15)}"
        axes.set_title(title, fontsize=8.5, color=TEXT, linespacing=1.25, pad=3)
        axes.set_xlabel(f"{mistake['confidence']:.3f}  #{mistake['index']}", fontsize=7.5, color=MUTED, labelpad=2)
    caption = (
        "Wrong predictions with the highest confidence. Above: true class → predicted class; "
        "below: confidence and index in the set."
    )
    return Chart("Worst mistakes", caption, figure)


def show_image(axes: Axes, image: np.ndarray) -> None:
    """Draws an image `[H, W, C]` (uint8, or float from 0 to 1) without axes; small ones keep their pixels."""
    image = image if image.dtype == np.uint8 else np.clip(image, 0.0, 1.0)
    grey = image.shape[-1] == 1
    nearest = max(image.shape[:2]) < 64
    axes.imshow(
        image[..., 0] if grey else image,
        cmap="gray" if grey else None,
        vmin=0,
        vmax=255 if image.dtype == np.uint8 else 1,
        interpolation="nearest" if nearest else "antialiased",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)


def _curve(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: results[f"{name}/{key}"] for key in ("confidence", "accuracy", "count")}
