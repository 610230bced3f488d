"""Random official weights of small ViTs, in the names of timm and of other projects."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from references import REFERENCES

import models

QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2}


def build(**arguments):
    """An abstract ViT for timm's constructor arguments."""
    return REFERENCES["vit"].build(SMALL | arguments)


def own_values(model, seed=0):
    """Random numbers by the model's own names, as it holds them."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=v.shape).astype(np.float32) for name, v in models.split(model)[1].items()}


def with_values(model, values):
    graph, _, state = models.split(model)
    return models.merge(graph, {name: jnp.asarray(value) for name, value in values.items()}, state)


def official(**arguments):
    """Random weights by timm's names."""
    model = build(**arguments)
    return models.export_weights(with_values(model, own_values(model)))


def loaded(source, **arguments):
    """(parameters by unrolled name, notes) of a model that read `source`."""
    params, state, notes = models.convert_weights(build(**arguments), source)
    assert not state
    return params, notes


def logits(params, size=(32, 32), **arguments):
    model = build(**arguments)
    graph, own, state = models.split(model)
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    run = jax.jit(lambda p, x: models.merge(graph, p, state)(x), compiler_options=QUICK_COMPILE)
    return run(models.stack(params, like=own), images)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


REGISTERS = {"reg_tokens": 4, "mlp_layer": "SwiGLUPacked", "act_layer": "silu", "init_values": 1.0}


def dinov2_names(timm):
    rules = ((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"), (r"^reg_token$", "register_tokens"))
    names = {name: name for name in timm}
    for pattern, replacement in rules:
        names = {name: re.sub(pattern, replacement, renamed) for name, renamed in names.items()}

    def chunked(match):
        # Two blocks per chunk, the block counted from the first of the model.
        return f"blocks.{int(match[1]) // 2}.{match[1]}."

    dinov2 = {re.sub(r"^blocks\.(\d+)\.", chunked, names[name]): value for name, value in timm.items()}
    return dinov2 | {"mask_token": np.zeros((1, 16), np.float32)}


def big_vision_names(timm, heads=2):
    """A timm state dict in big_vision's names and layouts, written out for this test."""
    flax = {}
    attention = "MultiHeadDotProductAttention_0"

    def heads_of(place, names, weight, bias):
        for name, w, b in zip(names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True):
            flax[f"{place}/{attention}/{name}/kernel"] = w.T.reshape(w.shape[1], heads, -1)
            flax[f"{place}/{attention}/{name}/bias"] = b.reshape(heads, -1)

    for name, value in timm.items():
        module, _, leaf = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.*)", module)
        place, rest = (f"Transformer/encoderblock_{block[1]}", block[2]) if block else ("MAPHead_0", module[10:])
        fixed = {"patch_embed.proj": "embedding", "norm": "Transformer/encoder_norm", "head": "head"}
        fixed |= {"pre_logits.fc": "pre_logits"}
        alone = {"cls_token": "cls", "pos_embed": "pos_embedding", "attn_pool.latent": "MAPHead_0/probe"}
        if name in alone:
            flax[alone[name]] = value
        elif rest in ("attn.qkv", "q", "kv"):
            if leaf == "weight":
                fused = {"attn.qkv": ("query", "key", "value"), "q": ("query",), "kv": ("key", "value")}
                heads_of(place, fused[rest], value, timm[f"{module}.bias"])
        elif rest in ("attn.proj", "proj"):
            out = value.T.reshape(heads, -1, value.shape[0]) if leaf == "weight" else value
            flax[f"{place}/{attention}/out/{'kernel' if leaf == 'weight' else 'bias'}"] = out
        else:
            mlp = re.fullmatch(r"mlp\.fc(\d)", rest)
            norm = re.fullmatch(r"norm(\d?)", rest)
            if module in fixed:
                target = fixed[module]
            elif mlp:
                target = f"{place}/MlpBlock_0/Dense_{int(mlp[1]) - 1}"
            else:
                target = f"{place}/LayerNorm_{int(norm[1] or 1) - 1}"
            is_norm = value.ndim == 1 and leaf == "weight"
            kernel = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            flax[f"{target}/{'scale' if is_norm else 'kernel' if leaf == 'weight' else 'bias'}"] = kernel
    return flax


def old_names(flax):
    rules = (("LayerNorm_1", "LayerNorm_2"), ("Attention_0", "Attention_1"), ("MlpBlock_0", "MlpBlock_3"))
    renamed = {}
    for name, value in flax.items():
        if "encoderblock" in name:
            for new, old in rules:
                name = name.replace(new, old)
        renamed[name.replace("pos_embedding", "Transformer/posembed_input/pos_embedding")] = value
    return renamed


def scanned(flax):
    stacked = {name: value for name, value in flax.items() if "encoderblock" not in name}
    for name in (name for name in flax if "encoderblock_0/" in name):
        layers = [flax[name.replace("encoderblock_0", f"encoderblock_{layer}")] for layer in range(SMALL["depth"])]
        stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return stacked


def prefixed(prefix, flax):
    other = "params/txt/embedding" if "img" in prefix else "opt/state/step"
    return {prefix + name: value for name, value in flax.items()} | {other: np.zeros(3)}


TOWER = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
