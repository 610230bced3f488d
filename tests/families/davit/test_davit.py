"""DaViT: published sizes, attention between channels, pairs of layers, exchange of the attention, names of others."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from references import REFERENCES
from shapes import count, full_size

import models
from attn import Grid
from attn.channel import channel_attention
from configs.recipes import DAVIT_DROP_PATH
from models.attention.channel import ChannelAttention
from models.core.call import Call
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.core.watch import Watch
from models.families.davit import variants

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))


def table():
    """Rows of docs/families/davit.md: name -> (image size, window, parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "davit.md").read_text()
    row = r"^\| `(davit_\w+)` \|[^|]*\| \d+ \| (\d+) \| (\d+) \| ([\d ]+) \| ([\d.]+) \| ([\d.]*) ?\|$"
    return {
        name: (int(size), int(window), int(parameters.replace(" ", "")), giga, top1)
        for name, size, window, parameters, giga, top1 in re.findall(row, text, re.MULTILINE)
    }


def giga(model, size):
    return summarize(model, (1, size, size, 3), activations=False).total.multiply_adds / 1e9


# --- published sizes --------------------------------------------------------------------------------------------------


def test_every_variant_has_what_is_documented():
    documented = table()
    assert documented.keys() == variants.VARIANTS.keys()
    for name, (size, window, parameters, multiply_adds, top1) in documented.items():
        published, variant = PUBLISHED[name], models.variant(name)
        assert (variant.get("image_size", 224), variant.get("window", 7)) == (size, window)
        assert published.image_size == size
        assert (published.top1 or "") == top1
        if published.multiply_adds is None:
            assert f"{giga(full_size(name), size):.1f}" == multiply_adds, name
        else:  # tests/models/test_contract_variants.py counts
            assert published.multiply_adds == multiply_adds
        if published.parameters:
            assert abs(parameters / 1e6 - float(published.parameters)) <= tolerance(published.parameters)


@pytest.mark.parametrize(("name", "million", "multiply_adds"), [("huge", "362", "334.8"), ("giant", "1437", "1038")])
def test_the_largest_are_published_with_overlapping_kernels(name, million, multiply_adds):
    """Within a quarter of a percent, where those of timm's models are 2% to 4% away."""
    model = full_size(f"davit_{name}", downsample_size=3)
    assert count(model) / 1e6 == pytest.approx(float(million), rel=2.5e-3)
    assert giga(model, 512) == pytest.approx(float(multiply_adds), rel=2.5e-3)
    assert f"{multiply_adds} G multiply-adds, {million} M parameters" in PUBLISHED[f"davit_{name}"].note


@pytest.mark.golden
def test_documented_parameters_are_those_of_timm():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    ours = {name: row[2] for name, row in table().items()}
    for name, expected in json.loads(path.read_text()).items():
        project, _, name = name.partition("/")
        if project != "timm" or not name.startswith("davit_"):
            continue
        variant, _, classes = name.removesuffix(")").partition("(num_classes=")
        found = count(full_size(variant, num_classes=0)) if classes == "0" else ours.pop(variant)
        assert found == expected, name
    assert not ours


def test_multiply_adds_of_a_pair():
    rows = summarize(full_size("davit_tiny"), (1, 224, 224, 3), activations=False).rows
    places, width = 28 * 28, 192
    layer = 12 * places * width**2 + 18 * places * width
    assert rows["stages.1.blocks.0"].multiply_adds == layer + 2 * places * 49 * width
    assert rows["stages.1.blocks.1"].multiply_adds == layer + 2 * places * 32 * width


def test_recipes_are_for_those_trained_from_scratch():
    assert {f"davit_{size}" for size in ("tiny", "small", "base")} == DAVIT_DROP_PATH.keys()


# --- attention between channels ---------------------------------------------------------------------------------------


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_definition(q, k, v, scale):
    """Each channel of a query looks at the channels of keys in its group, as the paper's equation 4 has it."""
    out = np.zeros_like(v)
    for batch, group in np.ndindex(q.shape[0], q.shape[2]):
        a, b, c = (x[batch, :, group] for x in (q, k, v))
        weights = np.exp(scale * a.T @ b)
        out[batch, :, group] = (weights / weights.sum(-1, keepdims=True) @ c.T).T
    return out


