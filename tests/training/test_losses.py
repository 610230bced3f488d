"""Several losses: who trains what, at which steps, and that nothing else changes."""

import itertools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulated
import tiny
import tiny_tasks

import models
from tasks.losses import Loss
from training.checkpoints import checkpoint
from training.optim import optim
from training.run import gradients, loop
from training.run.run import prepare
from training.run.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    **tiny.OWN_MODEL,
    "data__image_size": 8,
    "data__batch_size": 16,
    "data__train_transforms": "value_range(0, 1)",
    "data__eval_transforms": "value_range(0, 1)",
    "optim__schedule": "constant",
    "optim__weight_decay": 0.0,
}
SOURCE = tiny_tasks.restoration_source(64)
MEAN = float(np.mean([np.asarray(SOURCE[i]["image"])[..., 0] for i in range(64)]))


class Together(tiny_tasks.MeanGame):
    """Both players move in every step."""

    every = 1


def play(task, workdir, **settings):
    config = tiny.config(**{**SETTINGS, "optim__learning_rate": 0.02, "optim__b1": 0.5, **settings})
    sources = {"train": SOURCE, "test": SOURCE}
    return loop.train(config, workdir, task=task(config, SOURCE.info), sources=sources, terminal=Terminal())


def steps_of(task, count, **settings):
    """The state before the first step and after each."""
    config = tiny.config(**{**SETTINGS, **settings})
    run = prepare(config, task=task(config, SOURCE.info), source=SOURCE)
    states = [run.initial_state()]
    images = np.stack([np.asarray(SOURCE[i]["image"]) for i in range(16)])
    for _ in range(count):
        batch = {"image": images, "index": np.arange(16, dtype=np.int32)}
        states.append(run.step(jax.tree.map(lambda x: x.copy(), states[-1]), batch, {})[0])
    return run, states


def player(tree, name):
    """The parameters and all optimizer state of a player, by where they are."""
    found = jax.tree_util.tree_leaves_with_path({"params": tree.params, "rules": tree.opt_state["rules"]})
    return {str(path): np.asarray(leaf) for path, leaf in found if f"'{name}" in str(path)}


def same(a, b):
    assert a.keys() == b.keys()
    return [a[path].tobytes() == b[path].tobytes() for path in a]


def test_two_players_learn_a_mean(tmp_path, capsys):
    found = play(Together, tmp_path, train__steps=300, log__every_steps=50, eval__every_steps="0")
    assert found["metrics"]["test"]["mean"] == pytest.approx(MEAN, abs=0.03)  # 0 before
    assert re.search(r"step 300/300  discriminator 1\.\d{4}  generator 0\.\d{4}  lr", capsys.readouterr().out)
    rows = tiny.rows(tmp_path)
    for row in rows:
        assert row["loss"] == pytest.approx(row["discriminator"] + row["generator"], rel=1e-5)
        assert row["discriminator"] >= row["discriminator.real"] + row["discriminator.fake"]
    assert rows[-1]["discriminator"] == pytest.approx(2 * np.log(2), abs=0.02)  # it knows nothing any more
    assert rows[0]["discriminator"] > 1.6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim__accumulate": 2, "optim__ema": 0.9, "optim__clip_norm": 0.1, "train__nonfinite": "skip"},
        {"optim__name": "optax:adan", "optim__weight_decay": 0.1},
    ],
    ids=["plain", "everything", "optax"],
)
def test_who_is_not_due_stays_as_it_is(settings):
    _, states = steps_of(tiny_tasks.MeanGame, 4, **settings)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        moving, waiting = ("discriminator", "generator") if step % 2 == 0 else ("generator", "discriminator")
        assert all(same(player(before, waiting), player(after, waiting))), step
        assert not all(same(player(before, moving), player(after, moving))), step
        assert not any(np.array_equal(before.params[n], after.params[n]) for n in before.params if n.startswith(moving))
        assert int(after.step) == int(after.opt_state["count"]) == step + 1
        assert not int(after.health["bad_steps"])


def test_each_player_descends_its_own_loss():
    """Against gradients by hand: those of one player's loss, where the other one is a constant."""
    accumulate = 2
    settings = {"optim__name": "sgd", "optim__momentum": 0.0, "optim__accumulate": accumulate}
    run, (before, after) = steps_of(Together, 1, **settings)
    task, key = run.task, jax.random.split(jax.random.fold_in(before.key, 0))[1]
    images = jnp.stack([SOURCE[i]["image"] for i in range(16)])
    batch = {"image": images, "index": jnp.arange(16)}
    parts = [
        ({name: value[i::accumulate] for name, value in batch.items()}, jax.random.fold_in(key, i))
        for i in range(accumulate)
    ]
    for name, loss in task.losses().items():

        def of_player(own, part, key, loss=loss):
            model = models.merge(run.graph, {**before.params, **own}, {})
            return loss.function(task.forward(model, part, train=True, key=key, partners={}), part)[0]

        own = {leaf: value for leaf, value in before.params.items() if leaf.startswith(name)}
        gradient = jax.jit(jax.grad(of_player))
        found = [gradient(own, *part) for part in parts]
        rate = 0.05 if name == "generator" else run.config.optim.learning_rate
        for leaf, value in own.items():
            expected = value - rate * sum(one[leaf] for one in found) / accumulate
            np.testing.assert_allclose(after.params[leaf], expected, rtol=1e-5, atol=1e-7)
            assert not np.array_equal(after.params[leaf], value)


