"""Lengths of training in the unit a recipe is written in: steps, epochs, examples or a share of the run."""

from __future__ import annotations

import dataclasses
import math
import re

_UNITS = {
    "": "steps",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "example": "examples",
    "examples": "examples",
    "%": "percent",
    "percent": "percent",
}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)\s*", re.IGNORECASE)
ALLOWED = "'1000', '90 epochs', '1e6 examples' or '5%'"


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, such as `Duration.parse("90 epochs")`.

    Its text, `str(duration)`, has every digit: reading it again gives the same value. A whole number that was written
    with digits alone is an integer, however large.
    """

    value: int | float
    unit: str

    @classmethod
    def parse(cls, text: str | int | float | Duration) -> Duration:
        """Reads `1000`, `"90 epochs"`, `"1e6 examples"` or `"5%"`; a bare number counts steps.

        Raises:
          ValueError: the text is no duration, or a number of steps is not whole.
        """
        if isinstance(text, Duration):
            return text
        match = None if isinstance(text, bool) else _PATTERN.fullmatch(str(text))
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{text!r} is no duration: write {ALLOWED}")
        value = int(match[1]) if match[1].isdigit() else float(match[1])
        if math.isinf(float(match[1])):
            raise ValueError(f"{text!r} is no finite duration: write {ALLOWED}")
        if unit == "steps" and value != int(value):
            raise ValueError(f"{text!r} is no whole number of steps: write {ALLOWED}")
        if unit == "percent" and value > 100:
            raise ValueError(f"{text!r} is more than the whole run")
        return cls(value, unit)

    def steps(self, *, batch_size: int, examples: int, total: int | None = None) -> int:
        """Converts to optimizer steps, rounded to the nearest, at least 1 unless the duration is 0.

        Args:
          batch_size: examples per step, over all processes.
          examples: examples per epoch.
          total: steps of the whole run; needed for a share of it.
        """
        if self.unit == "percent" and total is None:
            raise ValueError(
                f"'{self}' is a share of the run and cannot say how long the run is: write steps, epochs or examples"
            )
        per_unit = {
            "epochs": examples / batch_size,
            "examples": 1 / batch_size,
            "percent": (total or 0) / 100,
        }
        if self.unit == "steps":
            return int(self.value)
        steps = self.value * per_unit[self.unit]
        return max(math.floor(steps + 0.5), 1) if self.value else 0

    def __str__(self) -> str:
        # The shortest text that reads as the same number; a whole one without its ".0".
        number = repr(self.value).removesuffix(".0")
        return number + {"steps": "", "percent": "%"}.get(self.unit, f" {self.unit}")
