"""Evaluates a trained model, or predicts with it.

    python eval.py --workdir=runs/a                      # newest checkpoint; writes JSON and report.html to runs/a/eval
    python eval.py --workdir=runs/a --step=2000 --raw
    python eval.py --workdir=runs/a --best               # the checkpoint whose metric was best on the first set
    python eval.py --checkpoint=PATH --config=quickstart --output=results
    python eval.py --workdir=runs/a --predict=FOLDER     # writes runs/a/eval/predictions.csv
    python eval.py --workdir=runs/a --export=FOLDER      # writes weights and the model as one function (docs/export.md)
    python eval.py --workdir=runs/a --export=FOLDER --export_format=onnx
    python eval.py --checkpoint=FILE.safetensors --config=vit_s16_imagenet       # official weights
    python eval.py --checkpoint=FILE.pth --ema --config=configs/vit_s16_imagenet.py         # of several the averaged
    python eval.py --compare=runs/a,runs/b               # their stored results side by side
    python eval.py --sweep=runs/lr                       # the table and picture of a sweep (docs/sweeps.md)

The configuration is the one saved with the checkpoint, or that of --config; --config.eval.sets=train=@train[:500] and
the like change its keys. Images of a file of weights go through what it says of them (docs/preprocessing.md).
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import configs
from configs import Config
from configs.base import MOVED
from naming.command_line import show
from training.distributed import preemption, processes
from training.run import command, completion, workdir


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    path, overrides, rest = configs.split_arguments(arguments)
    options = (parser := _parser()).parse_args(rest)
    if options.completion:
        read = {key: field for key, field in configs.keys().items() if not _is_never_read(key)}
        show(completion.script(options.completion, parser, read))
        return 0
    for flag, taken, why in (
        ("sweep", ("debug",), "it shows the runs of a sweep as they are"),
        ("compare", ("debug", "output"), "it shows stored results as they are"),
    ):
        if getattr(options, flag):
            _alone(options, flag, taken, why, ["--config"] * bool(path) + [f"--config.{key}" for key in overrides])
    if options.sweep:
        return _sweep(Path(options.sweep))
    if options.compare:
        return _compare(options.compare.split(","), options.output)
    if options.workdir and options.checkpoint:
        raise ValueError("--workdir and --checkpoint: give one of them")
    output = Path(options.output or Path(options.workdir) / "eval") if options.output or options.workdir else None
    if options.export:
        for name in ("output", "predict", "generate"):
            if getattr(options, name) is not None:
                raise ValueError(f"--export and --{name}: give one of them")
        output = Path(options.export)
    elif options.export_format is not None:
        raise ValueError("--export_format: needs --export=FOLDER")
    for name in ("predict", "generate"):
        if getattr(options, name) is not None and output is None:
            raise ValueError(f"--{name}: what a --checkpoint makes needs --output=FOLDER")
    if options.generate is not None and options.generate < 1:
        raise ValueError(f"--generate={options.generate}: takes a number of examples, at least 1")
    flags = ("workdir", "checkpoint", "step", "best", "weights", "predict", "generate")
    given = {f"--{flag}": getattr(options, flag) for flag in flags} | {"--config": path}
    given |= {f"config.{key}": value for key, value in overrides.items()}
    launch = command.start_jax("", options, given)
    if options.export and launch.processes > 1:
        raise ValueError("--export: is for one process")
    if options.export_format is not None:
        from training.evaluation import export

        export.check_format(options.export_format)
    with command.terminal().busy("importing models and data"):
        from models.weights import files  # after start_jax, which sets what JAX reads once
        from training.checkpoints import best, checkpoint

    place = options.workdir or options.checkpoint
    official = options.checkpoint is not None and files.is_weight_file(options.checkpoint)
    if official and not path:
        raise ValueError(f"--checkpoint={place}: a file of weights has no configuration; give --config=FILE")
    if official and (options.step is not None or options.best):
        flag = "--best" if options.best else f"--step={options.step}"
        raise ValueError(f"{flag}: --checkpoint={place} is a file of weights, which has no steps")
    if options.best and not place:
        raise ValueError("--best: needs --workdir=FOLDER, whose checkpoints it compares")
    step = best.step(place) if options.best else options.step
    saved = checkpoint.restore_for_eval(place, step) if place and not official else None
    config = _config(path, overrides, saved)
    command.start_jax(config.log.cache_directory)
    if output is not None:
        workdir.check_writable(output, f"--{'export' if options.export else 'output'}={output}")
    use_ema = options.weights if options.weights is None else options.weights == "ema"
    notes: list[str] = []
    if official:
        config, saved, notes = _official(config, place, options.weights, overrides)
        use_ema = saved["ema"] is not None
    if not (options.export or options.predict or options.generate is not None):
        typed = shlex.join(["python", "eval.py", *arguments])
        return _evaluate(config, saved, use_ema, options.workdir, output, notes, typed)
    _say(notes)
    if options.export:
        return _export(config, saved, use_ema, output, options.export_format)
    if options.generate is not None:
        return _generate(config, saved, use_ema, options.generate, output)
    return _predict(config, saved, use_ema, options.predict, output)


def _say(notes: Iterable[str]) -> None:
    if processes.is_first():
        for note in notes:
            print(note, file=sys.stderr)


def _alone(options: Any, flag: str, taken: Sequence[str], why: str, more: Sequence[str]) -> None:
    """Refuses what goes with a flag that stands alone but for the flags that it takes."""
    usual = vars(_parser().parse_args([]))
    others = [
        f"--{name}" for name, value in vars(options).items() if name not in (flag, *taken) and value != usual[name]
    ]
    if others := [*others, *more]:
        raise ValueError(f"--{flag}: not with {others[0]}; {why}")


def _compare(names: list[str], output: str | None) -> int:
    command.start_jax("")
    from training.evaluation import compare

    runs = compare.read(names)
    folder = Path(output) if output else runs[0].folder
    workdir.check_writable(folder, f"--output={folder}")
    print(compare.table(runs))
    print(compare.write(runs, folder))
    return 0


def _sweep(folder: Path) -> int:
    command.start_jax("")
    from training.evaluation import sweep_table

    workdir.check_writable(folder, f"--sweep={folder}")
    for line in sweep_table.write(folder):
        print(line)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser("eval.py", str(__doc__))
    parser.add_argument("--workdir", metavar="FOLDER", help="folder of a run")
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="one checkpoint, or a file of official weights, in place of --workdir"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="a file or a name of `python -m configs`, in place of the saved configuration",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best metric on the first set")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--raw", dest="weights", action="store_const", const="raw", help="the parameters themselves")
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema", help="their moving average")
    parser.add_argument(
        "--predict",
        metavar="FOLDER",
        help="write predictions for the images below FOLDER, or for SOURCE@SPLIT, and stop",
    )
    parser.add_argument("--generate", type=int, metavar="N", help="write what a generative task makes from N examples")
    parser.add_argument("--export", metavar="FOLDER", help="write weights and model for use elsewhere, and stop")
    parser.add_argument(
        "--export_format", metavar="NAME", help="what the function is written as: stablehlo (default) or onnx"
    )
    parser.add_argument(
        "--compare", metavar="FOLDER,FOLDER", help="stored results of runs side by side: a table and a page, and stop"
    )
    parser.add_argument("--sweep", metavar="FOLDER", help="compare the runs of train.py --sweep in FOLDER, and stop")
    parser.add_argument("--output", metavar="FOLDER", help="where results go; default: eval/ in the workdir")
    return parser.with_shared_flags()


NEVER_READ = ("optim", "checkpoint", "train")
"""Groups of keys that an evaluation does not read, but for the precision of the computation."""


def _is_never_read(key: str) -> bool:
    return key.partition(".")[0] in NEVER_READ and key not in ("train.precision", *MOVED)


def _config(path: str, overrides: Mapping[str, str], saved: Mapping[str, Any] | None) -> Config:
    for key in overrides:
        if _is_never_read(key):
            raise ValueError(f"--config.{key}: an evaluation does not read it; it is a key of training")
    if path:
        return configs.load(path, overrides)
    if saved is None:
        raise ValueError("--workdir=FOLDER is missing, such as --workdir=runs/a (or --checkpoint=PATH)")
    return configs.from_dict(saved["config"], overrides)


def _official(
    config: Config, file: str, which: str | None, given: Mapping[str, str]
) -> tuple[Config, dict[str, Any], list[str]]:
    """The configuration for the images that a file of weights wants, the file as if it were a checkpoint, and what to
    say of the first.
    """
    from tasks import preprocessing
    from training.checkpoints import initial
    from training.run import sets

    config, note = preprocessing.for_file(config, file, given)
    saved = initial.read_official(file, config, sets.first(config).info, which)
    return config, saved, [f"{file}: {note}"]


def _export(config: Config, saved: Any, use_ema: bool | None, folder: Path | None, form: str | None) -> int:
    from training.evaluation import export, trained
    from training.run import sets

    assert folder is not None
    info = None if saved else sets.first(config).info
    for file in export.export(trained.load(saved, config, use_ema=use_ema, info=info), folder, form or "stablehlo"):
        print(file)
    return 0


def _predict(config: Config, saved: Any, use_ema: bool | None, place: str, output: Path | None) -> int:
    from training.evaluation import predict, trained

    assert output is not None
    for file in predict.predict(trained.load(saved, config, use_ema=use_ema), place, output):
        print(file)
    return 0


def _generate(config: Config, saved: Any, use_ema: bool | None, count: int, output: Path | None) -> int:
    from training.evaluation import generate, trained
    from training.run import sets

    assert output is not None
    source = sets.first(config)
    model = trained.load(saved, config, use_ema=use_ema, info=source.info)
    print(generate.generate(model, source, count, output / "generated.npz"))
    return 0


def _evaluate(
    config: Config,
    saved: Any,
    use_ema: bool | None,
    run: str | None,
    output: Path | None,
    notes: Sequence[str],
    typed: str,
) -> int:
    terminal = command.terminal()
    with terminal.busy("opening the data and tracing the model"):
        from training.evaluation import results, trained
        from training.run import evaluate, sets

        model = trained.load(saved, config, use_ema=use_ema, info=None if saved else sets.first(config).info)
        evaluations = model.evaluations()
    _say([*notes, *evaluations.notes])
    began = time.perf_counter()
    with contextlib.closing(evaluations):
        found = {label: evaluations.evaluate(label, model.params, model.model_state) for label in evaluations.sources}
    print(results.table(found, model.task.columns))
    sources, folder = evaluations.sources, Path(run) if run else None
    for label, source in sources.items():
        if note := evaluate.left_out(found[label], source):
            print(f"{label}: {note}")
    if output is not None:
        with preemption.finishing():  # a result is all of its files
            samples, seconds = evaluations.samples, time.perf_counter() - began
            with terminal.busy("writing the report"):
                files = results.write(output, model, sources, found, folder, samples, command=typed, seconds=seconds)
            for file in files:
                print(file)
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
