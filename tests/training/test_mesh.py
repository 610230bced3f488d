"""Where arrays live on a mesh: rules by layer, rows of processes, the same numbers on eight devices as on one."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import simulated
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

import models
from models.core import sharding
from training.distributed import mesh
from training.run.run import prepare

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(patch_size=8, depth=2, width=32, heads=4, mlp_width=64, image_size=16, num_classes=12)
# One of each kind of layer: fused and separate projections, both MLPs, pooling by attention, several branches.
KINDS = {
    "plain": {},
    "unrolled": {"scan": False, "registers": 2},
    "swiglu_map": {"mlp": "swiglu", "class_token": False, "pool": "map", "qk_norm": True},
    "differential": {"attention": "differential", "layer_scale": 0.1},
    "identity": {"attention": "identity", "pool": "avg", "remat": "full"},
    "neighborhood": {"attention": "neighborhood", "attention_options": {"window": 2}},
    "two_branch": {"block": "two_branch"},
    "parallel": {"block": "parallel", "qkv_bias": False},
}


def build(**options):
    return models.create("vit_mu16", rngs=nnx.Rngs(0), **{**SMALL, **options})


def specs(ways, **options):
    """Where the parameters of a model are stored."""
    model = nnx.eval_shape(lambda: build(**options))
    shape = AbstractMesh(ways, mesh.AXES)
    rules = sharding.rules(model)
    return {n: mesh.parameter_spec(n, v.shape, rules, shape) for n, v in models.split(model)[1].items()}


def test_pairs_of_layers_share_their_work():
    found = specs((1, 2, 2))
    expected = {
        "attn.qkv.kernel": (None, "tensor", "fsdp"),
        "attn.qkv.bias": (None, None),
        "attn.proj.kernel": (None, "tensor", "fsdp"),
        "attn.proj.bias": (None, None),
        "mlp.fc1.kernel": (None, "fsdp", "tensor"),
        "mlp.fc1.bias": (None, "tensor"),
        "mlp.fc2.kernel": (None, "tensor", "fsdp"),
        "norm1.scale": (None, None),
    }
    for name, axes in expected.items():
        assert found[f"blocks.[0::1].{name}"] == PartitionSpec(*axes), name
    assert found["head.kernel"] == PartitionSpec("fsdp", None)
    assert found["patch_embed.kernel"] == PartitionSpec(None, None, None, "fsdp")


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_and_unrolled_layers_are_stored_alike(kind):
    options = {key: value for key, value in KINDS[kind].items() if key != "scan"}
    scanned, unrolled = (specs((1, 2, 2), scan=scan, **options) for scan in (True, False))
    for name, spec in scanned.items():
        inside = PartitionSpec(*spec[1:]) if ".[" in name else spec
        assert {unrolled[layer] for layer in models.core.state.unrolled_names(name, 2)} == {inside}
    split = [name for name, spec in unrolled.items() if "tensor" in spec]
    assert len(split) >= 2 * 3  # of both layers


def test_every_matrix_of_a_published_model_is_split():
    """No device keeps more than its share, but for vectors."""
    model = nnx.eval_shape(lambda: models.create("vit_b16", rngs=nnx.Rngs(0)))
    rules, shape = sharding.rules(model), AbstractMesh((1, 256, 1), mesh.AXES)
    params = models.split(model)[1]
    whole = {n: v.size for n, v in params.items() if "fsdp" not in mesh.parameter_spec(n, v.shape, rules, shape)}
    assert sum(whole.values()) < 0.003 * sum(value.size for value in params.values())
    assert not [name for name in whole if name.endswith("kernel")]


def test_heads_are_not_cut():
    with pytest.raises(ValueError, match=r"config\.mesh\.tensor=3: does not divide the 4 heads"):
        specs((1, 1, 3))


def test_optimizer_and_average_follow_their_parameter():
    config = tiny.config(optim__name="adamw", optim__ema=0.9, mesh__fsdp=1)
    run = prepare(config)
    shape = AbstractMesh((1, 2, 1), mesh.AXES)
    rules = sharding.rules(run.model)
    name = "blocks.[0::1].mlp.fc1.kernel"
    found = [
        value.spec
        for path, value in jax.tree_util.tree_leaves_with_path(mesh.tree_shardings(run.template, rules, shape))
        if any(getattr(key, "key", None) == name for key in path)
    ]
    assert len(found) == 4  # parameter, two moments, average
    assert set(found) == {PartitionSpec(None, None, "fsdp")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, 3, 1), "fsdp=3 x tensor=1 does not divide the 8 devices"),
        ((2, 2, 1), "data=2 x fsdp=2 x tensor=1 is 4, but there are 8 devices"),
        ((1, 8, 1), "config.mesh.data=1: must be a multiple of the 2 slices"),
    ],
)
def test_what_does_not_fit_the_devices_is_one_line(settings, message):
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 4, id=i) for i in range(8)]
    with pytest.raises(ValueError, match=r"config\.mesh") as error:
        mesh.create(SimpleNamespace(**dict(zip(mesh.AXES, settings, strict=True))), devices)
    assert message in str(error.value)


NUMBERS = """
import json, sys
sys.path[:0] = [{root!r} + "/tests/training"]
import re
import jax, jax.numpy as jnp, numpy as np
from types import SimpleNamespace
import models, test_mesh
from models.core import sharding
from training.distributed import mesh

images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
weights = jax.random.normal(jax.random.key(2), (8, 12))
found = {{}}
for kind, options in test_mesh.KINDS.items():
    model = test_mesh.build(**options)
    graph, params, state = models.split(model)

    def loss(params, images, train=True):
        model = models.merge(graph, params, state)
        return (model(images, train=train, key=jax.random.key(3)) * weights).mean()

    one = jax.jit(jax.value_and_grad(loss))(params, images)
    grid = mesh.create(SimpleNamespace(data=2, fsdp=2, tensor=2))
    shardings = mesh.tree_shardings(params, sharding.rules(model), grid)
    placed, batch = mesh.place(params, shardings), mesh.place(images, mesh.batch_sharding(grid))
    compiled = {{}}
    for name, function in {{"free": loss, "constrained": mesh.under(grid, loss)}}.items():
        if name == "constrained" or kind == "plain":
            eight = jax.jit(jax.value_and_grad(function), out_shardings=(mesh.replicated(grid), shardings))
            compiled[name] = eight.lower(placed, batch).compile()
    eight = compiled["constrained"](placed, batch)
    difference = max(
        float(jnp.abs(a - b).max() / (jnp.abs(a).max() + 1e-3)) for a, b in zip(*map(jax.tree.leaves, (one, eight)))
    )
    found[kind] = {{"difference": difference, "sizes": [v.size // (2 if ".[" in n else 1) for n, v in params.items()]}}
    for name, program in compiled.items():
        shapes = re.findall(r"= f32\\[([0-9,]+)\\]\\S* all-gather\\(", program.as_text())
        found[kind][name] = [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_eight_devices_compute_what_one_does():
    """For each kind of layer, loss and gradients; and what is gathered has the size of parameters, not of activations.

    Without the constraints of the layers the compiler gathers activations, which shows that the test would see it.
    """
    for kind, result in simulated.run(8, NUMBERS.format(root=str(ROOT))).items():
        assert result["difference"] < 1e-5, kind
        parameters = {size // part for size in result["sizes"] for part in (1, 2)}  # whole, or one half over `tensor`
        assert set(result["constrained"]) <= parameters, kind
        if kind == "plain":
            assert not set(result["free"]) <= parameters
