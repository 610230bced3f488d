"""What processes compare when they meet: without the connection, which `test_lifeline.py` has."""

import shutil
from pathlib import Path

import errors
from training.distributed import facts
from training.distributed.facts import difference

ROOT = Path(__file__).resolve().parents[2]


def test_a_difference_is_short():
    own = {f"config.{number}": "x" for number in range(9)}
    its = {**own, **{f"config.{number}": "y" for number in range(5)}, "config.more": "z"}
    assert difference("it", own, own) == ""
    assert difference("it", its, own).startswith(
        "it differs from process 0: config.0 is y for x; config.1 is y for x; config.2 is y for x and 3 more; start"
    )


def test_facts_are_the_code_the_packages_and_what_was_given(tmp_path, monkeypatch):
    found = facts.facts({"config.model.name": "vit_ti16", "config.data.directory": "/here", "config.x": "y" * 1000})
    assert found["config.model.name"] == "vit_ti16"
    assert "config.data.directory" not in found
    assert len(found["config.x"]) < 150
    assert found["config.x"] != facts.facts({"config.x": "y" * 1001})["config.x"]
    assert {"the version of jax", "the version of python"} <= found.keys()
    assert set(errors.OURS) == {
        *({folder.parent.name for folder in ROOT.glob("*/__init__.py")} - {"benchmarks"}),
        *(file.name for file in ROOT.glob("*.py")),
    }
    for name in errors.OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    assert facts.code()[:8] == found["the code"][:8]
    (tmp_path / "attn" / "__init__.py").write_text("")
    assert facts.code()[:8] != found["the code"][:8]
