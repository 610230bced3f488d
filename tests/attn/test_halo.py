"""Halo attention and relative logits: the functions against loops in float64, the modules, strides, padding, errors."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn
import models
from attn import Grid
from attn.bottleneck import bottleneck_attention
from attn.common.relative_logits import relative_logits
from attn.halo import halo_attention, haloed_windows
from benchmarks import halo_sides
from models.attention.bottleneck import BottleneckAttention
from models.attention.halo import HaloAttention
from models.core.call import Call, Memory

# Compiling takes longer than these programs run.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def run(function, *arguments, **others):
    """In float32, as one program: operation by operation every one would be compiled by itself."""
    arguments, others = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (arguments, others))
    return jax.jit(function, compiler_options=QUICK_COMPILE)(*arguments, **others)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def position(q, height_rel, width_rel, query, key, sides):
    """Logit of a key by its row and column in a window of `sides`, seen from a row and column of the queries."""
    down, right = (u - i + n - 1 for u, i, n in zip(key, query, sides, strict=True))
    return q @ height_rel[down] + q @ width_rel[right]


def halo_loops(q, k, v, height_rel, width_rel, *, block_size, halo_size, stride, scale, scale_positions):
    """Every query by itself: the keys of its block's window in order, zeros outside the map."""
    rows, columns, block, halo = *k.shape[1:3], block_size, halo_size
    window = block + 2 * halo
    out = np.zeros((*q.shape[:4], v.shape[-1]))
    for b, y, x, h in itertools.product(*map(range, q.shape[:4])):
        (top, i), (left, j) = divmod(y * stride, block), divmod(x * stride, block)
        i, j = i // stride, j // stride
        logits, values = [], []
        for u, w in itertools.product(range(window), repeat=2):
            row, column = top * block + u - halo, left * block + w - halo
            inside = 0 <= row < rows and 0 <= column < columns
            product = q[b, y, x, h] @ k[b, row, column, h] if inside else 0.0
            place = position(q[b, y, x, h], height_rel, width_rel, (i, j), (u, w), (window, window))
            logits.append(scale * product + (scale * place if scale_positions else place))
            values.append(v[b, row, column, h] if inside else np.zeros(v.shape[-1]))
        out[b, y, x, h] = softmax(np.array(logits)) @ np.array(values)
    return out


def operands(block, halo, stride, shape, width=3, values=2, heads=2, batch=2):
    rows, columns = shape
    q = numbers(batch, rows // stride, columns // stride, heads, width, seed=1)
    k, v = numbers(batch, rows, columns, heads, width, seed=2), numbers(batch, rows, columns, heads, values, seed=3)
    return q, k, v, *numbers(2, 2 * (block + 2 * halo) - 1, width, seed=4)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("block", "halo", "stride", "shape", "scale_positions"),
    [
        (4, 1, 1, (8, 4), False),
        (4, 2, 2, (4, 8), True),
        (3, 0, 1, (3, 6), False),
        (2, 3, 1, (4, 6), True),  # a halo larger than the block
        (3, 1, 3, (6, 3), False),
        (1, 1, 1, (3, 2), False),
    ],
)
def test_function_and_gradients_equal_loops(block, halo, stride, shape, scale_positions):
    arrays = operands(block, halo, stride, shape)
    settings = {
        "block_size": block,
        "halo_size": halo,
        "stride": stride,
        "scale": 0.6,
        "scale_positions": scale_positions,
    }

    def ours(q, k, v, height_rel, width_rel):
        return halo_attention(q, k, v, height_rel=height_rel, width_rel=width_rel, **settings)

    expected = halo_loops(*arrays, **settings)
    d_out = numbers(*expected.shape, seed=5)

    def both(d_out, *arrays):
        found, pullback = jax.vjp(ours, *arrays)
        return found, pullback(d_out)

    found, gradients = run(both, d_out, *arrays)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Along one random direction per operand: a difference quotient of the loops in float64.
    for number, gradient in enumerate(gradients):
        direction = numbers(*arrays[number].shape, seed=6)
        moved = [[*arrays] for _ in range(2)]
        for sign, changed in zip((1, -1), moved, strict=True):
            changed[number] = arrays[number] + sign * 1e-5 * direction
        plus, minus = (halo_loops(*changed, **settings) for changed in moved)
        slope = np.sum((plus - minus) * d_out) / 2e-5
        assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_scale_is_that_of_the_head_width_and_tables_may_be_left_out():
    q, k, v, table, _ = operands(4, 1, 1, (8, 8))
    none = np.zeros_like(table)
    expected = halo_loops(
        q, k, v, none, none, block_size=4, halo_size=1, stride=1, scale=3**-0.5, scale_positions=False
    )
    np.testing.assert_allclose(run(partial(halo_attention, block_size=4, halo_size=1), q, k, v), expected, atol=1e-5)


