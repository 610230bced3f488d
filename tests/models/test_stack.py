"""Scanned stacks and their unrolled twins: same numbers, same names, same state, with any kind of block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from attn import Grid
from models.core.call import Call
from models.core.stack import Stack
from models.core.tap import TOKENS
from models.core.watch import Watch
from models.layers.drop import drop_path, dropout

WIDTH, DEPTH = 4, 4
GRID = Grid((2, 3), prefix=1)
CALL = Call(GRID)


def training(seed):
    """A call in training, with a key."""
    return Call(GRID, train=True, key=jax.random.key(seed))


def watched(stack, x, tap, **options):
    """What a stack gives and what the tap recorded, without a model around."""
    watch = Watch(tap)
    found = stack(x, Call(GRID, tap=watch), **options)
    return found, watch.finish(stack.first + stack.depth)


class Norms(nnx.Module):
    """A residual layer with batch normalization, dropout, drop path, and a site that it reaches twice."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(0.5 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, call):
        y = jnp.tanh(x @ self.kernel[...])
        if call.train:
            mean = y.mean((0, 1))
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            self.calls[...] = self.calls[...] + 1
            y = dropout(y - mean, 0.2, train=True, key=call.key_for("dropout"))
        else:
            y = y - self.mean[...]
        y = call.at("second").emit("block.in", call.at("first").emit("block.in", y, TOKENS), TOKENS)
        return x + _drop(y, call)


class Gate(nnx.Module):
    """Another kind of layer: other parameters, no state, uses the layer index."""

    def __init__(self, rngs):
        self.scale = nnx.Param(1 + 0.1 * jax.random.normal(rngs.params(), (WIDTH,)))
        self.shift = nnx.Param(0.1 * jax.random.normal(rngs.params(), (WIDTH,)))

    def __call__(self, x, call):
        y = jax.nn.sigmoid(x * self.scale[...] + self.shift[...]) * (1 + call.layer)
        return x + _drop(call.emit("block.out", y, TOKENS), call)


def _drop(y, call):
    return drop_path(y, call.drop_path, train=call.train, key=call.key_for("drop_path"))


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
                y, _ = stack(x, training(8), drop_path=rates)  # whose key drops no layer for every example
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
        twin(x, CALL)
        assert all(after is value for after, value in zip(models.split(twin)[2].values(), before.values(), strict=True))
        twin(x, training(0))
        after = models.split(twin)[2]
        assert all(np.any(after[name] != value) for name, value in before.items())


