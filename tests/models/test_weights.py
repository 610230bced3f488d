"""Official weights in and out: adaptations, the report of what does not fit, files, and timm itself."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from official import (
    REGISTERS,
    TOWER,
    assert_same,
    big_vision_names,
    build,
    dinov2_names,
    loaded,
    logits,
    official,
    own_values,
    scanned,
    with_values,
)

import models
from attn import resample_positions
from models.hosts.isotropic import VisionTransformer, VitOptions
from models.weights.family import FAMILIES, family_of
from models.weights.files import write_safetensors

# --- adaptations ------------------------------------------------------------------------------------------------------


def concrete(**arguments):
    model = build(**arguments)
    return with_values(model, own_values(model, seed=7))


def test_other_classes_keep_the_models_own_values():
    model = concrete(num_classes=3)
    before = np.asarray(model.head.kernel[...])
    notes = models.load_weights(model, official())
    assert notes == ["head starts anew: 5 classes there, 3 here"]
    np.testing.assert_array_equal(model.head.kernel[...], before)
    assert models.load_weights(concrete(num_classes=0), official()) == ["head with 5 classes is left out"]
    assert models.load_weights(concrete(), official(num_classes=0)) == ["head starts anew: 0 classes there, 5 here"]
    with pytest.raises(ValueError, match=r"head has 5 classes in the file and 3 here.* shapes only"):
        loaded(official(), num_classes=3)


def test_distillation_head_of_deit():
    distilled = official(cls="VisionTransformerDistilled")
    model = concrete(cls="VisionTransformerDistilled", num_classes=2)
    assert len(models.load_weights(model, distilled)) == 2
    with pytest.raises(ValueError, match=r"left over: dist_token"):
        loaded(distilled)


@pytest.mark.parametrize("size", [48, (16, 40)])
def test_other_image_size(size):
    timm = official()
    params, notes = loaded(timm, img_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert notes == [f"positions resampled from 4 x 4 to {rows // 8} x {columns // 8} (bicubic)"]
    # What the model of the file's own size does with these images.
    np.testing.assert_allclose(
        logits(params, (rows, columns), img_size=size),
        logits(loaded(timm)[0], (rows, columns)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_class_row_and_image_size_together():
    params, notes = loaded(official(), no_embed_class=True, img_size=(16, 40))
    assert len(notes) == 2
    timm = official()
    np.testing.assert_allclose(params["cls_token"], timm["cls_token"] + timm["pos_embed"][:, :1], rtol=1e-6)
    assert params["pos_embed"].shape == (1, 10, 16)


def test_own_convention_goes_first():
    # 196 rows are 14 x 14 patches, and 13 x 15 patches with a class row.
    timm = official(img_size=112, no_embed_class=True)
    _, notes = loaded(timm, img_size=(104, 120), no_embed_class=True)
    assert notes == ["positions resampled from 14 x 14 to 13 x 15 (bicubic)"]
    # 10 rows are 3 x 3 patches with a class row, and 2 x 5 patches without.
    _, notes = loaded(official(img_size=24), img_size=(16, 40))
    assert notes == ["positions resampled from 3 x 3 to 2 x 5 (bicubic)"]


def test_positions_of_unknown_sides():
    with pytest.raises(ValueError, match=r"pos_embed: 11 rows are not 1 prefix tokens and a square grid"):
        loaded(official(img_size=(16, 40)))


@pytest.mark.parametrize(("trained", "now"), [((16, 32), (32, 16)), ((24, 48), (16, 32)), ((16, 16), (8, 40))])
def test_positions_of_known_sides(trained, now):
    """A checkpoint says on which images it was trained; 2 x 4 places are as many as 4 x 2."""
    before, model = own_values(build(img_size=trained), seed=3), build(img_size=now)
    adapted, notes = models.adapt(model, before, own_values(model, seed=4), image_size=trained)
    sides = [(height // 8, width // 8) for height, width in (trained, now)]
    assert notes == ["positions resampled from {} x {} to {} x {} (bicubic)".format(*sides[0], *sides[1])]
    expected = resample_positions(before["pos_embed"], *sides, prefix=1, method="bicubic")
    np.testing.assert_array_equal(adapted["pos_embed"], expected)


# --- the report -------------------------------------------------------------------------------------------------------


def test_every_mismatch_is_in_one_line():
    timm = official()
    timm["blocks.1.mlp.fc1.weight"] = timm["blocks.1.mlp.fc1.weight"][:-1]
    timm["norm.bias"] = np.zeros(16, np.int8)
    for layer in range(3):
        del timm[f"blocks.{layer}.norm1.bias"]
    del timm["head.bias"]
    timm["relative_table"] = np.zeros(3)
    timm["blocks.3.norm1.bias"] = np.zeros(16)
    model = concrete()
    before = own_values(model, seed=7)
    with pytest.raises(ValueError, match="do not fit") as error:
        models.load_weights(model, timm)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "4 missing: blocks.{0-2}.norm1.bias [16] (from blocks.{0-2}.norm1.bias), head.bias [5] (from head.bias)",
        "2 left over: blocks.3.norm1.bias [16], relative_table",
        "1 of another shape: blocks.1.mlp.fc1.kernel is [16, 31] in the file (blocks.1.mlp.fc1.weight), [16, 32] in",
        "1 of another type: norm.bias is int8 in the file",
    ):
        assert part in message, message
    # Nothing was changed.
    assert_same({name: np.asarray(value) for name, value in models.split(model)[1].items()}, before)


@pytest.mark.parametrize(
    ("write", "arguments"),
    [(dict, {}), (lambda timm: scanned(big_vision_names(timm)), TOWER), (dinov2_names, REGISTERS)],
    ids=["timm", "big_vision", "dinov2"],
)
def test_whatever_is_wrong_is_one_line(write, arguments):
    whole = write(official(**arguments))
    model = build(**arguments)
    rng = np.random.default_rng(0)
    for name, change in zip(whole, itertools.cycle(("missing", "renamed", "shape", "type")), strict=False):
        damaged = dict(whole)
        array = damaged.pop(name)
        if change == "renamed":
            damaged[f"{name}x"] = array
        elif change == "shape":
            damaged[name] = np.zeros(rng.integers(0, 4, size=rng.integers(0, 5)), np.float32)
        elif change == "type":
            damaged[name] = np.zeros(array.shape, "complex64")
        if name == "mask_token" and change != "renamed":
            continue
        with pytest.raises(ValueError, match="do not fit") as error:
            models.convert_weights(model, damaged)
        assert "\n" not in str(error.value), (name, change)


def parallel():
    model = build(block_fn="ParallelScalingBlock")
    return model, own_values(model)


def test_a_model_without_a_table():
    with pytest.raises(ValueError, match="no table of official weight names for Linear"):
        models.load_weights(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {})
    with pytest.raises(ValueError, match="unknown layout of family 'vit' 'bigvision'; nearest: big_vision"):
        models.export_weights(concrete(), layout="bigvision")
    with pytest.raises(ValueError, match="is only a shape"):
        models.export_weights(build())
    with pytest.raises(ValueError, match="no blocks of kind 'parallel'"):
        models.export_weights(with_values(*parallel()), layout="big_vision")


class Mine(VisionTransformer):
    """A model of a user's own, made from one that has a table."""


