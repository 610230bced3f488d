"""Constructor arguments of timm's VisionTransformer, VisionTransformerDistilled and AttentionPoolLatent to ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from official_config import arguments, named_object

from models.core.errors import unknown_name
from models.layers.activation import ACTIVATIONS

Config = Mapping[str, Any]

_RENAMED = {
    "in_chans": "channels",
    "global_pool": "pool",
    "embed_dim": "width",
    "num_heads": "heads",
    "reg_tokens": "registers",
    "pool_include_prefix": "pool_prefix",
    "scale_attn_norm": "scale_attention_norm",
    "init_values": "layer_scale",
    "drop_path_rate": "drop_path",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
}
_SAME = (
    "patch_size",
    "depth",
    "num_classes",
    "qkv_bias",
    "proj_bias",
    "qk_norm",
    "scale_mlp_norm",
    "class_token",
    "pre_norm",
    "final_norm",
    "fc_norm",
)
_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "block_fn": (
        "block",
        {
            "Block": "pre_norm",
            "ResPostBlock": "post_norm",
            "ParallelScalingBlock": "parallel",
            "ParallelThingsBlock": "two_branch",
        },
    ),
    "attn_layer": (
        "attention",
        {"Attention": "dense", "attn": "dense", "": "dense", "DiffAttention": "differential", "diff": "differential"},
    ),
    "pos_embed": ("position", {"learn": "learned", "none": "none", "": "none"}),
    # Packed layers share their hidden width between gate and value.
    "mlp_layer": ("mlp", {"Mlp": "mlp", "GluMlp": "glu_last", "SwiGLUPacked": "glu", "SwiGLU": "glu"}),
}
_PACKED = ("GluMlp", "SwiGLUPacked")
# How a new model starts and on what device, and which images it takes: a model of ours takes images of any size.
_NOT_NEEDED = ("weight_init", "fix_init", "device", "dtype", "dynamic_img_size", "dynamic_img_pad")
# Known, and without a counterpart here unless they have this value.
_OFF: dict[str, Any] = {
    "drop_rate": 0,
    "pos_drop_rate": 0,
    "patch_drop_rate": 0,
    "embed_norm_layer": None,
    "embed_layer": "PatchEmbed",
}
_TRANSLATED = ("img_size", "mlp_ratio", "no_embed_class", "norm_layer", "act_layer")
_DEFAULTS = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def vit_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our VisionTransformer from those of timm's; `cls` says whether it is the distilled one.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    given = arguments(config, _DEFAULTS)
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in _SAME:
            options[key] = value
        elif key in _RENAMED:
            options[_RENAMED[key]] = value
        elif key in _CHOICES:
            option, choices = _CHOICES[key]
            options[option] = _choice(key, named_object(value)[0], choices)
        elif key in _OFF:
            if value != _OFF[key]:
                raise ValueError(f"timm argument {key}={value!r} has no counterpart here")
        elif key not in _TRANSLATED and key not in _NOT_NEEDED:
            known = (*_SAME, *_RENAMED, *_CHOICES, *_OFF, *_TRANSLATED, *_NOT_NEEDED)
            raise ValueError(unknown_name("argument of timm's VisionTransformer", key, known))
    if not options.get("layer_scale") and options.get("block") != "parallel":
        options["layer_scale"] = None  # timm takes 0 for off, except in the parallel block

    hidden = int(given["embed_dim"] * given["mlp_ratio"])
    packed = named_object(given.get("mlp_layer", "Mlp"))[0] in _PACKED
    options |= {"mlp_width": hidden // 2 if packed else hidden, "pool_mlp_width": hidden}
    options["image_size"] = _divisible(given.get("img_size", 224), given["patch_size"])
    options["activation"] = activation(given.get("act_layer"))
    options["norm_eps"] = norm_eps(given.get("norm_layer"))
    options["prefix_positions"] = not given.get("no_embed_class", False)
    options["distillation_token"] = "Distilled" in str(config.get("cls", ""))
    if options["distillation_token"] and (options.get("registers") or not options["prefix_positions"]):
        raise ValueError("timm's distilled model has neither registers nor positions without the prefix tokens")
    return options


def pool_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our AttentionPool from those of timm's AttentionPoolLatent.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    given = arguments(config)
    width = given["in_features"]
    fixed = {
        "out_features": (None, width),
        "embed_dim": (None, width),
        "latent_dim": (None, width),
        "latent_len": (1,),
        "q_proj": (True,),
        "qk_norm": (False,),
        "qkv_bias": (True,),
        "pos_embed": ("",),
        "pool_type": ("token",),
        "drop": (0,),
    }
    # The size of the feature map only matters to positions.
    known = ("in_features", "num_heads", "mlp_ratio", "norm_layer", "act_layer", "feat_size", *fixed)
    for key, value in given.items():
        if key not in known:
            raise ValueError(unknown_name("argument of timm's AttentionPoolLatent", key, known))
        if key in fixed and value not in fixed[key]:
            raise ValueError(f"timm argument {key}={value!r} of AttentionPoolLatent has no counterpart here")
    return {
        "width": width,
        "heads": given.get("num_heads", 8),
        "mlp_width": int(width * given.get("mlp_ratio", 4.0)),
        "activation": activation(given.get("act_layer")),
        # Without a norm layer the pooling has no norm, where a whole model has its default one.
        "norm_eps": norm_eps(given["norm_layer"]) if given.get("norm_layer") else None,
    }


def activation(value: Any) -> str:
    """Our name of an activation, `gelu_tanh` or `SiLU` or `torch.nn.GELU`; GELU unless given."""
    name, options = named_object(value or "gelu")
    names = {ours.replace("_", ""): ours for ours in ACTIVATIONS} | {"swish": "silu"}
    approximate = options.pop("approximate", "none") == "tanh"
    options.pop("inplace", None)
    plain = name.lower().replace("_", "") + ("tanh" if approximate else "")
    if plain not in names or options:
        raise ValueError(unknown_name("activation", f"{value}", names))
    return names[plain]


def norm_eps(value: Any) -> float:
    """Epsilon of a layer norm; timm's own default is another than PyTorch's."""
    name, options = named_object(value or "layernorm")
    default = 1e-5 if "torch.nn" in str(value) or str(value).startswith("nn.") else 1e-6
    eps = options.pop("eps", default)
    if name.lower() not in ("layernorm", "layernormfp32") or options:
        raise ValueError(f"timm argument norm_layer={value!r} has no counterpart here; allowed: LayerNorm with any eps")
    return eps


def _divisible(image: int | Sequence[int], patch: int | Sequence[int]) -> tuple[int, int]:
    """The part of an image that timm's patch embedding sees: rows and columns behind the last whole patch are not."""
    sides, patches = ((value, value) if isinstance(value, int) else tuple(value) for value in (image, patch))
    return sides[0] // patches[0] * patches[0], sides[1] // patches[1] * patches[1]


def _choice(key: str, value: str, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise ValueError(unknown_name(f"value of timm argument {key}", value, choices))
    return choices[value]
