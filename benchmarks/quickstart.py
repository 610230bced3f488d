"""The quickstart over several seeds: accuracy, time, time to the first step and share of time waiting for data.

    python -m benchmarks.quickstart [--seeds=5] [--config=configs/quickstart.py]

Runs the real command once for each seed in a temporary folder and prints a table and the minimum.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", default="configs/quickstart.py")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            done = subprocess.run(
                [
                    sys.executable,
                    "train.py",
                    f"--config={options.config}",
                    f"--workdir={folder}/run",
                    f"--config.seed={seed}",
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds = time.perf_counter() - begin
            result = json.loads((Path(folder) / "run" / "summary.json").read_text())
        first = re.search(r"first step after ([0-9.]+) s", done.stdout)
        rows.append(
            {
                "seed": seed,
                "top1": next(iter(result["metrics"].values()))["top1"],
                "seconds": round(seconds, 1),
                "first_step": float(first[1]) if first else None,
                "data_wait": result["data_wait"],
                "commit": result["commit"],
            }
        )
        row = rows[-1]
        print(
            f"seed {seed}: top-1 {row['top1']:.4f}   {row['seconds']:.0f} s   first step after {row['first_step']} "
            f"s   data wait {row['data_wait']:.1%}",
            flush=True,
        )
    print(f"minimum top-1 over {len(rows)} seeds: {min(row['top1'] for row in rows):.4f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
