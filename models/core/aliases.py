"""Names by which other projects know our variants: timm's, Hugging Face's, torchvision's.

They are data, one `names.json` in the folder of a family:

    {"timm": {"vit_base_patch16_384": {"variant": "vit_b16", "options": {"image_size": 384},
                                       "tags": {"augreg_in1k": {}, "augreg_in21k": {"num_classes": 21843}}}},
     "huggingface": {"google/vit-base-patch16-224": {"variant": "vit_b16", "options": {"norm_eps": 1e-12}}}}

A tag is what timm puts behind the name of an architecture for one of its files of weights. Its options come on top.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import naming
from models.core.errors import unknown_name

Names = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Source -> name there -> `variant`, and where they differ `options` and `tags`."""

FILE = "names.json"
HUBS = ("hf-hub:", "hf_hub:", "timm/")
"""What may stand before timm's names: its models on the Hugging Face Hub."""


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a name of another project stands for.

    Attributes:
      source: the project.
      name: without a tag.
      variant: ours.
      options: said in place of what the variant says.
      tags: options of each tag that may stand behind the name.
    """

    source: str
    name: str
    variant: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


_MEANINGS: dict[str, list[Meaning]] = {}


def read_names(module: str) -> Names:
    """The names of a family.

    Args:
      module: the `__file__` of the family's `__init__.py`.
    """
    return json.loads((Path(module).parent / FILE).read_text())


def register_names(names: Names) -> None:
    """Makes names of other projects known. One that is said to mean several things is refused when it is used."""
    for source, entries in names.items():
        for name, entry in entries.items():
            meaning = Meaning(source, name, **entry)
            known = _MEANINGS.setdefault(name, [])
            if meaning not in known:
                known.append(meaning)


def meaning(name: str) -> tuple[str, dict[str, Any]] | None:
    """(our variant, options in place of its own) of a name of another project; None for a name that nobody knows.

    >>> meaning("vit_base_patch16_384.augreg_in1k")
    ('vit_b16', {'image_size': 384})

    Raises:
      ValueError: the name means several things, or has a tag that there is not.
    """
    base, dot, tag = _parted(name)
    found = _MEANINGS.get(base, [])
    if dot:
        tagged = [one for one in found if tag in one.tags]
        if found and not tagged:
            tags = sorted({known for one in found for known in one.tags})
            raise ValueError(unknown_name(f"tag of {base!r}", tag, tags) if tags else f"{base!r} has no tags: {name!r}")
        found = tagged
    meant = [(one.variant, {**one.options, **(one.tags[tag] if dot else {})}) for one in found]
    if not meant:
        return None
    if any(other != meant[0] for other in meant):
        ways = ", ".join(f"{_shown(*one)} ({of.source})" for one, of in zip(meant, found, strict=True))
        raise ValueError(f"model name {name!r} is ambiguous: {ways}; say which of these")
    return meant[0]


def repository(name: str) -> str | None:
    """The repository at the Hugging Face Hub that has the weights of a name, of timm's or of Hugging Face's; timm's
    without a tag are its first. None for another name.
    """
    base, dot, tag = _parted(name)
    for one in _MEANINGS.get(base, []):
        if one.source == "huggingface":
            return base
        if one.source == "timm" and one.tags:
            return f"timm/{base}.{tag if dot else next(iter(one.tags))}"
    return None


def first_weights(name: str) -> str | None:
    """Our variant of a name of timm's that stands for its first weights at the variant's own size; None for others,
    of which the variant says less.
    """
    base, dot, tag = _parted(name)
    for one in _MEANINGS.get(base, []):
        if one.source == "timm" and "image_size" not in one.options and (not dot or tag == next(iter(one.tags), None)):
            return one.variant
    return None


def names_of(variant: str) -> Iterator[Meaning]:
    """What other projects call a variant."""
    return (one for known in _MEANINGS.values() for one in known if one.variant == variant)


def nearest(name: str, variants: Iterable[str]) -> list[str]:
    """What somebody may have meant by a name that nobody knows, best first: names of the same kind of model, such as
    `deit` or `swin`, where it says one.

    Args:
      variants: our own names.
    """
    known = [*variants, *_MEANINGS]
    said = set(_words(name))
    alike = [one for one in known if _words(one)[0] in said]
    return naming.close(name, dict.fromkeys(alike or known), cutoff=0.2 if alike else 0.4)


def _words(name: str) -> list[str]:
    """Of a name without its owner, the first of which says the kind of model.

    >>> _words("google/vit-base-patch16-224")
    ['vit', 'base', 'patch16', '224']
    """
    owner, slash, rest = name.casefold().partition("/")
    return re.split(r"[^a-z0-9]+", rest if slash and _SEPARATED.search(rest) else owner + slash + rest)


_SEPARATED = re.compile(r"[a-z].*[-_]")


def _parted(name: str) -> tuple[str, str, str]:
    """A name without what says that it is at the Hub, the dot behind it, and the tag."""
    for hub in HUBS:
        name = name.removeprefix(hub)
    return (name, "", "") if name in _MEANINGS else name.partition(".")


def _shown(variant: str, options: Mapping[str, Any]) -> str:
    said = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return f"{variant} with {said}" if said else variant
