"""What POET-X reaches at equal tokens beside tuned rivals: plans of runs, a queue, rows, figures.

======================================  ============================================================
``python -m benchmarks.quality plan``     the runs of a plan, and which are done
``python -m benchmarks.quality run``      do them, several on each GPU; what is done is skipped
``python -m benchmarks.quality table``    the rows as a Markdown table
``python -m benchmarks.quality plot``     loss against block size, against learning rate, curves
``python -m benchmarks.quality page``     the tables and figures of docs/quality.md, written anew
``… reference --reference PATH``          our losses beside the reference implementation's
======================================  ============================================================

A plan (`plans/`) expands into `Settings`; each is run in a process of its own (`worker`) and leaves
a row. The model, the splits and the order of the data are those of `examples/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

if str(EXAMPLES) not in sys.path:  # the model and the corpus are the example's
    sys.path.append(str(EXAMPLES))
