"""Where a result comes from: configuration, versions, commit and data, as they go into checkpoints and summaries."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

import configs
import models
import naming
from training.distributed import facts
from training.run.run import Run


def metadata(run: Run, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself besides its arrays."""
    names = (run.config.task.name, run.config.model.name, run.config.data.name)
    outside = {name: naming.fingerprint(name) for name in names if naming.is_outside(name)}
    return {
        "step": step,
        "config": configs.as_dict(run.config),
        "config_hash": configs.digest(run.config),
        "learning_rate": float(run.learning_rate(step)),  # of the next step
        "data": {"position": step * run.config.data.batch_size, "seed": run.config.seed},
        "info": dataclasses.asdict(run.source.info),
        **({"outside": outside} if outside else {}),
        "versions": facts.versions(),
        "commit": facts.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def headline(run: Run) -> str:
    """What is about to run: model by block, devices, data and length."""
    config = run.config
    mesh = " x ".join(f"{axis} {n}" for axis, n in run.mesh.shape.items())
    lines = [
        f"{run.task.model_name} on {config.data.name}: {run.examples} examples, {run.total_steps} steps of "
        f"{config.data.batch_size} "
        f"({run.total_steps * config.data.batch_size / run.examples:.1f} epochs), {config.train.precision}, "
        f"{config.optim.name}",
        f"{facts.devices()}, mesh {mesh}, {jax.process_count()} process(es)",
    ]
    if config.optim.accumulate > 1 and run.template.model_state:
        part = config.data.batch_size // config.optim.accumulate
        lines.append(f"optim.accumulate={config.optim.accumulate}: batch statistics are those of each {part} examples")
    lines.append(str(models.summarize(run.model, run.task.example_inputs(1), call=run.task.answer)))
    return "\n".join(lines)
