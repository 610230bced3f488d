"""What every model has to keep, whatever its family: the tiny models of `tiny_models.py`, executed.

Programs are shared: one evaluation and one pair of train steps per family serve most of the checks here. What is
checked of every registered variant, as shapes, is in `test_contract_variants.py`; timm itself in `test_timm.py`.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import tiny
import tiny_models
from compiling import for_tpus, needs_compiler
from flax import nnx
from references import reference_of

import models
from models.hosts.hierarchy import Hierarchy
from models.weights.family import family_of

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden" / "shared"))
CLASSES = 5
NOISE = {"drop_path": 0.3, "dropout": 0.1}
families = pytest.mark.parametrize("family", tiny_models.TINY)


def close(a, b, tolerance, message=""):
    """Equal relative to the largest number of the array, and absolutely where all are small."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max())), err_msg=message)


def side(family):
    return tiny_models.TINY[family][1]["image_size"]


def layers(found):
    """Names of the layers among features."""
    return [name for name in found if re.search(r"(blocks\.\d+|\.first)$", name)]


class Evaluation:
    """One jitted function: logits, features, what a tap records in the first and the last layer, and the pooled
    features of the model without its classifier.
    """

    def __init__(self, family, **options):
        self.model = tiny_models.create(family, **options)
        self.graph, self.params, self.state = models.split(self.model)
        headless, bare, bare_state = models.split(models.reset_classifier(self.model, 0, rngs=nnx.Rngs(0)))
        self.traced = []
        chosen = (0, self.model.depth - 1)

        @jax.jit
        def run(params, state, images):
            self.traced.append(images.shape)
            model = models.merge(self.graph, params, state)
            before = models.split(model)[2]
            tap = models.record("heads", layers=chosen)
            found = {"called": model(images), **model.features(images, layers=chosen, tap=tap)}
            after = models.split(model)[2]
            assert all(after[name] is before[name] for name in before), "an evaluation changes the state of the model"
            without = models.merge(headless, {n: params[n] for n in bare}, {n: state[n] for n in bare_state})
            return {**found, "headless": without(images)}, tap.values

        self.run = functools.partial(run, self.params, self.state)
        self.images = tiny_models.images(side(family), side(family))
        self.found, self.recorded = self.run(self.images)


evaluation = functools.cache(Evaluation)


@functools.cache
def training(family, scan=True):
    """`(key) -> (logits, gradients, new state)` by unrolled names, of eight images and with noise of all kinds.

    Of an unrolled model no gradients: those of each mechanism are compared in `test_mechanisms.py`, and those of a
    family take most of the time to compile.
    """
    model = tiny_models.create(family, scan=scan, **noise(family))
    graph, params, state = models.split(model)
    images = tiny_models.images(side(family), side(family), batch=8)

    def loss(params, key):
        model = models.merge(graph, params, state)
        answer = model(images, train=True, key=key)
        total = sum(jnp.sin(value).sum() for value in jax.tree.leaves(answer))
        return total, (answer, models.split(model)[2])

    step = jax.jit(jax.grad(loss, has_aux=True) if scan else lambda params, key: ({}, loss(params, key)[1]))

    @functools.cache
    def run(seed):
        gradients, (answer, after) = step(params, jax.random.key(seed))
        return answer, models.unstack(gradients), models.unstack(after), models.unstack(state)

    return run


