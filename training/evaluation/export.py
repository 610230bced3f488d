"""What `eval.py --export` writes: weights by official names, the model as one function, and how to use both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from models.core.export import export_inference
from training.checkpoints.checkpoint_layout import params_sha256
from training.distributed import facts
from training.evaluation import results
from training.evaluation.trained import Trained
from training.run import feeding

WEIGHTS, FUNCTION, ABOUT = "weights.safetensors", "inference.stablehlo", "export.json"


def check_images(shape: tuple[int, ...]) -> np.ndarray:
    """Two images `[2, Y, X, C]` that anybody can make again: `numpy.cos` of 0, 1, 2 ... in radians, as float32."""
    return np.cos(np.arange(2 * np.prod(shape))).reshape(2, *shape).astype(np.float32)


def export(trained: Trained, folder: Path) -> list[Path]:
    """Writes a model to a folder, and returns the files.

    `weights.safetensors` has the official PyTorch names, where the model's family has a table of them (otherwise the
    reason is said on stderr); `inference.stablehlo` is the function of `models.core.export`; `export.json` says
    what goes in and what comes out, with the logits of `check_images` for comparison.

    Raises:
      ValueError: the task takes no images, the model cannot be exported, or there are several processes.
      OSError: the folder cannot be written.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--export: run it in one process; there are {jax.process_count()}")
    spec = trained.task.batch_spec(1)
    if "image" not in spec:
        raise ValueError(f"--export: task {trained.config.task.name} takes {', '.join(spec)}, not images")
    shape = spec["image"].shape[1:]
    graph = trained.evaluator.graph
    params, state = jax.device_get((trained.params, trained.model_state))
    model = models.merge(graph, params, state)
    function = export_inference(model, shape)
    logits = jax.jit(lambda *leaves: models.merge(graph, *leaves)(jnp.asarray(check_images(shape))))(params, state)

    folder.mkdir(parents=True, exist_ok=True)
    files = [_write(folder / FUNCTION, bytes(function.serialize()))]
    try:
        models.export_weights(model, folder / WEIGHTS)
        files.append(folder / WEIGHTS)
    except ValueError as error:
        print(f"{folder / WEIGHTS} is left out: {error}", file=sys.stderr)
    about = {**_about(trained, shape), "files": [file.name for file in files], "platforms": list(function.platforms)}
    about["check"] = {
        "images": f"numpy.cos(numpy.arange({2 * np.prod(shape)})).reshape{(2, *shape)}.astype('float32')",
        "logits": np.asarray(logits, np.float64).tolist(),
    }
    return [*files, results.write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")]


def _about(trained: Trained, shape: tuple[int, ...]) -> dict[str, Any]:
    settings, info = trained.config.data, trained.task.info
    return {
        "model": trained.config.model.name,
        "step": trained.step,
        "weights": trained.weights,
        "params_sha256": params_sha256(trained.params),
        "versions": facts.versions(),
        "input": {
            "shape": [None, *shape],
            "axes": "batch, height, width, channels",
            "dtype": "float32",
            "transforms": feeding.transforms(settings.eval_transforms, settings.image_size),
            "mean": list(settings.mean),
            "std": list(settings.std),
        },
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
    }


def _write(path: Path, content: bytes) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path
