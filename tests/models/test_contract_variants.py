"""What every registered variant has to keep, as shapes: parameters, multiply-adds, layers, and how it is split.

The tiny models of `test_contract.py` are executed; nothing here is.
"""

import functools
import json
import math
import os
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from shapes import count, full_size

import models
from benchmarks import timm_models, zoo
from models.core import sharding
from models.core.published import PUBLISHED, tolerance
from models.core.registry import _lookup, image_size
from models.core.summary import summarize
from models.weights.family import family_of
from training.distributed import mesh

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
NAMES = models.names()
PAGE = zoo.rows_of(zoo.PAGE.read_text())
variants = pytest.mark.parametrize("name", NAMES)


# --- sizes ------------------------------------------------------------------------------------------------------------


@functools.cache
def official():
    """Parameters by the name in params.json."""
    path = GOLDEN_DIR.parent / "params.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def official_name(name):
    """The key of params.json that is this variant with 1000 classes; None if there is none."""
    theirs = timm_models.timm_name(name)
    ours = re.sub("_iso_s", "_isotropic_small", re.sub("_iso_b", "_isotropic_base", name))
    ours = re.sub("vitrpb_s", "vitrpb_small", re.sub("vitrpb_b", "vitrpb_base", ours))
    ours = re.sub("11x11_384", "384_11x11", ours)
    keys = [f"timm/{theirs}", f"timm/{theirs}(num_classes=1000)"]
    keys += [f"{project}/{ours}" for project in sorted({key.partition("/")[0] for key in official()})]
    return next((key for key in keys if key in official()), None)


@functools.cache
def documented():
    """Parameters by variant, as the tables of docs/families have them."""
    rows = re.compile(r"^\| `(\w+)` \|.*?\| (\d{1,3}(?: \d{3})+) \|", re.MULTILINE)
    pages = (page.read_text() for page in sorted((ROOT / "docs" / "families").glob("*.md")))
    return {name: int(figure.replace(" ", "")) for page in pages for name, figure in rows.findall(page)}


def test_families_document_their_variants():
    assert documented().keys() <= set(NAMES)
    kinds = {_lookup(name)[0].__name__ for name in set(NAMES) - documented().keys()}
    assert kinds <= {"VisionTransformer"}, "all but these have a table of their variants"


@variants
def test_parameters(name):
    """Those of the official model and of the family's page; 2% or half a unit of the last digit of what is printed."""
    found = count(full_size(name))
    assert found == documented().get(name, found)
    printed = PUBLISHED[name].parameters if name in PUBLISHED else None
    if printed:
        assert abs(found / 1e6 - float(printed)) <= tolerance(printed)
    if not official():
        pytest.skip(f"no reference data: {GOLDEN_DIR.parent}/params.json does not exist (set GOLDEN_DIR)")
    if key := official_name(name):
        # The positions of some are for another size of images than here.
        size = re.search(r"_(\d{3})(\(|$)", key)
        options = {"image_size": int(size[1])} if size and int(size[1]) != image_size(name) else {}
        assert count(full_size(name, **options)) == official()[key], key


def test_the_official_counts_are_found():
    """Each name in params.json that belongs to a family of ours, that is for 1000 classes, has its variant."""
    if not official():
        pytest.skip(f"no reference data: {GOLDEN_DIR.parent}/params.json does not exist (set GOLDEN_DIR)")
    ours = {official_name(name) for name in NAMES}
    families = r"(timm/(deit_|deit3_\w+_224|maxvit|davit|volo|swin|\w*halo)|biformer/|nat_repo/(?!.*21k))"
    theirs = {key for key in official() if re.match(families, key) and not re.search(r"num_classes=(?!1000)", key)}
    assert len(theirs) > 60
    assert theirs - ours == set()


# --- multiply-adds ----------------------------------------------------------------------------------------------------


@variants
def test_multiply_adds(name):
    """Within 2% or half a unit of the last digit of what is printed, and as docs/models.md has them; all of them belong
    to a part of the model.
    """
    side, published = image_size(name), PUBLISHED.get(name)
    summary = summarize(full_size(name), (1, side, side, 3), activations=False)
    stray = summary.rows.get("(other)")
    assert stray is None or stray.multiply_adds == 0
    assert summary.total.parameters == count(full_size(name))
    if published and published.multiply_adds:
        assert published.image_size == side
        printed = published.multiply_adds
        counted = summary.total.multiply_adds / 1e9 + published.besides
        assert abs(counted - float(printed)) <= tolerance(printed)
    expected = zoo.figures(summary.total)
    assert {column: PAGE.get(name, {}).get(column) for column in expected} == expected, "run python -m benchmarks.zoo"


def test_figures_are_published_of_models_that_are_there():
    assert PUBLISHED.keys() <= set(NAMES)
    assert all(one.source for one in PUBLISHED.values())
    silent = {family_of(full_size(name)).name for name in NAMES} - {
        family_of(full_size(name)).name for name, one in PUBLISHED.items() if one.top1
    }
    assert not silent, "families of which nothing is published"


# --- how it is split, and its layers ----------------------------------------------------------------------------------


@variants
def test_every_parameter_says_how_it_is_split(name):
    """On 4 x 2 devices: axes that are divided evenly, every kernel over fsdp, and little that is whole everywhere."""
    model = full_size(name)
    rules, params = sharding.rules(model), models.split(model)[1]
    assert rules.keys() <= params.keys()
    assert any(key.endswith("kernel") for key in rules), "no pair of layers shares its work over tensor"
    # Heads are not cut: with an odd number of them a model is split over fsdp alone.
    grid = AbstractMesh((1, 4, 1 if any(split.units % 2 for split in rules.values()) else 2), mesh.AXES)
    specs = {key: mesh.parameter_spec(key, value.shape, rules, grid) for key, value in params.items()}
    whole = {}
    for key, value in params.items():
        axes = list(zip(value.shape, specs[key], strict=True))
        for size, axis in axes:
            assert axis is None or size % grid.shape[axis] == 0, key
        # A leading axis of scanned layers is not one of the matrix.
        free = [size for size, axis in axes[".[" in key :] if axis != "tensor"]
        matrix = sum(size > 1 for size in value.shape[".[" in key :]) > 1
        if key.endswith("kernel") and matrix and any(size > 1 and size % 4 == 0 for size in free):
            assert "fsdp" in specs[key], key
        if "fsdp" not in specs[key]:
            whole[key] = math.prod(value.shape)
    share = sum(whole.values()) / count(full_size(name))
    assert share < 0.03 or name.startswith("vit_mu"), sorted(whole, key=whole.get)[-3:]


@variants
def test_every_parameter_has_a_layer(name):
    """For layer-wise decay: from the embedding, 0, to what follows the blocks, and none is left out."""
    model = full_size(name)
    params = models.split(model)[1]
    unrolled = [one for key, value in params.items() for one in models.unrolled_names(key, *value.shape[:1])]
    layers = {model.layer_id(key) for key in unrolled}
    assert layers == set(range(model.num_layers + 1))


def test_dtype_of_the_computation_is_no_dtype_of_parameters():
    for name in ("vit_ti16", "nat_mini"):
        _, params, _ = models.split(full_size(name, dtype=jnp.bfloat16))
        assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
