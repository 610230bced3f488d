"""Models by name, flat dictionaries and back, and the options of the Vision Transformer."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from shapes import count, full_size

import models
from attn import Grid
from models.core.remat import REMAT
from models.families.vit.variants import SIZES as SIZES_OF_VIT
from models.hosts.isotropic import VitOptions
from models.layers.activation import gelu
from models.layers.drop import drop_path
from models.layers.norm import LayerNorm, RMSNorm

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK_COMPILE)


def tiny(**overrides):
    """A ViT small enough to compile in a second: 2 layers, width 32, 4 x 4 patches of 8 pixels."""
    options = {"depth": 2, "patch_size": 8, "image_size": 32, "num_classes": 5, "rngs": nnx.Rngs(0)} | overrides
    return models.create("vit_mu16", **options)


def random_parameters(model):
    """By unrolled name, nothing left at zero or one; the model may be abstract."""
    rng = np.random.default_rng(0)
    params = {}
    for name, value in models.split(model)[1].items():
        std = value.shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        params[name] = std * rng.normal(size=value.shape).astype(np.float32) + name.endswith("scale")
    return models.unstack(params)


def perturbed(**overrides):
    """A tiny ViT with random parameters, without compiling any initializer."""
    model = nnx.eval_shape(partial(tiny, **overrides))
    graph, params, state = models.split(model)
    params = {name: jnp.asarray(value) for name, value in models.stack(random_parameters(model), like=params).items()}
    return models.merge(graph, params, state)


def call(model, images, method="__call__", **options):
    graph, params, state = models.split(model)
    return jit(lambda params, images: getattr(models.merge(graph, params, state), method)(images, **options))(
        params, images
    )


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


# --- names and sizes --------------------------------------------------------------------------------------------------

PUBLISHED = {
    ("vit_ti16", ()): 5_717_416,
    ("vit_s16", ()): 22_050_664,
    ("vit_b16", ()): 86_567_656,
    ("vit_b32", ()): 88_224_232,
    ("vit_l16", ()): 304_326_632,
    ("vit_g14", ()): 1_012_611_432,
    ("vit_G14", ()): 1_844_440_680,
    ("deit_s16_distilled", ()): 22_436_432,
    ("deit3_b16", (("image_size", 384),)): 86_877_160,
    ("dinov2_s14_reg4", (("num_classes", 0),)): 22_057_344,
    ("dinov2_g14", (("num_classes", 0),)): 1_136_479_232,
    ("vit_b16_siglip", (("num_classes", 0),)): 92_884_224,
    ("vit_h14_clip", ()): 632_047_080,
    ("vit_wee16_reg1", ()): 13_422_568,
    ("vit_little16_reg4", ()): 22_516_008,
}


@pytest.mark.parametrize(("name", "overrides"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else "")
def test_published_parameter_counts(name, overrides):
    assert count(full_size(name, **dict(overrides))) == PUBLISHED[name, overrides]


SIZES = {
    "tiny": "ti",
    "small": "s",
    "medium": "m",
    "base": "b",
    "large": "l",
    "huge": "h",
    "giant": "g",
    "giantopt": "gopt",
    "gigantic": "G",
    "so400m": "so400m",
}


def ours(reference):
    """(name, overrides) for a timm name such as `vit_base_patch16_siglip_gap_224(num_classes=0)`."""
    match = re.fullmatch(
        r"(vit|deit|deit3)_(\w+?)(_distilled)?_patch(\d+)(_reg4)?(_dinov2|_siglip_gap|_siglip)?(?:_(\d+))?"
        r"(?:\(num_classes=(\d+)\))?",
        reference,
    )
    family, size, distilled, patch, registers, kind, image_size, classes = match.groups()
    overrides = {"num_classes": int(classes or 1000)}
    if image_size:
        # timm floors 384 / 14; here the image has to be divisible.
        overrides["image_size"] = int(image_size) // int(patch) * int(patch)
    if kind == "_siglip_gap":
        overrides |= {"pool": "avg", "fc_norm": False}
    name = f"dinov2_{SIZES[size]}{patch}" if kind == "_dinov2" else f"{family}_{SIZES[size]}{patch}"
    suffix = "_siglip" if kind and "siglip" in kind else ""
    return name + suffix + (distilled or "") + (registers or ""), overrides


@pytest.mark.golden
def test_every_published_variant_has_its_count():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    counts = {
        name.removeprefix("timm/"): expected
        for name, expected in json.loads(path.read_text()).items()
        if re.match("timm/(vit|deit)", name)
    }
    assert len(counts) > 90
    wrong = {}
    for reference, expected in counts.items():
        name, overrides = ours(reference)
        if (found := count(full_size(name, **overrides))) != expected:
            wrong[reference] = (name, overrides, found, expected)
    assert not wrong


def test_names_match_a_pattern():
    assert "vit_s16" in models.names("vit_s*")
    assert models.names("vit_s1?") == ["vit_s14", "vit_s16"]
    assert models.names("resnet*") == []


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_s61", {}, "unknown model 'vit_s61'; nearest: vit_s16"),
        ("vit_s16", {"drop_pth": 0.1}, "unknown option of model 'vit_s16' 'drop_pth'; nearest: drop_path"),
        ("vit_s16", {"attention": "dens"}, "unknown attention 'dens'; nearest: dense"),
        ("vit_s16", {"attention_options": {"windw": 7}}, "unknown option of attention 'dense' 'windw'"),
        ("vit_s16", {"block": "prenorm"}, "unknown block 'prenorm'; nearest: pre_norm"),
        ("vit_s16", {"pool": "mean"}, "unknown pool 'mean'.*allowed: token, avg, max, avgmax, map"),
        ("vit_s16", {"init": "timn"}, "unknown init 'timn'; nearest: timm"),
        ("vit_s16", {"class_token": False}, "pool='token' needs class_token=True"),
        ("vit_s16", {"heads": 5}, "width 384 is not divisible by 5 heads"),
        ("vit_s16", {"image_size": 225}, "image of 225 x 225 is not divisible by the patch of 16 x 16"),
        ("vit_s16", {"position": "sincos2d", "width": 30, "heads": 5}, "multiple of 4"),
        ("deit_s16_distilled", {"pool": "avg"}, "distillation_token=True needs pool='token'"),
    ],
)
def test_a_wrong_choice_is_one_line(name, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **overrides))
    assert "\n" not in str(error.value)


# --- split and merge --------------------------------------------------------------------------------------------------


def test_split_and_merge_inside_and_outside_of_transformations(images):
    model = tiny()
    graph, params, state = models.split(model)
    assert graph == models.split(tiny())[0]
    assert hash(graph) == hash(models.split(tiny(scan=True))[0])
    assert graph != models.split(tiny(depth=3))[0]
    assert state == {}

    traces = []

    @partial(jit, static_argnums=0)
    def apply(graph, params, images):
        traces.append(images.shape)
        return models.merge(graph, params, state)(images)

    logits = apply(graph, params, images)
    apply(models.split(tiny())[0], params, images + 1)
    assert len(traces) == 1
    np.testing.assert_allclose(models.merge(graph, *models.split(model)[1:])(images), logits, atol=1e-5)

    two = jax.tree.map(lambda value: jnp.stack([value, 2 * value]), params)
    both = jit(jax.vmap(lambda params: models.merge(graph, params, state)(images)))(two)
    np.testing.assert_allclose(both[0], logits, atol=1e-5)
    assert not np.allclose(both[1], logits)

    abstract = nnx.eval_shape(tiny)
    shapes = models.split(abstract)[1]
    assert {name: value.shape for name, value in params.items()} == {name: v.shape for name, v in shapes.items()}
    again = models.split(models.merge(*models.split(abstract)))[1]
    assert all(isinstance(value, jax.ShapeDtypeStruct) for value in again.values())


def test_merge_names_what_does_not_fit():
    graph, params, state = models.split(nnx.eval_shape(tiny))
    params["head.kernal"] = params.pop("head.kernel")
    with pytest.raises(KeyError, match=r"1 missing, first head\.kernel; nearest: head\.kernal"):
        models.merge(graph, params, state)


# --- the Vision Transformer -------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "registers": {"registers": 2, "prefix_positions": False, "layer_scale": 0.1},
    "distilled": {"distillation_token": True, "registers": 1},
    "simple": {"class_token": False, "position": "sincos2d", "pool": "avg", "fc_norm": False, "pre_logits": 16},
    "map": {"class_token": False, "pool": "map", "activation": "gelu_tanh", "init": "big_vision"},
    "clip": {"pre_norm": True, "qk_norm": True, "qkv_bias": False, "norm_eps": 1e-5, "pool": "avg"},
    "swiglu": {"mlp": "swiglu", "mlp_width": 48, "position": "none"},
    "post_norm": {"block": "post_norm"},
    "parallel": {"block": "parallel"},
    "two_branch": {"block": "two_branch", "attention": "differential"},
    "identity": {"attention": "identity", "class_token": False, "pool": "avg"},
}
UNROLLED = ("plain", "distilled", "post_norm", "two_branch")


@pytest.mark.parametrize("case", OPTIONS)
def test_gradient_reaches_every_parameter_in_both_twins(case, images):
    """Training mode with dropout of all kinds; loss and gradient of every leaf, scanned and for some unrolled."""
    options = OPTIONS[case]
    noise = {"drop_path": 0.3, "dropout": 0.1, "attention_dropout": 0.1}
    if options.get("attention") == "identity":
        noise.pop("attention_dropout")
    results = []
    params = random_parameters(nnx.eval_shape(partial(tiny, **options, **noise)))
    for scan in (True, False) if case in UNROLLED else (True,):
        graph, like, state = models.split(nnx.eval_shape(partial(tiny, **options, **noise, scan=scan)))

        def loss(params, graph=graph, state=state):
            # A key that drops no branch for both images.
            out = models.merge(graph, params, state)(images, train=True, key=jax.random.key(8))
            return sum(jnp.sum(jnp.sin(value)) for value in jax.tree.leaves(out))

        value, gradients = jit(jax.value_and_grad(loss))(models.stack(params, like=like))
        results.append((value, models.unstack(gradients)))
    (value, gradients), (twin_value, twin_gradients) = results[0], results[-1]
    np.testing.assert_allclose(value, twin_value, rtol=1e-5)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient, twin_gradients[name], atol=2e-5 * scale, rtol=1e-4, err_msg=name)


def test_training_needs_a_key_and_evaluation_draws_nothing(images):
    model = perturbed(drop_path=0.5, dropout=0.2)
    with pytest.raises(ValueError, match="dropout needs a key in training"):
        model(images, train=True)
    np.testing.assert_array_equal(call(model, images), call(model, images, key=jax.random.key(0)))
    training = [call(model, images, train=True, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(training[0], training[1])
    assert not np.allclose(training[0], training[2])


def test_drop_path_drops_whole_examples():
    x = jnp.ones((4000, 2, 3))
    y = drop_path(x, 0.25, train=True, key=jax.random.key(0))
    per_example = np.asarray(y).reshape(4000, -1)
    np.testing.assert_allclose(np.unique(per_example), [0, 4 / 3], rtol=1e-6)
    assert np.all(per_example == per_example[:, :1])
    assert abs(per_example.mean() - 1) < 0.05
    np.testing.assert_array_equal(drop_path(x, 0.25, train=False, key=None), x)


def test_bfloat16_computes_near_float32_with_float32_parameters(images):
    half, full = (perturbed(dtype=dtype, layer_scale=0.5) for dtype in (jnp.bfloat16, None))
    assert all(value.dtype == jnp.float32 for value in models.split(half)[1].values())
    outputs = [call(model, images, "features", layers=(1,)) for model in (half, full)]
    assert outputs[0]["blocks.1"].dtype == jnp.bfloat16
    assert outputs[0]["logits"].dtype == jnp.float32
    for name in outputs[0]:
        scale = np.abs(outputs[1][name]).max()
        error = np.abs(outputs[0][name].astype(jnp.float32) - outputs[1][name]).max() / scale
        assert 1e-5 < error < 0.03, (name, error)


def test_other_image_sizes_at_call_time(images):
    model = perturbed()
    wide = jnp.concatenate([images, images], axis=2)
    assert call(model, wide).shape == (2, 5)
    assert call(model, wide, "features")["tokens"].shape == (2, 1 + 4 * 8, 32)
    with pytest.raises(ValueError, match="image of 30 x 32 is not divisible by the patch of 8 x 8"):
        model(images[:, :30])
    with pytest.raises(ValueError, match="image of 1 channels for a model of 3"):
        model(images[..., :1])
    tall = nnx.eval_shape(partial(tiny, image_size=(48, 16)))
    assert tall.grid == Grid((6, 2), prefix=1)
    assert models.split(tall)[1]["pos_embed"].shape == (1, 13, 32)


def test_positions_matter_unless_there_are_none(images):
    """Average pooling without positions does not see the order of the patches; with any kind of position it does."""
    shuffled = images.reshape(2, 2, 16, 32, 3)[:, ::-1].reshape(images.shape)
    shared = {"class_token": False, "pool": "avg"}
    for position, sees in (("none", False), ("learned", True), ("sincos2d", True)):
        model = perturbed(position=position, **shared)
        same = np.allclose(call(model, images), call(model, shuffled), atol=1e-4)
        assert same is not sees, position


def test_pooling_and_order_of_norm_and_mean(images):
    model = perturbed(pool="avg", registers=2, fc_norm=False)
    out = call(model, images, "features")
    np.testing.assert_allclose(out["pooled"], out["tokens"][:, 3:].mean(1), atol=1e-5)
    model = perturbed(pool="avg", registers=2)
    out = call(model, images, "features")
    np.testing.assert_allclose(out["pooled"], model.fc_norm(out["tokens"][:, 3:].mean(1)), atol=1e-4)
    out = call(perturbed(num_classes=0), images, "features")
    np.testing.assert_array_equal(out["pooled"], out["tokens"][:, 0])
    assert "logits" not in out


def test_distilled_model_averages_its_heads_and_trains_both(images):
    model = perturbed(distillation_token=True)
    out = call(model, images, train=True)
    assert out.keys() == {"logits", "distillation_logits"}
    np.testing.assert_allclose(call(model, images), (out["logits"] + out["distillation_logits"]) / 2, atol=1e-5)
    assert not np.allclose(out["logits"], out["distillation_logits"])


def test_features_and_taps(images):
    """Recorded and edited inside of a `jit` that is not the model's own."""
    model = perturbed()
    graph, params, state = models.split(model)

    @jit
    def looked(params, images):
        tap = models.record("probs", "q", layers=0)
        return models.merge(graph, params, state).features(images, layers=(0,), tap=tap), tap.values

    out, recorded = looked(params, images)
    assert out.keys() == {"embedded", "blocks.0", "tokens", "pooled", "logits"}
    assert set(recorded) == {"blocks.attn.q", "blocks.attn.probs"}
    assert recorded["q"].shape == (1, 2, 17, 2, 16)
    assert recorded["probs"].shape == (1, 2, 2, 17, 17)
    np.testing.assert_allclose(recorded["probs"].sum(-1), 1, atol=1e-5)

    @models.tap("heads")
    def blind(site, value):
        return jnp.zeros_like(value)

    edited = call(model, images, "features", tap=blind, layers=(0,))
    assert not np.allclose(edited["logits"], out["logits"])
    np.testing.assert_allclose(call(model, images), out["logits"], atol=1e-5)


