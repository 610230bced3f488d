"""VOLO: published sizes, heads, positions, drop path, exchange, official arguments, weights."""

import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx
from official import QUICK_COMPILE
from references import REFERENCES
from shapes import full_size

import models
from attn import resample_positions
from configs.recipes import VOLO_DROP_PATH, VOLO_FINETUNED
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.families.volo.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
abstract, images = partial(tiny_models.abstract, "volo"), tiny_models.images
create = partial(tiny_models.create, "volo")


def call(model, x, method="__call__", **options):
    graph, params, state = models.split(model)
    key = options.pop("key", None)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, state, x, key):
        found = getattr(models.merge(graph, params, state), method)(x, key=key, **options)
        return (found, options["tap"].values) if "tap" in options else found

    return run(params, state, x, key)


# --- published sizes --------------------------------------------------------------------------------------------------


def table():
    """Rows of docs/families/volo.md: name -> (parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "volo.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return {name: (int(parameters.replace(" ", "")), giga, top1) for name, parameters, giga, top1 in rows}


def test_every_variant_has_what_is_documented_and_published():
    documented = table()
    assert set(documented) == set(VARIANTS) == {name for name in PUBLISHED if name.startswith("volo")}
    for name, (expected, giga, top1) in documented.items():
        published = PUBLISHED[name]
        assert (giga, top1) == (published.multiply_adds, published.top1), name
        assert abs(expected / 1e6 - float(published.parameters)) <= tolerance(published.parameters), name
        assert published.image_size == VARIANTS[name].get("image_size", 224)


@pytest.mark.golden
def test_documented_parameters_are_those_of_the_official_models():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    counts = {k.removeprefix("timm/"): v for k, v in json.loads(path.read_text()).items() if k.startswith("timm/volo_")}
    assert {k.removesuffix("_224"): v for k, v in counts.items()} == {name: row[0] for name, row in table().items()}


@pytest.mark.parametrize("name", ["volo_d1", "volo_d3_448", "volo_d5"])
def test_published_multiply_adds(name):
    published = PUBLISHED[name]
    summary = summarize(full_size(name), (1, published.image_size, published.image_size, 3))
    counted = summary.total.multiply_adds / 1e9
    assert abs(counted - float(published.multiply_adds)) <= tolerance(published.multiply_adds)
    if name == "volo_d1":
        places, width, heads = 28 * 28, 192, 6
        # The paper's count of outlook attention (section 3.1), with K = 3 and one window for 4 places, and the MLP.
        attention = 2 * places * width**2 + places // 4 * (width * 81 * heads + 81 * width)
        assert summary.rows["stages.0.blocks.2"].multiply_adds == attention + 6 * places * width**2


def test_what_the_paper_counts_where_its_figures_are_others():
    """D3 at 448 pixels is printed with the figure of 384, and D5 with a stem of 64 channels, as the notes say."""
    at_384 = summarize(full_size("volo_d3", image_size=384), (1, 384, 384, 3)).total.multiply_adds / 1e9
    assert abs(at_384 - 67.9) <= tolerance("67.9")
    assert "67.9" in PUBLISHED["volo_d3_448"].note

    def stem(channels, side):
        places = (side // 2) ** 2
        return (places * (147 * channels + 18 * channels**2) + places // 16 * 16 * channels * 384) / 1e9

    counted = summarize(full_size("volo_d5"), (1, 224, 224, 3)).rows["patch_embed"].multiply_adds / 1e9
    assert counted == pytest.approx(stem(128, 224), rel=1e-9)
    for name, figure in (("volo_d5", "69.0"), ("volo_d5_448", "304"), ("volo_d5_512", "412")):
        published = PUBLISHED[name]
        narrow = float(published.multiply_adds) - stem(128, published.image_size) + stem(64, published.image_size)
        assert abs(narrow - float(figure)) <= tolerance(figure), name
        assert figure in published.note


def test_every_variant_has_a_recipe():
    assert set(VARIANTS) == set(VOLO_DROP_PATH) | set(VOLO_FINETUNED)
    assert all(VARIANTS[name]["image_size"] == size for name, (size, _) in VOLO_FINETUNED.items())


# --- computation ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_logits_are_those_of_the_class_token_and_half_of_the_largest_token():
    tap = models.record("probs", layers=(0, 3, 6))
    found, recorded = call(create(), images(48, 32), "features", layers=(0, 3, -1), tap=tap)
    assert found["token_logits"].shape == (2, 6 * 4, 5)
    expected = found["class_logits"] + 0.5 * found["token_logits"].max(1)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-6)
    assert np.abs(found["logits"] - found["class_logits"]).max() > 0.1
    # Outlook attention by windows, dense attention by pairs, class attention of one token to itself and all others.
    assert {name: value.shape for name, value in recorded.arrays.items()} == {
        "stages.0.blocks.attn.probs": (1, 2, 6 * 4, 2, 9, 9),
        "stages.1.blocks.attn.probs": (1, 2, 2, 24, 24),
        "class_blocks.attn.probs": (1, 2, 2, 1, 25),
    }
    assert found["class_blocks.1"].shape == found["tokens"].shape == (2, 25, 16)
    # Class attention changes the class token alone.
    last = found["stages.1"].reshape(2, 24, 16)
    np.testing.assert_array_equal(found["class_blocks.1"][:, 1:], last)
    np.testing.assert_array_equal(found["pooled"], found["tokens"][:, 0])


def test_positions_of_another_size_are_those_of_the_official_code():
    """Bicubic without antialiasing, at call time as in weights that are read for another size."""
    model, wide = create(), images(48, 64)
    table = np.asarray(model.pos_embed[...]).reshape(1, 16, 16)
    resampled = resample_positions(table, (4, 4), (6, 8), method="cubic").reshape(1, 6, 8, 16)
    other = abstract(image_size=(48, 64))
    notes = models.load_weights(other, models.export_weights(model))
    assert notes == ["positions resampled from 4 x 4 to 6 x 8 (cubic)"]
    np.testing.assert_array_equal(other.pos_embed[...], resampled)
    found, expected = (call(one, wide, "features") for one in (model, other))
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
    without = {**models.export_weights(model), "pos_embed": 0 * table.reshape(1, 4, 4, 16)}
    models.load_weights(bare := abstract(), without)
    added = found["stages.1.embedded"] - call(bare, wide, "features")["stages.1.embedded"]
    np.testing.assert_allclose(added, np.broadcast_to(resampled, added.shape), atol=1e-5)


def test_drop_path_spares_outlook_and_class_attention():
    model = abstract(depths=(2, 2), drop_path=0.6)
    np.testing.assert_allclose(model.drop_rates(), [0, 0, 0.4, 0.6])
    assert model.depth == 6
    both = abstract(outlook=(False, True), depths=(2, 2), drop_path=0.6)
    np.testing.assert_allclose(both.drop_rates(), [0, 0.2, 0, 0], atol=1e-7)


def test_taps_are_told_the_layer_in_the_model():
    seen = []

    @models.tap("logits", "probs", "v", "heads")
    def look(site, value):
        seen.append((site.name, site.layer))
        return value

    graph, params, state = models.split(abstract(scan=False))
    jax.eval_shape(lambda p, s, x: models.merge(graph, p, s)(x, tap=look), params, state, images(32, 32))
    for name in look.sites:
        assert [layer for site, layer in seen if site == name] == list(range(7))


@pytest.mark.parametrize("attention", ["identity", "dense"])
def test_class_attention_stays_but_for_the_control(attention):
    names = {name for name in models.split(abstract(attention=attention))[1] if "attn" in name}
    part = {"identity": "value"}.get(attention, "qkv")
    assert all(f"stages.{stage}.blocks.[0::1].attn.{part}.kernel" in names for stage in (0, 1))
    late = "value" if attention == "identity" else "kv"
    assert f"class_blocks.[0::1].attn.{late}.kernel" in names


def test_identity_mixes_no_places():
    """The control: a pixel reaches the tokens that the convolutions take it to, with outlook attention others too, and
    the class token with class attention alone."""
    x = images(64, 64, batch=1)
    reached, classes = {}, {}
    for attention in ("identity", None):
        model = create(attention=attention, depths=(2, 1))
        one, other = (call(model, pixels, "features") for pixels in (x, x.at[:, 0, 0].add(5.0)))
        reached[attention] = int((np.abs(one["stages.0"] - other["stages.0"]).max(-1) > 1e-5).sum())
        classes[attention] = float(np.abs(one["class_logits"] - other["class_logits"]).max())
    assert 0 < reached["identity"] < reached[None]
    assert classes["identity"] == 0 < classes[None]


def test_layer_ids_for_layerwise_decay():
    model = abstract(scan=False)
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 8
    assert ids["patch_embed.norm2.scale"] == ids["cls_token"] == ids["pos_embed"] == 0
    assert ids["stages.0.blocks.1.attn.weights.kernel"] == 2
    assert ids["stages.1.downsample.kernel"] == ids["stages.1.blocks.0.norm1.scale"] == 3
    assert ids["class_blocks.1.attn.kv.kernel"] == 7
    assert ids["norm.scale"] == ids["aux_head.kernel"] == 8


def test_positions_and_class_token_do_not_decay():
    from training.optim.multipliers import decayed

    params = models.split(abstract(scan=False))[1]
    decays = decayed("matrices", params)
    assert {name.rsplit(".", 1)[-1] for name in params if decays[name]} == {"kernel"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": (2,)}, r"depths=\(2, 3\) and heads=\(2,\): one entry for each stage"),
        ({"mlp_ratio": (2.0,)}, r"mlp_ratio=\(2.0,\): one entry"),
        ({"downsamples": (False, False)}, r"widths=\(32, 16\): the width changes behind stage 0 without downsampling"),
        ({"downsamples": (True, True)}, "no stage follows the last one"),
        ({"position_stage": 2}, "position_stage=2; allowed: 0 to 1"),
        ({"pool": "mean"}, "unknown pool 'mean'"),
        ({"mix_token": True}, "mix_token=True needs dense=True"),
        ({"dense": True, "token_head": False}, "dense=True needs"),
        ({"dense": True, "class_layers": None}, "dense=True needs"),
        ({"patch_size": 3}, "patch_size=3; allowed: an even number"),
        ({"window": 4}, "window=4, stride=2; allowed: an odd window"),
        ({"attention": "outlok"}, "unknown attention 'outlok'; nearest: outlook"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        abstract(**options)
    assert "\n" not in str(error.value)


# --- official arguments and weights -----------------------------------------------------------------------------------

OFFICIAL = {"layers": [1, 1], "embed_dims": [8, 16], "num_heads": [2, 2], "img_size": 32, "num_classes": 5}


def options(**config):
    return REFERENCES["volo"].options(OFFICIAL | config)


def test_arguments_of_timm_and_of_the_official_class():
    found = options(drop_rate=0.1, pos_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4, use_mix_token=True)
    assert (found["head_dropout"], found["position_dropout"], found["attention_dropout"]) == (0.1, 0.2, 0.3)
    assert (found["drop_path"], found["dense"], found["mix_token"]) == (0.4, True, True)
    assert (found["downsamples"], found["outlook"], found["norm_eps"]) == ((True, False), (True, False), 1e-5)
    flags = {"downsamples": [True, False], "outlook_attention": [True, False]}
    found = options(**flags, mlp_ratios=[2, 3], mix_token=False, out_kernel=5, out_padding=2, drop_rate=0.1)
    assert (found["window"], found["stride"], found["mlp_ratio"], found["class_layers"]) == (5, 2, [2, 3], None)
    assert (found["position_dropout"], found.get("head_dropout"), found["token_head"]) == (0.1, None, True)
    assert "mix_token" not in found
    found = options(**flags, return_mean=True, return_dense=False, mix_token=False)
    assert (found["pool"], found["token_head"]) == ("avg", False)
    assert options(img_size=[32, 48], post_layers=["ca", "ca", "ca"])["class_layers"] == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dim": 3}, "unknown argument of VOLO 'embed_dim'; nearest: embed_dims"),
        ({"post_layers": ["ca", "sa"]}, "'sa' has no counterpart here; allowed: 'ca'"),
        ({"global_pool": "max"}, "unknown value of argument global_pool 'max'"),
        ({"norm_layer": "BatchNorm2d"}, "norm_layer='BatchNorm2d' has no counterpart"),
        ({"downsamples": [False, False]}, "positions belong before the third module"),
        ({"layers": [1, 1, 1], "downsamples": [False, True, False]}, "positions belong before the third module"),
        ({"pooling_scale": 1}, "positions for 4 x 4 places do not fit the map of 2 x 2"),
        ({"img_size": 31}, "positions for 1 x 1 places do not fit the map of 2 x 2"),
        ({"qk_scale": 0.5, "downsamples": [True], "outlook_attention": [True]}, "qk_scale=0.5 has no counterpart"),
        ({"out_padding": 0, "downsamples": [True], "outlook_attention": [True]}, "out_padding=0: windows are centred"),
        ({"mix_token": True}, "argument downsamples of the official VOLO has no default"),
        ({"embed_dims": [8, 16, 16], "layers": [1, 1, 1], "downsamples": [True, True, False]}, None),
        ({"embed_dims": [8, 16, 24], "layers": [1, 1, 1], "downsamples": [True, True, False]}, "as wide as the last"),
    ],
)
def test_arguments_without_a_counterpart(config, message):
    if message is None:
        assert options(**config)["position_stage"] == 1
        return
    with pytest.raises(ValueError, match=message) as error:
        options(**config)
    assert "\n" not in str(error.value)


def test_official_files_are_adapted_and_it_is_said(tmp_path):
    """With the prefix of a parallel run, other classes for both heads, and without the head of the tokens."""
    weights = models.export_weights(create())
    np.savez(tmp_path / "w.npz", **{f"module.{name}": value for name, value in weights.items()})
    params, state, notes = models.convert_weights(abstract(), tmp_path / "w.npz")
    assert notes == []
    for ours, theirs in (("0.blocks.0.attn.weights", "0.0.attn.attn"), ("1.blocks.2.mlp.fc1", "2.2.mlp.fc1")):
        np.testing.assert_array_equal(params[f"stages.{ours}.kernel"].T, weights[f"network.{theirs}.weight"])
    np.testing.assert_array_equal(state["patch_embed.norm3.var"], weights["patch_embed.conv.7.running_var"])
    other = models.reset_classifier(create(), 7, rngs=nnx.Rngs(0))
    assert models.load_weights(other, tmp_path / "w.npz") == [
        "head starts anew: 5 classes there, 7 here",
        "aux_head starts anew: 5 classes there, 7 here",
    ]
    plain = abstract(token_head=False)
    assert models.load_weights(plain, weights) == ["aux_head with 5 classes is left out"]
    with pytest.raises(ValueError, match="of another shape"):
        models.load_weights(abstract(widths=(8, 24)), weights)
