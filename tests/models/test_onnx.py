"""The inference function in ONNX: onnxruntime, which knows no JAX, gives our outputs for any batch."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from models.core.onnx import convert
from models.core.onnx.convert import export_onnx

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.smoke] if name == "vit" else []) for name in tiny_models.TINY]
)
def test_onnxruntime_gives_the_logits_of_every_family(family):
    model = tiny_models.create(family)
    content = export_onnx(model, (32, 32, 3))
    images = np.asarray(tiny_models.images(32, 32))  # as other tests compile them
    expected = np.asarray(model(images))
    runs = session(content)
    (found,) = runs.run(["output"], {"input": images})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.ptp(expected))
    # The batch is open, and examples do not meet.
    np.testing.assert_allclose(runs.run(None, {"input": images[1:2]})[0], found[1:2], rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0


class Function(nnx.Module):
    """A function in place of a model."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def down(carry, row):
    return carry * 0.5 + row, carry.sum(-1)


def windows(x, mode, places=((0, 1), (3, 2), (2, 0))):
    numbers = jax.lax.GatherDimensionNumbers((0, 2), (1,), (1, 2))
    return jax.lax.gather(x, jnp.asarray(places), numbers, (x.shape[0], 1, 4), mode=mode)


def by_value(x, mode):
    places = jnp.round(3 * x[:, :, :2]).astype(jnp.int32)
    return jax.vmap(lambda rows, own: jnp.take(rows, own, axis=0, mode=mode))(x, places)


FUNCTIONS = {
    "elementwise": lambda x: jnp.log1p(jnp.exp2(x)) + jnp.expm1(x) * jnp.floor(3 * x) - jnp.abs(x) ** 1.5,
    "comparisons": lambda x: jnp.where(~((x > 0) & (x < 1)) | (x != x), jnp.clip(x, -0.5, 0.5), x % 0.3),
    "integers": lambda x: (x * 10).astype(jnp.int32) // 3 - jnp.argmin(x, axis=1)[:, None],
    "any and all": lambda x: (x > 1).any(2).astype(jnp.float32) + (x > -1).all(1)[:, :4],
    "reductions": lambda x: x.min((0, 2)) + x.max((0, 2)) + x.prod((0, 2)),
    "broadcasts that stay small": lambda x: jnp.sqrt(jnp.abs(x.mean(1, keepdims=True)) + jnp.zeros_like(x)),
    "reversed and padded": lambda x: jax.lax.pad(x[:, ::-1, ::2], 2.0, ((0, 0, 0), (-1, 2, 0), (1, -1, 0))),
    "numbers of examples": lambda x: x + jnp.arange(x.shape[0])[:, None, None],
    "examples as rows": lambda x: x.reshape(-1, 6) @ jnp.ones((6, 2)),
    "products": lambda x: jnp.einsum("bik,bjk,kl->bijl", x, x, jnp.eye(6, 3)),
    "a scan along what is not known": lambda x: jax.lax.scan(down, x[:, 0], x.swapaxes(0, 1), reverse=True)[1],
    "windows": lambda x: windows(x, "promise_in_bounds"),
    "windows that are moved inside": lambda x: windows(x, "clip", ((0, 5), (-1, 2), (9, 1))),
    "places by value": lambda x: by_value(x, "clip"),
    "places by value and nothing outside": lambda x: by_value(x, "fill"),
    "wrapped places": lambda x: by_value(x, "wrap"),
    "a branch that is a call": jax.checkpoint(lambda x: jax.nn.softmax(x) + jax.nn.gelu(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_jax_have_their_meaning(name):
    model = Function(FUNCTIONS[name])
    runs = session(export_onnx(model, jax.ShapeDtypeStruct((1, 4, 6), jnp.float32)))
    for count in (2, 5):
        x = np.random.default_rng(0).normal(size=(count, 4, 6)).astype(np.float32)
        expected = np.asarray(model(x))
        (found,) = runs.run(None, {"input": x})
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs_have_their_names():
    def call(model, given):
        return {"sum": given["image"].sum((1, 2, 3)), "words": given["text"] * 2}

    inputs = {"image": jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.float32), "text": jax.ShapeDtypeStruct((1, 4), jnp.int32)}
    content = export_onnx(Function(None), inputs, call=call)
    given = {"image": np.ones((3, 2, 2, 3), np.float32), "text": np.arange(12, dtype=np.int32).reshape(3, 4)}
    total, words = session(content).run(["sum", "words"], given)
    np.testing.assert_array_equal(total, [12, 12, 12])
    np.testing.assert_array_equal(words, 2 * given["text"])
    assert convert.difference(content, given, {"sum": total, "words": words}) == 0
    assert convert.difference(content, given, {"sum": total * 2, "words": words}) == 0.5


def test_a_model_of_16_bits_is_one_of_32_in_the_file():
    model = tiny_models.create("vit", dtype=jnp.bfloat16)
    content = export_onnx(model, (32, 32, 3))
    kinds = {constant.data_type for constant in onnx.load_from_string(content).graph.initializer}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    images = np.asarray(tiny_models.images(32, 32))
    assert convert.difference(content, {"input": images}, model(images)) < 0.03


def test_weights_are_in_the_file_once():
    model = tiny_models.create("swin")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert size < len(export_onnx(model, (32, 32, 3))) < 2.5 * size + 60_000  # tables of positions, and the nodes


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: jnp.sort(x), "no form in ONNX for any batch: there is no rule for JAX's sort$"),
        (lambda x: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y - 1, x), "there is no rule for JAX's while$"),
        (lambda x: x[:1], "no form in ONNX for any batch: "),
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape[1:]), "there is no rule for JAX's "),
    ],
)
def test_what_has_no_form_in_onnx_is_one_line(function, said):
    with pytest.raises(ValueError, match=said) as error:
        export_onnx(Function(function), jax.ShapeDtypeStruct((1, 4, 6), jnp.float32))
    assert len(str(error.value).splitlines()) == 1


def test_an_absent_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^an ONNX file: needs the package onnx \(pip install onnx onnxruntime\)$"):
        export_onnx(tiny_models.create("vit"), (32, 32, 3))
