"""Which implementations a computation runs, and what becomes of a fallback: the setting, and the notes it keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from attn.core.tables import html_table

PLATFORMS = ("cpu", "tpu", "cuda")
"""The platforms that `explain` speaks of. On others runs what needs none of these."""

_POLICIES = ("allow", "error")


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
class Note:
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

    calls: tuple[Note, ...]

    def __getitem__(self, platform: str) -> Choice:
        """The choice for a platform, of a computation with one kind of call."""
        if len(self.calls) != 1:
            raise ValueError(f"there are {len(self.calls)} kinds of calls here: ask each of `calls` for its choices")
        return self.calls[0].choices[platform]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or _NONE

    def _repr_html_(self) -> str:
        """For notebooks: a row for each call and platform."""
        rows = []
        for call in self.calls:
            what = f"{call.operator}\n{call.inputs}"
            for platform, choice in call.choices.items():
                note = f"\n(fallback from {choice.fallback_from})" if choice.fallback_from else ""
                others = "\n".join(f"{name}: {reason}" for name, reason in choice.refused.items())
                rows.append((what, platform, choice.implementation + note, others))
                what = ""
        header = ("call", "platform", "runs", "does not run, and why")
        return html_table("Implementations", header, rows, note="" if rows else _NONE)


_NONE = "no operator with a choice of implementations"


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """`policy` None: what the environment says. `notes`: where calls are noted, if anywhere."""

    policy: str | None = None
    notes: list[Note] | None = None


# A user context is part of the key of every cache of traces, so that no trace made under another setting is used.
_setting = jax.make_user_context(_Setting())


def policy() -> str:
    """What becomes of a fallback here: `"allow"` or `"error"`."""
    return _setting.value.policy or _checked(os.environ.get("FOVEA_FALLBACK", "allow"), "FOVEA_FALLBACK")


def noting() -> bool:
    """Whether someone wants to know what is chosen."""
    return _setting.value.notes is not None


def note(operator: str, inputs: str, choices: dict[str, Choice]) -> None:
    """Remembers a call for whoever asked."""
    notes = _setting.value.notes
    one = Note(operator, inputs, choices)
    if notes is not None and one not in notes:
        notes.append(one)


@contextlib.contextmanager
def fallback(policy: str) -> Iterator[None]:
    """What becomes of a fallback in computations traced inside: `"allow"`, or `"error"`, a ValueError at lowering.

    The error is for the platform with the fallback only: where a TPU would fall back, lowering for a CPU still works.
    Outside of any such context the environment variable `FOVEA_FALLBACK` says which; the default is `"allow"`.

    Raises:
      ValueError: for another policy.
    """
    with _setting(dataclasses.replace(_setting.value, policy=_checked(policy, "fallback"))):
        yield


def _checked(policy: str, where: str) -> str:
    if policy not in _POLICIES:
        raise ValueError(f"{where}: unknown policy {policy!r}; allowed: {', '.join(_POLICIES)}")
    return policy


def explain(function: Callable, /, *arguments: Any, **options: Any) -> Explanation:
    """Which implementations `function(*arguments, **options)` runs on each of `PLATFORMS`, and why no others.

    The function is traced, not run, and the choices are those that lowering makes: this explains an operator
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

    notes: list[Note] = []
    with _setting(dataclasses.replace(_setting.value, notes=notes)):
        jax.eval_shape(traced, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])
    return Explanation(tuple(notes))


def described(inputs: Sequence[Any], about: str) -> str:
    """Inputs of an operator and what else is said to it, as text."""
    arrays = [f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in inputs if array is not None]
    return " ".join([*arrays, about]).strip()
