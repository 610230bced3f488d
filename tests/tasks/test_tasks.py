"""Tasks: registry, losses of classification, mixing, distillation, and tasks of other kinds in the same loop."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
import tiny_tasks
from flax import nnx

import data
import errors
import tasks
from tasks import base, classification, mixing
from tasks.base import Task
from training.checkpoints import checkpoint
from training.run import loop

INFO = data.Info(
    name="shapes", split="train", fields={"image": "image", "label": "label"}, num_examples=8, num_classes=4
)


def task(**overrides):
    return tasks.create(tiny.config(**overrides), INFO)


def batch(size=8, classes=4):
    key = jax.random.key(0)
    label = jnp.arange(size, dtype=jnp.int32) % classes
    return {"image": jax.random.normal(key, (size, 16, 16, 3)), "label": label, "index": jnp.arange(size)}


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"nearest: classification"):
        tasks.create(tiny.config(task__name="clasification"), INFO)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="already registered by Classification"):
        tasks.register("classification")(Task)


def test_options_are_those_of_the_task():
    for options, message in (
        ({"label_smothing": 0.1}, r"config\.task\.options\.label_smothing: no such key \(nearest: label_smoothing\)"),
        ({"mixup": "much"}, r"config\.task\.options\.mixup='much': takes a number, at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            task(task__options=options)
    with pytest.raises(ValueError, match=r"config\.task\.options\.mixup: no such key; there are none"):
        tiny_tasks.MeanBrightness(tiny.config(task__options={"mixup": 0.1}), INFO)


def test_a_task_may_come_from_a_module_of_the_users():
    assert tasks.find("tiny_tasks:Restoration") is tiny_tasks.Restoration
    for name, message in (
        ("tiny_taskz:Restoration", r"config\.task\.name='tiny_taskz:Restoration': there is no module 'tiny_taskz'"),
        ("tiny_tasks:Restauration", r"tiny_tasks has no 'Restauration' \(nearest: Restoration"),
        ("tiny_tasks:restoration_source", r"takes a subclass of tasks\.Task"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.find(name)


def test_an_error_in_a_module_of_the_users_has_its_place(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_task.py").write_text("import jax\n\nx = undefined\n")
    (tmp_path / "unread_task.py").write_text("def f(:\n")
    (tmp_path / "needy_task.py").write_text("import no_such_thing\n")
    for name, message in (
        ("broken_task:A", r"broken_task\.py:3: NameError: name 'undefined'"),
        ("unread_task:A", r"unread_task\.py:1: SyntaxError: "),
        ("needy_task:A", r"needy_task\.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.find(name)


@pytest.mark.parametrize(("distill", "teacher"), [("soft", ""), ("none", "runs/teacher")])
def test_distillation_needs_teacher_and_kind(distill, teacher):
    with pytest.raises(ValueError, match="distill"):
        task(task__options__distill=distill, task__options__teacher=teacher)


def test_a_model_is_built_from_the_configuration():
    def logits(task):
        return jax.eval_shape(lambda images: task.build_model(nnx.Rngs(0))(images), batch()["image"])

    assert logits(task(train__precision="bfloat16")).shape == (8, 4)
    with pytest.raises(ValueError, match=r"widht.*width"):
        logits(task(model__options={"widht": 3}))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32) * 3


def test_softmax_and_sigmoid_loss_equal_numpy():
    logits, label = random_logits().astype(np.float64), np.arange(8) % 4
    evaluation = {"label": jnp.array(label)}
    expected = -scipy.special.log_softmax(logits, 1)[np.arange(8), label].mean()
    loss, _ = task().loss({"logits": jnp.array(logits)}, evaluation)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    target = np.eye(4)[label] * 0.9 + 0.1 / 4
    bce = np.logaddexp(0, logits) - target * logits
    training = {**evaluation, "target": jnp.eye(4)[label]}
    smooth = task(task__options__loss="sigmoid", task__options__label_smoothing=0.1)
    assert float(smooth.loss({"logits": jnp.array(logits)}, training)[0]) == pytest.approx(bce.sum(1).mean(), rel=1e-6)
    # In evaluation nothing is smoothed.
    plain = (np.logaddexp(0, logits) - np.eye(4)[label] * logits).sum(1).mean()
    assert float(smooth.loss({"logits": jnp.array(logits)}, evaluation)[0]) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_loss_follows_the_paper(kind):
    student, teacher, temperature = random_logits(0), random_logits(1), 3.0
    found = classification.distillation_loss(jnp.array(student), jnp.array(teacher), kind, temperature)
    log = scipy.special.log_softmax
    if kind == "soft":
        p, q = log(teacher / temperature, 1), log(student / temperature, 1)
        expected = temperature**2 * (np.exp(p) * (p - q)).sum(1)
    else:
        expected = -log(student, 1)[np.arange(8), teacher.argmax(1)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(lambda t: classification.distillation_loss(jnp.array(student), t, kind, temperature).sum())
    assert not np.any(gradient(jnp.array(teacher)))


class TwoHeads:
    """Answers as a model with a distillation token does."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, images, train=False, key=None):
        logits = images.mean((1, 2)) @ jnp.eye(3, 4) + jnp.arange(4) * self.shift
        return {"logits": logits, "distillation_logits": logits * 2} if train else logits * 1.5


