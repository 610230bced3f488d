"""What a mechanism is: a module around an operator that says what it takes, and so can be put into every host it fits.

A mechanism is a file of this folder with a class, called as `mechanism(x, call) -> x`, and `MECHANISMS`, its names with
what it declares. Nothing else has to know it: names, tables, refusals and the contract tests follow from there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Edit, Grid, merge_attention
from models.core.call import Call, Memory
from models.core.errors import keyword_options
from models.core.init import scheme
from models.core.tap import TOKENS, TokenIndex
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm

QUERIES = "batch tokens heads dim"
KEYS = "batch keys heads dim"
MAP = "batch heads queries keys"
WINDOWS = "batch windows heads queries keys"


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a mechanism takes and gives.

    Attributes:
      summary: one line: what every token sees.
      paper: where it is from.
      operator: its function in `attn`; empty for none.
      cost: multiply-adds for one example as a formula of N tokens, C channels, H heads.
      prefix: it takes prefix tokens (class token, registers).
      memory: it attends to a memory where there is one.
      masks: kinds of masks that it takes (`attn.Mask.kinds`).
      axes: numbers of grid axes that it takes.
      any_size: a map of any size; else its module says which (`refuse`).
      sites: of `models.core.tap.SITES`, those that it emits besides `attn.in` and `attn.out`.
      shape: `"tokens"`, what it is given; `"heads"`, heads side by side without a projection, perhaps on a smaller map.
    """

    summary: str
    paper: str
    operator: str
    cost: str
    prefix: bool = False
    memory: bool = False
    masks: tuple[str, ...] = ()
    axes: tuple[int, ...] = (2,)
    any_size: bool = True
    sites: tuple[str, ...] = ("q", "k", "v", "logits", "probs", "lse", "heads")
    shape: str = "tokens"

    def refuse(self, what: str, grid: Grid, *, memory: bool = False, masks: tuple[str, ...] = ()) -> str | None:
        """Why a mechanism that declares this (`what`, in words) takes no such grid, memory or mask, whatever its
        options are; None where it may."""
        if grid.prefix and not self.prefix:
            return (
                f"{what} has no place for {grid.prefix} prefix tokens (class token, registers): use average pooling "
                "and no registers, or a mechanism with prefix tokens"
            )
        if len(grid.shape) not in self.axes:
            axes = " or ".join(map(str, self.axes))
            return f"{what} is for grids of {axes} axes, not for one of {tuple(grid.shape)}"
        if memory and not self.memory:
            return f"{what} attends to no other stream (memory): its tokens have no place on the map"
        if wrong := [kind for kind in masks if kind not in self.masks]:
            allowed = f"; it takes {', '.join(self.masks)}" if self.masks else ""
            return f"{what} takes no mask of kind {wrong[0]}{allowed}"
        return None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A name of a mechanism.

    Attributes:
      build: made as `build(width, heads, *, options, rngs)`.
      declaration: what it takes.
      for_grid: options that follow from the grid it is made for, where a host knows it and says nothing else.
    """

    name: str
    build: Callable[..., Mechanism]
    declaration: Declaration
    for_grid: Callable[[Grid], dict[str, Any]] = lambda grid: {}


class Mechanism(nnx.Module):
    """A mechanism says what it computes in `attend`; what it refuses is said before.

    Attributes:
      declaration: what it takes.
    """

    declaration: Declaration

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Any:
        """New tokens, or heads side by side (`Declaration.shape`); with state in the call `(tokens, new state)`.

        Raises:
          ValueError: the grid, a memory or a mask is of no kind that this mechanism takes; one line.
        """
        kinds = () if call.mask is None else call.mask.kinds
        if reason := self.refuse(call.grid, memory=call.memory is not None, masks=kinds):
            raise ValueError(reason)
        x = call.emit("attn.in", x, TOKENS)
        found = self.attend(x, call)
        y, *state = found if isinstance(found, tuple) else (found,)
        if call.state is not None and not state:
            raise ValueError(f"{spoken(type(self))} keeps no state (a cache of earlier tokens)")
        y = call.emit("attn.out", y, TOKENS)
        return (y, *state) if state else y

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Any:
        """What the mechanism computes."""
        raise NotImplementedError

    def refuse(self, grid: Grid, *, memory: bool = False, masks: tuple[str, ...] = ()) -> str | None:
        """Why it takes no such grid, memory or mask; None where it does. One sentence."""
        reason = self.declaration.refuse(spoken(type(self)), grid, memory=memory, masks=masks)
        return reason or self.refuse_map(grid)

    def refuse_map(self, grid: Grid) -> str | None:
        """Why a map of this size cannot be had; None where it can. For mechanisms that take not every size."""
        return None

    def cost(self, grid: Grid) -> int:
        """Multiply-adds for one example, the formula of the declaration."""
        raise NotImplementedError


class ProjectedMechanism(Mechanism):
    """One with a fused projection to queries, keys and values, and a projection of the heads."""

    heads: int
    dropout: float

    def make_inputs(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        qkv_bias: bool,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
        memory_width: int | None = None,
    ) -> None:
        """Sets `qkv`, or for a memory of another width `q` and `kv`, and the norms of queries and keys."""
        self.heads, inside, start = heads, heads * head_width, scheme(init)
        shared: dict[str, Any] = {"use_bias": qkv_bias, "units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        if memory_width is None:
            self.qkv = Linear(width, 3 * inside, kernel_init=start.qkv, split="parts", **shared)
        else:
            self.q = Linear(width, inside, kernel_init=start.linear, split="out", **shared)
            self.kv = Linear(memory_width, 2 * inside, kernel_init=start.linear, split="parts", **shared)
        self.q_norm = LayerNorm(head_width, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(head_width, eps=norm_eps, dtype=dtype) if qk_norm else None

    def make_output(
        self,
        inside: int,
        width: int,
        *,
        proj_bias: bool,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets `norm` and `proj`."""
        self.norm = LayerNorm(inside, eps=norm_eps, dtype=dtype) if scale_norm else None
        units = (self.heads, "heads")
        shared: dict[str, Any] = {"use_bias": proj_bias, "units": units, "dtype": dtype, "rngs": rngs}
        self.proj = Linear(inside, width, kernel_init=scheme(init).linear, split="in", **shared)

    def inputs(self, x: Float[Array, "B N C"], memory: Memory | None = None) -> tuple[Array, Array, Array]:
        """Queries of x, keys and values of the memory or of x."""
        return self.inputs_of(x, memory, self.heads)

    def inputs_of(self, x: Array, memory: Memory | None, heads: int) -> tuple[Array, Array, Array]:
        """The same in so many heads."""
        if getattr(self, "qkv", None) is not None:
            if memory is not None and memory.tokens.shape[-1] != self.qkv.kernel.shape[-2]:
                width, takes = memory.tokens.shape[-1], "memory_width" in keyword_options(type(self))
                hint = f": give it the option memory_width={width}" if takes else ""
                raise ValueError(f"a memory of {width} channels for a mechanism of {self.qkv.kernel.shape[-2]}{hint}")
            q, k, v = project_qkv(self.qkv, x, memory, heads)
        else:
            tokens = x if memory is None else memory.tokens
            q = checkpoint_name(self.q(x), "attention_qkv").reshape(*x.shape[:2], heads, -1)
            fused = checkpoint_name(self.kv.parts(tokens, 2, heads), "attention_qkv")
            k, v = fused[:, :, 0], fused[:, :, 1]
        q = q if self.q_norm is None else self.q_norm(q)
        return q, (k if self.k_norm is None else self.k_norm(k)), v

    def output(self, heads: Float[Array, "B N H D"] | Float[Array, "B N I"]) -> Float[Array, "B N C"]:
        """Heads side by side, projected."""
        heads = heads.reshape(*heads.shape[:2], -1)
        return self.proj(heads if self.norm is None else self.norm(heads))

    def noise(self, call: Call) -> dict[str, Any]:
        """Dropout of probabilities, as an operator takes it."""
        return {"dropout": self.dropout if call.train else 0.0, "key": call.key}

    def projections(self, queries: int, keys: int) -> int:
        """Multiply-adds of the projections of so many queries and keys."""
        kernels = [self.qkv] if getattr(self, "qkv", None) is not None else [self.q, self.kv]
        if len(kernels) == 1:
            each = kernels[0].kernel.size // 3
            inputs = each * queries + 2 * each * keys
        else:
            inputs = kernels[0].kernel.size * queries + kernels[1].kernel.size * keys
        return inputs + self.proj.kernel.size * queries