def test_each_layer_draws_its_own_numbers(x):
    stack = Stack([Norms], DEPTH, rngs=nnx.Rngs(0))
    outputs = [stack(x, training(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])
    masks = []

    @models.tap("block.in", at="*.first")
    def look(site, value):
        masks.append(value == 0)
        return value

    unrolled = Stack([Norms], 2, rngs=nnx.Rngs(0), scan=False)
    unrolled(x, training(0).replace(tap=Watch(look)))
    assert np.any(masks[0] != masks[1])


def test_outputs_of_chosen_layers_only(twins, x):
    """Layers 1 and -1; equal in both twins and to running fewer layers."""
    results = [twin(x, CALL, layers=(1, -1))[1] for twin in twins]
    close(results[0], results[1])
    assert set(results[0]) == {"1", "3"}
    y, _ = twins[0](x, CALL)
    close(results[0]["3"], y)
    assert not np.allclose(results[0]["1"], y)
    with pytest.raises(ValueError, match="no layer 4, there are 4"):
        twins[0](x, CALL, layers=(4,))


def test_sites_of_chosen_layers_are_recorded(twins, x):
    """A site that each layer reaches twice, by two paths; equal in both twins, and in the order of layers."""
    chosen = (0, 2, 3)
    results = [watched(twin, x, models.record("block.in", "block.out", layers=chosen))[1][0] for twin in twins]
    for one in results:
        assert one.layers == results[0].layers
        assert set().union(*one.layers.values()) == set(chosen)
        assert {layers for full, layers in one.layers.items() if full.endswith("block.in")} <= {(0, 2, 3), (0, 2)}
        np.testing.assert_array_equal(one["blocks.first.block.in"], one["blocks.second.block.in"])
    close(results[0].arrays, results[1].arrays)
    everything = watched(twins[1], x, models.record("block.in", "block.out"))[1][0]
    for full, layers in results[0].layers.items():
        rows = [everything.layers[full].index(layer) for layer in layers]
        close(results[0].arrays[full], everything.arrays[full][np.asarray(rows)])


def test_layers_are_numbered_through_the_model(x):
    seen = []

    @models.tap("block.in")
    def look(site, value):
        seen.append((site.layer, site.path))
        return value

    stack = Stack([Norms], 2, rngs=nnx.Rngs(0), first=5, scan=False)
    watched(stack, x, look)
    assert seen == [(5, "blocks.first"), (5, "blocks.second"), (6, "blocks.first"), (6, "blocks.second")]
    (_, found), (recorded,) = watched(stack, x, models.record("block.in", layers=6), layers=(1,))
    assert set(found) == {"1"}
    assert set(recorded.layers.values()) == {(6,)}


def test_intermediates_do_not_grow_with_depth():
    """The largest array of a traced call does not hold the tokens of all layers, chosen ones and recorded ones."""
    stack = Stack([Norms], 64, rngs=nnx.Rngs(0))

    def run(x):
        (_, found), recorded = watched(
            stack, x, models.record("block.in", layers=(3, 40), at="*.first"), layers=(3, 40)
        )
        return found, recorded

    jaxpr = jax.make_jaxpr(run)(jnp.zeros((3, GRID.tokens, WIDTH)))
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 64 * 3 * GRID.tokens * WIDTH / 4


def test_a_tap_edits_one_layer(twins, x):
    """By the number of the layer, which a scan traces; and the same said by `layers`."""

    @models.tap("block.in", "block.out")
    def by_number(site, value):
        return jnp.where((site.layer == 2) & (site.name == "block.in"), 0.0, value)

    @models.tap("block.in", layers=[2])
    def silence(site, value):
        return jnp.zeros_like(value)

    plain = twins[0](x, CALL)[0]
    for tap in (by_number, silence):
        edited = [twin(x, Call(GRID, tap=Watch(tap)), layers=(1, 2)) for twin in twins]
        close(edited[0], edited[1])
        np.testing.assert_array_equal(edited[0][1]["1"], edited[0][1]["2"])
        assert not np.allclose(edited[0][0], plain)


def test_state_of_every_layer_comes_back(x):
    """Twins, and a group whose last repetition is incomplete: layer i has row i, and the new rows are in order."""

    class Counter(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, call):
            return x + call.state["seen"], {"seen": call.state["seen"] + call.layer}

    start = {"seen": 10.0 * jnp.arange(5)}
    for members, scan in ((1, False), (3, True)):
        stack = Stack([Counter] * members, 5, rngs=nnx.Rngs(0), scan=scan)
        (y, state), _ = stack(x, Call(GRID, state=start))
        np.testing.assert_allclose(y, x + 100, rtol=1e-6)
        np.testing.assert_array_equal(state["seen"], 11.0 * np.arange(5))


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch", "attention"])
def test_rematerialization_changes_no_number(x, remat):
    gradients = []
    for policy in ("none", remat):
        stack = Stack([Norms, Gate], DEPTH, rngs=nnx.Rngs(0), remat=policy)
        graph, params, state = models.split(stack)

        def loss(params, graph=graph, state=state):
            return jnp.sum(models.merge(graph, params, state)(x, training(0))[0] ** 2)

        gradients.append(jax.jit(jax.grad(loss))(params))
    close(*gradients)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="depth 1 is less than the 2 blocks of a group"):
        Stack([Norms, Gate], 1, rngs=nnx.Rngs(0))
    stack = Stack([Norms], 2, rngs=nnx.Rngs(0), remat="ful")
    with pytest.raises(ValueError, match="unknown remat policy 'ful'; nearest: full"):
        stack(jnp.zeros((1, GRID.tokens, WIDTH)), CALL)


