"""Checkpoints: what is stored comes back bit for bit, by unrolled names; kept by age and metric."""

from __future__ import annotations

import pickle
import re
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
import pytest
from hypothesis import strategies as st
from states import a_state, assert_same, blank, saved, truncate

import models
from training.checkpoints import checkpoint_files, checkpoint_layout, checksum
from training.checkpoints.checkpoint import Checkpointer, find, params_sha256, restore_for_eval

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "f2", "f4", "c8", ml_dtypes.bfloat16, ml_dtypes.int4])
def test_a_checksum_is_the_same_on_the_host_and_on_devices(dtype):
    for shape in ((), (3,), (2, 3, 5), (0, 4)):
        values = np.asarray(np.random.default_rng(0).integers(-7, 8, shape)).astype(np.int8).astype(dtype)
        assert checksum.of_host(values) == int(jax.jit(checksum.of_device)(values))
    layers = jax.jit(checksum.of_device, static_argnums=1)(np.ones((2, 3), dtype), True)
    assert layers.tolist() == [checksum.of_host(np.ones(3, dtype))] * 2


def test_a_checksum_tells_values_and_places():
    values = np.zeros(70_000, np.float32)  # more than one chunk
    found = {checksum.of_host(values)}
    for place in (0, 1, 65_536, 69_999):
        changed = values.copy()
        changed[place] = -0.0
        found.add(checksum.of_host(changed))
        changed[place - 1] = -0.0  # the same bit twice
        found.add(checksum.of_host(changed))
    assert len(found) == 9


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
