"""Dense attention: what runs where, the numbers of each path, its one place on a mesh. Its oracle: `test_attn.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprs import steps
from lowering import lowered

from attn import dense_attention, explain, fallback
from attn.dense import cudnn, splash, xla

MASK = np.tril(np.ones((1, 1, 12, 12), bool))


def arrays(queries=12, keys=12, *, batch=2, heads=3, dim=8, dim_v=8, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim_v)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def shapes(tokens, dtype="bfloat16", dim=64):
    return [jax.ShapeDtypeStruct((2, tokens, 4, dim), dtype)] * 3


def gradients(function):
    return jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs).astype(jnp.float32))), argnums=(0, 1, 2))


@pytest.fixture
def short(monkeypatch):
    """Splash attention is chosen for few tokens too."""
    monkeypatch.setattr(splash, "LEAST_TOKENS", 8)


def same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_kernel_runs_where_it_is_worth_it():
    for tokens, name in ((4, "xla"), (197, "tpu"), (1024, "tpu"), (1535, "xla"), (1536, "splash"), (4096, "splash")):
        explained = explain(dense_attention, *shapes(tokens))
        assert (explained["cpu"].implementation, explained["tpu"].implementation) == ("xla", name)
        for platform, calls in (("cpu", 0), ("tpu", int(name != "xla"))):
            assert lowered(dense_attention, platform, *shapes(tokens)).count("tpu_custom_call") == calls
    assert "below 1536 tokens xla is faster" in explain(dense_attention, *shapes(197))["tpu"].refused["splash"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": jnp.ones((1, 1, 1, 1536), bool)}, "has no mask"),
        ({"bias": jnp.ones((1, 4, 1, 1536)), "dropout": 0.1, "key": jax.random.key(0)}, "has no bias and no dropout"),
        ({"edit": lambda site, value: value}, "has no look at the maps"),
        ({"scale": jnp.ones(())}, "has no scale that is an array"),
    ],
)
def test_what_no_kernel_has_is_a_fallback_that_is_seen(options, reason):
    run = functools.partial(dense_attention, **options)
    choice = explain(run, *shapes(1536))["tpu"]
    assert (choice.implementation, choice.fallback_from, choice.refused["splash"]) == ("xla", "splash", reason)
    with fallback("error"):
        lowered(run, "cpu", *shapes(1536))
        with pytest.raises(ValueError, match=f"dense_attention on tpu: 'splash' refuses .*{reason}"):
            lowered(gradients(run), "tpu", *shapes(1536))
    assert "tpu_custom_call" not in lowered(run, "tpu", *shapes(1536))


def test_other_reasons_to_refuse():
    for inputs, reason in ((shapes(1536, "float32"), "is for bfloat16"), (shapes(1536, dim=160), "multiples of 128")):
        assert reason in explain(dense_attention, *inputs)["tpu"].refused["splash"]
    for inputs, reason in (
        (shapes(64, "float32"), "dtype float32; cuDNN takes bfloat16 and float16"),
        (shapes(64, dim=60), "head dims 60 and 60; cuDNN takes one, a multiple of 8 up to 128"),
        (shapes(64, dim=136), "head dims 136 and 136"),
    ):
        choice = explain(dense_attention, *inputs)["cuda"]
        assert (choice.implementation, choice.fallback_from) == ("xla", "cudnn")
        assert reason in choice.refused["cudnn"]


@pytest.mark.parametrize("said", [None, "this machine lowers nothing to cuDNN"])
def test_a_trace_does_not_depend_on_the_machine(monkeypatch, said):
    """What cuDNN takes is one equation whether this machine has it or not; who lowers finds out."""
    monkeypatch.setattr(cudnn, "unavailable", lambda: said)

    def run(q, k, v):
        return dense_attention(q, k, v)

    assert steps(run, *shapes(64)) == ["forward"]
    assert explain(run, *shapes(64))["cuda"].implementation == ("xla" if said else "cudnn")
    # What no kernel takes anywhere is differentiated as it stands, with its maps kept.
    assert steps(run, *shapes(64, "float32")) == []


def test_of_cudnn_nothing_is_taken_in_half_precision():
    """It would hand out a logsumexp of eight bits."""
    choice = explain(functools.partial(dense_attention, return_lse=True), *shapes(64))["cuda"]
    assert choice.refused["cudnn"] == "the logsumexp, which cuDNN hands out in half precision only"


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (8, 5), (7, 6), (6, 6)])
def test_gradients_for_cudnn_are_of_even_numbers_of_tokens(monkeypatch, queries, keys):
    """Which is what cuDNN has them for; seen by XLA in its place."""
    honest = jax.nn.dot_product_attention

    def even(q, k, v, *, implementation, **options):
        assert (implementation, q.shape[1] % 2, k.shape[1] % 2) == ("cudnn", 0, 0)
        return honest(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(2, n, heads, 8)), jnp.float32)
        for n, heads in ((queries, 4), (keys, 2), (keys, 2), (queries, 4))
    )
    found = cudnn.backward(q, k, v, d_out, scale=0.3, with_lse=False)
    attend = functools.partial(dense_attention, scale=0.3, implementation="reference")
    for one, other in zip(found, jax.vjp(attend, q, k, v)[1](d_out), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_implementation_by_name():
    assert lowered(functools.partial(dense_attention, implementation="splash"), "tpu", *shapes(256)).count(
        "tpu_custom_call"
    )
    assert "tpu_custom_call" not in lowered(
        functools.partial(dense_attention, implementation="xla"), "tpu", *shapes(1536)
    )
    with pytest.raises(ValueError, match="unknown implementation 'splish' of dense_attention; nearest: splash"):
        dense_attention(*arrays(), implementation="splish")
    with pytest.raises(ValueError, match="implementation='splash' of dense_attention: has no mask"):
        dense_attention(*arrays(), implementation="splash", mask=MASK)
    with pytest.raises(ValueError, match="implementation='splash' of dense_attention runs on tpu only"):
        jax.jit(functools.partial(dense_attention, implementation="splash"))(*arrays())


# --- numbers ----------------------------------------------------------------------------------------------------------


def written_out(q, k, v):
    """What dense attention computes on a CPU, operation by operation: sums and the scale are in float32."""
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(q.shape[-1] ** -0.5 * product("bhnd,bhmd->bhnm", q, k), axis=-1)
    return jnp.swapaxes(product("bhnm,bhme->bhne", probs.astype(v.dtype), v).astype(v.dtype), 1, 2)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_on_a_cpu_are_what_they_were(dtype):
    inputs = arrays(5, 7, dim_v=6, dtype=dtype)
    same(jax.jit(dense_attention)(*inputs), jax.jit(written_out)(*inputs))
    same(jax.jit(gradients(dense_attention))(*inputs), jax.jit(gradients(written_out))(*inputs))


def test_numbers_on_a_cpu_do_not_depend_on_what_runs_elsewhere(short):
    inputs = arrays()
    assert explain(dense_attention, *inputs)["tpu"].implementation == "splash"
    same(jax.jit(dense_attention)(*inputs), jax.jit(written_out)(*inputs))
    same(jax.jit(gradients(dense_attention))(*inputs), jax.jit(gradients(written_out))(*inputs))
    several = [jnp.stack(parts) for parts in zip(arrays(), arrays(seed=1), strict=True)]
    found = jax.jit(jax.vmap(gradients(dense_attention), in_axes=(0, None, 0)))(several[0], inputs[1], several[2])
    for index in range(2):
        expected = gradients(written_out)(several[0][index], inputs[1], several[2][index])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one[index], other)), atol=0.02)


@pytest.mark.parametrize("keys", [20, 512])
def test_splash_attention_computes_the_same(keys):
    """The kernels in the interpreter, with blocks that are filled up and blocks that are whole."""
    q, k, v = arrays(130, keys, batch=1, heads=1, dim=16, dim_v=16)
    d_out = arrays(130, keys, batch=1, heads=1, dim=16, seed=1)[0]

    def run(module):
        def both(*inputs):
            forward = module.forward(*inputs[:3], scale=0.3, with_lse=True)
            return *forward, *module.backward(*inputs, scale=0.3, with_lse=False)

        return jax.jit(both)(q, k, v, d_out)

    expected = run(xla)
    with pltpu.force_tpu_interpret_mode():
        found = run(splash)
    # The scale, no power of two, rounds nothing of the logits.
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() < 0.01 * np.abs(other).max()
