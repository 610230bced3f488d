"""A run that branches from another, is made longer, or is changed while it goes on."""

import dataclasses
import io
import json
import shutil

import pytest
import tiny

import configs
import data
from training.checkpoints import checkpoint
from training.optim import schedules
from training.run import branch, loop, workdir
from training.run.terminal import Terminal

TRUNK_DATA = tiny.TINY["data.name"]
TRUNK = {
    "train__steps": 6,
    "checkpoint__every_steps": 2,
    "checkpoint__keep_last": 9,
    "optim__schedule": "rsqrt",
    "optim__ema": 0.9,
    "log__example_ids": True,
}


def train(folder, said=None, resume_from="", **changed):
    said = io.StringIO() if said is None else said
    return loop.train(
        tiny.config(**{**TRUNK, **changed}), folder, terminal=Terminal(stream=said), resume_from=str(resume_from)
    )


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def examples(folder):
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk") / "run"
    train(folder)
    return folder


def test_a_branch_takes_the_whole_state_and_then_needs_only_itself(trunk, tmp_path):
    source, new = shutil.copytree(trunk, tmp_path / "source"), tmp_path / "new"
    before = contents(source)
    said = io.StringIO()
    result = train(new, said, f"{source}@4")
    assert contents(source) == before
    summary = json.loads((trunk / "summary.json").read_text())
    assert result["params_sha256"] == summary["params_sha256"]
    ours, theirs = tiny.rows(new), tiny.rows(trunk)[4:]
    for name in ("step", "loss", "learning_rate", "grad_norm"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    assert examples(new) == examples(trunk)[4:]
    assert f"branching from {source} at step 4, with the same configuration\n" in said.getvalue()
    assert sorted(int(path.name) for path in (new / "checkpoints").iterdir()) == [4, 6]
    origin = json.loads((new / "run.json").read_text())["branched_from"]
    assert (origin["workdir"], origin["step"]) == (str(source), 4)
    assert checkpoint.restore_for_eval(new)["metadata"]["branched_from"] == origin
    assert json.loads((new / "run.json").read_text())["id"] != json.loads((source / "run.json").read_text())["id"]
    # Without the source, whether the flag is given again or not.
    shutil.rmtree(source)
    assert train(new, train__steps=7)["step"] == 7
    assert train(new, resume_from=source, train__steps=8)["step"] == 8
    assert checkpoint.restore_for_eval(new)["metadata"]["branched_from"] == origin
    for other in (f"{source}@2", trunk):
        with pytest.raises(ValueError, match=rf"the run in \S+ branched from {source}@4; use another workdir"):
            train(new, resume_from=other, train__steps=9)


def test_a_cool_down_branches_from_a_trunk(trunk, tmp_path):
    said = io.StringIO()
    train(tmp_path, said, trunk, train__steps=10, optim__cooldown="4", seed=1)
    optim = tiny.config(**TRUNK, optim__cooldown="4").optim
    rate = schedules.learning_rate(optim, total_steps=10, warmup_steps=0, cooldown_steps=4)
    assert [row["learning_rate"] for row in tiny.rows(tmp_path)] == pytest.approx(
        [float(rate(s)) for s in range(6, 10)]
    )
    assert "optim.cooldown: '0' -> '4'" in said.getvalue()
    assert "learning rate at step 6: 0.001, and was 0.001 before (rsqrt over 10 steps, warmup 0, cooldown 4)" in (
        said.getvalue()
    )
    assert examples(tmp_path)[0]["index"] != examples(trunk)[0]["index"]


def test_a_branch_killed_before_its_first_save_branches_again(trunk, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, resume_from=f"{trunk}@4")
    said = io.StringIO()
    train(tmp_path, said)
    assert f"branching from {trunk} at step 4" in said.getvalue()
    assert tiny.rows(tmp_path)[0]["step"] == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim__name": "lion"}, r"^config.optim.name=lion: .*@4 has 'adamw', and its state is that of another optim"),
        (
            {"data__batch_size": 8},
            r"^config.data.batch_size=8: .* has 16, and its position .* by --config.model.init_f",
        ),
        ({"optim__mu_dtype": "bfloat16"}, r"^config.optim.mu_dtype=bfloat16: "),
        ({"optim__ema": 0.0}, r"^config.optim.ema=0.0: .* one of the two has no moving averages"),
        ({"model__name": "vit_ti16"}, r"^config.model.name=vit_ti16: "),
        ({"model__init_from": "x"}, r"^config.model.init_from=x: .* the whole state is taken"),
        ({"train__steps": 4}, r"^config.train.steps=4: .* is at step 4 already, and this is 4 steps"),
        (
            {"optim__freeze": ("head",)},
            r"does not fit this model: .*\(what differs: optim.freeze\); the parameters alone",
        ),
    ],
)
def test_what_a_state_cannot_go_on_under_is_refused_by_key(trunk, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "new", resume_from=f"{trunk}@4", **changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{trunk}@5", FileNotFoundError, r"no checkpoint of step 5 in \S+; available: 2, 4, 6$"),
        ("{trunk}x", FileNotFoundError, r"no workdir or checkpoint \S+; nearest: \S+run$"),
        ("{trunk}@last", ValueError, r"takes WORKDIR or WORKDIR@STEP"),
        ("{new}", ValueError, "is the workdir itself"),
    ],
)
def test_a_source_that_is_none_leaves_nothing(trunk, tmp_path, text, error, message):
    new = tmp_path / "new"
    with pytest.raises(error, match=message):
        train(new, resume_from=text.format(trunk=trunk, new=new))
    assert not new.exists()


