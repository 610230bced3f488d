"""BiFormer: published sizes, official arguments, its attention by the definition, image sizes, exchange, weights."""

import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
import tiny_models
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from references import REFERENCES
from shapes import full_size
from torch_writer import saved

import models
from attn import Grid
from configs.recipes import BIFORMER_DROP_PATH
from models.attention.registry import make_attention
from models.core import sharding
from models.core.call import Call
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.core.watch import Watch
from models.families.biformer.block import BIFORMER_BLOCKS
from models.families.biformer.variants import VARIANTS
from models.hosts.block import BlockOptions
from training.distributed import mesh

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
abstract, images = partial(tiny_models.abstract, "biformer"), tiny_models.images
create = partial(tiny_models.create, "biformer")
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def call(model, x, method="__call__", **options):
    graph, params, state = models.split(model)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, state, x):
        found = getattr(models.merge(graph, params, state), method)(x, **options)
        return (found, options["tap"].values) if "tap" in options else found

    return run(params, state, x)


def traced(model, x, method="__call__"):
    """Shapes of what an abstract model gives."""
    graph, params, state = models.split(model)
    return jax.eval_shape(lambda p, s, x: getattr(models.merge(graph, p, s), method)(x), params, state, x)


# --- published sizes --------------------------------------------------------------------------------------------------


