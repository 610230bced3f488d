"""MaxViT: published sizes, its layer, images and windows, names of timm and TensorFlow, arguments of timm."""

import dataclasses
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
from jax.sharding import AbstractMesh, PartitionSpec
from references import REFERENCES
from shapes import count, full_size

import models
from attn.common.relative import resample_relative_bias
from configs import base, recipes
from models.core import sharding
from models.core.published import PUBLISHED, tolerance
from models.core.summary import summarize
from models.families.maxvit import variants
from models.layers.depthwise import depthwise, same_pads
from models.layers.mbconv import MBConv, MBConvOptions
from models.layers.pool import pool_half
from training.distributed import mesh

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
VARIANTS = variants._variants()
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def shapes(model, *sides, batch=1, **options):
    """Features of a model whose leaves are shapes."""
    graph, params, state = models.split(model)
    images = jax.ShapeDtypeStruct((batch, *sides, 3), jnp.float32)
    features = lambda params, state, images: models.merge(graph, params, state).features(images, **options)  # noqa: E731
    return jax.eval_shape(features, params, state, images)


def table():
    """Rows of docs/families/maxvit.md: name -> (parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "maxvit.md").read_text()
    rows = re.findall(r"^\| `(maxvit_\w+)` \| \d.*?\| ([\d ]+) \| ([\d.]+) \| ([\d.]*) ?\|$", text, re.MULTILINE)
    return {name: (int(parameters.replace(" ", "")), giga, top1 or None) for name, parameters, giga, top1 in rows}


# --- published sizes --------------------------------------------------------------------------------------------------


def test_every_variant_has_what_is_documented():
    """What is counted, is in tests/models/test_contract_variants.py."""
    documented = table()
    assert documented.keys() == VARIANTS.keys()
    for name, (parameters, giga, top1) in documented.items():
        published = PUBLISHED[name]
        assert (published.multiply_adds, published.top1) == (giga, top1)
        assert abs(parameters / 1e6 - float(published.parameters)) <= tolerance(published.parameters)


@pytest.mark.golden
def test_documented_parameters_are_those_of_timm():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    theirs = {name: n for name, n in json.loads(path.read_text()).items() if name.startswith("timm/maxvit_")}
    ours = {name: parameters for name, (parameters, _, _) in table().items()}
    for name, expected in theirs.items():
        size, side = re.match(r"timm/maxvit_(\w+)_tf_(\d+)", name).groups()
        classes = int(re.search(r"num_classes=(\d+)|$", name)[1] or 1000)
        ours_name = f"maxvit_{size}" if side == "224" else f"maxvit_{size}_{side}"
        width = VARIANTS[ours_name]["pre_logits"]
        assert ours[ours_name] + (classes - 1000) * (width + 1) == expected, name
    assert len(theirs) == len(VARIANTS) + 1


def test_published_multiply_adds():
    """What is counted there and not here: the table of 23 x 23 biases by one-hot matrices of 12 rows and columns."""
    published, side = PUBLISHED["maxvit_tiny_384"], 384
    ours = summarize(full_size("maxvit_tiny_384"), (1, side, side, 3), activations=False).total.multiply_adds / 1e9
    rows = 12 * 12 * 23 * 23
    columns = 12 * 12 * 12 * 12 * 23
    heads = 2 * (2 * 2 + 2 * 4 + 5 * 8 + 2 * 16)
    assert published.besides == pytest.approx(heads * (rows + columns) / 1e9)
    assert tolerance("17.7") < 17.7 - ours < tolerance("17.7") + published.besides


def test_a_layer_costs_what_the_definition_says():
    """The last layer of the first stage of Tiny: 56 x 56 places, 64 channels, windows of 49."""
    summary = summarize(full_size("maxvit_tiny"), (1, 224, 224, 3), activations=False)
    places, width, window = 56 * 56, 64, 49
    attention = 2 * (4 * places * width**2 + 2 * places * window * width)
    mlps = 2 * 8 * places * width**2
    convolution = 8 * places * width**2 + 9 * places * 4 * width + 2 * 4 * width * width // 4
    assert summary.rows["stages.0.blocks.0"].multiply_adds == attention + mlps + convolution


def test_every_variant_has_a_recipe():
    made = {name: recipes.maxvit(base.get_config(), name) for name in recipes.MAXVIT_DROP_PATH}
    for pretrained in ("imagenet1k", "imagenet21k"):
        rates = recipes.MAXVIT_DROP_PATH if pretrained == "imagenet1k" else recipes.MAXVIT_21K_DROP_PATH
        for name in (f"{size}_{side}" for size in rates for side in (384, 512)):
            config = made[name] = recipes.maxvit_finetune(base.get_config(), name, pretrained)
            assert config.data.image_size == VARIANTS[name]["image_size"]
    # There is no recipe for its pre-training, on ImageNet-21k.
    assert VARIANTS.keys() - made.keys() == {"maxvit_xlarge"}
    with pytest.raises(ValueError, match="model 'maxvit_xlarge': there is a recipe for maxvit_base, "):
        recipes.maxvit(base.get_config(), "maxvit_xlarge")


# --- the layer --------------------------------------------------------------------------------------------------------


def reference_branch(block, x, options):
    """MBConv in evaluation with stride 1 by its definition, in NumPy and float64."""
    gelu = lambda y: 0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))  # noqa: E731
    at = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731

    def norm(y, layer):
        return (y - at(layer.mean)) / np.sqrt(at(layer.var) + options.norm_eps) * at(layer.scale) + at(layer.bias)

    y = gelu(norm(norm(x, block.pre_norm) @ at(block.conv1.kernel), block.norm1))
    padded, kernel = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), at(block.conv2.kernel)
    rows, columns = x.shape[1:3]
    y = sum(padded[:, i : i + rows, j : j + columns] * kernel[i, j, 0] for i in range(3) for j in range(3))
    y = gelu(norm(y, block.norm2))
    gate = y.mean((1, 2)) @ at(block.se.fc1.kernel)[0, 0] + at(block.se.fc1.bias)
    gate = gate / (1 + np.exp(-gate)) @ at(block.se.fc2.kernel)[0, 0] + at(block.se.fc2.bias)
    return (y / (1 + np.exp(-gate))[:, None, None]) @ at(block.conv3.kernel) + at(block.conv3.bias)


def test_mbconv_is_its_definition():
    options = MBConvOptions()
    block = MBConv(8, 8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        value = 0.5 * rng.normal(size=variable.get_value().shape)
        # Running variances are positive, and the gate is not saturated.
        variable.set_value(jnp.asarray(0.5 + np.abs(value) if path[-1] == "var" else value, jnp.float32))
    x = rng.normal(size=(2, 4, 6, 8))
    expected = x + reference_branch(block, x, options)
    np.testing.assert_allclose(block(jnp.asarray(x, jnp.float32)), expected, atol=1e-5 * np.abs(expected).max())


def test_running_statistics_keep_ninety_nine_hundredths():
    block, x = MBConv(8, 8, rngs=nnx.Rngs(0)), 3 + jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    block(x, train=True)
    np.testing.assert_allclose(block.pre_norm.mean[...], 0.01 * x.mean((0, 1, 2)), rtol=1e-5)
    assert block.pre_norm.eps == block.norm2.eps == 1e-3


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 2), (2, 2), (7, 1), (1, 1), (1, 2)])
def test_depthwise_convolution_on_a_cpu_is_that_of_xla(size, stride):
    """Of odd maps, without padding and with TensorFlow's; gradients of map and kernel."""
    x, kernel = (
        jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(2, 9, 14, 6), (size, size, 1, 6)])
    )
    for pads in (same_pads(x.shape[1:3], (size, size), (stride, stride)), ((0, 0), (1, 2))):

        def xla(x, kernel, pads=pads):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), pads, dimension_numbers=numbers, feature_group_count=6
            )

        def both(x, kernel, g, pads=pads, xla=xla):
            ours, pullback = jax.vjp(lambda x, kernel: depthwise(x, kernel, (stride, stride), pads), x, kernel)
            theirs, their_pullback = jax.vjp(xla, x, kernel)
            return (ours, *pullback(g)), (theirs, *their_pullback(g))

        g = jax.random.normal(jax.random.key(2), jax.eval_shape(xla, x, kernel).shape)
        for ours, theirs in zip(*jax.jit(both)(x, kernel, g), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))