def noise(family):
    """Those of `NOISE` that the family has."""
    build = models.core.registry._lookup(tiny_models.TINY[family][0])[0]
    known = {field.name for field in dataclasses.fields(build.Options)}
    return {option: rate for option, rate in NOISE.items() if option in known}


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@families
def test_logits_and_features(family):
    """Shapes and types, names of layers and of their sites, and that all of them belong to one computation."""
    ran = evaluation(family)
    found = ran.found
    assert found["logits"].shape == (2, CLASSES)
    assert found["logits"].dtype == found["called"].dtype == jnp.float32
    assert all(np.isfinite(value).all() for value in found.values())
    if "mean_logits" not in found:
        close(found["called"], found["logits"], 1e-5)
    close(found["headless"], found["pooled"], 1e-5)
    assert found["tokens"].ndim == 3
    assert found["pooled"].ndim == 2
    chosen = layers(found)
    assert len(chosen) == 2, f"of the first and the last layer there are {chosen}"
    assert all(found[name].ndim == 3 for name in chosen)
    assert list(ran.recorded), "no site of these layers was recorded"
    paths = {re.sub(r"\.\d+$", "", name) for name in chosen}
    for full, numbers in ran.recorded.layers.items():
        assert set(numbers) <= {0, ran.model.depth - 1}, full
        assert any(full.startswith(f"{path}.") for path in paths), full
        assert ran.recorded[full].shape[:2] == (len(numbers), 2)
    # Not all images give the same, so they are looked at.
    assert not np.allclose(found["logits"][0], found["logits"][1], atol=1e-4)


@families
def test_pyramid(family):
    """Maps of the stages for a detector, each as large as the one before or half of it; the last one is that which is
    classified.
    """
    ran = evaluation(family)
    if not isinstance(ran.model, Hierarchy):
        pytest.skip("one map only")
    maps = [ran.found[f"stages.{number}"] for number in range(len(ran.model.stages))]
    assert f"stages.{len(maps)}" not in ran.found
    for number, value in enumerate(maps):
        assert value.ndim == 4
        if ran.model.stages[number].first is None:
            assert ran.found[f"stages.{number}.embedded"].shape == value.shape
        if number:
            before, after = (np.asarray(one.shape[1:3]) for one in maps[number - 1 : number + 1])
            assert ((after == before) | (2 * after == before + before % 2) | (2 * after == before - before % 2)).all()
    assert maps[-1].shape[1] < maps[0].shape[1]
    assert maps[0].shape[1] <= side(family) // 4
    inside = [name for name in layers(ran.found) if name.startswith(f"stages.{len(maps) - 1}.")]
    # Class attention comes behind the stages, where a model has it.
    assert inside or any(name.startswith("class_blocks.") for name in layers(ran.found))
    for name in inside:
        close(ran.found[name].reshape(maps[-1].shape), maps[-1], 1e-6)  # computed twice where a compiler prefers that


@families
def test_evaluation_repeats_and_is_compiled_once_for_a_shape(family):
    """Twice the same numbers from one trace."""
    ran = evaluation(family)
    again, recorded = ran.run(ran.images)
    jax.tree.map(np.testing.assert_array_equal, recorded, ran.recorded)
    for name, value in ran.found.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    ran.run(ran.images + 1)
    assert [shape[1:3] for shape in ran.traced] == [(side(family),) * 2]


@families
def test_a_wide_image_has_wide_maps(family):
    """Of an image twice as wide each map of a stage is."""
    ran = evaluation(family)
    graph, params, state = models.split(ran.model)
    wide = tiny_models.images(side(family), 2 * side(family))
    found = jax.eval_shape(lambda p, s, x: models.merge(graph, p, s).features(x), params, state, wide)
    assert found["logits"].shape == (2, CLASSES)
    for name in (name for name in found if re.fullmatch(r"stages\.\d+", name)):
        rows, columns = found[name].shape[1:3]
        assert columns == 2 * rows, name
        assert rows == ran.found[name].shape[1]


@families
def test_any_other_image_size_works_or_is_refused_in_one_line(family):
    first = side(family)
    abstract = tiny_models.abstract(family)
    graph, params, state = models.split(abstract)
    worked = 0
    larger, odd = [(2, 2), (2, 1), (3, 1)], [(first + 1, first), (first - 3, 45), (7, 9)]
    for sides in [(rows * first, columns * first) for rows, columns in larger] + odd:
        images = jax.ShapeDtypeStruct((2, *sides, 3), jnp.float32)
        refused = ""
        try:
            logits = jax.eval_shape(lambda p, s, x: models.merge(graph, p, s)(x), params, state, images)
        except ValueError as error:
            refused = str(error)
        # One line, with the sizes that it is about.
        assert re.fullmatch(r".*\d.*", refused) if refused else logits.shape == (2, CLASSES), (sides, refused)
        worked += not refused
    assert worked >= 3, "images twice and three times as large are legal everywhere"