# --- attention by name ------------------------------------------------------------------------------------------------


def test_identity_mixes_no_tokens_and_dense_does(images):
    changed = images.at[:, :8, :8].add(1.0)
    for name, mixes in (("identity", False), ("dense", True)):
        model = perturbed(attention=name)
        tokens, moved = (call(model, batch, "features")["tokens"] for batch in (images, changed))
        assert not np.allclose(tokens[:, 1], moved[:, 1], atol=1e-3)
        assert np.allclose(tokens[:, 2:], moved[:, 2:], atol=1e-5) is not mixes


# --- parts ------------------------------------------------------------------------------------------------------------


def test_gelu_is_exact_with_exact_derivative():
    x = np.linspace(-9, 9, 4001).astype(np.float32)
    wide = x.astype(np.float64)
    cdf = 0.5 * (1 + scipy.special.erf(wide / np.sqrt(2)))
    np.testing.assert_allclose(gelu(x), wide * cdf, atol=1e-6)
    slope = cdf + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x)), slope, atol=1e-6)
    assert gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_norm_statistics_are_float32_under_bfloat16():
    x = (5 + jax.random.normal(jax.random.key(0), (4, 384))).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = {
        LayerNorm: centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6),
        RMSNorm: wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6),
    }
    for norm, reference in expected.items():
        y = norm(384, dtype=jnp.bfloat16)(x)
        assert y.dtype == jnp.bfloat16
        # Nothing but the rounding of the result, half a unit in the eighth bit.
        np.testing.assert_allclose(y.astype(jnp.float32), reference, rtol=2**-8, atol=1e-5)


