"""Swin: published sizes, windows by stage, exchange of the attention, official names, options of timm."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from jax.sharding import AbstractMesh, PartitionSpec
from references import REFERENCES
from shapes import full_size

import models
from configs.recipes import SWIN_DROP_PATH, SWIN_FINETUNED
from models.core import sharding
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.families.swin import variants
from models.families.swin.model import fitted, stage_maps, stage_windows
from training.distributed import mesh

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))


def table():
    """Rows of docs/families/swin.md: name -> (parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "swin.md").read_text()
    rows = re.findall(r"^\| `(swin_\w+)` \|.*?\| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {name: (int(parameters.replace(" ", "")), giga, top1) for name, parameters, giga, top1 in rows}


# --- published sizes --------------------------------------------------------------------------------------------------


def test_every_variant_has_what_is_documented():
    documented = table()
    assert documented.keys() == variants.VARIANTS.keys()
    for name, (parameters, giga, top1) in documented.items():
        published = PUBLISHED[name]
        assert (published.multiply_adds, published.top1) == (giga, top1)
        assert abs(parameters / 1e6 - float(published.parameters)) <= tolerance(published.parameters)
        # Multiply-adds are counted in tests/models/test_contract_variants.py.


@pytest.mark.golden
def test_documented_parameters_are_those_of_timm():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    counts = {k.removeprefix("timm/"): v for k, v in json.loads(path.read_text()).items() if k.startswith("timm/swin_")}
    counts = {re.sub("_patch4_window(7_224|12)", "", name): value for name, value in counts.items()}
    assert counts == {name: parameters for name, (parameters, _, _) in table().items()}


def test_every_variant_has_a_recipe():
    # Large has no weights from ImageNet-1k alone.
    assert {*SWIN_DROP_PATH, *SWIN_FINETUNED, "swin_large"} == variants.VARIANTS.keys()


def test_multiply_adds_of_a_layer():
    rows = summarize(full_size("swin_tiny"), (1, 224, 224, 3), activations=False).rows
    assert [name for name in rows if "blocks" not in name] == [
        "patch_embed", "stages.1", "stages.2", "stages.3", "norm", "head",
    ]  # fmt: skip
    places, width, keys = 28 * 28, 192, 49
    assert rows["stages.1.blocks.1"].multiply_adds == 12 * places * width**2 + 2 * places * keys * width


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stages", "expected"),
    [
        (7, 3, [(7, 7)] * 3),
        ((7, 14), 2, [(7, 14)] * 2),
        (((7, 7), (2, 3)), 2, [(7, 7), (2, 3)]),
        ([7, 7, 14, 7], 4, [(7, 7), (7, 7), (14, 14), (7, 7)]),
    ],
)
def test_windows_by_stage(window, stages, expected):
    assert stage_windows(window, stages) == expected


def test_windows_are_made_for_the_maps():
    assert stage_maps((14, 27), 3) == [(14, 27), (7, 14), (4, 7)]
    assert fitted((7, 7), (8, 7)) == ((7, 7), (3, 0))
    assert fitted((7, 5), (3, 5)) == ((3, 5), (0, 0))

    def windows(**options):
        model = tiny_models.abstract("swin", scan=False, **options)
        layers = [getattr(stage.blocks, str(layer)).attn for stage in model.stages for layer in (0, 1)]
        return [(layer.window, layer.shift) for layer in layers]

    whole, none = ((4, 4), (2, 2)), ((4, 4), (0, 0))
    assert windows() == [none, whole, none, none]
    assert windows(image_size=(16, 64)) == [none, ((4, 4), (0, 2)), ((2, 4), (0, 0)), ((2, 4), (0, 2))]
    assert windows(shrink_windows=False) == [none, whole] * 2
    # One kind of layer is one leaf where no layer is shifted.
    names = models.split(tiny_models.abstract("swin"))[1]
    assert names["stages.0.blocks.[1::2].attn.qkv.kernel"].shape[0] == 1
    assert names["stages.1.blocks.[0::1].attn.qkv.kernel"].shape[0] == 2


