"""What an installation has in it: every module and every data file of the house, by no list that is kept by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attn", "configs", "data", "kernels", "models", "naming", "tasks", "training")
FILES = ("train.py", "eval.py", "errors.py")


@pytest.mark.slow
def test_an_installation_is_whole(tmp_path):
    """Built as pip would, and used from a folder where nothing else of this repository is found."""
    pytest.importorskip("setuptools", reason="pip builds with it, in an environment of its own")
    checkout, library = tmp_path / "checkout", tmp_path / "library"
    checkout.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", *FILES, "tests", "benchmarks", "docs"):
        (checkout / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build"]
    command += ["--build-base", str(tmp_path / "build"), "--build-lib", str(library)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = {path.relative_to(library).as_posix() for path in library.rglob("*") if path.is_file()}
    wanted = {*FILES} | {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.name.endswith((".py", ".json", "_classes.txt"))
    }
    assert installed == wanted
    script = (
        "import jax, models\n"
        "from flax import nnx\n"
        "def run(images): return models.create('volo_d1', rngs=nnx.Rngs(0))(images)\n"
        "print(models.__file__, jax.eval_shape(run, jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')).shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(library)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(library) in done.stdout
