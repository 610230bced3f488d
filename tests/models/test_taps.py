"""Taps: seven interventions on five families, each a line, scanned and not, inside one compiled function.

What each operator shows of its maps is in `tests/attn`; which sites a mechanism has, in `test_mechanisms.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import models

FAMILIES = ("vit", "swin", "nat", "maxvit", "halonet")
everywhere = pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
families = pytest.mark.parametrize("family", FAMILIES)
X, OTHER = (jax.random.normal(jax.random.key(seed), (2, 32, 32, 3)) for seed in (1, 2))


@functools.cache
def model(family, scan=True):
    """The tiny model; its attention has maps of a few places only."""
    with jax.ensure_compile_time_eval():  # whoever asks first
        return tiny_models.create(family, scan=scan)


def last_attention(family, scan=True):
    """Number of the last layer with attention."""
    return max(max(layers) for layers in recorded(family, scan).layers.values())


@functools.cache
def recorded(family, scan=True):
    """Of the other image: keys, values and what the heads give."""
    tap = models.record("k", "v", "heads")
    model(family, scan)(OTHER, tap=tap)
    return tap.values


def logits(family, tap=None, scan=True, images=X):
    """By one compiled function, of which a ready tap is an argument."""
    return np.asarray(_run(family, scan)(tap, images))


@functools.cache
def _run(family, scan):
    return jax.jit(lambda tap, images: model(family, scan)(images, tap=tap))


def layer_names(whole):
    """What `features` calls the layers, in order."""
    if not hasattr(whole, "stages"):
        return [f"blocks.{layer}" for layer in range(whole.depth)]
    inside = [
        ["first"] * (stage.first is not None) + [f"blocks.{i}" for i in range(stage.blocks.depth)]
        for stage in whole.stages
    ]
    return [f"stages.{number}.{name}" for number, names in enumerate(inside) for name in names]


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())), rtol=0)


def differ(found, other):
    assert not np.allclose(found, other, atol=1e-3 * np.abs(other).max())


# --- seven interventions ----------------------------------------------------------------------------------------------


@everywhere
@families
def test_a_head_is_ablated(family, scan):
    """As what the heads give is put back without it; in one layer of all."""
    layer = last_attention(family, scan)
    found = logits(family, models.ablate_heads(1, layers=layer), scan)
    differ(found, logits(family, None, scan))
    tap = models.record("heads", layers=layer)
    model(family, scan)(X, tap=tap)
    heads = tap.values
    # A later attention of the same layer (MaxViT) sees what an earlier one has changed, so the last alone is compared.
    name = list(heads)[-1]
    only = models.ablate_heads(1, layers=layer, at=name.removesuffix(".heads"))
    axis = heads.about[name].axis("heads") + 1
    without = jnp.where(jnp.arange(heads[name].shape[axis]).reshape(-1, 1) == 1, 0, heads[name])
    put_back = models.replace(without[0], "heads", layers=layer, at=name.removesuffix(".heads"))
    close(logits(family, only, scan), logits(family, put_back, scan))


@everywhere
@families
def test_a_temperature_of_each_head_has_a_gradient(family, scan):
    """By finite differences; a factor of one changes nothing."""
    layer = last_attention(family, scan)
    name = next(name for name in recorded(family, scan) if name.endswith("heads"))
    assert name
    count = [value.shape[-2] for full, value in recorded(family, scan).arrays.items() if full.endswith("heads")][-1]

    @jax.jit
    def loss(factor):
        return jnp.sin(model(family, scan)(X, tap=models.scale_logits(factor, layers=layer))).sum()

    ones = jnp.ones(count)
    close(loss(ones), np.sin(logits(family, None, scan)).sum(), 1e-4)
    gradient = jax.grad(loss)(ones)
    step = 1e-2
    for head in range(count):
        moved = [loss(ones.at[head].add(sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[head], (moved[0] - moved[1]) / (2 * step), atol=2e-3)
    assert np.abs(gradient).max() > 1e-4


@everywhere
@families
def test_keys_and_values_of_another_image(family, scan):
    """In place of its own, and beside them: those of the same image beside themselves change nothing."""
    tap = models.record("k", "v")
    model(family, scan)(X, tap=tap)
    plain, own, others = logits(family, None, scan), tap.values, recorded(family, scan)
    close(logits(family, models.replace(own), scan), plain)
    close(logits(family, models.append_keys(own), scan), plain, 1e-4)
    differ(logits(family, models.replace(others, "k", "v"), scan), plain)
    differ(logits(family, models.append_keys(others), scan), plain)


@everywhere
@families
def test_attention_rolled_out(family, scan):
    """Shares of the first map's tokens; with nothing but the residual each token is itself, or the mean of a square."""
    found = jax.jit(lambda x: models.rollout(model(family, scan), x))(X)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert found.min() >= 0
    still = models.rollout(model(family, scan), X, residual=1.0)
    np.testing.assert_allclose(still.sum(-1), 1, atol=1e-5)
    assert set(np.unique(np.round(np.asarray(still[0]), 5))) <= {0.0, np.float32(np.round(still.max(), 5))}
    differ(found, still)
    if family == "vit":
        tap = models.record("probs")
        model(family, scan)(X, tap=tap)
        maps = np.asarray(tap["probs"]).mean(2)
        expected = np.eye(maps.shape[-1])
        for layer in maps:
            expected = (0.5 * layer + 0.5 * np.eye(maps.shape[-1])) @ expected
        close(found, expected)


