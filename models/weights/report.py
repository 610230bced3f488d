"""What is said of weights that do not fit a model: one line, and the whole list."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from models.weights.family import family_of
from models.weights.recognize import family_like, variants_like
from models.weights.table import Reading

LIMIT = 400
"""Characters of the line, without the path of a file."""
_LAYER = re.compile(r"(?<=[._])\d+(?=[./])")
_MISFIT = "the weights do not fit the model: "
_ALL = "models.compare_weights lists all"


class Misfit(ValueError):
    """Weights that do not fit a model.

    Attributes:
      report: everything that differs, a line each.
    """

    def __init__(self, line: str, report: str):
        super().__init__(line)
        self.report = report


@dataclasses.dataclass(frozen=True)
class Differences:
    """What is wrong with weights for a model.

    Attributes:
      problems: sentences, of arrays that cannot be converted or adapted.
      entries: arrays by what is wrong with them ("missing", "left over", "of another shape", "of another type"), each
        as it is listed and shorter.
    """

    problems: list[str]
    entries: dict[str, list[tuple[str, str]]]

    def __bool__(self) -> bool:
        return bool(self.problems or self.entries)


def differences(
    loaded: Mapping[str, np.ndarray], own: Mapping[str, Any], reading: Reading, problems: Sequence[str]
) -> Differences:
    """Everything that differs between arrays by our names and the model's own leaves.

    Args:
      reading: where the arrays come from.
      problems: sentences that are said already.
    """

    def there(name: str) -> str:
        return " + ".join(reading.origin.get(name, (name,)))

    kinds: dict[str, list[tuple[str, str]]] = {
        kind: [] for kind in ("missing", "left over", "of another shape", "of another type")
    }
    for name in own:
        if name not in loaded:
            kinds["missing"].append((f"{name} {list(own[name].shape)} (from {there(name)})", there(name)))
    for name, value in loaded.items():
        if name not in own:
            kinds["left over"].append((f"{there(name)} {list(value.shape)}", there(name)))
            continue
        shapes, types = (list(value.shape), list(own[name].shape)), (str(value.dtype), str(own[name].dtype))
        for kind, (found, wanted) in (("of another shape", shapes), ("of another type", types)):
            if found != wanted:
                listed = f"{name} is {found} in the file ({there(name)}), {wanted} in the model"
                kinds[kind].append((listed, f"{there(name)} for {found}, not {wanted}"))
    kinds["left over"] += [(name, name) for name in reading.unknown]
    return Differences(list(problems), {kind: entries for kind, entries in kinds.items() if entries})


def misfit(found: Differences, arrays: Mapping[str, Any], model: nnx.Module, where: str) -> Misfit:
    """The error for weights that do not fit.

    The line lists all where that is short. Else it says what the file looks like, counts, and names the first arrays.

    Args:
      arrays: as the file has them.
      where: what the line begins with.
    """
    problems, looks = _folded(found.problems), ""
    parts = [*problems, *_listed(found, None)]
    if len(_MISFIT + "; ".join(parts)) > LIMIT:
        looks, foreign = looks_like(arrays, model)
        for shown in (0,) if foreign else (2, 1, 0):
            said = [] if foreign else [_cut(problem, 180) for problem in problems[: max(shown, 1)]]
            said += [f"{len(problems) - len(said)} more of this kind"] if len(said) in range(1, len(problems)) else []
            parts = [*filter(None, [looks]), *said, *_listed(found, shown), _ALL]
            if len(_MISFIT + "; ".join(parts)) <= LIMIT:
                break
    return Misfit(f"{where}{_MISFIT}{'; '.join(parts)}", text(found, looks))


def text(found: Differences, looks: str = "") -> str:
    """Everything, a line each; layers that differ alike are one."""
    lines = [*filter(None, [looks]), *_folded(found.problems)]
    for kind, entries in found.entries.items():
        lines += [f"{len(entries)} {kind}:", *(f"    {entry}" for entry in _folded([listed for listed, _ in entries]))]
    return "\n".join(lines)


def looks_like(arrays: Mapping[str, Any], model: nnx.Module) -> tuple[str, bool]:
    """What a file looks like: another family, with the variants that have its shapes, or variants of the model's own.

    Also whether it is another family.
    """
    own, found = family_of(model), family_like(arrays, model)
    if found is None:
        return _looks_inside(arrays, model) or "no family here knows most of its names", False
    variants = variants_like(arrays, found.family)
    shapes = f"the shapes of {' or '.join(variants[:2])}{' ...' if variants[2:] else ''}" if variants else ""
    if found.family is own:
        return (f"it has {shapes}" if shapes else ""), False
    whose = f"{found.names}, {found.known} of {found.of}" + (f"; {shapes}" if shapes else "")
    return f"it looks like {found.family.name} ({whose}), not {own.name}", True


def _looks_inside(arrays: Mapping[str, Any], model: nnx.Module) -> str:
    """Whose names most have below a word that not all begin with: a backbone with something else's head."""
    heads = Counter(name.partition(".")[0] for name in arrays)
    head, count = heads.most_common(1)[0]
    inside = {name.removeprefix(f"{head}."): array for name, array in arrays.items() if name.startswith(f"{head}.")}
    found = family_like(inside, model) if 2 * count > len(arrays) else None
    if found is None:
        return ""
    return f"names below {head} look like {found.family.name} ({found.names}, {found.known} of {found.of}): give these"


def _listed(found: Differences, shown: int | None) -> list[str]:
    """Counts and the first entries of each kind, shortened; None for all of them in full, 0 for none."""
    parts = []
    for kind, entries in found.entries.items():
        folded = _folded([listed if shown is None else short for listed, short in entries])
        named = [entry if shown is None else _cut(entry) for entry in folded[:shown]]
        more = " ..." if named and len(named) < len(folded) else ""
        parts.append(f"{len(entries)} {kind}" + (f": {', '.join(named)}{more}" if named else ""))
    return parts


def _cut(entry: str, limit: int = 120) -> str:
    return entry if len(entry) <= limit else f"{entry[: limit - 3]}..."


def _folded(entries: Sequence[str]) -> list[str]:
    """Entries that differ in the first number of their names only, as one: `blocks.{0-11}.norm1.bias [384]`."""
    groups: dict[str, list[int]] = {}
    single: dict[str, str] = {}
    for entry in entries:
        match = _LAYER.search(entry)
        number = match[0] if match else ""
        # Once in each name: a block's own number, not that of a branch inside it.
        key = " ".join(re.sub(rf"(?<=[._]){number}(?=[./])", "\0", word, count=1) for word in entry.split(" "))
        key = key if match else entry
        groups.setdefault(key, []).append(int(number or 0))
        single[key] = entry
    return [
        single[key] if len(numbers) == 1 else key.replace("\0", f"{{{_ranges(numbers)}}}")
        for key, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-11` or `0-2,5`."""
    starts = [n for n in sorted(numbers) if n - 1 not in numbers]
    ends = [n for n in sorted(numbers) if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