@pytest.mark.parametrize("scale", [None, 0.05])
def test_function_equals_its_definition(scale):
    q, k, v = arrays(3, 2, 15, 3, 4)
    found = channel_attention(q, k, v, scale=scale)
    np.testing.assert_allclose(found, by_definition(q, k, v, 0.5 if scale is None else scale), atol=1e-5)


@pytest.mark.parametrize(("version", "order", "scale"), [(1, (1, 2, 0), 0.5), (2, (0, 1, 2), 15**-0.5)])
def test_parts_of_the_projection_have_their_roles(version, order, scale):
    """Values, queries and keys as published; queries, keys and values in Florence-2."""
    attention, x = ChannelAttention(12, 3, version=version, rngs=nnx.Rngs(0)), arrays(2, 15, 12)
    attention.qkv.kernel[...] = arrays(12, 36, seed=1)
    parts = np.moveaxis(np.asarray(attention.qkv(x)).reshape(2, 15, 3, 3, 4), 2, 0)
    heads = by_definition(*(parts[role] for role in order), scale)
    np.testing.assert_allclose(attention(x, Call(Grid((5, 3)))), attention.proj(heads.reshape(2, 15, 12)), atol=1e-5)


def test_taps_see_maps_of_channels():
    seen = {}

    @models.tap("q", "k", "v", "logits", "probs", "heads")
    def look(site, value):
        seen[site.name] = value.shape
        return jnp.zeros_like(value) if site.name == "heads" else value

    attention = ChannelAttention(12, 3, dropout=0.5, rngs=nnx.Rngs(0))
    x, call = arrays(2, 15, 12), Call(Grid((5, 3)))
    edited = attention(x, call.replace(tap=Watch(look)))
    assert seen == dict.fromkeys(("q", "k", "v", "heads"), (2, 15, 3, 4)) | dict.fromkeys(
        ("logits", "probs"), (2, 3, 4, 4)
    )
    np.testing.assert_array_equal(edited, jnp.broadcast_to(attention.proj.bias[...], edited.shape))
    with pytest.raises(ValueError, match="dropout needs a key"):
        attention(x, call.replace(train=True))


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="version=3 of channel attention; allowed: 1, 2"):
        ChannelAttention(12, 3, version=3, rngs=nnx.Rngs(0))


# --- the model --------------------------------------------------------------------------------------------------------


def test_both_layers_of_a_pair_have_one_drop_path():
    """As in timm, from 0 for the first pair to the rate for the last."""
    model = tiny_models.abstract("davit", drop_path=0.4, depths=(2, 1))
    np.testing.assert_allclose(model.drop_rates(), [0, 0, 0.2, 0.2, 0.4, 0.4])
    assert len(tiny_models.abstract("davit", attention=("channel",), depths=(1, 2)).drop_rates()) == 3


def attends(model):
    return {name.split(".attn.")[1] for name in models.split(model)[1] if ".attn." in name}


def test_without_positions_is_with_convolutions_that_give_nothing():
    options = dict(widths=(8, 16), depths=(1, 1), heads=(2, 4), window=3, image_size=32, num_classes=5)
    without, model = (
        models.create("davit_tiny", **options, positions=positions, rngs=nnx.Rngs(0)) for positions in (False, True)
    )
    _, params, _ = models.split(model)
    silent = {name: value for name, value in params.items() if ".cpe" in name}
    assert len(silent) == 2 * 2 * 2 * len(options["widths"])  # stages, layers, convolutions, kernel and bias
    graph, fewer, state = models.split(without)
    assert params.keys() - silent.keys() == fewer.keys()
    same = models.merge(graph, {name: params[name] for name in fewer}, state)
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    given = models.split(model)
    quiet = models.merge(given[0], params | jax.tree.map(jnp.zeros_like, silent), given[2])
    np.testing.assert_allclose(same(images), quiet(images), rtol=1e-5, atol=1e-6)
    assert np.abs(same(images) - model(images)).max() > 1e-3