def table():
    """Rows of docs/families/biformer.md: name -> (parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "biformer.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return {name: (int(parameters.replace(" ", "")), giga, top1) for name, parameters, giga, top1 in rows}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_what_is_published(name):
    """And documented; both are counted in tests/models/test_contract_variants.py."""
    parameters, giga, top1 = table()[name]
    published = PUBLISHED[name]
    assert (giga, top1) == (published.multiply_adds, published.top1)
    assert abs(parameters / 1e6 - float(published.parameters)) <= tolerance(published.parameters)


@pytest.mark.golden
def test_documented_parameters_are_those_of_the_official_models():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    counts = {k.removeprefix("biformer/"): v for k, v in json.loads(path.read_text()).items() if "biformer/" in k}
    assert counts == {name: parameters for name, (parameters, *_) in table().items()}


def test_every_variant_has_a_recipe():
    assert set(VARIANTS) == set(BIFORMER_DROP_PATH)


def test_a_row_counts_what_its_block_multiplies():
    model = full_size("biformer_tiny")
    rows = summarize(model, (1, 224, 224, 3)).rows
    places, width, keys = 28 * 28, 128, 4 * 16
    linear = (4 + 2 * 3) * places * width**2
    attention, routing = 2 * places * keys * width, 49**2 * width
    assert rows["stages.1.blocks.1"].multiply_adds == linear + attention + routing + (9 + 25) * places * width


# --- the attention, by its definition ---------------------------------------------------------------------------------

LEGACY = {"cls": "BiLevelRoutingAttention (legacy), NHWC input", "dim": 12, "num_heads": 3, "n_win": 2, "topk": 3}
NCHW = {"cls": "nchwBRA", "dim": 12, "num_heads": 3, "n_win": 3, "topk": 4}
SOFT = {"soft_routing": True, "diff_routing": True}
CASES = {
    "learned, narrow keys": (LEGACY | SOFT | {"param_routing": True, "qk_dim": 6, "side_dwconv": 5}, (4, 6)),
    "soft, padded": (LEGACY | SOFT | {"auto_pad": True, "n_win": 3, "topk": 5}, (5, 7)),
    "no gradient of the weights": (LEGACY | {"soft_routing": True, "qk_scale": 0.5, "side_dwconv": 0}, (4, 4)),
    "hard, padded": (LEGACY | {"auto_pad": True, "n_win": 3, "topk": 2, "param_attention": "qkv"}, (4, 8)),
    "fixed mean": (LEGACY | {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, (6, 10)),
    "fixed maximum": (LEGACY | {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 3}, (6, 8)),
    "no mean": (LEGACY | {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 1}, (4, 4)),
    "adaptive mean": (LEGACY | SOFT | {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}, (6, 10)),
    "adaptive maximum": (LEGACY | {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 3, "auto_pad": True}, (7, 8)),
    "nchw": (NCHW, (6, 9)),
    "nchw, more regions": (NCHW | {"side_dwconv": 5, "qk_scale": 0.4, "auto_pad": False}, (7, 11)),
    "nchw, no convolution": (NCHW | {"side_dwconv": -1}, (10, 8)),
}


def weights_of(model):
    """Random official weights, at the scale they have in a trained network."""
    rng = np.random.default_rng(0)
    _, params, _ = models.split(model)
    zeros = {name: np.zeros(value.shape, np.float32) for name, value in params.items()}
    names = REFERENCES["bilevel_routing"].family.layouts["torch"](model).write(zeros)
    return {
        name: rng.normal(size=v.shape, scale=0.1 if v.ndim == 1 else v[0].size ** -0.5).astype(np.float32)
        for name, v in names.items()
    }


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_official_attention_by_its_definition(case):
    """Output, and the derivative of sum(y ** 2) along a random direction, by differences."""
    config, shape = CASES[case]
    family = REFERENCES["bilevel_routing"]
    model = family.build(config)
    weights = weights_of(model)
    models.load_weights(model, weights)
    graph, params, _ = models.split(model)
    rng = np.random.default_rng(1)
    x, direction = rng.normal(size=(2, 2, *shape, 12)).astype(np.float32)
    is_nchw = "nchw" in config["cls"]

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, x):
        def evaluate(x):
            inputs = {"x": jnp.moveaxis(x, -1, 1) if is_nchw else x}
            y = family.evaluate(models.merge(graph, params, {}), inputs, config, ())["y"]
            return jnp.moveaxis(y, 1, -1) if is_nchw else y

        y, pull = jax.vjp(evaluate, x)
        return y, pull(2 * y)[0]

    y, dx = run(params, x)
    options = {name: value for name, value in config.items() if name != "cls"}
    reference = partial(oracle.nchw if is_nchw else oracle.legacy, weights, **options)
    expected = reference(x)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
    step = 1e-6
    ends = [(reference(x + sign * step * direction.astype(np.float64)) ** 2).sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    if config.get("soft_routing") and not config.get("diff_routing"):
        # The reference differentiates through the weights, where the official code does not.
        assert abs((dx * direction).sum() - slope) > 1e-2 * abs(slope)
    else:
        assert abs((dx * direction).sum() - slope) < 1e-4 * (abs(slope) + np.abs(dx).max())


# --- official arguments -----------------------------------------------------------------------------------------------

OFFICIAL = {
    "depth": [1, 1, 1, 1], "embed_dim": [16, 16, 24, 32], "head_dim": 8, "topks": [1, 2, 3, -2], "n_win": 2,
    "qk_dims": [16, 8, 24, 32], "kv_downsample_mode": "identity", "num_classes": 5,
}  # fmt: skip


def test_official_defaults_are_those_of_the_published_models():
    """What the functions of the official file say, with all other arguments at their defaults."""
    tiny = {
        "depth": [2, 2, 8, 2], "embed_dim": [64, 128, 256, 512], "mlp_ratios": [3, 3, 3, 3], "n_win": 7,
        "kv_downsample_mode": "identity", "kv_per_wins": [-1] * 4, "topks": [1, 4, 16, -2], "side_dwconv": 5,
        "before_attn_dwconv": 3, "layer_scale_init_value": -1, "qk_dims": [64, 128, 256, 512], "head_dim": 32,
    }  # fmt: skip
    stl = {"cls": "BiFormerSTL", "norm_layer": "torch.nn.BatchNorm2d"}
    for config, name in ((tiny, "biformer_tiny"), (stl, "biformer_stl")):
        ours = full_size(name)
        theirs = REFERENCES["biformer"].build(config)
        shapes = [{n: v.shape for n, v in models.split(model)[1].items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]
        # What no shape shows.
        options = REFERENCES["biformer"].options(config)
        assert options["heads"] == VARIANTS[name]["heads"]
        assert tuple(options["attention"]) == tuple(ours.options.by_stage()["attention"])
        assert tuple(options["topk"]) == (1, 4, 16, 0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            {"topks": [0, -1, 2, 1]},
            ["stages.0.0.attn.2.weight", "stages.1.0.attn.proj.bias", "stages.3.0.attn.wo.bias"],
        ),
        ({"mlp_dwconv": True}, ["stages.2.0.mlp.1.dwconv.weight"]),
        ({"layer_scale_init_value": 1e-6}, ["stages.0.0.gamma1", "stages.3.0.gamma2"]),
        ({"soft_routing": True, "diff_routing": True, "param_routing": True}, ["stages.1.0.attn.router.emb.weight"]),
        ({"cls": "nchwBiFormerSTL", "topks": [1, 2, 3, -1]}, ["stages.0.blocks.0.attn.qkv_linear.weight"]),
    ],
)
def test_options_have_their_official_names(change, names):
    config = {"cls": "BiFormer"} | OFFICIAL | change
    if "STL" in config["cls"]:
        config = {key: config[key] for key in config if key not in ("qk_dims", "kv_downsample_mode", "n_win")}
    # Two regions, and seven, divide the map of every stage of 448 pixels.
    model = REFERENCES["biformer"].build(config, image_size=448)
    _, params, state = models.split(model)
    zeros = models.unstack({name: np.zeros(value.shape, np.float32) for name, value in (params | state).items()})
    theirs = REFERENCES["biformer"].family.layouts["torch"](model).write(zeros)
    assert set(names) <= theirs.keys()


def test_the_refactored_model_runs():
    """Pointwise convolutions, dense attention that convolves its values, padding behind the projections."""
    config = {
        "cls": "nchwBiFormerSTL", "depth": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "head_dim": 4,
        "mlp_ratios": [1] * 4, "n_wins": [3, 2, 2, 1], "topks": [5, 2, 1, -1], "num_classes": 5,
    }  # fmt: skip
    found = traced(REFERENCES["biformer"].build(config), images(64, 72), "features")
    assert [found[f"stages.{i}"].shape[1:3] for i in range(4)] == [(16, 18), (8, 9), (4, 4), (2, 2)]


WRONG = {
    "pool": ({"kv_downsample_mode": "fracpool"}, "unknown kv_downsample_mode 'fracpool'"),
    "hard with gradient": ({"diff_routing": True}, "allowed: none of them, soft, soft and diff, all three"),
    "learned without": ({"param_routing": True}, "allowed: none of them, soft, soft and diff, all three"),
    "attention": ({"param_attention": "none"}, "='none' has no counterpart here; allowed: 'qkvo', 'qkv'"),
    "representation": ({"representation_size": 3}, "representation_size=3 has no counterpart here; allowed: None, 0"),
    "positions": ({"pe": "sum"}, "pe='sum' has no counterpart here; allowed: None, 'none'"),
    "convolution before": ({"before_attn_dwconv": 5}, "before_attn_dwconv=5 has no counterpart here; allowed: 3, 0"),
    "even kernel": ({"side_dwconv": 4}, "side_dwconv=4: .* allowed: odd numbers, 0 for none"),
    "widths of keys": ({"qk_dims": [None] * 4}, "qk_dims=.*needs a number for each stage"),
    "topks": ({"topks": [1, 1, 1, -3]}, r"for each stage: a number of regions, -1 \(dense\), -2 \(local_dense\)"),
    "typing": ({"n_wim": 7}, "unknown argument of the official class 'n_wim'; nearest: n_win"),
    "norm": ({"cls": "BiFormerSTL", "norm_layer": "GroupNorm"}, "norm_layer='GroupNorm' .*: BatchNorm2d, LayerNorm2d"),
    "regions": ({"cls": "BiFormerSTL", "n_wins": 7}, "n_wins=7: the official model needs a number for each stage"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_without_a_counterpart_say_what_is_allowed(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        REFERENCES["biformer"].options(change if "cls" in change else OFFICIAL | change)
    assert "\n" not in str(error.value)


def test_attention_alone_refuses_alike():
    options = REFERENCES["bilevel_routing"].options
    for config, message in (
        (LEGACY | {"kv_downsample_mode": "conv"}, "unknown kv_downsample_mode 'conv'"),
        (NCHW | {"attn_backend": "cuda"}, "attn_backend='cuda' has no counterpart here; allowed: 'torch'"),
        (NCHW | {"kv_per_win": 2}, "unknown argument of the official class 'kv_per_win'"),
        (NCHW | {"qk_scale": -1.0}, "allowed: 0 and more"),
        ({"cls": "nchwBRA"}, "dim: the official attention cannot be made without"),
    ):
        with pytest.raises(ValueError, match=message):
            options(config)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BIFORMER_BLOCKS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_blocks_are_what_they_say(block, depthwise):
    """Put together from their parts: positions, attention, MLP, and where the norms are."""
    options = BlockOptions(
        width=8, heads=2, mlp_width=12, attention="local_dense", attention_options={"local": 3}, layer_scale=0.5
    )
    made = BIFORMER_BLOCKS[block](options, nnx.Rngs(0), positions=True, depthwise=depthwise)
    grid = Call(Grid((3, 4)))
    x = jax.random.normal(jax.random.key(0), (2, 12, 8))

    def conv(layer, y):
        kernel = jnp.moveaxis(layer.kernel[...], (3, 2), (0, 1))
        return oracle.depthwise(np.asarray(y.reshape(2, 3, 4, -1)), kernel, layer.bias[...]).reshape(y.shape)

    def mlp(y):
        y = made.mlp.fc1(y)
        y = conv(made.mlp.conv, y) if depthwise else y
        return 0.5 * made.mlp.fc2(jax.nn.gelu(y, approximate=False))

    y = x + conv(made.position, x)
    if block == "pre_norm":
        y = y + 0.5 * made.attn(made.norm1(y), grid)
        expected = y + mlp(made.norm2(y))
    else:
        y = made.norm1(y + 0.5 * made.attn(y, grid))
        expected = made.norm2(y + mlp(y))
    np.testing.assert_allclose(made(x, grid), expected, atol=2e-6)


def test_images_that_the_regions_do_not_divide():
    tap = models.record("routes", "heads", layers=(1, 4))
    found, recorded = call(create(), images(41, 58), method="features", tap=tap)
    assert found["embedded"].shape == found["stages.0"].shape == (2, 11, 15, 8)
    assert found["stages.1"].shape == (2, 6, 8, 16)
    assert recorded["routes"].shape == (1, 2, 4, 2)
    assert recorded["stages.0.blocks.attn.heads"].shape == (1, 2, 12 * 16, 2, 4)
    assert recorded["stages.1.blocks.attn.heads"].shape == (1, 2, 6 * 8, 4, 4)
    np.testing.assert_allclose(found["tokens"].mean(1), found["pooled"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"regions \(2, 2\) do not divide a map of \(11, 15\); .*auto_pad=True"):
        traced(abstract(auto_pad=False), images(41, 58))
    with pytest.raises(ValueError, match=r"regions \(2, 2\) do not divide a map of \(11, 15\); .*auto_pad=True"):
        abstract(auto_pad=False, image_size=(41, 58))
    # Where nothing has to be padded the two are one.
    both = [call(create(auto_pad=auto_pad), images(32, 48)) for auto_pad in (False, True)]
    np.testing.assert_array_equal(*both)


def test_patches_drop_what_is_left_over():
    """As in Swin's layout of the official code: 67 x 66 pixels are 16 x 16 patches."""
    options = {"layout": "patches", "positions": False, "norm": "layer", "head_norm": "layer"}
    model = create(**options)
    small, large = images(64, 64), jnp.pad(images(64, 64), ((0, 0), (0, 3), (0, 2), (0, 0)), constant_values=9)
    np.testing.assert_array_equal(call(model, small), call(model, large))


