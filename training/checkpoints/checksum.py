"""A checksum of an array that is the same whoever computes it: a host that has all of it, or devices that hold parts.

CRC-32 takes bytes one after another, and in a run of several processes nobody has them all. Here each word of 32 bits
is hashed together with its place in the array, and the hashes are added modulo 2**32: parts can be added in any order,
so that compiled code does it for any sharding. The hash is a bijection of the word: one changed word is always noticed,
and of all other changes all but one in 2**32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# An odd number near 2**32 over the golden ratio, and the multipliers of MurmurHash3's finalizer (A. Appleby, 2011).
_PLACE, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_CHUNK = 1 << 16  # words that fit in a cache with what is computed from them


def of_host(array: np.ndarray) -> int:
    """The checksum of an array on the host, of any type."""
    if array.dtype.name in ("int4", "uint4", "int2", "uint2"):  # a byte each, whose upper bits say nothing
        array = array.astype(np.int8)
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    total = 0
    for begin in range(0, words.size, _CHUNK):
        part = words[begin : begin + _CHUNK].astype(np.uint32)
        places = (np.arange(begin, begin + part.size) & 0xFFFFFFFF).astype(np.uint32)
        total += int(_hash(part, places).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF


def of_device(array: Array, layers: bool = False) -> UInt32[Array, "*layers"]:
    """The same in compiled code, for an array with any sharding.

    Args:
      layers: one checksum for each place of the leading axis instead, as if it were an array of its own.
    """
    words = _words(array)
    places = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(int(layers), words.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places = places + steps * np.uint32(stride & 0xFFFFFFFF)
        stride *= words.shape[axis]
    hashes = _hash(words, jnp.broadcast_to(places, words.shape))
    return hashes.sum(axis=tuple(range(int(layers), words.ndim)), dtype=jnp.uint32)


def _words(array: Array) -> UInt32[Array, "*shape"]:
    """The bits of an array; of types with more than 32, an axis of words is added."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == bool or array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(jnp.int8)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _hash(words: Any, places: Any) -> Any:
    mixed = words ^ (places * _PLACE)
    mixed = (mixed ^ (mixed >> 16)) * _FIRST
    mixed = (mixed ^ (mixed >> 13)) * _SECOND
    return mixed ^ (mixed >> 16)
