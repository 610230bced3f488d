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
import naming
from models.core.export import export_inference
from models.core.onnx import convert
from models.core.onnx.graph import OPSET
from training.checkpoints import json_text
from training.checkpoints.checkpoint_layout import params_sha256
from training.distributed import facts
from training.evaluation import results
from training.evaluation.trained import Trained

WEIGHTS, ABOUT = "weights.safetensors", "export.json"
FUNCTIONS = {"stablehlo": "inference.stablehlo", "onnx": "inference.onnx"}
"""Format of the function -> its file."""


def check_format(name: str) -> str:
    """The name of a format of the function, checked before anything is loaded.

    Raises:
      ValueError: there is no such format, or it needs packages that are not installed.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"--export_format: {naming.unknown('format', name, FUNCTIONS)}")
    if name == "onnx":
        convert.check_installed("--export_format=onnx")
    return name


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


def export(trained: Trained, folder: Path, form: str = "stablehlo") -> list[Path]:
    """Writes a model to a folder, and returns the files.

    `weights.safetensors` has the official PyTorch names, where the model's family has a table of them (otherwise the
    reason is said on stderr); `inference.stablehlo` is the function of `models.core.export`, of one array or, for a
    task that takes several, of a dictionary of them; `inference.onnx` in its place is that of
    `models.core.onnx.convert`, whose inputs have their names; `export.json` says what goes in and what comes out, with
    the outputs of known inputs for comparison.

    Args:
      form: of the function, one of `FUNCTIONS`.

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

    texts, given = {}, {}
    for name, spec in inputs.items():
        texts[name], given[name] = known_input(spec)
    answers = jax.jit(lambda given, *leaves: task.answer(models.merge(graph, *leaves), given))(given, params, state)
    content, about = _function(form, trained, model, given, answers)
    answers = jax.tree.map(lambda array: np.asarray(array, np.float64).tolist(), answers)

    folder.mkdir(parents=True, exist_ok=True)
    files = [_write(folder / FUNCTIONS[form], content)]
    try:
        models.export_weights(model, folder / WEIGHTS, **task.kept_with_weights())
        files.append(folder / WEIGHTS)
    except ValueError as error:
        print(f"{folder / WEIGHTS} is left out: {error}", file=sys.stderr)
    about = {**_about(trained, inputs), "files": [file.name for file in files], **about}
    about["check"] = {"input": texts[alone], "output": answers} if alone else {"inputs": texts, "outputs": answers}
    return [*files, results.write_text(folder / ABOUT, json_text.text(about, indent=1) + "\n")]


def _function(
    form: str, trained: Trained, model: nnx.Module, given: Mapping[str, np.ndarray], answers: Any
) -> tuple[bytes, dict[str, Any]]:
    """The function as the content of its file, and what `export.json` says of it.

    Args:
      given, answers: inputs by name, and what the model says to them.
    """
    task = trained.task
    inputs = task.example_inputs(1)
    if form == "onnx":
        content = convert.export_onnx(model, inputs, call=task.answer)
        apart = convert.difference(content, given, answers)
        print(
            f"{FUNCTIONS[form]}: onnxruntime's outputs are {apart:.1e} of the largest from the model's", file=sys.stderr
        )
        return content, {"opset": OPSET, "onnxruntime_difference": apart}
    if len(inputs) == 1:
        ((alone, spec),) = inputs.items()
        function = export_inference(model, spec, call=lambda model, array: task.answer(model, {alone: array}))
    else:
        function = export_inference(model, inputs, call=task.answer)
    return bytes(function.serialize()), {"platforms": list(function.platforms)}


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
