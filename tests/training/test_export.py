"""A model taken elsewhere: as one function that JAX alone runs, and as weights that the commands take back."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import mlir
from torch_writer import saved

import eval as eval_command
import models
from models.core import export as inference_export
from models.core.export import export_inference
from models.weights.files import read_weights
from training.checkpoints import checkpoint
from training.checkpoints.checkpoint_layout import params_sha256
from training.distributed import facts
from training.evaluation import export
from training.run import command, loop
from training.run.run import prepare

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (16, 24, 3)


def images(count, shape=SHAPE):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def vit(**options):
    options = dict(patch_size=8, depth=2, width=16, heads=2, num_classes=5, image_size=SHAPE[:2]) | options
    return models.create("vit_mu16", **options, rngs=nnx.Rngs(0))


# The function.


class Normed(nnx.Module):
    """A model with state besides its parameters, and with what is done to its sum of images."""

    def __init__(self, after=lambda x: x):
        self.scale = nnx.Param(jnp.arange(3.0))
        self.mean = nnx.BatchStat(jnp.asarray([0.5, -1.0, 2.0]))
        self.after = after

    def __call__(self, images):
        return self.after((images - self.mean[...]).sum((1, 2)) * self.scale[...])


# An operation without a form for accelerators.
cpu_only = Primitive("cpu_only")
cpu_only.def_abstract_eval(lambda x: x)
mlir.register_lowering(cpu_only, lambda context, x: [x], platform="cpu")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "model",
    [
        vit(),
        vit(scan=False, pool="avg"),
        vit(pool="map", class_token=False),
        vit(distillation_token=True),
        vit(dtype=jnp.bfloat16),
        Normed(),
    ],
    ids=["scanned", "unrolled", "map", "distilled", "bfloat16", "with state"],
)
def test_the_function_gives_the_models_logits_for_any_batch(model):
    content = export_inference(model, SHAPE).serialize()
    function = jax.export.deserialize(content)
    assert function.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 3):
        expected = jax.jit(lambda x: model(x))(images(count))
        found = function.call(images(count))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.ptp(expected))
        assert np.ptp(expected) > 0


def test_the_function_is_lowered_for_each_platform_and_runs_here():
    for platform in inference_export.PLATFORMS:
        assert export_inference(vit(), SHAPE, [platform]).platforms == (platform,)
    function = export_inference(vit(), SHAPE, ["tpu"])
    with pytest.raises(ValueError, match="cpu"):
        function.call(images(1))


def test_weights_are_part_of_the_function():
    model = vit()
    _, params, _ = models.split(model)
    size = sum(leaf.nbytes for leaf in params.values())
    content = export_inference(model, SHAPE, ["cpu"]).serialize()
    assert size < len(content) < size + 200_000
    before = jax.export.deserialize(content).call(images(2))
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    np.testing.assert_array_equal(jax.export.deserialize(content).call(images(2)), before)


@pytest.mark.parametrize(
    ("make", "shape", "platforms", "said"),
    [
        (vit, (16, 16), ["cpu"], r"inputs=\(16, 16\): takes \(height, width, channels\)"),
        (vit, (16, 0, 3), ["cpu"], r"inputs=\(16, 0, 3\)"),
        (vit, (16, 20, 3), ["cpu"], "16 x 20 is not divisible"),
        (vit, (16, 24, 1), ["cpu"], "1 channels for a model of 3"),
        (vit, SHAPE, ["gpu"], "unknown platform 'gpu'.*allowed: cpu, cuda, tpu"),
        (vit, SHAPE, [], "name at least one of cpu, cuda, tpu"),
        (lambda: nnx.eval_shape(vit), SHAPE, ["cpu"], "without weights cannot be exported: .* is only a shape"),
        (lambda: Normed(lambda x: x[: 2 if x.shape[0] > 3 else 1]), SHAPE, ["cpu"], "for cpu and any batch"),
        (lambda: Normed(cpu_only.bind), SHAPE, ["cpu", "tpu"], "for cpu, tpu and any batch: .*cpu_only"),
    ],
)
def test_what_cannot_be_exported_is_a_value_error(make, shape, platforms, said):
    with pytest.raises(ValueError, match=said):
        export_inference(make(), shape, platforms)


def test_more_weights_than_a_file_holds_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(inference_export, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"the weights take 0\.00 GiB, a function .* at most 0\.00 GiB"):
        export_inference(vit(), SHAPE)


# The commands.


def run(*arguments):
    return command.guarded(eval_command.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    loop.train(tiny.config(optim__ema=0.5, optim__learning_rate=3e-3), folder, terminal=tiny.quiet())
    return folder


@pytest.fixture(scope="module")
def exported(workdir):
    assert run(f"--workdir={workdir}", f"--export={workdir.parent / 'exported'}") == 0
    return workdir.parent / "exported"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment file of the tiny run: its command line has no workdir to take a configuration from."""
    path = tmp_path_factory.mktemp("configs") / "tiny_run.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    for key, value in {tiny.TINY!r}.items():\n"
        "        group, name = key.split('.')\n        config[group][name] = value\n    return config\n"
    )
    return path


