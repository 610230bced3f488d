"""The report: one file with everything inside, for few and for many classes, and pictures that say what the numbers
say."""

import base64
import json
import re
import types
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from scipy.stats import binomtest

from tasks import calibration, charts, metrics
from training.evaluation import curves, report, results


def evaluated(classes, examples=200, worst=8):
    """Results of a classifier that is right about half of the time; the last class has no examples."""
    random = np.random.default_rng(0)
    batch = {"label": random.integers(0, classes - 1, examples), "index": np.arange(examples)}
    logits = random.normal(size=(examples, classes)) * 2
    logits[np.arange(examples), batch["label"]] += 3
    found = {}
    for name, metric in {
        "top1": metrics.top_k_accuracy(1),
        "ece": calibration.expected_calibration_error(),
        "reliability": calibration.reliability(),
        "calibrated": calibration.temperature_scaling(),
        "per_class": metrics.per_class_accuracy(classes),
        "confusion": metrics.confusion_matrix(classes),
        "worst": metrics.worst_mistakes(worst),
    }.items():
        state = metric.update(metric.init(), {"logits": logits.astype(np.float32)}, batch)
        value = metric.finish(jax.device_get(state))
        found |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return found


class Images:
    """A source of noise images, grey or in colour."""

    def __init__(self, channels):
        self.channels = channels

    def __getitem__(self, index):
        return {"image": np.random.default_rng(index).integers(0, 255, (8, 8, self.channels), np.uint8)}


def info(classes, names=True):
    chosen = tuple(f"class <{number}> & friends of a long name" for number in range(classes)) if names else ()
    return types.SimpleNamespace(class_names=chosen, num_classes=classes)


