"""What `train.py` and `eval.py` share: completion, the version, hints, and readers that have seen enough."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import configs
import eval as eval_command
import train
from training.distributed import facts
from training.run import completion

ROOT = Path(__file__).resolve().parents[2]
NO_JAX = """
import sys, train
assert train.main(['--completion=bash']) == 0
assert not {'jax', 'flax', 'grain', 'orbax'} & set(sys.modules), 'a heavy import'
"""
TRY = """
{scripts}
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_WORDBREAKS={breaks}
_fovea 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts():
    """The scripts of both commands for bash."""
    with pytest.MonkeyPatch.context() as patch:
        said = []
        for command in (train, eval_command):
            patch.setattr(command, "show", said.append)
            assert command.main(["--completion=bash"]) == 0
    return "\n".join(said)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python train.py --config=quick", ["quickstart"]),
        ("python train.py --config=quickstart --print", ["--print_config"]),
        ("/usr/bin/python train.py --work", ["--workdir="]),
        ("python ../train.py --config.optim.sch", ["--config.optim.schedule="]),
        ("python train.py --config.model.opt", ["--config.model.options."]),
        ("python train.py --config.optim.schedule=", ["cosine", "linear", "rsqrt", "constant"]),
        ("python train.py --config.model.scan=t", ["true"]),
        ("python eval.py --be", ["--best"]),
        ("python train.py --be", []),
        ("python eval.py --config.optim.sch", []),  # an evaluation does not read it
        ("python eval.py --config.train.prec", ["--config.train.precision="]),
        ("python train.py --config=configs/qu", []),  # left to the names of files
        ("python other.py --work", []),
        ("python --ver", []),
    ],
)
@pytest.mark.parametrize("breaks", ["$' \\t\\n=:'", "' '"])
def test_bash_completes_flags_experiments_keys_and_choices(scripts, line, found, breaks):
    text = TRY.format(scripts=scripts, line=f"'{line}'", breaks=breaks)
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True)
    assert done.stderr == ""
    before = line.rpartition(" ")[2].partition("=")[0] + "=" if "=" in line.rpartition(" ")[2] else ""
    whole = [(before if "=:" not in breaks else "") + word for word in found]
    assert done.stdout.split() == whole


def test_every_key_flag_and_experiment_is_among_the_words(scripts):
    words = set(re.findall(r"[^\s']+", scripts))
    assert set(configs.names()) <= words
    assert {key for key in configs.keys() if f"--config.{key}=" not in words} == {  # noqa: SIM118 - a function
        key for key, field in configs.keys().items() if isinstance(field.default, dict)
    }
    assert {"--sweep=", "--resume_from=", "--dry_run", "--predict=", "--lost_after="} <= words


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script():
    text = completion.script("zsh", train._parser(), configs.keys())
    done = subprocess.run(["zsh", "-f", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", NO_JAX], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [train, eval_command])
def test_the_version_names_the_commit_and_jax(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--version"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"fovea \d+\.\d+\.\d+, commit (\w{40}(\+changes)?|unknown), jax \S+, flax \S+, python \S+\n", said
    )
    assert f"jax {jax.__version__}, " in said
    assert facts.commit() in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.x=1", "; a key of the configuration is set by --config.optim.x=1"),
        ("optim.learning_rat=3", "; a key of the configuration is set by --config.optim.learning_rate=3"),
        ("--optim.ema=0.9", "; a key of the configuration is set by --config.optim.ema=0.9"),
        ("learning_rate=1", "; a key of the configuration is set by --config.optim.learning_rate=1"),
        ("task.options.mixup=1", "; a key of the configuration is set by --config.task.options.mixup=1"),
        ("seed", "; a key of the configuration is set by --config.seed=VALUE"),
        ("quickstart", " (did you mean --config=quickstart?)"),
        ("my/own.py", " (did you mean --config=my/own.py?)"),
        ("--wrkdir=x", " (nearest: --workdir)"),
        ("zzz", "; there are: -h --help --config "),
    ],
)
def test_a_word_without_its_config_is_told_so(word, said):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{word}: no such flag{said}')}"):
        train.main([word])


@pytest.mark.parametrize("arguments", [["--config=quickstart", "--print_config"], ["--completion=zsh"]])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(arguments, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert train.main(arguments) == 0
