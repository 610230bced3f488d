"""What can be chosen by name is listed by `python -m FOLDER`, and a misspelt choice is one line."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import data
import models
import tasks
from configs import shipped
from models.attention.registry import ATTENTION
from naming import listing

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "models": models.names,
    "configs": shipped.names,
    "tasks": tasks.names,
    "data": lambda: [*data.sources(), *data.TRANSFORMS],
    "models.attention": lambda: list(ATTENTION),
    "attn": lambda: ["dense_attention", "neighborhood_attention", "window_attention"],
}


def listed(folder, *arguments, monkeypatch, capsys):
    """The exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["list", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(folder, run_name="__main__")
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("folder", NAMES)
def test_everything_that_has_a_name_is_listed(folder, monkeypatch, capsys):
    code, out, err = listed(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (0, "")
    first = [line.split()[0] for line in out.splitlines() if line]
    assert set(NAMES[folder]()) <= set(first)


def test_patterns_narrow_a_list_and_several_tables_keep_their_titles(monkeypatch, capsys):
    code, out, _ = listed("models", "swin_t*", "vit_?16", "--names", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert out.split() == [*models.names("swin_t*"), *models.names("vit_?16")]
    code, out, _ = listed("data", "fl*", "fold*", monkeypatch=monkeypatch, capsys=capsys)
    assert [line.split()[0] for line in out.splitlines() if line] == [
        *("sources", "name", "folder"),
        *("transforms", "name", "flip"),
    ]
    code, out, _ = listed("data", "flip", monkeypatch=monkeypatch, capsys=capsys)
    assert out.startswith("transforms\n")
    assert "\n\n" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vit"], r"'vit': fits no name of models \(there is 'vit\*'\)"),
        (["swin_tny"], r"'swin_tny': fits no name of models \(nearest: swin_tiny"),
        (["vit*", "zzz"], "'zzz': fits no name of models; without a pattern all are listed"),
        (["--nmes"], r"--nmes: no such flag \(nearest: --names\)"),
        ([""], "'': fits no name"),
    ],
)
def test_what_fits_nothing_is_one_line(arguments, said, monkeypatch, capsys):
    code, out, err = listed("models", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {said}.*\n", err)


def test_a_reader_that_has_seen_enough_ends_a_list_quietly():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(
        [sys.executable, "-m", "configs"], cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE, text=True
    )
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (0, "")


def test_the_columns_of_a_table_stand_below_each_other():
    table = listing.Table("things", ("name", "what it is"), [("a", "b"), ("longer name", "c")])
    assert str(table) == "name         what it is\na            b\nlonger name  c"
    assert listing.sentence("Mirrors left\nand right. Twice.\n\nMore.") == "Mirrors left and right"
