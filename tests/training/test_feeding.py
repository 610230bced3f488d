"""What goes from a data source to a task: the fields, shapes and types that it asked for, or one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import data
from training.run import feeding, loop

SOURCE = data.ArraySource({"label": [0]}, fields={"label": "label"}, name="arrays")


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        (np.uint8, jnp.float32, "is uint8 after config.data.train_transforms, the task takes float32; add 'normalize'"),
        (np.uint8, jnp.bfloat16, "the task takes bfloat16; add 'normalize'"),
        (np.float32, jnp.uint8, "is float32 after .*, the task takes uint8; leave out 'normalize'"),
        (np.int64, jnp.float32, r"is int64 after .*, the task takes float32$"),
        (np.float64, jnp.int32, r"is float64 after .*, the task takes int32$"),
    ],
)
def test_another_kind_of_numbers_is_refused(value, wanted, said):
    batch = {"image": np.ones((2, 4, 4, 3), value)}
    with pytest.raises(ValueError, match=f"field 'image' of 'arrays' .*{said}"):
        feeding.fields(batch, {"image": jax.ShapeDtypeStruct((2, 4, 4, 3), wanted)}, SOURCE, "train_transforms")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.int64, jnp.int32),
        (np.uint8, jnp.int32),
        (np.int64, jnp.uint8),
        (np.float64, jnp.float32),
        (np.float32, jnp.bfloat16),
        (np.bool_, jnp.float32),
    ],
)
def test_numbers_come_in_the_type_of_the_task(value, wanted):
    spec = {"label": jax.ShapeDtypeStruct((3,), wanted)}
    found = feeding.fields({"label": np.array([0, 1, 1], value)}, spec, SOURCE, "train_transforms")
    assert found["label"].dtype == wanted
    assert found["label"].astype(int).tolist() == [0, 1, 1]


def test_numbers_that_the_type_of_the_task_does_not_hold_are_refused():
    spec = {"label": jax.ShapeDtypeStruct((2,), jnp.uint8)}
    with pytest.raises(ValueError, match="'label' of 'arrays' has values from 3 to 256, the task takes uint8"):
        feeding.fields({"label": np.array([3, 256])}, spec, SOURCE, "train_transforms")


def test_text_that_is_still_text_names_the_transform():
    captions = data.ArraySource({"text": ["a dog"]}, fields={"text": "text"}, name="captions")
    spec = {"text": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
    with pytest.raises(ValueError, match=r"no field 'text', .*'tokenize\(length\)' in config.data.eval_transforms"):
        feeding.fields({"index": np.zeros(1, np.int64)}, spec, captions, "eval_transforms")


@pytest.mark.parametrize("key", ["train_transforms", "eval_transforms"])
def test_pixels_that_nobody_normalized_stop_a_run_before_it_writes(tmp_path, key):
    with pytest.raises(ValueError, match=f"uint8 after config.data.{key}, the task takes float32; add 'normalize'"):
        loop.train(tiny.config(**{f"data__{key}": "flip"}), tmp_path / "run", terminal=tiny.quiet())
    assert not (tmp_path / "run").exists()


def batch_of(**fields):
    """A source with a field of each of these kinds, `kind=value [B, ...]`, and a batch of it."""
    source = data.ArraySource(fields, fields={name: name for name in fields}, name="arrays")
    return fields, source


def test_only_height_and_width_may_differ_in_an_evaluation():
    kinds = {"views": (2, 3, 8, 9, 3), "video": (2, 5, 8, 9, 3), "depth": (2, 8, 9), "heatmap": (2, 8, 9, 4)}
    batch, source = batch_of(**{kind: np.zeros(shape, np.float32) for kind, shape in kinds.items()})
    for kind, shape in kinds.items():
        other = (*shape[:2], 4, 4, 3) if len(shape) == 5 else (2, 4, 4, *shape[3:])
        spec = {kind: jax.ShapeDtypeStruct(other, jnp.float32)}
        assert feeding.fields(batch, spec, source, "eval_transforms", any_size=True)[kind].shape == shape
        with pytest.raises(ValueError, match=r"has shape .* \(config.data.image_size and the transforms have to agree"):
            feeding.fields(batch, spec, source, "train_transforms")
    spec = {"views": jax.ShapeDtypeStruct((2, 4, 8, 9, 3), jnp.float32)}
    with pytest.raises(ValueError, match=r"'views' of 'arrays' has shape \(3, 8, 9, 3\) .* takes \(4, 8, 9, 3\)$"):
        feeding.fields(batch, spec, source, "eval_transforms", any_size=True)


@pytest.mark.parametrize(
    ("kind", "value", "wanted", "hint"),
    [
        ("tokens", np.zeros((2, 8), np.int32), (2, 6), r"the length of 'tokenize\(length\)'"),
        ("image", np.zeros((2, 4, 4, 1), np.float32), (2, 4, 4, 3), "channels are changed by 'to_rgb'"),
        ("boxes", np.zeros((2, 8, 4), np.float32), (2, 5, 4), r"'pad_rows\(count\)' gives one number of rows"),
        ("array", np.zeros((2, 7), np.float32), (2, 8), ""),
    ],
)
def test_another_shape_names_what_makes_it(kind, value, wanted, hint):
    batch, source = batch_of(**{kind: value})
    with pytest.raises(ValueError, match=rf"has shape .*, the task takes .*\){f' .{hint}' if hint else '$'}"):
        feeding.fields(batch, {kind: jax.ShapeDtypeStruct(wanted, value.dtype)}, source, "eval_transforms")


def test_the_kind_of_a_field_is_said_and_decides_the_hint():
    source = data.ArraySource({"left": np.zeros((2, 3, 4, 4, 3), np.uint8)}, fields={"left": "views"}, name="arrays")
    batch = {"left": np.zeros((2, 3, 4, 4, 3), np.uint8)}
    spec = {"left": jax.ShapeDtypeStruct((2, 3, 4, 4, 3), jnp.float32)}
    with pytest.raises(ValueError, match=r"field 'left' \(views\) of 'arrays' is uint8 .*; add 'normalize'"):
        feeding.fields(batch, spec, source, "train_transforms")
