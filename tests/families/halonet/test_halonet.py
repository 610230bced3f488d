"""HaloNet: published sizes, placement of the attention, image sizes, exchange, parts of a block, timm's arguments."""

import itertools
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
from configs.recipes import HALONET_HYBRIDS, HALONET_PAPER
from models.core.call import Call
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.families.halonet import variants
from models.families.halonet.block import Bottleneck, BottleneckOptions
from models.layers.gate import EfficientChannelAttention, SqueezeExcite, channel_kernel
from models.layers.pool import half

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
VARIANTS = variants.PAPER | variants.HYBRIDS
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
options = REFERENCES["halonet"].options


def table():
    """Rows of docs/families/halonet.md: name -> (blocks, image size, parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "halonet.md").read_text()
    row = r"^\| `(\w+)` \|[^|]*\|[^|]*\| (\d+, \d) \| (\d+) \| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|$"
    return {
        name: (blocks, int(size), int(parameters.replace(" ", "")), giga, top1)
        for name, blocks, size, parameters, giga, top1 in re.findall(row, text, re.MULTILINE)
    }


def giga(model, size):
    return summarize(model, (1, size, size, 3)).total.multiply_adds / 1e9


def shapes(model, images, method="features"):
    """What a model, perhaps an abstract one, gives for images, as shapes."""
    graph, params, state = models.split(model)
    return jax.eval_shape(
        lambda params, state, images: getattr(models.merge(graph, params, state), method)(images), params, state, images
    )


def call(model, x, *arguments):
    graph, params, state = models.split(model)
    function = jax.jit(
        lambda params, state, x: models.merge(graph, params, state)(x, *arguments), compiler_options=QUICK_COMPILE
    )
    return function(params, state, x)


def on_map(block, x, **own):
    """A block of a map."""
    return call(block, x, Call(Grid(x.shape[1:3]), **own))


# --- published sizes --------------------------------------------------------------------------------------------------


def test_every_variant_has_what_is_documented():
    documented = table()
    assert documented.keys() == VARIANTS.keys()
    for name, (blocks, size, parameters, multiply_adds, top1) in documented.items():
        published, variant = PUBLISHED[name], models.variant(name)
        assert published.image_size == size == variant.get("image_size", 256)
        assert blocks == f"{variant.get('block_size', 8)}, {variant.get('halo_size', 3)}"
        assert published.top1 == top1
        assert published.multiply_adds in (None, multiply_adds)
        assert abs(parameters / 1e6 - float(published.parameters)) <= tolerance(published.parameters), name


@pytest.mark.parametrize("name", ["halonet_h0", "halonet_h7"])
def test_multiply_adds_of_the_paper_s_models_are_ours(name):
    """The paper reports none; those of the others are in tests/models/test_contract_variants.py."""
    _, size, _, multiply_adds, _ = table()[name]
    assert f"{giga(full_size(name), size):.1f}" == multiply_adds


def test_multiply_adds_of_a_block_are_those_of_the_definition():
    summary = summarize(full_size("halonet_h1"), (1, 256, 256, 3))
    places, width, heads, window = 16 * 16, 256, 8, 14
    projections = places * width * (width + 2 * width)
    attention = 2 * places * window**2 * width
    positions = 2 * places * window * width
    assert heads * 32 == width
    pointwise = 2 * places * width * width
    assert summary.rows["stages.2.blocks.4"].multiply_adds == projections + attention + positions + pointwise


@pytest.mark.golden
def test_documented_parameters_are_those_of_timm():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    official = {k.removeprefix("timm/"): v for k, v in json.loads(path.read_text()).items() if "halonet" in k}
    assert len(official) == 4
    assert official == {name: table()[name][2] for name in official}


def test_the_paper_s_heads_are_an_option():
    assert count(full_size("halonet_h1", heads=(4, 8, 8, 8))) == 8_100_056 + 3 * 2 * 27 * 8


def test_every_variant_has_a_recipe_at_its_size():
    recipes = HALONET_PAPER | HALONET_HYBRIDS
    assert recipes.keys() == VARIANTS.keys()
    for name, (size, _) in recipes.items():
        assert size == PUBLISHED[name].image_size


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("halonet_h0", "aaa aaa aaaaaaa aaa"),
        ("halonet26t", "cc cc ca aa"),
        ("sehalonet33ts", "cc cca cca aa"),
        ("halonet50ts", "ccc ccca cacaca cac"),
        ("haloregnetz_b", "cc cccccc cccacccaccca aa"),
        ("halo2botnet50ts", "ccc caca cacaca cbc"),
    ],
)
def test_where_the_attention_is(name, placement):
    """Convolution, halo attention, bottleneck attention by layer."""
    model = full_size(name, scan=False)

    def kind(block):
        return {"None": "c", "Halo": "a", "Bott": "b"}[type(block.attn).__name__.replace("NoneType", "None")[:4]]

    found = [
        kind(stage.first) + "".join(kind(getattr(stage.blocks, str(i))) for i in range(stage.depth - 1))
        for stage in model.stages
    ]
    assert " ".join(found) == placement


def test_layers_are_scanned_in_the_shortest_cycle():
    names = models.split(full_size("haloregnetz_b"))[1]
    groups = {match[0] for name in names if (match := re.match(r"stages\.\d\.blocks\.\[.*?\]", name))}
    cycles = [{group.split(".blocks.")[1] for group in groups if group.startswith(f"stages.{i}.")} for i in range(4)]
    assert cycles == [{"[0::1]"}, {"[0::1]"}, {"[0::4]", "[1::4]", "[2::4]", "[3::4]"}, {"[0::1]"}]


# --- image sizes ------------------------------------------------------------------------------------------------------


def test_blocks_have_to_divide_every_map():
    model = tiny_models.abstract("halonet")
    assert model.multiple == 16
    found = shapes(model, tiny_models.images(48, 32))
    assert found["stages.1"].shape == (2, 6, 4, 16)
    message = r"blocks of 2 do not divide the map of \(3, 2\) in stage 1; images whose .* multiples of 16 fit"
    with pytest.raises(ValueError, match=message):
        shapes(model, tiny_models.images(24, 16))
    with pytest.raises(ValueError, match=r"sides of a map of \(3, 2\) are no multiples of 2; padding=True fills up"):
        tiny_models.abstract("halonet", image_size=(24, 16))
    assert full_size("halonet_h1").multiple == 256
    assert full_size("haloregnetz_b").multiple == 224


def test_padding_takes_any_image():
    model = tiny_models.create("halonet", padding=True)
    assert model.multiple == 8
    images = tiny_models.images(41, 26)
    assert call(model, images).shape == (2, 5)
    found = shapes(full_size("halonet_h7"), jax.ShapeDtypeStruct((1, 600, 600, 3), jnp.float32))
    assert [found[f"stages.{i}"].shape[1] for i in range(4)] == [150, 75, 38, 19]
    # Where nothing is padded it is the same function.
    images = tiny_models.images(32, 48)
    np.testing.assert_allclose(call(model, images), call(tiny_models.create("halonet"), images), atol=1e-5)


def test_positions_of_a_whole_map_are_for_one_size():
    small = {"widths": (8,) * 4, "depths": (1, 1, 1, 2), "stem": (4, 8)}
    small["layers"] = (("conv",), ("conv",), ("conv",), ("conv", {"attention": "bottleneck", "heads": 2}))
    model = nnx.eval_shape(lambda: models.create("halo2botnet50ts", rngs=nnx.Rngs(0), image_size=(64, 96), **small))
    assert models.split(model)[1]["stages.3.blocks.[0::1].attn.width_rel"].shape == (1, 5, 4)
    assert shapes(model, tiny_models.images(64, 96), "__call__").shape == (2, 1000)
    with pytest.raises(ValueError, match=r"positions for a map of \(2, 3\), not \(2, 2\): give the model the image"):
        shapes(model, tiny_models.images(64, 64))


# --- exchange ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["identity", "dense", "neighborhood"])
def test_attention_is_exchanged_by_name(attention):
    """In every attention layer, bottleneck attention included; with and without a stride."""
    layers = (("conv",), ("attention", {"attention": "bottleneck"}))
    model = tiny_models.abstract("halonet", attention=attention, layers=layers, scan=False)
    kinds = {type(block.attn) for block in (model.stages[1].first, getattr(model.stages[1].blocks, "0"))}
    assert len(kinds) == 1
    assert "Halo" not in str(kinds)
    found = shapes(model, tiny_models.images(36, 20))
    assert found["stages.1"].shape == (2, 5, 3, 16)


def test_identity_mixes_places_by_pools_alone():
    """Of one block: the control sees the 2 x 2 places of its stride, and attention sees its window."""
    for attention, mixes in (("identity", False), ("halo", True)):
        own = {"halo": {"block_size": 2, "halo_size": 1}}
        settings = BottleneckOptions(8, 8, stride=2, attention=attention, heads=2, attention_defaults=own)
        block = Bottleneck(settings, nnx.Rngs(0))
        block.conv3.norm.scale = nnx.Param(jnp.ones(8))
        x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
        changed = on_map(block, x.at[:, :2, :2].add(1.0)) - on_map(block, x)
        assert bool(jnp.any(jnp.abs(changed[:, 1:, 1:]) > 1e-4)) is mixes
        assert float(jnp.abs(changed[:, 0, 0]).max()) > 1e-4


# --- parts ------------------------------------------------------------------------------------------------------------


def test_gates():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    gate = SqueezeExcite(6, 2, activation="relu", rngs=nnx.Rngs(0))
    w1, w2 = (np.asarray(layer.kernel[...])[0, 0] for layer in (gate.fc1, gate.fc2))
    expected = 1 / (1 + np.exp(-np.maximum(np.asarray(x).mean((1, 2)) @ w1, 0) @ w2))
    np.testing.assert_allclose(gate(x), x * expected[:, None, None], atol=1e-5)

    channel = EfficientChannelAttention(6, size=3, rngs=nnx.Rngs(0))
    kernel, mean = np.asarray(channel.kernel[...])[:, 0, 0], np.pad(np.asarray(x).mean((1, 2)), ((0, 0), (1, 1)))
    sums = sum(kernel[i] * mean[:, i : i + 6] for i in range(3))
    np.testing.assert_allclose(channel(x), x / (1 + np.exp(-sums))[:, None, None], atol=1e-5)
    assert [channel_kernel(width) for width in (4, 64, 256, 512)] == [3, 3, 5, 5]
    with pytest.raises(ValueError, match="must be odd"):
        EfficientChannelAttention(6, size=4, rngs=nnx.Rngs(0))


def test_means_at_the_border_are_of_what_is_there():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = [[np.mean([0, 1, 5, 6]), np.mean([2, 3, 7, 8]), np.mean([4, 9])], [10.5, 12.5, 14]]
    np.testing.assert_allclose(half(x)[0, :, :, 0], expected)


def test_a_new_block_is_its_shortcut():
    """The last norm of the branch starts at zero, but not in a block that has no shortcut."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    block = Bottleneck(BottleneckOptions(8, 8), nnx.Rngs(0))
    np.testing.assert_allclose(on_map(block, x), jnp.maximum(x, 0), atol=1e-6)
    bare = Bottleneck(BottleneckOptions(8, 16, shortcut="none", linear_out=True), nnx.Rngs(0))
    assert float(jnp.abs(on_map(bare, x)).max()) > 0.1
    # And it has no branch that drop path could skip.
    dropped = on_map(bare, x, drop_path=0.999, train=True, key=jax.random.key(0))
    assert bool((jnp.abs(dropped).max((1, 2, 3)) > 0.1).all())