def test_attention_is_exchanged_by_name():
    """One name stands for both layers of a pair; a pair can be any length."""
    images = jax.ShapeDtypeStruct((2, 32, 24, 3), jnp.float32)
    window = {"window": 2}
    for attention, depth, options in (
        ("dense", 6, {}),
        (("window", "channel", "neighborhood"), 9, window),
        (["grid"], 3, window | {"attention_options": {"relative_bias": False}}),
    ):
        graph, params, state = models.split(tiny_models.abstract("davit", attention=attention, **options))
        model = models.merge(graph, params, state)
        assert model.depth == depth
        logits = jax.eval_shape(lambda p, x, g=graph, s=state: models.merge(g, p, s)(x), params, images)
        assert logits.shape == (2, 5)
    assert attends(tiny_models.abstract("davit", attention="identity")) == {
        f"{layer}.{leaf}" for layer in ("value", "proj") for leaf in ("kernel", "bias")
    }
    options = ({"window": 4, "relative_bias": True}, {"version": 2})
    model = tiny_models.abstract("davit", attention_options=options, scan=False)
    assert "relative_bias" in attends(model)
    layers = [getattr(model.stages[1].blocks, str(layer)).attn for layer in range(4)]
    assert [layer.window for layer in layers[::2]] == [(4, 4)] * 2
    assert [layer.version for layer in layers[1::2]] == [2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": (2,)}, r"widths=\(8, 16\) and heads=\(2,\): one entry for each stage"),
        ({"pool": "catavgmax"}, "unknown pool 'catavgmax'.*allowed: avg, max, avgmax"),
        ({"attention": "windw"}, "unknown attention 'windw'; nearest: window"),
        ({"attention_options": ({},)}, r"attention_options=\(\{\},\); allowed: .* one for each of window, channel"),
        ({"attention_options": ({}, {"window": 2})}, "unknown option of attention 'channel' 'window'"),
        ({"channel_version": 0}, "channel_version=0; allowed: an integer of at least 1"),
        ({"channel_version": 3}, "version=3 of channel attention; allowed: 1, 2"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_models.abstract("davit", **options)
    assert "\n" not in str(error.value)


# --- weights ----------------------------------------------------------------------------------------------------------

NAMED = {"named_blocks": True, "channel_version": 2, "downsample_size": 3}


def official_names(timm):
    """timm's names in those of dingmyu/davit."""
    rules = {
        r"^stem\.conv": "patch_embeds.0.proj",
        r"^stem\.norm": "patch_embeds.0.norm",
        r"^stages\.(\d+)\.downsample\.conv": r"patch_embeds.\1.proj",
        r"^stages\.(\d+)\.downsample\.norm": r"patch_embeds.\1.norm",
        r"^stages\.(\d+)\.blocks": r"main_blocks.\1",
        r"\.cpe1\.": ".cpe.0.",
        r"\.cpe2\.": ".cpe.1.",
        r"^head\.norm": "norms",
        r"^head\.fc": "head",
    }
    return {renamed(name, rules): value for name, value in timm.items()}


def florence_names(timm, *, wrapped):
    """timm's names of named blocks in those of the original Florence-2, or of transformers; no head."""
    fn, net, dw, proj = ("fn.", "fn.net.", ".fn.dw", "proj") if wrapped else ("", "", "", "conv")
    norms = (r"\1.\2_attn.norm.", r"\1.ffn.norm.") if wrapped else (r"\1.norm1.", r"\1.norm2.")
    rules = {
        r"^stem\.conv": f"convs.0.{proj}",
        r"^stem\.norm": "convs.0.norm",
        r"^stages\.(\d+)\.downsample\.conv": rf"convs.\1.{proj}",
        r"^stages\.(\d+)\.downsample\.norm": r"convs.\1.norm",
        r"^stages\.(\d+)\.blocks": r"blocks.\1",
        r"(spatial_block)\.norm1\.": norms[0].replace(r"\2", "window"),
        r"(channel_block)\.norm1\.": norms[0].replace(r"\2", "channel"),
        r"(_block)\.norm2\.": norms[1],
        r"spatial_block\.attn\.": f"spatial_block.window_attn.{fn}",
        r"channel_block\.attn\.": f"channel_block.channel_attn.{fn}",
        r"\.mlp\.": f".ffn.{net}",
        r"\.cpe(\d)\.proj\.": rf".conv\1{dw}.",
    }
    prefix = "vision_tower." if wrapped else "model.vision_tower."
    tower = {prefix + renamed(name, rules): value for name, value in timm.items() if not name.startswith("head.")}
    return tower | {"language_model.model.shared.weight": np.zeros((3, 2), np.float32)}


def renamed(name, rules):
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def own(model):
    return models.unstack(models.split(model)[1])


def test_official_names_are_read():
    model = tiny_models.create("davit")
    timm = models.export_weights(model)
    assert {"stages.1.blocks.1.0.cpe1.proj.weight", "head.norm.bias", "head.fc.weight"} < timm.keys()
    official = official_names(timm)
    assert {"main_blocks.1.1.0.cpe.0.proj.weight", "norms.bias", "head.weight", "patch_embeds.1.norm.bias"} < (
        official.keys()
    )
    # Into a model whose layers have names, too: names are no part of the function.
    for options in ({}, {"named_blocks": True}):
        params, _, notes = models.convert_weights(tiny_models.abstract("davit", **options), {"state_dict": official})
        assert notes == ["names of dingmyu/davit"]
        for name, value in own(model).items():
            np.testing.assert_array_equal(params[name], value, err_msg=name)
    with pytest.raises(ValueError, match=r"left over: stages\.1\.blocks\.1\.0\.attn\.proj\.bias"):
        models.convert_weights(tiny_models.abstract("davit", depths=(1, 1)), official)


@pytest.mark.parametrize("wrapped", [True, False])
def test_names_of_florence_are_read(wrapped):
    model = tiny_models.create("davit", **NAMED)
    timm = models.export_weights(model)
    assert "stages.1.blocks.1.channel_block.cpe1.proj.weight" in timm
    florence = florence_names(timm, wrapped=wrapped)
    one = "vision_tower.blocks.1.1.channel_block.channel_attn.fn.qkv.weight"
    assert (one if wrapped else f"model.{one}".replace("fn.", "")) in florence
    params, _, notes = models.convert_weights(tiny_models.create("davit", **NAMED), florence)
    assert notes == [
        "names of Florence-2",
        "1 entries outside vision_tower are left out",
        "the norm before the head starts anew: the file has none",
        "head starts anew: 0 classes there, 5 here",
    ]
    for name, value in own(model).items():
        if not name.startswith("head."):
            fresh = {"norm.scale": np.ones(16), "norm.bias": np.zeros(16)}
            np.testing.assert_array_equal(params[name], fresh.get(name, value), err_msg=name)


# --- timm's arguments -------------------------------------------------------------------------------------------------


def options(**config):
    return REFERENCES["davit"].options(config)


def test_timm_arguments_have_counterparts():
    found = options()
    assert (found["widths"], found["attention"]) == ((96, 192, 384, 768), ("window", "channel"))
    assert (found["channel_version"], found["position_activation"], found["pool"]) == (1, None, "avg")
    found = options(cpe_act=True, channel_attn_v2=True, ffn=False, drop_rate=0.2, attn_types=["channel"])
    assert (found["channel_version"], found["position_activation"]) == (2, "gelu")
    assert (found["feed_forward"], found["head_dropout"], found["attention"]) == (False, 0.2, ("channel",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"img_size": 224}, "unknown argument of timm's DaVit 'img_size'"),
        ({"attn_types": ["spacial"]}, "unknown value of timm argument attn_types 'spacial'; nearest: spatial"),
        ({"attn_types": ["channel"] * 2, "named_blocks": True}, "named blocks need different names"),
        ({"norm_layer": "batchnorm2d"}, "norm_layer='batchnorm2d' has no counterpart"),
        ({"global_pool": ""}, "unknown value of timm argument global_pool ''"),
    ],
)
def test_timm_arguments_without_counterpart(config, message):
    with pytest.raises(ValueError, match=message):
        options(**config)
