"""NAT, DiNAT, DiNAT_s and the isotropic models: published sizes, stages, twins, image sizes, weights, a run."""

import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from shapes import full_size

import models
from configs.recipes import NAT_DROP_PATH
from models.core import sharding
from models.core.published import PUBLISHED
from models.core.summary import summarize
from models.families.nat import variants
from models.families.nat.model import dilation_cycles
from training.distributed import mesh
from training.run import loop

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
VARIANTS = [*variants._hierarchies(), *variants._isotropic()]
# Three layers with dilations 1, 2, 1 on 8 x 8 places, two with 1, 1 on 4 x 4, which the window fits once.
SMALL = dict(width=8, depths=(3, 2), heads=(1, 2), window=3, dilations="largest", image_size=32, num_classes=5)
SMALL_ISOTROPIC = dict(patch_size=4, width=16, depth=3, heads=2, window=3, image_size=24, num_classes=5)
REFERENCE = {"implementation": "reference"}


def build(name="dinat_mini", **options):
    own = SMALL_ISOTROPIC if name.endswith(("iso_s", "vitrpb_s")) else SMALL
    own = {option: value for option, value in own.items() if option != "window"} if name == "vitrpb_s" else own
    return models.create(name, rngs=nnx.Rngs(0), **{**own, **options})


def abstract(*arguments, **options):
    return nnx.eval_shape(lambda: build(*arguments, **options))


def perturbed(*arguments, **options):
    """Random parameters, the same for a scanned model and its twin, without compiling any initializer."""
    model = abstract(*arguments, **options)
    graph, params, state = models.split(model)
    rng = np.random.default_rng(0)
    flat = {}
    for name, value in sorted(models.unstack({n: np.zeros(v.shape, np.float32) for n, v in params.items()}).items()):
        std = np.prod(value.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.3
        flat[name] = (std * rng.normal(size=value.shape) + name.endswith("scale")).astype(np.float32)
    return models.merge(graph, {n: jnp.asarray(v) for n, v in models.stack(flat, like=params).items()}, state)


def call(model, images, method="__call__", **options):
    graph, params, state = models.split(model)
    return jax.jit(lambda params, images: getattr(models.merge(graph, params, state), method)(images, **options))(
        params, images
    )


def images(*sides, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, *(sides or (32, 32)), 3))


# --- published sizes --------------------------------------------------------------------------------------------------


def table():
    """Rows of docs/families/nat.md: name -> (parameters, multiply-adds in G, top-1)."""
    text = (ROOT / "docs" / "families" / "nat.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return {name: (int(parameters.replace(" ", "")), giga, top1) for name, parameters, giga, top1 in rows}


def test_what_is_documented_is_what_is_published():
    """The parameters are counted in tests/models/test_contract_variants.py."""
    documented = table()
    assert set(documented) == set(VARIANTS)
    for name, (_, *published) in documented.items():
        assert published == [PUBLISHED[name].multiply_adds, PUBLISHED[name].top1], name


@pytest.mark.golden
def test_documented_parameters_are_those_of_the_official_models():
    path = GOLDEN_DIR.parent / "params.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} does not exist (set GOLDEN_DIR)")
    counts = {k.removeprefix("nat_repo/"): v for k, v in json.loads(path.read_text()).items() if "nat_repo/" in k}
    ours = table()
    for name, expected in counts.items():
        name = re.sub("isotropic_(.)[a-z]+", r"iso_\1", re.sub("vitrpb_(.)[a-z]+", r"vitrpb_\1", name))
        name = re.sub("(_384_11x11|_21k_11x11)", "_11x11_384", name).removesuffix("_21k")
        assert ours.pop(name, (expected,))[0] == expected, name
    assert not ours


def test_multiply_adds_of_a_block():
    """By its formula; the totals of all variants are held to the published ones in `test_contract_variants.py`."""
    summary = summarize(full_size("nat_mini"), (1, 224, 224, 3))
    assert [row for row in summary.rows if "blocks" not in row] == [
        "patch_embed", "stages.1", "stages.2", "stages.3", "norm", "head",
    ]  # fmt: skip
    places, width, keys = 28 * 28, 128, 49
    block = 4 * places * width**2 + 2 * places * keys * width + 2 * places * width * 3 * width
    assert summary.rows["stages.1.blocks.2"].multiply_adds == block