@families
def test_evaluation_draws_nothing(family):
    """Neither with a key nor without, for a model with every kind of noise."""
    graph, params, state = models.split(tiny_models.abstract(family, **noise(family)))
    images = jax.ShapeDtypeStruct((2, side(family), side(family), 3), jnp.float32)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)

    def drawn(train):
        jaxpr = jax.make_jaxpr(lambda p, s, x, k: models.merge(graph, p, s)(x, train=train, key=k))
        return len(re.findall(r"random_bits|threefry2x32", str(jaxpr(params, state, images, key))))

    assert drawn(train=False) == 0
    assert drawn(train=True) > 0


@families
def test_bfloat16_is_close_to_float32(family):
    """Relative to the largest logit; parameters and logits stay float32."""
    ran = evaluation(family)
    graph, like, _ = models.split(tiny_models.abstract(family, dtype=jnp.bfloat16))
    assert all(value.dtype == jnp.float32 for value in like.values())
    run = jax.jit(lambda p, s, x: models.merge(graph, p, s).features(x))
    found = run(ran.params, ran.state, ran.images)
    assert found["logits"].dtype == jnp.float32
    assert found["tokens"].dtype == found["embedded"].dtype == jnp.bfloat16, "nothing is computed in bfloat16"
    scale = float(np.abs(ran.found["logits"]).max())
    error = float(np.abs(found["logits"] - ran.found["logits"]).max())
    assert 1e-5 * scale < error < 0.05 * scale


# --- training ---------------------------------------------------------------------------------------------------------


@families
def test_gradient_reaches_every_parameter(family):
    _, gradients, _, _ = training(family)(0)
    unused = [name for name, value in gradients.items() if not np.abs(value).max() > 0]
    assert not unused
    assert all(np.isfinite(value).all() for value in gradients.values())


@families
def test_a_key_repeats_and_another_one_differs(family):
    run = training(family)
    logits, again, other = (jax.tree.leaves(run.__wrapped__(seed)[0])[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(logits, again)
    assert not np.allclose(logits, other, atol=1e-4)


@families
def test_each_kind_of_noise_asks_for_a_key(family):
    kinds = noise(family)
    assert "drop_path" in kinds
    images = jax.ShapeDtypeStruct((2, side(family), side(family), 3), jnp.float32)
    for kind, rate in kinds.items():
        graph, params, state = models.split(tiny_models.abstract(family, **{kind: rate}))
        with pytest.raises(ValueError, match=r"needs a key in training: call the model with key=\.\.\.") as error:
            jax.eval_shape(lambda p, s, x, g=graph: models.merge(g, p, s)(x, train=True), params, state, images)
        assert "\n" not in str(error.value)


@families
def test_training_moves_the_statistics(family):
    """All of them, and training and evaluation differ where a model has any."""
    _, _, after, before = training(family)(0)
    assert after.keys() == before.keys()
    still = [name for name, value in before.items() if np.array_equal(value, after[name])]
    assert not still


@families
def test_scanned_equals_unrolled(family):
    """Logits and statistics, with the noise of each layer; and the evaluation."""
    scanned, unrolled = (training(family, scan)(0) for scan in (True, False))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), scanned[0], unrolled[0])
    assert scanned[2].keys() == unrolled[2].keys()
    for name, value in unrolled[2].items():
        close(scanned[2][name], value, 2e-5, name)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("family", ["halonet", "volo"])
def test_batch_statistics_are_those_of_the_global_batch(family):
    """Loss and statistics of a train step on eight devices, an example on each, are those of one: in blocks and in a
    stem. All families have the one layer that takes them.
    """
    differences = simulated.run(8, ROOT / "tests" / "contract_mesh_job.py", family)
    assert differences["devices"] == 8
    assert differences["loss"] < 1e-5
    assert differences["statistics"] < 1e-5


# --- the classifier and the weights -----------------------------------------------------------------------------------


