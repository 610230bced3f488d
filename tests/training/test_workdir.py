"""The folder of a run: held by one run at a time, continued whatever happened to its logs, which agree."""

import io
import json
import os
import signal
import struct
import sys
import time
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import tiny
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

import configs
from tasks.base import Picture
from training.distributed.preemption import Signals
from training.run import branch, lock, loop, rows, summary, workdir
from training.run.log import Writers

HOLD = """
import sys, time
from pathlib import Path
from training.run.lock import Lock
held = Lock(Path(sys.argv[1]))
Path(sys.argv[1], "held").touch()
time.sleep(60)
"""


@pytest.fixture
def impatient(monkeypatch):
    for name in ("SECONDS_HERE", "SECONDS_ELSEWHERE"):
        monkeypatch.setattr(lock, name, 0.3)


def wait_for(path, child):
    while not path.exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)


def test_two_runs_in_one_workdir_are_refused_and_a_killed_one_is_not_in_the_way(tmp_path, impatient):
    child = commands.Child([HOLD, tmp_path])
    try:
        wait_for(tmp_path / "held", child)
        before = json.loads((tmp_path / "lock").read_text())
        with pytest.raises(lock.WorkdirInUse, match=rf"another run works here \(process {child.pid} on \S+, since 20"):
            loop.train(tiny.config(), tmp_path, terminal=tiny.quiet())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "lock"]
        assert json.loads((tmp_path / "lock").read_text()) == before
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        lock.Lock(tmp_path).close()
    finally:
        child.communicate()


def test_a_run_gives_its_lock_up(tmp_path):
    run, sets = loop.prepare(tiny.config()), {}
    anew = branch.Continuation([], None, None)
    with loop.Session(run, tmp_path, sets, tiny.quiet(), {}, None, Signals(), anew, time.perf_counter()):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""
    done = commands.run([HOLD.replace("time.sleep(60)", ""), tmp_path])
    assert done.returncode == 0, done.stderr


def test_without_locks_a_living_process_of_this_machine_is_found(tmp_path, monkeypatch, impatient, capfd):
    def refuse(file, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    parent = {**lock._self(), "pid": os.getppid(), "began": lock._began(os.getppid())}
    (tmp_path / "lock").write_text(json.dumps(parent))
    with pytest.raises(lock.WorkdirInUse, match=f"process {os.getppid()} on"):
        lock.Lock(tmp_path)
    for gone in ({**parent, "began": 1}, {**parent, "pid": 2**22 + 1}, {**parent, "host": "elsewhere"}, "garbage"):
        (tmp_path / "lock").write_text(json.dumps(gone))
        lock.Lock(tmp_path).close()
        assert "has no locks" in capfd.readouterr().err


def row(step, **values):
    return {"step": step, "kind": "train", "time": 1.5 + step, **values}


@pytest.mark.parametrize(
    ("damage", "kept", "aside"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), [1], False),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), [1], False),
        (lambda path: path.write_bytes(b"\xff\x00\n\n[1]\n{}\n" + path.read_bytes()), [1, 2], True),
        (lambda path: path.write_bytes(os.urandom(3000) + b"\n"), [], True),
        (lambda path: (path.unlink(), path.mkdir()), [], True),
        (lambda path: path.unlink(), [], False),
    ],
)
def test_a_damaged_file_of_rows_never_stops_a_resume(tmp_path, capfd, damage, kept, aside):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)))
    damage_of_last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage_of_last[:2]))
    damage(path)
    assert [found["step"] for found in rows.read(path)[0]] == kept
    file = rows.Jsonl(path, resume_step=2)
    file.write(row(3))
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 3]
    assert (tmp_path / "metrics.jsonl.damaged").exists() == aside
    assert capfd.readouterr().err.count("\n") == aside


@pytest.mark.parametrize("damage", [b"", b'{"step": 4', b"\xff\xfe", b"[]", b"{}", None])
def test_a_damaged_summary_is_written_again(tmp_path, damage):
    path = tmp_path / "summary.json"
    path.mkdir() if damage is None else path.write_bytes(damage)
    assert summary.completed(tmp_path) is None
    summary.write(tmp_path, {"step": 4})
    assert summary.completed(tmp_path) == {"step": 4}


@pytest.mark.parametrize("content", ["{", "[1]", '{"branched_from": 5}', '{"id": 5}', '{"changes": 1}'])
def test_a_damaged_record_is_said_once_and_replaced(tmp_path, capfd, content):
    first = workdir.begin(tmp_path, tiny.config(), {})
    assert workdir.begin(tmp_path, tiny.config(), {}) == first
    (tmp_path / "run.json").write_text(content)
    assert branch.find(tmp_path, "") is None
    assert workdir.begin(tmp_path, tiny.config(), {}) != first
    assert capfd.readouterr().err == f"{tmp_path / 'run.json'}: damaged; the run gets a new id\n"