def test_a_run_with_two_players_resumes_to_the_same_bits(tmp_path):
    settings = {"train__steps": 5, "optim__ema": 0.9, "checkpoint__every_steps": 3}
    whole = play(tiny_tasks.MeanGame, tmp_path, **settings)
    averages = checkpoint.restore_for_eval(tmp_path)["ema"]["params"]
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    (tmp_path / "summary.json").unlink()
    assert play(tiny_tasks.MeanGame, tmp_path, **settings)["params_sha256"] == whole["params_sha256"]
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_for_eval(tmp_path)["ema"]["params"], averages)


def test_a_loss_that_is_not_finite_spoils_nothing():
    class Spoiled(tiny_tasks.MeanGame):
        def losses(self):
            both = super().losses()
            bad = both["generator"]
            return {**both, "generator": Loss(lambda o, b: (bad.function(o, b)[0] * jnp.nan, {}), bad.parameters)}

    _, (before, after) = steps_of(Spoiled, 1, train__nonfinite="skip")
    for name in ("generator", "discriminator"):
        assert all(same(player(before, name), player(after, name)))
    assert int(after.health["bad_steps"]) == 1


# Stacked leaves, groups and clipping, without a model

SHAPES = {"blocks.[0::1].kernel": (4, 2, 3), "head.kernel": (2, 3)}
HALVES = {
    "lower": Loss(lambda outputs, batch: (jnp.sum(outputs["y"] ** 2), {}), "blocks.[01]", every=2),
    "upper": Loss(lambda outputs, batch: (jnp.sum(jnp.sin(outputs["y"])), {}), "blocks.[23]|head"),
}


def leaves(seed=0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def settings(**changes):
    values = dict.fromkeys(("b1", "b2", "eps", "momentum", "nesterov"))
    values |= {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "weight_decay_on": "matrices", "options": {}}
    values |= {"mu_dtype": "float32", "layer_decay": 1.0, "freeze": (), "clip_norm": 0.0, **changes}
    return type("Settings", (), values)


def constant(step):
    return jnp.float32(0.1)


def test_layers_of_one_leaf_belong_to_different_losses():
    def forward(params, model_state, batch, key, partners):
        return {"y": jnp.einsum("lij,ij->ij", params["blocks.[0::1].kernel"], params["head.kernel"])}, {}

    params = leaves()
    optimizer = optim.build(settings(), params, constant, losses=HALVES)
    gradient_of = gradients.of_several(HALVES, optimizer.trained_by, forward)
    several = jax.jit(lambda due: gradient_of(params, {}, {}, None, None, {"lower": due, "upper": True}))
    whole = {
        name: jax.jit(jax.grad(lambda p, loss=loss: loss.function(forward(p, *[None] * 4)[0], {})[0]))(params)
        for name, loss in HALVES.items()
    }
    for due in (True, False):
        (total, _), found = several(due)
        stack = np.asarray(found["blocks.[0::1].kernel"])
        lower = np.asarray(whole["lower"]["blocks.[0::1].kernel"])[:2] * due
        np.testing.assert_allclose(stack[:2], lower, rtol=1e-6)
        np.testing.assert_allclose(stack[2:], whole["upper"]["blocks.[0::1].kernel"][2:], rtol=1e-6)
        np.testing.assert_allclose(found["head.kernel"], whole["upper"]["head.kernel"], rtol=1e-6)
        assert np.isfinite(total)


def test_each_loss_is_clipped_by_its_own_norm_and_counts_its_own_steps():
    params, grads = leaves(), leaves(1)
    made = optim.build(settings(clip_norm=0.5), params, constant, losses=HALVES)
    state = made.init(params)
    update = jax.jit(lambda state, due: made.update(grads, state, params, {"lower": due}))
    updates, state, _ = update(state, True)
    pieces = {"lower": [updates["blocks.[0::1].kernel"][:2]]}
    pieces["upper"] = [updates["blocks.[0::1].kernel"][2:], updates["head.kernel"]]
    for own in pieces.values():
        assert float(optax.global_norm(own)) == pytest.approx(0.1 * 0.5, rel=1e-5)
    waited, after, _ = update(state, False)
    assert not np.any(waited["blocks.[0::1].kernel"][:2])
    assert np.all(np.signbit(waited["blocks.[0::1].kernel"][:2]))  # what leaves -0.0 as it is
    assert jax.tree.all(jax.tree.map(np.array_equal, after["rules"]["lower-main"], state["rules"]["lower-main"]))

    # An optimizer of optax counts its own steps: its second one is the third of the run.
    schedule = [0.4, 0.3, 0.2, 0.1]
    theirs = settings(name="optax:sgd")
    made = optim.build(theirs, params, lambda step: jnp.asarray(schedule)[step], losses=HALVES)
    state, update = made.init(params), jax.jit(lambda s, due: made.update(grads, s, params, {"lower": due}))
    for step, rate in enumerate(schedule):
        updates, state, _ = update(state, step % 2 == 0)
        lower, upper = np.split(np.asarray(updates["blocks.[0::1].kernel"] / grads["blocks.[0::1].kernel"]), 2)
        np.testing.assert_allclose(upper, -rate, rtol=1e-6)
        np.testing.assert_allclose(lower, 0 if step % 2 else -rate, rtol=1e-6)


def test_what_is_frozen_needs_no_loss():
    only = {"upper": HALVES["upper"]}
    made = optim.build(settings(freeze=("blocks.[01]",)), leaves(), constant, losses=only)
    assert made.trained_by["upper"]["blocks.[0::1].kernel"].tolist() == [False, False, True, True]
    frozen = optim.build(settings(freeze=("blocks.[0-2]",)), leaves(), constant, losses=HALVES)
    assert not frozen.trained_by["lower"]["blocks.[0::1].kernel"].any()
    assert "lower-main" not in frozen.groups


def changed(name, **values):
    return {**HALVES, name: Loss(**{"function": HALVES["lower"].function, "parameters": "head", **values})}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (lambda: {"upper": HALVES["upper"]}, r"no loss trains blocks\.0\.kernel; there are 'upper' \(blocks"),
        (lambda: changed("lower", parameters="blocks"), r"blocks\.2\.kernel is trained by 'lower' and 'upper'"),
        (
            lambda: changed("lower", parameters="blockz"),
            r"losses\.lower: 'blockz' matches no parameter .*nearest: blocks",
        ),
        (lambda: changed("lower", parameters="(b"), r"losses\.lower: '\(b' is not a regular expression"),
        (lambda: changed("loss"), r"the name 'loss' is taken"),
        (lambda: changed("a.b"), r"the name 'a\.b' is taken or no word"),
        (lambda: changed("lower", every=0), r"every=0: takes a number of steps"),
        (lambda: changed("lower", every=2, offset=2), r"offset=2: takes a whole number from 0 to every - 1 = 1"),
    ],
)
def test_losses_that_cannot_be_are_one_line(losses, said):
    with pytest.raises(ValueError, match=said) as error:
        optim.build(settings(), leaves(), constant, losses=losses())
    assert "\n" not in str(error.value)


