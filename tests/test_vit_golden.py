"""The ViT family against numbers from timm, through weight conversion.

The files in `tests/golden` are committed. `$GOLDEN_DIR` (default: `shared/golden/shared` next to the repository) may
hold more in the same format; every model is built from its file's own `config`.
"""

import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.vit import VisionTransformer
from models.vit_weights import from_timm_config, from_torch

pytestmark = pytest.mark.smoke

HERE = Path(__file__).resolve().parent
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", HERE.parent.parent / "shared" / "golden" / "shared"))
COMMITTED = sorted((HERE / "golden").glob("vit_*.npz"))
SHARED = sorted(
    path
    for pattern in ("vit*.npz", "deit_distilled*.npz")
    for path in GOLDEN_DIR.glob(pattern)
    if not path.name.startswith("vitrpb")
)
TOLERANCE = 1e-4
# These run once on tiny inputs: half the time of the test would go into optimizing them.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def load(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    config = json.loads(str(arrays.pop("config")))
    return config, arrays, {name[3:]: value for name, value in arrays.items() if name.startswith("sd/")}


def stage(module, model, outputs, images):
    """Our value of what timm calls `module`."""
    if module == "patch_embed":
        return model.patch_embed(images)
    return outputs[{"norm": "tokens", "attn_pool": "pooled", "fc_norm": "pooled", "head": "logits"}.get(module, module)]


def check(path, scan):
    config, arrays, state_dict = load(path)
    # Abstract: every parameter comes from the file.
    model = nnx.eval_shape(lambda: VisionTransformer(**from_timm_config(config), scan=scan, rngs=nnx.Rngs(0)))
    graph, _, state = models.split(model)
    params = from_torch(model, state_dict)
    modules = config.get("_stage_modules", ())
    layers = [int(module.split(".")[1]) for module in modules if module.startswith("blocks.")]

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate(params, images):
        def logits_and_stages(images):
            model = models.merge(graph, params, state)
            outputs = model.features(images, layers=layers)
            y = outputs["mean_logits" if "mean_logits" in outputs else "logits"]
            return y, [stage(module, model, outputs, images) for module in modules]

        y, pullback, stages = jax.vjp(logits_and_stages, images, has_aux=True)
        return y, pullback(2 * y)[0], stages

    y, dx, stages = evaluate(params, jnp.asarray(arrays["x"]).transpose(0, 2, 3, 1))
    assert relative(y, arrays["y"]) < TOLERANCE
    assert relative(dx.transpose(0, 3, 1, 2), arrays["dx"]) < TOLERANCE
    for index, (module, value) in enumerate(zip(modules, stages, strict=True)):
        assert relative(value, arrays[f"stage{index}"]) < TOLERANCE, module


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_equals_timm(path):
    check(path, scan=True)


@pytest.mark.golden
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_equals_shared_reference(path, scan):
    check(path, scan)


@pytest.mark.golden
def test_shared_references_are_there():
    if not GOLDEN_DIR.is_dir():
        pytest.skip(f"no reference data: {GOLDEN_DIR} does not exist (set GOLDEN_DIR)")
    assert len(SHARED) >= 5


def test_layer_index_reaches_unrolled_blocks():
    check(HERE / "golden" / "vit_differential.npz", scan=False)


def test_every_mismatch_is_reported_at_once():
    config, _, state_dict = load(HERE / "golden" / "vit_two_branch.npz")
    model = nnx.eval_shape(lambda: VisionTransformer(**from_timm_config(config), rngs=nnx.Rngs(0)))
    state_dict["blocks.1.ffns.0.mlp.fc1.weight"] = state_dict["blocks.1.ffns.0.mlp.fc1.weight"][:-1]
    del state_dict["head.bias"]
    state_dict["relative_table"] = np.zeros(3)
    with pytest.raises(ValueError, match="3 entries") as error:
        from_torch(model, state_dict)
    for name in ("blocks.1.mlp1.fc1.kernel", "head.bias", "relative_table"):
        assert name in str(error.value)


def test_unknown_timm_arguments_are_refused():
    with pytest.raises(ValueError, match="pool_include_prefix"):
        from_timm_config({"pool_include_prefix": True})
    with pytest.raises(ValueError, match="ResPostBlock"):
        from_timm_config({"block_fn": "ResPost"})
