"""Several losses of one task, each of which trains parameters of its own: two players, an actor and its critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

Named = Mapping[str, jax.Array]
Function = Callable[[Named, Named], tuple[jax.Array, dict[str, jax.Array]]]

TAKEN = ("loss", "grad_norm", "learning_rate", "step", "kind", "time")
"""What a row of the log calls something else."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """One of several losses.

    Attributes:
      function: `(outputs, batch) -> (scalar, named parts)`, as `Task.loss`.
      parameters: regular expression of the parameters or modules that this loss alone trains, over unrolled names, as
        in `config.optim.freeze`. For every other loss they are constants.
      every, offset: it is due at steps with `step % every == offset`, counted from 0. At other steps its parameters and
        their optimizer state stay as they are, and its gradient is not computed.

    Raises:
      ValueError: a period or an offset that no step has.
    """

    function: Function
    parameters: str
    every: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"Loss: every={self.every!r}: takes a number of steps, at least 1")
        if not (isinstance(self.offset, int) and 0 <= self.offset < self.every):
            raise ValueError(
                f"Loss: offset={self.offset!r}: takes a whole number from 0 to every - 1 = {self.every - 1}"
            )

    def due(self, step: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Whether it is due at a 0-based step; True, and no array, if it always is."""
        return self.every == 1 or step % self.every == self.offset


def total(losses: Mapping[str, Loss], outputs: Named, batch: Named) -> tuple[jax.Array, dict[str, Any]]:
    """The sum of all losses, for the log, and by name each loss and its parts, as `loss` and `loss.part`."""
    values: list[jax.Array] = []
    scalars: dict[str, Any] = {}
    for name, loss in losses.items():
        value, parts = loss.function(outputs, batch)
        values.append(value)
        scalars |= named(name, value, parts)
    return sum(values[1:], start=values[0]), scalars


def named(name: str, value: jax.Array, parts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A loss and its parts by the names that the log has for them.

    Raises:
      ValueError: the loss is not one number.
    """
    if value.shape:
        raise ValueError(f"losses: {name!r} gives an array {list(value.shape)}; a loss is one number")
    return {name: value, **{f"{name}.{part}": number for part, number in parts.items()}}


def check_names(losses: Mapping[str, Loss]) -> None:
    """Refuses names that a log or a checkpoint cannot have.

    Raises:
      ValueError: names the loss.
    """
    for name, loss in losses.items():
        if not name.isidentifier() or name in TAKEN:
            raise ValueError(
                f"losses: the name {name!r} is taken or no word; it takes letters, digits and '_', and not "
                f"{', '.join(TAKEN)}"
            )
        if not isinstance(loss, Loss):
            raise ValueError(f"losses: {name!r} is no tasks.losses.Loss: {loss!r}")
