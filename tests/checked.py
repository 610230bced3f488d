"""Signatures checked while tests run: shapes and dtypes of arrays, and everything else that is annotated.

A signature that says something false is found where it is called (`conftest.py` turns this on). What a function
refuses itself, with its own words, is no false signature; what it takes against its signature is one.
"""

import functools
import inspect
import re
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
    """Like `jaxtyping.jaxtyped`, but a function's own refusal goes before what its signature says."""

    def decorate(fn: Any) -> Any:
        # A pytree may hold anything for a moment; what has no arrays is checked by mypy, and would only take time here.
        if not inspect.isfunction(fn) or not any(ARRAYS.search(str(hint)) for hint in fn.__annotations__.values()):
            return fn
        checking = _jaxtyped(fn, typechecker=typechecker)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return checking(*args, **kwargs)
            except jaxtyping.TypeCheckError as error:
                if not hasattr(error, "final"):
                    _refuse(fn, args, kwargs)
                    error.final = True  # type: ignore[attr-defined]
                raise

        return call

    return decorate


def _refuse(fn: Any, args: Any, kwargs: Any) -> None:
    """Whatever the function says itself; what is false inside of it is not looked for again on the way out."""
    try:
        fn(*args, **kwargs)
    except jaxtyping.TypeCheckError as error:
        error.final = True  # type: ignore[attr-defined]
        raise


def install() -> None:
    """From now on, modules of the house are imported with their signatures checked."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    jaxtyping.Array = ARRAY  # type: ignore[attr-defined]
    jaxtyping.install_import_hook(HOUSE, "checked.check")
