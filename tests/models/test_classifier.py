"""Classifiers of all families: logits of a bfloat16 model have the bits of float32, without a product of float32."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import tiny_models
from flax import nnx
from lowering import lowered

import models
from models.core import sharding
from models.core.errors import keyword_options
from models.layers.linear import Head, Linear

ROOT = Path(__file__).resolve().parents[2]
BF16 = jnp.bfloat16
families = pytest.mark.parametrize("family", tiny_models.TINY)
NORMAL = jax.nn.initializers.normal(1.0)


def rounded(value):
    return np.asarray(value).astype(BF16).astype(np.float64)


def made(family, **options):
    """The tiny model in bfloat16, with random parameters."""
    return tiny_models.create(family, dtype=BF16, **options)


def logits_of(head, x):
    """In float64, of inputs and kernel in bfloat16."""
    return rounded(x) @ rounded(head.kernel[...]) + np.asarray(head.bias[...], np.float64)


def check(found, expected):
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    # What a result in bfloat16 is from them.
    assert np.abs(rounded(expected) - expected).max() > 1e-4 * np.abs(expected).max()


@families
def test_logits_are_summed_in_float32(family):
    model = made(family)
    side = tiny_models.TINY[family][1]["image_size"]
    graph, params, state = models.split(model)
    images = tiny_models.images(side, side)
    found = jax.jit(lambda p, s, x: models.merge(graph, p, s).features(x))(params, state, images)
    assert found["pooled"].dtype == BF16
    if family == "volo":
        check(found["class_logits"], logits_of(model.head, found["pooled"]))
        tokens = logits_of(model.aux_head, found["tokens"][:, 1:])
        check(found["token_logits"], tokens)
        check(found["logits"], logits_of(model.head, found["pooled"]) + tokens.max(1) / 2)
    else:
        check(found["logits"], logits_of(model.head, found["pooled"]))


@pytest.mark.parametrize(
    "options", [{"distillation_token": True}, {"pre_logits": 12}, {"class_token": False, "pool": "map"}], ids=str
)
def test_both_heads_of_a_distilled_model_and_one_behind_a_representation(options):
    model = made("vit", **options)
    graph, params, state = models.split(model)
    found = jax.jit(lambda p, x: models.merge(graph, p, state).features(x))(params, tiny_models.images(32, 32))
    check(found["logits"], logits_of(model.head, found["pooled"]))
    if "distillation_token" in options:
        check(found["distillation_logits"], logits_of(model.head_dist, found["tokens"][:, 1]))
        check(found["mean_logits"], (np.float64(found["logits"]) + found["distillation_logits"]) / 2)


def test_a_thousand_classes_have_a_thousand_logits():
    """Sums of 384 products in bfloat16 would have some 700."""
    layer = Head(384, 1000, kernel_init=jax.nn.initializers.normal(0.02), dtype=BF16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (384,))
    logits = layer(x)
    assert logits.shape == (1000,)
    assert len(np.unique(logits)) > 990
    assert len(np.unique(logits.astype(BF16))) < 800


@families
def test_whatever_gives_logits_is_a_classifier(family):
    """Every linear layer with as many outputs as there are classes, and no other one."""
    own = keyword_options(models.core.registry._lookup(tiny_models.TINY[family][0])[0])
    options = {"distillation_token": True} if family == "vit" else {"pre_logits": 12} if "pre_logits" in own else {}
    model = models.reset_classifier(made(family, **options), 7, rngs=nnx.Rngs(0))
    found = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, Linear)]
    heads = [layer for layer in found if layer.kernel.shape[-1] == 7]
    assert len(heads) == (2 if family in ("vit", "volo") else 1)
    assert all(isinstance(layer, Head) is (layer in heads) for layer in found)


# --- what runs --------------------------------------------------------------------------------------------------------


def products(text):
    """(left, right, result) of every matrix product of a program."""
    found = re.findall(r"stablehlo\.dot_general.*: \(tensor<(\S+?)>, tensor<(\S+?)>\) -> tensor<(\S+?)>", text)
    assert len(found) == text.count("stablehlo.dot_general ")
    return [tuple(shape.rpartition("x")[2] for shape in shapes) for shapes in found]


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_no_product_of_float32_numbers(platform):
    """Forwards and backwards: bfloat16 by bfloat16, the one of the logits to float32."""
    layer = Head(16, 1000, kernel_init=NORMAL, dtype=BF16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jnp.ones((8, 16), BF16)

    def loss(params, x):
        return jax.nn.logsumexp(nnx.merge(graph, params)(x), axis=-1).sum()

    assert products(lowered(loss, platform, params, x)) == [("bf16", "bf16", "f32")]
    found = products(lowered(jax.grad(loss, (0, 1)), platform, params, x))
    assert sorted(found) == [("bf16", "bf16", "bf16")] * 2 + [("bf16", "bf16", "f32")]


def test_no_product_of_float32_numbers_in_the_train_step_of_a_model():
    """Of one without a softmax of float32 inside: the logits are all that is wider than its layers."""
    model = tiny_models.abstract("vit", dtype=BF16, attention="identity", class_token=False, pool="avg")
    graph, params, state = models.split(model)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def loss(params, images):
        return jax.nn.logsumexp(models.merge(graph, params, state)(images), axis=-1).sum()

    found = products(lowered(jax.grad(loss), "tpu", params, images))
    assert len(found) > 8
    assert {one[:2] for one in found} == {("bf16", "bf16")}
    assert found.count(("bf16", "bf16", "f32")) == 1


def test_derivatives():
    """Of the dtypes of what they belong to, near those of float32; forwards, backwards, and twice."""
    half, full = (Head(64, 10, kernel_init=NORMAL, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (BF16, None))
    x = jax.random.normal(jax.random.key(0), (8, 64)).astype(BF16)
    g = jax.random.normal(jax.random.key(1), (8, 10))
    gradients = []
    for layer in (half, full):
        graph, params = nnx.split(layer)
        of = lambda params, x, graph=graph: (jnp.sin(nnx.merge(graph, params)(x) / 8) * g).sum()  # noqa: E731
        d_params, d_x = jax.grad(of, (0, 1))(params, x)
        assert d_params.kernel[...].dtype == d_params.bias[...].dtype == jnp.float32
        assert d_x.dtype == BF16
        _, along = jax.jvp(partial(of, params), (x,), (jnp.ones_like(x),))
        np.testing.assert_allclose(along, d_x.astype(jnp.float32).sum(), rtol=0.05, atol=0.05)
        twice = jax.jvp(jax.grad(partial(of, params)), (x,), (jnp.ones_like(x),))[1]
        gradients.append([np.asarray(v, np.float64) for v in (d_params.kernel[...], d_params.bias[...], d_x, twice)])
    for narrow, wide in zip(*gradients, strict=True):
        assert np.abs(narrow - wide).max() < 0.02 * np.abs(wide).max()


def test_a_float32_classifier_is_a_linear_layer():
    layers = [kind(16, 5, kernel_init=NORMAL, rngs=nnx.Rngs(0)) for kind in (Head, Linear)]
    x = jnp.ones((3, 16))
    programs = [str(jax.make_jaxpr(layer)(x)) for layer in layers]
    assert programs[0] == programs[1]
    assert [sharding.rules(layer) for layer in layers] == [{}, {}]


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_on_a_mesh_nothing_else_changes():
    """Where weights are gathered for their use: the numbers of one device, and constraints and barriers as those of a
    linear layer.
    """
    found = simulated.run(8, ROOT / "tests" / "classifier_mesh_job.py")
    head, linear = found["Head"], found["Linear"]
    assert "fsdp" in head["kernel"]
    assert head["difference"] < 0.01
    assert head["dtypes"] == ["float32", "float32", "float32", "bfloat16"]
    assert head["barriers"] > 0
    assert head["constraints"] > 0
    # Forwards once, backwards for both inputs; the kernel is gathered again and not kept.
    assert head["products"] == 3
    assert {**head, "difference": 0} == {**linear, "difference": 0}