def test_the_benchmark_is_the_operator():
    q, k, v, height_rel, width_rel = operands(4, 1, 1, (8, 8))
    packed = [array.reshape(*array.shape[:3], -1) for array in (q, k, v)]
    out, *gradients = run(
        partial(halo_sides.both, heads=2, block=4, halo=1), *packed, height_rel, width_rel, np.ones_like(packed[2])
    )
    settings = {"block_size": 4, "halo_size": 1, "stride": 1, "scale": 3**-0.5, "scale_positions": False}
    expected = halo_loops(q, k, v, height_rel, width_rel, **settings)
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=1e-5)
    assert [one.shape for one in gradients] == [array.shape for array in (*packed, height_rel, width_rel)]


def test_windows_are_those_of_a_padded_map():
    x = numbers(2, 6, 4, 3)
    for block, halo in ((2, 1), (2, 5), (1, 0)):
        padded = np.pad(x, [(0, 0), (halo, halo), (halo, halo), (0, 0)])
        side = block + 2 * halo
        expected = [
            padded[b, i : i + side, j : j + side].reshape(side * side, 3)
            for b, i, j in itertools.product(range(2), range(0, 6, block), range(0, 4, block))
        ]
        found = run(partial(haloed_windows, block=block, halo=halo), x)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_map_of_all_pairs_is_made():
    """The largest array has `queries * window ** 2` numbers for each head."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 1, 4), jnp.float32)
    table = jax.ShapeDtypeStruct((2 * 14 - 1, 4), jnp.float32)

    def attend(q, k, v, rel):
        return halo_attention(q, k, v, block_size=8, halo_size=3, height_rel=rel, width_rel=rel).sum()

    jaxpr = jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2, 3)))(x, x, x, table)
    sizes = [int(np.prod(v.aval.shape)) for equation in jaxpr.eqns for v in equation.outvars]
    assert max(sizes) == 64 * 64 * 14 * 14
    # The gradient of windows is sums of slices: a scatter is in no step but that of the small tables.
    scatters = [e for e in jaxpr.eqns if "scatter" in e.primitive.name]
    assert all(e.outvars[0].aval.shape == table.shape for e in scatters)


@pytest.mark.smoke
@pytest.mark.parametrize("scale_positions", [False, True])
def test_bottleneck_attention_equals_loops(scale_positions):
    rows, columns = shape = (3, 4)
    q, k, v = (numbers(2, *shape, 2, 3, seed=seed) for seed in (1, 2, 3))
    height_rel, width_rel = numbers(2 * rows - 1, 3, seed=4), numbers(2 * columns - 1, 3, seed=5)
    settings = {"scale": 0.5, "scale_positions": scale_positions}
    found = run(partial(bottleneck_attention, **settings), q, k, v, height_rel=height_rel, width_rel=width_rel)
    places = list(itertools.product(range(rows), range(columns)))
    for b, h, query in itertools.product(range(2), range(2), places):
        own = q[b, *query, h]
        near = [position(own, height_rel, width_rel, query, key, shape) for key in places]
        logits = 0.5 * np.array([own @ k[b, *key, h] for key in places])
        logits = logits + np.array(near) * (0.5 if scale_positions else 1.0)
        expected = softmax(logits) @ np.array([v[b, *key, h] for key in places])
        np.testing.assert_allclose(found[b, *query, h], expected, atol=1e-5)


def test_an_edit_sees_blocks():
    q, k, v, height_rel, width_rel = operands(4, 1, 1, (8, 4), heads=3)

    def attend(q, k, v, height_rel, width_rel):
        seen = {}

        def edit(site, value):
            seen[site] = value
            # The second block of the first example gives nothing.
            return value.at[0, 1].set(0) if site == "probs" else value

        settings = {"height_rel": height_rel, "width_rel": width_rel, "edit": edit}
        return halo_attention(q, k, v, block_size=4, halo_size=1, **settings), seen

    out, seen = run(attend, q, k, v, height_rel, width_rel)
    assert not np.any(out[0, 4:])
    assert np.all(np.any(out, (3, 4)).reshape(2, 2, 16), -1).tolist() == [[True, False], [True, True]]
    assert list(seen) == ["logits", "probs"]
    assert seen["logits"].shape == seen["probs"].shape == (2, 2, 3, 16, 36)
    np.testing.assert_allclose(seen["probs"].sum(-1), 1, atol=1e-5)
    # Keys of zeros outside the map are not masked.
    assert float(seen["probs"].min()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 3}, r"block_size=3: does not divide a map of \(8, 4\)"),
        ({"stride": 3}, "stride=3: does not divide a block of 4"),
        ({"stride": 2}, r"queries on a map of \(8, 4\) with stride 2 do not fit keys on one of \(8, 4\)"),
        ({"width_rel": None}, "give height_rel and width_rel, or neither"),
        ({"halo_size": 2}, r"keys on a map of \(8, 8\) need tables of 15 and 15 rows, not 11 and 11"),
    ],
)
def test_a_wrong_argument_is_one_line(change, message):
    q, k, v, height_rel, width_rel = (array.astype(np.float32) for array in operands(4, 1, 1, (8, 4)))
    options = {"block_size": 4, "halo_size": 1, "height_rel": height_rel, "width_rel": width_rel} | change
    with pytest.raises(ValueError, match=message):
        attn.halo_attention(q, k, v, **options)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="larger than that of keys"):
        relative_logits(numbers(1, 3, 2, 1, 2), numbers(3, 2), numbers(3, 2), (2, 2))


# --- modules ----------------------------------------------------------------------------------------------------------


def module(kind, *arguments, **options):
    """Every parameter random."""
    graph, params, state = models.split(nnx.eval_shape(lambda: kind(*arguments, rngs=nnx.Rngs(0), **options)))
    values = {n: jnp.asarray(numbers(*v.shape, seed=i), jnp.float32) for i, (n, v) in enumerate(params.items())}
    return models.merge(graph, values, state)


def call(module, x, grid):
    graph, params, state = models.split(module)
    return run(lambda params, x: models.merge(graph, params, state)(x, Call(grid)), params, x)


def tokens(*sides, width=8):
    return jnp.asarray(numbers(2, sides[0] * sides[1], width, seed=9), jnp.float32)


def test_padding_is_zeros_behind_the_map():
    """As a map with zeros does it, cropped; with a stride every other place of it, counted from the first."""
    for stride, sides in ((1, (5, 7)), (2, (5, 6))):
        made = module(HaloAttention, 8, 2, block_size=4, halo_size=1, stride=stride, padding=True)
        x = tokens(*sides)
        whole = jnp.pad(x.reshape(2, *sides, 8), [(0, 0), (0, -sides[0] % 4), (0, -sides[1] % 4), (0, 0)])
        expected = call(made, whole.reshape(2, -1, 8), Grid(whole.shape[1:3]))
        expected = expected.reshape(2, whole.shape[1] // stride, whole.shape[2] // stride, 8)
        rows, columns = (-(-side // stride) for side in sides)
        found = call(made, x, Grid(sides))
        np.testing.assert_allclose(found, expected[:, :rows, :columns].reshape(found.shape), atol=1e-6)


def test_blocks_of_odd_side_are_averaged():
    plain, averaged = (module(HaloAttention, 8, 2, block_size=3, halo_size=1, stride=stride) for stride in (1, 2))
    x, grid = tokens(6, 12), Grid((6, 12))
    means = call(plain, x, grid).reshape(2, 3, 2, 6, 2, 8).mean((2, 4)).reshape(2, 18, 8)
    np.testing.assert_allclose(call(averaged, x, grid), means, atol=1e-5)
    assert (plain.multiple, averaged.multiple) == (3, 6)


def test_widths_of_queries_and_values():
    made = module(HaloAttention, 8, 2, width_out=12, head_width=5, block_size=2, halo_size=1)
    assert made.q.kernel.shape == (8, 10)
    assert made.kv.kernel.shape == (8, 22)
    assert made.height_rel.shape == (7, 5)
    assert jax.eval_shape(lambda x: made(x, Call(Grid((4, 2)))), tokens(4, 2)).shape == (2, 8, 12)
    assert module(HaloAttention, 48, 4, qk_ratio=0.33).head_width == 4


@pytest.mark.parametrize(
    ("make", "sides", "message"),
    [
        (
            lambda: module(HaloAttention, 8, 2, block_size=4),
            (4, 6),
            r"sides of a map of \(4, 6\) are no multiples of 4",
        ),
        (lambda: module(HaloAttention, 8, 3), (8, 8), "width_out of an attention 8 is not divisible by 3 heads"),
        (lambda: module(HaloAttention, 8, 2, stride=4), (8, 8), "stride=4 of an attention; allowed: 1, 2"),
        (lambda: module(HaloAttention, 8, 16, width_out=16, qk_ratio=0.1), (8, 8), "gives 16 heads no channels"),
        (lambda: module(BottleneckAttention, 8, 2), (8, 8), "needs rows and columns of the map it is for"),
        (lambda: module(BottleneckAttention, 8, 2, shape=(4, 4)), (8, 4), r"map of \(4, 4\), not \(8, 4\): give the"),
        (lambda: module(BottleneckAttention, 8, 2, shape=(3, 4), stride=2), (3, 4), "have to be multiples of 2"),
    ],
)
def test_what_a_module_refuses(make, sides, message):
    with pytest.raises(ValueError, match=message) as error:
        make()(tokens(*sides), Call(Grid(sides)))
    assert "\n" not in str(error.value)


def test_tokens_without_a_place_are_refused():
    made = module(HaloAttention, 8, 2, block_size=2, halo_size=1)
    x = tokens(2, 2)
    for call, message in (
        (Call(Grid((1, 3), 1)), "halo attention has no place for 1 prefix tokens"),
        (Call(Grid((2, 2)), memory=Memory(x)), r"halo attention attends to no other stream \(memory\)"),
        (Call(Grid((2, 2)), mask=attn.causal()), "halo attention takes no mask of kind causal"),
    ):
        with pytest.raises(ValueError, match=message):
            made(x, call)