@families
def test_the_classifier_is_reset(family):
    model = evaluation(family).model
    _, params, state = models.split(model)
    larger = models.reset_classifier(model, 7, rngs=nnx.Rngs(3))
    _, found, found_state = models.split(larger)
    new = [name for name in found if found[name] is not params.get(name)]
    assert new
    assert all(7 in found[name].shape and name in params for name in new), new
    assert found.keys() == params.keys()
    assert all(found_state[name] is value for name, value in state.items())
    images = jax.ShapeDtypeStruct((2, side(family), side(family), 3), jnp.float32)
    assert jax.eval_shape(larger, images).shape == (2, 7)

    again = models.split(models.reset_classifier(model, CLASSES, rngs=nnx.Rngs(4)))
    assert again[0] == models.split(model)[0]
    kernels = [name for name in new if name.endswith("kernel")]
    assert kernels
    assert all(not np.allclose(again[1][name], params[name]) for name in kernels)

    bare = models.split(models.reset_classifier(model, 0, rngs=nnx.Rngs(0)))[1]
    assert bare.keys() == params.keys() - {*new}


def official_names(family):
    """Patterns of the official names in the reference files of a family, numbers left out."""
    files = [*(ROOT / "tests" / "families").glob("*/*.npz"), *GOLDEN_DIR.glob("*.npz")]
    names = set()
    for path in files:
        if (found := reference_of(path.stem)) is not None and found.name == family.name:
            with np.load(path) as archive:
                names |= {re.sub(r"\d+", "#", name[3:]) for name in archive.files if name.startswith("sd/")}
    return names


@families
def test_weights_come_back_from_a_file(family, tmp_path):
    """Bit for bit, into a scanned model and an unrolled one, by names that the official implementation has."""
    ran = evaluation(family)
    written = models.export_weights(ran.model, tmp_path / "w.safetensors")
    if known := official_names(family_of(ran.model)):
        unknown = {name for name in written if re.sub(r"\d+", "#", name) not in known}
        assert not unknown, f"no reference file has {sorted(unknown)}"
    own = models.unstack({**ran.params, **ran.state})
    for scan in (True, False):
        params, state, notes = models.convert_weights(
            tiny_models.abstract(family, scan=scan), tmp_path / "w.safetensors"
        )
        assert notes == []
        assert {**params, **state}.keys() == own.keys()
        for name, value in {**params, **state}.items():
            np.testing.assert_array_equal(value, own[name], err_msg=name)
    other = models.reset_classifier(ran.model, 3, rngs=nnx.Rngs(0))
    assert any("starts anew: 5 classes there, 3 here" in note for note in models.load_weights(other, written))


# --- a TPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.plan
@needs_compiler
@pytest.mark.parametrize(
    ("family", "more"),
    [("nat", {}), ("swin", {}), ("volo", {"downsamples": (False,), "position_stage": 0}), ("biformer", {})],
)
def test_a_train_step_is_planned_for_a_tpu(family, more):
    """The whole step of the loop, in bfloat16 on four chips that share the parameters; of each kernel one family. That
    every family lowers for TPUs is in `test_calls.py`.
    """
    from training.plans import chips, plan

    name, options = tiny_models.TINY[family]
    own = {key: value for key, value in options.items() if key not in ("image_size", "attention_options")}
    # The first stage alone: kernels take longest to compile.
    own = {key: value[:1] if isinstance(value, tuple) and len(value) == 2 else value for key, value in own.items()}
    config = tiny.config(
        model__name=name,
        model__options=own | more,
        model__drop_path=0.1,
        data__name=f"synthetic:classes=5,examples=64,size={side(family)}",
        data__image_size=side(family),
        data__batch_size=8,
        mesh__fsdp=2,
        train__precision="bfloat16",
    )
    with for_tpus():
        made = plan.make(config, chips.parse("v5e:2x2"))
    assert made.devices == 4
    assert 0 < made.memory < made.topology.chip.usable_hbm
    assert made.cost.flops > made.forward_flops > 0
    assert {one.kind for one in made.exchanges}