def logits_of(flat, state, config, count):
    options = dict(config["model"]["options"])
    model = models.create("vit_mu16", **options, image_size=16, num_classes=4, rngs=nnx.Rngs(1))
    graph, params, _ = models.split(model)
    return models.merge(graph, models.stack(flat, like=params), state)(images(count, (16, 16, 3)))


@pytest.mark.smoke
def test_the_command_writes_the_averaged_model(workdir, exported):
    about = json.loads((exported / "export.json").read_text())
    run_of = checkpoint.restore_for_eval(workdir)
    assert sorted(os.listdir(exported)) == ["export.json", "inference.stablehlo", "weights.safetensors"]
    assert sorted(about["files"]) == ["inference.stablehlo", "weights.safetensors"]
    assert (about["model"], about["step"], about["weights"]) == ("vit_mu16", 4, "ema")
    assert about["params_sha256"] == params_sha256(run_of["ema"]["params"])
    assert about["input"]["shape"] == [None, 16, 16, 3]
    assert about["input"]["transforms"] == "normalize"
    assert about["input"]["mean"] == run_of["config"]["data"]["mean"]
    assert about["num_classes"] == 4
    assert (about["commit"], about["versions"]) == (facts.commit(), facts.versions())
    function = jax.export.deserialize((exported / "inference.stablehlo").read_bytes())
    for count in (1, 5):
        expected = logits_of(run_of["ema"]["params"], {}, run_of["config"], count)
        np.testing.assert_allclose(function.call(images(count, (16, 16, 3))), expected, rtol=1e-5, atol=1e-6)
    known = eval(about["check"]["input"], {"numpy": np})
    np.testing.assert_allclose(function.call(known), about["check"]["output"], rtol=1e-5, atol=1e-6)
    weights = read_weights(exported / "weights.safetensors")
    assert "blocks.1.attn.qkv.weight" in weights
    np.testing.assert_array_equal(weights["head.weight"].T, run_of["ema"]["params"]["head.kernel"])


def check_places(folder, workdir):
    """No file of the folder names a place on this disk."""
    places = [ROOT, Path(sys.prefix), Path(np.__file__).parents[1], Path.home(), workdir.parent, Path.cwd()]
    for file in folder.iterdir():
        content = file.read_bytes()
        found = [place for place in places if len(place.parts) > 1 and str(place).encode() in content]
        assert not found, (file.name, found)
        assert not re.search(rb"\w\.py\b", content), file.name


def test_no_file_names_a_place_on_this_disk(workdir, exported):
    check_places(exported, workdir)
    # What is lowered elsewhere keeps its places: they are in tracebacks and profiles.
    assert __file__.encode() in jax.export.export(jax.jit(lambda x: jnp.sin(x)))(1.0).serialize()


def test_the_command_writes_an_onnx_file(workdir, tmp_path, capsys):
    pytest.importorskip("onnx", reason="needs the onnx extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    assert run(f"--workdir={workdir}", f"--export={tmp_path}", "--export_format=onnx") == 0
    said = capsys.readouterr().err
    assert re.search(r"inference\.onnx: onnxruntime's outputs are \d\.\de-0[5-9] of the largest from", said), said
    about = json.loads((tmp_path / "export.json").read_text())
    assert about["files"] == ["inference.onnx", "weights.safetensors"]
    assert (about["opset"], about["onnxruntime_difference"] < 1e-4) == (18, True)
    session = runtime.InferenceSession(tmp_path / "inference.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": eval(about["check"]["input"], {"numpy": np})})
    np.testing.assert_allclose(logits, about["check"]["output"], rtol=1e-4, atol=1e-5)
    check_places(tmp_path, workdir)


