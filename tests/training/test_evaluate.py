"""Evaluation: exact over any batch size and number of devices, one host read a set, and the command around it."""

import csv
import html
import json
import os
import re
import shutil
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import simulated
import tiny
import tiny_tasks
from PIL import Image
from scipy.special import log_softmax

import configs
import data
import eval as eval_command
import models
from tasks import base, metrics
from tasks.base import Picture
from training.checkpoints import best, checkpoint
from training.checkpoints.checkpoint_layout import params_sha256
from training.distributed import facts, hostread
from training.evaluation import generate, predict, results, trained
from training.run import command, evaluate, loop
from training.run import sets as eval_sets
from training.run.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = "synthetic:classes=6,examples=50,size=16"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Every command builds the same few functions anew; a compilation cache of this module's own makes that cheap."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of four steps with a moving average and checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = tiny.config(
        data__name=SYNTHETIC,
        optim__ema=0.5,
        optim__learning_rate=3e-3,
        checkpoint__every_steps="2",
        eval__every_steps="2",
    )
    loop.train(config, folder, terminal=tiny.quiet())
    return folder


def model_of(workdir, use_ema=None, **overrides):
    saved = checkpoint.restore_for_eval(workdir)
    return trained.load(saved, configs.from_dict(saved["config"], overrides), use_ema=use_ema)


def run(*arguments):
    return command.guarded(eval_command.main, [str(argument) for argument in arguments])


def test_results_equal_numpy_over_all_examples_and_do_not_depend_on_the_batch_size(workdir):
    results = []
    for size in (7, 64):
        model = model_of(workdir, **{"eval.batch_size": size})
        source = eval_sets.described(model.config)["test"].open()
        assert len(source) % size
        hostread.reads = 0
        results.append(model.evaluate(source))
        assert hostread.reads == 1
    labels = np.array([source[i]["label"] for i in range(len(source))])
    images = np.stack([np.asarray(source[i]["image"]) for i in range(len(source))])
    images = (images / 255.0 - model.config.data.mean) / model.config.data.std
    network = jax.jit(lambda *leaves: models.merge(model.evaluator.graph, *leaves)(images.astype(np.float32)))
    logits = np.asarray(network(model.params, model.model_state), np.float64)
    nll = -log_softmax(logits, 1)[np.arange(len(labels)), labels].mean()
    for found in results:
        assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
        assert found["nll"] == pytest.approx(nll, rel=1e-5)
        assert np.trace(found["confusion"]) == (logits.argmax(1) == labels).sum()
        assert np.sum(found["confusion"]) == len(labels)


def test_the_state_of_the_metrics_is_donated(workdir):
    model = model_of(workdir)
    evaluator = model.evaluator
    batch = next(evaluator._on_device(eval_sets.described(model.config)["test"].open(), complete=True))
    states = evaluator._init()
    evaluator._step(states, model.params, model.model_state, batch, {})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states))


def test_the_command_repeats_what_the_loop_measured(workdir, tmp_path, capsys):
    assert run("--workdir", workdir, f"--config.eval.sets=('seen=@train[:20]', 'more={SYNTHETIC}@test[:5]')") == 0
    said = commands.told(capsys.readouterr().out)
    assert said.splitlines()[0].split()[:3] == ["set", "top1", "top5"]
    summary = json.loads((workdir / "summary.json").read_text())["metrics"]
    test, seen = (json.loads((workdir / "eval" / f"{label}.json").read_text()) for label in ("test", "seen"))
    for name, value in summary["test"].items():
        assert test["results"][name] == pytest.approx(value, rel=1e-5), name
    assert (test["step"], test["weights"], test["examples"]) == (4, "ema", 12)
    assert (seen["split"], seen["examples"]) == ("train[:20]", 20)
    words = html.unescape((workdir / "eval" / "report.html").read_text())
    assert len(words) > 10_000
    expected = checkpoint.restore_for_eval(workdir)
    for name, value in {
        "params_sha256": params_sha256((expected["ema"] or expected)["params"]),
        "weights_from": str(workdir / "checkpoints" / str(test["step"])),
        "commit": facts.commit(),
        "devices": facts.devices(),
    }.items():
        assert test[name] == value
        assert value in words
    assert test["parameters"] == sum(array.size for array in expected["params"].values())
    assert test["command"].startswith(f"python eval.py --workdir {workdir} ")
    assert test["command"] in words
    assert test["config"]["data.image_size"] == 16
    assert run("--workdir", workdir, "--step=2", "--raw", "--output", tmp_path) == 0
    early = json.loads((tmp_path / "test.json").read_text())
    assert (early["step"], early["weights"]) == (2, "raw")
    assert early["results"]["loss"] != test["results"]["loss"]


