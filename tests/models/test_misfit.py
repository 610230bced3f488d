"""What is said of weights that do not fit: one short line with what the file looks like, and everything on demand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from official import big_vision_names, build, official, scanned
from torch_writer import saved

import models
from models.core.state import split, unstack
from models.weights.family import family_of
from models.weights.recognize import abstract
from models.weights.report import LIMIT, Misfit


def refused(model, source, which=None):
    with pytest.raises(Misfit) as error:
        models.convert_weights(model, source, which)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) <= LIMIT, line
    assert line.startswith("the weights do not fit the model: ")
    return error.value


def zeros(variant):
    """A file of a variant in its official names, without numbers."""
    model = abstract(variant)
    _, params, state = split(model)
    flat = unstack({name: np.zeros(value.shape, value.dtype) for name, value in {**params, **state}.items()})
    return family_of(model).layouts["torch"](model).write(flat)


FAMILIES = list(tiny_models.TINY)


@pytest.mark.parametrize(("mine", "theirs"), zip(FAMILIES, FAMILIES[1:] + FAMILIES[:1], strict=True))
def test_a_file_of_another_family_is_recognized(mine, theirs):
    """Each is recognized once, and refused once."""
    arrays = models.export_weights(tiny_models.create(theirs))
    line = str(refused(tiny_models.abstract(mine), arrays))
    # A classifier named `head` makes Microsoft's names of any.
    looks = rf"it looks like {theirs} \((its own names|names of [^)]*), {len(arrays)} of {len(arrays)}\), not {mine}; "
    assert re.search(looks, line), line
    assert line.endswith("; models.compare_weights lists all")


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ("vit_ti16", "vit_s16", "it has the shapes of vit_s16 or deit_s16"),
        ("vit_ti16", "vit_ti8", "it has the shapes of vit_ti8"),
        ("swin_tiny", "swin_small", "it has the shapes of swin_small"),
        ("nat_mini", "dinat_s_tiny", "it has the shapes of dinat_s_tiny"),
        (
            "dinat_s_tiny",
            "swin_tiny",
            r"it looks like swin \(its own names, 173 of 173; the shapes of swin_tiny\), not nat",
        ),
        ("vit_ti16", "vitrpb_s", r"it looks like nat_isotropic \(.*; the shapes of vitrpb_s\), not vit"),
    ],
)
def test_the_variant_is_named(mine, theirs, said):
    error = refused(abstract(mine), zeros(theirs))
    assert re.search(said, str(error)) or len(error.report) < LIMIT
    text = models.compare_weights(abstract(mine), zeros(theirs))
    assert re.match(said, text), text[:300]


def test_names_of_a_dialect_are_said():
    flax = scanned(big_vision_names(official(num_classes=1000)))
    line = str(refused(tiny_models.abstract("swin"), flax))
    assert "it looks like vit (names of big_vision, 56 of 56), not swin; 76 missing; " in line


def test_names_that_nobody_knows_are_counted(tmp_path):
    """As a ResNet's, and with as many different names as there are arrays."""
    leaves = ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    resnet = {f"layer{a}.{b}.{leaf}": np.zeros(4, np.float32) for a in range(1, 5) for b in range(6) for leaf in leaves}
    line = str(refused(tiny_models.create("vit"), resnet))
    assert "no family here knows most of its names; 42 missing: " in line
    assert "; 120 left over: layer1.{0-5}.conv1.weight, layer1.{0-5}.bn1.weight ...; models.compare_weights" in line
    long = {f"{'x' * 300}{number}.{'y' * 300}": np.zeros(4, np.float32) for number in range(200)}
    assert "200 left over" in str(refused(tiny_models.create("vit"), long))
    with pytest.raises(Misfit, match=rf"^{tmp_path}/a\.pth: the weights do not fit the model: no family here") as error:
        models.convert_weights(tiny_models.create("vit"), saved(tmp_path / "a.pth", resnet))
    assert len(str(error.value)) <= LIMIT + len(f"{tmp_path}/a.pth: ")


def test_a_backbone_beside_something_else_is_recognized():
    """As in DINO's checkpoints, whose projection head is no part of a model here."""
    timm = official(num_classes=0)
    dino = {f"backbone.{name}": value for name, value in timm.items()} | {"head.mlp.0.weight": np.zeros((4, 4))}
    model = build(num_classes=0)
    line = str(refused(model, {"teacher": dino}))
    assert "names below backbone look like vit (its own names, 42 of 42): give these; 42 missing: " in line
    inside = {name.removeprefix("backbone."): value for name, value in dino.items() if name.startswith("backbone.")}
    assert models.convert_weights(model, inside)[2] == []


