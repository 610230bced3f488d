"""Which implementation of an operator runs: one choice, used to run it and to explain it.

An operator lists its implementations in order of preference. On a platform, the first one runs that can be lowered for
it, is worth it for these arguments, and does not refuse them. The platform is the one that a program is lowered for,
which need not be the one that lowers it: every platform's choice is traced, and lowering keeps one
(`jax.lax.platform_dependent`).

An implementation that had to be passed over because it refused is a fallback. It shows in `explain`, and under
`fallback("error")` it ends the lowering for that platform.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

PLATFORMS = ("cpu", "tpu", "cuda")
"""The platforms that `explain` speaks of. On others runs what needs none of these."""

_POLICIES = ("allow", "error")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
      module: dotted name of a module with `forward`, `backward` and
        `refuse(*inputs, **options) -> str | None`, which says why these inputs (anything with shape and dtype)
        cannot be had, and optionally `unprofitable` with the same arguments, which says why they are faster without.
        It is imported when the operator is used first.
      platforms: what it can be lowered for; empty: everything.
    """

    name: str
    module: str
    platforms: tuple[str, ...] = ()

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs on one platform.

    Attributes:
      implementation: its name.
      refused: why each other one does not, by name.
      fallback_from: the implementation that would have run, had it not refused; None where nothing better refused.
    """

    implementation: str
    refused: dict[str, str]
    fallback_from: str | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator and its implementations, best first. The last one runs everywhere and refuses nothing."""

    name: str
    implementations: tuple[Implementation, ...]

    def named(self, name: str) -> Implementation:
        """The implementation of that name.

        Raises:
          ValueError: there is none.
        """
        by_name = {implementation.name: implementation for implementation in self.implementations}
        if name not in by_name:
            close = difflib.get_close_matches(str(name), by_name, n=1, cutoff=0.4)
            nearest = f"; nearest: {close[0]}" if close else ""
            allowed = ", ".join(by_name)
            raise ValueError(f"unknown implementation {name!r} of {self.name}{nearest}; allowed: {allowed}")
        return by_name[name]

    def choose(self, platform: str, inputs: Sequence[Any], **options: Any) -> Choice:
        """What runs on a platform for these inputs, and why nothing else does."""
        chosen: Implementation | None = None
        refused: dict[str, str] = {}
        fallback_from = None
        for one in self.implementations:
            if one.platforms and platform not in one.platforms:
                refused[one.name] = f"runs on {' and '.join(one.platforms)} only"
            elif chosen is not None:
                refused[one.name] = f"{chosen.name} comes first"
            elif reason := _unprofitable(one, inputs, options):
                refused[one.name] = reason
            elif reason := _refusal(one, inputs, options):
                refused[one.name] = reason
                fallback_from = fallback_from or one.name
            else:
                chosen = one
        if chosen is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"no implementation of {self.name} for {platform}: {reasons}")
        return Choice(chosen.name, refused, fallback_from)


def _refusal(implementation: Implementation, inputs: Sequence[Any], options: dict[str, Any]) -> str | None:
    if implementation.platforms and not _sizes_known(inputs):
        return "a kernel needs the size of every axis, and one is unknown"
    return implementation.load().refuse(*inputs, **options)


def _unprofitable(implementation: Implementation, inputs: Sequence[Any], options: dict[str, Any]) -> str | None:
    test = getattr(implementation.load(), "unprofitable", None)
    return test(*inputs, **options) if test and _sizes_known(inputs) else None


def _sizes_known(inputs: Sequence[Any]) -> bool:
    """Whether the size of every axis is a number, as it is not in a program exported for any batch."""
    return all(isinstance(size, int) for array in inputs if array is not None for size in array.shape)


# --- running ----------------------------------------------------------------------------------------------------------