def test_a_checkpoint_is_evaluated_without_its_workdir_and_writes_nothing(workdir, capsys):
    before = sorted(workdir.rglob("*"))
    assert run("--checkpoint", workdir / "checkpoints" / "2") == 0
    assert "top1" in capsys.readouterr().out
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.slow
def test_four_devices_give_the_same_results(workdir, tmp_path):
    simulated.run(4, "eval.py", f"--workdir={workdir}", f"--output={tmp_path}", "--config.mesh.fsdp=2")
    one = model_of(workdir)
    expected = one.evaluate(eval_sets.described(one.config)["test"].open())
    found = json.loads((tmp_path / "test.json").read_text())["results"]
    assert found["confusion"] == expected["confusion"]
    for name, value in evaluate.scalars(expected).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_predictions_of_a_folder(workdir, tmp_path, capsys):
    random = np.random.default_rng(0)
    images = tmp_path / os.fsdecode(b"im\xe1ges")
    (images / "more").mkdir(parents=True)
    for name in (b"b.png", b"a.png", b"more/\xf1.png"):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(images / os.fsdecode(name))
    assert run("--workdir", workdir, f"--predict={images}", "--output", tmp_path / "out") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open(encoding="utf-8")))
    assert [row["file"] for row in rows] == ["a.png", "b.png", "more/\\xf1.png"]
    assert list(rows[0])[:5] == ["file", "class", "probability", "top2", "probability2"]
    probabilities = [float(rows[0]["probability"]), *(float(rows[0][f"probability{k}"]) for k in range(2, 6))]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 1 / 6 < probabilities[0] <= 1
    (images / "d.png").write_bytes(b"")
    assert run("--workdir", workdir, f"--predict={images}", "--output", tmp_path / "no") == 2
    assert "d.png" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(images / "d.png")  # white of 12 bits, in 16
    again = ["--workdir", workdir, f"--predict={images}", "--output", tmp_path / "deep"]
    assert run(*again) == 2
    assert "d.png: mode I;16 with values from 4095 to 4095" in capsys.readouterr().err
    Image.new("L", (16, 16), 255).save(images / "e.png")
    assert run(*again, "--config.data.pixel_range=0,4095") == 0
    white = list(csv.DictReader((tmp_path / "deep" / "predictions.csv").open(encoding="utf-8")))[2:4]
    assert [row.pop("file") for row in white] == ["d.png", "e.png"]
    assert white[0] == white[1]


def test_pictures_of_files_that_are_named_alike_are_all_kept(tmp_path):
    pictures, kept = predict._Pictures(tmp_path), []
    for value, file in enumerate(("a/b.png", "a_b.png", "a/b.jpg")):
        made = {"mask": Picture(np.full((2, 2), value, np.uint8))}
        kept.append(pictures.kept(file, made)["mask"])
    pictures.finish()
    assert [np.asarray(Image.open(tmp_path / name)).max() for name in kept] == [0, 1, 2]


def test_a_report_on_a_folder_whose_name_is_not_utf8(workdir, tmp_path):
    model = model_of(workdir, **{"data.name": "folder:" + os.fsdecode(b"s\xe9t")})
    files = results.write(tmp_path, model, {}, {}, None)
    assert [file.name for file in files] == ["report.html"]
    assert "s\\udce9t" in files[0].read_text(encoding="utf-8")


