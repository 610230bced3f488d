"""Hugging Face's names for a ViT: what is left out, what is refused, and what `config.json` says.

Values are compared by tests/golden/test_golden.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import models
from models.families.vit import FAMILY

HERE = Path(__file__).resolve().parent


def stored(name):
    """(config.json, weights) of a file beside this one."""
    with np.load(HERE / f"{name}.npz") as file:
        weights = {key[3:]: file[key] for key in file.files if key.startswith("sd/")}
        return json.loads(json.loads(str(file["config"]))["_hf_config_json"]), weights


def made(config, **options):
    """An abstract model for a config.json."""
    o = FAMILY.configs[config["model_type"]].read(config) | options
    return nnx.eval_shape(lambda: FAMILY.model(FAMILY.model.Options(**o), rngs=nnx.Rngs(0)))


def test_a_body_goes_into_a_classifier_and_the_other_way_round():
    config, weights = stored("hf_vit_no_bias")
    body = made(config, num_classes=0)
    assert "head with 5 classes is left out" in models.load_weights(body, weights)
    written = models.export_weights(body, layout="huggingface")
    assert set(written) == {name.removeprefix("vit.") for name in weights if not name.startswith("classifier")}
    model = models.create("vit_mu16", image_size=24, patch_size=8, num_classes=3, rngs=nnx.Rngs(0), **SMALL)
    assert models.load_weights(model, written) == ["names of Hugging Face", "head starts anew: 0 classes there, 3 here"]
    np.testing.assert_array_equal(model.cls_token[...], weights["vit.embeddings.cls_token"])


SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "qkv_bias": False}


def test_a_pooler_is_pre_logits():
    config, weights = stored("hf_vit_no_bias")
    pooler = {"vit.pooler.dense.weight": np.eye(16, dtype=np.float32), "vit.pooler.dense.bias": np.ones(16, np.float32)}
    assert "pooler is left out: the model has no pre_logits" in models.load_weights(made(config), weights | pooler)
    model = made(config, pre_logits=16)
    assert models.load_weights(model, weights | pooler) == ["names of Hugging Face"]
    assert models.export_weights(model, layout="huggingface").keys() == (weights | pooler).keys()


def test_the_image_tower_of_a_file_of_two():
    config, weights = stored("clip_vision_gelu")
    text = {"text_model.embeddings.token_embedding.weight": np.zeros((9, 16)), "logit_scale": np.zeros(())}
    buffer = {"vision_model.embeddings.position_ids": np.arange(10)[None]}
    model = made(config)
    assert models.load_weights(model, weights | text | buffer) == [
        "names of Hugging Face",
        "the text tower is left out",
    ]
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 12, "vision_config": config}
    assert made(whole).options == model.options
    bare = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    assert models.load_weights(model, bare) == ["names of Hugging Face"]
    without = made(config, num_classes=0)
    assert "visual_projection is left out: the model has no classifier" in models.load_weights(without, weights)


def test_what_has_no_place_there_is_not_written():
    config, weights = stored("clip_vision_gelu")
    model = made(config)
    models.load_weights(model, weights)
    model.head.bias = nnx.Param(np.ones(12, np.float32))
    with pytest.raises(ValueError, match=r"^visual_projection has no bias there, and this model has learned one"):
        models.export_weights(model, layout="huggingface")
    config, weights = stored("hf_dinov2_gated")
    model = made(config)
    models.load_weights(model, weights)
    model.pos_embed = nnx.Param(np.ones(model.pos_embed.shape, np.float32))
    with pytest.raises(ValueError, match=r"^Hugging Face's DINOv2 has no positions of registers"):
        models.export_weights(model, layout="huggingface")
    classes = models.create("dinov2_s14", num_classes=3, depth=1, image_size=28, rngs=nnx.Rngs(0))
    assert "head starts anew: 0 classes there, 3 here" in models.load_weights(
        classes, models.export_weights(models.reset_classifier(classes, 0, rngs=nnx.Rngs(0)), layout="huggingface")
    )
    with pytest.raises(ValueError, match=r"^DINOv2 of Hugging Face has another classifier .*num_classes=0$"):
        models.export_weights(classes, layout="huggingface")
    parallel = made(stored("hf_vit_no_bias")[0], block="parallel")
    with pytest.raises(ValueError, match=r"^Hugging Face has no ViT with block='parallel'$"):
        models.convert_weights(parallel, stored("hf_vit_no_bias")[1])


def test_positions_of_registers_are_rows_of_zeros_or_none():
    """The variant has no rows of the prefix: that of the class token is added to it, which is the same function."""
    config, weights = stored("hf_dinov2_gated")
    model = made(config, prefix_positions=False)
    assert any("added to these tokens" in note for note in models.load_weights(model, weights))
    again = models.export_weights(model, layout="huggingface")
    row = weights["embeddings.position_embeddings"][:, :1]
    assert not again["embeddings.position_embeddings"][:, 0].any()
    np.testing.assert_array_equal(again["embeddings.cls_token"], weights["embeddings.cls_token"] + row)
    other = made(config, prefix_positions=False)
    assert not any("added" in note for note in models.load_weights(other, again))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "vit", "hidden_act": "gelu_python_tanh"},
            "activation=.*gelu_python_tanh|gelu_python_tanh.*allowed",
        ),
        ({"model_type": "deit", "architectures": ["DeiTForImageClassification"]}, "no classifier of it"),
        ({"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"]}, "beside the mean of the patches"),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "without its pooling"),
    ],
)
def test_a_config_that_we_do_not_have_is_one_line(config, said):
    with pytest.raises(ValueError, match=said) as error:
        made(config)
    assert "\n" not in str(error.value)


def test_configs_without_keys_have_the_defaults_of_the_library():
    """A variant by its name at the Hub and its config.json, which leaves most out, are the same model."""
    classifier = {"architectures": ["ViTForImageClassification"], "id2label": {str(n): "" for n in range(1000)}}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    cases = {
        "google/vit-base-patch16-224": {"model_type": "vit", **classifier},
        "google/vit-large-patch16-384": {"model_type": "vit", **classifier, **large, "image_size": 384},
        "facebook/dinov2-base": {"model_type": "dinov2", "image_size": 518},
        "facebook/dinov2-with-registers-base": {"model_type": "dinov2_with_registers", "image_size": 518},
        "google/siglip-base-patch16-224": {"model_type": "siglip", "vision_config": {}},
        "openai/clip-vit-base-patch32": {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": {}},
    }
    for name, config in cases.items():
        by_config = made(config).options
        by_name = nnx.eval_shape(lambda name=name: models.create(name, rngs=nnx.Rngs(0))).options
        assert {**vars(by_config), "layer_scale": None} == {**vars(by_name), "layer_scale": None}, name
