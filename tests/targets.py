"""Every kernel compiled for GPUs that are not there: `python -m tests.targets [80 89 90 100 120]`.

For each kernel and target the most that any of its launches needs: shared memory, registers that
spill. What does not fit or does not compile is told by case, and is a failure.
Takes a minute a target; what Triton has compiled before it finds in its cache.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.helpers.compiled import TARGETS, Target, compile_for, stack_bytes
from tests.helpers.kernel_cases import launches


def needs(target: Target) -> tuple[dict[str, list[tuple[int, int, str]]], list[str]]:
    """By kernel (shared memory, bytes spilled, case) of its launches; and what went wrong."""
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    wrong = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        compiled: list[Any] = compile_for(patch, target)
        for case, launch in launches().items():
            compiled.clear()
            try:
                launch()
            except Exception as error:
                wrong.append(f"{case}: {type(error).__name__}: {error}")
            for kernel in compiled:
                shared, name = kernel.metadata.shared, kernel.metadata.name
                found[name].append((shared, stack_bytes(kernel.asm["cubin"], Path(folder)), case))
                if shared > target.shared_memory:
                    wrong.append(f"{case}: {name} takes {shared} bytes of shared memory")
    return found, wrong


def main(capabilities: list[int]) -> int:
    failed = False
    for target in TARGETS:
        if capabilities and target.capability not in capabilities:
            continue
        found, wrong = needs(target)
        print(f"triton {triton.__version__}, sm_{target.capability}, {target.shared_memory} bytes")
        for name, of_launches in sorted(found.items()):
            spilled = [(stack, case) for _, stack, case in of_launches if stack]
            worst = "{} bytes: {}".format(*max(spilled)) if spilled else "nothing"
            counts = f"{len(spilled)} of {len(of_launches)} spill"
            print(f"  {name:30} {max(of_launches)[0]:7} bytes, {counts}, at most {worst}")
        for line in wrong:
            print(f"  WRONG {line}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