def test_layer_ids_for_layerwise_decay():
    model = tiny_models.abstract("halonet", scan=False)
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 6
    assert ids["patch_embed.convs.0.conv.kernel"] == 0
    assert ids["stages.0.first.conv1.conv.kernel"] == 1
    assert ids["stages.0.blocks.0.gate.kernel"] == 2
    assert ids["stages.1.first.attn.height_rel"] == 3
    assert ids["stages.1.blocks.1.attn.kv.kernel"] == 5
    assert ids["final_conv.norm.scale"] == ids["head.kernel"] == 6


def test_maximum_pooling_has_a_gradient_where_the_compiler_rounds_twice():
    model = tiny_models.create("halonet", pool="avgmax")
    graph, params, state = models.split(model)
    images = tiny_models.images(32, 32)

    def total(images):
        return models.merge(graph, params, state)(images).sum()

    assert np.isfinite(jax.jit(jax.grad(total), compiler_options=QUICK_COMPILE)(images)).all()


# --- wrong choices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"depths": (2,)}, r"depths=\(2,\).*one entry for each stage is needed"),
        ({"heads": (2, 2, 2)}, r"heads=\(2, 2, 2\): one entry for each of the 2 stages"),
        ({"layers": (("conf",), ("conv",))}, "unknown kind of layer 'conf'; nearest: conv"),
        ({"layers": (({"head": 2},), ("conv",))}, "unknown option of a layer 'head'; nearest: heads"),
        ({"gate": "so"}, "unknown gate 'so'"),
        ({"shortcut": "pool"}, "unknown shortcut 'pool'"),
        ({"stem_pool": "mean"}, "unknown stem_pool 'mean'"),
        ({"stem": ()}, "at least one convolution"),
        ({"pool": "mean"}, "unknown pool 'mean'"),
        ({"strides": (1, 3)}, "stride=3 of a block; allowed: 1, 2"),
        ({"group_width": 3}, "group_width=3 does not divide"),
        ({"attention_options": {"blok": 3}}, "unknown option of attention 'halo' 'blok'; nearest: block"),
        ({"attention": "halp"}, "unknown attention 'halp'; nearest: halo"),
    ],
)
def test_a_wrong_choice_is_one_line(own, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_models.abstract("halonet", **own)
    assert "\n" not in str(error.value)


# --- timm's arguments -------------------------------------------------------------------------------------------------

BLOCK = {"_type": "ByoBlockCfg", "type": "self_attn", "d": 1, "c": 16, "s": 1, "gs": 0, "br": 0.5}
CFG = {
    "_type": "ByoModelCfg",
    "blocks": [BLOCK, [BLOCK | {"type": "bottle", "s": 2, "d": 2}, BLOCK]],
    "attn_layer": "se",
    "attn_kwargs": {"rd_ratio": 0.5},
    "self_attn_layer": "halo",
    "self_attn_kwargs": {"block_size": 4, "num_heads": 2},
}


def changed(path, value):
    """`CFG` with a field of the first block (`blocks.NAME`), of itself, or of the call (`.NAME`) changed."""
    cfg = json.loads(json.dumps(CFG))
    if path.startswith("."):
        return {"cfg": cfg, path[1:]: value}
    if path.startswith("blocks."):
        cfg["blocks"][0][path[7:]] = value
    else:
        cfg[path] = value
    return {"cfg": cfg}


def test_defaults_and_overrides_are_timm_s():
    found = options({"cfg": CFG, "in_chans": 1, "stem_chs": 24, "drop_rate": 0.1, "size": [32, 32], "chs": [16, 16]})
    assert (found["stem"], found["stem_pool"], found["stem_size"]) == ((24,), "max", 3)
    assert (found["channels"], found["head_dropout"], found["num_classes"], found["shortcut"]) == (1, 0.1, 1000, "conv")
    assert (found["widths"], found["depths"], found["strides"]) == ((16, 16), (1, 3), (1, 2))
    first, second, third, last = itertools.chain(*found["layers"])
    assert first == last
    assert first["attention"] == "halo"
    assert first["heads"] == 2
    assert (first["attention_options"]["block_size"], first["attention_options"]["halo_size"]) == (4, 3)
    assert second == third
    assert (second["gate"], second["gate_options"]["ratio"], "attention" in second) == ("se", 0.5, False)
    # What a block says replaces what the model says, whole.
    (own, *_), _ = options(changed("blocks.self_attn_kwargs", {"halo_size": 1}))["layers"]
    assert (own["attention_options"]["block_size"], own["heads"]) == (8, 8)
    (own, *_), _ = options(changed("blocks.block_kwargs", {"post_attn_na": False}))["layers"]
    assert own["post_norm"] is False


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("blocks.type", "basic", "type='basic' has no counterpart here; allowed: 'bottle', 'self_attn'"),
        ("blocks.self_attn_layer", "lambda", "self_attn_layer='lambda'.*allowed: 'halo', 'bottleneck'"),
        ("blocks.self_attn_kwargs", {"heads": 2}, "unknown entry of timm's self_attn_kwargs 'heads'"),
        ("blocks.block_kwargs", {"attn_last": True}, "unknown entry of timm's block_kwargs 'attn_last'"),
        ("blocks.dd", 1, "unknown field of timm's ByoBlockCfg 'dd'; nearest: d"),
        ("attn_layer", "cbam", "attn_layer='cbam' has no counterpart here; allowed: 'se', 'eca'"),
        ("attn_kwargs", {"add_maxpool": True}, "add_maxpool=True has no counterpart here; allowed: False"),
        ("downsample", "max", "downsample='max'.*allowed: 'conv1x1', 'avg', ''"),
        ("stem_type", "rep", "stem_type='rep' has no counterpart here"),
        ("stem_pool", "blur", "stem_pool='blur' has no counterpart here"),
        ("norm_layer", "layernorm", "norm_layer='layernorm'.*allowed: 'batchnorm'"),
        ("aa_layer", "blurpool", "aa_layer='blurpool'"),
        ("head_type", "mlp", "head_type='mlp'"),
        ("act_layer", "", "act_layer=False"),
        (".output_stride", 4, "output_stride=4: the map is 1/4 of the image before stage 1"),
        (".drop_block_rate", 0.1, "drop_block_rate=0.1"),
        (".global_pool", "catavgmax", "global_pool='catavgmax'.*allowed: 'avg', 'max', 'avgmax'"),
        (".fixed_input_size", True, "img_size=None"),
        (".num_classs", 3, "unknown argument of timm's ByobNet 'num_classs'; nearest: num_classes"),
    ],
)
def test_arguments_of_timm_s_without_a_counterpart(path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        options(changed(path, value))
    assert "\n" not in str(error.value)


def test_widths_of_a_stage_are_equal():
    blocks = [[BLOCK, BLOCK | {"c": 32}]]
    with pytest.raises(ValueError, match=r"c of the blocks of one stage: \[16, 32\]; allowed: the same for all"):
        options({"cfg": CFG | {"blocks": blocks}})
