"""Scanned stacks and their unrolled twins: same numbers, same names, same state, with any kind of block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from attn import Grid
from models.core.stack import Stack
from models.layers.drop import drop_path, dropout

WIDTH, DEPTH = 4, 4
GRID = Grid((2, 3), prefix=1)


class Norms(nnx.Module):
    """A residual layer with batch normalization, dropout, drop path and a hook site."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(0.5 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, grid, *, drop_path=0.0, context=None, mask=None, hook=None, layer=0, train=False, key=None):
        y = jnp.tanh(x @ self.kernel[...])
        if train:
            mean = y.mean((0, 1))
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            self.calls[...] = self.calls[...] + 1
            y = dropout(y - mean, 0.2, train=True, key=jax.random.fold_in(key, 0))
        else:
            y = y - self.mean[...]
        y = y if hook is None else hook("probs", hook("probs", y, layer), layer)
        return x + _drop(y, drop_path, train, key)


class Gate(nnx.Module):
    """Another kind of layer: other parameters, no state, uses the layer index."""

    def __init__(self, rngs):
        self.scale = nnx.Param(1 + 0.1 * jax.random.normal(rngs.params(), (WIDTH,)))
        self.shift = nnx.Param(0.1 * jax.random.normal(rngs.params(), (WIDTH,)))

    def __call__(self, x, grid, *, drop_path=0.0, context=None, mask=None, hook=None, layer=0, train=False, key=None):
        y = jax.nn.sigmoid(x * self.scale[...] + self.shift[...]) * (1 + layer)
        y = y if hook is None else hook("heads", y, layer)
        return x + _drop(y, drop_path, train, key)


def _drop(y, rate, train, key):
    return drop_path(y, rate, train=train, key=None if key is None else jax.random.fold_in(key, 1))


# The last repetition of the third has one layer of three.
GROUPS = {"one": [Norms], "two_unlike": [Norms, Gate], "incomplete": [Norms, Gate, Norms]}


@pytest.fixture(params=GROUPS)
def twins(request):
    return [Stack(GROUPS[request.param], DEPTH, rngs=nnx.Rngs(0), scan=scan) for scan in (True, False)]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, GRID.tokens, WIDTH))


def close(a, b, tolerance=1e-6):
    """Equal up to the rounding of sums, which is relative to their terms: to the largest number of an array, not to
    each of its elements. The order of summation differs between twins, more so in programs compiled without fusion.
    """

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, float(np.abs(b).max(initial=0))))

    jax.tree.map(compare, a, b)


