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