def test_attention_is_exchanged_by_name():
    """One for each stage; one for all is in `test_options.py`, with all names."""
    model = abstract(attention=("convolution", "bilevel_routing"), topk=(2, 1))
    assert traced(model, images(32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"unknown option of attention 'convolution', 'bilevel_routing' 'windw'"):
        abstract(attention=("convolution", "bilevel_routing"), attention_options={"windw": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "patch"}, "unknown layout 'patch'; nearest: patches"),
        ({"heads": (2,)}, r"depths=\(3, 2\) and heads=\(2,\): one entry for each stage"),
        ({"attention": ("dense",)}, r"attention=\('dense',\): one entry for each of the 2 stages"),
        ({"mlp": "glu"}, "unknown mlp 'glu'"),
        ({"routing": "sof"}, "unknown routing 'sof'; nearest: soft"),
        ({"pooling": "avg"}, "unknown pooling 'avg'"),
        ({"attention_options": {"padding": "inside"}}, "unknown padding 'inside'"),
        ({"attention_options": {"local_of": "keys"}}, "unknown local_of 'keys'; .*allowed: input, values"),
        ({"qk_widths": (9, 16)}, "qk_width 9 is not divisible by 2 heads"),
        ({"heads": (3, 4)}, "width 8 is not divisible by 3 heads"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        abstract(**options)
    assert "\n" not in str(error.value)


def test_maps_that_have_too_few_places():
    options = {"regions": 2, "topk": 1, "padding": "projected"}
    attention = make_attention("bilevel_routing", 8, 2, shared={}, options=options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"regions \(2, 2\): a map of \(1, 16\) has fewer places"):
        attention(jnp.ones((1, 16, 8)), Call(Grid((1, 16))))
    more = dict(regions=2, topk=5)
    with pytest.raises(ValueError, match="does not fit here: topk=5: there are 4 regions"):
        make_attention("bilevel_routing", 8, 2, shared={}, options=more, grid=Grid((4, 4)), rngs=nnx.Rngs(0))


def test_taps_that_see_no_probabilities_keep_the_fused_path():
    attention = make_attention("bilevel_routing", 8, 2, shared={}, options={"regions": 2, "topk": 1}, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 16, 8))

    def fused(*sites):
        def run(x):
            return attention(x, Call(Grid((4, 4)), tap=Watch(models.record(*sites))))

        return "attention_step" in str(jax.make_jaxpr(run)(x))

    assert fused("routes", "q", "lse", "heads")
    assert not fused("routes", "probs")

    @models.tap("logits", "probs")
    def unedited(site, value):
        return value

    run = jax.jit(lambda x, tap: attention(x, Call(Grid((4, 4)), tap=tap)), static_argnums=1)
    np.testing.assert_allclose(run(x, None), run(x, Watch(unedited)), atol=1e-6)


# --- what training needs ----------------------------------------------------------------------------------------------


def test_layer_ids_for_layerwise_decay():
    model = abstract(scan=False)
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 6
    assert ids["patch_embed.conv1.kernel"] == ids["patch_embed.norm2.scale"] == 0
    assert ids["stages.0.blocks.0.position.kernel"] == 1
    assert ids["stages.0.blocks.2.attn.qk.kernel"] == 3
    assert ids["stages.1.downsample.norm.scale"] == ids["stages.1.blocks.0.mlp.fc1.kernel"] == 4
    assert ids["stages.1.blocks.1.attn.local.bias"] == 5
    assert ids["norm.scale"] == ids["head.kernel"] == 6


def test_every_layer_says_how_it_is_split():
    model = full_size("biformer_tiny")
    rules, shape = sharding.rules(model), AbstractMesh((1, 4, 2), mesh.AXES)
    params = models.split(model)[1]
    specs = {n: mesh.parameter_spec(n, v.shape, rules, shape) for n, v in params.items()}
    prefix = "stages.2.blocks.[0::1].attn"
    assert specs[f"{prefix}.qk.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{prefix}.v.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs[f"{prefix}.proj.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{prefix}.local.kernel"] == PartitionSpec(None, None, None, None, "fsdp")
    whole = [n for n, v in params.items() if "fsdp" not in specs[n] and n.endswith("kernel")]
    assert not whole


def test_released_files_have_their_weights_below_model(tmp_path):
    """In the official names, with the count of batches that PyTorch's norms keep."""
    model = create()
    weights = models.export_weights(model)
    assert weights["downsample_layers.0.4.num_batches_tracked"] == 0
    assert weights["stages.0.0.attn.qkv.qkv.weight"].shape == (24, 8)
    other = create(scan=False)
    floats = {name: np.ascontiguousarray(v) for name, v in weights.items() if v.dtype == np.float32}
    notes = models.load_weights(other, saved(tmp_path / "biformer.pth", {"model": floats, "epoch": 3}))
    assert notes == ["the weights below model are taken"]
    x = images(32, 32)
    np.testing.assert_allclose(call(model, x), call(other, x), atol=1e-5)