def test_shifts_are_seen():
    """Without them no window of the first stage hears of another one."""
    for shift, rows in ((2, 32), (0, 16)):
        model = tiny_models.create("swin", depths=(2, 1), scan=False)
        getattr(model.stages[0].blocks, "1").attn.shift = (shift, shift)
        graph, params, state = models.split(model)

        def one_place(images, graph=graph, params=params, state=state):
            return models.merge(graph, params, state).features(images)["stages.0"][0, 3, 3].sum()

        heard = np.abs(jax.jit(jax.grad(one_place))(tiny_models.images(64, 64)))[0].max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(heard, np.arange(64) < rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": (2,)}, r"depths=\(3, 2\) and heads=\(2,\): one entry for each stage"),
        ({"window": (2, 3, 4)}, r"window=\(2, 3, 4\); allowed: a side, \(rows, columns\), or .* for 2 stages"),
        ({"window": 0}, "window=0; allowed: an integer of at least 1"),
        ({"mlp_ratio": (2, 3, 4)}, "mlp_ratio=.*one entry for each of the 2 stages"),
        ({"pool": "token"}, "unknown pool 'token'.*allowed: avg"),
        ({"block": "pre"}, "unknown block 'pre'; nearest: pre_norm"),
        ({"attention_options": {"grid": True}}, "a grid cannot be shifted"),
        ({"attention_options": {"windw": 3}}, "unknown option of attention 'window' 'windw'; nearest: window"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_models.abstract("swin", **options)
    assert "\n" not in str(error.value)


def test_bias_tables_are_split_by_heads_and_do_not_decay():
    from training.optim.multipliers import decayed

    model = full_size("swin_base")
    params, rules = models.split(model)[1], sharding.rules(model)
    specs = {n: mesh.parameter_spec(n, v.shape, rules, AbstractMesh((1, 4, 2), mesh.AXES)) for n, v in params.items()}
    prefix = "stages.2.blocks.[1::2]"
    assert specs[f"{prefix}.attn.relative_bias"] == PartitionSpec(None, "tensor", None, None)
    assert specs[f"{prefix}.attn.qkv.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert not [n for n in params if "fsdp" not in specs[n] and n.endswith("kernel")]
    decays = decayed("matrices", params)
    assert {name.rsplit(".", 1)[-1] for name in params if decays[name]} == {"kernel"}


# --- weights ----------------------------------------------------------------------------------------------------------


def microsoft_names(timm):
    """timm's names as the official files have them: merging at the end of a layer, and buffers."""
    official = {}
    for name, value in timm.items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        official[name.replace("head.fc.", "head.")] = value
    official["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    official["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    return official


def test_official_names_are_read():
    model = tiny_models.create("swin")
    timm = models.export_weights(model)
    assert {"layers.1.downsample.reduction.weight", "head.fc.bias"} < timm.keys()
    official = microsoft_names(timm)
    assert {"layers.0.downsample.norm.bias", "head.weight"} < official.keys()
    for source in (official, {"model": official}):
        params, _, notes = models.convert_weights(tiny_models.abstract("swin"), source)
        assert notes == ["names of microsoft/Swin-Transformer"]
        assert params.keys() == models.unstack(models.split(model)[1]).keys()
        for name, value in models.unstack(models.split(model)[1]).items():
            np.testing.assert_array_equal(params[name], value, err_msg=name)
    # timm's files of some releases have buffers, but merging in its place.
    buffers = timm | {"layers.0.blocks.1.attn_mask": np.zeros(())}
    again = models.convert_weights(tiny_models.abstract("swin"), buffers)[0]
    np.testing.assert_array_equal(
        again["stages.1.downsample.reduction.kernel"], params["stages.1.downsample.reduction.kernel"]
    )


def test_tables_are_by_key_minus_query():
    """What the official implementation looks up for a query and a key (equation 4 and the code's index)."""
    theirs = models.export_weights(tiny_models.create("swin"))["layers.0.blocks.1.attn.relative_position_bias_table"]
    ours = tiny_models.create("swin", scan=False).stages[0].blocks
    table = np.asarray(getattr(ours, "1").attn.relative_bias[...])
    for (y, x), (i, j) in (((0, 0), (3, 1)), ((2, 3), (0, 0)), ((1, 2), (1, 3))):
        index = (y - i + 3) * 7 + (x - j + 3)
        np.testing.assert_array_equal(theirs[index], table[:, i - y + 3, j - x + 3])


def test_other_windows_and_classes_are_adapted_and_said():
    weights = models.export_weights(tiny_models.create("swin"))
    params, _, notes = models.convert_weights(tiny_models.abstract("swin", window=(3, 2)), weights)
    assert notes == ["relative position biases resampled from 7 x 7 to 5 x 3 (bicubic)"]
    assert params["stages.0.blocks.1.attn.relative_bias"].shape == (2, 5, 3)
    # 15 entries are 5 x 3 for windows of 3 x 2, and no square table.
    narrow = models.export_weights(tiny_models.create("swin", window=(3, 2)))
    assert narrow["layers.0.blocks.1.attn.relative_position_bias_table"].shape == (15, 2)
    with pytest.raises(ValueError, match=r"shape \(15, 2\) is not a table for windows of \(4, 4\), nor for square"):
        models.convert_weights(tiny_models.abstract("swin"), narrow)


# --- timm's arguments -------------------------------------------------------------------------------------------------


def options(**config):
    return REFERENCES["swin"].options(config)


def test_timm_arguments_have_counterparts():
    found = options()
    assert found["width"] == 96
    assert (found["drop_path"], found["norm_eps"], found["pool"]) == (0.1, 1e-5, "avg")
    found = options(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, head_dim=[16, None], weight_init="jax")
    assert (found["head_dropout"], found["dropout"], found["attention_dropout"]) == (0.1, 0.2, 0.3)
    assert found["head_width"] == (16, None)
    assert options(img_size=[37, 40], patch_size=[4, 6], always_partition=True)["image_size"] == (36, 36)
    assert options(always_partition=True)["shrink_windows"] is False
    assert [options(global_pool=name)["pool"] for name in ("fast", "fastmax", "avgmax")] == ["avg", "max", "avgmax"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ape": True}, "unknown argument of timm's SwinTransformer 'ape'"),
        ({"embed_layer": "HybridEmbed"}, "embed_layer='HybridEmbed' has no counterpart"),
        ({"global_pool": ""}, "unknown value of timm argument global_pool ''.*allowed: avg"),
        ({"norm_layer": "RmsNorm"}, "norm_layer='RmsNorm' has no counterpart"),
    ],
)
def test_timm_arguments_without_counterpart(config, message):
    with pytest.raises(ValueError, match=message):
        options(**config)