def test_raw_weights_on_request(workdir, tmp_path):
    assert run(f"--workdir={workdir}", f"--export={tmp_path}", "--raw") == 0
    about = json.loads((tmp_path / "export.json").read_text())
    assert (about["weights"], about["params_sha256"]) == (
        "raw",
        params_sha256(checkpoint.restore_for_eval(workdir)["params"]),
    )


def test_a_model_without_a_table_is_exported_without_weights(workdir, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **names):
        raise ValueError("no table of weights for family 'x'")

    monkeypatch.setattr(models, "export_weights", refuse)
    assert run(f"--workdir={workdir}", f"--export={tmp_path}") == 0
    assert "weights.safetensors is left out: no table" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["export.json", "inference.stablehlo"]
    assert json.loads((tmp_path / "export.json").read_text())["files"] == ["inference.stablehlo"]


def test_an_absent_package_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--workdir=nowhere", f"--export={tmp_path / 'out'}", "--export_format=onnx") == 2
    said = "error: --export_format=onnx: needs the package onnx (pip install onnx onnxruntime)"
    assert capsys.readouterr().err.strip() == said
    assert not (tmp_path / "out").exists()


def test_what_the_command_cannot_export_is_said(tmp_path, monkeypatch):
    of_text = SimpleNamespace(config=tiny.config(task__name="captions"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="--export: run it in one process; there are 2"):
        export.export(of_text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def weights_as(kind, exported, folder):
    """The exported weights in another format."""
    arrays = read_weights(exported / "weights.safetensors")
    if kind == "safetensors":
        return exported / "weights.safetensors"
    if kind == "npz":
        np.savez(folder / "weights.npz", **arrays)
        return folder / "weights.npz"
    return saved(folder / "weights.pth", {"model": arrays, "epoch": 3})


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pth"])
def test_a_file_of_weights_is_evaluated_like_its_run(workdir, exported, experiment, tmp_path, capsys, kind):
    file = weights_as(kind, exported, tmp_path)
    if kind == "safetensors":  # says itself what images go through, whatever the configuration does
        other = tmp_path / "other.py"
        changes = "config.data.eval_transforms, config.data.mean = 'resize(9)|resize({size})|normalize', (0.1,) * 3"
        other.write_text(experiment.read_text().replace("    return config", f"    {changes}\n    return config"))
        experiment = other
    assert run(f"--checkpoint={file}", f"--config={experiment}", f"--output={tmp_path / 'out'}") == 0
    said = f"{file}: images as {'its header' if kind == 'safetensors' else 'the configuration'} says: normalize, mean"
    assert said in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "test.json").read_text())
    expected = json.loads((workdir / "summary.json").read_text())["metrics"]["test"]
    for name, value in expected.items():
        assert found["results"][name] == pytest.approx(value, rel=1e-5), name
    assert (found["step"], found["weights"]) == (0, "raw")


def test_a_file_of_weights_is_exported_again(exported, experiment, tmp_path):
    file = exported / "weights.safetensors"
    assert run(f"--checkpoint={file}", f"--config={experiment}", f"--export={tmp_path}") == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == file.read_bytes()


def two_sets(exported, folder, names=("model", "model_ema")):
    """A training checkpoint with the exported weights and, as their average, others; `(file, average)`."""
    arrays = read_weights(exported / "weights.safetensors")
    average = {name: array[::-1] for name, array in arrays.items()}
    return saved(folder / "train.pth", {**dict(zip(names, (arrays, average), strict=True)), "epoch": 3}), average