def test_distillation_weighs_both_heads_and_leaves_the_teacher_out_of_evaluation():
    distilling = task(
        task__options__distill="hard",
        task__options__teacher="runs/teacher",
        task__options__distill_weight=0.25,
    )
    loaded = []
    teacher = TwoHeads(1.0)
    partners = distilling.partners(lambda path: loaded.append(path) or teacher)
    assert loaded == ["runs/teacher"]
    assert distilling.partners(loaded.append, train=False) == {}
    model, examples = TwoHeads(0.0), distilling.prepare(batch(), jax.random.key(0))
    outputs = distilling.forward(model, examples, train=True, key=jax.random.key(0), partners=partners)
    assert set(outputs) == {"logits", "distillation_logits", "teacher_logits"}
    np.testing.assert_array_equal(outputs["teacher_logits"], teacher(examples["image"]))
    loss, parts = distilling.loss(outputs, examples)
    assert float(loss) == pytest.approx(float(0.75 * parts["label_loss"] + 0.25 * parts["distillation_loss"]), rel=1e-6)
    swapped = {**outputs, "distillation_logits": outputs["distillation_logits"] + jnp.array([9.0, 0, 0, 0])}
    assert float(distilling.loss(swapped, examples)[1]["label_loss"]) == float(parts["label_loss"])
    assert float(distilling.loss(swapped, examples)[1]["distillation_loss"]) != float(parts["distillation_loss"])
    assert set(distilling.forward(model, batch(), train=False, key=None, partners={})) == {"logits"}
    with pytest.raises(ValueError, match=r"task\.options\.teacher is empty"):
        distilling.loss({k: v for k, v in outputs.items() if k != "teacher_logits"}, examples)


@functools.partial(jax.jit, static_argnames=("mixup", "cutmix"))
def mix_numbers(key, probability, switch, *, mixup, cutmix):
    """A mixed batch whose image i is filled with i, so that a pixel tells whose it is."""
    images = jnp.broadcast_to(jnp.arange(6.0)[:, None, None, None], (6, 10, 12, 3))
    return mixing.mix(
        images, jnp.eye(6), key, mixup=mixup, cutmix=cutmix, probability=probability, switch_probability=switch
    )


def mixed(mixup=0.0, cutmix=0.0, probability=1.0, switch=0.5):
    keys = [jax.random.key(seed) for seed in range(12)]
    return [jax.device_get(mix_numbers(key, probability, switch, mixup=mixup, cutmix=cutmix)) for key in keys]


def test_mixup_mixes_images_and_targets_by_the_same_share():
    shares = []
    for images, targets in mixed(mixup=1.0):
        share = targets[0, 0]
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(images[1], 1 * share + 4 * (1 - share), rtol=1e-5)
        np.testing.assert_allclose(targets[1, [1, 4]], [share, 1 - share], rtol=1e-5)
        shares.append(share)
    assert np.std(shares) > 0.1


