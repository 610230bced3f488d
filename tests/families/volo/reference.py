"""VOLO tied to timm's and the official implementation."""

from collections.abc import Sequence
from typing import Any

from families.vit.config import norm_eps
from official_config import Config, arguments
from references import Reference, Values

from models.core.errors import unknown_name
from models.families.volo.model import Volo
from models.families.volo.weights import network_places

_RENAMED = {
    "layers": "depths",
    "in_chans": "channels",
    "stem_hidden_dim": "stem_width",
    "embed_dims": "widths",
    "num_heads": "heads",
    "drop_rate": "head_dropout",
    "pos_drop_rate": "position_dropout",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path",
    "use_aux_head": "token_head",
}
_SAME = ("num_classes", "patch_size", "mlp_ratio", "qkv_bias")
_BY_STAGE = {"downsamples": "downsamples", "outlook_attention": "outlook"}
_POOLS = {"token": "token", "avg": "avg", "": "none"}
_TRANSLATED = ("img_size", "global_pool", "norm_layer", "post_layers", "use_mix_token", "pooling_scale")
_NOT_NEEDED = ("device", "dtype")
_DEFAULTS: Config = {
    "img_size": 224,
    "patch_size": 8,
    "global_pool": "token",
    "downsamples": (True, False, False, False),
    "outlook_attention": (True, False, False, False),
    "norm_layer": "torch.nn.LayerNorm",
    "post_layers": ("ca", "ca"),
    "use_mix_token": False,
    "pooling_scale": 2,
}
# Arguments that only the official class has, and its defaults where timm's are others.
_OFFICIAL: Config = {"mlp_ratios": 3.0, "qk_scale": None, "return_mean": False, "return_dense": True, "mix_token": True}
_KERNEL: Config = {"out_kernel": 3, "out_stride": 2, "out_padding": 1}


def volo_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our Volo from those of timm's VOLO, or of the official one if an argument is of that alone.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here, or with which the official model does not
        run.
    """
    given = arguments(config)
    options: dict[str, Any] = {}
    if any(key in given for key in (*_OFFICIAL, *_KERNEL)):
        given, options = _official_as_timm(given)
    given = dict(_DEFAULTS) | given
    for key in ("layers", "embed_dims", "num_heads"):
        if key not in given:
            raise ValueError(f"argument {key} of the official VOLO has no default: give one entry for each stage")
    for key, value in given.items():
        if key in _SAME:
            options[key] = value
        elif key in _RENAMED:
            options[_RENAMED[key]] = value
        elif key not in (*_BY_STAGE, *_TRANSLATED, *_NOT_NEEDED):
            known = (*_SAME, *_RENAMED, *_BY_STAGE, *_TRANSLATED, *_NOT_NEEDED, *_OFFICIAL, *_KERNEL)
            raise ValueError(unknown_name("argument of VOLO", key, known))
    for key, ours in _BY_STAGE.items():
        options[ours] = tuple(bool(flag) for flag in given[key][: len(given["layers"])])
    if given["global_pool"] not in _POOLS:
        raise ValueError(unknown_name("value of argument global_pool", given["global_pool"], _POOLS))
    options |= {"pool": _POOLS[given["global_pool"]], "norm_eps": norm_eps(given["norm_layer"])}
    options["class_layers"] = _class_layers(given["post_layers"])
    if given["use_mix_token"]:
        # Their training answers with both logits and the box; ours, unless it is asked for, as in evaluation.
        options |= {"dense": True, "mix_token": True}
    sides = given["img_size"]
    options["image_size"] = (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
    return options | _positions(given, options)


def _official_as_timm(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's arguments for those of the official class, and options of ours that timm has no argument for."""
    own = {**_OFFICIAL, **_KERNEL} | {key: given[key] for key in (*_OFFICIAL, *_KERNEL) if key in given}
    rest = {key: value for key, value in given.items() if key not in own}
    for key in ("downsamples", "outlook_attention"):
        if rest.get(key) is None:
            raise ValueError(f"argument {key} of the official VOLO has no default: give one entry for each stage")
    if own["qk_scale"] is not None:
        raise ValueError(f"argument qk_scale={own['qk_scale']!r} has no counterpart here; allowed: None")
    if own["out_padding"] != own["out_kernel"] // 2:
        raise ValueError(f"argument out_padding={own['out_padding']}: windows are centred; allowed: out_kernel // 2")
    if own["return_mean"] and own["return_dense"]:
        raise ValueError("return_mean=True: allowed with return_dense=False, as in the official class")
    rest |= {"mlp_ratio": own["mlp_ratios"], "use_aux_head": own["return_dense"], "use_mix_token": own["mix_token"]}
    rest |= {"global_pool": "avg" if own["return_mean"] else "token", "post_layers": rest.get("post_layers")}
    # What is dropped there is positions; nothing is before the heads.
    rest |= {"pos_drop_rate": rest.pop("drop_rate", 0.0)}
    return rest, {"window": own["out_kernel"], "stride": own["out_stride"]}


