"""Checkpoints: bit for bit, by unrolled names, atomic under kill -9, verified, kept by age and metric."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import models
from training.checkpoints import checkpoint_files, checkpoint_layout
from training.checkpoints.checkpoint import Checkpointer, UnreadableCheckpoint, find, params_sha256, restore_for_eval

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZER = optax.chain(
    optax.masked(optax.trace(0.9), lambda params: {n: n.endswith("kernel") for n in params}), optax.adamw(1e-3)
)


def a_state(step: int = 7, scanned: bool = True, seed: int = 0, layers: int = 3) -> dict:
    """A state like the loop's whose optimizer has taken a step."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {
        "blocks.[0::2].attn.qkv.kernel": draw(layers, 4, 6),
        "head.kernel": draw(4, 10),
        "scale": draw(),
        "blocks.[1::2].mlp.bias": draw(layers, 5).astype(jnp.bfloat16),
    }
    grads = jax.tree.map(lambda p: p * 0.5 + 1, params)
    model_state = {"blocks.[0::2].norm.mean": draw(layers, 4)}
    if not scanned:
        params, grads, model_state = (models.unstack(tree) for tree in (params, grads, model_state))
    _, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    ema = {"params": jax.tree.map(lambda p: p / 2, params), "model_state": {}}
    return {
        "step": jnp.int32(step),
        "params": params,
        "model_state": model_state,
        "opt_state": opt_state,
        "ema": ema,
        "key": jax.random.fold_in(jax.random.key(3), seed),
        "health": {"bad_steps": jnp.int32(1)},
        "metrics": {"count": jnp.int32(2), "means": {}},
    }


def blank(state: dict) -> dict:
    return jax.tree.map(jnp.zeros_like, state | {"key": jax.random.key(0)})


def to_bytes(leaf) -> tuple:
    leaf = np.asarray(jax.random.key_data(leaf) if checkpoint_layout.is_key(leaf) else leaf)
    return leaf.dtype.name, leaf.shape, leaf.tobytes()


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b), path
        assert to_bytes(a) == to_bytes(b), path


def saved(directory: Path, *steps: int, **options) -> Checkpointer:
    checkpointer = Checkpointer(directory, **options)
    for step in steps:
        checkpointer.save(step, a_state(step, seed=step), {"config": {"seed": step}})
        checkpointer.wait()
    return checkpointer


# What is stored comes back


DTYPES = st.sampled_from(
    [
        np.dtype(d)
        for d in (
            "?",
            "i1",
            "u2",
            "i4",
            "u4",
            "i8",
            "f2",
            "f4",
            "f8",
            "c8",
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.int4,
        )
    ]
)


@st.composite
def arrays(draw):
    """Any bits of any type, NaN payloads included; zero to three axes, some without elements."""
    dtype, shape = draw(DTYPES), draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    values = draw(hnp.arrays(np.uint8, (*shape, dtype.itemsize)))
    if dtype.kind == "b":
        values %= 2
    if dtype.name == "int4":
        return np.asarray(values[..., 0] % 16).astype(np.int8).astype(dtype)
    return values.view(dtype).reshape(shape)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    tree=st.dictionaries(
        st.sampled_from("abcdef"),
        st.one_of(arrays(), st.just({}), st.dictionaries(st.sampled_from(["x.y", "blocks.3.k"]), arrays())),
        min_size=1,
    )
)
def test_any_array_round_trips(tree, tmp_path_factory):
    tree["step"] = np.array(2**40)
    with Checkpointer(tmp_path_factory.mktemp("any")) as checkpointer:
        checkpointer.save(0, tree, {})
        restored, _ = checkpointer.restore(tree)
    assert_same(restored, tree)


@pytest.mark.parametrize("abstract", [False, True])
def test_state_round_trips(tmp_path, abstract):
    state = a_state()
    with Checkpointer(tmp_path, best_metric="top1") as checkpointer:
        checkpointer.save(7, state, {"config": {"optim": {"lr": 0.1}}, "position": 2**40})
        checkpointer.attach(7, 0.5)
        restored, metadata = checkpointer.restore(jax.eval_shape(lambda: state) if abstract else blank(state))
    assert_same(restored, state)
    assert metadata["config"] == {"optim": {"lr": 0.1}}
    assert metadata["position"] == 2**40
    assert metadata["metric"] == {"name": "top1", "value": 0.5}
    assert metadata["step"] == 7
    assert metadata["versions"]["jax"] == jax.__version__
    assert time.time() - metadata["saved_at"] < 60