def test_everything_is_in_the_report(tmp_path):
    model, arrays = build(), models.export_weights(tiny_models.create("swin"))
    error = refused(model, arrays)
    assert len("; ".join(error.report.splitlines())) > 2 * LIMIT
    assert "    blocks.{0-2}.attn.qkv.kernel [16, 48] (from blocks.{0-2}.attn.qkv.weight)" in error.report.splitlines()
    for name in arrays:
        unnumbered = re.sub(r"\d+", "#", name)
        assert unnumbered in re.sub(r"\{[\d,-]+\}|\d+", "#", error.report), name
    path = saved(tmp_path / "a.pth", {"model": arrays, "model_ema": arrays})
    assert models.compare_weights(model, path, "ema") == error.report
    assert models.compare_weights(build(num_classes=0), official()) == "fits\nhead with 5 classes is left out"
    short = official()
    del short["head.bias"]
    assert models.compare_weights(build(), short) == "1 missing:\n    head.bias [5] (from head.bias)"


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_what_is_no_number_is_refused(tmp_path, value, dtype):
    timm = {name: array.astype(dtype) for name, array in official().items()}
    timm["blocks.1.attn.qkv.weight"][3, 2] = value
    np.savez(tmp_path / "a.npz", **timm)
    with pytest.raises(ValueError, match=r"a\.npz: blocks\.1\.attn\.qkv\.weight holds NaN or infinity$"):
        models.convert_weights(build(), tmp_path / "a.npz")
    timm["norm.bias"][0] = value
    model = tiny_models.create("vit")
    before = {name: np.asarray(array) for name, array in split(model)[1].items()}
    with pytest.raises(ValueError, match=r"^blocks\.1\.attn\.qkv\.weight holds NaN or infinity \(2 arrays do\)$"):
        models.load_weights(model, timm)
    jax.tree.map(np.testing.assert_array_equal, {name: np.asarray(a) for name, a in split(model)[1].items()}, before)
    assert models.compare_weights(model, timm) == ("blocks.1.attn.qkv.weight holds NaN or infinity (2 arrays do)")


def test_numbers_beyond_the_models_type_are_refused():
    timm = {name: array.astype(np.float64) for name, array in official().items()}
    timm["norm.weight"][0] = 1e300
    with pytest.raises(ValueError, match=r"^norm\.weight holds numbers that float32 cannot hold$"):
        models.convert_weights(build(), timm)


def test_names_are_those_of_the_file():
    flax = big_vision_names(official(class_token=False, global_pool="map"))
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
    flax[name] = np.full_like(flax[name], np.nan)
    with pytest.raises(ValueError, match=rf"query/kernel \+ {name} \+ .*value/kernel holds NaN or infinity$"):
        models.convert_weights(build(class_token=False, global_pool="map"), flax)


def test_what_the_model_does_not_take_may_be_anything():
    """A classifier that starts anew, what a dialect leaves out, and counts of batches, which are integers."""
    timm = official()
    timm["head.weight"] = np.full_like(timm["head.weight"], np.nan)
    model = models.reset_classifier(tiny_models.create("vit"), 3, rngs=nnx.Rngs(0))
    assert models.load_weights(model, timm) == ["head starts anew: 5 classes there, 3 here"]
    models.convert_weights(build(), official() | {"mask_token": np.full((1, 16), np.nan)})
    swin = models.export_weights(tiny_models.create("swin"))
    swin["layers.0.blocks.1.attn_mask"] = np.full((4, 16, 16), -np.inf, np.float32)
    models.convert_weights(tiny_models.abstract("swin"), swin)
    biformer = models.export_weights(tiny_models.create("biformer"))
    count = [name for name in biformer if name.endswith("num_batches_tracked")]
    models.convert_weights(tiny_models.abstract("biformer"), biformer | dict.fromkeys(count, np.asarray(2**40)))
    biformer["downsample_layers.0.1.running_var"] = np.full(4, np.inf, np.float32)
    with pytest.raises(ValueError, match=r"^downsample_layers\.0\.1\.running_var holds NaN or infinity$"):
        models.convert_weights(tiny_models.abstract("biformer"), biformer)
