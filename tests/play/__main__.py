"""Play sequences by hand: ``python -m tests.play --seeds 0-99``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.play.runner import Sequence, failure, play, shrunk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", help="a number or a range with both ends, 0-99")
    parser.add_argument("--length", type=int, default=12, help="actions in a sequence")
    parser.add_argument("--replay", help="a sequence as it was printed, or a file that holds it")
    parser.add_argument("--no-shrink", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("poetx_compile").setLevel(logging.ERROR)
    if arguments.replay:
        text = arguments.replay
        play(Sequence.parse(Path(text).read_text() if Path(text).exists() else text))
        return 0
    first, _, last = (arguments.seeds or "0-9").partition("-")
    begun, sequences, actions, failures = time.time(), 0, 0, 0
    for seed in range(int(first), int(last or first) + 1):
        sequence = Sequence.drawn(seed, arguments.length)
        sequences += 1
        try:
            actions += play(sequence)
            print(".", end="", flush=True)
        except Exception as error:
            failures += 1
            print(f"\nseed {seed}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            traceback.print_exc(limit=-4)
            if not arguments.no_shrink:
                least = shrunk(sequence)
                print(f"shrunk, {failure(least)!r:.500}:\n{least}", flush=True)
    spent = time.time() - begun
    print(f"{sequences} sequences, {actions} actions, {failures} failures, {spent:.0f} s")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