@pytest.mark.parametrize("scanned", [True, False])
def test_scan_may_be_toggled_between_save_and_restore(tmp_path, scanned):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, a_state(scanned=scanned), {})
        restored, _ = checkpointer.restore(blank(a_state(scanned=not scanned)))
    assert_same(restored, a_state(scanned=not scanned))


def test_names_on_disk_are_unrolled(tmp_path):
    saved(tmp_path, 1).close()
    names = checkpoint_files.read_about(tmp_path / "1")["arrays"]
    assert not [name for name in names if "[" in name]
    assert set(names) >= {
        "step",
        "params/blocks.4.attn.qkv.kernel",
        "params/blocks.5.mlp.bias",
        "model_state/blocks.0.norm.mean",
        "ema/params/head.kernel",
        "opt_state/1/0/mu/blocks.2.attn.qkv.kernel",
        "opt_state/1/0/nu/scale",
    }


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two arrays .* name 'a/1'"):
        checkpoint_layout.unroll({"a": {"1": np.zeros(1)}, "a/1": np.zeros(1)})


def test_the_state_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    params = {"w": jnp.arange(100_000, dtype=jnp.float32)}
    view = np.ones(1000)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"params": params, "host": view}, {})
        assert params["w"].unsafe_buffer_pointer() == (pointer := params["w"].unsafe_buffer_pointer())
        changed = change(params)
        view[:] = 0
        assert changed["w"].unsafe_buffer_pointer() == pointer, "the save keeps the donated buffer alive"
        restored, _ = checkpointer.restore({"params": changed, "host": view})
    np.testing.assert_array_equal(restored["params"]["w"], np.arange(100_000))
    np.testing.assert_array_equal(restored["host"], 1)


def test_random_keys_of_another_generator_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match=r"threefry2x32.*rbg|another shape"):
            checkpointer.restore({"key": jax.random.key(0, impl="rbg")})


def test_nothing_is_printed(tmp_path, capfd):
    saved(tmp_path, 1, 2).restore(a_state())
    restore_for_eval(tmp_path)
    assert capfd.readouterr() == ("", "")


# Which checkpoints stay


def test_the_newest_and_the_best_stay(tmp_path):
    def run(name, metrics, **options):
        with Checkpointer(tmp_path / name, best_metric="m", **options) as checkpointer:
            for step, metric in metrics.items():
                checkpointer.save(step, {"x": np.zeros(1)}, {})
                if metric is not None:
                    checkpointer.attach(step, metric)
            checkpointer.attach(99, 1.0)  # which was never saved
            checkpointer.wait()
            return checkpointer.steps()

    assert run("last", dict.fromkeys(range(5)), keep_last=2) == [3, 4]
    assert run("max", {1: 0.1, 2: 0.9, 3: 0.8, 4: 0.2, 5: 0.0}, keep_last=1, keep_best=2) == [2, 3, 5]
    assert run("max", {6: 0.85, 7: 0.1}, keep_last=1, keep_best=2) == [2, 6, 7], "metrics of an earlier process count"
    assert run("min", {1: 0.5, 2: 0.9, 3: float("nan"), 4: None, 5: 0.7}, keep_last=1, best_mode="min") == [1, 5]
    assert run("tie", {1: 0.5, 2: 0.5, 3: 0.1}, keep_last=1) == [2, 3]
    assert run("none", {1: 0.5, 2: 0.1}, keep_last=1, keep_best=0) == [2]


def test_a_metric_is_attached_later(tmp_path):
    """While the save is under way, when it is complete, and after a restart; damaged, it is as if it were not there."""
    for late in (False, True):
        folder = tmp_path / str(late)
        with Checkpointer(folder, best_metric="m", keep_last=1) as checkpointer:
            for step, metric in ((1, 0.9), (2, 0.1), (3, float("nan")), (4, 0.2)):
                checkpointer.save(step, {"x": np.zeros(1)}, {})
                if late:
                    checkpointer.wait()
                checkpointer.attach(step, metric)
            checkpointer.wait()
            assert checkpointer.steps() == [1, 4]
        with Checkpointer(folder, best_metric="m", keep_last=1) as checkpointer:
            assert checkpointer.restore({"x": np.zeros(1)}, 1)[1]["metric"] == {"name": "m", "value": 0.9}
            checkpointer.save(5, {"x": np.zeros(1)}, {})
            checkpointer.wait()
            assert checkpointer.steps() == [1, 5]
            truncate(folder / "1" / "metric.json")
            assert checkpointer.restore({"x": np.zeros(1)}, 1)[1]["metric"] is None


