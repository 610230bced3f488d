"""What is written as JSON is JSON: no NaN, no Infinity, in any file of a run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from training.checkpoints import json_text
from training.run.log import Jsonl

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[2]
# Messages between processes, and a checksum of what this module has made plain before.
OTHERS = {"training/distributed/lifeline.py": 1, "training/checkpoints/checkpoint_files.py": 1}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_number_that_json_does_not_have_is_null():
    value = {
        "nan": float("nan"),
        3: [np.float32("inf"), -np.inf, np.int64(7), True, None],
        "array": np.array([1.5, np.nan]),
        "tuple": ("x", {"deep": float("-inf")}),
    }
    expected = {
        "nan": None,
        "3": [None, None, 7, True, None],
        "array": [1.5, None],
        "tuple": ["x", {"deep": None}],
    }
    assert strict(json_text.text(value)) == json_text.plain(value) == expected
    with pytest.raises(TypeError):
        json_text.text({"path": Path("x")})


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "5", "[" * 100_000, b'{"\xff": 1}'])
def test_what_holds_no_object_is_a_value_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError):
        json_text.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": [1]}')
    assert json_text.read(tmp_path / "x.json") == {"a": [1]}


def test_metrics_and_files_are_json(tmp_path):
    log = Jsonl(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "top1": 0.5})
    log.close()
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "grad_norm": None, "top1": 0.5}
    json_text.write(tmp_path / "summary.json", {"metrics": {"test": {"loss": float("nan")}}})
    assert strict((tmp_path / "summary.json").read_text()) == {"metrics": {"test": {"loss": None}}}


def test_there_is_one_place_that_writes_json():
    found = {
        str(path.relative_to(ROOT)): count
        for path in sorted((ROOT / "training").rglob("*.py"))
        if (count := len(re.findall(r"\bjson\.dumps?\(", path.read_text())))
    }
    assert found == {"training/checkpoints/json_text.py": 1, **OTHERS}
