"""Makes `resnet18.npz` beside this file: what timm's ResNet-18 gives for weights that `weights` draws.

Not run by the tests: it needs PyTorch and timm, which nothing else here does. Made with torch 2.13.0, timm 1.0.31:

    python tests/examples/make_resnet.py

The file holds the shapes of the state dict by name (JSON), `x` (NCHW) and, computed in float64 and evaluated, `y` and
the map before the mean, `features`. The 11.7 M weights themselves are drawn again by whoever compares.
"""

import json
from pathlib import Path

import numpy as np


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Numbers for a state dict, the same wherever they are drawn: none is zero or one."""
    rng = np.random.default_rng(0)
    found = {}
    for name in sorted(shapes):
        noise = rng.standard_normal(shapes[name])
        if name.endswith("running_var"):
            noise = 1 + 0.3 * np.abs(noise)
        elif name.endswith("num_batches_tracked"):
            noise = np.zeros(())
        elif len(shapes[name]) > 1:
            noise = noise * (2 / np.prod(shapes[name][1:])) ** 0.5
        else:
            noise = 0.1 * noise + (name.endswith("weight"))
        found[name] = noise.astype(np.int64 if name.endswith("tracked") else np.float32)
    return found


def main() -> None:
    import torch

    from benchmarks import timm_models

    model = timm_models.create("resnet18", pretrained=False)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights(shapes).items()})
    model = model.double().eval()
    x = np.random.default_rng(1).standard_normal((2, 3, 42, 36)).astype(np.float32)
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(x).double())
        y = model.forward_head(features)
    file = Path(__file__).with_name("resnet18.npz")
    np.savez_compressed(file, shapes=json.dumps(shapes), x=x, y=y.numpy(), features=features.numpy())


if __name__ == "__main__":
    main()
