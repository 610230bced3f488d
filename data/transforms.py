"""The transforms by name, and the strings that name them: `random_resized_crop(224)|flip|normalize|erase(0.25)`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from data.colour import ColorJitter, Erase, Normalize, Statistics, ToGray, ToRgb, ValueRange, as_array
from data.fields import PadRows, Tokenize, View
from data.geometric import CenterCrop, InceptionCrop, Pad, RandomCrop, RandomFlip, RandomResizedCrop, Resize
from data.kinds import PICTURES
from data.randaugment import RandAugment, ThreeAugment
from data.source import ExampleError, Record
from data.transform import Example, Transform, image_size
from naming import unknown

TRANSFORMS: dict[str, type[Transform]] = {
    "center_crop": CenterCrop,
    "color_jitter": ColorJitter,
    "erase": Erase,
    "flip": RandomFlip,
    "inception_crop": InceptionCrop,
    "normalize": Normalize,
    "pad": Pad,
    "pad_rows": PadRows,
    "randaugment": RandAugment,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "resize": Resize,
    "three_augment": ThreeAugment,
    "to_gray": ToGray,
    "to_rgb": ToRgb,
    "tokenize": Tokenize,
    "value_range": ValueRange,
    "view": View,
}


@dataclass(frozen=True)
class Pipeline:
    """Transforms in order, as one function of (record, kinds of its fields, generator)."""

    transforms: tuple[Transform, ...]

    def __call__(self, record: Record, kinds: Mapping[str, str], rng: np.random.Generator) -> Record:
        """The transformed record: images are uint8 [H, W, C], or float32 after `normalize`; strings are left out.

        Raises:
            ValueError: a transform cannot act on these fields.
            ExampleError: this record cannot be used.
        """
        self.kinds(kinds)
        example = Example(dict(record), dict(kinds))
        for name, kind in kinds.items():
            example.values[name] = _opened(example.values[name], kind, name)
        for transform in self.transforms:
            transform(example, rng)
        result: Record = {"index": np.int64(record["index"])}
        for name, kind in example.kinds.items():
            value = example.values[name]
            if kind in PICTURES:
                example.change(name, as_array)
                result[name] = np.stack(example.values[name]) if isinstance(value, list) else example.values[name]
            elif not isinstance(value, str):
                result[name] = np.asarray(value)
        return result

    def kinds(self, kinds: Mapping[str, str]) -> dict[str, str]:
        """The fields of what comes out, given those of the source.

        Raises:
            ValueError: an `on=` that names none of them, or a transform that cannot act on one; one line.
        """
        known = dict(kinds)
        for transform in self.transforms:
            for name in (transform.on,) if isinstance(transform.on, str) else transform.on or ():
                if name not in known:
                    raise ValueError(unknown(f"field in on= of {type(transform).__name__}:", name, known))
            if reason := transform.refusal(known):
                raise ValueError(f"transform {_name(transform)!r} {reason}")
            known = transform.kinds_after(known)
        return known


def _name(transform: Transform) -> str:
    return next((name for name, kind in TRANSFORMS.items() if kind is type(transform)), type(transform).__name__)


def _opened(value: Any, kind: str, field: str) -> Any:
    """A value of a record in the form that transforms take: of views and videos a list, without truth a 0."""
    if kind in ("views", "video"):
        images = [to_pillow(image) for image in value]
        sizes = sorted({image_size(image) for image in images})
        if len(sizes) != 1:
            some = ", ".join(f"{width}x{height}" for width, height in sizes[:3])
            raise ExampleError(f"{field!r} ({kind}) must hold images of one size, and has {some or 'no image'}")
        return images
    if kind in ("depth", "disparity"):
        return np.nan_to_num(np.asarray(value, np.float32), nan=0, posinf=0, neginf=0)
    if kind == "camera":
        return np.asarray(value, np.float32)
    return to_pillow(value) if kind == "image" else value


def parse_transforms(text: str, mean: Statistics = 0.5, std: Statistics = 0.5) -> Pipeline:
    """Reads `name(arguments)|name|...`; arguments are literals, and `on=` restricts a transform to some fields.

    `mean` and `std` (of values between 0 and 1) are what `normalize` and the fill colours use unless told otherwise.
    Raises ValueError naming the transform or argument, what is allowed and the nearest name.
    """
    try:
        tree = ast.parse(text.strip() or "()", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read transforms {text!r}: {error.msg} at column {error.offset}") from error
    if not text.strip():
        return Pipeline(())
    return Pipeline(tuple(_build(node, text, mean, std) for node in _chain(tree)))


def _chain(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_chain(node.left), *_chain(node.right)]
    return [node]


def _build(node: ast.expr, text: str, mean: Statistics, std: Statistics) -> Transform:
    call = node if isinstance(node, ast.Call) else None
    name_node = call.func if call else node
    if not isinstance(name_node, ast.Name):
        raise ValueError(f"cannot read transforms {text!r}: write name or name(arguments), joined by |")
    name = name_node.id
    if name not in TRANSFORMS:
        raise ValueError(unknown("transform", name, TRANSFORMS))
    kind = TRANSFORMS[name]
    try:
        positional = [ast.literal_eval(argument) for argument in (call.args if call else ())]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in (call.keywords if call else ())}
    except ValueError:
        raise ValueError(f"arguments of transform {name!r} must be numbers, strings or tuples: {text!r}") from None
    signature = inspect.signature(kind)
    for key in named:
        if key not in signature.parameters:
            raise ValueError(unknown(f"argument of transform {name!r}:", key, signature.parameters))
    try:
        bound = signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"transform {name!r}: {error}; it takes {', '.join(signature.parameters)}") from None
    hints = get_type_hints(kind)
    for key, value in bound.arguments.items():
        if not _fits(value, hints[key]):
            raise ValueError(f"argument {key!r} of transform {name!r} must be {_spell(hints[key])}, got {value!r}")
    transform = kind(*positional, **named)
    defaults = {"mean": mean, "std": std, "fill": tuple(255 * float(value) for value in np.atleast_1d(mean))}
    missing = [item.name for item in fields(transform) if getattr(transform, item.name) is None]
    given: dict[str, Any] = {key: defaults[key] for key in missing if key in defaults}
    return replace(transform, **given)


def _fits(value: object, hint: Any) -> bool:
    """Whether a literal is of the annotated type; an int will do for a float."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        options = get_args(hint)
        repeated = options[-1] is Ellipsis
        if not isinstance(value, (tuple, list)) or not (repeated or len(value) == len(options)):
            return False
        wanted = options[:1] * len(value) if repeated else options
        return all(_fits(item, option) for item, option in zip(value, wanted, strict=True))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace(" | None", "")


def to_pillow(value: object) -> object:
    """8-bit arrays with one or three channels as Pillow images, which is what its operations take."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] in (1, 3):
        return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
    return value
