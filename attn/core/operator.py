"""An operator: a function of arrays with one or more implementations, and all that is not the arithmetic of one.

An operator lists its implementations in order of preference. On a platform, the first one runs that can be lowered for
it, is worth it for these arguments, and does not refuse them. The platform is the one that a program is lowered for,
which need not be the one that lowers it, so the choice is made when it is lowered (`attn/core/lowering.py`): nothing of
an implementation is traced before, and of those that are not chosen nothing at all.

An implementation that had to be passed over because it refused is a fallback. It shows in `explain`, and under
`fallback("error")` it ends the lowering for that platform.

An implementation is a module with `forward(*inputs, **settings) -> results`, `backward(*inputs, *results that are
kept, *cotangents, **settings) -> gradients` and `refuse(*inputs, **decisive settings) -> str | None`, which says why
these inputs (anything with shape and dtype) cannot be had, and optionally `unprofitable` with the same arguments, which
says why they are faster without, and `unavailable()`, which says why the machine that lowers a program cannot lower it
to this one. One that is `plain` is ordinary JAX: it takes whatever may go with a call (a mask,
dropout, a look at the maps), and has derivatives of every kind. Another one may take some of that (`takes`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

import naming
from attn.core import explain, lowering, shards
from attn.core.explain import PLATFORMS, Choice
from attn.core.shards import Layout

Results = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
      module: dotted name of its module, which is imported when it is looked at first.
      platforms: what it can be lowered for; empty: everything.
      plain: it is ordinary JAX, see above.
      takes: what may go with a call that this one takes although it is not plain.
    """

    name: str
    module: str
    platforms: tuple[str, ...] = ()
    plain: bool = False
    takes: tuple[str, ...] = ()

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """An operator and its implementations, best first. The last one is plain: it runs everywhere and refuses nothing.

    `implementation="reference"` means the plain one whatever it is called.

    Attributes:
      layouts: `(settings, *inputs) -> (layouts of the inputs, layouts of the results)`, None for None.
      results: `(settings, *inputs) -> (jax.ShapeDtypeStruct, ...)`, what `forward` gives.
      decisive: the settings that `refuse` and `unprofitable` are told.
      keeps_results: the results are handed to `backward`, which then need not compute them again.
      keeps_maps: where only a plain implementation could run, on every platform, it is differentiated as it stands and
        keeps what JAX keeps, attention maps among it, rather than computing them again in the backward pass.
      gradients: numbers of the inputs that have one; None: all.
      keys: number of the input that has the number of key heads (`attn/core/vmap.py`).
      definition: the implementation that multiplies what is needed and nothing else, for whoever counts.
    """

    name: str
    implementations: tuple[Implementation, ...]
    layouts: Callable[..., tuple[Sequence[Layout | None], Sequence[Layout | None]]]
    results: Callable[..., tuple[jax.ShapeDtypeStruct, ...]]
    decisive: tuple[str, ...] = ()
    keeps_results: bool = True
    keeps_maps: bool = False
    gradients: tuple[int, ...] | None = None
    keys: int = 1
    definition: str = "reference"

    def named(self, name: str) -> Implementation:
        """The implementation of that name.

        Raises:
          ValueError: there is none.
        """
        by_name = {implementation.name: implementation for implementation in self.implementations}
        by_name.setdefault("reference", self.implementations[-1])
        if name not in by_name:
            close = naming.close(name, by_name, most=1, cutoff=0.4)
            nearest = f"; nearest: {close[0]}" if close else ""
            allowed = ", ".join(by_name)
            raise ValueError(f"unknown implementation {name!r} of {self.name}{nearest}; allowed: {allowed}")
        return by_name[name]

    def choose(
        self, platform: str, inputs: Sequence[Any], settings: Any, asked: Sequence[str] = (), *, anywhere: bool = False
    ) -> Choice:
        """What runs on a platform for these inputs, and why nothing else does.

        Args:
          asked: what goes with the call that only plain implementations take, and those that say so ("dropout").
          anywhere: whatever machine lowers the program; else this one does.
        """
        chosen: Implementation | None = None
        refused: dict[str, str] = {}
        fallback_from = None
        for one in self.implementations:
            if one.platforms and platform not in one.platforms:
                refused[one.name] = f"runs on {' and '.join(one.platforms)} only"
            elif chosen is not None:
                refused[one.name] = f"{chosen.name} comes first"
            elif reason := self._unprofitable(one, inputs, settings):
                refused[one.name] = reason
            elif reason := self._refusal(one, inputs, settings, asked) or (not anywhere and _unavailable(one)) or None:
                refused[one.name] = reason
                fallback_from = fallback_from or one.name
            else:
                chosen = one
        if chosen is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"no implementation of {self.name} for {platform}: {reasons}")
        return Choice(chosen.name, refused, fallback_from)

    def run(
        self,
        inputs: Sequence[Any],
        settings: Any,
        *,
        plain: Callable[..., Results],
        asked: Sequence[str] = (),
        implementation: str | None = None,
        returned: int = 1,
    ) -> Results:
        """The results for these inputs, on a mesh, under `jax.vmap`, differentiable; see `attn/core/lowering.py`.

        Args:
          inputs: arrays, or None; the first is an array with a batch as its first axis.
          settings: what of the call is no array: a frozen dataclass whose fields are keyword arguments of the
            implementations, with `about`, the same as text.
          plain: the call with all that goes with it, `plain(*inputs, **settings)`, in ordinary JAX.
          asked: what goes with it; then `plain` is what runs.
          implementation: by name; None for the best on the platform that is lowered for.
          returned: how many of the results are wanted.

        Raises:
          ValueError: an unknown implementation, or one that refuses; a mesh of a kind that is not served.
        """
        shards.check_mesh(self.name)
        one = None if implementation is None else self.named(implementation)
        call = lowering.Call(self, settings, implementation, explain.policy(), returned)
        if inputs[0].shape[0] == 0:
            shapes = self.results(settings, *inputs)[:returned]
            return tuple(jax.numpy.zeros(shape.shape, shape.dtype) for shape in shapes)
        inline = bool(asked) or (one is not None and one.plain)
        if not inline and one is None and self.keeps_maps:
            choices = (self.choose(platform, inputs, settings, anywhere=True) for platform in PLATFORMS)
            inline = all(self.named(choice.implementation).plain for choice in choices)
        if not inline:
            return lowering.fused(call, *inputs)
        first = self.unfused(inputs[0], inputs, settings, asked, implementation)
        results = plain(first, *inputs[1:], **lowering.keywords(settings))
        return lowering.named(results)[:returned]

    def unfused(
        self, x: jax.Array, inputs: Sequence[Any], settings: Any, asked: Sequence[str], implementation: str | None
    ) -> jax.Array:
        """x, an argument of a plain implementation, as it is; lowering it fails where that may not run.

        The choice is noted for `explain`. Raises ValueError for an implementation that refuses.
        """
        choices = self.decide(inputs, settings, asked, implementation)
        return lowering.stopping(x, self.stops(inputs, settings, asked, choices, explain.policy()))

    def decide(
        self, inputs: Sequence[Any], settings: Any, asked: Sequence[str], implementation: str | None
    ) -> dict[str, Choice]:
        """What runs on each of `PLATFORMS` and, under "", on any other one; noted where `explain` asks for it.

        Raises:
          ValueError: an implementation is asked for that refuses.
        """
        if implementation is None:
            choices = {platform: self.choose(platform, inputs, settings, asked) for platform in (*PLATFORMS, "")}
        else:
            one = self.named(implementation)
            if reason := self._refusal(one, inputs, settings, asked):
                raise ValueError(f"implementation={implementation!r} of {self.name}: {reason}")
            others = [other.name for other in self.implementations if other is not one]
            choice = Choice(one.name, dict.fromkeys(others, f"{implementation} is asked for"))
            choices = dict.fromkeys(one.platforms or (*PLATFORMS, ""), choice)
        if explain.noting():
            about = explain.described(inputs, _about(settings, asked))
            explain.note(self.name, about, {name: choice for name, choice in choices.items() if name})
        return choices

    def stops(
        self, inputs: Sequence[Any], settings: Any, asked: Sequence[str], choices: dict[str, Choice], policy: str
    ) -> dict[str, str | None]:
        """Why nothing may run on a platform, None for those on which something may; "" stands for any other one.

        Nothing may where there is no choice, and where the choice is a fallback that the policy does not allow.
        """
        stops: dict[str, str | None] = dict.fromkeys(choices)
        for platform, choice in choices.items():
            if choice.fallback_from and policy == "error":
                described = explain.described(inputs, _about(settings, asked))
                stops[platform] = (
                    f"{self.name} on {platform or 'this platform'}: {choice.fallback_from!r} refuses {described} "
                    f"({choice.refused[choice.fallback_from]}) and {choice.implementation!r} would run instead, which "
                    "fallback('error') does not allow"
                )
        if "" not in choices:
            name = next(iter(choices.values())).implementation
            stops[""] = (
                f"implementation={name!r} of {self.name} runs on {' and '.join(choices)} only, and this program is "
                "lowered for another platform"
            )
        return stops

    def _refusal(
        self, one: Implementation, inputs: Sequence[Any], settings: Any, asked: Sequence[str] = ()
    ) -> str | None:
        if lacking := [] if one.plain else [name for name in asked if name not in one.takes]:
            return f"has no {' and no '.join(lacking)}"
        if one.platforms and not _sizes_known(inputs):
            return "a kernel needs the size of every axis, and one is unknown"
        refuse = getattr(one.load(), "refuse", None)
        return refuse(*inputs, **self._decisive(settings)) if refuse else None

    def _unprofitable(self, one: Implementation, inputs: Sequence[Any], settings: Any) -> str | None:
        test = getattr(one.load(), "unprofitable", None)
        return test(*inputs, **self._decisive(settings)) if test and _sizes_known(inputs) else None

    def _decisive(self, settings: Any) -> dict[str, Any]:
        return {name: getattr(settings, name) for name in self.decisive}


def _about(settings: Any, asked: Sequence[str]) -> str:
    return f"{settings.about}{' ' if settings.about else ''}with {', '.join(asked)}" if asked else settings.about


def _unavailable(one: Implementation) -> str | None:
    test = getattr(one.load(), "unavailable", None)
    return test() if test else None


def _sizes_known(inputs: Sequence[Any]) -> bool:
    """Whether the size of every axis is a number, as it is not in a program exported for any batch."""
    return all(isinstance(size, int) for array in inputs if array is not None for size in array.shape)
