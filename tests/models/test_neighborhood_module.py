"""Neighborhood attention as a module: fused and masked paths, padding, prefix, hooks; bias by relative position."""

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
from models.attention.neighborhood import NeighborhoodAttention
from models.attention.registry import make_attention
from models.core.stack import Stack

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


def unedited(site, value, layer):
    """A hook that may look at anything, which takes the path that masks dense attention."""
    return value


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

    def loss(params, x, hook):
        y = models.merge(graph, params, state)(x, grid, hook=hook)
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
    expected = made(wide, larger).reshape(2, 6, 6, WIDTH)[:, :5, :3].reshape(2, 15, WIDTH)
    np.testing.assert_allclose(made(x, grid), expected, atol=1e-6)
    made.qkv.bias.set_value(made.qkv.bias[...] + 1.0)
    assert not np.allclose(made(x, grid), expected, atol=1e-2)


def test_prefix_tokens_see_everything_and_are_seen():
    made, grid = module(window=3, relative_bias=False), Grid((6, 6), prefix=1)
    x = tokens(grid, batch=1)
    before = made(x, grid)
    far = made(x.at[:, -1].add(1.0), grid)
    assert not np.allclose(before[:, 0], far[:, 0], atol=1e-4)
    np.testing.assert_allclose(before[:, 1], far[:, 1], atol=1e-6)
    moved = made(x.at[:, 0].add(1.0), grid)
    assert np.all(np.abs(before - moved).max(-1) > 1e-5)


def test_a_hook_that_names_its_sites_keeps_the_fused_path():
    """Maps of chosen queries from its logsumexp are those of the masked path."""
    made, grid = module(window=3), Grid((5, 4), prefix=1)
    x, seen = tokens(grid), {}

    def look(site, value, layer):
        seen[site] = value
        return value

    made(x, grid, hook=look)
    everything = dict(seen)
    assert list(everything) == ["q", "k", "v", "logits", "probs", "heads"]
    seen.clear()
    look.sites = {"q", "k", "lse"}
    made(x, grid, hook=look)
    assert list(seen) == ["q", "k", "v", "lse", "heads"]
    maps = {name: seen[name][:, 1:].reshape(2, 5, 4, HEADS, -1) for name in ("q", "k")}
    queries = np.array([[0, 0], [2, 3]])
    found, to_prefix = attn.probabilities(
        **maps, lse=seen["lse"], queries=queries, window=3, bias=made.relative_bias[...], extra_keys=seen["k"][:, :1]
    )
    rows = everything["probs"][:, :, [1, 1 + 2 * 4 + 3]]
    np.testing.assert_allclose(found.reshape(2, 2, HEADS, 20), rows[..., 1:].swapaxes(1, 2), atol=1e-6)
    np.testing.assert_allclose(to_prefix, rows[..., :1].swapaxes(1, 2), atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_recorded_sites_choose_the_path(scan):
    grid = Grid((4, 4))

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.attn = NeighborhoodAttention(WIDTH, HEADS, window=3, implementation="reference", rngs=rngs)

        def __call__(self, x, grid, *, context, mask, hook, layer, train, key):
            return x + self.attn(x, grid, hook=hook, layer=layer)

    stack = Stack([Layer], 2, rngs=nnx.Rngs(0), scan=scan)
    plain, found = stack(tokens(grid), grid, layers=(1,), sites=("lse",))
    assert found["1.lse"].shape == (2, 4, 4, HEADS)
    same, found = stack(tokens(grid), grid, layers=(1,), sites=("probs",))
    assert found["1.probs"].shape == (2, HEADS, 16, 16)
    np.testing.assert_allclose(found["1.probs"].sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal((found["1.probs"] > 0).sum(-1), 9)
    np.testing.assert_allclose(plain, same, atol=1e-5)


def test_masks_and_dropout():
    made, grid = module(window=3, dropout=0.5), Grid((4, 4))
    x = tokens(grid)
    mask = np.ones((1, 1, 16, 16), bool)
    np.testing.assert_allclose(made(x, grid, mask=mask), made(x, grid), atol=1e-5)
    mask[..., 1] = False  # in the window of token 0 and not of token 15
    changed = made(x, grid, mask=mask)
    assert not np.allclose(changed[:, 0], made(x, grid)[:, 0], atol=1e-4)
    np.testing.assert_allclose(changed[:, 15], made(x, grid)[:, 15], atol=1e-5)
    dropped = [made(x, grid, train=True, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2], atol=1e-3)


def test_what_cannot_be_had_is_one_line():
    made, x = module(window=3), tokens(Grid((4, 4)))
    with pytest.raises(ValueError, match="neighborhood attention has no context"):
        made(x, Grid((4, 4)), context=x)
    with pytest.raises(ValueError, match=r"a window of \(3, 3\) does not fit a map of \(16,\)"):
        made(x, Grid((16,)))
    with pytest.raises(ValueError, match=r"a mask over a map of \(2, 8\), which is padded to \(3, 8\)"):
        made(x, Grid((2, 8)), mask=jnp.ones((1, 1, 16, 16), bool))
    with pytest.raises(ValueError, match="stride 4 is larger than window 3"):
        module(window=3, stride=4)(x, Grid((4, 4)))
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
    np.testing.assert_allclose(dense(x, grid), whole(x, grid), atol=1e-5)
    assert dense(tokens(Grid((3, 4), 1)), Grid((3, 4), 1)).shape == (2, 13, WIDTH)
    assert dense(tokens(Grid((5, 2))), Grid((5, 2))).shape == (2, 10, WIDTH)
    with pytest.raises(ValueError, match="a relative position bias has no meaning for a context"):
        dense(x, grid, context=x)