class MineToo(Mine):
    """And one made from that."""


def test_a_model_that_is_made_from_another_has_its_weights(monkeypatch):
    options = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 3, "heads": 2, "mlp_width": 32}
    timm = official()
    for kind in (Mine, MineToo):
        model = nnx.eval_shape(lambda kind=kind: kind(VitOptions(num_classes=5, **options), rngs=nnx.Rngs(0)))
        assert models.load_weights(model, timm) == []
        assert_same(models.unstack(models.split(model)[1]), loaded(timm)[0])
        assert_same(models.export_weights(model), timm)
    # The nearest class counts.
    monkeypatch.setitem(FAMILIES, "mine", dataclasses.replace(family_of(model), name="mine", model=Mine, variants={}))
    assert family_of(model).name == "mine"
    assert family_of(build()).name == "vit"


# --- files and modules ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_file_into_an_abstract_and_a_concrete_model(tmp_path):
    model = concrete()
    written = models.export_weights(model, tmp_path / "w.safetensors")
    assert written["blocks.2.attn.qkv.weight"].shape == (48, 16)
    for other in (build(), with_values(build(), own_values(build(), seed=3))):
        assert models.load_weights(other, tmp_path / "w.safetensors") == []
        assert_same(models.split(other)[1], models.split(model)[1])
    half = {name: value.astype(np.float16) for name, value in written.items()}
    write_safetensors(tmp_path / "half.safetensors", half)
    params, _ = loaded(tmp_path / "half.safetensors")
    assert params["head.bias"].dtype == np.float32
    np.testing.assert_array_equal(params["head.bias"], half["head.bias"].astype(np.float32))
    with pytest.raises(ValueError, match=r"half\.safetensors: the weights do not fit"):
        loaded(tmp_path / "half.safetensors", depth=2)


def test_arrays_stay_on_their_devices():
    model = concrete()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[-1], memory_kind="unpinned_host")
    model.head.bias.set_value(jax.device_put(model.head.bias[...], device))
    models.load_weights(model, official())
    assert model.head.bias[...].sharding == device
