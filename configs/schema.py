"""What a configuration key may hold, and the checks that turn a file and its overrides into a `Config`."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.duration import ALLOWED as DURATIONS
from configs.duration import Duration
from configs.size import ALLOWED as SIZES
from configs.size import Size
from configs.starts import ALLOWED as STARTS
from configs.starts import Starts
from naming import hint as nearest


@dataclasses.dataclass(frozen=True)
class Field:
    """One key: its default (whose type is the key's type), its meaning, and what it allows.

    Attributes:
      default: value without an override. A `Duration` default makes the key a duration, a dictionary a free group of
        options.
      doc: one line for `--print_config`, with the unit.
      choices: the only values allowed, if not empty.
      prefix: where there are choices, text that begins so is allowed besides; whoever reads it checks the rest.
      low, high: inclusive bounds of a number.
      kind: the key's type where the default does not say it: where it is None ("left to whoever reads it", which is
        then allowed as 'none'), `Size` or `Starts`.
      identity: whether a run with another value is another run, so that its workdir cannot be continued.
    """

    default: Any
    doc: str
    choices: tuple = ()
    prefix: str = ""
    low: float | None = None
    high: float | None = None
    kind: type | None = None
    identity: bool = True

    def allowed(self) -> str:
        """Says in words what the key takes."""
        if self.choices:
            return "one of " + ", ".join([*map(str, self.choices), *([f"{self.prefix}NAME"] if self.prefix else [])])
        if isinstance(self.default, Duration):
            return f"a duration such as {DURATIONS}"
        if self.kind is Size:
            return SIZES
        if self.kind is Starts:
            return STARTS
        kind = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "text",
            tuple: "a list such as 'a,b'",
            dict: "options, without NaN and infinities",
        }[self.kind or type(self.default)] + (" or none" if self.default is None else "")
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low} to {self.high}"
        return kind if self.low is None else f"{kind}, at least {self.low}"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        return text


def _convert(field: Field, value: Any) -> Any:
    """Brings a value from a file or from the command line to the type of the key, or raises ValueError or TypeError."""
    kind = field.kind or type(field.default)
    if field.default is None and value in (None, "none", "None"):
        return None
    if kind is Duration:
        return Duration.parse(value)
    if kind is Size:
        return Size.parse(value)
    if kind is Starts:
        return Starts.parse(value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind is tuple:
        if isinstance(value, str):
            # A regular expression may begin as a list does: '(?!head).*', '[ab].*'.
            read = _literal(value) if value.startswith(("(", "[")) else value
            value = read if isinstance(read, tuple | list) else value.split(",")
        if not isinstance(value, tuple | list):
            raise TypeError
        items = tuple(
            _literal(v.strip())
            if isinstance(v, str)
            and isinstance(field.default[:1], tuple)
            and field.default
            and not isinstance(field.default[0], str)
            else v
            for v in value
        )
        items = tuple(v.strip() if isinstance(v, str) else v for v in items if v != "")
        if field.default and any(isinstance(v, str) != isinstance(field.default[0], str) for v in items):
            raise TypeError
        return items
    value = _literal(value) if isinstance(value, str) else value
    if kind is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        json.dumps(value, allow_nan=False, default=str)  # a ValueError: config.json could not hold it
        return {str(k): v for k, v in value.items()}
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise TypeError
        return value
    if not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise TypeError
    return kind(value)


def check(key: str, field: Field, value: Any) -> Any:
    """Returns `value` as the type of `field`, or raises a ValueError of one line that names the key and what it
    takes.
    """
    try:
        value = _convert(field, value)
    except (TypeError, ValueError, OverflowError) as error:
        if field.kind is Starts and isinstance(error, ValueError):  # it says more than what is allowed
            raise ValueError(f"config.{key}: {error}") from None
        raise ValueError(f"config.{key}={value!r}: takes {field.allowed()}") from None
    open_ended = bool(field.prefix) and isinstance(value, str) and value.startswith(field.prefix)
    if field.choices and value not in field.choices and not open_ended:
        raise ValueError(
            f"config.{key}={value!r}: takes {field.allowed()}{nearest(str(value), map(str, field.choices))}"
        )
    number = value.value if isinstance(value, Duration) else value
    if isinstance(number, int | float) and not isinstance(number, bool) and not isinstance(value, str):
        below = field.low is not None and not number >= field.low
        above = field.high is not None and not number <= field.high
        if below or above or not math.isfinite(number):
            raise ValueError(f"config.{key}={value}: takes {field.allowed()}")
    return value


# Dotted keys that running code has read, for the test that every key is read by some shipped configuration.
READS: set[str] = set()


class Config:
    """A checked configuration with attribute access, `config.optim.learning_rate`; it never changes.

    Reading an undeclared key is an AttributeError that lists the nearest names, and every read is recorded, in
    `READS` and for `unread`. Code that looks at a configuration as data (printing, hashing, comparing) uses `as_dict`,
    which records nothing.
    """

    __slots__ = ("_prefix", "_reads", "_values")
    _prefix: str
    _reads: set[str]
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any], prefix: str = "", reads: set[str] | None = None):
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_reads", set() if reads is None else reads)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(f"config.{self._prefix}{name} is not declared{nearest(name, self._values)}")
        value = self._values[name]
        if not isinstance(value, Config):
            READS.add(self._prefix + name)
            self._reads.add(self._prefix + name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"config.{self._prefix}{name}: a running configuration does not change; use configs.replace"
        )

    def __reduce__(self):
        return Config, (self._values, self._prefix)

    def __repr__(self) -> str:
        return f"Config({self._values!r})"


def build(fields: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Checks nested `values` against nested `fields`, fills in defaults, and returns the `Config`.

    Args:
      prefix: of the keys in messages, for a group that is built by itself, such as `"task.options."`.
    """
    reads: set[str] = set()

    def group(fields: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Config:
        if not isinstance(values, Mapping):
            raise ValueError(f"config.{prefix[:-1]}={values!r}: takes a group with the keys {', '.join(fields)}")
        for name in values:
            if name not in fields:
                known = f"; there are: {' '.join(fields)}" if fields else "; there are none"
                raise ValueError(f"config.{prefix}{name}: no such key{nearest(name, fields) or known}")
        out = {}
        for name, field in fields.items():
            key = prefix + name
            if isinstance(field, Field):
                out[name] = check(key, field, values.get(name, field.default))
            else:
                out[name] = group(field, values.get(name, {}), key + ".")
        return Config(out, prefix, reads)

    return group(fields, values, prefix)


def unread(config: Config, fields: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    """Keys in `groups` that differ from their default and that nobody has read, as `config.key=value`."""
    values = flat_values(config)
    declared = {config._prefix + name: field for name, field in flatten(fields).items()}
    defaults = flat_values(build(fields, {}, config._prefix))
    return [
        f"config.{config._prefix}{name}={value}"
        for name, value in values.items()
        if (key := config._prefix + name).startswith(tuple(groups))
        and key in declared
        and value != defaults[name]
        and key not in config._reads
    ]


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Field]:
    """Returns the fields by dotted key."""
    out: dict[str, Field] = {}
    for name, field in fields.items():
        out.update({prefix + name: field} if isinstance(field, Field) else flatten(field, f"{prefix}{name}."))
    return out


def as_dict(
    config: Config, convert: Callable[[Any], Any] = lambda v: str(v) if isinstance(v, Duration) else v
) -> dict[str, Any]:
    """Returns the nested values, ready for JSON, without recording reads."""
    return {k: as_dict(v, convert) if isinstance(v, Config) else convert(v) for k, v in config._values.items()}


def flat_values(config: Config) -> dict[str, Any]:
    """Returns `{dotted key: JSON value}` without recording reads."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for k, v in values.items():
            out.update(walk(v, f"{prefix}{k}.") if isinstance(v, dict) and prefix + k not in _FREE else {prefix + k: v})
        return out

    return walk(json.loads(json.dumps(as_dict(config))), "")


_FREE = ("model.options", "optim.options", "task.options")


def digest(config: Config) -> str:
    """Returns 12 hexadecimal digits that name this configuration."""
    return hashlib.sha256(json.dumps(as_dict(config), sort_keys=True).encode()).hexdigest()[:12]