def decide(
    operator: Operator, inputs: Sequence[Any], options: dict[str, Any], *, about: str = "", forced: str | None = None
) -> dict[str, Choice]:
    """What runs on each of `PLATFORMS` and, under the key "", on any other one; noted where `explain` asks for it.

    Args:
      inputs: what the choice depends on: arrays, anything with their shape and dtype, or None.
      options: what else it depends on.
      about: the options as text, for explanations and errors.
      forced: name of the implementation to run, whatever else there is; on platforms it has not, nothing runs.

    Raises:
      ValueError: an unknown implementation is forced, or one that refuses.
    """
    if forced is None:
        choices = {platform: operator.choose(platform, inputs, **options) for platform in (*PLATFORMS, "")}
    else:
        one = operator.named(forced)
        if reason := _refusal(one, inputs, options):
            raise ValueError(f"implementation={forced!r} of {operator.name}: {reason}")
        others = [other.name for other in operator.implementations if other is not one]
        choice = Choice(forced, dict.fromkeys(others, f"{forced} is asked for"))
        choices = dict.fromkeys(one.platforms or (*PLATFORMS, ""), choice)
    calls = _setting.value.calls
    call = Call(operator.name, _described(inputs, about), {name: choice for name, choice in choices.items() if name})
    if calls is not None and call not in calls:
        calls.append(call)
    return choices


def dispatch(
    operator: Operator,
    step: str,
    inputs: Sequence[Any],
    others: Sequence[Any] = (),
    *,
    options: dict[str, Any],
    settings: dict[str, Any],
    about: str = "",
    forced: str | None = None,
) -> Any:
    """Runs one step of an operator by the implementation that is chosen for the platform that is lowered for.

    Forward and backward pass give the same inputs and options, and so choose alike.

    Args:
      step: name of a function of the implementations' modules, called as `step(*inputs, *others, **settings)`.
      inputs, options, about, forced: see `decide`; the first of the inputs is an array.
      settings: keyword arguments, hashable.

    Raises:
      ValueError: as `decide`. When the result is lowered: for a platform that a forced implementation does not run on,
        or for which there is a fallback that is not allowed.
    """
    choices = decide(operator, inputs, options, about=about, forced=forced)
    first = checked(operator, inputs, choices, about=about)
    runs = {
        platform: _jitted(operator.named(choice.implementation), step, **settings)
        for platform, choice in choices.items()
    }
    default = runs.pop("", next(iter(runs.values())))
    special = {platform: run for platform, run in runs.items() if run is not default}
    arguments = (first, *inputs[1:], *others)
    if not special:
        return default(*arguments)
    return jax.lax.platform_dependent(*arguments, default=default, **special)


