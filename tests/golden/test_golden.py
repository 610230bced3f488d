"""Every reference file through its family: outputs, intermediate values, input gradients, and weights there and back.

Files are those of `tests/families`, which are committed, and of `$GOLDEN_DIR` (default: `shared/golden/shared` next to
the repository), which may hold any configuration: a model is built from its file's own `config`.
"""

import fnmatch
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import REFERENCES, reference_of

import models

HERE = Path(__file__).resolve().parent
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", HERE.parents[2] / "shared" / "golden" / "shared"))
COMMITTED = sorted(HERE.parent.glob("families/*/*.npz"))
SHARED = sorted(GOLDEN_DIR.glob("*.npz"))
COVERED = [path for path in SHARED if reference_of(path.stem)]
TOLERANCE = 1e-4
# These run once on tiny inputs: half the time of the test would go into optimizing them.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
by_name = partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "stem", value))


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def load(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    config = json.loads(str(arrays.pop("config")))
    weights = {name[3:]: arrays.pop(name) for name in list(arrays) if name.startswith("sd/")}
    return config, arrays, weights


def built(reference, config, arrays, **overrides):
    """The model of a reference file; images are `[B, C, Y, X]`."""
    own = {"image_size": arrays["x"].shape[2:]} if reference.sized else {}
    return reference.build(config, **own | overrides)


def forward(model):
    """What varies between calls, and the model of it."""
    if model is None:
        return {}, lambda variables: None
    graph, params, state = models.split(model)
    return params, lambda variables: models.merge(graph, variables, state)


def check(path, **overrides):
    reference = reference_of(path.stem)
    config, arrays, weights = load(path)
    model = built(reference, config, arrays, **overrides)
    if model is not None:
        models.load_weights(model, weights)
    variables, merged = forward(model)
    of_inputs = [name for name in arrays if any(fnmatch.fnmatch(name, pattern) for pattern in reference.inputs)]
    inputs = {name: arrays.pop(name) for name in of_inputs}
    gradients = {name: arrays.pop(f"d{name}") for name in inputs if f"d{name}" in arrays}
    stages = config.get("_stage_modules", [])

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate(variables, inputs):
        def values(varied):
            found = reference.evaluate(merged(variables), inputs | varied, config, stages)
            return found.get("y"), found

        y, pullback, found = jax.vjp(values, {name: inputs[name] for name in gradients}, has_aux=True)
        return found, pullback(2 * y)[0] if gradients else {}

    found, found_gradients = evaluate(variables, {name: jnp.asarray(value) for name, value in inputs.items()})
    expected = {stages[int(name[5:])] if name.startswith("stage") else name: value for name, value in arrays.items()}
    assert expected
    for name, value in expected.items():
        assert relative(found[name], value) < TOLERANCE, name
    for name, value in gradients.items():
        assert relative(found_gradients[name], value) < TOLERANCE, f"gradient of {name}"


@pytest.mark.smoke
@by_name("path", COMMITTED)
def test_committed_references(path):
    check(path)


@pytest.mark.golden
@by_name("path", COVERED)
def test_references(path):
    check(path)


@pytest.mark.golden
@by_name("path", [path for path in COVERED if reference_of(path.stem).stacked])
def test_references_unrolled(path):
    check(path, scan=False)


def test_layer_index_reaches_unrolled_blocks():
    check(HERE.parent / "families" / "vit" / "vit_differential.npz", scan=False)


@by_name("path", [path for path in COMMITTED + COVERED if reference_of(path.stem).family])
def test_weights_come_back_bit_for_bit(path):
    config, arrays, weights = load(path)
    reference = reference_of(path.stem)
    model = built(reference, config, arrays)
    models.load_weights(model, weights)
    layout = reference.family.translate(weights, model).layout
    if layout == "torch" and any(dialect.recognize(weights.keys()) for dialect in reference.family.dialects):
        pytest.skip("a dialect: its names are read, and written in those of the family")
    exported = models.export_weights(model, layout=layout)
    # Not every version of a library keeps its buffers.
    kept = {name for name in exported if name in weights or not name.endswith(".relative_position_index")}
    assert kept == weights.keys()
    for name, value in weights.items():
        assert exported[name].dtype == value.dtype, name
        if name.endswith((".num_batches_tracked", ".mask_token")):
            continue  # a counter that only cumulative averages use, what pretraining alone uses: written as zeros
        np.testing.assert_array_equal(exported[name], value, err_msg=name, strict=True)


@pytest.mark.golden
def test_references_are_there():
    if not GOLDEN_DIR.is_dir():
        pytest.skip(f"no reference data: {GOLDEN_DIR} does not exist (set GOLDEN_DIR)")
    assert COVERED, f"no file in {GOLDEN_DIR} belongs to a family"


@pytest.mark.golden
def test_files_without_a_family():
    names = [path.stem for path in SHARED if path not in COVERED]
    if names:
        pytest.skip(f"{len(names)} reference files not covered, no family yet: {', '.join(names)}")


def test_families_know_their_files():
    expected = {
        "vit": "vit",
        "vit_dinov2": "vit",
        "vit1": "vit",
        "deit_distilled": "vit",
        "deit_distilled2": "vit",
        "vitrpb": "nat_isotropic",
        "nat": "nat",
        "dinat_s": "nat",
        "dinat_isotropic1": "nat_isotropic",
        "halonet": "halonet",
        "halonet_paper": "halonet",
        "halo_attn0": "halo_attention",
        "agent_deit": None,
        "probe_siglip": "siglip_pool",
        "probe_siglip1": "siglip_pool",
        "probe_dinovit": None,
        "attn_merge": "attn_merge",
        "na_ops": "na_ops",
    }
    found = {stem: reference_of(stem) for stem in expected}
    assert {stem: family and family.name for stem, family in found.items()} == expected
    # No file is claimed twice: the order in which families are registered does not matter.
    for stem in expected:
        claims = [f.name for f in REFERENCES.values() if any(fnmatch.fnmatchcase(stem, p) for p in f.golden)]
        assert len(claims) <= 1, claims