def test_initialization_schemes():
    timm = models.split(models.create("vit_ti16", depth=2, rngs=nnx.Rngs(0), layer_scale=1e-4))[1]
    kernel = timm["blocks.[0::1].attn.qkv.kernel"]
    assert abs(float(kernel.std()) - 0.02) < 1e-3
    assert not np.allclose(kernel[0], kernel[1])
    assert float(jnp.abs(timm["cls_token"]).max()) < 1e-5
    assert abs(float(jnp.abs(timm["patch_embed.kernel"]).max()) - 768**-0.5) < 1e-3
    np.testing.assert_allclose(timm["blocks.[0::1].ls1.gamma"], 1e-4)
    big_vision = models.split(
        models.create("vit_ti16", depth=2, rngs=nnx.Rngs(0), init="big_vision", head_bias=-6.9, pre_logits=192)
    )[1]
    limit = (6 / (2 * 192)) ** 0.5
    assert 0.99 * limit < float(jnp.abs(big_vision["blocks.[0::1].attn.qkv.kernel"]).max()) <= limit
    assert not big_vision["head.kernel"].any()
    np.testing.assert_allclose(big_vision["head.bias"], -6.9)
    assert abs(float(big_vision["pos_embed"].std()) * 192**0.5 - 1) < 0.05