def test_a_step_that_is_there_is_left_alone(tmp_path):
    with saved(tmp_path, 3) as checkpointer:
        before = (tmp_path / "3" / "about" / "metadata").read_bytes()
        checkpointer.save(3, a_state(seed=99), {})
        checkpointer.wait()
        assert (tmp_path / "3" / "about" / "metadata").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep_last": 0}, "keep_last=0"), ({"keep_best": -1}, "keep_best=-1"), ({"best_mode": "most"}, "'max' or 'min'")],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, **options)


# Damage


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_found_or_harmless(tmp_path, capfd, damage):
    saved(tmp_path, 1).close()
    noticed = 0
    for i in range(len(files_of(tmp_path / "1"))):
        saved(tmp_path, 2, keep_last=2).close()
        written = files_of(tmp_path / "2")
        damage(written[i % len(written)])  # Orbax spreads the same arrays over more or fewer files
        with Checkpointer(tmp_path) as checkpointer:
            state, metadata = checkpointer.restore(a_state())
            used = metadata["step"]
            assert_same(state, a_state(used, seed=used))
            error = capfd.readouterr().err
            if used == 1:
                noticed += 1
                assert re.fullmatch(rf"checkpoint {tmp_path}/2 cannot be read \(.*\); using 1 instead\n", error)
                checkpointer.save(2, a_state(2, seed=2), {})  # takes the place of the damaged one
                checkpointer.wait()
                assert_same(checkpointer.restore(a_state(), step=2)[0], a_state(2, seed=2))
        checkpoint_files.remove(tmp_path / "2")
    assert noticed >= 3


