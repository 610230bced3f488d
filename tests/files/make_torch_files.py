"""Writes the PyTorch files of this folder: checkpoints such as a training script saves, in both layouts.

Needs torch (the extra `bench`). tests/models/test_weight_files.py says which arrays are in them.

    python tests/files/make_torch_files.py
"""

import argparse
import collections
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent


def main():
    base = torch.arange(30, dtype=torch.float32).reshape(6, 5) / 7
    weights = collections.OrderedDict(
        base=base,
        transposed=base.t(),
        view=base[2:4, 1::2],
        expanded=base[0, 1:2].expand(3, 2),
        number=torch.tensor(7),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(base[0].clone()),
    )
    for kind in ("bool", "uint8", "int8", "int16", "int32", "float16", "bfloat16", "float64", "complex64"):
        weights[kind] = torch.arange(4).to(getattr(torch, kind))
    weights._metadata = {"": {"version": 1}}
    notes = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, output=Path("out"), device=torch.device("cpu")),
        "best": np.float64(0.5),
        "history": np.arange(3),
        "seen": {1, 2},
        "counts": collections.Counter("ab"),
        "optimizer": {"state": {0: {"exp_avg": base + 1}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
    }
    for name, zipped in (("torch_zip", True), ("torch_legacy", False)):
        newer = {"uint16": torch.arange(4).to(torch.uint16), "float8_e4m3fn": torch.arange(4).to(torch.float8_e4m3fn)}
        model = collections.OrderedDict({**weights, **(newer if zipped else {})})
        model._metadata = weights._metadata
        torch.save({"model": model, **notes}, FOLDER / f"{name}.pth", _use_new_zipfile_serialization=zipped)


if __name__ == "__main__":
    main()
