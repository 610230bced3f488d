"""Every shipped configuration works on a set generated with the real one's features; together they read every key."""

import contextlib
import dataclasses
import re
from pathlib import Path

import generated
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import configs
from configs import schema, shipped
from configs.base import FIELDS
from tasks import preprocessing
from training.run import evaluate, feeding, loop
from training.run import sets as eval_sets
from training.run.run import prepare

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = shipped.names()
ON_DIGITS = tuple(name for name in SHIPPED if name == "quickstart" or name.endswith("_digits"))
ARGUMENTS = {
    "vit_ti16_imagenet": ("", "big_vision"),
    "vit_s16_imagenet": ("", "big_vision"),
    "vit_b16_imagenet": ("", "big_vision"),
}
# Full-size models would take minutes to compile on a CPU; their depth and width shrink, everything else is as shipped.
PLAIN = {
    "model.options.depth": 2,
    "model.options.width": 16,
    "model.options.heads": 2,
    "model.options.mlp_width": 32,
}
STAGES = {
    "model.options.depths": [1],
    "model.options.width": 8,
    "model.options.heads": [1],
    "data.image_size": 32,
}
BIFORMER = {
    "model.options.widths": [8, 16],
    "model.options.depths": [1, 1],
    "model.options.heads": [1, 2],
    "model.options.mlp_ratio": 2,
    "model.options.regions": 2,
    "model.options.topk": [2, 0],
    "data.image_size": 32,
}
DAVIT = {
    "model.options.depths": [1],
    "model.options.widths": [8],
    "model.options.heads": [1],
    "data.image_size": 32,
}
VOLO = {
    "model.options.depths": [1, 1],
    "model.options.widths": [8, 16],
    "model.options.heads": [1, 2],
    "model.options.downsamples": [True, False],
    "model.options.outlook": [True, False],
    "model.options.stem_width": 8,
    "data.image_size": 32,
}
MAXVIT = {
    "model.options.depths": [1],
    "model.options.widths": [8],
    "model.options.stem_widths": 8,
    "model.options.head_width": 4,
    "model.options.window": 2,
    "data.image_size": 32,
}
HALONET = {
    "model.options.depths": [1, 2],
    "model.options.widths": [8, 16],
    "model.options.strides": [1, 2],
    "model.options.layers": [["attention"], ["conv", "attention"]],
    "model.options.ratio": 1.0,
    "model.options.heads": 2,
    "model.options.block_size": 2,
    "data.image_size": 32,
}
# By the beginning of the configuration's name; all others are plain.
SHRUNK = {
    "quickstart|nat_|dinat_(?!iso)|swin_": STAGES,
    "davit_": DAVIT,
    "biformer_": BIFORMER,
    "volo_": VOLO,
    "maxvit_": MAXVIT,
    "halonet_": HALONET,
}
SMALL = {
    "data.batch_size": 6,
    "data.workers": 0,
    "train.steps": 2,
    "optim.warmup": 1,
    "eval.every_steps": 0,
    "checkpoint.every_steps": 0,
    "log.every_steps": 1,
    "log.cache_directory": str(tiny.CACHE),
}


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in generated.SETS:
        generated.prepare(name, folder)
    for split in ("train", "test"):
        for label in ("daisy", "rose", "tulip"):
            (folder / "flowers" / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "flowers" / split / label / f"{i}.jpg")
    return folder


# These take their steps: others start from them or learn from them, and one has batch statistics. The rest is traced;
# that the models of all families train is in `tests/models/test_contract.py`.
STEPPING = ("quickstart", "vit_s16_imagenet", "finetune_folder", "halonet_digits")


def small(name, argument, sets, **more):
    path = f"{ROOT / 'configs' / name}.py" + (f":{argument}" if argument else "")
    size = next((options for pattern, options in SHRUNK.items() if re.match(pattern, name)), PLAIN)
    overrides = {**SMALL, **size, "data.directory": "" if name in ON_DIGITS else str(sets), **more}
    config = configs.load(path, overrides)
    if "pre_logits" in config.model.options:
        config = configs.load(path, {**overrides, "model.options.pre_logits": 16})
    return config


def runs():
    for name in SHIPPED:
        arguments = ("flowers",) if name == "finetune_folder" else ARGUMENTS.get(name, ("",))
        yield from ((name, argument) for argument in arguments)


def unread(reads, fields=FIELDS):
    return sorted(set(schema.flatten(fields)) - reads)