def test_same_padding_is_behind_and_pools_are_means():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert same_pads((4, 5), (3, 3), (2, 2)) == ((0, 1), (1, 1))
    np.testing.assert_array_equal(pool_half(x, "avg2", "same")[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(pool_half(x[:, :3, :3], "avg2", "same")[0, :, :, 0], [[2.5, 2], [4.25, 2.5]])
    np.testing.assert_array_equal(pool_half(x[:, :3, :3], "avg2", "centred")[0, :, :, 0], [[2.5]])
    np.testing.assert_array_equal(pool_half(x, "avg", "centred")[0, :, :, 0], [[2.5, 4], [8.5, 10]])
    np.testing.assert_array_equal(pool_half(-x, "max", "centred")[0, :, :, 0], [[0, -1], [-4, -5]])


def test_drop_path_is_divided_by_the_number_of_layers():
    model = tiny_models.abstract("maxvit", drop_path=0.5)
    np.testing.assert_allclose(model.drop_rates(), [0, 0.1, 0.2, 0.3, 0.4])


def test_block_attention_comes_first_and_taps_tell_both_apart():
    seen = []

    @models.tap("probs")
    def look(site, value):
        seen.append((site.layer, site.path.split(".")[-2], value.shape))
        return value

    model = tiny_models.abstract("maxvit", scan=False)
    shapes(model, 32, 32, batch=2, tap=look)
    # 8 x 8 and 4 x 4 places, windows of 4 places, heads of 4 channels.
    stages = [(2, 16, 2, 4, 4), (2, 4, 4, 4, 4)]
    assert seen == [(layer, name, stages[layer > 1]) for layer in range(5) for name in ("attn_block", "attn_grid")]
    seen.clear()
    shapes(model, 32, 32, batch=2, tap=dataclasses.replace(look, layers=(1,), at="*.attn_grid.attn"))
    assert seen == [(1, "attn_grid", stages[0])]
    assert model.stages[0].first.attn_block.attn.grid is False
    assert model.stages[0].first.attn_grid.attn.grid is True


def test_rematerialized_first_layers_give_the_same_and_keep_less():
    """Numbers, gradients and statistics; the first layer of a stage holds its largest maps."""
    results, kept = [], []
    for remat in ("none", "full"):
        graph, params, state = models.split(tiny_models.create("maxvit", depths=(1,), widths=(8,), remat=remat))
        row = summarize(models.merge(graph, params, state), (2, 32, 32, 3)).rows["stages.0"]
        kept.append(row.activation_bytes)

        def loss(params, graph=graph, state=state):
            model = models.merge(graph, params, state)
            logits = model(tiny_models.images(32, 32), train=True, key=jax.random.key(0))
            return jnp.sin(logits).sum(), models.split(model)[2]

        results.append(jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)(params))
    assert kept[1] < kept[0] / 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


@pytest.mark.parametrize("attention", ["identity", "dense", "neighborhood"])
def test_both_attentions_are_exchanged_by_name(attention):
    """A mechanism without windows takes any image."""
    model = tiny_models.abstract("maxvit", attention=attention, scan=False)
    first = model.stages[0].first
    kinds = {type(half.attn).__name__.lower() for half in (first.attn_block, first.attn_grid)}
    assert kinds == {f"{attention}attention"}
    assert shapes(model, 30, 44)["logits"].shape == (1, 5)


# --- images and windows -----------------------------------------------------------------------------------------------


def test_windows_follow_from_the_image():
    assert full_size("maxvit_tiny").window == full_size("maxvit_tiny").grid_window == (7, 7)
    assert full_size("maxvit_tiny_512", depths=(1, 1, 1, 1)).window == (16, 16)
    short = {"depths": (1, 1, 1, 1)}
    model = full_size("maxvit_tiny", image_size=(96, 192), grid_window=(1, 2), **short)
    assert (model.window, model.grid_window) == ((3, 6), (1, 2))
    assert model.stages[3].first.attn_block.attn.relative_bias.shape == (16, 5, 11)
    assert model.stages[3].first.attn_grid.attn.relative_bias.shape == (16, 1, 3)


def test_other_images_need_maps_that_the_windows_divide():
    model = tiny_models.abstract("maxvit", window=(2, 3), image_size=(32, 48))
    for sides in ((32, 48), (16, 72), (64, 24)):
        assert shapes(model, *sides)["logits"].shape == (1, 5)
    message = (
        r"stage 1 has a map of \(4, 5\), which windows of \(2, 3\) do not divide; allowed: images of a multiple of "
        r"16 x 24 pixels"
    )
    with pytest.raises(ValueError, match=message):
        shapes(model, 32, 36)
    # Asked for, maps are padded.
    padding = tiny_models.abstract("maxvit", attention_options={"padding": True})
    assert shapes(padding, 36, 30)["logits"].shape == (1, 5)


def test_a_file_for_other_windows_is_resampled_bilinearly():
    weights = models.export_weights(tiny_models.create("maxvit"))
    params, _, notes = models.convert_weights(tiny_models.abstract("maxvit", window=(4, 2)), weights)
    assert notes == ["relative position biases resampled from 3 x 3 to 7 x 3 (bilinear)"]
    table = weights["stages.0.blocks.1.attn_grid.attn.rel_pos.relative_position_bias_table"]
    found = params["stages.0.blocks.0.attn_grid.attn.relative_bias"]
    # Centres of 7 places in 3: (i + 0.5) * 3 / 7 - 0.5, held at the border (tf.image.resize).
    places = np.clip((np.arange(7) + 0.5) * 3 / 7 - 0.5, 0, 2)
    expected = np.stack([[np.interp(places, range(3), column) for column in head.T] for head in table]).swapaxes(1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(resample_relative_bias(table, (7, 3)), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "token"}, "unknown pool 'token'; allowed: avg, max, avgmax"),
        ({"widths": (8,)}, r"widths=\(8,\) and depths=\(2, 3\): one entry for each stage"),
        ({"depths": (2, 0)}, r"depths=\(2, 0\); allowed: several, each an integer of at least 1"),
        ({"head_width": 16}, "width 8 is not divisible by heads of 16 channels"),
        ({"grid_window": 3}, r"windows of \(3, 3\) do not divide a map of \(8, 8\)"),
        ({"window": None, "image_size": 16}, "window=None for images of 16: must be at least 1"),
        ({"convolution": {"expand": 2}}, "unknown option of convolution 'expand'; nearest: expansion"),
        ({"convolution": {"stride_at": "conv"}}, "unknown stride_at of MBConv 'conv'; allowed: depthwise, expand"),
        ({"convolution": {"group_size": 5}}, "group_size=5 of MBConv does not divide its 32 hidden channels"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_models.abstract("maxvit", **options)
    assert "\n" not in str(error.value)


# --- what training needs ----------------------------------------------------------------------------------------------


def test_layer_ids_for_layerwise_decay():
    model = tiny_models.abstract("maxvit", scan=False)
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 6
    assert ids["patch_embed.conv2.kernel"] == 0
    assert ids["stages.0.first.conv.conv1.kernel"] == ids["stages.0.first.attn_grid.mlp.fc2.bias"] == 1
    assert ids["stages.0.blocks.0.attn_block.attn.qkv.kernel"] == 2
    assert ids["stages.1.first.conv.shortcut.kernel"] == 3
    assert ids["stages.1.blocks.1.conv.se.fc1.kernel"] == 5
    assert ids["norm.scale"] == ids["pre_logits.kernel"] == ids["head.bias"] == 6


def test_kernels_decay_and_nothing_else():
    """Officially all but what has bias, scale, gain, gamma or beta in its name: tables of bias have."""
    from training.optim.multipliers import decayed

    params = models.split(tiny_models.abstract("maxvit", scan=False))[1]
    decays = decayed("matrices", params)
    assert {name.rsplit(".", 1)[-1] for name in params if decays[name]} == {"kernel"}


def test_every_layer_says_how_it_is_split():
    model = full_size("maxvit_large", depths=(2, 2, 2, 2))
    rules, shape = sharding.rules(model), AbstractMesh((1, 4, 2), mesh.AXES)
    params = models.split(model)[1]
    specs = {n: mesh.parameter_spec(n, v.shape, rules, shape) for n, v in params.items()}
    block = "stages.2.blocks.[0::1].attn_grid"
    assert specs[f"{block}.attn.relative_bias"] == PartitionSpec(None, "tensor", None, None)
    assert specs[f"{block}.attn.qkv.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert not [n for n, v in params.items() if "fsdp" not in specs[n] and n.endswith("kernel") and v.size > 3000]


def test_initial_kernels_are_normal_with_a_deviation_of_two_hundredths():
    small = {"depths": (1, 1), "widths": (32, 64), "num_classes": 10}
    params = models.split(models.create("maxvit_tiny", rngs=nnx.Rngs(0), **small))[1]
    for name in ("patch_embed.conv2.kernel", "stages.1.first.conv.conv1.kernel", "stages.1.first.conv.conv2.kernel"):
        assert abs(float(params[name].std()) - 0.02) < 0.002, name
    assert abs(float(params["stages.1.first.attn_grid.attn.relative_bias"].std()) - 0.02) < 0.003


# --- names of TensorFlow ----------------------------------------------------------------------------------------------


def checkpoint(model, prefix="maxvit/"):
    """Variables as the official checkpoints have them, averages, slots and counters among them."""
    arrays = models.export_weights(model, layout="tensorflow")
    average = "/ExponentialMovingAverage"
    shadows = {f"{prefix}{name}{average}": value for name, value in arrays.items()}
    variables = {f"{prefix}{name}": value + 1 for name, value in arrays.items()}
    slots = {f"{name}/AdamWeightDecayOptimizer_1": value * 0 for name, value in variables.items()}
    return variables | shadows | slots | {"global_step": np.zeros((), np.int64)}


def test_tensorflow_names_there_and_back(tmp_path):
    model = tiny_models.create("maxvit")
    arrays = models.export_weights(model, layout="tensorflow")
    shapes = {name: value.shape for name, value in arrays.items()}
    assert shapes["stem/conv_0/kernel"] == (3, 3, 3, 8)
    assert shapes["stem/norm_0/moving_variance"] == (8,)
    block = "block_01_02"
    assert shapes[f"{block}/mbconv/expand_conv/kernel"] == (1, 1, 16, 64)
    assert shapes[f"{block}/mbconv/depthwise_conv/depthwise_kernel"] == (3, 3, 64, 1)
    assert shapes[f"{block}/mbconv/se/reduce_conv2d/kernel"] == (1, 1, 64, 4)
    assert shapes[f"{block}/attention_1/q/weight"] == (16, 4, 4)
    assert shapes[f"{block}/attention/k/bias"] == (4, 4)
    assert shapes[f"{block}/attention/o/weight"] == (4, 4, 16)
    assert shapes[f"{block}/attention_1/relative_bias"] == (4, 3, 3)
    assert shapes[f"{block}/ffn_1/expand_dense/weight"] == (16, 64)
    assert shapes["cls_head/inner_dense/weight"] == (16, 12)
    assert "block_01_00/mbconv/shortcut_conv/bias" in shapes
    assert "block_00_00/mbconv/shortcut_conv/bias" not in shapes
    assert "block_01_03/mbconv/pre_norm/gamma" not in shapes

    np.savez(tmp_path / "maxvit.npz", **checkpoint(model))
    params, state, notes = models.convert_weights(tiny_models.abstract("maxvit"), tmp_path / "maxvit.npz")
    number = len(arrays)
    assert notes == [
        "names of google-research/maxvit",
        f"moving averages are taken for {number} of {number} arrays",
        f"{number + 1} entries that are no variables of the model are left out",
    ]
    own = models.unstack({**models.split(model)[1], **models.split(model)[2]})
    assert {**params, **state}.keys() == own.keys()
    for name, value in {**params, **state}.items():
        np.testing.assert_array_equal(value, own[name], err_msg=name)


def test_tensorflow_attention_is_that_of_the_official_einsum():
    """Queries of head h are `x @ weight[:, h]`, and the output is summed over heads and channels."""
    model = tiny_models.create("maxvit", scan=False)
    arrays = models.export_weights(model, layout="tensorflow")
    attention = getattr(model.stages[1].blocks, "1").attn_block.attn
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    parts = attention.qkv.parts(jnp.asarray(x)[None], 3, 4)[0]
    for number, part in enumerate("qkv"):
        there = np.einsum("nc,chd->nhd", x, arrays[f"block_01_02/attention/{part}/weight"])
        there += arrays[f"block_01_02/attention/{part}/bias"]
        np.testing.assert_allclose(parts[:, number], there, atol=1e-5)
    out = np.einsum("nhd,hdc->nc", there, arrays["block_01_02/attention/o/weight"])
    out += arrays["block_01_02/attention/o/bias"]
    np.testing.assert_allclose(attention.proj(jnp.asarray(there.reshape(3, -1))[None])[0], out, atol=1e-5)


def test_a_checkpoint_without_averages_or_prefix_is_read_too():
    model = tiny_models.create("maxvit")
    arrays = models.export_weights(model, layout="tensorflow")
    params, _, notes = models.convert_weights(tiny_models.abstract("maxvit"), {f"{k}:0": v for k, v in arrays.items()})
    assert notes == ["names of google-research/maxvit"]
    np.testing.assert_array_equal(params["head.kernel"], models.split(model)[1]["head.kernel"])
    del arrays["final_layer_norm/beta"]
    with pytest.raises(ValueError, match=r"1 missing: norm.bias \[16\] \(from final_layer_norm/beta\)"):
        models.convert_weights(tiny_models.abstract("maxvit"), arrays)


# --- timm's arguments -------------------------------------------------------------------------------------------------


def options(**config):
    return REFERENCES["maxvit"].options(config)


def tf(conv=(), transformer=(), **model):
    """A MaxxVitCfg of the `tf` path, with changes."""
    conv = {"_type": "MaxxVitConvCfg", "norm_eps": 1e-3, "act_layer": "gelu_tanh", "padding": "same", **dict(conv)}
    transformer = {"_type": "MaxxVitTransformerCfg", "rel_pos_type": "bias_tf", **dict(transformer)}
    transformer = {"head_first": False} | transformer
    cfg = {"_type": "MaxxVitCfg", "block_type": ["M"] * 4, "conv_cfg": conv, "transformer_cfg": transformer}
    return {"cfg": cfg | model}


def test_timm_arguments_have_counterparts():
    found = options(**tf(), img_size=[64, 96], drop_path_rate=0.2, drop_rate=0.1, in_chans=4, global_pool="fastmax")
    assert (found["window"], found["grid_window"], found["image_size"]) == ((2, 3), (2, 3), (64, 96))
    assert (found["drop_path"], found["head_dropout"], found["channels"], found["pool"]) == (0.2, 0.1, 4, "max")
    assert (found["widths"], found["depths"]) == ((96, 192, 384, 768), (2, 3, 5, 2))
    assert (found["stem_widths"], found["stem_bias"], found["pre_logits"]) == (64, False, None)
    assert (found["norm_eps"], found["activation"], found["attention_options"]) == (1e-6, "gelu", None)
    assert MBConvOptions(**found["convolution"]) == MBConvOptions()

    found = options(**tf(transformer={"window_size": 4, "grid_size": [2, 4], "partition_ratio": 16}), img_size=64)
    assert (found["window"], found["grid_window"]) == ((4, 4), (2, 4))
    found = options(**tf(transformer={"grid_size": [2, 4], "partition_ratio": 16}), img_size=64)
    assert (found["window"], found["grid_window"]) == ((4, 4), (4, 4))
    # What stands beside the object goes before, as in timm.
    found = options(**tf(), embed_dim=[8] * 4, conv_padding="", transformer_attn_drop=0.3, head_hidden_size=5)
    assert (found["widths"], found["attention_dropout"], found["pre_logits"]) == ((8,) * 4, 0.3, 5)
    assert found["convolution"]["padding"] == "centred"


def test_without_an_object_the_arguments_are_those_of_the_tf_models():
    model = REFERENCES["maxvit"].build(
        {"embed_dim": [64, 128, 256, 512], "depths": (1, 1, 1, 1), "head_hidden_size": 512}
    )
    theirs = full_size("maxvit_tiny", depths=(1, 1, 1, 1))
    assert count(model) == count(theirs)
    assert (model.convolution, model.window) == (theirs.convolution, theirs.window)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf(block_type=["M", "M", "T", "T"]), "block_type='T' has no counterpart here; allowed: 'M'"),
        (tf(conv={"block_type": "convnext"}), "conv_cfg.block_type='convnext' .*allowed: 'mbconv'"),
        (tf(conv={"attn_layer": "eca"}), "conv_cfg.attn_layer='eca' .*allowed: 'se', ''"),
        (tf(conv={"norm_layer": "groupnorm"}), "conv_cfg.norm_layer='groupnorm' .*allowed: '', 'batchnorm2d'"),
        (tf(conv={"padding": "", "kernel_size": 4}), "conv_cfg.kernel_size=4; allowed: odd"),
        (tf(conv={"kernel": 5}), "unknown field of timm's MaxxVitConvCfg 'kernel'; nearest: kernel_size"),
        (tf(transformer={"head_first": True}), "transformer_cfg.head_first=True .*allowed: False"),
        (tf(transformer={"rel_pos_type": "mlp"}), "transformer_cfg.rel_pos_type='mlp' .*allowed: 'bias_tf', ''"),
        (tf(transformer={"use_nchw_attn": True}), "transformer_cfg.use_nchw_attn=True .*allowed: False"),
        (tf() | {"global_pool": ""}, "global_pool='' has no counterpart here; allowed: 'avg', 'max', 'avgmax'"),
        (tf() | {"window": 7}, "unknown argument of timm's MaxxVit 'window'"),
        (tf() | {"conv_kernel": 5}, "unknown argument of timm's MaxxVit 'conv_kernel'"),
        (tf(weight_init="jax"), "weight_init='jax' .*allowed: '', 'normal'"),
        ({"cfg": {"_type": "ByoModelCfg"}}, "configuration object 'ByoModelCfg' where timm's MaxxVit takes"),
    ],
)
def test_timm_arguments_without_counterpart(config, message):
    with pytest.raises(ValueError, match=message) as error:
        options(**config)
    assert "\n" not in str(error.value)