def summaries(folder, with_step=False):
    """All that event files hold, as a reader finds it that knows nothing of restarts."""
    for file in folder.glob("events.*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            length = struct.unpack_from("<Q", content, place)[0]
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            yield from ((event.step, value) if with_step else value for value in event.summary.value)
            place += length + 16


def events(folder):
    """`(step, name, value)` of all event files."""
    return sorted((step, value.tag, value.simple_value) for step, value in summaries(folder, with_step=True))


def scalars(path):
    return sorted(
        (found["step"], f"{found['kind']}/{name}", value)
        for found in rows.read(path)[0]
        for name, value in found.items()
        if name not in ("step", "kind", "time") and isinstance(value, int | float)
    )


def log(**values):
    return SimpleNamespace(**{"tensorboard": True, "wandb": "", **values})


def test_tensorboard_has_what_the_rows_have(tmp_path):
    """Also after a kill, that nothing reached the event file before, and when the run goes on from an earlier step."""
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4)), (3, (4, 5)), (1, (2,))):
        writers = Writers(tmp_path, log(), {}, resume_step)
        for step in steps:
            writers.write(step, "train", {"loss": step / 4 + resume_step, "note": "text", "missing": None})
            writers.write(step, "eval/test", {"top1": 0.5})
        writers.close()
        assert events(tmp_path / "tensorboard") == scalars(tmp_path / "metrics.jsonl")
        assert len(events(tmp_path / "tensorboard")) == 2 * steps[-1]
        if resume_step == 2:
            for file in (tmp_path / "tensorboard").iterdir():
                os.truncate(file, 60)
    (tmp_path / "metrics.jsonl").unlink()
    Writers(tmp_path, log(), {}, 2).close()
    assert events(tmp_path / "tensorboard") == []


def test_tensorboard_compares_runs_by_their_configuration(tmp_path):
    """What a run began with is there once, also when it was resumed, and no run is said to have ended."""
    values = configs.flat_values(tiny.config(optim__learning_rate=0.25))
    for step in (0, 1):
        writers = Writers(tmp_path, log(), {}, step, values=values, metrics=["train/loss", "eval/test/top1"])
        writers.write(step + 1, "train", {"loss": 0.5})
        writers.close()
    found = [event for event in summaries(tmp_path / "tensorboard") if event.tag.startswith("_hparams_")]
    assert sorted(event.tag for event in found) == ["_hparams_/experiment", "_hparams_/session_start_info"]
    about = {e.tag: plugin_hparams_pb2.HParamsPluginData.FromString(e.metadata.plugin_data.content) for e in found}
    said = about["_hparams_/session_start_info"].session_start_info.hparams
    assert set(said) == set(values)
    assert said["optim.learning_rate"].number_value == 0.25
    assert said["log.tensorboard"].bool_value is False
    assert said["data.train_transforms"].string_value == "flip|normalize"
    assert said["model.options"].string_value == json.dumps(values["model.options"])
    metrics = about["_hparams_/experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["train/loss", "eval/test/top1"]


def test_tables_and_pictures_are_shown(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    stand_in = SimpleNamespace(init=lambda **given: run, Table=lambda **given: given, Image=lambda x, caption: caption)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    tables = {"per_class": (("class", "top1"), [("a|b", 0.5), ("c", None)])}
    pictures = [("a → c", Picture(np.full((2, 3, 1), 200, np.uint8))), ("large", Picture(np.zeros((600, 30, 3))))]
    writers = Writers(tmp_path, log(wandb="project"), {}, 0)
    assert writers.shows
    writers.show(7, "eval/test", tables, pictures)
    writers.close()
    found = {value.tag: (step, value) for step, value in summaries(tmp_path / "tensorboard", with_step=True)}
    table = found["eval/test/per_class/text_summary"]
    assert table[0] == 7
    assert table[1].tensor.string_val == [b"| class | top1 |\n| --- | --- |\n| a\\|b | 0.5000 |\n| c |  |"]
    picture = found["eval/test/pictures/1"][1].image
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert (pixels.shape, picture.width, picture.colorspace) == ((2, 3, 3), 3, 3)
    assert (pixels == 200).all()
    assert found["eval/test/pictures/2"][1].image.height == 300
    ((step, values),) = logged
    assert step == 7
    assert values["eval/test/per_class"] == {"columns": ["class", "top1"], "data": [["a|b", 0.5], ["c", None]]}
    assert values["eval/test/pictures"] == ["a → c", "large"]


def test_ids_at_weights_and_biases_are_those_of_workdirs(tmp_path, monkeypatch):
    begun = []
    run = SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: (begun.append(given["id"]), run)[1]))
    for name in ("one/run", "two/run", "one/run"):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        run_id = workdir.begin(folder, tiny.config(), {})
        Writers(folder, log(wandb="project", tensorboard=False), {}, 0, run_id=run_id).close()
    assert begun[0] == begun[2] != begun[1]
    (tmp_path / "old" / "wandb").mkdir(parents=True)
    assert workdir.begin(tmp_path / "old", tiny.config(), {}) == "old", "runs of before keep the name they had"
