"""The arrays of `attn.neighborhood.xla` cut into chunks of key heads and examples, and these into tiles, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from attn.neighborhood.axis_tiles import AxisTiles, axis_tiles, choose_tile
from kernels.neighborhood.pattern import Pattern

Arrays = dict[str, Any]

# Logits computed at a time: they, their probabilities and the halos stay in the caches of a core or two.
BLOCK = 2**17
IN_BOUNDS = "promise_in_bounds"


def tiling(q: Any, k: Any, v: Any, extra_keys: Any, pattern: Pattern) -> Tiling:
    """How a call with these arguments is cut."""
    batch, kv_heads = k.shape[0], k.shape[-2]
    group = q.shape[-2] // kv_heads
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    sizes = choose_tile(pattern, group, k.shape[-1] + v.shape[-1])
    axes = tuple(axis_tiles(axis, size) for axis, size in zip(pattern.axes, sizes, strict=True))
    return Tiling(axes, batch, kv_heads, group, extra, pattern.shape, pattern.bias_shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiling:
    """A pattern in tiles, and how many heads, examples and tiles are computed at a time.

    A chunk has as many examples and then key heads as make a block with one tile of each; a block has as many tiles
    as fill it then. All are multiplied by each other, so what is not a divisor of a number is not used of it.
    """

    axes: tuple[AxisTiles, ...]
    batch: int = dataclasses.field(metadata={"static": True})
    kv_heads: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    extra: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bias_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        """Tokens of the map."""
        return math.prod(self.shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(axis.kind.shape[0] for axis in self.axes)

    @property
    def size(self) -> tuple[int, ...]:
        """Queries of a tile along each axis."""
        return tuple(axis.queries.shape[1] for axis in self.axes)

    @property
    def kinds(self) -> tuple[int, ...]:
        """Kinds of tiles along each axis."""
        return tuple(axis.seen.shape[0] for axis in self.axes)

    @property
    def logits(self) -> int:
        """Logits of one tile: of all query heads of one key head of one example."""
        halo = math.prod(axis.keys.shape[1] for axis in self.axes)
        return self.group * math.prod(self.size) * (halo + self.extra)

    @property
    def examples(self) -> int:
        """Examples of a chunk."""
        return _divisor(self.batch, BLOCK // self.logits)

    @property
    def heads(self) -> int:
        """Key heads of a chunk."""
        return 1 if self.examples < self.batch else _divisor(self.kv_heads, BLOCK // (self.logits * self.batch))

    @property
    def blocks(self) -> Int[Array, "blocks C"]:
        """Numbers of the tiles of each block; those behind the last tile stand for nothing."""
        cells = math.prod(self.counts)
        blocks = -(-cells // max(1, BLOCK // (self.logits * self.examples * self.heads)))
        return jnp.arange(blocks * -(-cells // blocks), dtype=jnp.int32).reshape(blocks, -1)

    def chunks(self, of_queries: Arrays, of_keys: dict[str, tuple[Array, Array | None]]) -> Arrays:
        """Heads-last arrays (and extra keys) as `[chunks, P, B, N, ...]`; `head` is the first head of each chunk."""
        before_heads = len(self.shape) + 1
        arrays: Arrays = {}
        for name, array in of_queries.items():
            rest = array.shape[before_heads + 1 :]
            arrays[name] = self._heads_first(array.reshape(self.batch, self.tokens, self.kv_heads, self.group, *rest))
        for name, (array, extra) in of_keys.items():
            flat = array.reshape(self.batch, self.tokens, self.kv_heads, -1)
            arrays[name] = self._heads_first(flat if extra is None else jnp.concatenate([flat, extra], axis=1))
        heads = jnp.arange(0, self.kv_heads, self.heads, dtype=jnp.int32)
        return arrays | {"head": jnp.repeat(heads, self.batch // self.examples)}

    def _heads_first(self, array: Shaped[Array, "A N K ..."]) -> Shaped[Array, "chunks P B N ..."]:
        _, tokens, _, *rest = array.shape
        split = array.reshape(-1, self.examples, tokens, self.kv_heads // self.heads, self.heads, *rest)
        return jnp.moveaxis(split, (3, 0, 4), (0, 1, 2)).reshape(-1, self.heads, self.examples, tokens, *rest)

    def of_heads(self, array: Any) -> Any:
        """Something of each example and key head `[B, K]` as `[chunks, P, B]`."""
        return self._heads_first(array[:, None])[..., 0]

    def heads_last(self, array: Float[Array, "chunks P B N ..."]) -> Float[Array, "A N K ..."]:
        """The inverse of how `chunks` cuts an array of keys."""
        tokens, *rest = array.shape[3:]
        split = array.reshape(-1, self.batch // self.examples, self.heads, self.examples, tokens, *rest)
        return jnp.moveaxis(split, (0, 1, 2), (3, 0, 4)).reshape(self.batch, tokens, self.kv_heads, *rest)

    def gather(self, arrays: Arrays, table: Float[Array, "#K kinds T #G W"], cells: Int[Array, " C"]) -> Arrays:
        """What the tiles of a block need of a chunk, by name: `[P, B, C, T or W, ...]`, and which keys and kinds."""
        last = math.prod(self.counts) - 1
        indices = jnp.unravel_index(jnp.minimum(cells, last), self.counts)
        queries = _combine(self._of_tiles("queries", indices), self.shape).reshape(len(cells), -1)
        keys = _combine(self._of_tiles("keys", indices), self.shape).reshape(len(cells), -1)
        extra = jnp.arange(self.tokens, self.tokens + self.extra, dtype=keys.dtype)
        keys = jnp.concatenate([keys, jnp.broadcast_to(extra, (len(cells), self.extra))], axis=1)
        is_query = functools.reduce(operator.and_, self._of_tiles("is_query", indices)).reshape(queries.shape)
        kind = _combine([jnp.asarray(axis.kind)[i] for axis, i in zip(self.axes, indices, strict=True)], self.kinds)
        if table.shape[0] > 1:
            table = jax.lax.dynamic_slice_in_dim(table, arrays["head"], self.heads)
        tile = {
            name: array.at[:, :, keys if name in ("k", "v") else queries].get(mode=IN_BOUNDS)
            for name, array in arrays.items()
            if name != "head"
        }
        return tile | {
            "keys": keys,
            "kind": kind,
            "is_query": (is_query & (cells <= last)[:, None])[..., None],
            "table": table.at[:, kind].get(mode=IN_BOUNDS)[:, None],
        }

    def to_tokens(self, tiles: Float[Array, "blocks P B C T ..."]) -> Float[Array, "P B N ..."]:
        """The map from the tiles of all blocks: every token from the place that computed it."""
        cell = _combine(_grid([axis.tile for axis in self.axes]), self.counts).reshape(-1)
        place = _combine(_grid([axis.place for axis in self.axes]), self.size).reshape(-1)
        block, cell = jnp.divmod(cell, tiles.shape[3])
        return jnp.moveaxis(tiles.at[block, :, :, cell, place].get(mode=IN_BOUNDS), 0, 2)

    def zeros(self, arrays: Arrays, table: Float[Array, "K kinds T G W"] | None) -> Arrays:
        """Where the gradients of a chunk are summed: keys, values, and the table if there is one."""
        zeros = {name: jnp.zeros(arrays[name].shape, jnp.float32) for name in ("k", "v")}
        return zeros if table is None else zeros | {"table": jnp.zeros((self.heads, *table.shape[1:]), jnp.float32)}

    def add(self, sums: Arrays, tile: Arrays, dk: Array, dv: Array, d_logits: Float[Array, "P B C T G W"]) -> Arrays:
        """The sums with what the tiles of a block add to them."""
        added = {
            name: sums[name].at[:, :, tile["keys"]].add(halos, mode=IN_BOUNDS) for name, halos in (("k", dk), ("v", dv))
        }
        if "table" in sums:
            added["table"] = sums["table"].at[:, tile["kind"]].add(d_logits.sum(axis=1), mode=IN_BOUNDS)
        return added

    def add_table(self, total: Float[Array, "K ..."], part: Float[Array, "P ..."], head: Array) -> Array:
        """The gradient of the table of all heads with that of the heads of a chunk added."""
        before = jax.lax.dynamic_slice_in_dim(total, head, self.heads)
        return jax.lax.dynamic_update_slice_in_dim(total, before + part, head, 0)

    def table(self, bias: Float[Array, "H ..."] | None) -> Float[Array, "#K kinds T #G W"]:
        """What is added to the logits of each kind of tile: the bias, and -inf for a key that is not seen."""
        seen = functools.reduce(operator.and_, self._of_kinds("seen"))
        seen = seen.reshape(math.prod(self.kinds), math.prod(self.size), -1)
        if bias is None:
            near = jnp.zeros((1, 1, *seen.shape), jnp.float32)
        else:
            near = bias.reshape(self.kv_heads, self.group, -1)[..., self._relative()].astype(jnp.float32)
        table = jnp.moveaxis(jnp.where(seen, near, -jnp.inf), 1, 3)
        return jnp.pad(table, ((0, 0),) * 4 + ((0, self.extra),))

    def fold(self, d_table: Float[Array, "K kinds T G W"]) -> Float[Array, "H R"]:
        """The gradient of the bias from that of the table."""
        relative = self._relative()
        near = jnp.moveaxis(d_table[..., : relative.shape[-1]], 3, 1).reshape(self.kv_heads * self.group, -1)
        d_bias = jnp.zeros((math.prod(self.bias_shape), near.shape[0]), jnp.float32)
        return d_bias.at[relative.reshape(-1)].add(near.T, mode=IN_BOUNDS).T

    def _relative(self) -> Int[Array, "kinds T halo"]:
        """Index of the relative position of each key in a flattened table of them."""
        index = _combine(self._of_kinds("relative"), self.bias_shape)
        return index.reshape(math.prod(self.kinds), math.prod(self.size), -1)

    def _of_tiles(self, name: str, indices: tuple[Int[Array, " C"], ...]) -> list[Array]:
        """A table of every axis at these tiles, as arrays that broadcast to `[C, *places]`."""
        parts = [jnp.asarray(getattr(axis, name))[index] for axis, index in zip(self.axes, indices, strict=True)]
        rank = len(parts)
        return [
            jnp.expand_dims(part, [other + 1 for other in range(rank) if other != number])
            for number, part in enumerate(parts)
        ]

    def _of_kinds(self, name: str) -> list[Array]:
        """A table of every axis, as arrays that broadcast to `[*kinds, *queries, *keys]`."""
        return _grid([getattr(axis, name) for axis in self.axes])


def _grid(parts: list[Any]) -> list[Array]:
    """Arrays of one rank, one for each axis, that broadcast to all first axes, then all second ones, and so on."""
    count, rank = len(parts), parts[0].ndim
    return [
        jnp.expand_dims(jnp.asarray(part), [axis for axis in range(count * rank) if axis % count != number])
        for number, part in enumerate(parts)
    ]


def _combine(indices: list[Array], shape: tuple[int, ...]) -> Array:
    """The index in row-major order of these indices along each axis, which broadcast."""
    flat = indices[0]
    for index, extent in zip(indices[1:], shape[1:], strict=True):
        flat = flat * extent + index
    return flat


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`; 1 if there is none."""
    return max((part for part in range(1, number + 1) if number % part == 0 and part <= most), default=1)