def _class_layers(post_layers: Sequence[str] | None) -> int | None:
    if post_layers is None:
        return None
    if other := [name for name in post_layers if name != "ca"]:
        raise ValueError(f"post_layers={tuple(post_layers)!r}: {other[0]!r} has no counterpart here; allowed: 'ca'")
    return len(post_layers)


def _positions(given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Where positions are added: before the third module of stages and downsampling layers. ValueError if that is no
    stage, or a map of another size than theirs.
    """
    modules = [m for i, down in enumerate(options["downsamples"]) for m in ([i, "downsampling"] if down else [i])]
    stage = modules[2] if len(modules) > 2 else None
    if not isinstance(stage, int):
        raise ValueError(
            f"downsamples={options['downsamples']}: positions belong before the third module of {modules}, which here "
            "has to be a stage"
        )
    if options["widths"][stage] != options["widths"][-1]:
        raise ValueError(
            f"embed_dims={tuple(options['widths'])}: positions are as wide as the last stage, and stage {stage} is not"
        )
    halved = 2 ** sum(options["downsamples"][:stage])
    patch, scale = given["patch_size"], given["pooling_scale"]
    theirs = [side // patch // scale for side in options["image_size"]]
    ours = [-(-side // 2) // (patch // 2) // halved for side in options["image_size"]]
    if theirs != ours:
        raise ValueError(
            f"pooling_scale={scale}, img_size={given['img_size']}: positions for {theirs[0]} x {theirs[1]} places do "
            f"not fit the map of {ours[0]} x {ours[1]}"
        )
    return {"position_stage": stage}


def evaluate_volo(model: Volo, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (pooled features without classes) as `y`, and the outputs of the official modules: maps `[B, Y, X, C]`, of
    the stem `[B, C, Y, X]`.
    """
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=range(model.depth))
    named: Values = {"patch_embed": outputs["embedded"].transpose(0, 3, 1, 2), "norm": outputs["tokens"]}
    places, between = network_places(model)
    for number, place in between.items():
        # Ours adds positions at once.
        named[f"network.{place}"] = model.stages[number].downsample(outputs[f"stages.{number - 1}"])
        named[f"network.{place}.proj"] = named[f"network.{place}"].transpose(0, 3, 1, 2)
    for number, place in enumerate(places):
        shape = outputs[f"stages.{number}"].shape
        named[f"network.{place}"] = outputs[f"stages.{number}"]
        for block in range(model.stages[number].depth):
            named[f"network.{place}.{block}"] = outputs[f"stages.{number}.blocks.{block}"].reshape(shape)
    named |= {name.replace("class_blocks", "post_network"): x for name, x in outputs.items() if "class_blocks" in name}
    for name, ours in {"head": "class_logits", "aux_head": "token_logits"}.items():
        if ours in outputs:
            named[name] = outputs[ours]
    return {"y": outputs["logits" if model.num_classes else "pooled"]} | {module: named[module] for module in stages}


REFERENCES = (
    Reference(
        name="volo",
        options=volo_options,
        golden=("volo*",),
        evaluate=evaluate_volo,
        stacked=True,
    ),
)