def test_what_to_know_of_evaluation_sets_is_said(tmp_path):
    """Which split chooses the checkpoints where there are two to choose on, and which classes a set lacks."""
    for split, classes in (("train", "abc"), ("val", "abc"), ("test", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")

    def notes(**overrides):
        config = tiny.config(data__name=f"folder:{tmp_path}", **overrides)
        return eval_sets.notes(config, {label: one.open() for label, one in eval_sets.described(config).items()})

    lacks, chosen = notes()
    assert lacks.endswith("has no image of 1 of 3 classes: b")
    assert "chosen on the split 'test'" in chosen
    assert "--config.data.eval_split=val" in chosen
    assert len(notes(checkpoint__keep_best=0)) == 1
    assert notes(data__eval_split="val") == []
    assert eval_sets.notes(tiny.config(), {"test": eval_sets.first(tiny.config())}) == []


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Eight images of six classes, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("broken")
    for index in range(8):
        path = folder / "test" / f"grating {index % 6}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * index, 0, 0)).save(path)
        if index in (2, 7):
            path.write_bytes(b"x")
    return folder


def test_what_is_left_out_is_said_everywhere(workdir, broken, tmp_path, capsys):
    place = [f"--config.data.name=folder:{broken}", "--config.data.on_error=replace", "--config.eval.batch_size=3"]
    assert run("--workdir", workdir, *place, "--output", tmp_path) == 0
    said = commands.told(capsys.readouterr().out)
    assert said.splitlines()[0].split()[-1] == "left_out"
    assert said.splitlines()[1].split()[-1] == "2"
    assert re.search(
        r"test: 2 of 8 examples left out \(config.data.on_error=replace\), the first: cannot decode .*png", said
    )
    found = json.loads((tmp_path / "test.json").read_text())
    assert (found["examples"], found["results"]["left_out"]) == (6, 2)
    assert sorted(Path(why.split(": ")[0]).name for why in found["results"]["left_out_reasons"]) == ["2.png", "7.png"]
    assert np.sum(found["results"]["confusion"]) == 6
    report = (tmp_path / "report.html").read_text()
    assert "test: 6 of 8 examples" in report
    assert "2.png: not an image" in report


def test_images_without_a_prediction_have_a_line_that_says_why(workdir, broken, tmp_path, capsys):
    options = ["--config.data.on_error=replace", f"--predict={broken}", "--config.eval.batch_size=3"]
    assert run("--workdir", workdir, *options, "--output", tmp_path) == 0
    assert "2 of 8 examples left out" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert {Path(row["file"]).name for row in rows if row["left_out"]} == {"2.png", "7.png"}
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    assert all(row["file"] in row["left_out"] for row in rows if row["left_out"])
    assert all(bool(row["class"]) != bool(row["left_out"]) for row in rows)
    assert len(rows) == 8


def test_a_run_says_what_its_evaluation_left_out(broken, tmp_path, capsys):
    train = tmp_path / "data"
    shutil.copytree(broken / "test", train / "train")
    shutil.copytree(broken / "test", train / "test")
    config = tiny.config(data__name=f"folder:{train}", data__on_error="replace", data__batch_size=8, train__steps=1)
    result = loop.train(config, tmp_path / "run", terminal=Terminal())
    said = capsys.readouterr().out
    assert "step 1 eval test: 2 of 8 examples left out (config.data.on_error=replace), the first: cannot decode" in said
    assert "2 training examples were replaced" in said
    assert result["metrics"]["test"]["left_out"] == 2
    assert result["data_replaced"] == 2
    assert tiny.rows(tmp_path / "run", "eval/test")[0]["left_out"] == 2


def test_another_image_size_than_in_training(workdir, tmp_path, capsys):
    """Positions are resampled; where only the transforms change, it is said."""
    assert run("--workdir", workdir, "--config.data.image_size=32", "--output", tmp_path) == 0
    assert "positions resampled from 2 x 2 to 4 x 4" in (said := capsys.readouterr().err)
    assert "is 16x16 after config.data.eval_transforms, where config.data.image_size asks for 32x32" in said
    options = ["--config.data.image_size=32", "--config.data.eval_transforms=resize({size})|normalize"]
    assert run("--workdir", workdir, *options, "--output", tmp_path) == 0
    assert "where config.data.image_size" not in capsys.readouterr().err


class Drawing(tiny_tasks.MeanBrightness):
    """Everything random there is, in an evaluation and in samples."""

    def forward(self, model, batch, *, train, key, partners):
        return {"draw": jax.vmap(jax.random.uniform)(key)}

    def metrics(self):
        return {"draw": metrics.mean(lambda outputs, batch: outputs["draw"])}

    def predictions(self, outputs, batch):
        return outputs

    def generate(self, model, batch, key, partners):
        return {"sample": jax.vmap(lambda own: jax.random.normal(own, 2))(key)}


def test_draws_belong_to_the_example_and_not_to_the_batch(monkeypatch, tmp_path):
    monkeypatch.setitem(base._REGISTRY, "drawing", Drawing)
    source = data.open_source(SYNTHETIC, "train[:20]")
    found = []
    for size in (8, 5):
        config = tiny.config(data__name=SYNTHETIC, task__name="drawing", eval__batch_size=size)
        model = trained.load(None, config, info=source.info)
        draws = list(model.evaluator.predict({}, {}, source))
        samples = generate.generate(model, source, 23, tmp_path / f"{size}.npz")
        found.append((model.evaluate(source), np.concatenate([part["draw"] for part in draws]), np.load(samples)))
    (first, draws, samples), (second, other, others) = found
    np.testing.assert_array_equal(draws, other)
    assert len(np.unique(draws)) == 20
    assert first["draw"] == pytest.approx(draws.mean(), rel=1e-6)
    assert second["draw"] == pytest.approx(first["draw"], rel=1e-6)
    np.testing.assert_array_equal(samples["sample"], others["sample"])
    np.testing.assert_array_equal(samples["index"], np.arange(23) % 20)  # as many as asked for, of a set with fewer
    assert len(np.unique(samples["sample"])) == 46
    elsewhere = model.evaluate(data.open_source(SYNTHETIC, "train[20:40]"))
    assert elsewhere["draw"] != pytest.approx(first["draw"], rel=1e-6)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"label": "a"}, "'a': needs a label .* and a split"),
        ({"split": "test"}, "needs a label"),
        ({"label": "a", "split": "test", "transform": "flip"}, "'a': unknown key 'transform'; nearest: 'transforms'"),
        ({"label": "a", "split": "test", "options": {"k": 1}}, r"config\.task\.options\.k: no such key"),
        ({"label": "a", "split": "test", "options": 3}, "'a': options takes options of the task"),
        ({"label": "a", "split": "test", "batch_size": "many"}, r"'a': config\.eval\.batch_size='many'"),
        ({"label": "a", "split": "test", "every_steps": "soon"}, "'a': "),
        ({"label": "a", "split": "test", "fit": "train"}, "'a': fit: 'train' is not 'source@split'"),
    ],
)
def test_an_impossible_set_of_a_file_is_named(entry, said, workdir):
    with pytest.raises(ValueError, match=said):
        model_of(workdir, **{"eval.sets": (entry,)}).evaluations()


