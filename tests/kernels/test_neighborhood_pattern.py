"""The pattern of neighborhood attention: worked sets, invariants, reverse sets, and what is refused."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.neighborhood.pattern import Axis, interval, make_pattern

pytestmark = pytest.mark.smoke


def rows(text):
    """`"012 0,10 ..4"`: one set for each word; commas separate numbers of several digits, `a..b` is a range."""
    sets = []
    for word in text.split():
        if ".." in word:
            first, last = map(int, word.split(".."))
            sets.append(list(range(first, last + 1)))
        else:
            sets.append([int(number) for number in (word.split(",") if "," in word else word)])
    return sets


def repeated(*groups):
    """`(3, "0..3")`: the set three times."""
    return [row for count, text in groups for row in rows(text) * count]


CAUSAL = {"is_causal": True}
WORKED = {
    "A": (Axis(8, 3), rows("012 012 123 234 345 456 567 567")),
    "B": (Axis(8, 4), rows("0123 0123 0123 1234 2345 3456 4567 4567")),
    "C": (Axis(8, 3, dilation=2), rows("024 135 024 135 246 357 246 357")),
    "D": (Axis(9, 3, dilation=2), rows("024 135 024 135 246 357 468 357 468")),
    "E": (Axis(11, 3, dilation=3), rows("036 147 258 036 147 258 369 4,7,10 258 369 4,7,10")),
    "F": (Axis(8, 4, stride=2), rows("0123 0123 1234 1234 3456 3456 4567 4567")),
    "G": (Axis(8, 5, stride=3), repeated((3, "0..4"), (3, "2..6"), (2, "3..7"))),
    "H": (Axis(10, 4, stride=3), repeated((3, "0..3"), (3, "2..5"), (3, "5..8"), (1, "6..9"))),
    "I": (Axis(8, 4, stride=4), repeated((4, "0..3"), (4, "4..7"))),
    "I uneven": (Axis(10, 4, stride=4), repeated((4, "0..3"), (4, "4..7"), (2, "6..9"))),
    "J": (Axis(9, 5, stride=2), repeated((2, "0..4"), (2, "1..5"), (2, "3..7"), (3, "4..8"))),
    "K": (Axis(8, 3, **CAUSAL), rows("0 01 012 123 234 345 456 567")),
    "L": (Axis(8, 4, stride=2, **CAUSAL), rows("0 01 012 0123 234 2345 456 4567")),
    "M": (Axis(8, 4, stride=4, **CAUSAL), rows("0 01 012 0123 4 45 456 4567")),
    "N": (Axis(10, 4, stride=3, **CAUSAL), rows("0 01 012 23 234 2345 56 567 5678 6789")),
    "O": (Axis(8, 3, dilation=2, **CAUSAL), rows("0 1 02 13 024 135 246 357")),
    "P": (
        Axis(12, 3, stride=2, dilation=2),
        rows("024 135 024 135 468 579 468 579 6,8,10 7,9,11 6,8,10 7,9,11"),
    ),
    "P causal": (
        Axis(12, 3, stride=2, dilation=2, **CAUSAL),
        rows("0 1 02 13 24 35 246 357 68 79 6,8,10 7,9,11"),
    ),
    "Q": (Axis(7, 2, dilation=3), rows("03 14 25 03 14 25 36")),
}
REVERSE = {
    "A": rows("01 012 0123 234 345 4567 567 67"),
    "F": repeated((1, "01"), (2, "0..3"), (1, "0..5"), (1, "2..7"), (2, "4..7"), (1, "67")),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_sets(name):
    axis, expected = WORKED[name]
    assert [axis.neighbors(index).tolist() for index in range(axis.length)] == expected
    assert axis.pairs == sum(map(len, expected))


@pytest.mark.parametrize("name", REVERSE)
def test_worked_reverse_sets(name):
    axis = WORKED[name][0]
    assert [axis.reverse(index).tolist() for index in range(axis.length)] == REVERSE[name]


def test_worked_sets_on_maps():
    square = make_pattern((5, 5), 3)
    assert square.neighbors((0, 0)).tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert square.neighbors((4, 4)).tolist() == [12, 13, 14, 17, 18, 19, 22, 23, 24]
    assert make_pattern((5, 5), 3, is_causal=(True, False)).neighbors((1, 4)).tolist() == [2, 3, 4, 7, 8, 9]
    assert make_pattern((4, 6), (2, 3), dilation=2).neighbors((1, 4)).tolist() == [6, 8, 10, 18, 20, 22]
    strided = make_pattern((4, 6), (3, 4), stride=(1, 2))
    for column, seen in enumerate(repeated((2, "0..3"), (2, "1..4"), (2, "2..5"))):
        assert strided.neighbors((2, column)).tolist() == [6 * row + key for row in (1, 2, 3) for key in seen]


def axes(longest=40):
    """Any legal axis."""

    @st.composite
    def draw_axis(draw):
        length = draw(st.integers(1, longest))
        window = draw(st.integers(1, length))
        stride, dilation = draw(st.integers(1, window)), draw(st.integers(1, length // window))
        return Axis(length, window, stride, dilation, draw(st.booleans()))

    return draw_axis()


thorough = settings(max_examples=200, deadline=None, derandomize=True)


@thorough
@given(axes())
def test_invariants_of_an_axis(axis):
    mask = axis.mask
    seen = mask.sum(axis=1)
    assert mask.diagonal().all()
    if not axis.is_causal:
        assert (seen == axis.window).all()
        assert axis.pairs == axis.length * axis.window
    else:
        assert not np.triu(mask, 1).any()
        assert 1 <= seen.min() <= seen.max() <= axis.window
        if axis.stride == axis.dilation == 1:
            assert axis.pairs == axis.length * axis.window - math.comb(axis.window, 2)
    # A dilated axis is as many undilated ones as its dilation.
    for group in range(axis.dilation):
        tokens = np.arange(group, axis.length, axis.dilation)
        alone = Axis(len(tokens), axis.window, axis.stride, 1, axis.is_causal)
        np.testing.assert_array_equal(mask[np.ix_(tokens, tokens)], alone.mask)
        assert mask[tokens].sum() == alone.mask.sum()
    if not axis.is_causal and axis.stride == 1 and axis.window % 2 and axis.dilation == 1:
        np.testing.assert_array_equal(mask, mask[::-1, ::-1])


@thorough
@given(axes())
def test_queries_of_a_run_share_their_keys(axis):
    member, group = np.arange(axis.length) // axis.dilation, np.arange(axis.length) % axis.dilation
    if not axis.is_causal:
        for i, j in itertools.combinations(range(axis.length), 2):
            if group[i] == group[j] and member[i] // axis.stride == member[j] // axis.stride:
                np.testing.assert_array_equal(axis.mask[i], axis.mask[j])


@thorough
@given(axes())
def test_reverse_sets(axis):
    for token in range(axis.length):
        np.testing.assert_array_equal(axis.neighbors(token), np.flatnonzero(axis.mask[token]))
        np.testing.assert_array_equal(axis.reverse(token), np.flatnonzero(axis.mask[:, token]))


@given(st.integers(1, 30), st.data())
@thorough
def test_a_window_of_the_whole_axis(length, data):
    stride = data.draw(st.integers(1, length))
    assert Axis(length, length, stride).mask.all()
    np.testing.assert_array_equal(Axis(length, length, stride, 1, True).mask, np.tri(length, dtype=bool))


@given(st.integers(1, 8), st.integers(1, 5))
@thorough
def test_a_stride_of_the_window_is_blocked(window, blocks):
    expected = np.kron(np.eye(blocks), np.ones((window, window)))
    np.testing.assert_array_equal(Axis(window * blocks, window, window).mask, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(axes(longest=6), min_size=1, max_size=3))
def test_sets_of_a_map_are_products(parts):
    pattern = make_pattern(
        [axis.length for axis in parts],
        tuple(axis.window for axis in parts),
        stride=tuple(axis.stride for axis in parts),
        dilation=tuple(axis.dilation for axis in parts),
        is_causal=tuple(axis.is_causal for axis in parts),
    )
    mask = pattern.mask()
    assert pattern.pairs == mask.sum()
    assert pattern.is_dense == mask.all()
    for number, token in enumerate(np.ndindex(pattern.shape)):
        expected = {
            int(np.ravel_multi_index(key, pattern.shape))
            for key in itertools.product(*(axis.neighbors(i).tolist() for axis, i in zip(parts, token, strict=True)))
        }
        assert set(pattern.neighbors(token).tolist()) == expected == set(np.flatnonzero(mask[number]).tolist())
        np.testing.assert_array_equal(pattern.reverse(token), np.flatnonzero(mask[:, number]))


def test_intervals_of_arrays_are_those_of_their_elements():
    positions = np.arange(11)
    first, end = interval(positions, 11, 4, 3, True)
    for position in positions:
        assert interval(position, 11, 4, 3, True) == (first[position], end[position])


def test_a_window_that_does_not_fit_is_lowered_with_a_warning():
    with pytest.warns(UserWarning, match=r"using window 7 with dilation 2"):
        assert make_pattern((14,), 7, dilation=4, on_oversize="clamp").axes == (Axis(14, 7, 1, 2),)
    with pytest.warns(UserWarning, match=r"using window 5 with dilation 1"):
        assert make_pattern((5,), 7, stride=6, dilation=4, on_oversize="clamp").axes == (Axis(5, 5, 5, 1),)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((), {"window": 3}, "a map of one or more axes"),
        ((4, 0), {"window": 1}, "at least one token, got (4, 0)"),
        ((8,), {"window": 0}, "window=0; allowed: an integer of at least 1"),
        ((8, 8), {"window": (3, 3, 3)}, "has 3 entries for 2 axes; allowed: one, or 2"),
        ((8,), {"window": 3, "stride": 4}, "stride 4 is larger than window 3 on axis 0 of the map (8,); allowed: 1 to"),
        ((8,), {"window": 3, "dilation": 0.5}, "dilation=0.5; allowed: an integer of at least 1"),
        ((8,), {"window": True}, "window=True; allowed: an integer"),
        ((8,), {"window": 3, "is_causal": 1}, "is_causal=1; allowed: True or False"),
        (
            (9, 14),
            {"window": 7, "dilation": (1, 3)},
            "window 7 times dilation 3 is longer than axis 1 of the map (9, 14); allowed: window up to 4 with "
            "dilation 3, or dilation up to 2 with window 7, or on_oversize='clamp'",
        ),
        ((8,), {"window": 9, "dilation": 9}, "allowed: on_oversize='clamp'"),
        ((8,), {"window": 3, "on_oversize": "pad"}, "on_oversize='pad'; allowed: 'error', 'clamp'"),
    ],
)
def test_what_is_not_legal_names_what_is(shape, options, message):
    with pytest.raises(ValueError) as caught:
        make_pattern(shape, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
