"""Tuned tiles: the nearest entry that fits, and files that hold what they say."""

import dataclasses
import json

import pytest

from kernels.neighborhood import tuning
from kernels.neighborhood.pattern import make_pattern
from kernels.neighborhood.tiles import make_tiles

CHIPS = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))


def problem(shape=(64, 64), window=7, dilation=1, head_dim=64, dtype="bfloat16", direction="forward", **options):
    return tuning.problem(make_pattern(shape, window, dilation=dilation, **options), head_dim, dtype, direction)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder with entries of a chip `mine`; gives a function that writes them."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)

    def write(*entries):
        records = [
            {**dataclasses.asdict(one), "tile": tile, "residues": residues, "cycles": 1}
            for one, tile, residues in entries
        ]
        (tmp_path / "mine.json").write_text(json.dumps({"entries": records}))
        tuning.entries.cache_clear()

    yield write
    tuning.entries.cache_clear()


def test_a_known_problem_has_its_own_entry(store):
    store((problem(), (8, 16), 1), (problem(head_dim=128), (4, 32), 1), (problem(direction="backward"), (8, 8), 1))
    assert tuning.lookup("mine", problem()) == ((8, 16), 1)
    assert tuning.lookup("mine", problem(head_dim=128)) == ((4, 32), 1)
    assert tuning.lookup("mine", problem(direction="backward")) == ((8, 8), 1)


def test_an_unknown_problem_takes_the_nearest(store):
    store((problem(), (8, 16), 1), (problem(shape=(32, 32)), (4, 32), 1))
    assert tuning.lookup("mine", problem(shape=(80, 80))) == ((8, 16), 1)
    assert tuning.lookup("mine", problem(shape=(40, 32))) == ((4, 32), 1)
    assert tuning.lookup("mine", problem(window=9)) == ((8, 16), 1)


@pytest.mark.parametrize(
    "other",
    [
        problem(shape=(512, 512)),
        problem(window=31),
        problem(dtype="float32"),
        problem(direction="backward"),
        problem(is_causal=True),
        problem(shape=(4096,), window=7),
        problem(shape=(8, 64, 64), window=7),
    ],
)
def test_a_problem_that_is_not_near_has_none(store, other):
    store((problem(), (8, 16), 1))
    assert tuning.lookup("mine", other) is None
    assert tuning.lookup("another", problem()) is None


def test_a_tile_that_does_not_fit_is_passed_over(store):
    store((problem(shape=(32, 32)), (16, 16), 1), (problem(shape=(28, 28)), (7, 8), 1))
    assert tuning.lookup("mine", problem(shape=(32, 32))) == ((16, 16), 1)
    assert tuning.lookup("mine", problem(shape=(35, 32))) == ((7, 8), 1)
    assert tuning.lookup("mine", problem(shape=(28, 28))) == ((7, 8), 1)  # its own, whatever it pads
    assert tuning.lookup("mine", problem(shape=(29, 29))) is None
    store((problem(shape=(60, 60), dilation=4), (5, 8), 2), (problem(dilation=2), (8, 16), 1))
    assert tuning.lookup("mine", problem(shape=(60, 60), dilation=4)) == ((5, 8), 2)
    assert tuning.lookup("mine", problem(shape=(96, 96), dilation=3)) == ((8, 16), 1)


@pytest.mark.parametrize("chip", CHIPS)
def test_shipped_entries_are_legal_and_found(chip):
    content = json.loads((tuning.FOLDER / f"{chip}.json").read_text())
    assert content["command"].startswith("python -m benchmarks.neighborhood_tune")
    assert "libtpu" in content["versions"]
    for entry in tuning.entries(chip):
        of = entry.problem
        pattern = make_pattern(of.shape, of.window, stride=of.stride, dilation=of.dilation, is_causal=of.is_causal)
        assert tuning.problem(pattern, of.head_dim, of.dtype, of.direction) == of
        assert make_tiles(pattern, entry.tile, residues=entry.residues).count > 0
        assert tuning.lookup(chip, of) == (entry.tile, entry.residues)
        assert entry.cycles > 0
