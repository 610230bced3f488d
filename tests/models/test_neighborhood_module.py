"""Neighborhood attention as a module: fused and masked paths, padding, prefix, taps; bias by relative position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn
import models
from attn import Grid
from attn.common.relative import relative_position_bias, resample_relative_bias
from attn.core.masks import as_mask
from models.attention.neighborhood import NeighborhoodAttention
from models.attention.registry import make_attention
from models.core.call import Call, Memory
from models.core.watch import Watch

WIDTH, HEADS = 8, 2


def module(**options):
    """With random biases, which start small or at zero; by the implementation that is traced fastest."""
    made = NeighborhoodAttention(WIDTH, HEADS, **{"implementation": "reference", **options}, rngs=nnx.Rngs(0))
    for number, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(made, nnx.Param))):
        value = variable.get_value()
        variable.set_value(value + 0.5 * jax.random.normal(jax.random.key(number), value.shape))
    return made


def tokens(grid, batch=2):
    return jax.random.normal(jax.random.key(9), (batch, grid.tokens, WIDTH))


@models.tap("logits", "probs")
def unedited(site, value):
    """A tap that looks at maps, which takes the path that masks dense attention."""
    return value


def attended(made, x, grid, tap=None, **call):
    """What a module gives; with a tap that records also what it has recorded."""
    watch = None if tap is None else Watch(tap)
    y = made(x, Call(grid, tap=watch, **call))
    return (y, *watch.finish(1)) if watch is not None else y


PATTERNS = {
    "plain": (Grid((6, 5)), {"window": 3, "implementation": None}),
    "dilated": (Grid((7, 9)), {"window": 3, "dilation": (2, 3)}),
    "prefix": (Grid((5, 4), prefix=2), {"window": 3, "qk_norm": True, "scale_norm": True}),
    "strided": (Grid((6, 8)), {"window": (4, 3), "stride": (2, 3), "scale": 0.7, "qkv_bias": False}),
    "causal": (Grid((6, 5), prefix=1), {"window": 3, "is_causal": (True, False)}),
    "no_bias": (Grid((4, 4)), {"window": 3, "relative_bias": False}),
    "padded": (Grid((5, 3), prefix=1), {"window": 3, "dilation": 2}),
    "line": (Grid((11,), prefix=1), {"window": (5,), "dilation": 2}),
    "volume": (Grid((3, 4, 3)), {"window": (3, 2, 3)}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", PATTERNS)
def test_fused_and_masked_paths_are_one_function(name):
    """In outputs and in gradients of inputs and parameters."""
    grid, options = PATTERNS[name]
    graph, params, state = models.split(module(**options))
    x = tokens(grid)

    def loss(params, x, tap):
        y = models.merge(graph, params, state)(x, Call(grid, tap=None if tap is None else Watch(tap)))
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (fused, y), (masked, expected) = run(params, x, None), run(params, x, unedited)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


def test_small_maps_are_padded_before_the_projections():
    """So the padding is keys and values of their own: the biases of the projections."""
    made, grid, larger = module(window=3, dilation=2), Grid((5, 3)), Grid((6, 6))
    x = tokens(grid)
    wide = jnp.pad(x.reshape(2, 5, 3, WIDTH), ((0, 0), (0, 1), (0, 3), (0, 0))).reshape(2, 36, WIDTH)
    expected = made(wide, Call(larger)).reshape(2, 6, 6, WIDTH)[:, :5, :3].reshape(2, 15, WIDTH)
    np.testing.assert_allclose(made(x, Call(grid)), expected, atol=1e-6)
    made.qkv.bias.set_value(made.qkv.bias[...] + 1.0)
    assert not np.allclose(made(x, Call(grid)), expected, atol=1e-2)


def test_prefix_tokens_see_everything_and_are_seen():
    made, grid = module(window=3, relative_bias=False), Grid((6, 6), prefix=1)
    x = tokens(grid, batch=1)
    run = jax.jit(lambda x: made(x, Call(grid)))
    before = run(x)
    far = run(x.at[:, -1].add(1.0))
    assert not np.allclose(before[:, 0], far[:, 0], atol=1e-4)
    np.testing.assert_allclose(before[:, 1], far[:, 1], atol=1e-6)
    moved = run(x.at[:, 0].add(1.0))
    assert np.all(np.abs(before - moved).max(-1) > 1e-5)


def test_a_tap_without_maps_keeps_the_fused_path():
    """Maps of chosen queries from its logsumexp are those of the masked path."""
    made, grid = module(window=3), Grid((5, 4), prefix=1)
    x = tokens(grid)

    def recorded(x, *sites):
        return attended(made, x, grid, models.record(*sites))[1]

    fused = jax.make_jaxpr(lambda x: recorded(x, "q", "k", "lse").arrays)(x)
    assert not any(v.aval.shape[-2:] == (21, 21) for eqn in fused.eqns for v in eqn.outvars)
    everything, seen = jax.jit(lambda x: (recorded(x, "probs", "lse"), recorded(x, "q", "k", "lse")))(x)
    np.testing.assert_allclose(seen["lse"], everything["lse"], atol=1e-5)
    maps = {name: seen[name][0, :, 1:].reshape(2, 5, 4, HEADS, -1) for name in ("q", "k")}
    queries, extra = np.array([[0, 0], [2, 3]]), seen["k"][0, :, :1]
    found, to_prefix = attn.neighborhood_maps(
        **maps,
        lse=seen["lse"][0, :, 1:].reshape(2, 5, 4, HEADS),
        queries=queries,
        window=3,
        bias=made.relative_bias[...],
        extra_keys=extra,
    )
    rows = everything["probs"][0][:, :, [1, 1 + 2 * 4 + 3]]
    np.testing.assert_allclose(found.reshape(2, 2, HEADS, 20), rows[..., 1:].swapaxes(1, 2), atol=1e-6)
    np.testing.assert_allclose(to_prefix, rows[..., :1].swapaxes(1, 2), atol=1e-6)


def test_masks_and_dropout():
    made, grid = module(window=3, dropout=0.5), Grid((4, 4))
    x = tokens(grid)
    run = jax.jit(lambda mask: made(x, Call(grid, mask=as_mask(mask))))
    mask, plain = np.ones((1, 1, 16, 16), bool), made(x, Call(grid))
    np.testing.assert_allclose(run(mask), plain, atol=1e-5)
    mask[..., 1] = False  # in the window of token 0 and not of token 15
    changed = run(mask)
    assert not np.allclose(changed[:, 0], plain[:, 0], atol=1e-4)
    np.testing.assert_allclose(changed[:, 15], plain[:, 15], atol=1e-5)
    noisy = jax.jit(lambda key: made(x, Call(grid, train=True, key=key)))
    dropped = [noisy(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2], atol=1e-3)


def test_what_cannot_be_had_is_one_line():
    made, x = module(window=3), tokens(Grid((4, 4)))
    with pytest.raises(ValueError, match="neighborhood attention attends to no other stream"):
        made(x, Call(Grid((4, 4)), memory=Memory(x)))
    with pytest.raises(ValueError, match=r"a window of \(3, 3\) does not fit a map of \(16,\)"):
        made(x, Call(Grid((16,))))
    with pytest.raises(ValueError, match=r"a mask over a map of \(2, 8\), which is padded to \(3, 8\)"):
        made(x, Call(Grid((2, 8)), mask=as_mask(jnp.ones((1, 1, 16, 16), bool))))
    with pytest.raises(ValueError, match="stride 4 is larger than window 3"):
        module(window=3, stride=4)
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        NeighborhoodAttention(WIDTH, 3, rngs=nnx.Rngs(0))


# --- bias by relative position ----------------------------------------------------------------------------------------


def test_relative_position_bias_is_by_displacement_from_query_to_key():
    shape = (2, 3)
    table = np.random.default_rng(0).normal(size=(HEADS, 3, 5)).astype(np.float32)
    bias = relative_position_bias(jnp.asarray(table), shape)
    places = list(itertools.product(*map(range, shape)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        row, column = key[0] - query[0] + 1, key[1] - query[1] + 2
        np.testing.assert_array_equal(bias[:, i, j], table[:, row, column])
    with pytest.raises(ValueError, match=r"a grid of \(3, 3\) needs a table of \(5, 5\)"):
        relative_position_bias(jnp.asarray(table), (3, 3))


def test_tables_are_resampled_as_pytorch_does():
    """`interpolate(mode="bicubic", align_corners=False)` of squares, run once."""
    table = (np.arange(9, dtype=np.float32) ** 2).reshape(1, 3, 3)
    expected = [
        [-0.9047037, -0.8740149, -0.4399992, 1.0740172, 2.2167058],
        [1.2699920, 2.3191466, 4.4440107, 7.6488762, 9.8100300],
        [8.3280010, 11.0680037, 16.0000000, 22.0120010, 25.8640022],
    ]
    np.testing.assert_allclose(resample_relative_bias(table, (5, 5))[0, :3], expected, rtol=1e-5)


def test_dense_attention_with_a_relative_bias():
    """On its grid it is neighborhood attention whose window is the map; prefix tokens have none."""
    grid = Grid((3, 4))
    dense = make_attention("dense", WIDTH, HEADS, shared={}, options={"relative_bias": (3, 4)}, rngs=nnx.Rngs(0))
    whole = module(window=(3, 4))
    table = jax.random.normal(jax.random.key(0), dense.relative_bias.shape)
    dense.relative_bias.set_value(table)
    nnx.update(whole, nnx.state(dense))
    x = tokens(grid)
    np.testing.assert_allclose(dense(x, Call(grid)), whole(x, Call(grid)), atol=1e-5)
    for other in (Grid((3, 4), 1), Grid((5, 2))):
        shape = jax.eval_shape(lambda x, other=other: dense(x, Call(other)), tokens(other)).shape
        assert shape == (2, other.tokens, WIDTH)
    with pytest.raises(ValueError, match="a relative position bias has no meaning for a memory"):
        dense(x, Call(grid, memory=Memory(x)))