def test_twins_start_equal_and_names_say_which_layers(twins):
    (_, params, state), (_, unrolled, unrolled_state) = map(models.split, twins)
    for stacked, single in ((params, unrolled), (state, unrolled_state)):
        flat = models.unstack(stacked)
        assert flat.keys() == single.keys()
        jax.tree.map(np.testing.assert_array_equal, flat, dict(single))
        jax.tree.map(np.testing.assert_array_equal, models.stack(single, like=stacked), stacked)
    group = twins[0].group
    assert params[f"[0::{group}].kernel"].shape == (-(-DEPTH // group), WIDTH, WIDTH)
    assert not np.allclose(unrolled["0.kernel"], unrolled["2.kernel"])


def test_twins_train_alike(twins, x):
    """Output, gradients and batch statistics, with dropout and a different drop-path rate in each layer."""
    rates = np.linspace(0.0, 0.6, DEPTH)
    results = []
    for twin in twins:
        graph, params, state = models.split(twin)

        @jax.jit
        def step(params, state, x, graph=graph):
            def loss(params):
                stack = models.merge(graph, params, state)
                y, _ = stack(x, GRID, per_layer={"drop_path": rates}, train=True, key=jax.random.key(7))
                return jnp.sum(jnp.sin(y)), (y, models.split(stack)[2])

            return jax.grad(loss, has_aux=True)(params)

        gradients, (y, new_state) = step(params, state, x)
        results.append((y, models.unstack(gradients), models.unstack(new_state)))
    close(results[0], results[1])
    _, gradients, new_state = results[0]
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    assert all(int(value) == 1 for name, value in new_state.items() if name.endswith("calls"))
    assert all(np.abs(value).max() > 0 for name, value in new_state.items() if name.endswith("mean"))


def test_state_stays_with_the_model_and_evaluation_leaves_it(twins, x):
    for twin in twins:
        before = models.split(twin)[2]
        twin(x, GRID)
        assert all(after is value for after, value in zip(models.split(twin)[2].values(), before.values(), strict=True))
        twin(x, GRID, train=True, key=jax.random.key(0))
        after = models.split(twin)[2]
        assert all(np.any(after[name] != value) for name, value in before.items())


def test_each_layer_draws_its_own_numbers(x):
    stack = Stack([Norms], DEPTH, rngs=nnx.Rngs(0))
    outputs = [stack(x, GRID, train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])
    masks = []
    hooked = Stack([Norms], 2, rngs=nnx.Rngs(0), scan=False)
    hooked(x, GRID, train=True, key=jax.random.key(0), hook=lambda s, v, layer: masks.append(v == 0) or v)
    assert np.any(masks[0] != masks[2])


def test_intermediates_of_chosen_layers_only(twins, x):
    """Layers 1 and -1, and a site that each layer reaches twice; equal in both twins and to running fewer layers."""
    results = [twin(x, GRID, layers=(1, -1), sites=("probs",))[1] for twin in twins]
    close(results[0], results[1])
    sites = [name for name in results[0] if "." in name]
    assert {name.split(".")[0] for name in results[0]} == {"1", "3"}
    if twins[0].group == 1:
        assert sites == ["1.probs", "1.probs.1", "3.probs", "3.probs.1"]
    y, _ = twins[0](x, GRID)
    close(results[0]["3"], y)
    assert not np.allclose(results[0]["1"], y)
    with pytest.raises(ValueError, match="no layer 4, there are 4"):
        twins[0](x, GRID, layers=(4,))


def test_layers_are_numbered_through_the_model(x):
    seen = []
    stack = Stack([Norms], 2, rngs=nnx.Rngs(0), first=5, scan=False)
    stack(x, GRID, hook=lambda site, value, layer: seen.append(layer) or value)
    assert seen == [5, 5, 6, 6]
    _, found = stack(x, GRID, layers=(1,), sites=("probs",))
    assert set(found) == {"1", "1.probs", "1.probs.1"}


def test_intermediates_do_not_grow_with_depth():
    """The largest array of a traced call, gradient included, does not hold the tokens of all layers."""
    stack = Stack([Norms], 64, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(lambda x: stack(x, GRID, layers=(3, 40)))(jnp.zeros((3, GRID.tokens, WIDTH)))
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 64 * 3 * GRID.tokens * WIDTH / 4


def test_hook_edits_one_layer(twins, x):
    def silence(site, value, layer):
        return jnp.where((layer == 2) & (site == "probs"), 0.0, value)

    plain = twins[0](x, GRID)[0]
    edited = [twin(x, GRID, hook=silence, layers=(1, 2)) for twin in twins]
    close(edited[0], edited[1])
    np.testing.assert_array_equal(edited[0][1]["1"], edited[0][1]["2"])
    assert not np.allclose(edited[0][0], plain)


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch", "attention"])
def test_rematerialization_changes_no_number(x, remat):
    gradients = []
    for policy in ("none", remat):
        stack = Stack([Norms, Gate], DEPTH, rngs=nnx.Rngs(0), remat=policy)
        graph, params, state = models.split(stack)

        def loss(params, graph=graph, state=state):
            return jnp.sum(models.merge(graph, params, state)(x, GRID, train=True, key=jax.random.key(0))[0] ** 2)

        gradients.append(jax.jit(jax.grad(loss))(params))
    close(*gradients)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="depth 1 is less than the 2 blocks of a group"):
        Stack([Norms, Gate], 1, rngs=nnx.Rngs(0))
    stack = Stack([Norms], 2, rngs=nnx.Rngs(0), remat="ful")
    with pytest.raises(ValueError, match="unknown remat policy 'ful'; nearest: full"):
        stack(jnp.zeros((1, GRID.tokens, WIDTH)), GRID)


def test_names_of_scanned_leaves():
    assert models.unrolled_names("blocks.[1::2].w", 2) == ["blocks.1.w", "blocks.3.w"]
    assert models.unrolled_names("head.kernel", 2) == ["head.kernel"]
    flat = {"a.[1::2].w": np.arange(6.0).reshape(3, 2), "head": np.ones(2)}
    unrolled = models.unstack(flat)
    assert list(unrolled) == ["a.1.w", "a.3.w", "a.5.w", "head"]
    assert all(isinstance(value, np.ndarray) for value in models.stack(unrolled, like=flat).values())
    del unrolled["a.3.w"]
    with pytest.raises(KeyError, match=r"first a\.5\.w"):
        models.stack(unrolled, like=flat)
    with pytest.raises(KeyError, match=r"no entry head.*nearest: heat"):
        models.stack({"heat": np.ones(2)}, like=["head"])
