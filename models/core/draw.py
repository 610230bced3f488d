"""Arrays that a model starts from, made without a compiled program for each of their shapes.

XLA compiles a program for every shape, which takes longer than the numbers: a ViT-S has a dozen shapes, a hierarchical
model a hundred. With JAX's default generator (Threefry, `jax_threefry_partitionable`) number i of a draw depends on the
key and on i alone, so that one program which draws a piece of fixed length, starting anywhere, serves every shape. The
numbers are those of `jax.random`, on CPUs bit for bit: its own functions draw a piece, from a generator that starts to
count elsewhere.

Where something is traced (`jax.jit`, `jax.eval_shape`, a key under `jax.vmap`) or a mesh is set, and for keys of
another generator, it is the plain call of `jax.random` that is traced or run.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry2x32_p
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

Shape = Sequence[int]
Sampler = Callable[[PRNGKeyArray, Shape, Any], jax.Array]

DISTRIBUTIONS: dict[str, Sampler] = {
    "normal": jax.random.normal,
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1),
    "truncated_normal": lambda key, shape, dtype: jax.random.truncated_normal(key, -2, 2, shape, dtype),
}
"""Name -> `sampler(key, shape, dtype)`: of deviation 1; from -1 to 1; of deviation 1 before it is cut at -2 and 2."""

PIECES = (2**12, 2**16)
"""Numbers in a piece: few for small arrays, of which there are many, and more for those that take several of them."""


def draw(
    distribution: str, key: PRNGKeyArray, shape: Shape, dtype: Any = jnp.float32, *, scale: Any = 1.0
) -> Float[Array, "..."]:
    """`scale` times what the sampler of `DISTRIBUTIONS` draws.

    Args:
      scale: a number, rounded to `dtype` before it multiplies.
    """
    factor = np.asarray(scale, dtype)
    if jnp.dtype(dtype) != jnp.float32 or not _pieces_serve(key):
        return DISTRIBUTIONS[distribution](key, shape, dtype) * factor
    numbers = np.empty(math.prod(shape), np.float32)
    length = PIECES[numbers.size > 4 * PIECES[0]]
    words = jax.device_get(jax.random.key_data(key))
    starts = range(0, numbers.size, length)
    pieces = [_piece(distribution, length, np.array([*words, s >> 32, s % 2**32], np.uint32)) for s in starts]
    for start, piece in zip(starts, pieces, strict=True):
        part = numbers[start : start + length]
        np.multiply(jax.device_get(piece)[: part.size], factor, out=part)
    return placed(numbers.reshape(shape))


def full(shape: Shape, value: Any, dtype: Any = jnp.float32) -> Array:
    """`value` everywhere."""
    if _left_to_jax():
        return jnp.full(shape, value, dtype)
    return placed(np.full(shape, value, dtype))


def placed(values: np.ndarray) -> jax.Array:
    """The same values on the default device, in memory of their own."""
    # jnp.asarray would compile a program for each shape.
    return jax.device_put(values, may_alias=False)


def concrete(keys: PRNGKeyArray) -> bool:
    """Whether draws from keys are numbers on the default device; else they are traced, or placed as the keys are."""
    return not (isinstance(keys, jax.core.Tracer) or keys.committed or _left_to_jax())


def _left_to_jax() -> bool:
    # Inside a transformation that traces, what is made is a tracer, even of constants.
    return isinstance(jnp.zeros(()), jax.core.Tracer) or not jax.sharding.get_abstract_mesh().empty


def _pieces_serve(key: PRNGKeyArray) -> bool:
    return (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and concrete(key)
        and key.shape == ()
        and jax.random.key_impl(key) == "threefry2x32"
        and getattr(jax.config, "jax_threefry_partitionable", True)
    )


def _bits_from(start: UInt32[Array, "4"], width: int, shape: Shape) -> UInt32[Array, " N"]:
    """Threefry of the numbers from `start` on, as JAX's partitionable one of the numbers from zero on.

    Args:
      start: the two words of a key, then the upper and the lower word of the first number, a multiple of the length.
    """
    if width != 32:
        raise NotImplementedError(f"pieces of {width} bits")
    first, second, upper, lower = start
    count = lower + jax.lax.iota(jnp.uint32, shape[0])
    left, right = threefry2x32_p.bind(first, second, jnp.broadcast_to(upper, shape), count)
    return left ^ right


def _undefined(*arguments: Any) -> Any:
    raise NotImplementedError("a piece of a draw is no key to derive others from")


_FROM_START = define_prng_impl(
    key_shape=(4,),
    seed=_undefined,
    split=_undefined,
    random_bits=_bits_from,
    fold_in=_undefined,
    name="threefry2x32 from a start",
    tag="start",
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _piece(distribution: str, length: int, start: UInt32[Array, "4"]) -> Float[Array, " N"]:
    key = jax.random.wrap_key_data(start, impl=_FROM_START)
    return DISTRIBUTIONS[distribution](key, (length,), jnp.float32)
