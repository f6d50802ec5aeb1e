"""The command line of `pretrain.py`: every option once, with its default and its help."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from llama import PRESETS
from pretraining.failure import RunError


def _option(default: Any, help: str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is. Options marked `free` may change when the run is resumed."""

    preset: str = _option("tiny", "size of the model", choices=tuple(PRESETS))
    steps: int = _option(250, "optimiser steps", least=1, free=True)
    batch_size: int = _option(8, "sequences in a batch, of all processes together", least=1)
    seq_len: int = _option(128, "tokens in a sequence", least=2)
    tokenizer: str = _option(
        "bytes",
        "bytes, or a byte-level BPE, trained on the corpus and kept in the run folder",
        choices=("bytes", "bpe"),
    )
    vocab_size: int | None = _option(
        None, "tokens of the vocabulary (default: 256 for bytes, 32000 for bpe)", least=256
    )
    seed: int = _option(0, "seed of the weights, the data order and the permutations", least=0)
    device: str = _option("auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one", free=True)
    dtype: str = _option(
        "auto",
        "float32; autocast: float32 weights, bfloat16 products; bfloat16: weights too; "
        "auto: autocast on CUDA, float32 elsewhere",
        choices=("auto", "float32", "autocast", "bfloat16"),
    )
    gpu_memory: str | None = _option(
        None,
        "of the CUDA device, what one of this size has for tensors, such as 80GB",
        metavar="SIZE",
        free=True,
    )
    deterministic: bool = _option(
        False, "on CUDA as well, the same bits each time; slower", free=True
    )
    method: str = _option(
        "poetx",
        "POET-X, dense training, or one after the other with plots of both",
        choices=("poetx", "adamw", "both"),
    )
    optimizer: str = _option("muon", "optimiser of the rotations", choices=("muon", "adamw"))
    momentum_dtype: str = _option(
        "float32",
        "in which muon keeps the momentum of the rotations",
        choices=("float32", "bfloat16", "int8"),
    )
    turn_every: int = _option(
        1, "steps from one turn of a side to its next, of muon: faster from 2 on", least=1
    )
    lr: float = _option(3e-3, "peak learning rate of everything that is not a rotation", above=0)
    poetx_lr: float | None = _option(
        None, "peak learning rate of the rotations (default: the optimiser's own)", above=0
    )
    warmup: int | None = _option(
        None, "steps of linear warm-up (default: a tenth of the steps, at most 100)", least=0
    )
    clip: float = _option(1.0, "largest norm of the gradients", above=0)
    block_size: int | None = _option(
        None, "b, size of the rotation blocks (default: half the width, at most 256)", least=2
    )
    merge_interval: int = _option(
        200, "steps between merges; 1: plain weights, turned in each step", least=1
    )
    redraw_interval: int = _option(
        200, "steps after which permutations are drawn again; 0 for never", least=0
    )
    base: str = _option(
        "dense", "the frozen weights: as they are, or int8 with scales", choices=("dense", "int8")
    )
    variant: str = _option("fast", "what the backward keeps", choices=("fast", "mem"))
    permutation: str = _option(
        "chunked", "of chunks of columns, or of single ones, slower", choices=("random", "chunked")
    )
    activation_checkpointing: bool = _option(False, "recompute each block in the backward")
    loss_chunk: int | None = _option(
        None, "tokens whose logits are made at a time (default: all)", least=1
    )
    compile_by: str = _option(
        "model",
        "the whole model as one graph, or each block by itself, with one code for all: it starts "
        "sooner",
        choices=("model", "block"),
        free=True,
    )
    cuda_graphs: bool = _option(
        False,
        "record forward and backward, and replay them: faster where the GPU waits for Python, and "
        "some GiB more for a large model",
        free=True,
    )
    stage: str = _option(
        "inductor",
        "what runs the compiled graphs",
        choices=("inductor", "aot_eager", "eager"),
        free=True,
    )
    parallel: str = _option(
        "ddp",
        "how the processes that torchrun starts share the work: a copy of the model each, or "
        "sharded weights",
        choices=("ddp", "fsdp2"),
        free=True,
    )
    no_compile: bool = _option(False, "run the model without torch.compile", free=True)
    data: tuple[str, ...] = _option(
        (),
        'files to train on: text, .jsonl or .jsonl.gz with a "text" in each line; or folders, '
        "for the text files below them (default: the Python standard library's sources)",
        metavar="PATH",
    )
    out: str | None = _option(
        None,
        "run folder, created (default: runs/<time>-<preset>-<method>)",
        metavar="RUN",
        free=True,
    )
    resume: bool = _option(False, "continue the run in --out from its checkpoint", free=True)
    compare: str | None = _option(
        None, "draw another finished run into the plots", metavar="RUN", free=True
    )
    tensorboard: bool = _option(False, "write the metrics for TensorBoard as well", free=True)
    log_every: int = _option(10, "steps between rows of metrics.jsonl", least=1, free=True)
    eval_every: int = _option(50, "steps between validations", least=1, free=True)
    eval_batches: int = _option(16, "batches of a validation", least=1)
    sample_tokens: int = _option(
        128, "tokens that the trained model writes at the end", least=0, free=True
    )
    no_figures: bool = _option(
        False,
        "leave out singular values and exact angles, which take minutes for large models",
        free=True,
    )
    no_export: bool = _option(False, "leave out the plain model at the end", free=True)
    save_every: int = _option(100, "steps between checkpoints", least=1, free=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @property
    def warmup_steps(self) -> int:
        return min(100, self.steps // 10) if self.warmup is None else min(self.warmup, self.steps)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return self.vocab_size or {"bytes": 256, "bpe": 32000}[self.tokenizer]

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {**dataclasses.asdict(self), "data": list(self.data)}


def parse(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given on the command line, and only those."""
    parser = _Parser(
        prog="pretrain.py",
        description="Pretrain a Llama with POET-X (or densely) on text.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Options):
        meta = dict(field.metadata)
        kwargs: dict[str, Any] = {k: meta[k] for k in ("choices", "metavar") if k in meta}
        kwargs["help"] = meta["help"]
        if field.default is False:
            kwargs["action"] = "store_true"
        elif field.name == "data":
            kwargs["nargs"] = "+"
        else:
            kwargs["type"] = _type_of(field)
            if field.default is not None:
                kwargs["help"] += f" (default: {field.default})"
        kwargs["help"] = kwargs["help"].replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), **kwargs)
    given = vars(parser.parse_args(arguments))
    if "data" in given:
        given["data"] = tuple(given["data"])
    return given


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> Options:
    """The options of a run that goes on: the saved ones, with the free ones of the command line.

    Raises:
        RunError: an option that defines the run was given with another value.
    """
    known = {field.name: field for field in dataclasses.fields(Options)}
    values: dict[str, Any] = {
        k: tuple(v) if k == "data" else v for k, v in saved.items() if k in known
    }
    for name, value in given.items():
        if known[name].metadata.get("free"):
            values[name] = value
        elif value != values.get(name):
            flag = "--" + name.replace("_", "-")
            raise RunError(
                f"the run was started with {flag} {values.get(name)}, not {value}: leave {flag} "
                "out, or start a new run"
            )
    if "warmup" not in given and values.get("warmup") is None and "steps" in given:
        # A longer run must not change the warm-up that is already behind it.
        values["warmup"] = Options(steps=saved["steps"]).warmup_steps
    return Options(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


def _type_of(field: dataclasses.Field[Any]) -> type:
    """str, int or float of an annotation such as ``"int | None"``."""
    return {"str": str, "int": int, "float": float}[str(field.type).split(" ")[0]]


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    meta, flag = field.metadata, "--" + field.name.replace("_", "-")
    if value is None:
        return
    if "choices" in meta and value not in meta["choices"]:
        raise RunError(f"{flag} {value}: use one of {', '.join(meta['choices'])}")
    if "least" in meta and value < meta["least"]:
        raise RunError(f"{flag} {value}: use a whole number of at least {meta['least']}")
    if "above" in meta and not (math.isfinite(value) and value > meta["above"]):
        raise RunError(f"{flag} {value}: use a number above {meta['above']}")
