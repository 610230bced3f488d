"""Teachers and starts of another run: their own images, sides and order of classes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import simulated
import tiny
import tiny_models
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import configs
import data
import models
import tasks
from data import classes
from tasks import classifiers, pixel_scale
from tasks.partner import Partner, Terms
from training.checkpoints import initial, partners, starts
from training.distributed import mesh
from training.run import loop
from training.run.run import prepare

HALF = (0.5, 0.5, 0.5)
NAMES = tuple("abcd")


def named(names, examples=16):
    images = np.random.default_rng(0).integers(0, 255, (examples, 16, 16, 3)).astype(np.uint8)
    columns = {"image": images, "label": np.arange(examples) % len(names)}
    return data.ArraySource(columns, fields={"image": "image", "label": "label"}, class_names=names)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of one step on images scaled by 0.5 and 0.5."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    source = named(NAMES)
    config = tiny.config(data__mean=HALF, data__std=HALF, train__steps=1)
    loop.train(config, folder, terminal=tiny.quiet(), sources={"train": source, "test": source})
    return folder


def load(config, info, path, **how):
    return partners.load(tasks.create(config, info), path, **how)


def model_of(teacher):
    return partners._trained(str(teacher), named(NAMES).info)[0]


def scaled(config, key="train_transforms"):
    """Two images as a run has them, `[2, 16, 16, 3]`."""
    pipeline = data.parse_transforms(getattr(config.data, key), config.data.mean, config.data.std)
    source = named(NAMES)
    return np.stack([pipeline(source[i], source.info.kinds, np.random.default_rng(0))["image"] for i in range(2)])


def test_a_teacher_in_the_same_terms_is_taken_as_it_is(teacher, capsys):
    config = tiny.config(data__mean=HALF, data__std=HALF)
    assert not isinstance(load(config, named(NAMES).info, str(teacher)), Partner)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("normalize", ["normalize", "value_range(-2, 2)", "normalize(mean=0.1, std=(0.2, 0.3, 0.4))"])
def test_a_teacher_gets_its_own_images_and_answers_in_the_classes_of_the_run(teacher, capsys, normalize):
    config = tiny.config(data__train_transforms=normalize)
    order = [2, 0, 3, 1]
    info = named([NAMES[i].upper() for i in order]).info
    partner = load(config, info, str(teacher))
    own = scaled(tiny.config(data__mean=HALF, data__std=HALF), "eval_transforms")
    expected = np.asarray(model_of(teacher)(own))[:, order]
    graph, *leaves = models.split(partner)
    answer = jax.jit(lambda *leaves: models.merge(graph, *leaves)(scaled(config)))(*leaves)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(partner.features(scaled(config))["logits"], expected, rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().err
    assert "images are brought to its mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5" in said
    assert "the same classes in another order, matched by name" in said
    as_they_are = load(config, named("xyz").info, str(teacher), match_classes=False)
    np.testing.assert_allclose(as_they_are(scaled(config))[:, order], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_size_gets_resized_images(teacher, capsys):
    config = tiny.config(data__mean=HALF, data__std=HALF, data__image_size=24)
    partner = load(config, named("ca").info, str(teacher))
    large = np.full((1, 24, 24, 3), 0.25, np.float32)
    np.testing.assert_allclose(partner(large), np.asarray(model_of(teacher)(large[:, :16, :16]))[:, [2, 0]], atol=1e-6)
    said = capsys.readouterr().err
    assert "images are resized from 24 x 24 to 16 x 16 pixels" in said
    assert "2 of 4 classes, matched by name" in said


@pytest.mark.parametrize(
    ("keys", "names", "said"),
    [
        ({}, "abce", "'arrays' has 4 classes, the partner 4, and 'e' is not among 'a', 'b', 'c', 'd'"),
        ({"data__train_transforms": "flip"}, NAMES, "config.data.train_transforms of this run has not one 'normalize'"),
        ({"data__train_transforms": "normalize|normalize"}, NAMES, "this run has not one 'normalize'"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_refused(teacher, keys, names, said):
    with pytest.raises(ValueError, match=said):
        load(tiny.config(**keys), named(names).info, str(teacher))


def test_partners_lie_on_a_mesh_as_their_models_say():
    """As parameters of the run would; the plan counts a share of them on each device."""
    options = {**tiny.TINY["model.options"], "image_size": 16, "num_classes": 4}
    teacher = models.create("vit_mu16", rngs=nnx.Rngs(0), **options)
    resized = Partner(teacher, Terms(size=(16, 16)))
    helpers = {"teacher": resized, "meter": nnx.BatchNorm(3, rngs=nnx.Rngs(0))}
    graphs, arrays, places = partners.spread(helpers, AbstractMesh((1, 2, 2), mesh.AXES), shapes_only=True)
    assert graphs.keys() == arrays.keys() == places.keys() == helpers.keys()
    specs = {name: place.spec for name, place in places["teacher"][0].items()}
    assert specs["model.blocks.[0::1].mlp.fc1.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["model.blocks.[0::1].norm1.scale"] == PartitionSpec(None, None)
    assert set(jax.tree.leaves(places["meter"])) == {NamedSharding(places["meter"][0]["bias"].mesh, PartitionSpec())}
    parts = jax.tree.map(lambda x, place: np.prod(place.shard_shape(x.shape)), arrays, places)
    assert sum(jax.tree.leaves(parts)) < 0.6 * sum(x.size for x in jax.tree.leaves(arrays))
    odd = models.create("vit_mu16", rngs=nnx.Rngs(0), **{**options, "heads": 1})
    with pytest.raises(ValueError, match=r"partner 'odd': config\.mesh\.tensor=2: does not divide the 1 heads"):
        partners.spread({"odd": odd}, AbstractMesh((1, 1, 2), mesh.AXES), shapes_only=True)


SPREAD = """
import json, sys

