"""Mix-token and token labels: boxes, what is exchanged and back, the loss by definition, teachers, a run."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
import tiny_models
from flax import nnx
from official import QUICK_COMPILE

import data
import models
import tasks
from attn import Grid
from models.core.call import Call
from models.layers.cutmix import cut_box, exchange, token_box
from training.run import loop

create, images = partial(tiny_models.create, "volo"), tiny_models.images
MIXED = {"dense": True, "mix_token": True}
KEY = jax.random.key(7)  # whose box is not empty


def call(model, x, method="__call__", key=None, **options):
    graph, params, state = models.split(model)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, state, x, key):
        return getattr(models.merge(graph, params, state), method)(x, key=key, **options)

    return run(params, state, x, key)


def test_a_box_is_exchanged_and_exchanged_back():
    box = np.zeros((3, 2), bool)
    box[1:, 1] = True
    x = np.arange(4 * 7 * 5, dtype=np.float32).reshape(4, 7, 5, 1)
    mixed = exchange(jnp.asarray(x), jnp.asarray(box), cell=2)
    expected = x.copy()
    # Rows and columns behind the last whole cell stay.
    expected[:, 2:6, 2:4] = x[::-1, 2:6, 2:4]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(exchange(mixed, jnp.asarray(box), cell=2), x)


def sides(share, centre, length=14):
    """Part of an axis that a box around a centre covers."""
    half = int(length * np.sqrt(1 - share)) // 2
    return (min(centre + half, length) - max(centre - half, 0)) / length


def test_boxes_are_of_uniform_share_and_place():
    """The share is drawn from Beta(1, 1), the box of CutMix: sides floor(n sqrt(1 - share)) rounded to even numbers."""
    box = np.asarray(cut_box(jax.random.key(0), jnp.float32(1 - 0.49), 100, 50))
    rows, columns = box.any(1).sum(), box.any(0).sum()
    assert rows <= 70
    assert columns <= 34
    many = np.asarray(jax.vmap(lambda key: token_box(key, (14, 14)))(jax.random.split(KEY, 2000)))
    area = many.mean((1, 2))
    # Sides are even, and 12 of 14 at most unless the share is exactly 0; the border takes a part of the area.
    assert area.max() == pytest.approx((12 / 14) ** 2)
    assert (area == 0).any()
    expected = np.mean([np.mean([sides(draw, at) for at in range(14)]) ** 2 for draw in np.linspace(0, 1, 2001)[:-1]])
    assert area.mean() == pytest.approx(expected, abs=0.02)
    assert np.abs(many.mean(0) - many.mean(0).T).max() < 0.06


def test_tokens_are_mixed_before_the_stages_and_unmixed_after_them():
    """Without attention between places, logits at every place are those without mixing."""
    x = images(40, 32, batch=4)
    options = {"attention": "identity", "depths": (1, 1)}
    plain = call(create(dense=True, **options), x, "features", train=True, key=KEY)
    mixed = call(create(**MIXED, **options), x, "features", train=True, key=KEY)
    changed = np.abs(np.asarray(plain["stages.0.embedded"] - mixed["stages.0.embedded"])).max((0, 3)) > 1e-6
    share = np.asarray(mixed["own_share"])
    assert share.shape == (4,)
    # 10 x 8 places are 5 x 4 cells of 2 x 2.
    assert 0 < changed.mean() == pytest.approx(1 - share[0], abs=1e-6)
    expected = np.where(changed[None, ..., None], plain["embedded"][::-1], plain["embedded"])
    np.testing.assert_allclose(mixed["stages.0.embedded"], expected, atol=1e-6)
    np.testing.assert_allclose(mixed["token_logits"], plain["token_logits"], atol=1e-5)
    boxes = [create(**MIXED, **options)._box((14, 14), Call(Grid(()), key=jax.random.key(seed))) for seed in (1, 2)]
    assert not np.array_equal(*boxes)


def test_training_answers_by_heads_and_evaluation_does_not_mix():
    x = images(32, 32, batch=4)
    answer = call(create(**MIXED), x, train=True, key=KEY)
    assert {name: value.shape for name, value in answer.items()} == {
        "logits": (4, 5),
        "token_logits": (4, 16, 5),
        "own_share": (4,),
    }
    found = call(create(**MIXED), x, "features", train=True, key=KEY)
    np.testing.assert_allclose(found["class_logits"], answer["logits"], atol=1e-5)
    plain = call(create(dense=True), x, train=True, key=KEY)
    assert set(plain) == {"logits", "token_logits"}
    # The class token saw a mixture.
    assert 0 < answer["own_share"][0] < 1
    assert np.abs(plain["logits"] - answer["logits"]).max() > 1e-3
    np.testing.assert_array_equal(call(create(**MIXED), x), call(create(), x))
    with pytest.raises(ValueError, match="mix-token needs a key"):
        jax.eval_shape(lambda x: create(**MIXED)(x, train=True), x)
    bare = jax.eval_shape(lambda x: models.reset_classifier(create(**MIXED), 0, rngs=nnx.Rngs(0))(x, train=True), x)
    assert bare.shape == (4, 16)


INFO = data.Info(name="s", split="train", fields={"image": "image", "label": "label"}, num_examples=4, num_classes=5)


def task(**overrides):
    return tasks.create(tiny.config(**{"task__options__token_labels": 0.5, **overrides}), INFO)


def batch(size=4):
    label = jnp.array([0, 3, 1, 2])[:size]
    return {"image": images(32, 32, batch=size), "label": label, "index": jnp.arange(size)}


def outputs(classes=5, tokens=6):
    rng = np.random.default_rng(0)
    share = np.full(4, 0.7, np.float32)
    return {"logits": rng.normal(size=(4, classes)), "token_logits": rng.normal(size=(4, tokens, classes))} | {
        "own_share": share
    }


@pytest.mark.parametrize("teacher", [False, True])
def test_the_loss_is_that_of_the_paper(teacher):
    """CE of the class token against both labels by share, and half the mean CE of the tokens, against what the teacher
    says of each of them or the image's own label."""
    labelled = task(task__options__label_smoothing=0.1)
    examples = labelled.prepare(batch(), KEY)
    found = outputs()
    target = np.eye(5)[np.asarray(examples["label"])] * 0.9 + 0.1 / 5
    of_tokens = np.repeat(target[:, None], 6, 1)
    if teacher:
        found["teacher_token_logits"] = np.random.default_rng(1).normal(size=(4, 6, 5))
        of_tokens = scipy.special.softmax(found["teacher_token_logits"], -1)
    shared = 0.7 * target + 0.3 * target[::-1]
    label = -(shared * scipy.special.log_softmax(found["logits"], -1)).sum(-1).mean()
    token = -(of_tokens * scipy.special.log_softmax(found["token_logits"], -1)).sum(-1).mean()
    loss, parts = labelled.loss({name: jnp.asarray(value) for name, value in found.items()}, examples)
    assert float(loss) == pytest.approx(label + 0.5 * token, rel=1e-5)
    assert float(parts["label_loss"]) == pytest.approx(label, rel=1e-5)
    assert float(parts["token_loss"]) == pytest.approx(token, rel=1e-5)
    evaluated = {"logits": jnp.asarray(found["logits"])}
    plain = -scipy.special.log_softmax(found["logits"], -1)[np.arange(4), np.asarray(examples["label"])].mean()
    assert float(labelled.loss(evaluated, batch())[0]) == pytest.approx(plain, rel=1e-5)


