"""The connection by which the processes of a run find each other, and learn at once when one of them is gone.

JAX's own service ends a process by a C++ abort when it breaks, at start as well as later, and sees that a process died
only by a time-out; its agreement on a step to stop after holds Python's lock while it waits. So the processes meet here
first: process 0 listens on the address of the run, each of the others keeps one connection to it, and who is missing,
comes twice, fails or dies is known by name. JAX's service stays behind it on the loopback device. Its traffic is
relayed over the same address, and a relay that was cut stays open on JAX's side until the lifeline has ended the
process in its own words.

Messages are JSON objects, one a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn

from errors import AGAIN as LOST_CODE
from errors import INPUT, MACHINE, BadInput, ProcessMissing
from training.distributed.facts import difference
from training.distributed.launch import Launch

RETRY_SECONDS = 0.1
FAREWELL_SECONDS = 5.0  # for the others to read why the run ends
CHUNK_BYTES = 1 << 16
AGAIN = "start the same command again, with fewer processes if need be: it continues from the newest checkpoint"


class Lifeline:
    """This process's end of the connection; a thread of its own serves it.

    Args:
      launch: who this process is.
      lost_after: seconds without a sign of life after which a process is lost. One that dies is noticed at once; this
        is for machines that vanish from the network.
      facts: what all processes have to have in common, by name.
    """

    def __init__(self, launch: Launch, lost_after: float, facts: Mapping[str, str] | None = None):
        self.launch, self.lost_after, self.facts = launch, lost_after, dict(facts or {})
        host, port = launch.address.rsplit(":", 1)
        self._host = host.strip("[]")  # of an IPv6 address
        self._port = int(port)
        self._peers: dict[int, _Peer] = {}  # of process 0 all others, of the others process 0
        self._service_port = 0  # of JAX's service in process 0
        self._begun, self._all_done = asyncio.Event(), asyncio.Event()
        self._ending = False  # somebody failed or was lost
        self._difference = ""  # between a process and this one, before the run begins
        self._stop = _Stop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="lifeline", daemon=True).start()

    # --- what the run calls -------------------------------------------------------------------------------------------

    def open(self, timeout: float) -> str:
        """Waits until all processes are there, and returns the address for `jax.distributed.initialize`.

        Raises:
          ProcessMissing: some did not come, or process 0 cannot be reached, within `timeout` seconds; or its port
            cannot be used.
          ValueError: the processes disagree on who they are, or differ in what they have to have in common.
        """
        return self._run(self._gather(timeout) if self.launch.process == 0 else self._join(timeout))

    def close(self) -> None:
        """Waits until all processes are done; from then on none can be lost."""
        self._run(self._finish())

    def fail(self, text: str, code: int, report: str, others: int | None = None) -> NoReturn:
        """Tells the others in one line why this process failed, writes its report to stderr and leaves with `code`; the
        others do with `others`, if it is another one.

        If another process failed before, the line about that is the only one.
        """
        with contextlib.suppress(TimeoutError, OSError):
            self._run(self._tell_failure(text, code if others is None else others), 2 * FAREWELL_SECONDS)
        sys.stdout.flush()
        print(report, file=sys.stderr, flush=True)
        os._exit(code)

    def request_stop(self) -> None:
        """Asks all processes to stop after the same step; may be called by a signal handler."""
        self._loop.call_soon_threadsafe(self._pass_on_stop)

    def stops_after(self, step: int) -> bool:
        """Whether all processes stop after `step`; each of them asks after every step.

        It costs nothing until somebody asked for a stop, and then waits once for the answer of all.
        """
        return self._stop.reached(step)

    def await_news(self) -> None:
        """Gives the loss of another process, which ends this one, time to be noticed; returns if there was none."""
        self._run(asyncio.sleep(self.lost_after + FAREWELL_SECONDS))

    # --- process 0 ----------------------------------------------------------------------------------------------------

    async def _gather(self, timeout: float) -> str:
        try:
            listening = _listen(self._port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ProcessMissing(f"port {self._port} of {self.launch.address} cannot be used here: {reason}") from None
        self._service_port = _free_port()
        self._server = await asyncio.start_server(self._accept, sock=listening)
        try:
            await asyncio.wait_for(self._begun.wait(), timeout)
        except TimeoutError:
            missing = [str(i) for i in range(1, self.launch.processes) if i not in self._peers]
            text = (
                f"{len(missing)} of {self.launch.processes} processes did not come to {self.launch.address} within "
                f"{timeout:g} s: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''} ({self.launch.why})"
            )
            await self._tell_all(text, MACHINE)
            raise ProcessMissing(text) from None
        if self._difference:
            await self._tell_all(self._difference, INPUT)
            raise BadInput(self._difference)
        for peer in self._peers.values():
            peer.send(ready=True)
        self._start(self._beat())
        return f"127.0.0.1:{self._service_port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection to the address of the run; whoever does not speak this language is cut off."""
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), self.lost_after))
            if hello["wants"] == "jax":
                await _relay(reader, writer, *await self._connect_service())
                return
            peer = _Peer(int(hello["process"]), str(hello["host"]), reader, writer)
            if refusal := self._refusal(peer.process, hello["processes"]):
                peer.send(refused=refusal)
                await writer.drain()
                return
            if text := difference(self._name(peer), hello.get("facts", {}), self.facts):
                # Unlike a stranger, who is sent away, it belongs to the run: nobody else will come in its place.
                peer.send(refused=text)
                await writer.drain()
                self._difference = text
                self._begun.set()
                return
            self._peers[peer.process] = peer
            if len(self._peers) == self.launch.processes - 1:
                self._begun.set()
            await self._follow(peer)

    def _refusal(self, process: int, processes: int) -> str:
        if processes != self.launch.processes:
            return f"--num_processes={processes}: process 0 was started with --num_processes={self.launch.processes}"
        if not 0 < process < processes or process in self._peers:
            other = self._peers[process].host if process in self._peers else socket.gethostname()
            return f"--process_id={process}: there is such a process already, on {other}"
        return ""

    async def _connect_service(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:  # JAX starts it a moment after the processes have met
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self._service_port)
            await asyncio.sleep(RETRY_SECONDS)

    # --- the others ---------------------------------------------------------------------------------------------------

    async def _join(self, timeout: float) -> str:
        coordinator = _Peer(0, self._host, *await self._connect(timeout))
        name, (own, all_of_them) = socket.gethostname(), (self.launch.process, self.launch.processes)
        coordinator.send(wants="life", process=own, processes=all_of_them, host=name, facts=self.facts)
        # Process 0 began to wait before it could be reached, so it gives up before this.
        try:
            message = await asyncio.wait_for(coordinator.receive(), timeout + FAREWELL_SECONDS) or {}
        except TimeoutError:
            message = {}
        if "refused" in message:
            raise BadInput(message["refused"])
        if message.get("code") == INPUT:
            raise BadInput(message["end"])
        if "ready" not in message:
            unheard = f"{self.launch.address} was not heard of again ({self.launch.why})"
            raise ProcessMissing(message.get("end") or unheard)
        self._peers[0] = coordinator
        self._begun.set()
        self._start(self._follow(coordinator))
        self._start(self._beat())
        self._server = await asyncio.start_server(self._relay_to_coordinator, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, timeout: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reason, deadline = "no answer", self._loop.time() + timeout
        while (left := deadline - self._loop.time()) > 0:
            try:
                return await asyncio.wait_for(asyncio.open_connection(self._host, self._port), left)
            except TimeoutError:
                continue
            except socket.gaierror as error:
                reason = str(error.strerror)
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
            await asyncio.sleep(RETRY_SECONDS)
        raise ProcessMissing(
            f"process 0 cannot be reached at {self.launch.address} within {timeout:g} s: {reason} ({self.launch.why})"
        )

    async def _relay_to_coordinator(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            far_writer.write(b'{"wants": "jax"}\n')
            await _relay(reader, writer, far_reader, far_writer)
            if not self._all_done.is_set():
                await asyncio.sleep(self.lost_after)

    # --- both ---------------------------------------------------------------------------------------------------------

    async def _follow(self, peer: _Peer) -> None:
        """Hears a peer out, and ends this process when the run cannot go on."""
        while message := await peer.receive():
            if "end" in message:
                await self._end(message["end"], message["code"])
            elif "fail" in message:
                peer.gone.set()
                await self._end(f"{self._name(peer)} ended: {message['fail']}", message["code"])
            elif "done" in message:
                peer.done = True
                if all(other.done for other in self._peers.values()):
                    self._all_done.set()
            elif "stop" in message:
                self._pass_on_stop()
            elif "pause" in message:
                peer.send(step=self._stop.pause())
            elif "step" in message:
                peer.step = message["step"]
                self._set_stop()
            elif "stop_after" in message:
                self._stop.set(message["stop_after"])
        peer.gone.set()
        if self._begun.is_set():
            await self._lost(peer, "its connection broke: it died or was killed")
        else:
            del self._peers[peer.process]  # it may come again

    async def _beat(self) -> None:
        """Gives and expects signs of life."""
        pause = min(self.lost_after / 5, 10.0)
        while not self._all_done.is_set():
            before = self._loop.time()
            await asyncio.sleep(pause)
            now = self._loop.time()
            for peer in list(self._peers.values()):
                peer.send(alive=True)
                if now - before > 2 * pause:  # this process stood still itself, and heard nobody
                    peer.heard = now
                if now - peer.heard > self.lost_after:
                    peer.gone.set()
                    await self._lost(peer, f"no sign of life for {self.lost_after:g} s")

    async def _lost(self, peer: _Peer, how: str) -> None:
        if not self._all_done.is_set():
            await self._end(f"{self._name(peer)} was lost ({how}); {AGAIN}", LOST_CODE)

    def _pass_on_stop(self) -> None:
        """The others tell process 0; it asks all for their step, and none takes another one until it has the answer."""
        if self.launch.process:
            self._peers[0].send(stop=True)
        elif not self._stop.paused:
            self._stop.pause()
            for peer in self._peers.values():
                peer.send(pause=True)

    def _set_stop(self) -> None:
        steps = [peer.step for peer in self._peers.values()]
        known = [step for step in steps if step is not None]
        if len(known) == len(steps):
            stop_after = max([self._stop.pause(), *known]) + 1
            for peer in self._peers.values():
                peer.send(stop_after=stop_after)
            self._stop.set(stop_after)

    def _name(self, peer: _Peer) -> str:
        return f"process {peer.process} of {self.launch.processes} on {peer.host}"

    async def _end(self, text: str, code: int) -> None:
        """Ends this process, and from process 0 all others."""
        if not self._ending:
            await self._tell_all(text, code)
            print(text, file=sys.stderr, flush=True)
            os._exit(code)

    async def _tell_all(self, text: str, code: int) -> None:
        """From process 0: says why the run ends, and waits until the others know; else its own end would be news."""
        self._ending = True
        if self.launch.process == 0:
            for peer in self._peers.values():
                peer.send(end=text, code=code)
            gone = [self._loop.create_task(peer.gone.wait()) for peer in self._peers.values()]
            if gone:
                await asyncio.wait(gone, timeout=FAREWELL_SECONDS)

    async def _tell_failure(self, text: str, code: int) -> None:
        if self._ending:
            await asyncio.sleep(2 * FAREWELL_SECONDS)
        if self.launch.process == 0:
            await self._tell_all(f"process 0 of {self.launch.processes} on {socket.gethostname()} ended: {text}", code)
        else:
            self._ending = True
            self._peers[0].send(fail=text, code=code)
            await self._peers[0].writer.drain()

    async def _finish(self) -> None:
        """The others are done when they say so, and the run is when process 0 has heard it from all."""
        if self.launch.process:
            self._peers[0].send(done=True)
        await self._all_done.wait()
        if self.launch.process == 0:
            for peer in self._peers.values():
                peer.send(done=True)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the event loop itself would let it be collected
        task.add_done_callback(self._tasks.discard)

    def _run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Runs a coroutine in the lifeline's thread and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)


class _Stop:
    """The step after which all processes stop; shared by the run's thread and the lifeline's.

    A process that was asked for its step takes no further one until it knows the answer, so it cannot run past it.
    """

    def __init__(self) -> None:
        self.paused = False
        self._step = 0  # the last one that the run asked about; 0 before its first
        self._stop_after: int | None = None
        self._changed = threading.Condition()

    def reached(self, step: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop_after is not None or not self.paused)
            self._step = step
            # A run that had not begun anywhere stops after its first step, whatever its number.
            return self._stop_after is not None and step >= self._stop_after

    def pause(self) -> int:
        with self._changed:
            self.paused = True
            return self._step

    def set(self, stop_after: int) -> None:
        with self._changed:
            self._stop_after = stop_after
            self._changed.notify_all()


class _Peer:
    """The process at the other end of a connection."""

    def __init__(self, process: int, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process, self.host, self.reader, self.writer = process, host, reader, writer
        self.heard = asyncio.get_running_loop().time()
        self.gone = asyncio.Event()
        self.done = False
        self.step: int | None = None

    def send(self, **message: Any) -> None:
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection has ended."""
        try:
            line = await self.reader.readline()
            self.heard = asyncio.get_running_loop().time()
            return json.loads(line) if line else None
        except (OSError, ValueError):
            return None


async def _relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Passes bytes both ways until one side ends; closes the far side only."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                sink.write(data)
                await sink.drain()

    ways = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
    with contextlib.closing(far_writer):
        _, unfinished = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for task in unfinished:
            task.cancel()


def _listen(port: int) -> socket.socket:
    """A socket on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # where IPv6 was switched off, or the port is taken
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]
