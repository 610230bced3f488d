"""From `--config=file.py:arg --config.a.b=c` to a checked `Config`."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import errors
from configs import schema, shipped
from configs.base import FIELDS, MOVED
from configs.group import UnknownKey
from configs.schema import Config, Field


def split_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Takes `--config` and `--config.key` out of a command line.

    Returns:
      The file with its argument ("" if absent), the overrides `{dotted key: text}` and the other arguments.
    """
    path, overrides, others = "", {}, []
    waiting = list(arguments)
    while waiting:
        name, given, value = waiting.pop(0).partition("=")
        if name != "--config" and not name.startswith("--config."):
            others.append(name + given + value)
            continue
        if not given:
            if not waiting:
                raise ValueError(f"{name} needs a value: {name}=VALUE")
            value = waiting.pop(0)
        if name == "--config":
            path = value
        else:
            overrides[name.removeprefix("--config.")] = value
    return path, overrides, others


def load(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Runs `get_config` of a configuration file and applies overrides.

    Args:
      path: `file.py` or the name of an experiment of this folder (`configs.names`), either perhaps with `:argument`,
        which is handed to `get_config`.
      overrides: values by dotted key, as text from the command line or as Python values.

    Raises:
      FileNotFoundError: no such file.
      errors.FileOfUser: the file cannot be run, or sets what cannot be; the message begins with `FILE:LINE`.
      ValueError: unknown key, wrong type or impossible value; the message names the key, what it takes and the nearest
      name.
    """
    name, _, argument = path.partition(":")
    file = _find(name)
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={name}: is no Python file (.py) with a function get_config")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UnknownKey as error:
        raise errors.FileOfUser(errors.in_file(error, file, kind=False)) from error
    except (ValueError, OSError):  # the file's own words, or ours about what it asked for
        raise
    except (Exception, SystemExit) as error:  # a file that calls sys.exit would end the command as if it were done
        raise errors.FileOfUser(errors.in_file(error, file)) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    try:
        return from_dict(config.to_dict(), overrides)
    except ValueError as error:
        raise errors.FileOfUser(_placed(str(error), config, overrides or {})) from error


def _find(name: str) -> Path:
    """The file that `--config=name` means: a path, or the name of an experiment of this folder."""
    file = Path(name)
    if file.is_file():
        return file
    if name == file.name and not file.suffix and (known := shipped.file(name)).is_file():
        return known
    beside = {p.name: str(p) for p in file.parent.glob("*.py")} if file.parent.is_dir() else {}
    # Of names of this folder and of files that lie where one was looked for, whichever is nearer.
    names = shipped.names() if name == file.name else []
    hint = schema.nearest(name, names) if not file.suffix else schema.nearest(file.name, beside)
    hint = hint or schema.nearest(file.stem, names) or "; `python -m configs` lists names" * (name == file.name)
    raise FileNotFoundError(f"--config={name}: no such file{hint}")


def _placed(message: str, config: ConfigDict, overrides: Mapping[str, Any]) -> str:
    """The message, after the place in a file where what it is about was set last; unless the command line set it."""
    places = getattr(config, "places", {})
    named = re.findall(r"[a-z_0-9]+(?:\.[A-Za-z_0-9]+)+", message.replace("config.", ""))
    if any(key in named for key in overrides):
        return message
    place = next((places[key] for key in reversed(places) if key in named), "")
    return f"{place}: {message}" if place else message


def keys() -> dict[str, Field]:
    """All keys by their dotted names, in the order in which they are declared."""
    return schema.flatten(FIELDS)


def from_dict(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Builds a `Config` from nested values, such as a saved `config.json`, and overrides by dotted key."""
    values = json.loads(json.dumps(values, default=str)) if not isinstance(values, Config) else schema.as_dict(values)
    _move(values)
    for key, value in (overrides or {}).items():
        _apply(values, MOVED.get(key, key), value)
    return _cross_check(schema.build(FIELDS, values))


def replace(config: Config, **overrides: Any) -> Config:
    """Returns a copy with other values; dots in keys are written as double underscores, `optim__ema=0.9`."""
    return from_dict(schema.as_dict(config), {k.replace("__", "."): v for k, v in overrides.items()})


def _move(values: dict[str, Any]) -> None:
    """Gives the keys of an older configuration their present names, where they differ from what they are unset."""
    train = values.get("train", {})
    if not isinstance(train, dict):
        return
    for old, new in MOVED.items():
        name = old.removeprefix("train.")
        if name not in train:
            continue
        value = train.pop(name)
        if value != _UNSET.get(name, {}):
            _apply(values, new, value)


# What the moved keys were in a configuration that did not set them: their task may be one that has no such option.
_UNSET: dict[str, Any] = {
    "task": "classification",
    "loss": "softmax",
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixup_probability": 1.0,
    "mixup_switch_probability": 0.5,
    "teacher": "",
    "distill": "none",
    "distill_weight": 0.5,
    "distill_temperature": 1.0,
    "token_labels": 0.0,
}


def _apply(values: dict[str, Any], key: str, value: Any) -> None:
    fields: Any = FIELDS
    *parents, last = key.split(".")
    done = ""
    for name in parents:
        if isinstance(fields, Mapping) and name not in fields:
            raise ValueError(f"config.{key}: no group '{done}{name}'{schema.nearest(name, fields)}")
        done += name + "."
        fields = fields[name]
        if isinstance(fields, Field) and not isinstance(fields.default, dict):
            raise ValueError(f"config.{key}: '{done[:-1]}' is a value, not a group; it takes {fields.allowed()}")
        values = values.setdefault(name, {})
        if isinstance(fields, Field):
            # A free group of options: whoever receives them checks the names.
            *inner, last = key.removeprefix(done).split(".")
            for option in inner:
                if values.get(option) is None:
                    values[option] = {}
                values, done = values[option], f"{done}{option}."
                if not isinstance(values, dict):
                    raise ValueError(f"config.{key}: '{done[:-1]}' is a value, not a group: {values!r}")
            values[last] = schema._literal(value) if isinstance(value, str) else value
            return
    if last not in fields:
        known = [k for k in schema.flatten(FIELDS) if k.endswith("." + last)]
        hint = f" (there is {', '.join(known)})" if known else schema.nearest(last, fields)
        raise ValueError(f"config.{key}: no such key{hint or '; there are: ' + ' '.join(fields)}")
    if not isinstance(fields[last], Field):
        raise ValueError(f"config.{key}: a group; set one of its keys: {', '.join(fields[last])}")
    values[last] = value


def _cross_check(config: Config) -> Config:
    """Refuses combinations that no key can be blamed for alone."""
    values = schema.flat_values(config)
    if values["data.batch_size"] % values["optim.accumulate"]:
        raise ValueError(
            f"config.optim.accumulate={values['optim.accumulate']}: must divide "
            f"data.batch_size={values['data.batch_size']}"
        )
    if len(values["data.mean"]) != len(values["data.std"]):
        raise ValueError(
            f"config.data.std has {len(values['data.std'])} channels, config.data.mean {len(values['data.mean'])}: "
            f"equally many are needed"
        )
    if not all(isinstance(s, int | float) and s > 0 for s in values["data.std"]):
        raise ValueError(f"config.data.std={values['data.std']}: takes positive numbers")
    if values["train.steps"].endswith("%"):
        raise ValueError(
            f"config.train.steps={values['train.steps']}: the run's own length cannot be a share of it: write "
            f"steps, epochs or examples"
        )
    if values["mesh.data"] == 0:
        raise ValueError("config.mesh.data=0: takes -1 or a number of devices, at least 1")
    return config


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Lists keys (`key: saved -> now`) in which a saved configuration is another run than `config`."""
    before, now = schema.flat_values(from_dict(saved)), schema.flat_values(config)
    found = []
    for key, field in schema.flatten(FIELDS).items():
        if not field.identity or before[key] == now[key]:
            continue
        if not isinstance(field.default, dict):
            found.append(f"{key}: {before[key]!r} -> {now[key]!r}")
            continue
        for name in dict.fromkeys([*before[key], *now[key]]):
            was, value = (repr(options[name]) if name in options else "unset" for options in (before[key], now[key]))
            if was != value:
                found.append(f"{key}.{name}: {was} -> {value}")
    return found


def unread(
    config: Config, fields: Mapping[str, Any] = FIELDS, groups: Sequence[str] = ("model.", "optim.", "task.")
) -> list[str]:
    """Keys that differ from their default and that nobody has read, as `config.key=value`: whoever set them expected
    something of them.

    Args:
      fields: what `config` was built from.
      groups: only keys that begin with one of these.
    """
    return schema.unread(config, fields, groups)


def describe(config: Config, task_options: Mapping[str, Field] | None = None) -> str:
    """Returns the configuration as text, one documented key a line, marked with * where it differs from the default.

    Args:
      task_options: those of the task, which takes the place of the key `task.options`.
    """
    fields, values = schema.flatten(FIELDS), schema.flat_values(config)
    defaults = schema.flat_values(schema.build(FIELDS, {}))
    if task_options is not None:
        prefix = "task.options."
        own = schema.build(task_options, values["task.options"], prefix)
        place = list(fields).index("task.options")
        items = [item for item in fields.items() if item[0] != "task.options"]
        items[place:place] = [(prefix + name, field) for name, field in task_options.items()]
        fields = dict(items)
        values |= {prefix + name: value for name, value in schema.flat_values(own).items()}
        unset = schema.build(task_options, {}, prefix)
        defaults |= {prefix + name: value for name, value in schema.flat_values(unset).items()}
    width = max(len(f"{k} = {values[k]}") for k in fields if len(str(values[k])) < 40) + 2
    return "\n".join(
        f"{'*' if values[k] != defaults[k] else ' '} {f'{k} = {values[k]}':<{width}}# {f.doc}"
        for k, f in fields.items()
    )
