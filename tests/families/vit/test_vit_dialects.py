"""Each dialect of a ViT's weights against timm's names of the same numbers."""

import re
from functools import partial

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
    old_names,
    own_values,
    prefixed,
    scanned,
    with_values,
)

import models


def test_deit3_names_of_layer_scale():
    arguments = {"init_values": 1e-4, "no_embed_class": True}
    timm = official(**arguments)
    deit3 = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): value for name, value in timm.items()}
    assert "blocks.2.gamma_2" in deit3
    assert_same(loaded({"model": deit3}, **arguments)[0], loaded(timm, **arguments)[0])


def test_dinov2_with_registers():
    arguments = REGISTERS | {"no_embed_class": True}
    timm = official(**arguments)
    row = np.random.default_rng(1).normal(size=(1, 1, 16)).astype(np.float32)
    dinov2 = dinov2_names(timm)
    dinov2["cls_token"] = timm["cls_token"] - row
    dinov2["pos_embed"] = np.concatenate([row, timm["pos_embed"]], axis=1)
    assert {"blocks.1.2.mlp.w12.weight", "register_tokens"} < dinov2.keys()
    params, notes = loaded(dinov2, **arguments)
    expected, _ = loaded(timm, **arguments)
    np.testing.assert_allclose(params["cls_token"], expected["cls_token"], atol=1e-6)
    assert_same(params | {"cls_token": expected["cls_token"]}, expected)
    assert [note for note in notes if "added to these tokens" in note]
    assert [note for note in notes if "mask_token" in note]

    # The same function in a model whose table has rows for class and registers.
    rows, notes = loaded(dinov2, **REGISTERS)
    assert rows["pos_embed"].shape == (1, 21, 16)
    assert [note for note in notes if "zero" in note]
    np.testing.assert_allclose(logits(rows, **REGISTERS), logits(expected, **arguments), rtol=1e-4, atol=1e-4)


def test_gate_and_value_as_two_layers():
    arguments = REGISTERS | {"no_embed_class": True}
    timm = official(**arguments)
    split = {}
    for name, value in timm.items():
        if ".mlp.fc1." in name:
            split[name.replace("fc1", "fc1_g")], split[name.replace("fc1", "fc1_x")] = np.split(value, 2)
        else:
            split[name] = value
    assert_same(loaded(split, **arguments)[0], loaded(timm, **arguments)[0])


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (lambda flax: flax, TOWER),
        (scanned, TOWER),
        (lambda flax: prefixed("params/img/", flax), TOWER),
        (lambda flax: prefixed("opt/target/", old_names(flax)), {}),
        (lambda flax: prefixed("params/", scanned(flax)), {}),
    ],
    ids=["map", "scan", "two towers", "old names", "prefix and scan"],
)
def test_big_vision(write, arguments):
    timm = official(**arguments)
    params, notes = loaded(write(big_vision_names(timm)), **arguments)
    assert_same(params, loaded(timm, **arguments)[0])
    assert any("tanh" in note for note in notes) == (arguments != TOWER)
    model = build(**arguments)
    model = with_values(model, models.stack(params, like=models.split(model)[1]))
    # Written in these names, it is what the test wrote by hand.
    assert_same(models.export_weights(model, layout="big_vision"), big_vision_names(timm))


def test_big_vision_positions_without_a_class_row():
    timm = official(no_embed_class=True)
    expected, _ = loaded(timm, no_embed_class=True)
    params, notes = loaded(big_vision_names(timm))
    assert [note for note in notes if "zero" in note]
    np.testing.assert_allclose(logits(params), logits(expected, no_embed_class=True), rtol=1e-5, atol=1e-5)


def test_pre_logits_of_the_original_vit():
    model = nnx.eval_shape(
        lambda: models.create("vit_mu16", patch_size=8, image_size=32, num_classes=5, pre_logits=7, rngs=nnx.Rngs(0))
    )
    timm = models.export_weights(with_values(model, own_values(model)))
    flax = big_vision_names(timm)
    assert flax["pre_logits/kernel"].shape == (32, 7)
    assert_same(models.convert_weights(model, flax)[0], models.convert_weights(model, timm)[0])
    with_head = partial(models.create, "vit_mu16", patch_size=8, image_size=32, rngs=nnx.Rngs(0))
    notes = models.load_weights(with_head(num_classes=3), flax)
    assert any("pre_logits is left out" in note for note in notes)
    with pytest.raises(ValueError, match="2 left over: pre_logits/bias"):
        models.load_weights(with_head(num_classes=5), flax | {"head/kernel": np.zeros((32, 5), np.float32)})


def test_big_vision_heads_have_to_agree():
    flax = big_vision_names(official(), heads=4)
    with pytest.raises(ValueError, match=r"_\{0-2\}/.*out/kernel: shape \(4, 4, 16\) is not one of 2 heads") as error:
        loaded(flax)
    assert re.search(r"query/kernel.*is not one of 2 heads", error.value.report)
