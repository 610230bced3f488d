"""Initial numbers: those of jax.random bit for bit, however they are made, and no program for each of their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from jax.nn import initializers

import models
from models.core import draw, init
from models.core.stack import Stack

KEY = jax.random.key(5)
PLAIN = {
    "normal": lambda key, shape: jax.random.normal(key, shape),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1),
    "truncated_normal": lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape),
}
SMALL, LARGE = draw.PIECES
SHAPES = [(), (1,), (3, 5, 7), (0, 3), (2, SMALL), (3, SMALL + 1), (4 * SMALL + 1,), (2 * LARGE + SMALL + 1,)]


@pytest.fixture
def compiled():
    """Names of what is compiled, or taken from the cache on disk, while a test runs."""
    names = []

    def listen(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def bits(array):
    return np.asarray(array).view(np.int32)


@pytest.mark.smoke
@pytest.mark.parametrize("distribution", PLAIN)
def test_a_draw_is_that_of_jax(distribution):
    """Odd sizes, scalars, one and several pieces of both lengths; times a number that is rounded first."""
    for shape in SHAPES:
        plain = PLAIN[distribution](KEY, shape)
        drawn = draw.draw(distribution, KEY, shape)
        assert drawn.shape == shape
        assert drawn.dtype == jnp.float32
        np.testing.assert_array_equal(bits(drawn), bits(plain), err_msg=str(shape))
        tripled = draw.draw(distribution, KEY, shape, scale=0.3)
        np.testing.assert_array_equal(bits(tripled), bits(plain * jnp.float32(0.3)), err_msg=str(shape))


@pytest.mark.parametrize("distribution", PLAIN)
def test_a_draw_is_the_same_eagerly_compiled_and_for_many_keys(distribution):
    keys = jax.random.split(KEY, 3)
    for shape in ((3, 5, 7), (3, SMALL + 1)):
        eager = np.stack([draw.draw(distribution, key, shape) for key in keys])
        compiled = jax.jit(draw.draw, static_argnums=(0, 2))
        one = [compiled(distribution, key, shape) for key in keys]
        np.testing.assert_array_equal(bits(eager), bits(np.stack(one)))
        many = jax.vmap(lambda key, shape=shape: draw.draw(distribution, key, shape))(keys)
        np.testing.assert_array_equal(bits(eager), bits(many))
        # The compiler joins the two factors of a normal number: one of three roundings is another.
        scaled = jax.jit(lambda key, shape=shape: draw.draw(distribution, key, shape, scale=0.3))
        np.testing.assert_array_max_ulp(scaled(KEY), draw.draw(distribution, KEY, shape, scale=0.3), maxulp=2)


def threefry(first, second, upper, lower):
    """Threefry-2x32 of 20 rounds (Salmon et al., SC 2011), a pair of words for each count."""
    keys = [np.uint32(word) for word in (first, second, first ^ second ^ 0x1BD11BDA)]
    left, right = upper + keys[0], lower + keys[1]
    for number in range(20):
        turn = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[number % 8])
        left = left + right
        right = ((right << turn) | (right >> (np.uint32(32) - turn))) ^ left
        if number % 4 == 3:
            group = number // 4 + 1
            left, right = left + keys[group % 3], right + keys[(group + 1) % 3] + np.uint32(group)
    return left, right


def test_a_piece_may_start_anywhere():
    """Behind the first 2**32 numbers, too, where no draw of jax.random fits into memory."""
    zero = np.zeros(1, np.uint32)
    assert [int(word[0]) for word in threefry(0, 0, zero, zero)] == [0x6B200159, 0x99BA4EFE]  # published
    first, second = (int(word) for word in jax.random.key_data(KEY))
    for start in (0, 3 * SMALL, 2**32, 7 * 2**32 + 5 * SMALL):
        upper, lower = start >> 32, start % 2**32
        found = draw._bits_from(np.array([first, second, upper, lower], np.uint32), 32, (SMALL,))
        count = np.uint32(lower) + np.arange(SMALL, dtype=np.uint32)
        left, right = threefry(first, second, np.full(SMALL, upper, np.uint32), count)
        np.testing.assert_array_equal(found, left ^ right)


def test_other_keys_and_places_are_left_to_jax():
    """Another generator, keys of the old style, a device or a mesh, the generator as it once was, other types."""
    shape = (3, SMALL)
    device = jax.devices()[0]
    for key in (jax.random.key(5, impl="rbg"), jax.random.PRNGKey(5), jax.device_put(KEY, device)):
        drawn, plain = draw.draw("normal", key, shape), jax.random.normal(key, shape)
        np.testing.assert_array_equal(bits(drawn), bits(plain))
        assert drawn.committed == plain.committed
    mesh = jax.make_mesh((1,), ("data",), devices=[device])
    with jax.set_mesh(mesh):
        for placed, plain in (
            (draw.draw("normal", KEY, shape), jax.random.normal(KEY, shape)),
            (draw.full(shape, 2), jnp.full(shape, 2.0)),
        ):
            assert placed.sharding == plain.sharding
            np.testing.assert_array_equal(bits(placed), bits(plain))
    with jax.threefry_partitionable(False):
        drawn, plain = draw.draw("normal", KEY, shape), jax.random.normal(KEY, shape)
        assert not np.array_equal(drawn, draw.draw("normal", jax.random.key(6), shape))
        np.testing.assert_array_equal(bits(drawn), bits(plain))
    half = draw.draw("normal", KEY, shape, jnp.bfloat16, scale=0.3)
    plain = jax.random.normal(KEY, shape, jnp.bfloat16) * jnp.bfloat16(0.3)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.float32), plain.astype(jnp.float32))


NAMESAKES = {
    "normal": (init.normal(0.02), initializers.normal(0.02)),
    "zeros": (init.zeros, initializers.zeros),
    "constant": (init.constant(-6.9), initializers.constant(-6.9)),
    "lecun_normal": (init.lecun_normal(), initializers.lecun_normal()),
    "xavier_uniform": (init.xavier_uniform(), initializers.xavier_uniform()),
    "he_normal_fan_out": (init.he_normal_fan_out(), initializers.variance_scaling(2.0, "fan_out", "normal")),
}


@pytest.mark.parametrize("name", NAMESAKES)
def test_initializers_are_their_namesakes(name):
    """Up to the order of two factors, which depends on the version of JAX."""
    ours, theirs = NAMESAKES[name]
    for shape in ((5, 7), (3, 3, 24, 56)):
        np.testing.assert_array_max_ulp(ours(KEY, shape, jnp.float32), theirs(KEY, shape, jnp.float32), maxulp=2)
        both = [jax.jit(lambda key, f=f, shape=shape: f(key, shape, jnp.float32))(KEY) for f in (ours, theirs)]
        np.testing.assert_array_max_ulp(*both, maxulp=2)


def test_nothing_is_allocated_for_shapes():
    """A key and constants from outside of the traced function are no reason to draw: 4 TB do not fit anywhere."""
    shape = (2**20, 2**20)
    found = jax.eval_shape(lambda: (draw.draw("normal", KEY, shape), draw.full(shape, 1), init.zeros(KEY, shape)))
    assert {(value.shape, value.dtype) for value in found} == {(shape, jnp.dtype("float32"))}


def test_a_new_shape_compiles_nothing(compiled):
    """One model of every family, after draws of other shapes."""
    for distribution in PLAIN:
        for size in (7, 5 * SMALL):
            draw.draw(distribution, KEY, (size,))
    # The keys of the layers of a stack are a program for each number of layers.
    for layers in range(1, 4):
        jax.vmap(jax.random.fold_in, (None, 0))(nnx.Rngs(0).params(), jnp.asarray(range(layers)))
    jax.jit(lambda x: x + 1)(2)
    assert compiled
    compiled.clear()
    for family, (name, options) in tiny_models.TINY.items():
        model = models.create(name, num_classes=5, rngs=nnx.Rngs(0), **options)
        assert not compiled, family
        leaves = {name: value for half in models.split(model)[1:] for name, value in half.items()}
        assert all(isinstance(value, jax.Array) and not value.committed for value in leaves.values())
    models.create("vit_mu16", image_size=48, init="big_vision", pre_logits=24, depth=2, rngs=nnx.Rngs(0))
    assert not compiled


def initial(family, seed=0, **options):
    """Parameters and state by name."""
    name, own = tiny_models.TINY[family]
    model = models.create(name, num_classes=5, rngs=nnx.Rngs(jax.random.key(seed)), **own | options)
    _, params, state = models.split(model)
    return {**params, **{f"state {name}": value for name, value in state.items()}}


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(bits(value), bits(theirs[name]), err_msg=name)


@pytest.mark.parametrize("family", tiny_models.TINY)
def test_scanned_and_unrolled_models_start_alike(family):
    same_bits(models.unstack(initial(family)), initial(family, scan=False))


@pytest.mark.parametrize("family", ["vit", "halonet"])
def test_a_model_is_that_of_the_plain_calls(family, monkeypatch):
    ours, compiled = initial(family), jax.jit(initial, static_argnums=0)(family)
    with monkeypatch.context() as patch:
        patch.setattr(draw, "_left_to_jax", lambda: True)
        same_bits(ours, initial(family))
    for name, value in ours.items():
        np.testing.assert_array_max_ulp(value, compiled[name], maxulp=2)


class Unusual(nnx.Module):
    """Leaves that do not come from here: a key, a count, 16 bits, an initializer of JAX, an array with a place."""

    def __init__(self, rngs):
        self.key = nnx.Variable(rngs.params())
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.half = nnx.Param(draw.full((3,), 1.5, jnp.bfloat16))
        self.kernel = nnx.Param(initializers.orthogonal()(rngs.params(), (4, 4)))
        self.fixed = nnx.Param(jax.device_put(jnp.arange(3.0), jax.devices()[0]))


@pytest.mark.parametrize("scan", [True, False])
def test_a_stack_holds_leaves_of_any_kind(scan):
    def make():
        _, params, state = models.split(Stack([Unusual], 3, rngs=nnx.Rngs(0), scan=scan))
        return {**params, **state}

    eager, compiled = make(), jax.jit(make)()
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        assert value.dtype == compiled[name].dtype
        assert value.shape == compiled[name].shape
        assert value.committed == name.endswith("fixed")
        if name.endswith("key"):
            np.testing.assert_array_equal(jax.random.key_data(value), jax.random.key_data(compiled[name]))
        else:
            np.testing.assert_allclose(value.astype(jnp.float32), compiled[name].astype(jnp.float32), atol=1e-6)
