"""Taps: seven interventions on five families, each a line, inside one compiled function; scanned and unrolled alike.

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
families = pytest.mark.parametrize("family", FAMILIES)
X, OTHER = (jax.random.normal(jax.random.key(seed), (2, 32, 32, 3)) for seed in (1, 2))


@functools.cache
def model(family, scan=True):
    """The tiny model; its attention has maps of a few places only."""
    with jax.ensure_compile_time_eval():  # whoever asks first
        return tiny_models.create(family, scan=scan)


@functools.cache
def recorded(family):
    """Keys, values, maps and what the heads give, of both images."""

    @jax.jit
    def run(images):
        tap = models.record("k", "v", "heads", "probs")
        model(family)(images, tap=tap)
        return tap.values

    return run(X), run(OTHER)


def only(values, *sites):
    """Of what was recorded, some sites."""
    names = [full for site in sites for full in values.names(site)]
    parts = ({full: part[full] for full in names} for part in (values.arrays, values.layers, values.about))
    return type(values)(*parts)


def last_attention(family):
    """Number of the last layer with attention."""
    return max(max(layers) for layers in recorded(family)[0].layers.values())


@functools.cache
def _run(family, scan):
    return jax.jit(lambda tap: model(family, scan)(X, tap=tap))


def logits(family, tap=None):
    """By one compiled function, of which a ready tap is an argument."""
    return np.asarray(_run(family, True)(tap))


def intervened(family, tap):
    """`logits`, which an unrolled model gives as well."""
    found = logits(family, tap)
    close(_run(family, False)(tap), found)
    return found


def alike(run, family, tolerance=2e-5):
    """What a function of a model gives, scanned; unrolled it is the same."""
    scanned, unrolled = (run(model(family, scan)) for scan in (True, False))
    jax.tree.map(lambda a, b: close(a, b, tolerance), unrolled, scanned)
    return scanned


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


@families
def test_a_head_is_ablated(family):
    """As what the heads give is put back without it; in one layer of all."""
    layer = last_attention(family)
    differ(intervened(family, models.ablate_heads(1, layers=layer)), logits(family))
    heads = only(recorded(family)[0], "heads")
    # A later attention of the same layer (MaxViT) sees what an earlier one has changed, so the last alone is compared.
    name = [name for name, layers in heads.layers.items() if layer in layers][-1]
    alone = models.ablate_heads(1, layers=layer, at=name.removesuffix(".heads"))
    axis = heads.about[name].axis("heads") + 1
    without = jnp.where(jnp.arange(heads[name].shape[axis]).reshape(-1, 1) == 1, 0, heads[name])
    number = list(heads.layers[name]).index(layer)
    put_back = models.replace(without[number], "heads", layers=layer, at=name.removesuffix(".heads"))
    close(logits(family, alone), logits(family, put_back))


@families
def test_a_temperature_of_each_head_has_a_gradient(family):
    """By finite differences; a factor of one changes nothing."""
    layer, own = last_attention(family), recorded(family)[0]
    count = [own[name].shape[-2] for name in own if name.endswith("heads") and layer in own.layers[name]][-1]

    def loss(factor, whole):
        return jnp.sin(whole(X, tap=models.scale_logits(factor, layers=layer))).sum()

    ones = jnp.ones(count)
    value, gradient = alike(lambda whole: jax.jit(jax.value_and_grad(lambda factor: loss(factor, whole)))(ones), family)
    close(value, np.sin(logits(family)).sum(), 1e-4)
    run = jax.jit(lambda factor: loss(factor, model(family)))
    step = 1e-2
    for head in range(count):
        moved = [run(ones.at[head].add(sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[head], (moved[0] - moved[1]) / (2 * step), atol=2e-3)
    assert np.abs(gradient).max() > 1e-4


@families
def test_keys_and_values_of_another_image(family):
    """In place of its own, and beside them: those of the same image beside themselves change nothing."""
    plain, (own, others) = logits(family), (only(values, "k", "v") for values in recorded(family))
    close(logits(family, models.replace(own)), plain)
    close(logits(family, models.append_keys(own)), plain, 1e-4)
    differ(intervened(family, models.replace(others, "k", "v")), plain)
    differ(intervened(family, models.append_keys(others)), plain)


@families
def test_attention_rolled_out(family):
    """Shares of the first map's tokens; with nothing but the residual each token is itself, or the mean of a square."""
    found = alike(lambda whole: jax.jit(lambda x: models.rollout(whole, x))(X), family)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert found.min() >= 0
    still = models.rollout(model(family), X, residual=1.0)
    np.testing.assert_allclose(still.sum(-1), 1, atol=1e-5)
    assert set(np.unique(np.round(np.asarray(still[0]), 5))) <= {0.0, np.float32(np.round(still.max(), 5))}
    differ(found, still)
    if family == "vit":
        maps = np.asarray(recorded(family)[0]["probs"]).mean(2)
        expected = np.eye(maps.shape[-1])
        for layer in maps:
            expected = (0.5 * layer + 0.5 * np.eye(maps.shape[-1])) @ expected
        close(found, expected)


@families
def test_the_residual_stream_is_steered(family):
    """By a vector behind one block, and nowhere before it."""
    depth = model(family).depth
    layer, name = depth - 2, layer_names(model(family))
    plain = model(family).features(X, layers=range(depth))
    width = plain[name[layer]].shape[-1]
    vector = jnp.arange(width, dtype=jnp.float32)
    tap = models.steer(layer, vector)
    steered = alike(lambda whole: jax.jit(lambda x: whole.features(x, layers=range(depth), tap=tap))(X), family)
    close(steered[name[layer]] - plain[name[layer]], np.broadcast_to(vector, plain[name[layer]].shape), 1e-4)
    close(steered[name[layer - 1]], plain[name[layer - 1]])
    differ(steered[name[layer + 1]], plain[name[layer + 1]])


@families
def test_a_sink_is_removed(family):
    """Nobody looks at a token, and what is left sums to one (in halo attention with what lies outside the map)."""

    def run(whole):
        tap = models.record("probs")
        return jax.jit(lambda x: (whole(x, tap=models.drop_keys(0) | tap), tap.values))(X)

    found, values = alike(run, family)
    differ(found, logits(family))
    for name, maps in values.arrays.items():
        np.testing.assert_array_equal(values.to_tokens(name)[..., 0], 0)
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


@families
def test_a_gradient_with_respect_to_all_maps(family):
    """Zeros added to all probabilities: the gradient is that of the loss along any change of the maps."""
    zeros = jax.tree.map(jnp.zeros_like, only(recorded(family)[0], "probs"))

    def loss(added, whole):
        return jnp.sin(whole(X, tap=models.add(added))).sum()

    gradient = alike(lambda whole: jax.jit(jax.grad(lambda added: loss(added, whole)))(zeros), family)
    assert list(gradient) == list(zeros)
    rng = np.random.default_rng(0)
    change = jax.tree.map(lambda value: jnp.asarray(rng.normal(size=value.shape), jnp.float32), zeros)
    along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(change), strict=True))
    step, run = 1e-3, jax.jit(lambda added: loss(added, model(family)))
    moved = [run(jax.tree.map(lambda value, sign=sign: sign * step * value, change)) for sign in (1, -1)]
    np.testing.assert_allclose(along, (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=2e-2)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
