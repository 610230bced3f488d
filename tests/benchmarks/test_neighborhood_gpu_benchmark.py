"""The parts of the GPU benchmark that need no GPU: the peer gets the same pattern, ratios are the right way up."""

import numpy as np
import pytest

from benchmarks import neighborhood_gpu
from kernels.neighborhood.pattern import make_pattern


@pytest.mark.parametrize(
    ("shape", "window", "options"),
    [((9, 8), (3, 4), dict(dilation=(2, 1), is_causal=(True, False))), ((21,), 5, dict(stride=2, dilation=3))],
)
@pytest.mark.parametrize("tiled", [False, True])
def test_the_peer_gets_the_same_mask(shape, window, options, tiled):
    pattern = make_pattern(shape, window, **options)
    order = np.arange(pattern.tokens)
    if tiled:
        order = neighborhood_gpu.tiled_order(pattern, (4, 3)[: len(shape)])
        assert sorted(order) == list(range(pattern.tokens))
    query, key = np.indices((pattern.tokens, pattern.tokens))
    found = neighborhood_gpu.mask_function(pattern, order)(0, 0, query, key)
    np.testing.assert_array_equal(found, pattern.mask()[np.ix_(order, order)])


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    sides = {name: {"forward": lambda name=name: calls.append(name)} for name in ("ours", "dense")}
    found = neighborhood_gpu.measure(sides, rounds=2)
    assert calls == ["ours", "dense"] * 3
    assert all(times["forward"] >= 0 for times in found.values())


def test_ratios_are_of_the_best_peer():
    case = neighborhood_gpu.CASES[0]
    times = {"ours": 1.0, "dense": 6.0, "flex 0": 3.0, "flex 1": 2.0}
    line = neighborhood_gpu.compare({side: {"forward": ms} for side, ms in times.items()}, case, "forward")
    assert (line["times flex"], line["times dense"]) == (2.0, 6.0)
    # 8 x 8 queries look at 14 x 14 keys of 56 x 56: dense attention computes 16 times as much.
    assert line["share of the possible gain"] == pytest.approx(6 / 16)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["neighborhood_gpu"])
    with pytest.raises(SystemExit, match="2"):
        neighborhood_gpu.main()
    assert "a GPU is needed" in capsys.readouterr().err
