"""Swin, tied to timm's implementation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from families.vit.config import norm_eps
from official_config import Config, arguments, huggingface_options, named_object
from references import Reference, Values

from models.core.errors import unknown_name
from models.families.swin import FAMILY
from models.families.swin.model import SwinTransformer
from models.layers.pool import GLOBAL_POOLS

_RENAMED = {
    "in_chans": "channels",
    "embed_dim": "width",
    "num_heads": "heads",
    "head_dim": "head_width",
    "window_size": "window",
    "drop_rate": "head_dropout",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path",
}
_SAME = ("patch_size", "num_classes", "depths", "mlp_ratio", "qkv_bias")
# How a new model starts and on what device, and which images it takes: a model of ours takes images of any size.
_NOT_NEEDED = ("weight_init", "device", "dtype", "strict_img_size", "dynamic_img_size")
_TRANSLATED = ("img_size", "always_partition", "global_pool", "norm_layer", "embed_layer")
_DEFAULTS: Config = {
    "img_size": 224,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "global_pool": "avg",
    "norm_layer": "torch.nn.LayerNorm",
    "drop_path_rate": 0.1,
}


def swin_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our SwinTransformer from those of timm's.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    given = arguments(config, _DEFAULTS)
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in _SAME:
            options[key] = _tuples(value)
        elif key in _RENAMED:
            options[_RENAMED[key]] = _tuples(value)
        elif key not in _TRANSLATED and key not in _NOT_NEEDED:
            known = (*_SAME, *_RENAMED, *_TRANSLATED, *_NOT_NEEDED)
            raise ValueError(unknown_name("argument of timm's SwinTransformer", key, known))
    if named_object(given.get("embed_layer", "PatchEmbed"))[0] != "PatchEmbed":
        raise ValueError(f"timm argument embed_layer={given['embed_layer']!r} has no counterpart here")
    options["shrink_windows"] = not given.get("always_partition", False)
    options["pool"] = timm_pool(given["global_pool"])
    options["norm_eps"] = norm_eps(given["norm_layer"])
    # timm's patch embedding does not see rows and columns behind the last whole patch.
    sides, patch = (_pair(given[name]) for name in ("img_size", "patch_size"))
    options["image_size"] = tuple(side // size * size for side, size in zip(sides, patch, strict=True))
    return options


def timm_pool(name: str | None) -> str:
    """Our name of a global pooling of timm's, whose `fast` ones give the same numbers.

    Raises:
      ValueError: no pooling (an empty name), or an unknown one.
    """
    plain = (name or "").lower().removeprefix("fast") or ("avg" if name else "")
    if plain not in GLOBAL_POOLS:
        raise ValueError(unknown_name("value of timm argument global_pool", str(name), GLOBAL_POOLS))
    return plain


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, Sequence) else value


def evaluate_swin(model: SwinTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of timm's modules, maps `[B, Y, X, C]`."""
    patch = model.patch_embed.proj.patch
    rows, columns = (side // size * size for side, size in zip(inputs["x"].shape[2:], patch, strict=True))
    outputs = model.features(inputs["x"][:, :, :rows, :columns].transpose(0, 2, 3, 1), layers=range(model.depth))
    last = f"stages.{len(model.stages) - 1}"
    named = {name.replace("stages.", "layers.").replace(".embedded", ".downsample"): x for name, x in outputs.items()}
    for name, x in list(named.items()):
        if ".blocks." in name:
            named[name] = x.reshape(named[name.partition(".blocks.")[0]].shape)
    named |= {
        "patch_embed": outputs["embedded"],
        "layers": outputs[last],
        "norm": outputs["tokens"].reshape(outputs[last].shape),
        "head.global_pool": outputs["pooled"],
        "head": outputs["logits" if "logits" in outputs else "pooled"],
    }
    named["head.fc"] = named["head"]
    return {"y": named["head"]} | {module: named[module] for module in stages}


def evaluate_huggingface(model: SwinTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """What classes of Hugging Face return: a stage's output there is what the next one's merging gives here."""
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1))
    last = len(model.stages) - 1
    maps = [outputs["embedded"], *(outputs[f"stages.{stage}.embedded"] for stage in range(1, last + 1))]
    maps.append(outputs[f"stages.{last}"])
    values = {"y": outputs["logits"]}
    for number, x in enumerate(maps):
        values[f"hidden_states{number}"] = x.reshape(x.shape[0], -1, x.shape[-1])
        values[f"reshaped_hidden_states{number}"] = x.transpose(0, 3, 1, 2)
    return values


_TORCHVISION = {"embed_dim": "width", "num_heads": "heads", "window_size": "window"}


def torchvision_options(config: Config) -> dict[str, Any]:
    """Of torchvision's SwinTransformer."""
    given = arguments(config, {"mlp_ratio": 4.0, "num_classes": 1000})
    return {_TORCHVISION.get(key, key): _tuples(value) for key, value in given.items()} | {"pad_first": True}


REFERENCES = (
    Reference(
        name="swin",
        options=swin_options,
        golden=("swin", "swin[0-9]*", "swin_*"),
        evaluate=evaluate_swin,
        stacked=True,
    ),
    Reference(
        name="swin_huggingface",
        of="swin",
        options=partial(huggingface_options, FAMILY.configs),
        golden=("hf_swin*",),
        evaluate=evaluate_huggingface,
        stacked=True,
    ),
    Reference(
        name="swin_torchvision",
        of="swin",
        options=torchvision_options,
        golden=("torchvision_swin*",),
        evaluate=evaluate_swin,
        stacked=True,
        sized=True,
    ),
)
