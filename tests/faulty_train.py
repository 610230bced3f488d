"""train.py of which process 1 has a fault: `faulty_train.py data|evaluation ...`.

data: the set is missing on its machine. evaluation: an image of its share is truncated.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import train
from training.run import command, evaluate


def absent(name, *arguments, **options):
    raise FileNotFoundError(f"{name}: /no/such/folder does not exist")


def truncated(*arguments, **options):
    raise data.ExampleError("5.png: image file is truncated")


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    if "--process_id=1" in arguments:
        if fault == "data":
            data.open_source = absent
        if fault == "evaluation":
            evaluate.Evaluator.__call__ = truncated
    sys.exit(command.guarded(train.main, arguments))
