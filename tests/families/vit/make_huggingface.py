"""Makes the small references beside this file, and those of Swin, from Hugging Face's transformers: kinds and options
that the shared references leave out.

Not run by the tests: it needs PyTorch and transformers, which nothing else here does. Made with torch 2.13.0,
transformers 5.24.0:

    python tests/families/vit/make_huggingface.py

Every parameter is random, forward and backward run in float64 from float32 numbers. Each file holds `sd/<name>` (what
`save_pretrained` writes), `x` (NCHW), `y`, `dx` (gradient of sum(y**2)) and `config`: the class as `cls`, and the text
of `config.json` as `_hf_config_json`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = TINY | {"intermediate_size": 24, "image_size": 24, "patch_size": 8}
DINO = TINY | {"image_size": 21, "patch_size": 7, "num_register_tokens": 2, "use_swiglu_ffn": True, "mlp_ratio": 2}
OTHER_SIZE = {"interpolate_pos_encoding": True}

# File: class, its config, sides of the images, keyword arguments of the call, and which output is `y`.
CASES: dict[str, tuple[Any, Any, tuple[int, int], dict[str, Any], str]] = {
    "vit/hf_vit_no_bias": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**IMAGES, num_labels=5, qkv_bias=False, hidden_act="gelu_new"),
        (32, 16),
        OTHER_SIZE,
        "logits",
    ),
    "vit/hf_deit": (
        hf.DeiTForImageClassificationWithTeacher,
        hf.DeiTConfig(**IMAGES, num_labels=5),
        (24, 24),
        {},
        "logits",
    ),
    "vit/hf_dinov2_gated": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**DINO),
        (14, 28),
        {},
        "last_hidden_state",
    ),
    "vit/hf_siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**IMAGES), (24, 24), {}, "pooler_output"),
    "vit/clip_vision_gelu": (
        hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig(**IMAGES, projection_dim=12, hidden_act="gelu"),
        (24, 24),
        {},
        "image_embeds",
    ),
    "swin/hf_swin_padded": (
        hf.SwinForImageClassification,
        hf.SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=3, image_size=28, num_labels=5),
        (28, 28),
        {},
        "logits",
    ),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter away from its initial value, at the scale it would have in a trained network."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lambda" in name:
            value = 0.7 + 0.2 * noise
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif "embeddings." in name and "projection" not in name and "patch_embedding." not in name:
            value = 0.3 * noise
        elif parameter.ndim == 1:
            value = 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def main() -> None:
    for number, (name, (kind, config, sides, options, output)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(number)
        model = kind._from_config(config, attn_implementation="eager").eval()
        randomize(model, generator)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            # As on the Hub; since version 5 the library leaves the word out where there is nothing beside the tower.
            body = "vision_model." if kind is hf.SiglipVisionModel else ""
            saved = load_file(f"{folder}/model.safetensors")
            state = {f"sd/{body}{key}": value.numpy() for key, value in saved.items()}
            written = (Path(folder) / "config.json").read_text()
        x = torch.randn((2, 3, *sides), generator=generator)
        wide = x.double().requires_grad_()
        y = getattr(model.double()(wide, **options), output)
        (dx,) = torch.autograd.grad((y**2).sum(), wide)
        arrays = {"x": x.numpy(), "y": y.detach().float().numpy(), "dx": dx.float().numpy()}
        noted = {"cls": kind.__name__, "output": output, "_hf_config_json": written}
        np.savez_compressed(HERE.parent / f"{name}.npz", config=json.dumps(noted), **state, **arrays)


if __name__ == "__main__":
    main()
