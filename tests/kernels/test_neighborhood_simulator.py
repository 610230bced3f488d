"""The simulator of tilings against sets of keys that are written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.neighborhood import simulator
from kernels.neighborhood.pattern import Pattern, make_pattern
from kernels.neighborhood.tiles import make_tiles


@st.composite
def patterns(draw):
    shape, window, stride, dilation, is_causal = [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        shape.append(draw(st.integers(1, 9)))
        dilation.append(draw(st.integers(1, max(1, shape[-1] // 2))))
        window.append(draw(st.integers(1, shape[-1] // dilation[-1])))
        stride.append(draw(st.integers(1, window[-1])))
        is_causal.append(draw(st.booleans()))
    return make_pattern(shape, window, stride=stride, dilation=dilation, is_causal=is_causal)


def tiles_of(pattern: Pattern, extents):
    """Tiles of tokens of one group, as lists of coordinates."""
    along = []
    for axis, extent in zip(pattern.axes, extents, strict=True):
        groups = [range(group, axis.length, axis.dilation) for group in range(axis.dilation)]
        along.append([list(group[i : i + extent]) for group in groups for i in range(0, len(group), extent)])
    return [set(itertools.product(*parts)) for parts in itertools.product(*along)]


def seen(pattern: Pattern, query):
    return set(itertools.product(*(axis.neighbors(i).tolist() for axis, i in zip(pattern.axes, query, strict=True))))


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), data=st.data())
def test_aligned_tiles_are_those_that_the_sets_touch(pattern, data):
    rank = len(pattern.axes)
    query_tile, kv_tile = (data.draw(st.tuples(*[st.integers(1, 5)] * rank)) for _ in range(2))
    queries, keys = tiles_of(pattern, query_tile), tiles_of(pattern, kv_tile)
    windows = [set().union(*(seen(pattern, query) for query in tile)) for tile in queries]
    simulation = simulator.simulate(pattern, query_tile, kv_tile)
    assert simulation.is_aligned
    assert simulation.tiles == len(queries)
    assert simulation.visited == sum(not window.isdisjoint(tile) for window in windows for tile in keys)
    assert simulation.computed == simulation.visited * math.prod(query_tile) * math.prod(kv_tile)
    assert simulation.useful == sum(len(seen(pattern, query)) for tile in queries for query in tile)
    assert simulation.dense == pattern.tokens**2


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), data=st.data())
def test_free_boxes_hold_the_sets_and_no_smaller_ones_do(pattern, data):
    query_tile = data.draw(st.tuples(*[st.integers(1, 5)] * len(pattern.axes)))
    queries = tiles_of(pattern, query_tile)
    simulation = simulator.simulate(pattern, query_tile)
    for number, axis in enumerate(pattern.axes):
        members = [{key[number] // axis.dilation for query in tile for key in seen(pattern, query)} for tile in queries]
        assert simulation.kv_tile[number] == max(max(one) - min(one) + 1 for one in members)
    assert simulation.visited == simulation.tiles == len(queries)
    assert 0 < simulation.efficiency <= 1
    assert simulation.gain <= simulation.gain_of_flops


@settings(max_examples=40, deadline=None)
@given(pattern=patterns(), data=st.data())
def test_strides_are_the_smallest(pattern, data):
    rank = len(pattern.axes)
    query_tile, kv_tile = (data.draw(st.tuples(*[st.integers(1, 4)] * rank)) for _ in range(2))
    sharing = simulator.sharing_stride(pattern, query_tile)
    perfect = simulator.perfect_stride(pattern, query_tile, kv_tile)
    for axis, extent, keys, shared, exact in zip(pattern.axes, query_tile, kv_tile, sharing, perfect, strict=True):
        shares, is_perfect = [], []
        for stride in range(1, axis.window + 1):
            changed = make_pattern(
                [axis.length], axis.window, stride=stride, dilation=axis.dilation, is_causal=axis.is_causal
            )
            tiles = [[seen(changed, query) for query in tile] for tile in tiles_of(changed, [extent])]
            if all(len(set(map(frozenset, tile))) == 1 for tile in tiles):
                shares.append(stride)
            parts = tiles_of(changed, [keys])
            taken = [keys * sum(not part.isdisjoint(set().union(*tile)) for part in parts) for tile in tiles]
            if all(sum(map(len, tile)) == extent * some for tile, some in zip(tiles, taken, strict=True)):
                is_perfect.append(stride)
        assert shared == (shares[0] if shares else None)
        assert exact == (is_perfect[0] if is_perfect else None)


@pytest.mark.parametrize(
    ("shape", "window", "dilation", "tile"),
    [((64, 64), 7, 1, (8, 16)), ((56, 56), 7, 8, (7, 8)), ((16384,), 255, 1, (128,)), ((16, 32, 32), 5, 1, (4, 4, 8))],
)
def test_it_counts_what_the_tpu_kernel_computes(shape, window, dilation, tile):
    pattern = make_pattern(shape, window, dilation=dilation)
    made = make_tiles(pattern, tile)
    simulation = simulator.simulate(pattern, tile, multiple=8)
    assert simulation.tiles == made.count
    assert simulation.computed == made.count * made.queries * made.keys


def test_blocked_attention_is_perfect():
    """Stride = window = tile: every tile sees itself."""
    simulation = simulator.simulate(make_pattern((64, 64), 8, stride=8), (8, 8), (8, 8))
    assert simulation.efficiency == 1
    assert simulation.visited == simulation.tiles == 64
    assert simulation.gain == 64
    assert simulator.perfect_stride(make_pattern((64, 64), 8), (8, 8), (8, 8)) == (8, 8)
    assert simulator.sharing_stride(make_pattern((64, 64), 8), (4, 2)) == (4, 2)


def test_a_stride_that_is_a_tile_can_be_perfect():
    """Runs of 256 queries whose window of 768 begins at a multiple of the 128 keys of a tile."""
    pattern = make_pattern((4096,), 768)
    assert simulator.perfect_stride(pattern, (256,), (128,)) == (256,)
    assert simulator.simulate(pattern, (256,), (128,)).efficiency < 0.8


def test_tiles_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"query_tile=\(8,\); it needs 2 extents"):
        simulator.simulate(make_pattern((8, 8), 3), (8,))
    with pytest.raises(ValueError, match=r"kv_tile=\(8, 0\)"):
        simulator.simulate(make_pattern((8, 8), 3), (8, 8), (8, 0))


def test_one_query_a_tile_computes_nothing_in_vain():
    rng = np.random.default_rng(0)
    for _ in range(20):
        window = int(rng.integers(1, 8))
        pattern = make_pattern((int(rng.integers(window, 20)),), window)
        assert simulator.simulate(pattern, (1,)).efficiency == 1