class Page(HTMLParser):
    """Collects pictures, whatever would be fetched from elsewhere, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href"):
                prefix, found, content = value.partition("data:image/svg+xml;base64,")
                (self.pictures if found and not prefix else self.links).append(content)

    def handle_data(self, text):
        self.words.append(text)


HISTORY = [
    {"step": 10, "kind": "train", "loss": 2.0, "top1": 0.1, "learning_rate": 1e-3, "images_per_second": 900.0},
    {"step": 20, "kind": "train", "loss": 0.05, "top1": 0.9, "learning_rate": 1e-4, "images_per_second": 1000.0},
    {"step": 20, "kind": "eval/test", "loss": 0.3, "top1": 0.8},
]


@pytest.mark.parametrize(("classes", "pictures"), [(3, 5), (130, 4)])
def test_the_report_is_self_contained(classes, pictures):
    found = evaluated(classes)
    drawn = charts.classification_charts(found, Images(1 if classes == 3 else 3), info(classes, names=classes == 3))
    curves = report.training_curves(HISTORY, "top1", "images")
    text = report.render(
        "a <model>",
        {"step": "20", "command": "python eval.py --workdir='a <b>'"},
        {"test": {"top1": found["top1"], "ece": None}},
        {"test": drawn},
        curves,
        {"optim.learning_rate": 1.0, "seed": 0},
        {"optim.learning_rate": 0.001, "seed": 0},
    )
    page = Page(text)
    assert not page.links
    assert "http" not in text.split("</style>")[1]
    assert len(page.pictures) == pictures + 4
    for picture in page.pictures:
        root = ElementTree.fromstring(base64.b64decode(picture))
        assert root.tag.endswith("svg")
        links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    words = " ".join(page.words)
    assert "a <model>" in words  # escaped in the source, so that it reads as it was written
    assert "python eval.py --workdir='a <b>'" in words
    assert f"{found['top1']:.4f}" in words
    assert text.count('class="changed"') == 1


def test_curves_show_what_was_logged():
    loss, top1, rate, speed = report.training_curves(HISTORY, "top1", "images")
    axes = loss.figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["train", "test"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[10, 2.0], [20, 0.05]])
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert top1.figure.axes[0].yaxis.get_major_formatter()(0.25) == "25%"
    assert speed.figure.axes[0].get_ylabel() == "images / s"
    assert len(rate.figure.axes[0].lines) == 1
    assert report.training_curves([], "top1", "images") == []


def test_a_curve_has_its_numbers_for_whoever_points_at_it():
    history = [*HISTORY, {"step": 30, "kind": "eval/</script>", "loss": float("nan")}]
    loss, top1, rate, speed = report.training_curves(history, "top1", "images")
    assert (loss.log, loss.zero, loss.percent) == (True, False, False)
    assert (top1.percent, rate.zero, speed.zero) == (True, True, True)
    text = curves.figure(loss, "<img>")
    assert text.count("</script") == 1
    values = json.loads(text.partition('json">')[2].partition("</script")[0])
    assert values["series"] == [
        {"name": "train", "points": [[10, 2.0], [20, 0.05]]},
        {"name": "</script>", "points": [[30, None]]},
        {"name": "test", "points": [[20, 0.3]]},
    ]
    assert text.endswith("<noscript><img></noscript></figure>")


def test_pictures_follow_the_colours_that_a_reader_prefers():
    with charts.style():
        drawn = charts.confusion_charts(np.array([[5, 1], [7, 2]]), ["cat", "dog"])[1]
    content = report._picture(drawn).partition("base64,")[2].partition('"')[0]
    svg = base64.b64decode(content).decode()
    ElementTree.fromstring(svg)
    for colour in (charts.TEXT, charts.BLUE, charts.GRID):
        place = list(charts.DARK).index(colour)
        assert f"var(--c{place}, {colour})" in svg
        assert f"--c{place}: {charts.DARK[colour]};" in svg.partition("prefers-color-scheme: dark")[2]
    assert not re.search(r"(?<!, )#ffffff", svg)  # the page shows through
    style = report.page("a", []).partition("</style>")[0]
    assert "@media (prefers-color-scheme: dark)" in style
    assert set(re.findall(r"var\(--(\w+)\)", style)) <= set(re.findall(r"--(\w+):", style))


def test_a_history_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert report.read_history(path) == []
    path.write_text(json.dumps(HISTORY[0]) + "\n" + '{"step": 2')
    assert report.read_history(path) == HISTORY[:1]


def test_accuracy_by_class_is_sorted_and_leaves_out_empty_classes():
    chart = charts.per_class_chart([0.5, None, 0.25, 1.0], [4, 0, 8, 2], ["a", "b", "c", "d"])
    axes = chart.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c  (8)", "a  (4)", "d  (2)"]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.25, 0.5, 1.0])


def test_the_interval_is_wilsons():
    low, high = charts.wilson_interval(np.array([0, 7, 20]), np.array([5, 9, 20]))
    for place, (correct, count) in enumerate([(0, 5), (7, 9), (20, 20)]):
        expected = binomtest(correct, count).proportion_ci(method="wilson")
        assert (low[place], high[place]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_most_confused_pair_comes_first():
    matrix = np.array([[5, 1, 0], [7, 2, 0], [0, 3, 9]])
    pairs = charts.confusion_charts(matrix, ["cat", "dog", "owl"])[1].figure.axes[0]
    assert [label.get_text() for label in pairs.get_yticklabels()] == ["dog → cat", "owl → dog", "cat → dog"]
    assert [bar.get_width() for bar in pairs.patches] == [7, 3, 1]
    assert len(charts.confusion_charts(np.diag([3, 4]), ["cat", "dog"])) == 1


def test_what_an_older_file_lacks_is_not_said():
    about = {"model": "vit_mu16", "step": 1200, "weights": "ema", "config_hash": "0"}
    assert results.said(about) == {"model": "vit_mu16", "step": "1,200", "weights": "moving average"}
    more = results.said({**about, "parameters": 5000, "seconds": 61.2, "versions": {"jax": "1"}, "command": ""})
    assert (more["parameters"], more["in"], more["versions"]) == ("5,000", "1m01s", "jax 1")
    assert "command" not in more


def test_the_table_aligns_chosen_columns():
    found = {"test": {"top1": 0.5, "loss": 1.0, "confusion": [[1]]}, "another": {"top1": 0.25, "loss": 12345.6}}
    lines = results.table(found, ("loss", "top5", "top1")).splitlines()
    expected = [["set", "loss", "top1"], ["test", "1.0000", "0.5000"], ["another", "12,346", "0.2500"]]
    assert [line.split() for line in lines] == expected
    assert len({len(line) for line in lines}) == 1
    assert results.table(found, ()).splitlines()[0].split() == ["set", "top1", "loss"]
