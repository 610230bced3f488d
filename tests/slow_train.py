"""train.py or eval.py that stands still at a place until it is killed: `slow_train.py SCRIPT PLACE MARK ...`.

PLACE is `compilation N`, the Nth one of the process, which holds its thread in C, or `evaluation N`, between two
batches of the Nth one. The file MARK appears when it is there.
"""

import hashlib
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.distributed import preemption
from training.run import command, evaluate


def hold_compilation(which, mark):
    interruptible, seen = preemption.interruptible, []

    def slow():
        mark.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # a quarter of an hour

    def patched(function):
        seen.append(function)
        return interruptible(slow if len(seen) == which else function)

    preemption.interruptible = patched


def hold_evaluation(which, mark):
    batches, seen = evaluate.Evaluator._on_device, []

    def patched(self, *arguments, **options):
        seen.append(self)
        for number, batch in enumerate(batches(self, *arguments, **options)):
            if number and len(seen) == which:
                mark.touch()
                time.sleep(600)
            yield batch

    evaluate.Evaluator._on_device = patched


if __name__ == "__main__":
    script, place, which, mark, *arguments = sys.argv[1:]
    {"compilation": hold_compilation, "evaluation": hold_evaluation}[place](int(which), Path(mark))
    sys.exit(command.guarded(importlib.import_module(script.removesuffix(".py")).main, arguments))
