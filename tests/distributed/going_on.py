"""examples/pretrain.py goes on in as many processes as there are, with sharded weights."""

from __future__ import annotations

import pretrain


def check_pretrain_resumes_with_sharded_weights() -> None:
    pretrain.draw = lambda folder, other=None: None
    assert pretrain.main(["--out", "sharded", "--resume", "--parallel", "fsdp2"]) == 0
