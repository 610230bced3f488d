"""What may be said to neighborhood attention: checks of its arrays, whose errors list the legal choices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.core.arguments import check_dtypes, check_heads, shapes_of
from kernels.neighborhood.pattern import Pattern, PerAxis, per_axis


def check_arrays(q: Any, k: Any, v: Any, extra_keys: Any = None, extra_values: Any = None) -> None:
    """Shapes and dtypes that belong together.

    Raises:
      ValueError: naming the array, with the legal choices.
    """
    arrays = {"q": q, "k": k, "v": v, "extra_keys": extra_keys, "extra_values": extra_values}
    if (extra_keys is None) != (extra_values is None):
        raise ValueError("extra_keys and extra_values: only one of them is given; allowed: both, or neither")
    shapes = shapes_of(**arrays)
    if q.ndim not in (4, 5, 6):
        raise ValueError(f"{shapes}: q has {q.ndim} axes; allowed: [batch, 1 to 3 axes of a map, heads, head dim]")
    for name in ("k", "v"):
        if arrays[name].ndim != q.ndim or arrays[name].shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{shapes}: {name} must have the batch and the map of q, {tuple(q.shape[:-2])}")
    check_heads(q, k, v, shapes)
    for name, like in (("extra_keys", k), ("extra_values", v)):
        extra = arrays[name]
        if extra is None:
            continue
        wanted = (q.shape[0], "M", *like.shape[-2:])
        legal = extra.ndim == 4 and (extra.shape[0], *extra.shape[2:]) == (q.shape[0], *like.shape[-2:])
        if not legal or extra_keys.shape[1] != extra_values.shape[1]:
            raise ValueError(
                f"{shapes}: {name} must be [{', '.join(map(str, wanted))}], with one M for extra keys and extra values"
            )
    check_dtypes(**arrays)


def usable_bias(bias: Any, heads: int, window: PerAxis, pattern: Pattern) -> Float[Array, "H ..."]:
    """The table in float32; where the pattern has a smaller window than asked for, the centre of the table.

    Raises:
      ValueError: it is not `[heads, 2 * window - 1, ...]` of floating point numbers.
    """
    sizes = per_axis("window", window, len(pattern.axes), 1)
    wanted = (heads, *(2 * size - 1 for size in sizes))
    if tuple(bias.shape) != wanted or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"bias {bias.dtype}{list(bias.shape)}: must be floating point of shape [heads, 2 * window - 1, ...], "
            f"which is {list(wanted)} here"
        )
    centre = [slice(size - used, size + used - 1) for size, used in zip(sizes, pattern.window, strict=True)]
    return bias[:, *centre].astype(jnp.float32)