def test_a_loss_of_each_example_is_refused():
    class Each(tiny_tasks.MeanGame):
        def losses(self):
            return {**super().losses(), "generator": Loss(lambda outputs, batch: (outputs["fake"], {}), "generator")}

    config = tiny.config(**SETTINGS)
    with pytest.raises(ValueError, match=r"losses: 'generator' gives an array \[16, 1\]; a loss is one number"):
        prepare(config, task=Each(config, SOURCE.info), source=SOURCE)


SCANNED_AND_SPREAD = """
import json, sys

import jax
import numpy as np

sys.path[:0] = {paths}
import data, models, tiny
from tasks.classification import Classification
from tasks.losses import Loss
from training.distributed import mesh
from training.run.run import prepare


class Halves(Classification):
    def losses(self):
        def label(outputs, batch):
            return Classification.loss(self, outputs, batch)

        return {{
            "lower": Loss(lambda o, b: (2 * label(o, b)[0], {{}}), "blocks.0|patch_embed|cls_token|pos_embed", every=2),
            "upper": Loss(label, "blocks.1|norm|head"),
        }}


def params(steps=2, **settings):
    config = tiny.config(optim__clip_norm=0.1, optim__weight_decay=0.0, data__batch_size=16, **settings)
    run = prepare(config, source=source, task=Halves(config, source.info))
    state, sharding = run.initial_state(), mesh.batch_sharding(run.mesh)
    for step in range(steps):
        random = np.random.default_rng(step)
        batch = {{"image": random.standard_normal((16, 16, 16, 3)), "label": random.integers(0, 4, 16)}}
        batch["index"] = np.arange(16)
        state, _ = run.step(state, mesh.put_batch(batch, sharding), {{}})
    found.append([str(value.sharding.spec) for value in state.params.values()])
    return models.unstack(mesh.gather(state.params))


found, source = [], data.open_source(tiny.config().data.name, "train")
one = params(model__scan=False)
other = params(mesh__fsdp=2, optim__accumulate=2)
found.append(max(float(np.abs(one[name] - other[name]).max()) for name in one))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_scanned_and_spread_over_devices():
    """Two losses that share a stack give the same parameters scanned, spread over devices and in parts as otherwise."""
    whole, spread, difference = simulated.run(2, SCANNED_AND_SPREAD.format(paths=[str(ROOT), str(ROOT / "tests")]))
    assert not any("fsdp" in spec for spec in whole)
    assert any("fsdp" in spec for spec in spread)
    assert difference < 2e-5