def test_of_two_sets_of_weights_the_flags_choose_one(workdir, exported, experiment, tmp_path, capsys):
    file, average = two_sets(exported, tmp_path)
    command_line = [f"--checkpoint={file}", f"--config={experiment}"]
    assert run(*command_line) == 2
    said = capsys.readouterr().err.strip()
    holds = r"train\.pth holds several sets of weights: model \(raw\), model_ema \(averaged\); choose by --raw or --ema"
    assert re.fullmatch(rf"error: \S*{holds}", said), said
    results = {}
    # The configuration's `eval.use_ema` chooses in workdirs only.
    for which, options in (("raw", []), ("ema", ["--config.eval.use_ema=false"])):
        assert run(*command_line, f"--{which}", f"--output={tmp_path / which}", *options) == 0
        taken = "the averaged weights below model_ema" if which == "ema" else "the weights below model"
        assert f"train.pth: {taken} are taken, not those below model" in capsys.readouterr().err
        found = json.loads((tmp_path / which / "test.json").read_text())
        assert found["weights"] == which
        results[which] = found["results"]
    expected = json.loads((workdir / "summary.json").read_text())["metrics"]["test"]
    assert results["raw"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    np.savez(tmp_path / "average.npz", **average)
    assert run(f"--checkpoint={tmp_path / 'average.npz'}", f"--config={experiment}", f"--output={tmp_path / 'o'}") == 0
    alone = json.loads((tmp_path / "o" / "test.json").read_text())
    assert (alone["weights"], alone["results"]["loss"]) == ("raw", pytest.approx(results["ema"]["loss"], rel=1e-6))


def test_the_exported_set_is_the_chosen_one(exported, experiment, tmp_path):
    file, average = two_sets(exported, tmp_path, ("student", "teacher"))
    assert run(f"--checkpoint={file}", f"--config={experiment}", "--ema", f"--export={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["weights"] == "ema"
    for name, array in read_weights(tmp_path / "out" / "weights.safetensors").items():
        np.testing.assert_array_equal(array, average[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=FILE"], "a file of weights has no configuration; give --config=FILE"),
        (["--checkpoint=FILE", "--config=CONFIG", "--step=3"], "--step=3: .* a file of weights, which has no steps"),
        (["--checkpoint=weights.pth", "--config=CONFIG"], "no file of weights weights.pth"),
        (["--workdir=WORKDIR", "--export=a", "--output=b"], "--export and --output: give one of them"),
        (["--workdir=WORKDIR", "--export_format=onnx"], "--export_format: needs --export=FOLDER"),
        (
            ["--workdir=WORKDIR", "--export=a", "--export_format=onx"],
            "unknown format 'onx'; nearest: 'onnx'; allowed: ",
        ),
        (["--checkpoint=CONFIG", "--config=CONFIG"], "not a file of weights by its name; known are .safetensors"),
        (["--checkpoint=DAMAGED", "--config=CONFIG"], "damaged.pth: cannot be read as PyTorch weights"),
        (["--checkpoint=FILE", "--config=CONFIG", "--config.model.options.width=32"], "do not fit the model"),
        (
            ["--checkpoint=UNNAMED", "--config=CONFIG", "--config.data.name=synthetic:classes=3,examples=8,size=16"],
            "4 classes in the file and 3 here",
        ),
        (
            ["--checkpoint=FILE", "--config=CONFIG", "--config.data.name=synthetic:classes=5,examples=8,size=16"],
            "has 5 classes, the model 4, and 'grating 4' is not among 'grating 0'",
        ),
        (
            ["--checkpoint=FILE", "--config=CONFIG", "--ema"],
            r"--ema: \S*weights.safetensors has no moving average by its names; it holds one set of weights \(raw\)$",
        ),
        (
            ["--checkpoint=EMA", "--config=CONFIG", "--raw"],
            r"--raw: \S*ema.pth has no raw weights .* ema \(averaged\)$",
        ),
        (["--checkpoint=NAN", "--config=CONFIG"], r"nan.pth: norm.bias holds NaN or infinity$"),
        (["--workdir=WORKDIR", "--export=DAMAGED"], r"--export=.*damaged\.pth: cannot be written"),
    ],
)
def test_bad_input_is_one_line(workdir, exported, experiment, tmp_path, capsys, arguments, said):
    (tmp_path / "damaged.pth").write_bytes(b"PK" + bytes(50))
    arrays = read_weights(exported / "weights.safetensors")
    names = {
        "FILE": exported / "weights.safetensors",
        "CONFIG": experiment,
        "WORKDIR": workdir,
        "DAMAGED": tmp_path / "damaged.pth",
        "UNNAMED": saved(tmp_path / "unnamed.pth", arrays),
        "EMA": saved(tmp_path / "ema.pth", {"ema": arrays}),
        "NAN": saved(tmp_path / "nan.pth", arrays | {"norm.bias": np.full(16, np.nan, np.float32)}),
    }
    for name, path in names.items():
        arguments = [re.sub(rf"={name}$", f"={path}", argument) for argument in arguments]
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(said, error), error
    assert len(error.splitlines()) == 1


# Fine-tuning.


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pth"])
def test_a_run_starts_from_a_file_of_weights(exported, tmp_path, capsys, kind):
    file = weights_as(kind, exported, tmp_path)
    config = tiny.config(
        model__init_from=str(file), data__name="synthetic:classes=6,examples=64,size=32", data__image_size=32
    )
    state = prepare(config).initial_state()
    said = capsys.readouterr().err
    assert re.search(r"init_from .*: head starts anew: 4 classes there, 6 here", said)
    assert re.search(r"init_from .*: positions resampled from 2 x 2 to 4 x 4", said)
    found, there = models.unstack(state.params), read_weights(file)
    np.testing.assert_array_equal(found["blocks.1.mlp.fc1.kernel"], there["blocks.1.mlp.fc1.weight"].T)
    assert found["head.kernel"].shape == (16, 6)
    assert found["pos_embed"].shape == (1, 17, 16)


def test_a_run_starts_from_the_set_of_weights_that_it_names(exported, tmp_path, capsys):
    file, average = two_sets(exported, tmp_path)
    arrays = read_weights(exported / "weights.safetensors")
    said = (
        r"init_from=\S*train.pth: .* several sets .*; choose by config.model.init_weights=raw or config.model.init_we"
    )
    with pytest.raises(ValueError, match=said):
        prepare(tiny.config(model__init_from=str(file))).initial_state()
    for which, expected in (("raw", arrays), ("ema", average)):
        state = prepare(tiny.config(model__init_from=str(file), model__init_weights=which)).initial_state()
        found = models.unstack(state.params)["blocks.1.mlp.fc1.kernel"]
        np.testing.assert_array_equal(found, expected["blocks.1.mlp.fc1.weight"].T)
        assert re.search(r"init_from .*: the (averaged )?weights below model\w* are taken", capsys.readouterr().err)
    plain = exported / "weights.safetensors"
    prepare(tiny.config(model__init_from=str(plain), model__init_weights="raw")).initial_state()
    with pytest.raises(ValueError, match=r"config\.model\.init_weights=ema: \S* has no moving average by its names"):
        prepare(tiny.config(model__init_from=str(plain), model__init_weights="ema")).initial_state()
    with pytest.raises(ValueError, match=r"^config\.model\.init_weights=raw: needs config\.model\.init_from$"):
        prepare(tiny.config(model__init_weights="raw"))
    with pytest.raises(ValueError, match=r"init_weights='avg': takes one of auto, raw, ema"):
        tiny.config(model__init_weights="avg")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("nowhere.safetensors", FileNotFoundError, "no file of weights .*nowhere.safetensors; nearest: .*nowher.safe"),
        ("other.npz", ValueError, "config.model.init_from=.*other.npz: .*do not fit the model"),
        ("damaged.npz", ValueError, "config.model.init_from=.*damaged.npz: .*cannot be read as .npz"),
    ],
)
def test_a_file_that_cannot_start_a_run_is_one_line(tmp_path, name, error, said):
    (tmp_path / "nowher.safetensors").touch()
    (tmp_path / "damaged.npz").write_bytes(b"PK" + bytes(50))
    np.savez(tmp_path / "other.npz", w=np.zeros(3))
    with pytest.raises(error, match=said):
        prepare(tiny.config(model__init_from=str(tmp_path / name))).initial_state()


