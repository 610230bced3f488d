"""Trains a model from a configuration, or continues the run of a workdir.

    python train.py --config=quickstart --workdir=runs/a --config.optim.learning_rate=3e-4
    python train.py --workdir=runs/a            # goes on where the run stopped, or says that it is complete

What was set the first time need not be repeated, neither the file nor the keys. --config takes a file or a name of
`python -m configs`. --resume_from=WORKDIR[@STEP] begins a new workdir with the whole state of another
run, under another configuration (docs/checkpoints.md). --sweep optim.learning_rate=1e-4,3e-4 runs each value in a
folder of its own below the workdir, and compares them (docs/sweeps.md). Every key of the configuration can be set with
--config.group.key=VALUE; --print_config lists them with their meaning.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import configs
from naming.command_line import show
from training.distributed import processes
from training.plans import chips
from training.run import command, completion, sweep, workdir


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    path, overrides, rest = configs.split_arguments(arguments)
    options = (parser := _parser()).parse_args(rest)
    if options.completion:
        show(completion.script(options.completion, parser, configs.keys()))
        return 0
    if not path and (options.sweep or not options.workdir):
        raise ValueError("--config=FILE is missing, such as --config=quickstart")
    if options.sweep:
        return _sweep(path, overrides, options)
    if options.workdir:
        sweep.refuse_a_run(Path(options.workdir))
        # What the run of this workdir was started with stays in force; other values are refused, key by key.
        overrides = {**workdir.overrides(Path(options.workdir)), **overrides}
    if options.resume_from:
        if options.dry_run or not options.workdir:
            raise ValueError(f"--resume_from={options.resume_from}: needs --workdir=NEW, and is not for --dry_run")
        overrides = {**workdir.inherited(options.resume_from, Path(options.workdir)), **overrides}
    config = configs.load(path, overrides) if path else workdir.stored(Path(options.workdir), overrides)
    if options.print_config:
        command.start_jax("")
        import tasks  # after start_jax, which sets what JAX reads once

        show(configs.describe(config, tasks.find(config.task.name).known_options))
        return 0
    if options.plan:
        topology = chips.parse(options.plan)
        chips.use_compiler()
        command.start_jax("")
        from training.plans import plan_report

        plan_report.command(config, topology, batches=not options.no_batch_search)
        return 0
    given = {f"config.{key}": value for key, value in configs.flat_values(config).items()}
    given["--resume_from"] = options.resume_from
    launch = command.start_jax(config.log.cache_directory, options, given)
    with command.terminal().busy("importing models and data"):
        from training.run import loop  # after start_jax, which sets what JAX reads once

    if options.dry_run and launch.processes > 1:
        raise ValueError("--dry_run: is for one process; for several, --config.train.steps=2 and a workdir of its own")
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            loop.train(
                configs.from_dict(configs.as_dict(config), loop.DRY_RUN),
                folder,
                most_eval_batches=2,
                profile=options.profile,
            )
        print("dry run: ok")
        return 0
    if not options.workdir:
        raise ValueError("--workdir=FOLDER is missing, such as --workdir=runs/a")
    loop.train(
        config,
        options.workdir,
        overrides=overrides,
        profile=options.profile,
        resume_from=options.resume_from,
        started=command.began(),
        peak=chips.peak,
    )
    return 0


def _parser() -> command.Parser:
    parser = command.Parser("train.py", str(__doc__))
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="configuration, a file or a name of `python -m configs`; without it the run of the workdir goes on; "
        "--config.a.b=VALUE sets a key",
    )
    parser.add_argument("--workdir", metavar="FOLDER", help="folder of this run: checkpoints, logs, results (required)")
    parser.add_argument(
        "--resume_from",
        metavar="WORKDIR[@STEP]",
        default="",
        help="begin a new workdir with the whole state of another run; what was set on its command line stays in force",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the configuration with the meaning of each key, and stop"
    )
    parser.add_argument("--dry_run", action="store_true", help="two steps and a short evaluation in a temporary folder")
    parser.add_argument(
        "--profile", action="store_true", help="write a profiler trace of three steps to FOLDER/profile"
    )
    parser.add_argument(
        "--plan", metavar="TOPOLOGY", help="compile for TPUs that need not be here (v5e:16x16) and print the cost; stop"
    )
    parser.add_argument(
        "--sweep",
        metavar="KEY=A,B",
        action="append",
        default=[],
        help="one run for each value, in FOLDER/KEY=VALUE, and a table; several: for each combination",
    )
    parser.add_argument("--no_batch_search", action="store_true", help="plan without looking for the largest batch")
    return parser.with_shared_flags()


def _sweep(path: str, overrides: dict[str, str], options: Any) -> int:
    for name in ("plan", "dry_run", "print_config"):
        if getattr(options, name):
            raise ValueError(f"--sweep: not with --{name}, which is for one configuration")
    if not options.workdir:
        raise ValueError("--sweep: needs --workdir=FOLDER, such as --workdir=runs/sweep")
    if processes.expected(options).processes > 1:
        raise ValueError("--sweep: is for one process; for several, start each run by itself")
    folder = Path(options.workdir)
    flags = [f"--{name}" for name in ("profile", "debug") if getattr(options, name)]
    flags += [f"--resume_from={options.resume_from}"] if options.resume_from else []
    runs = sweep.combinations(sweep.parse(options.sweep))
    asked = sweep.Sweep(folder, path, {**sweep.overrides(folder), **overrides}, runs, flags)
    command.start_jax("")
    asked.check(options.resume_from)
    failed = asked.run()
    from training.evaluation import sweep_table  # after start_jax

    for line in sweep_table.write(folder, failed):
        print(line)
    return sweep.exit_code(failed)


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
