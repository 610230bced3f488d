"""Signatures checked while tests run: shapes and dtypes of arrays, and everything else that is annotated.

A signature that says something false is found where it is called (`conftest.py` turns this on). What a function
refuses itself, with its own words, is no false signature; what it takes against its signature is one.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

HOUSE = ("attn", "kernels", "models")

ARRAY = jax.Array | np.ndarray
AS_GOOD = {jax.Array: ARRAY, int: int | np.integer, float: float | int | np.floating | np.integer}
"""What may be given for what: arrays and numbers of NumPy, and an integer for a number."""
check = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides(AS_GOOD)))

ARRAYS = re.compile(r"Array\b|jaxtyping|np\.ndarray")
_jaxtyped: Any = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Like `jaxtyping.jaxtyped`, but after the call, so that a function's own refusal goes before what its signature
    says; and once for all calls with the same shapes and types, as a check takes longer than most functions to trace.
    """

    def decorate(fn: Any) -> Any:
        # A pytree may hold anything for a moment; what has no arrays is checked by mypy, and would only take time here.
        if not inspect.isfunction(fn) or not any(ARRAYS.search(str(hint)) for hint in fn.__annotations__.values()):
            return fn

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = fn(*args, **kwargs)
            if fn.__code__ not in SIGNATURES:
                SIGNATURES[fn.__code__] = Signature(fn, typechecker)
            SIGNATURES[fn.__code__].check(args, kwargs, result)
            return result

        return call

    return decorate


class Signature:
    """Checks what a function is called with and gives, once for each kind of it."""

    def __init__(self, fn: Any, typechecker: Any):
        self.seen: set[Any] = set()
        results: list[Any] = []
        self.results = results

        def answer(*args: Any, **kwargs: Any) -> Any:
            return results.pop()

        # Names in an annotation are those of the module where it is written.
        stub = types.FunctionType(answer.__code__, fn.__globals__, closure=answer.__closure__)
        self.checking = _jaxtyped(functools.update_wrapper(stub, fn), typechecker=typechecker)

    def check(self, args: Any, kwargs: Any, result: Any) -> None:
        key = kind((args, kwargs, result))
        if key not in self.seen:
            self.results[:] = [result]
            self.checking(*args, **kwargs)
            self.seen.add(key)


# A function inside another one is made again with every call of that one; its code stays.
SIGNATURES: dict[types.CodeType, Signature] = {}


def kind(value: Any) -> Any:
    """All that a signature can say about a value: shape and dtype of an array, what is in a container, a name."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return isinstance(value, jax.Array), type(value).__name__ == "ShapeDtypeStruct", value.shape, value.dtype
    if isinstance(value, dict):
        return tuple((name, kind(one)) for name, one in value.items())
    if isinstance(value, tuple | list):
        return type(value), *map(kind, value)
    return value if isinstance(value, str) or value is None else type(value)


def install() -> None:
    """From now on, modules of the house are imported with their signatures checked."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    jaxtyping.Array = ARRAY  # type: ignore[attr-defined]
    jaxtyping.install_import_hook(HOUSE, "checked.check")
