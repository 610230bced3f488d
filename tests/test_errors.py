"""Which code a command leaves with, and what it says, for each kind of error."""

import errno
import os
import re
import runpy
from pathlib import Path

import pytest

import configs
import data
import errors
from training.distributed.preemption import Preempted

ROOT = Path(__file__).resolve().parent.parent


def judged(function, *arguments):
    with pytest.raises(BaseException) as caught:
        function(*arguments)
    error = caught.value
    return errors.judge(error.with_traceback(error.__traceback__.tb_next))  # as if no test had called


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.WorkerLost("data worker process 7 was killed"), errors.MACHINE),
        (errors.ProcessMissing("1 of 2 processes did not come"), errors.MACHINE),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file"), errors.MACHINE),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), errors.MACHINE),
        (ConnectionResetError(errno.ECONNRESET, "reset"), errors.MACHINE),
        (Preempted("", 15), errors.AGAIN),
        (Preempted("", 2), errors.INTERRUPTED),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "file"), errors.INPUT),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "file"), errors.INPUT),
        (errors.BadInput("no such key"), errors.INPUT),
        (data.ExampleError("5.png: image file is truncated"), errors.INPUT),
    ],
)
def test_what_a_restart_heals_is_not_bad_input(error, code):
    assert judged(raising(error)) == (code, str(error) or type(error).__name__)


def test_a_builtin_error_is_about_the_input_only_where_we_raised_it():
    code, said = judged(configs.load, "configs/quickstart.py", {"optim.learning_rat": 1})
    assert code == errors.INPUT
    assert said.startswith("config.optim.learning_rat: no such key")
    # Python's own, in a file of ours, is a fault.
    code, said = judged(data.parse_transforms, 5)
    assert code == errors.INTERNAL
    assert re.fullmatch(r"data/\w+.py:\d+: \w+Error: .*", said)


@pytest.mark.parametrize("line", ["batch['depth']", "int('many')", "raise ValueError('many')", "[][1]", "nothing"])
def test_a_file_of_the_users_is_named_with_its_line(line, tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(f"def loss(batch):\n    {line}\n")
    code, said = judged(runpy.run_path(str(file))["loss"], {})
    assert code == errors.INPUT
    assert re.fullmatch(rf"{file}:2: \w+Error: .+", said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n    return base.get_config()\n", "2: NameError: name 'base' is not defined"),
        ("import numpy\ndef get_config(:\n", "2: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return {}['lr']\n", "2: KeyError: lr"),
        ("x = 1\n", r"AttributeError: module .* has no attribute 'get_config'"),
    ],
)
def test_a_configuration_file_that_cannot_be_run(text, said, tmp_path):
    file = tmp_path / "my_config.py"
    file.write_text(text)
    with pytest.raises(errors.FileOfUser, match=rf"^{file}:.*{said}") as caught:
        configs.load(str(file))
    assert "\n" not in str(caught.value)


def test_the_table_of_exit_codes():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == errors.MEANING
