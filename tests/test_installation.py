"""What installing brings: everything that is imported, and nothing of Fovea itself, which is used from its checkout."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

import errors

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNSEEN = {"array-record", "flatbuffers", "importlib-resources"}
"""What others import without declaring it; pyproject.toml says who."""
TOOLS = {"uv"}
"""Of other makers, which our scripts install by name."""
CODE = [path for name in errors.OURS for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.suffix == ".py"]
PAGES = [path for name in ("benchmarks", "deploy", "docs") for path in (ROOT / name).rglob("*") if path.is_file()]
TEXTS = [
    *CODE,
    ROOT / "Makefile",
    *ROOT.glob("*.md"),
    *(path for path in PAGES if path.suffix not in (".png", ".json")),
]


def plain(name):
    """A distribution's name without version, extras and the spellings that count as one."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def declared(*extras):
    return {plain(entry) for entry in (*PROJECT["dependencies"], *(e for extra in extras for e in EXTRAS[extra]))}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def used(paths, ours):
    """Distribution -> a file that imports it."""
    known = packages_distributions()
    found = {name: path for path in paths for name in imported(path) if name not in sys.stdlib_module_names | ours}
    return {plain(known.get(name, [name])[0]): path.relative_to(ROOT) for name, path in found.items()}


def test_nothing_of_fovea_is_installed(tmp_path):
    """Built as pip builds it. `models` and `data` are what users call their own; `kernels` is a package of others."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.suffix != ".egg-info":
            (tmp_path / entry.name).symlink_to(entry)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    files = zipfile.ZipFile(wheel).namelist()
    assert [name for name in files if ".dist-info/" not in name] == []
    assert any(name.endswith("/METADATA") for name in files)


def test_what_is_imported_is_declared():
    ours = {name.removesuffix(".py") for name in errors.OURS}
    needed = used(CODE, ours)
    assert {name: path for name, path in needed.items() if name not in declared(*EXTRAS)} == {}
    assert declared() - needed.keys() == UNSEEN, "declared, and imported nowhere"
    theirs = [path for name in ("tests", "docs/examples") for path in (ROOT / name).rglob("*")]
    ours |= {"benchmarks", *(path.stem for path in theirs if path.suffix == ".py" or path.is_dir())}
    others = [path for name in ("benchmarks", "tests", "docs") for path in (ROOT / name).rglob("*.py")]
    # What makes files for tests with other libraries runs in an environment of its own, which it names.
    others = [path for path in others if not path.name.startswith("make_")]
    assert {name: path for name, path in used(others, ours).items() if name not in declared(*EXTRAS)} == {}


def test_the_licence_and_the_version_are_said_alike():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    assert PROJECT["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert f"\n## {PROJECT['version']}, {cited['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()


NAMED = re.compile(
    r"""pip install (?:(?:-c|--constraint|-r|--requirement) \S+ |-\S+ )*[\\"']*(\.?\w[\w.-]*|\.)(\[[\w,]+\])?"""
)


def strangers(text):
    """What a text tells `pip install` to bring, first of all, that no line of pyproject.toml names."""
    for name, extras in NAMED.findall(text):
        if name == ".":
            unknown = set(re.findall(r"\w+", extras)) - EXTRAS.keys()
        else:
            unknown = plain(name) not in declared(*EXTRAS) | TOOLS
        if unknown:
            yield name + extras


def test_nobody_is_told_to_install_what_is_not_ours_to_name():
    """`fovea` on PyPI is another project."""
    assert list(strangers("run `pip install 'fovea[plan]'` first")) == ["fovea[plan]"]
    assert list(strangers("pip install -q -c requirements.txt '.[cpu,plain]'")) == [".[cpu,plain]"]
    for path in TEXTS:
        assert list(strangers(path.read_text())) == [], path
