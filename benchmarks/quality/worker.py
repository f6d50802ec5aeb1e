"""One run in a process of its own; `queue` starts it: ``worker SETTINGS.json FOLDER``.

The row goes into ``FOLDER/rows/<run>.json``; what is printed, a traceback included, into the
queue's log of the run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.corpora import load
from benchmarks.quality.settings import from_dict
from benchmarks.quality.training import Place, Run, model_path
from benchmarks.rows import write


def work(task: dict[str, Any], folder: Path) -> None:
    """Do the run of a task ``{settings, device, stage, windows, save}``."""
    begun = time.perf_counter()
    settings = from_dict(task["settings"])
    place = Place(
        torch.device(task["device"]), task["stage"], tuple(task["windows"]), folder / "models"
    )
    run = Run(settings, load(folder), place)
    row = run.run()
    if task["save"] and not row["diverged"]:
        run.save(model_path(place, settings))
    row["process_s"] = time.perf_counter() - begun
    write(folder / "rows" / f"{settings.run}.json", [row])


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