def test_every_variant_has_a_recipe_or_is_fine_tuned():
    assert {name for name in VARIANTS if "large" not in name} == set(NAT_DROP_PATH)


@pytest.mark.parametrize(
    ("arguments", "cycles"),
    [
        ((None, (3, 2), 7, 224), [(1,), (1,)]),
        (("largest", (3, 4, 18, 5), 7, 224), [(1, 8), (1, 4), (1, 2), (1,)]),
        (("largest", (3, 4, 18, 5), 7, 384), [(1, 13), (1, 6), (1, 3), (1,)]),
        (("largest", (3, 4, 18, 5), 11, 384), [(1, 8), (1, 4), (1, 2), (1,)]),
        (("largest", (2, 1), 7, (224, 30)), [(1,), (1,)]),
        (([[1, 5, 1], [1, 2, 3, 2]], (3, 4), 3, 64), [(1, 5), (1, 2, 3, 2)]),
    ],
)
def test_dilations_by_stage(arguments, cycles):
    assert dilation_cycles(*arguments) == cycles


# --- computation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scanned_equals_unrolled_and_gradients_reach_every_parameter():
    """Of gradients, too; with drop path, whose numbers are those of a layer whether it is scanned or not."""
    options = {"layer_scale": 0.5, "drop_path": 0.3, "attention_options": REFERENCE}
    results = []
    for scan in (True, False):
        graph, params, state = models.split(perturbed("dinat_s_tiny", scan=scan, **options))

        def loss(params, graph=graph, state=state):
            logits = models.merge(graph, params, state)(images(batch=8), train=True, key=jax.random.key(4))
            return jnp.sum(jnp.sin(logits)), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        results.append({"logits": logits} | models.unstack(gradients))
    scanned, unrolled = results
    assert scanned.keys() == unrolled.keys()
    for path, value in unrolled.items():
        largest = float(np.abs(value).max())
        assert largest > 0, path
        np.testing.assert_allclose(scanned[path], value, atol=1e-5 * max(1, largest), err_msg=path)


