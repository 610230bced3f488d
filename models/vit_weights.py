"""PyTorch weights of the ViT family (timm, DeiT) to ours, as a table that reads in both directions.

A row is (their name, our names, kind). `{}` stands for a layer. Where several of ours are listed, theirs is their
concatenation along the output axis.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.names import unknown_name
from models.state import Flat, split, stack, unstack
from models.vit import VisionTransformer

_MODULES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("patch_embed.proj", ("patch_embed",), "conv"),
    ("norm_pre", ("norm_pre",), "norm"),
    ("blocks.{}.norm1", ("blocks.{}.norm1",), "norm"),
    ("blocks.{}.attn.qkv", ("blocks.{}.attn.qkv",), "linear"),
    ("blocks.{}.attn.q_norm", ("blocks.{}.attn.q_norm",), "norm"),
    ("blocks.{}.attn.k_norm", ("blocks.{}.attn.k_norm",), "norm"),
    ("blocks.{}.attn.sub_norm", ("blocks.{}.attn.sub_norm",), "norm"),
    ("blocks.{}.attn.proj", ("blocks.{}.attn.proj",), "linear"),
    ("blocks.{}.norm2", ("blocks.{}.norm2",), "norm"),
    ("blocks.{}.mlp.fc1", ("blocks.{}.mlp.fc1",), "linear"),
    ("blocks.{}.mlp.fc2", ("blocks.{}.mlp.fc2",), "linear"),
    # Parallel block of ViT-22B: one input projection for MLP and attention.
    ("blocks.{}.in_norm", ("blocks.{}.norm",), "norm"),
    ("blocks.{}.in_proj", ("blocks.{}.mlp.fc1", "blocks.{}.attn.qkv"), "linear"),
    ("blocks.{}.q_norm", ("blocks.{}.attn.q_norm",), "norm"),
    ("blocks.{}.k_norm", ("blocks.{}.attn.k_norm",), "norm"),
    ("blocks.{}.attn_out_proj", ("blocks.{}.attn.proj",), "linear"),
    ("blocks.{}.mlp_out_proj", ("blocks.{}.mlp.fc2",), "linear"),
    # Two attentions, then two MLPs, side by side.
    *(
        row
        for branch in (0, 1)
        for row in (
            (f"blocks.{{}}.attns.{branch}.norm", (f"blocks.{{}}.attn{branch + 1}_norm",), "norm"),
            (f"blocks.{{}}.attns.{branch}.attn.qkv", (f"blocks.{{}}.attn{branch + 1}.qkv",), "linear"),
            (f"blocks.{{}}.attns.{branch}.attn.proj", (f"blocks.{{}}.attn{branch + 1}.proj",), "linear"),
            (f"blocks.{{}}.ffns.{branch}.norm", (f"blocks.{{}}.mlp{branch + 1}_norm",), "norm"),
            (f"blocks.{{}}.ffns.{branch}.mlp.fc1", (f"blocks.{{}}.mlp{branch + 1}.fc1",), "linear"),
            (f"blocks.{{}}.ffns.{branch}.mlp.fc2", (f"blocks.{{}}.mlp{branch + 1}.fc2",), "linear"),
        )
    ),
    ("norm", ("norm",), "norm"),
    ("fc_norm", ("fc_norm",), "norm"),
    ("attn_pool.q", ("attn_pool.q",), "linear"),
    ("attn_pool.kv", ("attn_pool.kv",), "linear"),
    ("attn_pool.proj", ("attn_pool.proj",), "linear"),
    ("attn_pool.norm", ("attn_pool.norm",), "norm"),
    ("attn_pool.mlp.fc1", ("attn_pool.mlp.fc1",), "linear"),
    ("attn_pool.mlp.fc2", ("attn_pool.mlp.fc2",), "linear"),
    ("head", ("head",), "linear"),
    ("head_dist", ("head_dist",), "linear"),
)
_ARRAYS: tuple[tuple[str, str], ...] = (
    ("cls_token", "cls_token"),
    ("dist_token", "dist_token"),
    ("reg_token", "reg_token"),
    ("pos_embed", "pos_embed"),
    ("attn_pool.latent", "attn_pool.latent"),
    *((f"blocks.{{}}.attn.lambda_{x}{i}",) * 2 for x in "qk" for i in (1, 2)),
    ("blocks.{}.ls.gamma", "blocks.{}.ls.gamma"),
    ("blocks.{}.ls1.gamma", "blocks.{}.ls1.gamma"),
    ("blocks.{}.ls2.gamma", "blocks.{}.ls2.gamma"),
    ("blocks.{}.attns.0.ls.gamma", "blocks.{}.attn1_ls.gamma"),
    ("blocks.{}.attns.1.ls.gamma", "blocks.{}.attn2_ls.gamma"),
    ("blocks.{}.ffns.0.ls.gamma", "blocks.{}.mlp1_ls.gamma"),
    ("blocks.{}.ffns.1.ls.gamma", "blocks.{}.mlp2_ls.gamma"),
    ("blocks.{}.mlp_bias", "blocks.{}.mlp.fc1.bias"),
)
_KERNEL_AXES = {"linear": (1, 0), "conv": (2, 3, 1, 0), "norm": (0,), "copy": None}

Row = tuple[str, tuple[str, ...], tuple[int, ...] | None]


def _rows() -> list[Row]:
    """(their name, our names, permutation of their axes into ours) for single arrays."""
    rows: list[Row] = [(theirs, (ours,), None) for theirs, ours in _ARRAYS]
    for theirs, ours, kind in _MODULES:
        leaf = "scale" if kind == "norm" else "kernel"
        rows.append((f"{theirs}.weight", tuple(f"{name}.{leaf}" for name in ours), _KERNEL_AXES[kind]))
        rows.append((f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), None))
    return rows


ROWS = _rows()


def from_torch(model: VisionTransformer, state_dict: Mapping[str, np.ndarray]) -> Flat:
    """Parameters for `model`, named as `models.split` names them, from a timm or DeiT state dict.

    ValueError with every missing, left-over or misshapen entry in one message.
    """
    _, params, _ = split(model)
    expected = {name: value.shape for name, value in unstack(_shapes(params)).items()}
    loaded: Flat = {}
    problems: list[str] = []
    for theirs, array in state_dict.items():
        found = _ours(theirs)
        targets = [name for name in found[0] if name in expected] if found else []
        if not found or len(targets) < len(found[0]):
            problems.append(f"{theirs} {array.shape}: the model has no such parameter")
            continue
        array = np.asarray(array)
        array = array if found[1] is None else array.transpose(found[1])
        sizes = [expected[name][-1] for name in targets]
        if len(targets) > 1 and sum(sizes) == array.shape[-1]:
            parts = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
        else:
            parts = [array] * len(targets)
        for name, part in zip(targets, parts, strict=True):
            if part.shape != expected[name]:
                problems.append(f"{theirs} -> {name}: shape {part.shape}, expected {expected[name]}")
            loaded[name] = part.astype(np.float32)
    problems += [f"{name} {shape}: nothing in the checkpoint" for name, shape in expected.items() if name not in loaded]
    if problems:
        raise ValueError(f"{len(problems)} entries of the checkpoint do not fit the model: " + "; ".join(problems))
    return stack(loaded, like=params)


def _shapes(params: Flat) -> dict[str, np.ndarray]:
    """Arrays of the same shapes that take no memory, so that unstacking a large model is free."""
    return {name: np.broadcast_to(np.float32(0), value.shape) for name, value in params.items()}


def _ours(theirs: str) -> tuple[tuple[str, ...], tuple[int, ...] | None] | None:
    layer = re.match(r"blocks\.(\d+)\.", theirs)
    pattern = f"blocks.{{}}.{theirs[layer.end() :]}" if layer else theirs
    for name, ours, axes in ROWS:
        if name == pattern:
            return tuple(target.format(layer[1] if layer else "") for target in ours), axes
    return None


# --- timm constructor arguments -> ours -------------------------------------------------------------------------------

_RENAMED = {
    "img_size": "image_size",
    "in_chans": "channels",
    "global_pool": "pool",
    "embed_dim": "width",
    "num_heads": "heads",
    "init_values": "layer_scale",
    "reg_tokens": "registers",
    "drop_path_rate": "drop_path",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
}
_SAME = (
    "patch_size",
    "depth",
    "num_classes",
    "qkv_bias",
    "qk_norm",
    "class_token",
    "pre_norm",
    "final_norm",
    "fc_norm",
)
_CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "mlp_layer": {"Mlp": {}, "SwiGLUPacked": {"mlp": "swiglu"}},
    "act_layer": {"gelu": {}, "GELU": {}, "gelu_tanh": {"activation": "gelu_tanh"}, "silu": {}, "SiLU": {}},
    "block_fn": {
        "Block": {},
        "ResPostBlock": {"block": "post_norm"},
        "ParallelScalingBlock": {"block": "parallel"},
        "ParallelThingsBlock": {"block": "two_branch"},
    },
    "attn_layer": {"Attention": {}, "attn": {}, "DiffAttention": {"attention": "differential"}},
    "pos_embed": {"learn": {}, "none": {"position": "none"}, "": {"position": "none"}},
}
_TIMM_DEFAULTS = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def from_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our VisionTransformer from those of timm's. Keys that start with `_` are notes.

    ValueError for an argument that has no counterpart.
    """
    config = _TIMM_DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
    options: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SAME:
            options[key] = value
        elif key in _RENAMED:
            options[_RENAMED[key]] = value
        elif key in _CHOICES:
            if value not in _CHOICES[key]:
                raise ValueError(unknown_name(f"value of timm argument {key}", value, _CHOICES[key]))
            options |= _CHOICES[key][value]
        elif key not in ("cls", "mlp_ratio", "no_embed_class", "dynamic_img_size"):
            raise ValueError(f"timm argument {key}={value!r} has no counterpart here")
    hidden = int(config["embed_dim"] * config["mlp_ratio"])
    options["mlp_width"] = hidden // 2 if options.get("mlp") == "swiglu" else hidden
    options["prefix_positions"] = not config.get("no_embed_class", False)
    options["distillation_token"] = "Distilled" in config.get("cls", "")
    return options
