"""Position tables on a 2-D grid: fixed sin-cos features, and resampling of a learned table to another grid."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sincos_2d(shape: tuple[int, ...], width: int) -> Float[np.ndarray, "N C"]:
    """Fixed 2-D sin-cos table of big_vision (arXiv:2205.01580), `[sin(x w), cos(x w), sin(y w), cos(y w)]`.

    `w_k = 10000 ** (-k / (C/4 - 1))` and x is the column. Row-major, float32.
    """
    if width % 4 or width < 8:
        raise ValueError(f"position='sincos2d' needs a width that is a multiple of 4 and at least 8, got {width}")
    rows, columns = np.mgrid[: shape[0], : shape[1]].reshape(2, -1)
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    x, y = columns[:, None] * omega, rows[:, None] * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def resample_positions(
    table: Float[Array | np.ndarray, "1 N C"],
    old: tuple[int, ...],
    new: tuple[int, ...],
    *,
    prefix: int = 0,
    method: str = "bicubic",
) -> Float[Array | np.ndarray, "1 M C"]:
    """A learned position table on another grid; the first `prefix` rows (class, registers) are copied.

    Works on NumPy and JAX arrays, in float32. All methods are separable, so each axis is one small matrix:

    * `"bicubic"` with antialiasing: timm, PyTorch's `interpolate(mode="bicubic", antialias=True)`;
    * `"bilinear"` without antialiasing: timm's import of npz files;
    * `"corners"`, linear with the corner points kept: big_vision, `scipy.ndimage.zoom(order=1)`;
    * `"cubic"` without antialiasing: PyTorch's `interpolate(mode="bicubic")`;
    * `"dinov2"`, bicubic without antialiasing: the original DINOv2 release, whose scale is `old / (new + 0.1)`.
    """
    if method not in RESAMPLE_METHODS:
        raise ValueError(f"unknown position resampling {method!r}; allowed: {', '.join(RESAMPLE_METHODS)}")
    if table.shape[1] != prefix + old[0] * old[1]:
        raise ValueError(f"position table has {table.shape[1]} rows, expected {prefix} + {old[0]} x {old[1]}")
    if old == new:
        return table
    rows, columns = (RESAMPLE_METHODS[method](a, b).astype(np.float32) for a, b in zip(old, new, strict=True))
    width = table.shape[-1]
    grid: Any = table[0, prefix:].reshape(old[0], old[1], width)
    # Two matrix products: over rows on [old rows, columns * C], then over columns.
    grid = (rows @ grid.reshape(old[0], -1)).reshape(new[0], old[1], width)
    grid = columns @ grid
    xp = np if isinstance(table, np.ndarray) else jnp
    return xp.concatenate([table[:, :prefix], grid.reshape(1, -1, width)], axis=1)


def _centres(old: int, new: int, scale: float | None = None) -> np.ndarray:
    """Positions of the new cell centres in old cells, the convention `align_corners=False`."""
    scale = old / new if scale is None else scale
    return (np.arange(new) + 0.5) * scale - 0.5


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981, eq. 4) with free parameter a."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _clamped(centres: np.ndarray, old: int, kernel, reach: int) -> np.ndarray:
    """Interpolation matrix whose taps outside the grid fall on its edge."""
    base = np.floor(centres).astype(int)
    matrix = np.zeros((len(centres), old))
    for offset in range(1 - reach, 1 + reach):
        taps = np.clip(base + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(len(centres)), taps), kernel(base + offset - centres))
    return matrix


def _bicubic_antialias(old: int, new: int) -> np.ndarray:
    stretch = max(old / new, 1.0)
    distance = (np.arange(old)[None] - _centres(old, new)[:, None]) / stretch
    weights = _cubic(distance, a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _bilinear(old: int, new: int) -> np.ndarray:
    return _clamped(_centres(old, new), old, lambda d: np.maximum(1 - np.abs(d), 0), reach=1)


def _corners(old: int, new: int) -> np.ndarray:
    centres = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    return _clamped(centres, old, lambda d: np.maximum(1 - np.abs(d), 0), reach=1)


def _cubic_plain(old: int, new: int) -> np.ndarray:
    return _clamped(_centres(old, new), old, lambda d: _cubic(d, a=-0.75), reach=2)


def _dinov2(old: int, new: int) -> np.ndarray:
    centres = _centres(old, new, scale=old / (new + 0.1))
    return _clamped(centres, old, lambda d: _cubic(d, a=-0.75), reach=2)


RESAMPLE_METHODS = {
    "bicubic": _bicubic_antialias,
    "bilinear": _bilinear,
    "corners": _corners,
    "cubic": _cubic_plain,
    "dinov2": _dinov2,
}
"""Name -> function (old size, new size) -> interpolation matrix `[new, old]` of one axis."""
