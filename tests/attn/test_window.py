"""Attention within windows: the function against loops, the module against the function, padding, shifts, errors."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from attn import Grid, causal, window_attention
from attn.common.windows import from_windows, to_windows
from models.attention.registry import make_attention
from models.attention.window import WindowAttention
from models.core.call import Call, Memory


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def module(**options):
    """Two heads of four, every parameter random."""
    made = WindowAttention(8, options.pop("heads", 2), rngs=nnx.Rngs(0), **options)
    graph, params, state = models.split(made)
    numbers = {name: jnp.asarray(arrays(*value.shape, seed=i)) for i, (name, value) in enumerate(params.items())}
    return models.merge(graph, numbers, state)


def loops(q, k, v, *, window, meet, bias=None, scale=None):
    """Attention of each place to those that `meet(place, other)` says, with the bias of their displacement."""
    batch, rows, columns, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    out = np.zeros_like(v)
    places = list(itertools.product(range(rows), range(columns)))
    for b, h, (y, x) in itertools.product(range(batch), range(heads), places):
        others = [(i, j, d) for i, j in places if (d := meet((y, x), (i, j))) is not None]
        logits = np.array([q[b, y, x, h] @ k[b, i, j, h] * scale for i, j, _ in others])
        if bias is not None:
            logits += [bias[h, dy + window[0] - 1, dx + window[1] - 1] for _, _, (dy, dx) in others]
        weights = np.exp(logits - logits.max())
        out[b, y, x, h] = (weights / weights.sum()) @ np.array([v[b, i, j, h] for i, j, _ in others])
    return out


def in_blocks(shape, window, shift):
    """Swin's rule: one block of the rolled map, and one side of the border that the roll has joined."""

    def meet(place, other):
        rolled = [[(p - s) % n for p, s, n in zip(at, shift, shape, strict=True)] for at in (place, other)]
        block = all(a // w == b // w for a, b, w in zip(*rolled, window, strict=True))
        side = all((a < s) == (b < s) for a, b, s in zip(place, other, shift, strict=True))
        return tuple(b - a for a, b in zip(*rolled, strict=True)) if block and side else None

    return meet


def in_grids(shape, window):
    """MaxViT's rule: places that are equal within the strides between the rows and columns of the grid."""
    strides = [n // w for n, w in zip(shape, window, strict=True)]

    def meet(place, other):
        same = all(a % s == b % s for a, b, s in zip(place, other, strides, strict=True))
        return tuple((b - a) // s for a, b, s in zip(place, other, strides, strict=True)) if same else None

    return meet


@pytest.mark.parametrize(
    ("shape", "window", "shift", "grid"),
    [
        ((6, 8), (3, 4), (0, 0), False),
        ((6, 8), (3, 4), (1, 2), False),
        ((6, 8), (2, 4), (0, 3), False),
        ((4, 4), (4, 4), (2, 1), False),
        ((4, 6), (2, 2), (1, 1), False),
        ((6, 8), (3, 4), (2, 0), False),
        ((6, 8), (3, 2), (0, 0), True),
    ],
)
def test_function_equals_loops(shape, window, shift, grid):
    q, k, v = arrays(3, 2, *shape, 2, 4)
    bias = arrays(2, *(2 * side - 1 for side in window), seed=1)
    meet = in_grids(shape, window) if grid else in_blocks(shape, window, shift)
    found = window_attention(q, k, v, window=window, grid=grid, shift=shift, bias=bias, scale=0.7)
    np.testing.assert_allclose(found, loops(q, k, v, window=window, meet=meet, bias=bias, scale=0.7), atol=1e-5)


@pytest.mark.parametrize("grid", [False, True])
def test_windows_come_back(grid):
    x = arrays(2, 6, 8, 3)
    windows = to_windows(x, (3, 4), grid=grid)
    assert windows.shape == (2 * 2 * 2, 12, 3)
    np.testing.assert_array_equal(from_windows(windows, (6, 8), (3, 4), grid=grid), x)


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"shift": (1, 2)}, {"grid": True, "head_width": 3}, {"relative_bias": False, "scale": 0.3, "qk_norm": True}],
    ids=str,
)
def test_module_projects_and_attends(options):
    attention, x = module(window=(3, 4), **options), arrays(2, 48, 8)
    q, k, v = jnp.moveaxis(attention.qkv(x).reshape(2, 6, 8, 3, 2, -1), 3, 0)
    if options.get("qk_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    table = None if attention.relative_bias is None else np.asarray(attention.relative_bias[...])
    meet = in_grids((6, 8), (3, 4)) if options.get("grid") else in_blocks((6, 8), (3, 4), options.get("shift", (0, 0)))
    heads = loops(*map(np.asarray, (q, k, v)), window=(3, 4), meet=meet, bias=table, scale=options.get("scale"))
    np.testing.assert_allclose(attention(x, Call(Grid((6, 8)))), attention.proj(heads.reshape(2, 48, -1)), 1e-5, 1e-5)


def test_padding_is_keys_behind_the_rolled_map():
    """timm's order: roll, zeros on the right and at the bottom, project. The mask counts from the padded border."""
    attention, x = module(window=(3, 4), shift=(1, 2)), arrays(2, 35, 8)
    rolled = np.roll(x.reshape(2, 5, 7, 8), (-1, -2), (1, 2))
    enlarged = np.pad(rolled, [(0, 0), (0, 1), (0, 1), (0, 0)])
    q, k, v = np.moveaxis(np.asarray(attention.qkv(enlarged)).reshape(2, 6, 8, 3, 2, 4), 3, 0)

    def meet(place, other):
        block = all(a // w == b // w for a, b, w in zip(place, other, (3, 4), strict=True))
        side = all((a >= n) == (b >= n) for a, b, n in zip(place, other, (5, 6), strict=True))
        return tuple(b - a for a, b in zip(place, other, strict=True)) if block and side else None

    table = np.asarray(attention.relative_bias[...])
    heads = loops(q, k, v, window=(3, 4), meet=meet, bias=table).reshape(2, 6, 8, 8)
    expected = attention.proj(np.roll(heads[:, :5, :7], (1, 2), (1, 2)).reshape(2, 35, 8))
    np.testing.assert_allclose(attention(x, Call(Grid((5, 7)))), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"windows of \(3, 4\) do not divide a map of \(5, 7\); padding=True fills"):
        module(window=(3, 4), padding=False)(x, Call(Grid((5, 7))))


def test_an_edit_sees_the_windows_of_the_rolled_map():
    """Without the probabilities of the third window, the places that lie in it get nothing."""
    q, k, v = arrays(3, 2, 8, 8, 2, 4)

    def edit(site, value):
        assert value.shape == (2, 4, 2, 16, 16)
        assert value.dtype == jnp.float32
        return value.at[:, 2].set(0) if site == "probs" else value

    run = jax.jit(partial(window_attention, window=(4, 4), shift=(1, 2)))
    whole = run(q, k, v)
    edited = jax.jit(partial(window_attention, window=(4, 4), shift=(1, 2), edit=edit))(q, k, v)
    rolled, expected = (np.roll(one, (-1, -2), (1, 2)) for one in (edited, whole))
    assert not rolled[:, 4:, :4].any()
    rolled[:, 4:, :4] = expected[:, 4:, :4]
    np.testing.assert_allclose(rolled, expected, atol=1e-6)


def test_dropout_is_of_training():
    attention, x, grid = module(window=4, dropout=0.5), arrays(2, 16, 8), Grid((4, 4))
    calm = attention(x, Call(grid))
    np.testing.assert_array_equal(attention(x, Call(grid, key=jax.random.key(0))), calm)
    assert np.abs(attention(x, Call(grid, train=True, key=jax.random.key(0))) - calm).max() > 0.01
    with pytest.raises(ValueError, match="key"):
        attention(x, Call(grid, train=True))


@pytest.mark.parametrize("name", ["window", "shifted_window", "grid"])
def test_by_name(name):
    made = make_attention(name, 8, 2, shared={"window": 4, "dilation": 2, "init": "timm"}, rngs=nnx.Rngs(0))
    assert (made.shift, made.grid) == ((2, 2) if name == "shifted_window" else (0, 0), name == "grid")
    with pytest.raises(ValueError, match=f"unknown option of attention '{name}' 'windw'; nearest: window"):
        make_attention(name, 8, 2, shared={}, options={"windw": 4}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"shift": 4}, {}, r"shift=4 of windows of \(4, 4\); allowed: less than a window"),
        ({"shift": "full"}, {}, "shift='full'; allowed: 'half'"),
        ({"shift": 1, "grid": True}, {}, "a grid cannot be shifted"),
        ({"shift": "half", "grid": True}, {}, "a grid cannot be shifted"),
        ({"window": 0}, {}, "window=0; allowed: an integer of at least 1"),
        ({"heads": 3}, {}, "width 8 is not divisible by 3 heads"),
        ({}, {"memory": Memory(arrays(2, 3, 8))}, r"window attention attends to no other stream \(memory\)"),
        ({}, {"mask": causal()}, "window attention takes no mask of kind causal"),
        ({}, {"grid": Grid((4, 4), prefix=1)}, r"no place for 1 prefix tokens \(class token, registers\)"),
        ({}, {"grid": Grid((17,))}, r"window attention is for grids of 2 axes, not for one of \(17,\)"),
    ],
)
def test_a_wrong_choice_is_one_line(options, call, message):
    with pytest.raises(ValueError, match=message) as error:
        module(**{"window": 4} | options)(arrays(2, 17, 8), Call(**{"grid": Grid((4, 4))} | call))
    assert "\n" not in str(error.value)


def test_vision_transformer_with_windows():
    """A mechanism by name in any model, here with the options of layers in turn."""
    make = partial(
        models.create,
        "vit_mu16",
        num_classes=5,
        image_size=32,
        patch_size=4,
        width=16,
        depth=2,
        attention="window",
        attention_options=({"window": 4}, {"window": 4, "shift": "half"}),
    )
    pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits = jax.eval_shape(lambda x: make(class_token=False, pool="avg", rngs=nnx.Rngs(0))(x), pixels)
    assert logits.shape == (2, 5)
    with pytest.raises(ValueError, match="no place for 1 prefix tokens"):
        jax.eval_shape(lambda x: make(rngs=nnx.Rngs(0))(x), pixels)
