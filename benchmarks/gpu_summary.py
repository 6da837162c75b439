"""Collect what the tests and commands of run_gpu.sh said into gpu_tests.json.

python -m benchmarks.gpu_summary OUTPUT_FOLDER GPUS
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from paravae.launch.machine import describe

WHAT = {"tests_cuda": "tests/test_cuda.py, one GPU", "tests_nccl": "tests/test_nccl.py, NCCL"}


def main() -> None:
    folder, gpus = Path(sys.argv[1]), int(sys.argv[2])
    rows = []
    for name, what in WHAT.items():
        log = folder / f"{name}.log"
        if log.exists():
            last = [line for line in log.read_text().splitlines() if re.search(r"\d+ (passed|failed)", line)]
            rows.append({"what": what, "result": last[-1].strip("= ") if last else "did not finish"})
    commands = folder / "commands.log"
    if commands.exists():
        said = [line for line in commands.read_text().splitlines() if "largest difference" in line]
        for line in said:
            mode, result = line.split(": ", 1)
            rows.append({"what": f"paravae decode, {mode}, against one GPU, fp32", "result": result})
    report = {"what": "tests and commands on GPUs", "machine": describe(gpus), "rows": rows}
    text = json.dumps(report, indent=2) + "\n"
    (folder / "gpu_tests.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
