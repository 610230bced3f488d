"""The training loop: what it reads, when it stops, and that its parts agree with each other."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import multiprocessing
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_tasks
from jax._src.array import ArrayImpl

import data
import errors
import models
from data import classes
from tasks.classification import Classification
from training.checkpoints import checkpoint
from training.distributed import hostread
from training.run import feeding, loop
from training.run.health import check, healthy, noted
from training.run.run import prepare
from training.run.terminal import Terminal


def params_of(workdir, step=None):
    return checkpoint.restore_for_eval(workdir, step)["params"]


@pytest.mark.smoke
def test_a_run_trains_resumes_and_says_that_it_is_complete(tmp_path, capsys):
    config = tiny.config(train__steps=30, optim__learning_rate=3e-3, checkpoint__every_steps=15, log__example_ids=True)
    result = loop.train(config, tmp_path / "a", terminal=tiny.quiet())
    rows = tiny.rows(tmp_path / "a")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert np.mean([row["loss"] for row in rows[-5:]]) < np.mean([row["loss"] for row in rows[:5]])
    assert result["step"] == 30
    assert set(result["metrics"]["test"]) >= {"top1", "loss"}
    assert 0 <= result["metrics"]["test"]["top1"] <= 1
    assert result["params_sha256"] == checkpoint.params_sha256(params_of(tmp_path / "a"))
    again = loop.train(config, tmp_path / "a")
    assert again == result
    assert "complete at step 30" in capsys.readouterr().out
    ids = [
        i
        for row in (tmp_path / "a" / "examples.jsonl").read_text().splitlines()
        for i in __import__("json").loads(row)["index"]
    ]
    assert sorted(ids[:64]) == list(range(64))  # an epoch sees every example once


def test_another_configuration_is_refused_and_nothing_changes(tmp_path):
    loop.train(tiny.config(), tmp_path, terminal=tiny.quiet())
    (tmp_path / "summary.json").unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.001 -> 0.5"):
        loop.train(tiny.config(optim__learning_rate=0.5), tmp_path, terminal=tiny.quiet())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_that_was_killed_before_its_summary_has_its_last_evaluation_once(tmp_path):
    config = tiny.config(**tiny.LINEAR)
    result = loop.train(config, tmp_path, terminal=tiny.quiet())
    logged = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "summary.json").unlink()
    assert loop.train(config, tmp_path, terminal=tiny.quiet())["metrics"] == result["metrics"]
    assert (tmp_path / "metrics.jsonl").read_text() == logged


def count_reads(steps, workdir, monkeypatch):
    """`(through hostread, in any way)`: arrays that reach the host while a run of one log line takes its steps.

    `float(x)`, `np.asarray(x)`, `x.item()` and `jax.device_get` all end in `ArrayImpl._value`.
    """
    total = []
    value = ArrayImpl._value.fget
    run_steps = loop.Session.run_steps

    def watched(self, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(ArrayImpl, "_value", property(lambda array: (total.append(array.shape), value(array))[1]))
            hostread.reads = 0
            return run_steps(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Session, "run_steps", watched)
        loop.train(tiny.config(train__steps=steps, log__every_steps=steps), workdir, terminal=tiny.quiet())
    return hostread.reads, len(total)


def test_the_host_reads_results_at_log_steps_only(tmp_path, monkeypatch):
    few, many = (count_reads(steps, tmp_path / str(steps), monkeypatch) for steps in (4, 12))
    # The log line, an evaluation, a look at health before the save, and the parameters for the summary.
    assert few[0] == many[0] == 4
    assert few[1] == many[1]  # no step adds a read of any kind
    assert few[1] > 4


def test_a_stray_read_would_be_counted(tmp_path, monkeypatch):
    """The planted fault of the test above: one number read after each step."""
    between = loop.Session._between_steps

    def careless(self, *arguments):
        float(self.state.step)
        return between(self, *arguments)

    monkeypatch.setattr(loop.Session, "_between_steps", careless)
    few, many = (count_reads(steps, tmp_path / str(steps), monkeypatch) for steps in (4, 12))
    assert many[1] - few[1] == 8


class NaNAtExample(Classification):
    """A loss that is not a number whenever example 5 is in the batch."""

    def loss(self, outputs, batch):
        loss, parts = super().loss(outputs, batch)
        return loss * jnp.where((batch["index"] == 5).any() & ("target" in batch), jnp.nan, 1.0), parts


def nan_run(tmp_path, policy, steps=8):
    config = tiny.config(
        train__nonfinite=policy,
        train__steps=steps,
        log__example_ids=True,
        log__every_steps=4,
        checkpoint__every_steps=4,
    )
    from training.run.run import feeding

    task = NaNAtExample(config, feeding.open_source(config, config.data.name, "train").info)
    return loop.train(config, tmp_path, task=task, terminal=tiny.quiet())


def test_a_step_that_is_not_finite_stops_the_run_and_names_it(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"step [1-4]: loss or gradient is not finite; gradients not finite in .*(patch_embed|blocks.0)",
    ):
        nan_run(tmp_path, "stop")
    assert not list((tmp_path / "checkpoints").iterdir())  # nothing was saved after it


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path):
    nan_run(tmp_path, "skip")
    assert [row["skipped_steps"] for row in tiny.rows(tmp_path)] == [1, 2]  # once an epoch
    assert all(np.isfinite(row["loss"]) for row in tiny.rows(tmp_path))
    assert all(np.isfinite(value).all() for value in params_of(tmp_path).values())


class Steep(tiny_tasks.Restoration):
    """Finite losses and gradients, of a size that leaves float32 in the update if the batch has one of `examples`."""

    examples = (5,)

    def loss(self, outputs, batch):
        loss, parts = super().loss(outputs, batch)
        return loss * jnp.where(jnp.isin(batch["index"], jnp.asarray(self.examples)).any(), 1e18, 1e-24), parts

    def optimizers(self):
        return {}


class SteepAlways(Steep):
    examples = tuple(range(40))


def overflowing_run(tmp_path, policy, kind, terminal):
    config = tiny.config(
        **tiny.OWN_MODEL,
        **{"data.image_size": 8, "data.batch_size": 8, "data.train_transforms": "", "data.eval_transforms": ""},
        train__nonfinite=policy,
        train__steps=10,
        log__every_steps=4,
        optim__name="sgd",
        optim__learning_rate=1e23,
        optim__weight_decay=0,
        optim__schedule="constant",
    )
    source = tiny_tasks.restoration_source()
    return loop.train(
        config, tmp_path, task=kind(config, source.info), sources={"train": source, "test": source}, terminal=terminal
    )


def test_an_update_that_overflows_is_left_out(tmp_path):
    lines = io.StringIO()
    result = overflowing_run(tmp_path, "skip", Steep, Terminal(lines))
    assert result["skipped_steps"] == 2  # once in an epoch of five steps
    assert all(np.isfinite(value).all() for value in params_of(tmp_path).values())
    assert all(0 < row["loss"] < 1e-20 for row in tiny.rows(tmp_path))
    assert "(2 steps skipped as not finite)" in lines.getvalue()


def test_nothing_but_updates_that_overflow_ends_the_run(tmp_path):
    lines = io.StringIO()
    with pytest.raises(FloatingPointError) as stopped:
        overflowing_run(tmp_path / "skip", "skip", SteepAlways, Terminal(lines))
    assert re.fullmatch(
        r"8 steps in a row, all since step 1, were skipped because they are not finite \(5 are half of the run\). In "
        r"step 1, the first of 8, the update overflows \(loss and gradients are finite\): new parameters not finite "
        r"in [\w., ]+. The parameters are those after step 0; there is no checkpoint. Lower .*",
        str(stopped.value),
    )
    (row,) = tiny.rows(tmp_path / "skip")
    assert (row["loss"], row["grad_norm"], row["skipped_steps"]) == (None, None, 4)
    assert "step 4/10  skipped 4  lr" in lines.getvalue()
    with pytest.raises(FloatingPointError, match=r"^step 1: the update overflows .*conv.*Nothing was saved since"):
        overflowing_run(tmp_path / "stop", "stop", SteepAlways, tiny.quiet())
    assert not list((tmp_path / "stop" / "checkpoints").iterdir())


def test_steps_are_skipped_in_a_row_up_to_a_bound():
    record = healthy(2)
    arguments = dict(loss=jnp.bool_(False), gradients=jnp.zeros(2, bool), update=jnp.bool_(False))
    for step, bad in enumerate([1, 0, 1, 1, 1]):
        record = noted(record, jnp.int32(step), **{**arguments, "loss": jnp.bool_(bad)}, params=jnp.zeros(2, bool))
    assert (int(record["bad_steps"]), int(record["bad_in_a_row"]), int(record["first_bad_step"])) == (4, 3, 0)
    judge = functools.partial(check, record, ("a", "b"), step=5, total_steps=90, skip=True, saved=1)
    judge(most_skipped=4)
    with pytest.raises(FloatingPointError, match=r"^3 steps in a row, all since step 3, .*last checkpoint is step 1"):
        judge(most_skipped=3)


def test_accumulation_takes_the_step_of_the_whole_batch(tmp_path):
    """Mixup too, which mixes the whole batch before it is split."""
    for parts in (1, 4):
        loop.train(
            tiny.config(optim__accumulate=parts, optim__name="sgd", optim__learning_rate=0.1, task__options__mixup=0.8),
            tmp_path / str(parts),
            terminal=tiny.quiet(),
        )
    whole, split = params_of(tmp_path / "1"), params_of(tmp_path / "4")
    for name in whole:
        np.testing.assert_allclose(split[name], whole[name], rtol=0, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(
        [r["loss"] for r in tiny.rows(tmp_path / "1")], [r["loss"] for r in tiny.rows(tmp_path / "4")], rtol=1e-5
    )


def test_a_run_with_an_optimizer_of_optax_resumes_bit_for_bit(tmp_path):
    config = tiny.config(
        **{"data.image_size": 8, "data.batch_size": 8, "data.train_transforms": "", "data.eval_transforms": ""},
        **tiny.OWN_MODEL,
        optim__name="optax:adafactor",
        optim__options={"min_dim_size_to_factor": 3},
        optim__freeze=("gain",),
        optim__clip_norm=1.0,
        optim__ema=0.5,
        checkpoint__every_steps=2,
    )
    source = tiny_tasks.restoration_source()
    task = tiny_tasks.Restoration(config, source.info)
    sources = {"train": source, "test": source}
    loop.train(config, tmp_path, task=task, sources=sources, terminal=tiny.quiet())
    whole = checkpoint.restore_for_eval(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "summary.json").unlink()
    loop.train(config, tmp_path, task=task, sources=sources, terminal=tiny.quiet())
    again, early = checkpoint.restore_for_eval(tmp_path), checkpoint.restore_for_eval(tmp_path, 2)
    for part in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, again[part], whole[part])
    moved = {name for name, value in whole["params"].items() if (value != early["params"][name]).any()}
    assert moved == {"conv.kernel", "conv.bias"}
    assert (whole["params"]["gain"] == 1).all()


def test_a_loss_that_couples_a_batch_is_not_accumulated():
    class Contrastive(tiny_tasks.Restoration):
        couples_batch = True

    source = tiny_tasks.restoration_source()
    config = tiny.config(optim__accumulate=2)
    with pytest.raises(
        ValueError, match=r"^config\.optim\.accumulate=2: the loss of task .*takes accumulate=1"
    ) as refused:
        prepare(config, task=Contrastive(config, source.info), source=source)
    assert "\n" not in str(refused.value)


def test_the_moving_average_follows_the_parameters(tmp_path):
    config = tiny.config(optim__ema=0.5, checkpoint__every_steps=1, checkpoint__keep_last=4, optim__learning_rate=0.01)
    loop.train(config, tmp_path, terminal=tiny.quiet())
    from training.optim.ema import decay_at

    saved = [checkpoint.restore_for_eval(tmp_path, step) for step in (1, 2, 3, 4)]
    name = "head.kernel"
    expected = saved[0]["ema"]["params"][name]
    for step, state in enumerate(saved[1:], start=1):
        decay = float(decay_at(0.5, step))
        expected = decay * expected + (1 - decay) * state["params"][name]
    np.testing.assert_allclose(saved[-1]["ema"]["params"][name], expected, rtol=1e-5)
    assert not np.allclose(saved[-1]["ema"]["params"][name], saved[-1]["params"][name], rtol=1e-5)


def test_a_scanned_run_equals_its_unrolled_twin(tmp_path):
    for scan in (True, False):
        loop.train(
            tiny.config(
                model__scan=scan,
                model__drop_path=0.3,
                model__dropout=0.1,
                optim__name="lamb",
                optim__layer_decay=0.7,
                optim__clip_norm=0.5,
                optim__ema=0.9,
                optim__freeze=("blocks.0.mlp.*",),
            ),
            tmp_path / str(scan),
            terminal=tiny.quiet(),
        )
    scanned, unrolled = params_of(tmp_path / "True"), params_of(tmp_path / "False")
    assert scanned.keys() == unrolled.keys()
    for name in scanned:
        np.testing.assert_allclose(scanned[name], unrolled[name], rtol=0, atol=5e-6, err_msg=name)


def test_init_from_adapts_the_classifier_and_positions(tmp_path, capsys):
    loop.train(tiny.config(), tmp_path / "a", terminal=tiny.quiet())
    config = tiny.config(
        model__init_from=str(tmp_path / "a"),
        data__name="synthetic:classes=7,examples=32,size=24",
        data__image_size=24,
        optim__learning_rate=0.0,
        train__steps=1,
    )
    loop.train(config, tmp_path / "b", terminal=tiny.quiet())
    said = capsys.readouterr().err
    assert "head starts anew: 4 classes there, 7 here" in said
    assert "positions resampled from 2 x 2 to 3 x 3" in said
    before, after = params_of(tmp_path / "a"), params_of(tmp_path / "b")
    np.testing.assert_array_equal(before["blocks.1.attn.qkv.kernel"], after["blocks.1.attn.qkv.kernel"])
    assert after["head.kernel"].shape == (16, 7)
    with pytest.raises(ValueError, match=r"init_from=.*do not fit the model"):
        loop.train(
            tiny.config(
                model__init_from=str(tmp_path / "a"), model__options=dict(patch_size=8, depth=2, width=32, heads=2)
            ),
            tmp_path / "c",
            terminal=tiny.quiet(),
        )
    assert not (tmp_path / "c" / "checkpoints" / "1").exists()


def test_init_from_a_run_says_which_weights_it_takes(tmp_path, capsys):
    loop.train(tiny.config(optim__ema=0.5), tmp_path / "a", terminal=tiny.quiet())
    saved = checkpoint.restore_for_eval(tmp_path / "a")
    capsys.readouterr()
    name = "blocks.1.attn.qkv.kernel"
    assert not np.array_equal(saved["params"][name], saved["ema"]["params"][name])
    for which, part in (("auto", saved["ema"]), ("ema", saved["ema"]), ("raw", saved)):
        config = tiny.config(model__init_from=str(tmp_path / "a"), model__init_weights=which)
        state = prepare(config).initial_state()
        np.testing.assert_array_equal(models.unstack(state.params)[name], part["params"][name])
        taken = "the raw weights are taken, not the averaged ones"
        if which != "raw":
            taken = "the averaged weights are taken, not the raw ones"
        assert f"init_from {tmp_path / 'a'}: {taken}" in capsys.readouterr().err
    loop.train(tiny.config(), tmp_path / "b", terminal=tiny.quiet())
    with pytest.raises(ValueError, match=r"init_weights=ema: it has no moving average \(the run had optim\.ema=0\)$"):
        prepare(tiny.config(model__init_from=str(tmp_path / "b"), model__init_weights="ema")).initial_state()
    prepare(tiny.config(model__init_from=str(tmp_path / "b"), model__init_weights="raw")).initial_state()
    assert "are taken" not in capsys.readouterr().err


def profiled(folder):
    config = tiny.config(train__steps=6, eval__sets=("seen=@train[:16]",), eval__batch_size=6)
    result = loop.train(config, folder, terminal=tiny.quiet(), profile=True)
    assert set(result["metrics"]) == {"test", "seen"}


def test_profile_and_several_evaluation_sets(tmp_path):
    # In a process of its own: JAX's profiler crashes where libtpu has compiled something, as it has in other tests.
    process = multiprocessing.get_context("spawn").Process(target=profiled, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_tasks_of_another_kind_go_through_the_same_loop(tmp_path):
    """Image to image with two optimizers, and image plus text tokens: no line of `training/` knows of them."""
    import tiny_tasks

    for name, make, source in (
        ("restoration", tiny_tasks.Restoration, tiny_tasks.restoration_source()),
        ("question", tiny_tasks.ImageText, tiny_tasks.image_text_source()),
    ):
        config = tiny.config(
            data__batch_size=8,
            data__image_size=8,
            data__train_transforms="",
            data__eval_transforms="",
            train__steps=80,
            optim__learning_rate=0.03,
            log__every_steps=10,
            optim__weight_decay=0.0,
            **tiny.OWN_MODEL,
        )
        result = loop.train(
            config,
            tmp_path / name,
            task=make(config, source.info),
            sources={"train": source, "test": source},
            terminal=tiny.quiet(),
        )
        losses = [row["loss"] for row in tiny.rows(tmp_path / name)]
        assert losses[-1] < 0.7 * losses[0], name
        assert make.best_metric[0] in result["metrics"]["test"]
    gain = params_of(tmp_path / "restoration")["gain"]
    np.testing.assert_array_equal(gain, np.ones(3))  # its optimizer has learning rate 0


def test_overrides_of_a_workdir_stay_in_force(tmp_path, capsys):
    """As a user types it: the first command sets a key, the second does not repeat it."""
    import train

    command = [f"--config={tiny.__file__.replace('tiny.py', 'defaults.py')}", f"--workdir={tmp_path}"]
    values = {k: v for k, v in tiny.TINY.items() if k != "model.options"}
    options = [f"--config.model.options.{k}={v}" for k, v in tiny.TINY["model.options"].items()]
    train.main([*command, *(f"--config.{k}={v}" for k, v in values.items()), *options])
    capsys.readouterr()
    assert train.main(command) == 0
    assert "complete at step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with another configuration \(seed: 0 -> 3\)"):
        train.main([*command, "--config.seed=3"])


def test_a_workdir_goes_on_without_its_configuration_file(tmp_path, capsys):
    import train

    folder = tmp_path / "run"
    loop.train(tiny.config(**tiny.LINEAR), folder, terminal=tiny.quiet(), overrides={"seed": "0"})
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    assert train.main([f"--workdir={folder}", "--config.train.steps=5"]) == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == 5
    assert json.loads((folder / "overrides.json").read_text()) == {"seed": "0", "train.steps": "5"}
    capsys.readouterr()
    assert train.main([f"--workdir={folder}"]) == 0
    assert "complete at step 5" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with another configuration \(seed: 0 -> 3\)"):
        train.main([f"--workdir={folder}", "--config.seed=3"])
    with pytest.raises(ValueError, match=r"config\.optim\.lerning_rate: no such key"):
        train.main([f"--workdir={folder}", "--config.optim.lerning_rate=3"])
    (folder / "config.json").write_text('{"optim": {"rate": 1}}')
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as a configuration of this version \(config"):
        train.main([f"--workdir={folder}"])


def test_a_new_run_needs_a_configuration(tmp_path):
    import train

    (tmp_path / "other").mkdir()
    for name, said in (("other", "holds no run, and a"), ("othr", "is not there; nearest: .*other, and a")):
        with pytest.raises(FileNotFoundError, match=rf"--workdir=\S+{name}: {said} new one needs --config=FILE"):
            train.main([f"--workdir={tmp_path / name}"])
    for arguments in ([], [f"--workdir={tmp_path}", "--sweep=seed=1,2"]):
        with pytest.raises(ValueError, match="--config=FILE is missing, such as --config=quickstart"):
            train.main(arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other"]


# --- evaluations that fail --------------------------------------------------------------------------------------------


class Truncated:
    """A source of which one example cannot be read."""

    def __init__(self, source, classes=None):
        self.source = source
        self.info = dataclasses.replace(source.info, num_classes=classes or source.info.num_classes)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 5:
            raise data.ExampleError("5.png: image file is truncated")
        return self.source[index]


def opened(config, wrap=lambda source: source):
    train, test, seen = (feeding.open_source(config, config.data.name, split) for split in ("train", "test", "train"))
    return {"train": train, "test": wrap(test), "seen": seen}


def test_a_failed_evaluation_stops_the_run_with_its_state_saved(tmp_path):
    """And when the set is mended, the same command goes on from there."""
    config = tiny.config(eval__every_steps=2)
    line = (
        r"^evaluation of test at step 2: 5\.png: image file is truncated; the state of this step is saved, and the "
        r"same command continues \(eval\.on_error=continue goes on without it\)$"
    )
    for _ in range(2):  # a restart does not lose it either
        with pytest.raises(ValueError, match=line.replace("step 2", "step [24]")):
            loop.train(config, tmp_path, terminal=tiny.quiet(), sources=opened(config, Truncated))
        assert (tmp_path / "checkpoints" / "2").exists()
    result = loop.train(config, tmp_path, terminal=tiny.quiet(), sources=opened(config))
    assert result["step"] == 4
    assert set(result["metrics"]) == {"test", "seen"}
    assert "failed_evaluations" not in result
    uninterrupted = loop.train(config, tmp_path / "other", terminal=tiny.quiet(), sources=opened(config))
    assert result["params_sha256"] == uninterrupted["params_sha256"]


@pytest.mark.parametrize(
    ("fault", "code"),
    [(errors.WorkerLost("killed"), errors.MACHINE), (OSError(errno.ENOSPC, "disk full"), errors.MACHINE)],
)
def test_a_fault_of_the_machine_in_an_evaluation_stays_one(fault, code, tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise fault

    monkeypatch.setattr("training.run.evaluations.Evaluations.evaluate", failing)
    with pytest.raises(errors.MachineFault, match="the state of this step is saved") as raised:
        loop.train(tiny.config(eval__every_steps=2), tmp_path, terminal=tiny.quiet())
    assert errors.judge(raised.value)[0] == code


def test_a_failed_evaluation_is_said_and_the_run_goes_on(tmp_path, capsys):
    config = tiny.config(eval__every_steps=2, eval__on_error="continue")
    result = loop.train(config, tmp_path, terminal=Terminal(), sources=opened(config, Truncated))
    assert result["step"] == 4
    assert set(result["metrics"]) == {"seen"}
    assert result["failed_evaluations"] == {"test": "evaluation of test at step 4: 5.png: image file is truncated"}
    assert capsys.readouterr().out.count("the run goes on (eval.on_error=continue)") == 2
    assert checkpoint.restore_for_eval(tmp_path)["metadata"]["metric"] is None


def test_a_set_with_other_classes_is_refused_before_anything_is_written(tmp_path):
    config = tiny.config()
    sources = opened(config, lambda source: Truncated(source, classes=7))
    with pytest.raises(ValueError, match="has 7 classes, the model 4"):
        loop.train(config, tmp_path / "run", terminal=tiny.quiet(), sources=sources)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 5]), (1, [1, 2, 3, 4, 5])])
def test_the_last_step_is_not_evaluated_twice(tmp_path, every, steps):
    loop.train(tiny.config(train__steps=5, eval__every_steps=every), tmp_path, terminal=tiny.quiet())
    assert [row["step"] for row in tiny.rows(tmp_path, "eval/test")] == steps
    assert checkpoint.restore_for_eval(tmp_path)["metadata"]["metric"]["name"] == "top1"


def shades(names, examples=48):
    """Grey images of one shade for each class."""
    labels = np.arange(examples) % len(names)
    images = np.broadcast_to(labels[:, None, None, None] * 60, (examples, 16, 16, 3)).astype(np.uint8)
    columns = {"image": images, "label": labels}
    return data.ArraySource(columns, fields={"image": "image", "label": "label"}, class_names=names)


def test_a_run_goes_on_with_changed_data_only_where_labels_mean_the_same(tmp_path, capsys):
    config = tiny.config(train__steps="2 epochs", checkpoint__every_steps=3, log__every_steps="0")

    def train(source):
        return loop.train(config, tmp_path, terminal=Terminal(), sources={"train": source, "test": shades("abc", 16)})

    assert train(shades("abc"))["step"] == 6

    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    note = (tmp_path / "data.json").rename(tmp_path / "kept.json")
    # Without the note, as for a state of another workdir, the checkpoint says what the labels were.
    with pytest.raises(ValueError, match="step 3: label 0 was 'a' and is 'b' in 'arrays' now"):
        train(shades("bac"))
    note.rename(tmp_path / "data.json")
    capsys.readouterr()
    assert train(shades("Abc", examples=16))["step"] == 6
    assert "began with 48 examples, and its data has 16 now; it goes on to step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "data.json").read_text())["examples"] == 48


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("abcd", "had 3 classes and has 4 now"),
        ("acb", "label 1 was 'b' and is 'c'"),
        ("abd", "label 2 was 'c' and is 'd'"),
        ("ABC", None),
        ("012", None),
    ],
)
def test_labels_keep_their_meaning(names, said):
    before = {"num_classes": 3, "class_names": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        classes.check_same(before, shades(names).info, "--workdir=runs/a")
