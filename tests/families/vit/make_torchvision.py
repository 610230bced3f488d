"""Makes the small references of torchvision beside this file, and that of Swin.

Not run by the tests: it needs PyTorch and torchvision, which nothing else here does. Made with torch 2.13.0,
torchvision 0.29.1:

    python tests/families/vit/make_torchvision.py

Every parameter is random, forward and backward run in float64 from float32 numbers. Each file holds `sd/<name>` (state
dict), `x` (NCHW), `y`, `dx` (gradient of sum(y**2)) and `config`: constructor arguments as JSON.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

HERE = Path(__file__).resolve().parent
VIT = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
SWIN = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": [3, 2]}
CASES = {
    "vit/torchvision_vit": (VisionTransformer, VIT | {"num_classes": 5, "representation_size": 12}, (24, 24)),
    "swin/torchvision_swin": (SwinTransformer, SWIN | {"num_classes": 5, "mlp_ratio": 2.0}, (28, 32)),
}


def main() -> None:
    for number, (name, (kind, arguments, sides)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(number)
        model = kind(**arguments).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.7 + 0.3 * noise)
        state = {f"sd/{key}": value.numpy().copy() for key, value in model.state_dict().items()}
        x = torch.randn((2, 3, *sides), generator=generator)
        wide = x.double().requires_grad_()
        y = model.double()(wide)
        (dx,) = torch.autograd.grad((y**2).sum(), wide)
        arrays = {"x": x.numpy(), "y": y.detach().float().numpy(), "dx": dx.float().numpy()}
        noted = {"cls": kind.__name__, **arguments}
        np.savez_compressed(HERE.parent / f"{name}.npz", config=json.dumps(noted), **state, **arrays)


if __name__ == "__main__":
    main()
