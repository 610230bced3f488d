"""What `eval.py --export` writes: weights by official names, the model as one function, and how to use both."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from models.core.export import export_inference
from training.checkpoints import json_text
from training.checkpoints.checkpoint_layout import params_sha256
from training.distributed import facts
from training.evaluation import results
from training.evaluation.trained import Trained

WEIGHTS, FUNCTION, ABOUT = "weights.safetensors", "inference.stablehlo", "export.json"


def known_input(spec: jax.ShapeDtypeStruct) -> tuple[str, np.ndarray]:
    """Two examples `[2, ...]` that anybody can make again, and how: `numpy.cos` of 0, 1, 2 ... in radians, or for whole
    numbers 0, 1, 0, 1 ..., which every vocabulary has.
    """
    shape = (2, *spec.shape[1:])
    numbers = f"numpy.arange({math.prod(shape)})"
    values = f"numpy.cos({numbers})" if jnp.issubdtype(spec.dtype, jnp.floating) else f"({numbers} % 2)"
    text = f"{values}.reshape{shape}.astype('{spec.dtype.name}')"
    made = np.arange(math.prod(shape))
    made = np.cos(made) if jnp.issubdtype(spec.dtype, jnp.floating) else made % 2
    return text, made.reshape(shape).astype(spec.dtype)


def export(trained: Trained, folder: Path) -> list[Path]:
    """Writes a model to a folder, and returns the files.

    `weights.safetensors` has the official PyTorch names, where the model's family has a table of them (otherwise the
    reason is said on stderr); `inference.stablehlo` is the function of `models.core.export`, of one array or, for a
    task that takes several, of a dictionary of them; `export.json` says what goes in and what comes out, with the
    outputs of known inputs for comparison.

    Raises:
      ValueError: the model cannot be exported, or there are several processes.
      OSError: the folder cannot be written.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--export: run it in one process; there are {jax.process_count()}")
    task = trained.task
    inputs = task.example_inputs(1)
    alone = next(iter(inputs)) if len(inputs) == 1 else None
    graph = trained.evaluator.graph
    params, state = jax.device_get((trained.params, trained.model_state))
    model = models.merge(graph, params, state)

    def call(model: nnx.Module, given: Any) -> Any:
        return task.answer(model, {alone: given} if alone else given)

    function = export_inference(model, inputs[alone] if alone else inputs, call=call)
    known = {name: known_input(spec) for name, spec in inputs.items()}
    given: Any = known[alone][1] if alone else {name: array for name, (_, array) in known.items()}
    answers = jax.jit(lambda given, *leaves: call(models.merge(graph, *leaves), given))(given, params, state)
    answers = jax.tree.map(lambda array: np.asarray(array, np.float64).tolist(), answers)

    folder.mkdir(parents=True, exist_ok=True)
    files = [_write(folder / FUNCTION, bytes(function.serialize()))]
    try:
        models.export_weights(model, folder / WEIGHTS, **task.kept_with_weights())
        files.append(folder / WEIGHTS)
    except ValueError as error:
        print(f"{folder / WEIGHTS} is left out: {error}", file=sys.stderr)
    about = {**_about(trained, inputs), "files": [file.name for file in files], "platforms": list(function.platforms)}
    texts = {name: text for name, (text, _) in known.items()}
    about["check"] = {"input": texts[alone], "output": answers} if alone else {"inputs": texts, "outputs": answers}
    return [*files, results.write_text(folder / ABOUT, json_text.text(about, indent=1) + "\n")]


def _about(trained: Trained, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    task = trained.task
    described = {
        name: {"shape": [None, *spec.shape[1:]], "dtype": spec.dtype.name, **task.described_input(name)}
        for name, spec in inputs.items()
    }
    return {
        "model": task.model_name,
        "step": trained.step,
        "weights": trained.weights,
        "params_sha256": params_sha256(trained.params),
        "commit": facts.commit(),
        "versions": facts.versions(),
        **({"input": next(iter(described.values()))} if len(described) == 1 else {"inputs": described}),
        **task.described_answer(),
    }


def _write(path: Path, content: bytes) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path
