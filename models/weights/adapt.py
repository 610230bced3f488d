"""Pretrained parameters for a model with another classifier, another image size or another position convention."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from attn import resample_positions
from attn.common.relative import resample_relative_bias

CLASSIFIERS = ("head", "head_dist", "aux_head")
TOKENS = ("cls_token", "dist_token", "reg_token")
"""Prefix tokens, in their order before the patches."""

Flat = dict[str, np.ndarray]


def adapt(
    model: Any,
    loaded: Mapping[str, np.ndarray],
    fresh: Mapping[str, Any],
    *,
    image_size: tuple[int, int] | None = None,
) -> tuple[Flat, list[str]]:
    """Fits `loaded` to `model` where a published practice says how, and leaves everything else as it is.

    All `STEPS`, one after another.

    Args:
      model: an NNX module that says its grid and prefix; it may be abstract.
      loaded: parameters by unrolled name.
      fresh: the model's own parameters by unrolled name.
      image_size: (height, width) in pixels that `loaded` was trained on, where it is known. Without it learned
        positions count as those of the model's grid, or of a square one.

    Returns:
      The adapted parameters, and one sentence for each change.

    Raises:
      ValueError: something has to be adapted and cannot be; the line says why.
    """
    adapted, notes = dict(loaded), list[str]()
    for step in STEPS:
        if step is adapt_positions:
            adapted, said = adapt_positions(model, adapted, fresh, image_size)
        else:
            adapted, said = step(model, adapted, fresh)
        notes += said
    return adapted, notes


def adapt_classifiers(model: Any, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any]) -> tuple[Flat, list[str]]:
    """A classifier for other classes, or one that `loaded` lacks, takes its `fresh` values; one that the model does not
    have is left out, and so is the representation layer before it (as in fine-tuning, arXiv:2010.11929).

    Raises:
      ValueError: a classifier has to start anew, but the model has shapes only.
    """
    adapted, notes = dict(loaded), []
    replaced = False
    for head in CLASSIFIERS:
        before, now = (classes_of(flat, head) for flat in (loaded, fresh))
        if before == now:
            continue
        own = {name: value for name, value in fresh.items() if name.startswith(f"{head}.")}
        if any(isinstance(value, jax.ShapeDtypeStruct) for value in own.values()):
            raise ValueError(
                f"{head} has {before or 'no'} classes in the file and {now} here, and would start anew, but this model "
                "has shapes only"
            )
        adapted = {name: value for name, value in adapted.items() if not name.startswith(f"{head}.")}
        adapted |= {name: np.asarray(value) for name, value in own.items()}
        replaced |= head == "head"
        changed = f"starts anew: {before} classes there, {now} here" if now else f"with {before} classes is left out"
        notes.append(f"{head} {changed}")
    dropped = [name for name in adapted if name.startswith("pre_logits.") and name not in fresh]
    if replaced and dropped:
        adapted = {name: value for name, value in adapted.items() if name not in dropped}
        notes.append("pre_logits is left out with the classifier it was for")
    return adapted, notes


def adapt_positions(
    model: Any,
    loaded: Mapping[str, np.ndarray],
    fresh: Mapping[str, Any],
    image_size: tuple[int, int] | None = None,
) -> tuple[Flat, list[str]]:
    """Learned positions on the model's grid and in its convention.

    Rows of prefix tokens in a file for a model without them are added to these tokens, which is the same function; a
    model that has them gets rows of zeros where the file has none, likewise. The patch rows are resampled to the
    model's grid.

    Raises:
      ValueError: the rows are neither those of the model's grid (or of the one for `image_size`) nor those of a square
        one: a file does not say its sides.
    """
    name = "pos_embed"
    adapted, notes = dict(loaded), list[str]()
    if name not in loaded or name not in fresh:
        return adapted, notes
    if loaded[name].ndim != 3 or len(fresh[name].shape) != 3:
        return adapted, notes  # a map, or another model's
    there = _grid_for(model, image_size)
    # A grid of 4 x 8 places has as many as one of 8 x 4.
    if loaded[name].shape == tuple(fresh[name].shape) and (there is None or there == model.grid.shape):
        return adapted, notes
    table, grid = loaded[name], model.grid
    wanted = grid.prefix if model.prefix_positions else 0
    prefix, shape = _layout(table.shape[1], wanted, loaded, there or grid.shape)
    if prefix and not wanted:
        start = 0
        for token in _tokens(adapted):
            rows = table[:, start : min(start + adapted[token].shape[1], prefix)]
            if rows.size:
                adapted[token] = adapted[token] + rows
            start += rows.shape[1]
        table, prefix = table[:, prefix:], 0
        notes.append("positions of the prefix tokens are added to these tokens")
    elif prefix < wanted:
        zeros = np.zeros_like(table, shape=(1, wanted - prefix, table.shape[2]))
        table, prefix = np.concatenate([table[:, :prefix], zeros, table[:, prefix:]], axis=1), wanted
        notes.append("positions of the prefix tokens are zero: the file has none")
    if shape != grid.shape:
        method = model.position_resample
        table = np.asarray(resample_positions(table, shape, grid.shape, prefix=prefix, method=method))
        before, now = (" x ".join(map(str, sides)) for sides in (shape, grid.shape))
        notes.append(f"positions resampled from {before} to {now} ({method})")
    adapted[name] = table
    return adapted, notes


def adapt_position_maps(
    model: Any, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any]
) -> tuple[Flat, list[str]]:
    """Learned positions that are a map `[1, Y, X, C]`, as VOLO's, are resampled to the model's: they say their
    sides."""
    name = "pos_embed"
    if name not in loaded or name not in fresh or loaded[name].ndim != 4 or len(fresh[name].shape) != 4:
        return dict(loaded), []
    table, shape = loaded[name], tuple(fresh[name].shape)
    if table.shape == shape or table.shape[-1] != shape[-1]:
        return dict(loaded), []
    method = model.position_resample
    rows = resample_positions(table.reshape(1, -1, shape[-1]), table.shape[1:3], shape[1:3], method=method)
    before, now = (" x ".join(map(str, sides)) for sides in (table.shape[1:3], shape[1:3]))
    note = f"positions resampled from {before} to {now} ({method})"
    return dict(loaded) | {name: np.asarray(rows).reshape(shape)}, [note]


def adapt_relative_biases(
    model: Any, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any]
) -> tuple[Flat, list[str]]:
    """Tables of bias by relative position for another window or grid are resampled, as for DiNAT-Large with a window of
    11 (arXiv:2209.15001); a model whose official code does so otherwise says it (`bias_resample`).
    """
    method = getattr(model, "bias_resample", "cubic")
    adapted, changes = dict(loaded), dict[tuple[tuple[int, ...], tuple[int, ...]], None]()
    for name, table in loaded.items():
        own = fresh.get(name)
        if not name.endswith(".relative_bias") or own is None or table.shape == tuple(own.shape):
            continue
        if table.ndim != 3 or table.shape[0] != own.shape[0] or not all(side % 2 for side in table.shape[1:]):
            continue  # of another model: the shapes are reported
        adapted[name] = np.asarray(resample_relative_bias(table, own.shape[1:], method=method))
        changes[table.shape[1:], tuple(own.shape[1:])] = None
    sides = (tuple(" x ".join(map(str, shape)) for shape in change) for change in changes)
    name = "bicubic" if method == "cubic" else method
    return adapted, [f"relative position biases resampled from {before} to {now} ({name})" for before, now in sides]


STEPS: tuple[Callable[..., tuple[Flat, list[str]]], ...] = (
    adapt_classifiers,
    adapt_positions,
    adapt_position_maps,
    adapt_relative_biases,
)
"""Each `(model, loaded, fresh) -> (adapted, notes)`, and raises ValueError where it should adapt and cannot."""


def classes_of(flat: Mapping[str, Any], head: str) -> int:
    """The number of classes of a classifier among parameters by our names; 0 without it."""
    leaves = [value for name, value in flat.items() if name.startswith(f"{head}.")]
    return leaves[0].shape[-1] if leaves and leaves[0].shape else 0


def _tokens(flat: Mapping[str, np.ndarray]) -> list[str]:
    return [token for token in TOKENS if token in flat and flat[token].ndim == 3]


def _grid_for(model: Any, image_size: tuple[int, int] | None) -> tuple[int, ...] | None:
    """The grid that the model has for images of another size; None where it does not say it."""
    try:
        return tuple(model.patch_embed.grid_shape(*image_size)) if image_size else None
    except (AttributeError, ValueError):
        return None


def _layout(
    rows: int, wanted: int, loaded: Mapping[str, np.ndarray], grid: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """(prefix rows, sides of the grid) of a table.

    The model's own convention goes first, since a square grid and a grid with a class row can have as many rows. Then
    rows for all of the file's tokens, for the class token alone (DINOv2 with registers), and for none.
    """
    places = math.prod(grid)
    tokens = [loaded[token].shape[1] for token in _tokens(loaded)]
    conventions = list(dict.fromkeys([wanted, sum(tokens), int("cls_token" in loaded), 0]))
    for group in ([conventions[0]], conventions[1:]):
        if found := [prefix for prefix in group if rows - prefix == places]:
            return found[0], grid
        for prefix in group:
            side = math.isqrt(max(rows - prefix, 0))
            if side and side * side == rows - prefix:
                return prefix, (side, side)
    raise ValueError(
        f"pos_embed: {rows} rows are not {wanted} prefix tokens and a square grid; they cannot be resampled"
    )