def test_sigmoid_losses_and_the_training_accuracy_know_of_the_mixture():
    labelled = task(task__options__loss="sigmoid")
    examples = labelled.prepare(batch(), KEY)
    found = {name: jnp.asarray(value, jnp.float32) for name, value in outputs().items()}
    target = np.eye(5)[np.asarray(examples["label"])]
    bce = np.logaddexp(0, found["token_logits"]) - target[:, None] * np.asarray(found["token_logits"])
    assert float(labelled.loss(found, examples)[1]["token_loss"]) == pytest.approx(bce.sum(-1).mean(), rel=1e-5)
    metric = labelled.train_metrics()["top1"]
    for share, own in ((0.7, examples["label"]), (0.3, examples["label"][::-1])):
        mixed = found | {"own_share": jnp.full(4, share), "logits": jax.nn.one_hot(own, 5)}
        assert metric.finish(metric.update(metric.init(), mixed, examples)) == 1.0


def test_a_teacher_labels_tokens_or_the_image():
    examples = batch()
    labelled = task(task__options__teacher="runs/teacher")
    teacher = SimpleNamespace(features=lambda images: {"token_logits": images.mean((2, 3))[:, :, None] * jnp.ones(5)})
    partners = labelled.partners(lambda path: teacher)
    own = {"logits": jnp.ones((4, 5)), "token_logits": jnp.ones((4, 32, 1)) * jnp.arange(5.0)}
    model = lambda images, train, key: own  # noqa: E731
    found = labelled.forward(model, labelled.prepare(examples, KEY), train=True, key=KEY, partners=partners)
    assert set(found) == {"logits", "token_logits", "teacher_token_logits"}
    prepared = labelled.prepare(examples, KEY)
    gradient = jax.grad(lambda theirs: labelled.loss(found | {"teacher_token_logits": theirs}, prepared)[0])
    assert not np.any(gradient(found["teacher_token_logits"]))
    other = {"teacher": SimpleNamespace(features=lambda images: {})}
    with pytest.raises(ValueError, match="is a SimpleNamespace without logits of its tokens"):
        labelled.forward(model, examples, train=True, key=KEY, partners=other)
    with pytest.raises(ValueError, match="gives 7 tokens of 5 classes, the model 32 of 5"):
        labelled.loss(found | {"teacher_token_logits": jnp.ones((4, 7, 5))}, prepared)
    with pytest.raises(ValueError, match="token labels take distill=none"):
        task(task__options__teacher="runs/teacher", task__options__distill="soft")