def test_layer_ids_for_layerwise_decay():
    model = nnx.eval_shape(lambda: tiny(depth=3, pre_norm=True, scan=False))
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 4
    assert ids["cls_token"] == ids["pos_embed"] == ids["patch_embed.kernel"] == ids["norm_pre.scale"] == 0
    assert ids["blocks.0.norm1.scale"] == 1
    assert ids["blocks.2.mlp.fc2.bias"] == 3
    assert ids["norm.scale"] == ids["head.bias"] == 4


def test_documented_tables_are_those_of_the_code():
    def documented(text):
        rows = [re.findall(r"`([^`]*)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
        return {name for row in rows for name in row}

    assert documented((ROOT / "docs" / "model_interface.md").read_text()) == set(REMAT)
    text = (ROOT / "docs" / "families" / "vit.md").read_text()
    assert documented(text) == {field.name for field in dataclasses.fields(VitOptions)} | set(SIZES_OF_VIT)
    for size, o in SIZES_OF_VIT.items():
        assert f"| `{size}` | {o['width']} | {o['depth']} | {o['heads']} | {o['mlp_width']} |" in text


class Theirs(nnx.Module):
    """A model of somebody who has this project installed."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 4

    def __init__(self, options, *, rngs):
        self.map = nnx.Linear(3, options.width, rngs=rngs)


def test_a_model_of_the_users_is_made_by_module_and_class():
    name = f"{__name__}:Theirs"
    assert models.create(name, rngs=nnx.Rngs(0), width=6).map.kernel.shape == (3, 6)
    with pytest.raises(ValueError, match=r"unknown option of model .*:Theirs' 'widht'; nearest: width"):
        models.create(name, rngs=nnx.Rngs(0), widht=6)
    with pytest.raises(ValueError, match="has no Options"):
        models.create(f"{__name__}:pytest", rngs=nnx.Rngs(0))