@everywhere
@families
def test_the_residual_stream_is_steered(family, scan):
    """By a vector behind one block, and nowhere before it."""
    whole = model(family, scan)
    layer, name = whole.depth - 2, layer_names(whole)
    plain = whole.features(X, layers=range(whole.depth))
    width = plain[name[layer]].shape[-1]
    vector = jnp.arange(width, dtype=jnp.float32)
    steered = jax.jit(lambda x: whole.features(x, layers=range(whole.depth), tap=models.steer(layer, vector)))(X)
    close(steered[name[layer]] - plain[name[layer]], np.broadcast_to(vector, plain[name[layer]].shape), 1e-4)
    close(steered[name[layer - 1]], plain[name[layer - 1]])
    differ(steered[name[layer + 1]], plain[name[layer + 1]])


@everywhere
@families
def test_a_sink_is_removed(family, scan):
    """Nobody looks at a token, and what is left sums to one (in halo attention with what lies outside the map)."""
    tap = models.record("probs")
    both = models.drop_keys(0) | tap
    found = jax.jit(lambda x: (model(family, scan)(x, tap=both), tap.values))(X)
    differ(found[0], logits(family, None, scan))
    for name, maps in found[1].arrays.items():
        site = found[1].about[name]
        over = site.to_tokens(maps[0])
        np.testing.assert_array_equal(over[..., 0], 0)
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


@everywhere
@families
def test_a_gradient_with_respect_to_all_maps(family, scan):
    """Zeros added to all probabilities: the gradient is that of the loss along any change of the maps."""
    whole, tap = model(family, scan), models.record("probs")
    whole(X, tap=tap)
    zeros = jax.tree.map(jnp.zeros_like, tap.values)

    @jax.jit
    def loss(added):
        return jnp.sin(whole(X, tap=models.add(added))).sum()

    gradient = jax.grad(loss)(zeros)
    assert list(gradient) == list(zeros)
    rng = np.random.default_rng(0)
    change = jax.tree.map(lambda value: jnp.asarray(rng.normal(size=value.shape), jnp.float32), zeros)
    along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(change), strict=True))
    step = 1e-3
    moved = [loss(jax.tree.map(lambda value, sign=sign: sign * step * value, change)) for sign in (1, -1)]
    np.testing.assert_allclose(along, (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=2e-2)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
