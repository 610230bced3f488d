"""States like those of a run, saved in checkpoints, for tests of these."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
from training.checkpoints import checkpoint_layout
from training.checkpoints.checkpoint import Checkpointer

OPTIMIZER = optax.chain(
    optax.masked(optax.trace(0.9), lambda params: {n: n.endswith("kernel") for n in params}), optax.adamw(1e-3)
)


def a_state(step: int = 7, scanned: bool = True, seed: int = 0, layers: int = 3) -> dict:
    """A state like the loop's whose optimizer has taken a step."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {
        "blocks.[0::2].attn.qkv.kernel": draw(layers, 4, 6),
        "head.kernel": draw(4, 10),
        "scale": draw(),
        "blocks.[1::2].mlp.bias": draw(layers, 5).astype(jnp.bfloat16),
    }
    grads = jax.tree.map(lambda p: p * 0.5 + 1, params)
    model_state = {"blocks.[0::2].norm.mean": draw(layers, 4)}
    if not scanned:
        params, grads, model_state = (models.unstack(tree) for tree in (params, grads, model_state))
    _, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    ema = {"params": jax.tree.map(lambda p: p / 2, params), "model_state": {}}
    return {
        "step": jnp.int32(step),
        "params": params,
        "model_state": model_state,
        "opt_state": opt_state,
        "ema": ema,
        "key": jax.random.fold_in(jax.random.key(3), seed),
        "health": {"bad_steps": jnp.int32(1)},
        "metrics": {"count": jnp.int32(2), "means": {}},
    }


def blank(state: dict) -> dict:
    return jax.tree.map(jnp.zeros_like, state | {"key": jax.random.key(0)})


def to_bytes(leaf) -> tuple:
    leaf = np.asarray(jax.random.key_data(leaf) if checkpoint_layout.is_key(leaf) else leaf)
    return leaf.dtype.name, leaf.shape, leaf.tobytes()


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b), path
        assert to_bytes(a) == to_bytes(b), path


def saved(directory: Path, *steps: int, **options) -> Checkpointer:
    checkpointer = Checkpointer(directory, **options)
    for step in steps:
        checkpointer.save(step, a_state(step, seed=step), {"config": {"seed": step}})
        checkpointer.wait()
    return checkpointer


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