def spoken(build: Callable[..., Mechanism]) -> str:
    """The class of a mechanism in words: `BiLevelRoutingAttention` is bi level routing attention."""
    kind: Any = build
    while isinstance(kind, functools.partial):
        kind = kind.func
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).strip()


def check_divides(width: int, heads: int, what: str = "width") -> None:
    """ValueError for channels that heads do not divide."""
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads={heads!r}; allowed: an integer of at least 1")
    if width % heads:
        raise ValueError(f"{what} {width} is not divisible by {heads} heads")


def project_qkv(
    qkv: Linear, x: Float[Array, "B N C"], memory: Memory | None, heads: int
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M H D"], Float[Array, "B M H D"]]:
    """Queries from x, keys and values from the memory (x itself without one), through one fused projection, of which
    only what is used is computed.
    """
    if memory is None:
        fused = checkpoint_name(qkv.parts(x, 3, heads), "attention_qkv")
        return fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
    q = checkpoint_name(qkv.parts(x, 3, heads, slice(0, 1)), "attention_qkv")[:, :, 0]
    fused = checkpoint_name(qkv.parts(memory.tokens, 3, heads, slice(1, 3)), "attention_qkv")
    return q, fused[:, :, 0], fused[:, :, 1]


def emit_qkv(call: Call, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values as taps give them back; there may be more keys and values than before."""
    return call.emit("q", q, QUERIES), call.emit("k", k, KEYS, free=("keys",)), call.emit("v", v, KEYS, free=("keys",))


Attend = Callable[..., Any]
"""`attend(q, k, v, *, edit, return_lse)`, an operator with all that goes with it."""


def attended(
    call: Call,
    attend: Attend,
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    axes: str = MAP,
    index: TokenIndex | None = None,
    whole: int | None = None,
) -> Float[Array, "B N H E"]:
    """Heads of a softmax operator on tokens, with all sites of it: `q k v logits probs lse heads`.

    Args:
      axes, index: of its maps.
      whole: tokens of a map of keys, for an operator that takes only as many. A tap may give several maps one after
        the other; then each is attended to by itself, and what they give is merged by the logsumexps, which is
        attention to all of their keys.

    Raises:
      ValueError: keys and values that are no whole maps.
    """
    q, k, v = emit_qkv(call, q, k, v)
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            f"at {call.path} there are {k.shape[1]} keys and {v.shape[1]} values: taps must change both alike"
        )
    copies = 1 if whole is None else k.shape[1] // whole
    if whole is not None and k.shape[1] != copies * whole:
        raise ValueError(
            f"at {call.path} there are {k.shape[1]} keys: a map has {whole}, and there may be several whole ones"
        )
    if whole is None and index is not None and k.shape[1] != index.tokens[1]:
        # Keys that were added are no tokens of this stream.
        extra = np.full(k.shape[1] - index.tokens[1], -1)
        index = dataclasses.replace(index, keys=np.concatenate([np.asarray(index.keys), extra])) if len(extra) else None
    edit: Edit | None = call.edit(axes, index)
    wants_lse = call.wants("lse")
    if copies == 1:
        found = attend(q, k, v, edit=edit, return_lse=wants_lse)
        heads, lse = found if wants_lse else (found, None)
    else:
        parts = [
            attend(q, k[:, i * whole : (i + 1) * whole], v[:, i * whole : (i + 1) * whole], edit=edit, return_lse=True)
            for i in range(copies)
            if whole is not None
        ]
        heads, lse = merge_attention([out for out, _ in parts], [one for _, one in parts])
    if lse is not None and wants_lse:
        call.emit("lse", lse, "batch tokens heads")
    return call.emit("heads", heads, QUERIES)


def token_index(grid: Grid, keys: int | None = None) -> TokenIndex:
    """Of maps over all tokens."""
    beside = grid if keys is None or keys == grid.tokens else Grid((keys,))
    return TokenIndex(np.arange(grid.tokens), np.arange(beside.tokens), (grid, beside))
