"""Checkpoints of real processes: killed at any moment, on other devices, and several that write one together."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simulated

from training.checkpoints import checkpoint_files
from training.checkpoints.checkpoint import Checkpointer, find, restore_for_eval

ROOT = Path(__file__).resolve().parents[2]

SAVE_FOR_EVER = """
import sys
import numpy as np
from training.checkpoints.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
state = {"params": {f"blocks.[0::1].w{i}": np.zeros((6, 50)) for i in range(10)}, "step": np.array(0)}
if checkpointer.latest() is not None:
    state, _ = checkpointer.restore(state)
print("at", int(state["step"]), flush=True)
while True:
    state = {"params": {n: v + 1 for n, v in state["params"].items()}, "step": state["step"] + 1}
    checkpointer.save(int(state["step"]), state, {"position": int(state["step"])})
    checkpointer.wait()
    print("saved", int(state["step"]), flush=True)
"""


def in_temporary_phase(directory: Path) -> bool:
    return any(directory.glob("*.orbax-checkpoint-tmp*"))


@pytest.mark.multiprocess
def test_kill_at_any_moment(tmp_path):
    """The same command again goes on from the newest complete checkpoint, wherever the kill hit."""
    moments = {
        "first temporary": lambda: in_temporary_phase(tmp_path),
        "arrays being written": lambda: any(tmp_path.glob("*.orbax-checkpoint-tmp*/arrays*/*")),
        "description written": lambda: any(tmp_path.glob("*.orbax-checkpoint-tmp*/about*/*")),
        "deletion of an old one": lambda: any(tmp_path.glob("*.deleted")),
    }
    newest, hit_temporary = 0, 0
    for moment in moments.values():
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == f"at {newest}\n"
        if newest == 0:
            while process.stdout.readline() != "saved 3\n":
                pass
        deadline = time.monotonic() + 20
        while not moment() and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        hit_temporary += in_temporary_phase(tmp_path)
        printed = [int(line.split()[1]) for line in rest.splitlines() if line.startswith("saved")]
        with Checkpointer(tmp_path) as checkpointer:
            assert not in_temporary_phase(tmp_path)
            template = {"params": {f"blocks.[0::1].w{i}": np.zeros((6, 50)) for i in range(10)}, "step": np.array(0)}
            state, metadata = checkpointer.restore(template)
        newest = int(state["step"])
        assert newest == metadata["position"] == metadata["step"]
        assert newest >= max(printed, default=0)
        assert all((value == newest).all() for value in state["params"].values())
    assert hit_temporary, "no kill hit the temporary phase"


OTHER_MESH = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from training.checkpoints.checkpoint import Checkpointer
devices = np.array(jax.devices())
first = NamedSharding(Mesh(devices, ("data",)), P(None, "data"))
second = Mesh(devices[:2].reshape(2, 1), ("fsdp", "tensor"))
values = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4)
state = {"params": {"blocks.[0::1].w": jax.device_put(values, first)}, "key": jax.random.key(1)}
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, state, {})
place = NamedSharding(second, P(None, "fsdp", "tensor"))
shardings = {"params": {"blocks.[0::1].w": place}, "key": NamedSharding(second, P())}
for template in (state, jax.eval_shape(lambda: state)):
    restored, _ = checkpointer.restore(template, shardings=shardings)
    w = restored["params"]["blocks.[0::1].w"]
    assert w.sharding == place, w.sharding
    assert restored["key"].sharding.is_equivalent_to(shardings["key"], 0)
    assert (np.asarray(w) == values).all() and jnp.array_equal(restored["key"], state["key"])
same, _ = checkpointer.restore(state)
assert same["params"]["blocks.[0::1].w"].sharding == first
unrolled, _ = checkpointer.restore({"params": {f"blocks.{i}.w": values[i] for i in range(3)}, "key": jax.random.key(0)})
assert (unrolled["params"]["blocks.2.w"] == values[2]).all()
checkpointer.close()
"""


@pytest.mark.multiprocess
def test_another_mesh(tmp_path):
    simulated.run(4, OTHER_MESH, tmp_path)


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from training.checkpoints import checkpoint_files as files, checkpoint_layout as layout
from training.checkpoints.checkpoint import Checkpointer, restore_for_eval
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())
place = {"params": {"blocks.[0::1].w": split}, "step": whole, "key": whole}
values = np.arange(3 * 8, dtype=np.float32).reshape(3, 8)
def a_state(step):
    return {"params": {"blocks.[0::1].w": values + step}, "step": step, "key": jax.random.key(step)}
make = jax.jit(a_state, out_shardings=place)
template = jax.eval_shape(a_state, jax.numpy.int32(0))
with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, make(jax.numpy.int32(step)), {"position": step})
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3]
    restored, metadata = checkpointer.restore(template, shardings=place)
    for shard in restored["params"]["blocks.[0::1].w"].addressable_shards:
        assert (np.asarray(shard.data) == (values + 3)[shard.index]).all()
    assert restored["params"]["blocks.[0::1].w"].sharding == split
    assert metadata["position"] == 3 and int(restored["step"].addressable_data(0)) == 3
    checkpointer.save(4, restored, {"position": 4})
    checkpointer.wait()
    # Damage that only checksums show: the one before is used, in both.
    honest, read = layout.checksums, files.read_shards
    layout.checksums = lambda state: honest(state) | {"params/blocks.1.w": 0}
    checkpointer.save(5, restored, {"position": 5})
    checkpointer.wait()
    layout.checksums = honest
    assert checkpointer.restore(template, shardings=place)[1]["step"] == 4
    # One process alone cannot read: neither goes on.
    if jax.process_index() == 1:
        def read_shards(path, *rest):
            raise files.InaccessibleCheckpoint("Stale file handle")
        files.read_shards = read_shards
    try:
        checkpointer.restore(template, shardings=place)
        raise AssertionError("read by one of two")
    except files.InaccessibleCheckpoint as error:
        assert ("Stale file handle", "process 1 cannot read it")[1 - jax.process_index()] in str(error), error
"""


@pytest.mark.multiprocess
def test_two_processes(tmp_path):
    """Each writes its shards; one process then reads the whole."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), port]
    processes = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    restored = restore_for_eval(tmp_path)
    assert restored["step"] == 4
    table = checkpoint_files.read_about(tmp_path / "4")["arrays"]
    assert None not in {info.checksum for info in table.values()}, "several processes write checksums too"
    np.testing.assert_array_equal(restored["params"]["blocks.1.w"], np.arange(8, 16) + 3)
    assert find(tmp_path, 5).name == "5"
