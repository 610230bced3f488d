"""One process of a lifeline, driven by lines on stdin: `peer.py ADDRESS PROCESSES PROCESS TIMEOUT LOST_AFTER [FACTS]`;
FACTS is JSON.
"""

import asyncio
import json
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.distributed.launch import Launch
from training.distributed.lifeline import Lifeline


def serve_echo(port):
    """In the place of JAX's service."""

    async def echo(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()

    async def serve():
        await (await asyncio.start_server(echo, "127.0.0.1", port)).serve_forever()

    asyncio.run(serve())


def main(address, processes, process, timeout, lost_after, facts="{}"):
    launch = Launch(address, int(processes), int(process), "a test")
    lifeline = Lifeline(launch, float(lost_after), json.loads(facts))
    try:
        service = lifeline.open(float(timeout))
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 2
    print("met", flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "close":
            lifeline.close()
            return 0
        if command == "fail":
            lifeline.fail("error: no such thing", 2, "error: no such thing")
        if command == "stop":
            lifeline.request_stop()
        if command == "serve":
            serve_echo(int(service.rsplit(":", 1)[1]))
        if command == "ask":
            host, port = service.rsplit(":", 1)
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"hello\n")
                print(connection.makefile().readline().strip(), flush=True)
        if command == "steps":  # until stopped; the signal to stop comes at a step, as if by SIGTERM
            rest, first, stop_at = random.Random(int(process)), int(arguments[0]), int(arguments[1])
            step = first
            while not lifeline.stops_after(step):
                step += 1
                time.sleep(0.002 * rest.random())
                if step == stop_at:
                    lifeline.request_stop()
            print(step, flush=True)
    return 1


if __name__ == "__main__":
    signal.alarm(60)  # a test that waits in vain fails
    sys.exit(main(*sys.argv[1:]))
