"""One call of a block or a mechanism: everything besides the tokens, in one object.

A host makes it from what it is called with, a stack gives each layer its own, and `call.at("attn")` is that of a part:
with a path and a key of its own. It is a pytree whose arrays are leaves.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Edit, Grid, Mask
from models.core.tap import Site, TokenIndex
from models.core.watch import Watch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Tokens of another stream to attend to: text, reference images, the encoder of a decoder.

    Attributes:
      tokens: as wide as they are, which need not be the width of the stream that attends.
      grid: where they sit; None for tokens without a place.
    """

    tokens: Float[Array, "B M W"]
    grid: Grid | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """What goes with the tokens.

    Attributes:
      grid: where the tokens sit.
      train: whether there is noise, and batch statistics move.
      key: for noise; None where there is none.
      layer: number of the layer in its model; traced in a scanned stack.
      span: numbers of all layers that this code is for, in a scanned stack; empty for `layer` alone.
      path: names of the parts on the way here, `"stages.2.blocks.attn"`, without numbers of layers.
      drop_path: probability that an example skips a residual branch; may be traced.
      mask: which tokens see which (`attn.Mask`).
      memory: another stream, for cross-attention.
      condition: vectors that every token is told (time, class): `[B, W]`, or whatever the blocks take.
      positions: what rotary mechanisms turn queries and keys by.
      state: of this part, from the call before (a cache); a part that has state returns `(result, new state)`.
      tap: what looks in (`models/core/tap.py`, `models/core/watch.py`).
    """

    grid: Grid = dataclasses.field(metadata={"static": True})
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    key: PRNGKeyArray | None = None
    layer: Any = 0
    span: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})
    drop_path: Any = 0.0
    mask: Mask | None = None
    memory: Memory | None = None
    condition: Any = None
    positions: Any = None
    state: Any = None
    tap: Watch | None = None

    def replace(self, **changes: Any) -> Call:
        """The same with other entries."""
        return dataclasses.replace(self, **changes)

    def at(self, name: str, **changes: Any) -> Call:
        """That of a part: its path, and an independent key."""
        path = f"{self.path}.{name}" if self.path else name
        return dataclasses.replace(self, path=path, key=self.key_for(name), **changes)

    def key_for(self, name: str) -> PRNGKeyArray | None:
        """A key for one use of randomness, the same for the same name; None where there is no key."""
        # The number of a name must not depend on the process, as that of `hash` does.
        return None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    # --- taps ---------------------------------------------------------------------------------------------------------

    def emit(
        self, name: str, value: Array, axes: str, *, free: Iterable[str] = (), index: TokenIndex | None = None
    ) -> Array:
        """The value as it is, or as a tap gives it back.

        Args:
          name: one of `models.core.tap.SITES`.
          axes: one word for each axis, `"batch tokens channels"`.
          free: axes whose size a tap may change.
          index: which tokens the entries of a map are for.
        """
        if self.tap is None:
            return value
        grids = None if index is None else index.grids
        about = (tuple(axes.split()), frozenset(free), index, self.grid, grids)
        return self.tap.visit(Site(name, self.path, self.layer, self._layers, *about), value)

    def wants(self, *names: str) -> bool:
        """Whether a tap may want one of these sites here."""
        return self.tap is not None and self.tap.wants(names, self.path, self._layers)

    @property
    def _layers(self) -> tuple[int, ...]:
        return self.span or (int(self.layer),)

    def edit(self, axes: str, index: TokenIndex | None = None) -> Edit | None:
        """For an operator: what a tap does to `"logits"` and `"probs"`; None where none looks at them."""
        if not self.wants("logits", "probs"):
            return None

        def visit(name: str, value: Array) -> Array:
            return self.emit(name, value, axes, index=index)

        return visit