import jax
import numpy as np

sys.path[:0] = {paths}
from flax import nnx
import data, tiny, tiny_models
from tasks.classification import Classification
from training.distributed import mesh
from training.evaluation import trained
from training.plans import plan
from training.run.run import prepare


class Taught(Classification):
    def partners(self, load, *, train=True):
        return {{"teacher": tiny_models.create("vit")}}

    def forward(self, model, batch, *, train, key, partners):
        images = jax.image.resize(batch["image"], (len(batch["image"]), 32, 32, 3), "bilinear")
        return {{"logits": partners["teacher"](images)[:, :4] + 0 * model(batch["image"])}}


def loss(**settings):
    config = tiny.config(**settings)
    source = data.open_source(config.data.name, "test")
    task = Taught(config, source.info)
    ready = trained._place(task, config, task.build_model(nnx.Rngs(0)), "raw", 0)
    return [ready.evaluate(source)["loss"], spec(ready.evaluator.partner_arrays)]


def spec(arrays):
    return str(arrays["teacher"][0]["blocks.[0::1].mlp.fc1.kernel"].sharding.spec)


config = tiny.config(mesh__fsdp=2)
source = data.open_source(config.data.name, "train")
run = prepare(config, source=source, task=Taught(config, source.info))
batch = {{"image": np.ones((16, 16, 16, 3), np.float32), "label": np.zeros(16, np.int32), "index": np.arange(16)}}
state, _ = run.step(run.initial_state(), mesh.put_batch(batch, mesh.batch_sharding(run.mesh)), run.partner_arrays)
trains = [float(state.metrics["means"]["loss"]), spec(run.partner_arrays)]
trains.append(plan._parts(run)["partner models"])
print(json.dumps([trains, loss(), loss(mesh__fsdp=2)]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_partners_are_spread_in_training_and_evaluation():
    tests = Path(__file__).resolve().parents[1]
    trains, whole, spread = simulated.run(2, SPREAD.format(paths=[str(tests.parent), str(tests)]))
    assert np.isfinite(trains[0])
    assert "fsdp" not in whole[1]
    assert "fsdp" in trains[1]
    assert "fsdp" in spread[1]
    teacher = tiny_models.create("vit")
    assert trains[2] < 0.6 * sum(4 * value.size for value in models.split(teacher)[1].values())
    assert spread[0] == pytest.approx(whole[0], rel=1e-6)


def test_a_file_of_weights_teaches_with_the_configuration_of_its_model(teacher, tmp_path):
    file, described = tmp_path / "weights.safetensors", tmp_path / "tiny_run.py"
    models.export_weights(model_of(teacher), file, class_names=NAMES)
    described.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    for key, value in { ({**tiny.TINY, 'data.mean': HALF, 'data.std': HALF})!r}.items():\n"
        "        group, name = key.split('.')\n        config[group][name] = value\n    return config\n"
    )
    config, info = tiny.config(), named("dbca").info
    one, other = (load(config, info, path) for path in (str(teacher), f"{described}:{file}"))
    np.testing.assert_array_equal(one(scaled(config)), other(scaled(config)))
    with pytest.raises(ValueError, match=r"does not say its model; write configs/FILE\.py:.*weights\.safetensors"):
        load(config, info, str(file))
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*nowhere\.pth"):
        load(config, info, f"{described}:{tmp_path / 'nowhere.pth'}")


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_start_puts_the_classifier_in_the_order_of_its_classes(teacher, tmp_path, capsys, kind):
    start, model = teacher, model_of(teacher)
    if kind == "file":
        start = tmp_path / "weights.safetensors"
        models.export_weights(model, start, class_names=NAMES)
    there = models.unstack(models.split(model)[1])
    config = tiny.config(model__init_from=str(start))

    def started(names):
        params = models.unstack(prepare(config, source=named(names)).initial_state().params)
        np.testing.assert_array_equal(params["blocks.1.mlp.fc1.kernel"], there["blocks.1.mlp.fc1.kernel"])
        return np.asarray(params["head.kernel"]), capsys.readouterr().err

    kernel, said = started("cbad")
    np.testing.assert_array_equal(kernel, there["head.kernel"][:, [2, 1, 0, 3]])
    assert "the classifier is for the same classes in another order, matched by name" in said
    assert ("it was trained on images with mean 0.5, 0.5, 0.5 and std 0.5" in said) == (kind == "run")
    kernel, said = started("abce")
    assert not np.allclose(kernel, there["head.kernel"])
    assert "the classifier starts anew: 'arrays' has 4 classes, the weights 4, and 'e' is not among" in said


class Detector(nnx.Module):
    """A model that has a ViT as its backbone."""

    def __init__(self, seed):
        options = {**tiny.TINY["model.options"], "image_size": 16}
        self.backbone = models.create("vit_mu16", num_classes=0, rngs=nnx.Rngs(seed), **options)
        self.boxes = nnx.Linear(16, 4, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("kind", ["run", "file", "detector"])
def test_weights_of_a_family_start_the_part_that_is_of_it(teacher, tmp_path, monkeypatch, capsys, kind):
    there = models.unstack(models.split(model_of(teacher))[1])
    start, detector = teacher, Detector(1)
    _, params, state = models.split(detector)
    if kind == "file":
        start = tmp_path / "weights.safetensors"
        models.export_weights(model_of(teacher), start)
    if kind == "detector":  # of a run of the same model
        saved = initial.checkpoint.restore_for_eval(teacher)
        whole = {f"backbone.{name}": value for name, value in there.items() if not name.startswith("head.")}
        saved |= {"params": {**whole, **{name: params[name] for name in ("boxes.kernel", "boxes.bias")}}}
        monkeypatch.setattr(initial.checkpoint, "restore_for_eval", lambda path: saved)
    config = tiny.config(model__init_from=str(start))
    task = tasks.create(config, named(NAMES).info)
    found = models.unstack(starts.start_from(starts.of_config(config), task, params, state, detector)[0])
    name = "blocks.1.mlp.fc1.kernel"
    np.testing.assert_array_equal(found[f"backbone.{name}"], there[name])
    np.testing.assert_array_equal(found["boxes.kernel"], params["boxes.kernel"])
    said = capsys.readouterr().err
    assert ("the weights go to backbone; the rest starts anew" in said) == (kind != "detector")
    assert ("head with 4 classes is left out" in said) == (kind != "detector")


def test_weights_for_imagenet_are_known_by_their_classes():
    config = tiny.config()
    options = {**config.model.options, "image_size": 16}
    model = models.create("vit_mu16", num_classes=1000, rngs=nnx.Rngs(0), **options)
    arrays = models.export_weights(model)
    found = models.weights.files.read(arrays)
    small = models.create("vit_mu16", num_classes=2, rngs=nnx.Rngs(0), **options)
    info = classifiers.of_file(found, small, named(("n02102040", "tench")).info)
    assert (info.num_classes, info.class_names) == (1000, classes.imagenet())
    others = named(("cat", "lorry")).info
    assert classifiers.of_file(found, small, others) == others
    said = dataclasses.replace(found, class_names=("lorry", "cat"))
    assert classifiers.of_file(said, small, others).class_names == ("lorry", "cat")


def test_scales_are_read_from_transforms():
    assert (
        pixel_scale.scale(tiny.config(data__train_transforms="view('clean')|normalize(on='clean')"), "train_transforms")
        is None
    )
    mean, std = pixel_scale.scale(
        configs.replace(tiny.config(), data__eval_transforms="resize({size})|value_range(-1, 1)"), "eval_transforms"
    )
    assert (mean.tolist(), std.tolist()) == ([0.5], [0.5])
