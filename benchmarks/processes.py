"""Images a second of one process and of two, one core each, on the same global batch: what a second machine would gain.

    python -m benchmarks.processes [--rounds=2] [--batch_size=32] [--steps=4]

Prints training speed, compilation left out, for ViT-Ti/16 at 224 pixels in float32. Both sides take turns; each process
is pinned to a core of its own, so that a process has the same resources on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def images_per_second(processes: int, batch_size: int, steps: int) -> float:
    """Trains in `processes` processes and returns the speed that the run reports."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    if len(cores) < processes:
        raise OSError(f"{processes} processes need a core each; there are {len(cores)}")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{chosen.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "train.py",
            "--config=configs/vit_ti16_imagenet.py",
            f"--workdir={folder}/run",
            "--config.data.name=synthetic:classes=10,examples=256,size=224",
            "--config.data.train_transforms=normalize",
            "--config.data.eval_split=test[:8]",
            "--config.data.threads=1",
            "--config.data.workers=0",
            "--config.train.precision=float32",
            f"--config.data.batch_size={batch_size}",
            f"--config.train.steps={steps + 1}",
            "--config.optim.warmup=0",
            "--config.log.every_steps=0",
            "--config.log.tensorboard=False",
            "--config.eval.every_steps=0",
            "--config.checkpoint.every_steps=0",
        ]
        several = [f"--coordinator_address={address}", f"--num_processes={processes}"]
        running = [
            subprocess.Popen(
                [*command, *([*several, f"--process_id={i}"] if processes > 1 else [])],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),  # type: ignore[misc]
            )
            for i, core in enumerate(cores)
        ]
        if any(process.wait() for process in running):
            raise OSError(f"a run of {processes} processes failed")
        return json.loads(Path(folder, "run", "summary.json").read_text())["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes, speeds in found.items():
            load = os.getloadavg()[0]  # of others, before this run: they take the cores away
            speeds.append(images_per_second(processes, options.batch_size, options.steps))
            print(f"{processes} process(es): {speeds[-1]:.2f} images/s (load before: {load:.1f})", flush=True)
    one, two = (statistics.median(speeds) for speeds in found.values())
    print(json.dumps({"one": round(one, 2), "two": round(two, 2), "ratio": round(two / one, 3)}))


if __name__ == "__main__":
    main()
