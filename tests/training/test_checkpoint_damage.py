"""Checkpoints that are damaged or out of reach, and saves that fail: noticed, said in one line, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from states import a_state, assert_same, files_of, saved, truncate

from training.checkpoints import checkpoint_files, checksum
from training.checkpoints.checkpoint import (
    Checkpointer,
    InaccessibleCheckpoint,
    UnreadableCheckpoint,
    find,
    restore_for_eval,
)

# Damage


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
        honest = checksum.of_host
        patch.setattr(checksum, "of_host", lambda a: honest(a) ^ (a.shape == (4, 10)))
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


# Out of reach


@contextlib.contextmanager
def as_nobody(path: Path):
    """Makes this process one that permissions hold for, where it is that of root, and that still finds `path`."""
    if os.geteuid() != 0:
        yield
        return
    for folder in path.parents:
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)  # before anything else of this process needs a file


def forbid(path: Path) -> None:
    path.chmod(0)


def hang(path: Path) -> None:
    """Reading it is an I/O error: nothing is mapped at the first address of this process."""
    path.rename(path.with_name("kept"))
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("what", "name", "reason"),
    [
        (forbid, "", "Permission denied"),
        (forbid, "arrays", "Permission denied"),
        (forbid, "about/metadata", "Permission denied"),
        (forbid, "arrays/manifest.ocdbt", "Permission denied"),
        (hang, "about/metadata", "Input/output error"),
        (hang, "arrays/manifest.ocdbt", "Input/output error"),
    ],
)
def test_an_intact_checkpoint_out_of_reach_stops_the_run(tmp_path, capfd, what, name, reason):
    """Rolled back over, it would be deleted as soon as the run came to its step again."""
    tmp_path.chmod(0o777)
    saved(tmp_path, 1, 2).close()
    before = sorted(path.name for path in tmp_path.iterdir())
    what(tmp_path / "2" / name)
    line = rf"^checkpoint {tmp_path}/2 cannot be accessed \({reason}\); it may be intact, .* or move it away$"
    with as_nobody(tmp_path) if what is forbid else contextlib.nullcontext(), Checkpointer(tmp_path) as checkpointer:
        for restore in (lambda: checkpointer.restore(a_state()), lambda: restore_for_eval(tmp_path)):
            with pytest.raises(InaccessibleCheckpoint, match=line):
                restore()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        ValueError("UNAVAILABLE: Error reading: try again"),
        ValueError("NOT_FOUND: ... Failed to open: \"d\": Stale file handle [os_error_code='116']"),
        FileNotFoundError(errno.ENOENT, "gone"),
    ],
)
def test_what_the_storage_says_is_told_from_damage(tmp_path, monkeypatch, capfd, error):
    saved(tmp_path, 1, 2).close()
    restore = checkpoint_files.ocp.Checkpointer.restore

    def failing(self, path, *arguments, **named):
        if path.name == "2":
            raise RuntimeError("Orbax says something") from error
        return restore(self, path, *arguments, **named)

    monkeypatch.setattr(checkpoint_files.ocp.Checkpointer, "restore", failing)
    if isinstance(error, FileNotFoundError):
        assert restore_for_eval(tmp_path)["step"] == 1
    else:
        with pytest.raises(InaccessibleCheckpoint, match=r"Stale file handle|unavailable"):
            restore_for_eval(tmp_path)


def test_a_newer_format_is_not_damage(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 3)
        saved(tmp_path, 1).close()
    with pytest.raises(InaccessibleCheckpoint, match="it has format 3, and this version reads formats up to 2"):
        restore_for_eval(tmp_path)


def test_the_best_stays_while_it_is_out_of_reach(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, best_metric="m", keep_last=1) as checkpointer:
        for step, metric in ((1, 0.9), (2, 0.1)):
            checkpointer.save(step, {"x": np.zeros(1)}, {})
            checkpointer.attach(step, metric)
    hang(tmp_path / "1" / "metric.json")
    with Checkpointer(tmp_path, best_metric="m", keep_last=1) as checkpointer:
        checkpointer.save(3, {"x": np.zeros(1)}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3], "2 is the best that is known"


def test_checkpoints_of_the_first_format_are_read_and_verified(tmp_path, monkeypatch):
    """They have CRC-32s, or none."""
    honest = checkpoint_files._save_args

    def first(arrays, about, table):
        crc32 = {name: info._replace(checksum=zlib.crc32(arrays[name].tobytes())) for name, info in table.items()}
        return honest(arrays, about, crc32)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 1)
        patch.setattr(checkpoint_files, "_save_args", first)
        saved(tmp_path, 1).close()
    assert_same(Checkpointer(tmp_path).restore(a_state())[0], a_state(1, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(zlib, "crc32", lambda content, honest=zlib.crc32: honest(content) ^ (len(content) == 160))
        with pytest.raises(UnreadableCheckpoint, match=r"head\.kernel does not match its checksum"):
            Checkpointer(tmp_path).restore(a_state())


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