def test_a_set_has_transforms_a_batch_size_and_a_period_of_its_own(workdir):
    own = {"label": "own", "split": "test", "transforms": "resize(16)|normalize", "batch_size": 7, "every_steps": 3}
    model = model_of(workdir, **{"eval.sets": ("more=@test[:5]", own)})
    evaluations = model.evaluations()
    assert list(evaluations.sources) == ["test", "more", "own"]
    results = {label: evaluations.evaluate(label, model.params, model.model_state) for label in ("test", "own")}
    assert results["own"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-5)  # other batches
    due = [evaluations.due(step, 8, 4, lambda duration: int(str(duration))) for step in range(1, 9)]
    assert due == [[], [], ["own"], ["test", "more"], [], ["own"], [], ["test", "more", "own"]]
    evaluations.close()


@pytest.mark.parametrize(
    ("entry", "said"),
    [("seen", "label=source@split"), ("test=@train", "used twice"), ("a/b=@train", "label=source@split")],
)
def test_an_impossible_set_is_named(entry, said):
    with pytest.raises(ValueError, match=said):
        eval_sets.described(tiny.config(eval__sets=(entry,)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--workdir=FOLDER is missing"),
        (["--workdir=nowhere"], "nowhere"),
        (["--step=3"], "available: 2, 4"),
        (["--step=2", "--best"], "--best: not allowed with argument --step"),
        (
            ["--config.data.eval_transforms=resize(12)|normalize"],
            "is 12x12 after config.data.eval_transforms, and this",
        ),
        (["--config.eval.sets=other=synthetic:classes=7@test"], "7 classes, the model 6"),
        (["--config.model.options.width=32"], "do not fit"),
        (["--output=/proc/nowhere"], "/proc"),
        (["--predict=nowhere"], "nowhere does not exist"),
        (["--config.eval.batchsize=3"], "batch_size"),
        (["--config.optim.learning_rate=1"], "config.optim.learning_rate: an evaluation does not read it"),
        (["--config.eval.fit=@train"], "has no use for a set that is seen before"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(workdir, capsys, arguments, said):
    if arguments and "--workdir=nowhere" not in arguments:
        arguments = [f"--workdir={workdir}", *arguments]
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_the_best_checkpoint_is_chosen_by_its_metric(workdir, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    for scores, chosen in (({2: 0.9, 4: 0.1}, 2), ({2: 0.3, 4: 0.3}, 4), ({2: 0.3, 4: float("nan")}, 2)):
        for step, value in scores.items():
            (folder / "checkpoints" / str(step) / "metric.json").write_text(
                json.dumps({"name": "top1", "value": value})
            )
        assert best.step(folder) == chosen
        assert f"best of 2 checkpoints by top1: step {chosen}" in capsys.readouterr().err
    assert run(f"--workdir={folder}", "--best", f"--output={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "test.json").read_text())["step"] == 2
    (folder / "checkpoints" / "4" / "metric.json").unlink()
    assert best.step(folder) == 2
    assert capsys.readouterr().err.endswith("(0.3); 1 were not measured\n")
    (folder / "checkpoints" / "2" / "metric.json").write_text('{"name": "loss", "value": 0.1}')
    assert run(f"--workdir={folder}", "--best") == 2
    assert re.search(r"--best: no checkpoint of \S+ was measured; --step=N takes one of 2, 4$", capsys.readouterr().err)
    assert best.ranked({1: 2.0, 2: 1.0, 3: float("nan")}, "min") == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--best"], "--best: needs --workdir=FOLDER"),
        (["--best", "--checkpoint=w.npz", "--config=quickstart"], "--best: --checkpoint=w.npz is a file of weights"),
    ],
)
def test_the_best_is_one_of_several(arguments, said, capsys):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_averages_has_no_ema(workdir):
    saved = {**checkpoint.restore_for_eval(workdir), "ema": None}
    config = configs.from_dict(saved["config"])
    with pytest.raises(ValueError, match=r"optim\.ema=0"):
        trained.load(saved, config, use_ema=True)
    assert trained.load(saved, config).weights == "raw"


def test_a_task_that_never_trains_runs_under_eval(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(base._REGISTRY, "mean_brightness", tiny_tasks.MeanBrightness)
    config = tmp_path / "brightness.py"
    config.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.task.name, config.data.name = 'mean_brightness', {SYNTHETIC!r}\n"
        "    config.data.image_size, config.data.batch_size = 16, 16\n"
        "    config.data.eval_transforms = 'value_range(0, 1)'\n    return config\n"
    )
    assert run(f"--config={config}", f"--output={tmp_path / 'out'}") == 0
    source = data.open_source(SYNTHETIC, split="test")
    expected = np.mean([np.asarray(source[i]["image"]).mean() / 255 for i in range(len(source))])
    found = json.loads((tmp_path / "out" / "test.json").read_text())["results"]
    assert found == {"brightness": pytest.approx(expected, rel=1e-5)}
    monkeypatch.setattr(tiny_tasks.MeanBrightness, "trains", True)
    assert run(f"--config={config}") == 2
    assert "has to be trained first" in capsys.readouterr().err


def test_a_generative_task_writes_its_samples(tmp_path, monkeypatch, capsys):
    class Noise(tiny_tasks.MeanBrightness):
        def generate(self, model, batch, key, partners):
            noise = jax.vmap(lambda own: jax.random.normal(own, 2))(key)
            return {"sample": noise, "brightness": partners["meter"](batch["image"])}

    monkeypatch.setitem(base._REGISTRY, "noise", Noise)
    config = tmp_path / "noise.py"
    config.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.task.name, config.data.name = 'noise', {SYNTHETIC!r}\n"
        "    config.data.image_size, config.data.batch_size = 16, 8\n"
        "    config.data.eval_transforms = 'value_range(0, 1)'\n    return config\n"
    )
    assert run(f"--config={config}", f"--output={tmp_path / 'out'}", "--generate=11") == 0
    found = np.load(tmp_path / "out" / "generated.npz")
    assert found["sample"].shape == (11, 2)
    assert len(np.unique(found["sample"])) == 22  # every batch has a key of its own
    np.testing.assert_array_equal(found["index"], np.arange(11))
    source = data.open_source(SYNTHETIC, split="test")
    np.testing.assert_allclose(found["brightness"][10], np.asarray(source[10]["image"]).mean() / 255, rtol=1e-5)
    monkeypatch.setattr(Noise, "generate", tiny_tasks.MeanBrightness.generate)
    assert run(f"--config={config}", f"--output={tmp_path / 'out'}", "--generate=1") == 2
    assert "does not generate" in capsys.readouterr().err


def test_a_set_that_lacks_a_field_is_refused(workdir):
    source = data.ArraySource({"image": np.zeros((2, 16, 16, 3), np.uint8)}, fields={"image": "image"}, num_classes=6)
    with pytest.raises(ValueError, match="no field 'label'"):
        model_of(workdir).evaluate(source)


def renamed(source, names, order):
    """The source with named classes whose numbers are changed: class `order[i]` becomes class i."""
    labels = np.argsort(order)[[source[i]["label"] for i in range(len(source))]]
    images = np.stack([np.asarray(source[i]["image"]) for i in range(len(source))])
    fields = {"image": "image", "label": "label"}
    return data.ArraySource({"image": images, "label": labels}, fields=fields, class_names=[names[i] for i in order])


def test_classes_of_a_set_are_found_by_name(workdir):
    saved = checkpoint.restore_for_eval(workdir)
    saved["metadata"]["info"]["class_names"] = list("abcdef")
    model = trained.load(saved, configs.from_dict(saved["config"]))
    source = renamed(eval_sets.described(model.config)["test"].open(), "abcdef", range(6))
    order = [2, 0, 1, 5, 4, 3]
    expected, found = model.evaluate(source), model.evaluate(renamed(source, "abcdef", order))
    assert found["confusion"] == expected["confusion"]
    assert found["top1"] == expected["top1"]
    assert model.task.mismatch(source) == ""
    other = renamed(source, "ABCDEF", order)
    assert model.task.mismatch(other) == "the same classes in another order, matched by name"
    with pytest.raises(ValueError, match="'arrays' has 6 classes, the model 6, and 'g' is not among 'a', 'b'"):
        model.evaluate(renamed(source, "abcdeg", order))