def test_remat_changes_no_number():
    options = {"attention_options": REFERENCE, "depths": (2, 1)}
    gradients = []
    for remat in ("none", "attention"):
        graph, params, state = models.split(perturbed(remat=remat, **options))
        loss = lambda params, graph=graph, state=state: models.merge(graph, params, state)(images()).sum()  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *gradients)


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "sides"), [("dinat_mini", (45, 30)), ("dinat_s_tiny", (38, 50))])
def test_pyramid_of_images_of_any_size(name, sides):
    """Maps smaller than window times dilation among them."""
    model = perturbed(name, attention_options=REFERENCE)
    found = call(model, images(*sides), "features", layers=(1, -1))
    rows, columns = (-(-side // 4) for side in sides)
    smaller = (-(-rows // 2), -(-columns // 2))
    assert found["embedded"].shape == found["stages.0"].shape == (2, rows, columns, 8)
    assert found["stages.1"].shape == found["stages.1.embedded"].shape == (2, *smaller, 16)
    assert found["stages.0.blocks.1"].shape == (2, rows * columns, 8)
    assert [name for name in found if re.search(r"blocks\.\d+$", name)] == ["stages.0.blocks.1", "stages.1.blocks.1"]
    np.testing.assert_array_equal(found["stages.1.blocks.1"].reshape(found["stages.1"].shape), found["stages.1"])
    assert found["tokens"].shape == (2, smaller[0] * smaller[1], 16)
    np.testing.assert_allclose(found["tokens"].mean(1), found["pooled"], atol=1e-6)
    np.testing.assert_allclose(call(model, images(*sides)), found["logits"], atol=1e-5)


def test_taps_are_told_the_layer_in_the_model():
    seen = []

    @models.tap("probs")
    def look(site, value):
        seen.append(site.layer)
        return value

    jax.eval_shape(lambda: build(scan=False)(images(batch=1), tap=look))
    assert seen == [0, 1, 2, 3, 4]


def test_bfloat16_is_close_to_float32():
    outputs = [call(perturbed(dtype=dtype, attention_options=REFERENCE), images()) for dtype in (None, jnp.bfloat16)]
    assert all(output.dtype == jnp.float32 for output in outputs)
    scale = float(np.abs(outputs[0]).max())
    assert 0 < np.abs(outputs[0] - outputs[1]).max() < 0.05 * scale


def test_the_implementation_that_is_chosen_gives_the_numbers_of_the_reference():
    outputs = [call(perturbed(attention_options=options), images()) for options in (None, REFERENCE)]
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "patch"}, "unknown stem 'patch'; nearest: patches"),
        ({"heads": (2,)}, r"depths=\(3, 2\) and heads=\(2,\): one entry for each stage"),
        ({"dilations": "large"}, "dilations='large'; allowed: None, 'largest'"),
        ({"dilations": [[1]]}, r"dilations=\(\(1,\),\); allowed: .* of each of the 2 stages"),
        ({"depth": 3}, "unknown option of model 'dinat_mini' 'depth'; nearest: depths"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        abstract(**options)
    assert "\n" not in str(error.value)


# --- what training needs ----------------------------------------------------------------------------------------------


def test_layer_ids_for_layerwise_decay():
    model = abstract(scan=False)
    ids = {name: model.layer_id(name) for name in models.split(model)[1]}
    assert model.num_layers == 6
    assert ids["patch_embed.conv1.kernel"] == ids["patch_embed.norm.scale"] == 0
    assert ids["stages.0.blocks.0.norm1.scale"] == 1
    assert ids["stages.0.blocks.2.attn.relative_bias"] == 3
    assert ids["stages.1.downsample.conv.kernel"] == ids["stages.1.blocks.0.mlp.fc1.kernel"] == 4
    assert ids["stages.1.blocks.1.mlp.fc2.bias"] == 5
    assert ids["norm.scale"] == ids["head.kernel"] == 6


def test_biases_by_position_do_not_decay():
    from training.optim.multipliers import decayed

    params = models.split(abstract(scan=False))[1]
    decays = decayed("matrices", params)
    assert {name.rsplit(".", 1)[-1] for name in params if decays[name]} == {"kernel"}


def test_every_layer_says_how_it_is_split():
    model = full_size("dinat_base")
    rules, shape = sharding.rules(model), AbstractMesh((1, 4, 2), mesh.AXES)
    params = models.split(model)[1]
    specs = {n: mesh.parameter_spec(n, v.shape, rules, shape) for n, v in params.items()}
    prefix = "stages.2.blocks.[1::2]"
    assert specs[f"{prefix}.attn.relative_bias"] == PartitionSpec(None, "tensor", None, None)
    assert specs[f"{prefix}.attn.qkv.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{prefix}.mlp.fc1.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["stages.1.downsample.conv.kernel"] == PartitionSpec(None, None, None, "fsdp")
    whole = [n for n, v in params.items() if "fsdp" not in specs[n] and n.endswith("kernel")]
    assert not whole


def test_other_windows_and_classes_are_adapted_and_said():
    weights = models.export_weights(perturbed())
    wider = abstract(window=5, num_classes=7)
    with pytest.raises(ValueError, match="head has 5 classes in the file and 7 here"):
        models.convert_weights(wider, weights)
    params, _, notes = models.convert_weights(abstract(window=5), weights)
    assert notes == ["relative position biases resampled from 5 x 5 to 9 x 9 (bicubic)"]
    assert params["stages.0.blocks.1.attn.relative_bias"].shape == (1, 9, 9)
    assert weights["levels.0.blocks.1.attn.rpb"].shape == (1, 5, 5)
    weights_of_rpb = models.export_weights(perturbed("vitrpb_s"))
    _, _, notes = models.convert_weights(abstract("vitrpb_s", image_size=32), weights_of_rpb)
    assert notes == ["relative position biases resampled from 11 x 11 to 15 x 15 (bicubic)"]
    with pytest.raises(ValueError, match="of another shape"):
        models.convert_weights(abstract(heads=(2, 4)), weights)


@pytest.mark.slow
def test_a_run_learns(tmp_path):
    """Through the loop, with drop path, the average and a checkpoint."""
    config = tiny.config(
        model__name="dinat_mini",
        model__options={key: value for key, value in SMALL.items() if key not in ("image_size", "num_classes")},
        model__drop_path=0.1,
        optim__ema=0.9,
        train__steps=8,
        optim__learning_rate=3e-3,
    )
    result = loop.train(config, tmp_path, terminal=tiny.quiet())
    losses = [row["loss"] for row in tiny.rows(tmp_path)]
    assert result["step"] == 8
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