def test_cutmix_pastes_a_box_and_its_true_area_is_the_share():
    areas = []
    for images, targets in mixed(cutmix=1.0):
        pasted = images[1, ..., 0] == 4
        assert np.all(pasted | (images[1, ..., 0] == 1))
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        if pasted.any():
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        np.testing.assert_allclose(targets[1, 4], pasted.mean(), atol=1e-6)
        areas.append(pasted.mean())
    assert np.std(areas) > 0.1


def test_mixing_happens_with_its_probability_and_takes_cutmix_by_the_coin():
    assert all((images[1] == 1).all() for images, _ in mixed(mixup=1.0, cutmix=1.0, probability=0.0))

    def is_cutmix(images):
        return set(np.unique(images[1])) <= {1.0, 4.0}

    kinds = [is_cutmix(images) for images, _ in mixed(mixup=1.0, cutmix=1.0, switch=0.5)]
    assert any(kinds)
    assert not all(kinds)
    assert all(is_cutmix(images) for images, _ in mixed(mixup=1.0, cutmix=1.0, switch=1.0))
    assert not any(is_cutmix(images) for images, _ in mixed(mixup=1.0, cutmix=1.0, switch=0.0))


def test_predictions_are_sorted_probabilities():
    found = task().predictions({"logits": jnp.array(random_logits())}, {})
    assert found["classes"].shape == (8, 4)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-6)
    assert (np.diff(found["probabilities"], axis=1) <= 0).all()


def test_a_task_that_does_not_generate_says_so():
    with pytest.raises(ValueError, match="does not generate"):
        task().generate(None, {}, jax.random.key(0), {})


def other(**overrides):
    return tiny.config(
        data__image_size=8,
        data__train_transforms="value_range(0, 1)",
        data__eval_transforms="value_range(0, 1)",
        train__steps=60,
        optim__learning_rate=3e-2,
        optim__weight_decay=0.0,
        log__every_steps=20,
        data__batch_size=8,
        **tiny.OWN_MODEL,
        **overrides,
    )


def test_image_to_image_trains_in_the_same_loop(tmp_path):
    source = tiny_tasks.restoration_source()
    config = other(eval__every_steps="30")
    result = loop.train(
        config,
        tmp_path,
        task=tiny_tasks.Restoration(config, source.info),
        sources={"train": source, "test": source},
        terminal=tiny.quiet(),
    )
    first, last = tiny.rows(tmp_path, "eval/test")
    assert last["psnr"] > first["psnr"] > 5
    assert result["metrics"]["test"]["psnr"] == last["psnr"]
    params = checkpoint.restore_for_eval(tmp_path)["params"]
    np.testing.assert_array_equal(params["gain"], 1.0)  # its optimizer has learning rate zero


def test_image_and_text_train_in_the_same_loop(tmp_path):
    source = tiny_tasks.image_text_source()
    config = other()
    result = loop.train(
        config,
        tmp_path,
        task=tiny_tasks.ImageText(config, source.info),
        sources={"train": source, "test": source},
        terminal=tiny.quiet(),
    )
    assert result["metrics"]["test"]["accuracy"] == 1.0


def test_a_task_without_training_is_refused_by_the_loop(tmp_path):
    source = tiny_tasks.restoration_source()
    config = other()
    with pytest.raises(ValueError, match="nothing to train"):
        loop.train(config, tmp_path, task=tiny_tasks.MeanBrightness(config, source.info), sources={"train": source})


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    text = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    source = tiny_tasks.restoration_source()
    config = other(task__name="denoising")
    result = loop.train(config, tmp_path, sources={"train": source, "test": source}, terminal=tiny.quiet())
    assert result["metrics"]["test"]["psnr"] > 15


@pytest.mark.parametrize("method", ["forward", "loss", "predictions"])
def test_a_task_says_what_it_lacks(method):
    bare = object.__new__(Task)
    arguments = {"forward": (None, {}), "loss": ({}, {}), "predictions": ({}, {})}[method]
    options = {"train": False, "key": None, "partners": {}} if method == "forward" else {}
    with pytest.raises(errors.BadInput, match=f"^task Task: has no {method}"):
        getattr(bare, method)(*arguments, **options)
