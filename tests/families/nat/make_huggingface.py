"""Makes `hf_dinat.npz` beside this file from Hugging Face's transformers, whose DiNAT calls two operators of NATTEN.

They are written out here, window by window, from the papers (arXiv:2204.07143, 2209.15001): NATTEN no longer has them.

Not run by the tests: it needs PyTorch and transformers, which nothing else here does. Made with torch 2.13.0,
transformers 5.24.0:

    python tests/families/nat/make_huggingface.py

The file is as those of `tests/families/vit/make_huggingface.py`.
"""

import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def neighbours(place: int, length: int, size: int, dilation: int) -> tuple[list[int], int]:
    """Places that one sees along an axis, and the row of the bias table of the first of them."""
    group, inside = place % dilation, place // dilation
    places = list(range(group, length, dilation))
    start = min(max(inside - size // 2, 0), len(places) - size)
    return places[start : start + size], start - inside + size - 1


def windows(x: torch.Tensor, size: int, dilation: int):
    """(row, column, rows seen, columns seen, first row and column of the bias) of every place."""
    for row in range(x.shape[2]):
        rows, down = neighbours(row, x.shape[2], size, dilation)
        for column in range(x.shape[3]):
            columns, right = neighbours(column, x.shape[3], size, dilation)
            yield row, column, rows, columns, down, right


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, Y, X, D]`, as the operators want it: version 5 of the library hands over `[B, X, Y, H, D]`."""
    return x.permute(0, 3, 2, 1, 4)


def natten2dqkrpb(query, key, rpb, size, dilation):
    """Scores `[B, H, Y, X, size * size]` with the bias."""
    query, key, scores = heads_first(query), heads_first(key), []
    for row, column, rows, columns, down, right in windows(query, size, dilation):
        seen = key[:, :, rows][:, :, :, columns].flatten(2, 3)
        bias = rpb[:, down : down + size, right : right + size].flatten(1)
        scores.append((seen @ query[:, :, row, column, :, None])[..., 0] + bias)
    return torch.stack(scores, 2).reshape(*query.shape[:4], size * size)


def natten2dav(probabilities, value, size, dilation):
    """Weighted means of values."""
    value, means = heads_first(value), []
    for row, column, rows, columns, _, _ in windows(value, size, dilation):
        seen = value[:, :, rows][:, :, :, columns].flatten(2, 3)
        means.append((probabilities[:, :, row, column, None] @ seen)[:, :, 0])
    return torch.stack(means, 2).reshape(value.shape)


def main() -> None:
    natten = types.ModuleType("natten")
    natten.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    natten.functional = types.ModuleType("natten.functional")
    natten.functional.natten2dqkrpb, natten.functional.natten2dav = natten2dqkrpb, natten2dav
    sys.modules |= {"natten": natten, "natten.functional": natten.functional}
    from transformers import DinatConfig
    from transformers.models.dinat import modeling_dinat

    modeling_dinat.requires_backends = lambda *_: None
    config = DinatConfig(
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        dilations=[[1, 2], [1]],
        kernel_size=3,
        num_labels=5,
        layer_scale_init_value=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    model = modeling_dinat.DinatForImageClassification(config).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.7 + 0.3 * noise)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = {f"sd/{key}": value.numpy() for key, value in load_file(f"{folder}/model.safetensors").items()}
        written = (Path(folder) / "config.json").read_text()
    x = torch.randn((2, 3, 28, 32), generator=generator)
    wide = x.double().requires_grad_()
    y = model.double()(wide).logits
    (dx,) = torch.autograd.grad((y**2).sum(), wide)
    arrays = {"x": x.numpy(), "y": y.detach().float().numpy(), "dx": dx.float().numpy()}
    noted = {"cls": "DinatForImageClassification", "_hf_config_json": written}
    np.savez_compressed(HERE / "hf_dinat.npz", config=json.dumps(noted), **state, **arrays)


if __name__ == "__main__":
    main()