def test_token_labels_and_their_head_come_together():
    prepared = task().prepare(batch(), KEY)
    with pytest.raises(
        ValueError, match=r"config\.task\.options\.token_labels needs a model that gives logits of its tokens"
    ):
        task().loss({"logits": jnp.ones((4, 5))}, prepared)
    with pytest.raises(ValueError, match=r"config\.task\.options\.token_labels is 0"):
        task(task__options__token_labels=0.0).loss(
            {name: jnp.asarray(value) for name, value in outputs().items()}, prepared
        )


@pytest.mark.slow
def test_a_run_learns_from_token_labels_and_teaches(tmp_path):
    """Through the loop, with mix-token, drop path and accumulation; then as the teacher of another one."""
    own = {key: value for key, value in tiny_models.TINY["volo"][1].items() if key != "image_size"}
    config = partial(
        tiny.config,
        model__name="volo_d1",
        model__options=own | MIXED | {"depths": (1, 1), "widths": (8, 8), "class_layers": 1},
        model__drop_path=0.1,
        optim__accumulate=2,
        optim__learning_rate=1e-2,
        task__options__token_labels=0.5,
    )
    result = loop.train(config(train__steps=8), tmp_path / "teacher", terminal=tiny.quiet())
    rows = tiny.rows(tmp_path / "teacher")
    assert result["step"] == 8
    # Single steps differ by the images that are mixed.
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02
    for row in rows:
        assert row["loss"] == pytest.approx(row["label_loss"] + 0.5 * row["token_loss"], rel=1e-4)
    taught = config(train__steps=2, task__options__teacher=str(tmp_path / "teacher"))
    loop.train(taught, tmp_path / "student", terminal=tiny.quiet())
    assert np.isfinite([row["token_loss"] for row in tiny.rows(tmp_path / "student")]).all()
