"""What may be said to an operator: checks that all operators share, whose errors list the legal choices."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

DTYPES = ("float32", "bfloat16", "float16")
"""What queries, keys and values may be."""


def shapes_of(**arrays: Any) -> str:
    """Arrays that are there, as text: `q (2, 5, 3, 8), k (2, 7, 3, 8)`."""
    return ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items() if array is not None)


def check_rank(ranks: tuple[int, ...], axes: str, **arrays: Any) -> None:
    """Every array has one of these numbers of axes, which are described by `axes`; only the first may be empty.

    Raises:
      ValueError: naming the array, with what is allowed.
    """
    for name, array in arrays.items():
        if array.ndim not in ranks:
            raise ValueError(f"{shapes_of(**arrays)}: {name} has {array.ndim} axes; allowed: [{axes}]")
        if any(isinstance(size, int) and size == 0 for size in array.shape[1:]):
            raise ValueError(f"{shapes_of(**arrays)}: {name} has an empty axis; allowed: that of the batch alone")


def check_dtypes(**arrays: Any) -> None:
    """One dtype for all arrays that are there, of `DTYPES`.

    Raises:
      ValueError: for another one, or several.
    """
    dtypes = {name: str(array.dtype) for name, array in arrays.items() if array is not None}
    if len(set(dtypes.values())) > 1 or not set(dtypes.values()) <= set(DTYPES):
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"dtypes {given}; allowed: one for all of them, of {', '.join(DTYPES)}")


def check_heads(q: Any, k: Any, v: Any, shapes: str, *, grouped: bool = True) -> None:
    """Heads and head dims, the last two axes, that belong together.

    Args:
      shapes: of the arrays, as text.
      grouped: several query heads may share a key head.

    Raises:
      ValueError: with the legal choices.
    """
    heads, kv_heads = q.shape[-2], k.shape[-2]
    legal = [n for n in range(1, heads + 1) if heads % n == 0] if grouped else [heads]
    if kv_heads != v.shape[-2] or kv_heads not in legal:
        raise ValueError(
            f"{shapes}: heads of k and v must be one number that divides the {heads} heads of q; allowed: "
            f"{', '.join(map(str, legal))}"
            if grouped
            else f"{shapes}: k and v must have the {heads} heads of q"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{shapes}: k must have the head dim of q, {q.shape[-1]}")


def usable_scale(scale: Any, head_dim: int) -> float:
    """The scale of the logits; `head_dim ** -0.5` for None.

    Raises:
      ValueError: it is no number.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ValueError(f"scale={scale!r}; allowed: a number (not a traced one), or None for head dim ** -0.5")
    return float(scale)


def number_or_array(scale: Any, head_dim: int) -> tuple[float, Any]:
    """The scale of the logits as a number, and None or, where it is an array, that (beside the default number).

    Raises:
      ValueError: it is neither.
    """
    if isinstance(scale, numbers.Real) or not hasattr(scale, "dtype"):
        return usable_scale(scale, head_dim), None
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale {scale.dtype}{list(scale.shape)}; allowed: a number or an array of floating point")
    return head_dim**-0.5, scale


def check_counts(least: int, **counts: Any) -> None:
    """Integers from `least` on.

    Raises:
      ValueError: another one, by name.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < least:
            raise ValueError(f"{name}={count!r}; allowed: an integer of at least {least}")


def check_maps(q: Any, k: Any, v: Any) -> None:
    """Maps `[B, Y, X, H, D]` of queries, keys and values of one batch; keys and values of one map.

    Raises:
      ValueError: naming the array, with what is legal.
    """
    shapes = shapes_of(q=q, k=k, v=v)
    check_rank((5,), "batch, rows, columns, heads, head dim", q=q, k=k, v=v)
    check_dtypes(q=q, k=k, v=v)
    if k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{shapes}: k and v must have the batch of q, {q.shape[0]}, and one map")
    check_heads(q, k, v, shapes)


def check_rate(name: str, rate: Any) -> float:
    """A share of what is dropped.

    Raises:
      ValueError: no number in [0, 1).
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
        raise ValueError(f"{name}={rate!r}; allowed: a number of at least 0 and below 1")
    return float(rate)


def check_key(key: Any, rate: float) -> None:
    """A key for a rate. ValueError without one."""
    if rate and key is None:
        raise ValueError("attention dropout needs a key: call the model with key=...")


def check_bias(bias: Any, sizes: tuple[Any, ...], what: str) -> None:
    """An array that is added to logits of these sizes: floating point, as many axes, each of 1 or of its size.

    Raises:
      ValueError: for another one.
    """
    fits = bias.ndim == len(sizes) and all(n in (1, size) for n, size in zip(bias.shape, sizes, strict=True))
    if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"bias {bias.dtype}{list(bias.shape)}: must be floating point {what}, which is {list(sizes)} here; axes of "
            "1 are repeated"
        )


def is_traced(*arrays: Any) -> bool:
    """Whether the numbers in some array are not known yet."""
    return any(isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct) for array in arrays)