def traced(config):
    """The train step and the evaluation of a configuration, for the batches that its data gives; nothing is
    compiled.
    """
    run = prepare(config)
    spec = run.task.batch_spec(config.data.batch_size, train=True)
    with contextlib.closing(feeding.train_stream(config, run.source, 0)) as stream:
        batch = feeding.fields(next(stream), spec, run.source, "train_transforms")
    after, _ = run.step.eval_shape(run.template, batch, run.partner_arrays)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), run.template)
    evaluator = evaluate.Evaluator(run.task, run.graph, config, run.mesh, run.partner_graphs, run.partner_arrays)
    for source in (one.open() for one in eval_sets.described(config).values()):
        batch = feeding.fields(
            next(feeding.eval_batches(config, source)), evaluator.spec(source.info), source, "eval_transforms"
        )
        arrays = run.template.params, run.template.model_state, batch, run.partner_arrays
        evaluator._step.jitted.eval_shape(evaluator._init.eval_shape(), *arrays)


@pytest.mark.slow
def test_every_shipped_configuration_works_and_together_they_read_every_key(sets, tmp_path):
    """One test, because the second half needs what all configurations of the first half have read."""
    schema.READS.clear()

    def train(config, name):
        result = loop.train(config, tmp_path / name, terminal=tiny.quiet())
        assert result["step"] == 2, name
        assert all(np.isfinite(row["loss"]) for row in tiny.rows(tmp_path / name)), name

    start = str(tmp_path / "vit_s16_imagenet")
    for name, argument in sorted(runs(), key=lambda one: one[0] == "finetune_folder"):
        more = {"model.init_from": start} if name == "finetune_folder" else {}
        config = small(name, argument, sets, **more)
        if name in STEPPING and argument in ("", "flowers"):
            train(config, name)
        else:
            traced(config)

    # Options that no shipped configuration turns on, and what only the commands read.
    teacher = {"task.options.teacher": str(tmp_path / "quickstart"), "task.options.distill": "soft"}
    train(small("quickstart", "", sets, **teacher, **{"log.example_ids": True}), "student")
    import train as command

    values = [f"--config.{key}={value}" for key, value in {**SMALL, **STAGES}.items()]
    assert command.main([f"--config={ROOT / 'configs' / 'quickstart.py'}", "--dry_run", *values]) == 0
    preprocessing.for_file(small("quickstart", "", sets), str(tmp_path / "weights.npz"), ())
    assert unread(schema.READS) == []
    assert unread(schema.READS, {**FIELDS, "planted": schema.Field(0, "A key that nothing reads.")}) == ["planted"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_docstring_says_what_a_user_needs(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    doc = text.split('"""')[1]
    assert re.search(rf"python train.py --config=configs/{name}.py", doc)
    assert re.search(r"^Cost: .*\d", doc, re.MULTILINE)
    assert re.search(r"^Expected: ", doc, re.MULTILINE)
    assert "measured" in doc or "published" in doc or "depends" in doc


@pytest.mark.parametrize("name", ON_DIGITS)
def test_the_control_is_the_same_file_with_another_attention(name):
    """As the docstrings have it: `--config.model.attention=identity`, whatever options the file has for its own."""
    import tasks
    from training.checkpoints.initial import abstract_model

    config = configs.load(f"{ROOT / 'configs' / name}.py", {"model.attention": "identity", "data.directory": ""})
    info = feeding.open_source(config, config.data.name, config.data.train_split).info
    _, _, params, _ = abstract_model(tasks.create(config, info))
    attention = {key.rpartition(".attn.")[2].partition(".")[0] for key in params if ".attn." in key}
    assert attention == {"value", "proj"}


@pytest.mark.parametrize(("name", "argument"), runs())
def test_full_size_models_have_the_parameters_they_state(name, argument, sets):
    """Millions of parameters in the docstring, found by tracing the shipped model without numbers."""
    import models
    import tasks
    from training.checkpoints.initial import abstract_model

    path = f"{ROOT / 'configs' / name}.py" + (f":{argument}" if argument else "")
    config = configs.load(path, {"data.directory": "" if name in ON_DIGITS else str(sets)})
    info = feeding.open_source(config, config.data.name, config.data.train_split).info
    if name == "finetune_folder":
        info = dataclasses.replace(info, num_classes=1000)
    _, _, params, _ = abstract_model(tasks.create(config, info))
    millions = (
        sum(
            np.prod(p.shape)
            for p in models.unstack({k: np.broadcast_to(np.float32(0), v.shape) for k, v in params.items()}).values()
        )
        / 1e6
    )
    text = re.search(r"([\d.]+) M parameters", (ROOT / "configs" / f"{name}.py").read_text())[1]
    half_a_digit = 0.5 * 10.0 ** -len(text.partition(".")[2])
    # The other recipe of a file has another head: within one percent.
    allowed = max(half_a_digit, 0.01 * float(text) if argument == "big_vision" else 0)
    assert abs(millions - float(text)) <= allowed, millions