def checked(operator: Operator, inputs: Sequence[Any], choices: dict[str, Choice], *, about: str = "") -> jax.Array:
    """The first input as it is, but lowering it is a ValueError for platforms on which nothing may run.

    These are those without a choice, and those whose choice is a fallback that the setting does not allow.
    """
    stops: dict[str, str | None] = dict.fromkeys(choices)
    policy = _setting.value.policy or _checked_policy(os.environ.get("FOVEA_FALLBACK", "allow"), "FOVEA_FALLBACK")
    for platform, choice in choices.items():
        if choice.fallback_from and policy == "error":
            stops[platform] = (
                f"{operator.name} on {platform or 'this platform'}: {choice.fallback_from!r} refuses "
                f"{_described(inputs, about)} ({choice.refused[choice.fallback_from]}) and {choice.implementation!r} "
                "would run instead, which fallback('error') does not allow"
            )
    if "" not in choices:
        name = next(iter(choices.values())).implementation
        stops[""] = (
            f"implementation={name!r} of {operator.name} runs on {' and '.join(choices)} only, and this program is "
            "lowered for another platform"
        )
    return _stopping(inputs[0], tuple(stops.items())) if any(stops.values()) else inputs[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _stopping(x: jax.Array, stops: tuple[tuple[str, str | None], ...]) -> jax.Array:
    """x; on platforms with a message, its lowering raises it. The platform "" stands for those that are not named."""

    def branch(message: str | None) -> Callable:
        return functools.partial(_stop_p.bind, message=message) if message else lambda x: x

    special = {platform: branch(message) for platform, message in stops}
    return jax.lax.platform_dependent(x, default=special.pop(""), **special)


@_stopping.defjvp
def _stopping_jvp(stops: Any, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return _stopping(primals[0], stops), tangents[0]


def _stop(*_: Any, message: str) -> Any:
    raise ValueError(message)


_stop_p = core.Primitive("stop_lowering")
_stop_p.def_abstract_eval(lambda x, *, message: x)
_stop_p.def_impl(_stop)
mlir.register_lowering(_stop_p, _stop)
batching.defvectorized(_stop_p)


@functools.lru_cache(maxsize=4096)
def _jitted(implementation: Implementation, step: str, **keywords: Any) -> Callable:
    """A step under jit: layers of one shape share its trace and its place in the program."""
    function = getattr(implementation.load(), step)

    def run(*arguments: Any) -> Any:
        return function(*arguments, **keywords)

    run.__name__ = f"{implementation.name}_{step}"
    return jax.jit(run)


def _described(inputs: Sequence[Any], about: str) -> str:
    arrays = [f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in inputs if array is not None]
    return " ".join([*arrays, about]).strip()


# --- the setting, and explanations ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """`policy` None: what the environment says. `calls`: where dispatched calls are noted, if anywhere."""

    policy: str | None = None
    calls: list[Call] | None = None


# A user context is part of the key of every cache of traces, so that no trace made under another setting is used.
_setting = jax.make_user_context(_Setting())


@contextlib.contextmanager
def fallback(policy: str) -> Iterator[None]:
    """What becomes of a fallback in computations traced inside: `"allow"`, or `"error"`, a ValueError at lowering.

    The error is for the platform with the fallback only: where a TPU would fall back, lowering for a CPU still works.
    Outside of any such context the environment variable `FOVEA_FALLBACK` says which; the default is `"allow"`.

    Raises:
      ValueError: for another policy.
    """
    with _setting(dataclasses.replace(_setting.value, policy=_checked_policy(policy, "fallback"))):
        yield


def _checked_policy(policy: str, where: str) -> str:
    if policy not in _POLICIES:
        raise ValueError(f"{where}: unknown policy {policy!r}; allowed: {', '.join(_POLICIES)}")
    return policy


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator: its inputs as text (those of one device, under a mesh), and what runs by platform."""

    operator: str
    inputs: str
    choices: dict[str, Choice]

    def __str__(self) -> str:
        lines = [f"{self.operator}  {self.inputs}"]
        for platform, choice in self.choices.items():
            note = f" (fallback from {choice.fallback_from})" if choice.fallback_from else ""
            lines.append(f"  {platform:<5} {choice.implementation}{note}")
            lines += [f"        not {name}: {reason}" for name, reason in choice.refused.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The calls of operators in a computation, each kind once. Prints as a table."""

    calls: tuple[Call, ...]

    def __getitem__(self, platform: str) -> Choice:
        """The choice for a platform, of a computation with one kind of call."""
        if len(self.calls) != 1:
            raise ValueError(f"there are {len(self.calls)} kinds of calls here: ask each of `calls` for its choices")
        return self.calls[0].choices[platform]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no operator with a choice of implementations"


def explain(function: Callable, /, *arguments: Any, **options: Any) -> Explanation:
    """Which implementations `function(*arguments, **options)` runs on each of `PLATFORMS`, and why no others.

    The function is traced, not run, and the choices are those that the trace holds: this explains an operator
    (`explain(neighborhood_attention, q, k, v, window=7)`), a model, a gradient, under a mesh or not.

    Args:
      arguments, options: as the function takes them; arrays may be `jax.ShapeDtypeStruct`.
    """
    leaves, structure = jax.tree.flatten((arguments, options))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def traced(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        whole = [next(remaining) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        positional, named = jax.tree.unflatten(structure, whole)
        return function(*positional, **named)

    calls: list[Call] = []
    with _setting(dataclasses.replace(_setting.value, calls=calls)):
        jax.eval_shape(traced, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])
    return Explanation(tuple(calls))
