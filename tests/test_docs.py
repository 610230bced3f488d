"""The commands and snippets of README.md and docs/ work as they stand.

A fence of `bash` is a list of commands. Those marked `bash test`, and README's, are run in a folder that looks like a
checkout; a fence of `bash` in docs/ without the mark is for the eye (it needs a download or a cluster) and has to say
so in the text before it. A fence of `python` has to run by itself; those of a few pages need more and are run by the
tests of what they explain.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import yaml

from benchmarks import mechanisms

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WHOLE = ("taps", "model_interface", "add_a_mechanism", "add_a_family")
"""Pages whose snippets of Python are one program, from top to bottom."""
FENCE = re.compile(r"^```(bash|python)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What README runs for minutes is run here for seconds; commands that say how many steps they take are left as they are.
SHORT = "--config.train.steps=4 --config.checkpoint.every_steps=2"


def fences(language, without=()):
    for page in PAGES:
        if page.stem in without:
            continue
        for number, match in enumerate(FENCE.finditer(page.read_text())):
            if match[1] == language:
                yield pytest.param(page, match[2].strip(), match[3], id=f"{page.stem}-{number}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with everything of the repository in it and nothing of a run."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".git"):
            (folder / entry.name).symlink_to(entry)
    return folder


def run(command, folder):
    if ours := re.match(r"(?:PYTHONPATH=(\S+) )?python ((?:train|eval)\.py .*)", command):
        environment = {"PYTHONPATH": str(folder / ours[1])} if ours[1] else None
        done = commands.run(shlex.split(ours[2]), environment, 300, folder)
    else:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "mark", "text"), fences("bash"))
def test_commands(page, mark, text, checkout):
    lines = [line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    for command in filter(None, lines):
        if command.startswith("make "):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif mark == "test" or page.name == "README.md":
            run(
                f"{command} {SHORT}"
                if "python train.py" in command and not re.search("--print_config|train.steps", command)
                else command,
                checkout,
            )


@pytest.mark.slow
@pytest.mark.parametrize(("page", "mark", "text"), fences("python", without=("checkpoints", "export", "tasks", *WHOLE)))
def test_snippets(page, mark, text, checkout):
    done = commands.run([text], None, 300, checkout)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", WHOLE)
def test_a_page_is_followed_from_top_to_bottom(name, tmp_path):
    """As somebody does who has this project installed, from a folder of their own."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    script = tmp_path / "page.py"
    script.write_text("\n".join(match[3] for match in FENCE.finditer(page) if match[1] == "python"))
    done = commands.run([script], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout or name == "model_interface"


def test_the_catalogue_of_mechanisms_is_what_they_declare():
    assert mechanisms.PAGE.read_text() == mechanisms.page(), "python -m benchmarks.mechanisms writes it"


def places(nav):
    for entry in nav:
        found = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [found] if isinstance(found, str) else places(found)


def test_every_page_has_a_place_on_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    named = list(places(yaml.safe_load(text)["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.is_relative_to(ROOT / "docs")}
    assert len(named) == len(set(named)), "twice in nav of mkdocs.yml"
    assert pages ^ set(named) == {"changelog.md", "contributing.md"}, "nav of mkdocs.yml"  # two of the root


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        for target in re.findall(r"\]\((?!https?:)([^)#:]+)[^)]*\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_docs_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:attn|models|data|tasks|training|configs|tests|benchmarks|docs)/[\w/]+\.(?:py|md))`", page.read_text()
        ):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.name}: {name}"
