"""Where the time of a run goes: the share spent in useful steps (goodput), what was lost by cause, and how much of the
devices' peak the steps used (MFU).

`goodput.json` in the workdir keeps the seconds over all attempts of a run. Steps that have to be taken again, because
the run was killed after its last save, were useful until then and are lost from then on. Time in which the run had no
process is not counted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from models.core import summary
from training.checkpoints import json_text
from training.checkpoints.whole import write_whole
from training.run.terminal import format_time

STEPS = "steps"
CAUSES = ("start", "compilation", "data", "evaluation", "saving", "skipped", "redone")
"""Of lost time: until the first step, without compilation; compilation; waiting for data while devices are idle;
evaluations; saves, as far as steps wait for them; steps that changed nothing, as they were not finite; steps that were
taken a second time."""
MOST_SAVES = 100  # whose seconds are kept: more than there are checkpoints


class Ledger:
    """The clock of a run: at any time it runs for useful steps or for one cause of loss.

    Args:
      folder: where `goodput.json` is; one that cannot be read is begun anew.
      step: that the run continues from.
      began: when this attempt began, by `time.perf_counter`.
      keeps: whether this process writes the file.
    """

    def __init__(self, folder: Path, step: int, began: float, keeps: bool = True):
        self.path, self.keeps = folder / "goodput.json", keeps
        self.seconds: dict[str, float] = dict.fromkeys((STEPS, *CAUSES), 0.0)
        self.attempts = 1
        self._at_save: dict[int, float] = {}
        self._cause, self._since = "start", began
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            self._continue(json_text.read(self.path), step)

    def _continue(self, kept: Mapping[str, Any], step: int) -> None:
        seconds = {cause: float(kept["seconds"].get(cause, 0.0)) for cause in self.seconds}
        at_save = {int(saved): float(value) for saved, value in kept["steps_at_save"].items() if int(saved) <= step}
        # Of a save that was not noted any more: as much a step as the others took.
        useful = min(at_save.get(step, seconds[STEPS] * step / max(kept["step"], step, 1)), seconds[STEPS])
        seconds["redone"] += seconds[STEPS] - useful
        seconds[STEPS] = useful
        self.seconds, self._at_save, self.attempts = seconds, at_save, int(kept["attempts"]) + 1

    def enter(self, cause: str) -> None:
        """From now on the clock runs for `cause`."""
        now = time.perf_counter()
        self.seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Within, the clock runs for `cause`."""
        before = self._cause
        self.enter(cause)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Counts time that ran for one cause for another one."""
        self.enter(self._cause)
        seconds = min(seconds, self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def shares(self) -> dict[str, float]:
        """`goodput`, and `lost_CAUSE` for what cost anything, as shares of the time so far, with earlier attempts."""
        self.enter(self._cause)
        whole = sum(self.seconds.values()) or 1.0
        lost = {f"lost_{cause}": self.seconds[cause] / whole for cause in CAUSES if self.seconds[cause]}
        return {"goodput": self.seconds[STEPS] / whole, **lost}

    def result(self) -> dict[str, Any]:
        """For `summary.json`: the share, seconds by cause and the number of attempts."""
        share = self.shares()["goodput"]
        seconds = {cause: round(value, 3) for cause, value in self.seconds.items() if value}
        return {"share": round(share, 4), "seconds": seconds, "attempts": self.attempts}

    def note(self, step: int, saved: bool = False) -> None:
        """Keeps the seconds for an attempt that continues this one; `saved`: from this step."""
        self.enter(self._cause)
        if saved:
            self._at_save[step] = self.seconds[STEPS]
            self._at_save = dict(sorted(self._at_save.items())[-MOST_SAVES:])
        if self.keeps:
            content = {"attempts": self.attempts, "step": step, "seconds": self.seconds, "steps_at_save": self._at_save}
            with contextlib.suppress(OSError):  # a run does not end for its statistics
                write_whole(self.path, json_text.text(content) + "\n")

    def __str__(self) -> str:
        shares = self.shares()
        share, whole = shares.pop("goodput"), sum(self.seconds.values())
        lost = sorted(shares.items(), key=lambda item: -item[1])
        said = ", ".join(f"{name.removeprefix('lost_')} {value:.1%}" for name, value in lost if value >= 0.0005)
        attempts = f" in {self.attempts} attempts" if self.attempts > 1 else ""
        return f"goodput {share:.1%} of {format_time(whole)}{attempts}{f'; lost: {said}' if said else ''}"


class Window:
    """Time and steps since the last log line, and their sums over this attempt; the first step, evaluations and saves
    are not counted.
    """

    def __init__(self) -> None:
        self.all_seconds, self.all_waited, self.all_steps = 0.0, 0.0, 0
        self.begin, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def restart(self, count: bool = True) -> None:
        """Begins anew; `count`: what was since the last time belongs to the sums."""
        now = time.perf_counter()
        if count:
            self.all_seconds += now - self.begin
            self.all_waited += self.waited
            self.all_steps += self.steps
        self.begin, self.steps, self.waited = now, 0, 0.0


class Utilization:
    """Model FLOPs of a step over what the devices could do at their peak (MFU, arXiv:2204.02311).

    Args:
      traced: the step, as it is traced to be compiled: its matrix products and convolutions count, bodies of loops as
        often as they run; what rematerialization computes again does not.
      peak: FLOP/s of a device by its kind; None where it is not known, and there is no MFU then.
    """

    def __init__(self, traced: Any, peak: Callable[[str], float | None]):
        of_device = peak(jax.devices()[0].device_kind)
        self.most = of_device and of_device * jax.device_count()
        # A count walks the whole program: only where it is used.
        self.flops = 2.0 * summary.multiply_adds(traced.jaxpr) if self.most else 0.0

    def of(self, steps: int, seconds: float) -> dict[str, float]:
        """`{"mfu": share}` of some steps, or nothing where no peak is known."""
        return {"mfu": steps * self.flops / (seconds * self.most)} if self.most and seconds > 0 else {}