def test_names_of_scanned_leaves():
    assert models.unrolled_names("blocks.[1::2].w", 2) == ["blocks.1.w", "blocks.3.w"]
    assert models.unrolled_names("head.kernel", 2) == ["head.kernel"]
    flat = {"a.[1::2].w": np.arange(6.0).reshape(3, 2), "head": np.ones(2)}
    unrolled = models.unstack(flat)
    assert list(unrolled) == ["a.1.w", "a.3.w", "a.5.w", "head"]
    assert all(isinstance(value, np.ndarray) for value in models.stack(unrolled, like=flat).values())
    del unrolled["a.3.w"]
    with pytest.raises(KeyError, match=r"no entry a\.3\.w, .* first a\.5\.w"):
        models.stack(unrolled, like=flat)
    with pytest.raises(KeyError, match=r"no entry head.*nearest: heat"):
        models.stack({"heat": np.ones(2)}, like=["head"])


LAYERS = {f"blocks.{layer}.{leaf}": np.full(2, layer) for layer in range(4) for leaf in ("w", "b")}
SCANNED = ["blocks.[0::1].w", "blocks.[0::1].b"]
PAIRS = ["blocks.[0::2].w", "blocks.[1::2].w", "blocks.[0::2].b", "blocks.[1::2].b"]


@pytest.mark.parametrize(
    ("lost", "like", "said"),
    [
        (["2.w", "2.b"], SCANNED, r"no entry blocks\.2\.w, but layers .*\[0::1\]\.w behind it, first blocks\.3\.w"),
        (["2.b"], SCANNED, r"no entry blocks\.2\.b, but layers of blocks\.\[0::1\]\.b behind it"),
        (["3.b"], SCANNED, r"no entry blocks\.3\.b, but 4 layers of blocks\.\*"),
        (["2.b", "3.b"], SCANNED, r"no entry blocks\.2\.b, but 4 layers"),
        (["0.w"], SCANNED, r"no entry blocks\.0\.w, but layers"),
        (["0.b", "1.b", "2.b", "3.b"], SCANNED, r"no entry blocks\.0\.b, the first layer of blocks\.\[0::1\]\.b"),
        (["1.w"], PAIRS, r"no entry blocks\.1\.w, but layers of blocks\.\[1::2\]\.w behind it, first blocks\.3\.w"),
        (["2.w", "2.b"], PAIRS, r"no entry blocks\.2\.w, but 4 layers"),
        (["3.b"], PAIRS, r"no entry blocks\.3\.b, but 4 layers"),
    ],
)
def test_a_layer_that_is_not_there_is_named(lost, like, said):
    whole = models.stack(LAYERS, like=like)
    assert {name: value.shape[0] for name, value in whole.items()} == dict.fromkeys(like, 4 if like is SCANNED else 2)
    flat = {name: value for name, value in LAYERS.items() if name.removeprefix("blocks.") not in lost}
    with pytest.raises(KeyError, match=said):
        models.stack(flat, like=like)


def test_as_many_layers_as_the_arrays_of_like_have():
    like = {name: jax.ShapeDtypeStruct((4, 2), np.float32) for name in SCANNED}
    assert models.stack(LAYERS, like=like)["blocks.[0::1].b"].shape == (4, 2)
    fewer = {name: value for name, value in LAYERS.items() if not name.startswith("blocks.3.")}
    assert models.stack(fewer, like=SCANNED)["blocks.[0::1].w"].shape == (3, 2)  # names alone do not say how many
    with pytest.raises(KeyError, match=r"no entry blocks\.3\.w, but 4 layers of blocks\.\*"):
        models.stack(fewer, like=like)
    more = LAYERS | {"blocks.4.w": np.ones(2), "blocks.4.b": np.ones(2)}
    with pytest.raises(KeyError, match=r"2 entries fit no name in `like`, first blocks\.4\.w"):
        models.stack(more, like=like)


def test_the_last_repetition_of_a_group_may_be_incomplete():
    flat = {name: value for name, value in LAYERS.items() if not name.startswith("blocks.3.")}
    found = models.stack(flat, like=PAIRS)
    assert [found[name].shape[0] for name in PAIRS] == [2, 1, 2, 1]
    # A number elsewhere in a name is no layer.
    nested = {"stages.0.blocks.0.ls1.7": np.ones(1), "stages.0.blocks.1.ls1.7": np.ones(1), "stages.1.x": np.ones(1)}
    assert models.stack(nested, like=["stages.0.blocks.[0::1].ls1.7", "stages.1.x"])
