"""Run by every rank of a launch that stays for many tests, which share its start: runs scenarios of any script here.

    accelerate launch --config_file CONFIG -m tests.launch.scripts.serve JOBS PID

The folder JOBS gets 0.json, 1.json, ... with the name of a script, the names of its scenarios, and the folder for their
results (results.json, one entry a scenario); N.done is there when job N has ended. A failing assertion ends the launch
with a non-zero exit code. It ends when there is no process PID any more.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.launch.scripts.scenarios import forget_meshes, forget_trainings


def main() -> None:
    jobs, tester = Path(sys.argv[1]), int(sys.argv[2])
    forget_meshes()  # it finds the caches while nothing is frozen
    for number in itertools.count():
        job = jobs / f"{number}.json"
        while not job.exists():
            if not is_alive(tester):
                return
            time.sleep(0.1)
        run(**json.loads(job.read_text(encoding="utf-8")))
        if dist.get_rank() == 0:
            job.with_suffix(".done").touch()


def run(script: str, scenarios: list[str], folder: str) -> None:
    os.chdir(folder)  # every script's FOLDER
    module = importlib.import_module(f"tests.launch.scripts.{script}")
    gc.collect()  # what is frozen is not looked at again: every gc.collect(), which each training calls, would look
    gc.freeze()  # through all libraries, a third of the time
    results = {}
    for name in scenarios:
        began = time.monotonic()
        results[name] = getattr(module, name)()
        forget_trainings()
        if dist.get_rank() == 0:
            print(f"passed: {name} ({time.monotonic() - began:.0f} s)", flush=True)
    if dist.get_rank() == 0:
        Path("results.json").write_text(json.dumps(results), encoding="utf-8")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