def test_an_array_that_does_not_match_its_checksum(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:  # a disk that returns other bytes than it was given, in valid files
        honest = checkpoint_layout.crc32
        patch.setattr(checkpoint_layout, "crc32", lambda a: honest(a) ^ (a.shape == (4, 10)))
        saved(tmp_path, 1).close()
    with pytest.raises(UnreadableCheckpoint, match=r"1 cannot be read \(\S+/head.kernel does not match its checksum\)"):
        Checkpointer(tmp_path).restore(a_state())


def test_no_readable_checkpoint(tmp_path, capfd):
    saved(tmp_path, 1, 2).close()
    for step in (1, 2):
        truncate(max(files_of(tmp_path / str(step)), key=lambda f: f.stat().st_size))
    for restore in (
        lambda step: Checkpointer(tmp_path).restore(a_state(), step),
        lambda step: restore_for_eval(tmp_path, step),
    ):
        with pytest.raises(OSError, match=r"checkpoint \S+/1 cannot be read \([^\n]*\), nor the 1 newer$"):
            restore(None)
        with pytest.raises(OSError, match=r"checkpoint \S+/2 cannot be read \([^\n]*\)$"):
            restore(2)


def test_an_empty_folder_is_no_checkpoint(tmp_path, capfd):
    checkpointer = saved(tmp_path, 1)
    (tmp_path / "5").mkdir()
    assert checkpointer.restore(a_state())[1]["step"] == 1


def test_leftovers_are_no_checkpoints(tmp_path):
    saved(tmp_path, 1).close()
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-1700000000", "3.deleted"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    (tmp_path / "4.txt").touch()
    assert find(tmp_path).name == "1"
    assert restore_for_eval(tmp_path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 5, "reading removes nothing"
    assert Checkpointer(tmp_path).steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4.txt"]


def test_a_deletion_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 1, 2)

    def cut_short(path, **options):
        if path.exists():
            os.unlink(path / "_CHECKPOINT_METADATA")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_files.remove(tmp_path / "1")
    assert checkpointer.steps() == [2]
    assert Checkpointer(tmp_path).steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


# Saves that fail


@pytest.fixture
def small_files():
    """A quota: no file of this process may pass 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def big_state() -> dict:
    return {"params": {f"w{i}": np.random.default_rng(i).standard_normal(40_000) for i in range(20)}}


@pytest.mark.parametrize("surface", ["wait", "save", "close"])
def test_a_refused_write_is_one_line_at_the_next_call(tmp_path, capfd, small_files, surface):
    checkpointer = saved(tmp_path, 1)
    checkpointer.save(2, big_state(), {})
    line = f"^checkpoint 2 could not be saved in {tmp_path}: File too large; the newest complete one is 1$"
    with pytest.raises(OSError, match=line) as caught:
        checkpointer.save(3, a_state(), {}) if surface == "save" else getattr(checkpointer, surface)()
    assert caught.value.errno == errno.EFBIG
    assert checkpointer.steps() == [1]
    assert_same(checkpointer.restore(a_state())[0], a_state(1, seed=1))
    if surface != "close":
        checkpointer.save(4, a_state(), {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 4]
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    checkpointer.save(2, big_state(), {})
    with pytest.raises(OSError, match=r"^checkpoint 2 could not be saved in .*: No space left on device") as caught:
        checkpointer.wait()
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^checkpoint directory {tmp_path}/file/checkpoints: Not a directory$"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_metadata_must_be_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, {"x": np.zeros(1)}, {"config": object()})


# Another model


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    state = a_state()
    wanted = {
        **state,
        "params": {
            **{f"layer{i}": jnp.zeros(2) for i in range(8)},
            "scale": jnp.zeros(3),
            "head.kernel": state["params"]["head.kernel"].astype(jnp.bfloat16),
        },
    }
    with saved(tmp_path, 1) as checkpointer, pytest.raises(ValueError, match="does not fit this model") as caught:
        checkpointer.restore(wanted)
    message = str(caught.value)
    assert "\n" not in message
    assert "8 missing: params/layer0, params/layer1, params/layer2, params/layer3, params/layer4 and 3 more" in message
    assert "6 unexpected: params/blocks.0.attn.qkv.kernel" in message
    assert (
        "2 of another shape or type: params/head.kernel (float32[4, 10] saved, bfloat16[4, 10] wanted), "
        "params/scale (float32[] saved, float32[3] wanted)"
    ) in message


@pytest.mark.parametrize(("layers", "what"), [(2, "unexpected"), (4, "missing")])
def test_another_depth(tmp_path, layers, what):
    with saved(tmp_path, 1) as checkpointer, pytest.raises(ValueError, match=rf"\d+ {what}: \S*blocks\.[4567]"):
        checkpointer.restore(a_state(layers=layers))


# Without a template


def test_restore_for_eval(tmp_path):
    saved(tmp_path / "checkpoints", 1, 2).close()
    state = a_state(2, seed=2, scanned=False)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        restored = restore_for_eval(path)
        assert_same(restored["params"], jax.tree.map(np.asarray, state["params"]))
        assert_same(restored["model_state"], jax.tree.map(np.asarray, state["model_state"]))
        assert_same(restored["ema"], jax.tree.map(np.asarray, state["ema"]))
        assert restored["config"] == {"seed": 2}
        assert restored["step"] == restored["metadata"]["step"] == 2
        assert restored["path"] == find(path) == tmp_path / "checkpoints" / "2"
    assert restore_for_eval(tmp_path, step=1)["step"] == 1


def test_no_averages_is_none(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": np.zeros(2)}, "ema": {}}, {})
    assert restore_for_eval(tmp_path)["ema"] is None


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [
        ("run", 3, r"no checkpoint of step 3 in \S+/run/checkpoints; available: 1, 2$"),
        ("rum", None, r"no workdir or checkpoint \S+/rum; nearest: \S+/run$"),
        ("nothing/at/all", None, r"no workdir or checkpoint \S+/nothing/at/all$"),
        ("empty", None, r"no checkpoint in \S+/empty$"),
        ("run/checkpoints/1", 2, r"is the checkpoint of step 1, not of step 2$"),
    ],
)
def test_missing_things(tmp_path, path, step, message):
    saved(tmp_path / "run" / "checkpoints", 1, 2).close()
    (tmp_path / "empty").mkdir()
    for restore in (find, restore_for_eval):
        with pytest.raises(FileNotFoundError, match=message):
            restore(tmp_path / path, step)


@pytest.mark.multiprocess
def test_orbax_alone_reads_a_checkpoint(tmp_path):
    """Runs the snippet of the documentation as it stands, in a process that knows nothing of this repository."""
    saved(tmp_path / "runs" / "a" / "checkpoints", 500).close()
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL)[1]
    folders = [entry.name for entry in ROOT.iterdir() if (entry / "__init__.py").exists()]
    assert "training" in folders
    code += f"""
import pickle, sys
assert not [name for name in {folders} if name in sys.modules]
Path("params").write_bytes(pickle.dumps(arrays["params"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = pickle.loads((tmp_path / "params").read_bytes())
    assert_same(found, jax.tree.map(np.asarray, a_state(scanned=False, seed=500)["params"]))


def test_params_sha256():
    scanned = a_state()["params"]
    unrolled = models.unstack(scanned)
    digest = params_sha256(scanned)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == params_sha256(unrolled) == params_sha256(dict(reversed(unrolled.items())))
    scale = unrolled.pop("scale")
    changed = [
        {**unrolled, "scale": scale + 1},
        {**unrolled, "scale": scale[None]},
        {**unrolled, "size": scale},
        {**unrolled, "scale": scale.view(jnp.int32)},
    ]
    assert len({digest, *map(params_sha256, changed)}) == 5
