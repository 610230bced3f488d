"""What models take for images, and the line that they say of anything else: the tiny model of every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import models
from models.hosts.images import checked_images

families = pytest.mark.parametrize("family", tiny_models.TINY)


def side(family):
    return tiny_models.TINY[family][1]["image_size"]


def shape_of_logits(model, images, **options):
    """Traced only; the error that a call has is raised."""
    graph, params, state = models.split(model)
    run = lambda p, s, x: models.merge(graph, p, s)(x, **options)  # noqa: E731
    return jax.eval_shape(run, params, state, images).shape


def shapes(family, channels=3):
    """What is wrong with each: (images, line)."""
    n = side(family)
    one = jax.ShapeDtypeStruct
    other = channels + 1
    hint = "normalize them to floating point first, (images / 255 - mean) / std, as the transform 'normalize' does"
    allowed = f"allowed: (batch, rows, columns, {channels})"
    return {
        "bytes": (one((2, n, n, channels), jnp.uint8), f"images are uint8: {hint}"),
        "integers": (one((2, n, n, channels), jnp.int32), f"images are int32: {hint}"),
        "truth": (one((2, n, n, channels), bool), f"images are bool: {hint}"),
        "no batch": (
            one((n, n, channels), jnp.float32),
            f"images of ({n}, {n}, {channels}); {allowed}; the batch axis is missing, images[None] is a batch of one",
        ),
        "a video": (one((2, 2, n, n, channels), jnp.float32), f"images of (2, 2, {n}, {n}, {channels}); {allowed}"),
        "channels first": (
            one((2, channels, n, n), jnp.float32),
            f"images of (2, {channels}, {n}, {n}) have their channels first; {allowed}, images.transpose(0, 2, 3, 1)",
        ),
        "other channels": (
            one((2, n, n, other), jnp.float32),
            f"image of {other} channels for a model of {channels}; images are NHWC",
        ),
        "no pixel": (one((2, 0, n, channels), jnp.float32), f"images of 0 x {n} pixels; allowed: at least one"),
    }


def refused(model, images):
    with pytest.raises(ValueError) as error:
        shape_of_logits(model, images)
    assert "\n" not in str(error.value)
    return str(error.value)


@families
@pytest.mark.parametrize("channels", [3, 1, 5])
def test_what_is_no_image_is_one_line(family, channels):
    """Of a model for other channels than three, too."""
    model = tiny_models.abstract(family, channels=channels)
    assert model.options.channels == channels
    right = jax.ShapeDtypeStruct((2, side(family), side(family), channels), jnp.float32)
    assert shape_of_logits(model, right) == (2, 5)
    for what, (images, line) in shapes(family, channels).items():
        assert refused(model, images).startswith(line), what


def test_a_missing_axis_of_channels_is_named():
    with pytest.raises(ValueError, match=r"the axis of channels is missing, images\[\.\.\., None\] has it"):
        checked_images(np.zeros((8, 28, 28), np.float32), 1)


@families
def test_integers_are_refused_at_once_and_numbers_of_any_float_are_not(family):
    """Called as a user does, without jit: arrays of NumPy, and floating point of another width."""
    model = tiny_models.create(family)
    pixels = np.random.default_rng(0).integers(0, 255, (2, side(family), side(family), 3), np.uint8)
    with pytest.raises(ValueError, match="images are uint8"):
        model(pixels)
    with pytest.raises(ValueError, match="images are uint8"):
        model.features(pixels)
    graph, params, state = models.split(model)
    run = jax.jit(lambda p, s, x: models.merge(graph, p, s).features(x))
    normal = pixels / 255 - 0.5
    found = run.eval_shape(params, state, jnp.asarray(normal, jnp.bfloat16))
    # A model in float32 computes in it, whatever its images are.
    assert found["tokens"].dtype == found["embedded"].dtype == jnp.float32
    assert run.eval_shape(params, state, normal)["logits"].dtype == jnp.float32
    if family == "vit":
        expected = run(params, state, jnp.asarray(normal, jnp.bfloat16).astype(jnp.float32))
        found = run(params, state, jnp.asarray(normal, jnp.bfloat16))
        np.testing.assert_array_equal(found["logits"], expected["logits"])


@families
def test_an_empty_batch_has_empty_results(family):
    model = tiny_models.create(family)
    graph, params, state = models.split(model)
    run = jax.jit(lambda p, s, x: models.merge(graph, p, s).features(x, layers=(-1,)))
    found = run(params, state, tiny_models.images(side(family), side(family), batch=0))
    one = run.eval_shape(params, state, tiny_models.images(side(family), side(family), batch=1))
    assert found.keys() == one.keys()
    for name, value in found.items():
        assert value.shape == (0, *one[name].shape[1:]), name
    images = jax.ShapeDtypeStruct((0, side(family), side(family), 3), jnp.float32)
    assert shape_of_logits(model, images) == (0, 5)
    for asked in ({"train": True, "key": jax.random.key(0)}, {"tap": models.record("heads")}):
        with pytest.raises(ValueError, match="a batch without images, in training or with a tap; allowed: at least"):
            shape_of_logits(model, images, **asked)


@families
@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_drop_path_that_is_no_share_is_one_line(family, rate):
    """Before there is a model: layers that are scanned see a rate of their own that nobody can check."""
    with pytest.raises(ValueError, match=f"drop_path={rate}; allowed: a number of at least 0 and below 1"):
        tiny_models.abstract(family, drop_path=rate)
