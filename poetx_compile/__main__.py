"""``python -m poetx_compile estimate|explain``: the command ``poetx``."""

from __future__ import annotations

import sys

from poetx_compile.inspect.command_line import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m poetx_compile"))