def test_other_classes_are_refused(trunk, tmp_path):
    source = data.open_source(TRUNK_DATA, split="train")
    source.info = dataclasses.replace(source.info, class_names=("grating 0", "owl", "grating 2", "grating 3"))
    run = loop.prepare(tiny.config(**TRUNK), source=source)
    with pytest.raises(ValueError, match=r"--resume_from=\S+@4: label 1 was 'grating 1' and is 'owl' in"):
        branch.take(run, branch.parse(f"{trunk}@4"))


def test_a_run_that_is_done_is_made_longer(trunk, tmp_path):
    longer, said = shutil.copytree(trunk, tmp_path / "run"), io.StringIO()
    train(longer, said, train__steps=8, optim__clip_norm=1.0, eval__worst=3)
    for text in ("train.steps: '6' -> '8'", "optim.clip_norm: 0.0 -> 1.0", "eval.worst: 24 -> 3"):
        assert text in next(
            line for line in said.getvalue().splitlines() if line.startswith("changed from step 6 on: ")
        )
    assert "learning rate at step 6: 0.001, and was 0.001 before (rsqrt over 8 steps" in said.getvalue()
    assert [row["step"] for row in tiny.rows(longer)] == list(range(1, 9))
    assert json.loads((longer / "summary.json").read_text())["step"] == 8
    assert json.loads((longer / "summary-6.json").read_text())["step"] == 6
    noted = json.loads((longer / "run.json").read_text())
    assert (noted["id"], noted["changes"][0]["step"]) == (json.loads((trunk / "run.json").read_text())["id"], 6)
    assert "train.steps: '6' -> '8'" in noted["changes"][0]["keys"]
    with pytest.raises(
        ValueError, match=r"config.train.steps=3: --workdir=\S+ is at step 8 already, and this is 3 steps"
    ):
        train(longer, train__steps=3, optim__clip_norm=1.0)
    with pytest.raises(
        ValueError, match=r"\(optim.learning_rate: 0.001 -> 0.5\); use another workdir, with --resume_f"
    ):
        train(longer, train__steps=8, optim__learning_rate=0.5)


def test_steps_that_were_left_out_do_not_stop_a_run_that_is_told_to_stop(trunk):
    run = loop.prepare(tiny.config(**TRUNK))
    state = run.initial_state()
    skipped = dataclasses.replace(state, health={**state.health, "bad_steps": state.health["bad_steps"] + 2})
    trusted = branch.Continuation([], None, None).resumed(run, skipped, {})
    assert int(trusted.health["bad_steps"]) == 0


def test_fine_tuning_goes_on_when_its_source_is_gone(trunk, tmp_path):
    source, new = shutil.copytree(trunk, tmp_path / "source"), tmp_path / "new"
    train(new, model__init_from=str(source), train__steps=2)
    shutil.rmtree(source)
    assert train(new, model__init_from=str(source), train__steps=3)["step"] == 3
    with pytest.raises(FileNotFoundError, match="no workdir or checkpoint"):
        train(tmp_path / "other", model__init_from=str(source))


def test_what_was_set_for_the_source_stays_in_force_for_a_branch(tmp_path):
    workdir.begin(tmp_path, tiny.config(), {"data.batch_size": "16"})
    assert workdir.inherited(f"{tmp_path}@5", tmp_path / "new") == {"data.batch_size": "16"}
    (tmp_path / "new").mkdir()
    workdir.begin(tmp_path / "new", tiny.config(), {})
    assert workdir.inherited(f"{tmp_path}@5", tmp_path / "new") == {}, "once begun, its own record counts"


def test_keys_that_may_change_exist():
    assert set(workdir.WHILE_RUNNING) | set(branch.REFUSED) | set(branch.REFUSED_SWITCH) <= set(
        configs.flat_values(tiny.config())
    )
