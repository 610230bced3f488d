"""How models are called: outside of programs, under meshes of every kind, differentiated in any way, exported."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import tiny_models

import models
from models.hosts import host

ROOT = Path(__file__).resolve().parents[2]
families = pytest.mark.parametrize("family", tiny_models.TINY)


def images(family, batch=2):
    side = tiny_models.TINY[family][1]["image_size"]
    return tiny_models.images(side, side, batch=batch)


def reference(family, **options):
    """The tiny model by the plain implementation of each of its mechanisms."""
    own = tiny_models.TINY[family][1].get("attention_options", {})
    return tiny_models.create(family, attention_options={**own, "implementation": "reference"}, **options)


# --- outside of programs ----------------------------------------------------------------------------------------------


def compiled():
    return host._compiled._cache_size()


def test_a_second_call_compiles_nothing():
    """Nor does one with other weights, or with a ready tap of other numbers; batch statistics come back."""
    model, x = tiny_models.create("halonet", drop_path=0.1), images("halonet")
    first, before = model(x), compiled()
    np.testing.assert_array_equal(model(x), first)
    twin = models.merge(*models.split(tiny_models.create("halonet", drop_path=0.1)))
    np.testing.assert_array_equal(twin(x), first)
    assert compiled() == before
    tapped = model(x, tap=models.scale_logits(2.0))
    after = compiled()
    assert not np.allclose(model(x, tap=models.scale_logits(3.0)), tapped)
    assert compiled() == after
    names = {name for name, value in models.split(model)[2].items() if value is not None}
    stats = dict(models.split(model)[2])
    model(x, train=True, key=jax.random.key(0))
    moved = {name for name, value in models.split(model)[2].items() if not np.array_equal(value, stats[name])}
    assert moved == names
    unchanged = dict(models.split(model)[2])
    model(x)
    assert all(value is unchanged[name] for name, value in models.split(model)[2].items())


def test_a_model_of_shapes_says_so():
    abstract = tiny_models.abstract("vit")
    with pytest.raises(ValueError, match=r"this VisionTransformer has shapes in place of weights: make it without"):
        abstract(images("vit"))


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_meshes_of_every_kind():
    found = simulated.run(4, ROOT / "tests" / "mesh_kinds_job.py")
    said = {name: found.pop(name) for name in list(found) if name.endswith("explicit")}
    assert len(said) == 2
    assert all(
        "under a mesh with explicit axes (data, tensor): make the mesh with axis_types" in x for x in said.values()
    )
    assert len(found) == 10
    assert max(found.values()) < 1e-5, found


# --- derivatives ------------------------------------------------------------------------------------------------------


@families
def test_every_family_has_all_derivatives_by_the_reference(family):
    """Forward mode, and forward over reverse: traced here; their numbers are those of operators and layers."""
    model, x = reference(family), images(family)

    def loss(x):
        return jnp.sin(model(x)).sum()

    jax.eval_shape(lambda: jax.jvp(loss, (x,), (x,)))
    jax.eval_shape(lambda: jax.jvp(jax.grad(loss), (x,), (x,)))


def test_second_derivatives_have_the_right_numbers():
    """Of a model with windows, a convolution and batch statistics: along a line, by differences of gradients."""
    model, x = reference("maxvit", depths=(1, 1)), images("maxvit")
    t = jnp.cos(x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(model(x)).sum()))
    along = jax.jit(lambda x: jax.jvp(gradient, (x,), (t,))[1])(x)
    step = 1e-2
    differences = (gradient(x + step * t) - gradient(x - step * t)) / (2 * step)
    np.testing.assert_allclose(along, differences, atol=2e-2 * float(jnp.abs(along).max()))


@pytest.mark.parametrize(
    ("family", "operator"),
    [("swin", "window_attention"), ("volo", "outlook_attention"), ("biformer", "routed_attention")],
)
def test_other_implementations_say_what_they_have(family, operator):
    model, x = tiny_models.create(family), images(family)
    with pytest.raises(ValueError, match=f"{operator} is differentiable in reverse mode, once; implementation='ref"):
        jax.jvp(lambda x: model(x).sum(), (x,), (x,))


# --- programs for several platforms -----------------------------------------------------------------------------------


@families
def test_a_family_is_exported_for_machines_that_are_not_here(family):
    """One file for CPUs, NVIDIA GPUs and TPUs, for any batch: what runs where is chosen as it is lowered."""
    from models.core.export import export_inference

    side = tiny_models.TINY[family][1]["image_size"]
    made = export_inference(tiny_models.create(family), (side, side, 3))
    assert set(made.platforms) == {"cpu", "cuda", "tpu"}
    if family == "vit":
        x = images(family, batch=3)
        np.testing.assert_allclose(made.call(x), tiny_models.create(family)(x), atol=1e-5)


def test_dtype_none_and_integers():
    model = tiny_models.create("swin")
    assert model(images("swin").astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(ValueError, match="images are uint8"):
        model(np.zeros((1, 32, 32, 3), np.uint8))
