"""Worker processes that end with their parent, leave nothing behind, and are named when they die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import shared_memory
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import grain
from absl import flags
from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

from errors import WorkerLost

SMALL_ARRAY_BYTES = 4096  # below this, an array travels in the message and not in shared memory
POLL_SECONDS = 1.0
TERMINATION_GRACE_SECONDS = 60.0
LEAVE_ATTEMPTS, LEAVE_INTERVAL_SECONDS = 60, 0.05
GRAIN_PROCESS_NAME = "grain-process-prefetch"


class WorkerGuard:
    """Spreads a Grain dataset over worker processes and watches them."""

    def __init__(self, workers: int):
        self._workers = workers
        self._processes: dict[int, Any] = {}

    def spread(self, dataset: grain.IterDataset, ahead: int) -> grain.IterDataset:
        """The same elements in the same order, made by the workers; each keeps `ahead` of them ready."""
        if not flags.FLAGS.is_parsed():
            # Grain reads absl flags; in a notebook, a test or a library nobody has parsed any, so defaults hold.
            flags.FLAGS.mark_as_parsed()
        options = grain.experimental.DatasetOptions(min_shm_size=SMALL_ARRAY_BYTES)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        spread = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=max(ahead, 1))
        return dataset.mp_prefetch(spread, worker_init_fn=_start_worker)

    def next(self, iterator: grain.DatasetIterator) -> Any:
        """`next(iterator)`: a batch and more. Raises WorkerLost, which names the worker that was killed or crashed."""
        try:
            element = next(iterator)
        except RuntimeError as error:
            self._meet_workers()
            for process in self._processes.values():
                if process.exitcode:
                    raise WorkerLost(f"data worker process {process.pid} {_fate(process.exitcode)}") from error
            raise
        if len(self._processes) < self._workers:
            self._meet_workers()
        _take(element[0])
        return element

    def _meet_workers(self) -> None:
        """Remembers the worker processes: Grain forgets one as soon as it has died, and nobody could name it."""
        for process in multiprocessing.active_children():
            if process.name.startswith(GRAIN_PROCESS_NAME):
                self._processes.setdefault(process.pid or 0, process)


def free_memory() -> None:
    """Waits until the shared memory of arrays that nobody took is free: Grain frees it in a thread, which the end of
    the process would cut off, and Python would complain.
    """
    pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        pool.apply(int)  # its one thread takes what it is given in order


def _take(batch: dict[str, Any]) -> None:
    """Takes the names of a batch's shared memory away: it is free as soon as the arrays are gone, however this process
    ends, and a batch that is still on its way to a device then is no leak to complain of.
    """
    for array in batch.values():
        if isinstance(array, SharedMemoryArray) and array._unlink_on_del:
            array._unlink_on_del = False
            array.shm.unlink()


def _fate(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = "; out of memory?" if -exitcode == signal.SIGKILL else ""
    return f"was killed by signal {-exitcode} ({name}{hint})"


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker: ties its life to that of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and closes the workers
    signal.signal(signal.SIGTERM, _leave_later)
    signal.signal(signal.SIGUSR1, _leave_now)
    threading.Thread(target=_leave_with_parent, name="leave-with-parent", daemon=True).start()


def _leave_later(*_: Any) -> None:
    """On a SIGTERM to the whole group the parent still saves its state, and then closes the workers itself."""
    timer = threading.Timer(TERMINATION_GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _leave_with_parent() -> None:
    """Ends this process once its parent is gone; the resource tracker then finds nobody left and frees shared memory.

    The tracker only knows a segment from a moment after its creation, and the main thread creates them, so that is the
    thread to leave from: it is asked by a signal until it is outside the creation of a segment.
    """
    parent = multiprocessing.parent_process()
    pid = os.getppid()
    while parent is not None and os.getppid() == pid and not wait([parent.sentinel], timeout=POLL_SECONDS):
        pass
    for _ in range(LEAVE_ATTEMPTS):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(LEAVE_INTERVAL_SECONDS)
    os._exit(1)


def _leave_now(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == shared_memory.__file__:
            return
        frame = frame.f_back
    os._exit(1)