# The documentation.


@pytest.mark.multiprocess
def test_the_documented_snippet_needs_jax_alone(exported, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (tmp_path / "exported").symlink_to(exported)
    folders = sorted(entry.name for entry in ROOT.iterdir() if (entry / "__init__.py").exists())
    assert "models" in folders
    script = f"{code[1]}\nimport sys\nprint([name for name in {folders} + ['flax'] if name in sys.modules])\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    difference, imported = done.stdout.splitlines()
    assert float(difference) < 1e-5
    assert imported == "[]"


class Question(nnx.Module):
    """Mean colour times mean word."""

    def __init__(self):
        self.word = nnx.Embed(5, 3, rngs=nnx.Rngs(0))

    def __call__(self, images, words):
        return jnp.sum(images.mean((1, 2)) * self.word(words).mean(1), axis=1)


def test_a_model_of_several_inputs_is_a_function_of_a_dictionary():
    inputs = {"image": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), "text": jax.ShapeDtypeStruct((1, 4), jnp.int32)}
    model = Question()
    function = export_inference(model, inputs, ["cpu"], call=lambda model, given: model(given["image"], given["text"]))
    given = {name: export.known_input(spec)[1] for name, spec in inputs.items()}
    expected = model(given["image"], given["text"])
    np.testing.assert_allclose(jax.export.deserialize(function.serialize()).call(given), expected, rtol=1e-6)
    for spec in inputs.values():
        text, array = export.known_input(spec)
        np.testing.assert_array_equal(eval(text, {"numpy": np}), array)
        assert array.dtype == spec.dtype
