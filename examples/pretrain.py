"""Pretrain a Llama on text, bytes or a BPE of it, with POET-X or densely, from one command.

    python examples/pretrain.py                        # a small run on the CPU, a few minutes
    python examples/pretrain.py --method adamw         # the same, every weight trained
    python examples/pretrain.py --method both          # one after the other, in one loss.png
    python examples/pretrain.py --preset 20m --data corpus.jsonl.gz --steps 2000 --out runs/a
    python examples/pretrain.py --out runs/a --resume  # goes on from the last checkpoint
    torchrun --nproc-per-node 2 examples/pretrain.py   # the same batch over two processes, with DDP
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel fsdp2

The run folder holds config.json, metrics.jsonl, checkpoint.pt, loss.png, spectrum.png, sample.txt,
the tokenizer where there is one and, in export/, the trained model with plain weights (`llama.load`
reads it). A run that cannot start or go on says why in one line and exits with code 2; one that is
interrupted before its first step leaves nothing behind, one that runs out of memory failure.json.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import poetx_compile as poetx
from llama import PRESETS, Llama, LlamaConfig, hugging_face_name, to_hugging_face
from poetx_compile.errors import POETXError
from poetx_compile.inspect.diagnostics import effective_weight, spectrum
from poetx_compile.state.files import write_atomically
from pretraining import memory, sample
from pretraining.batches import window_count
from pretraining.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from pretraining.corpus import Corpus, load_corpus
from pretraining.failure import RunError
from pretraining.files import read_json, write_json, write_text
from pretraining.methods import (
    Method,
    be_deterministic,
    build,
    built_in,
    check_cuda_graphs,
    pick_device,
    pick_dtypes,
    poetx_config,
)
from pretraining.metrics import MetricsFile
from pretraining.options import Options, parse, resumed
from pretraining.plots import draw, read_run
from pretraining.processes import Processes, gathered, processes
from pretraining.progress import telling
from pretraining.tokenizer import BPE, Bytes, train_bpe
from pretraining.training import Training

WATCHED = "layers.0.self_attn.q_proj"
"""The layer whose singular values spectrum.png shows."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell gives it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = parse(arguments)
    try:
        with processes() as group:
            train = pretrain_both if given.get("method") == "both" else pretrain
            return train(given, group)
    except (RunError, POETXError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def pretrain_both(given: dict[str, Any], group: Processes) -> int:
    """Train densely, then with POET-X, in two folders of one; the plots of the second show both."""
    if given.get("resume") or "compare" in given:
        raise RunError("--method both: --resume and --compare go with one of its two runs")
    if group.several and "out" not in given:
        raise RunError("--method both needs --out where several processes train")
    out = Path(given["out"]) if "out" in given else _unused(f"{given.get('preset', 'tiny')}-both")
    dense, poetx_run = out / "adamw", out / "poetx"
    code = pretrain(given | {"method": "adamw", "out": str(dense)}, group)
    if code == 0:
        torch.compiler.reset()
        more = {"method": "poetx", "out": str(poetx_run), "compare": str(dense)}
        code = pretrain(given | more, group)
    return code


def pretrain(given: dict[str, Any], group: Processes) -> int:
    """Train by the options that were `given`, in all processes of `group`; the exit code."""
    options, checkpoint = _options_and_checkpoint(given)
    group.part(options.batch_size)
    group.wait()  # nobody creates the folder before all have looked for it
    if options.deterministic:
        be_deterministic()
    device = pick_device(options.device)
    check_cuda_graphs(options, device, group)
    limit = memory.cap(options.gpu_memory, device)
    dtype, autocast = pick_dtypes(options.dtype, device)
    if options.compare is not None:
        read_run(Path(options.compare))
    corpus = load_corpus(options.data)
    window_count(corpus.validation, options.seq_len, "validation")
    facts = _facts(corpus)
    tokenizer = _tokenizer(options, corpus, checkpoint is None, group)
    corpus = tokenizer.tokenized(corpus)
    window_count(corpus.validation, options.seq_len, "validation")

    shapes = LlamaConfig(
        **PRESETS[options.preset], vocab_size=options.vocabulary, max_seq_len=options.seq_len
    )
    torch.manual_seed(options.seed)
    with built_in(device, dtype):
        model = Llama(
            shapes,
            activation_checkpointing=options.activation_checkpointing,
            loss_chunk=options.loss_chunk,
        )
    poetx_settings = poetx_config(options, shapes)
    method = build(model, options, poetx_settings, group)
    training = Training(options, method, corpus, device, autocast=autocast, group=group)

    new = checkpoint is None
    folder = Path(str(options.out))
    if checkpoint is not None:
        training.load(checkpoint)
        random = checkpoint["random"]
        del checkpoint  # a copy of the model
    elif group.is_first:
        folder = _new_folder(options)
    if group.is_first:
        _announce(options, facts, corpus, method, device, dtype, autocast, folder, group)
        _announce_memory(device, limit)
    try:
        if not options.no_compile:
            _compile(training, folder if new and group.is_first else None)
        spectra: dict[str, Any] = {"layer": WATCHED, "before": [], "after": []}
        if not options.no_figures:
            spectra["before"] = _spectrum(model)
        if not new:
            set_random_state(random)
            spectra = read_json(folder / "spectrum.json")
        metrics = None
        if group.is_first:
            write_json(folder / "spectrum.json", spectra)
            tokenizer.save(folder)
            values = _config(options, shapes, poetx_settings, method, facts, corpus, group)
            write_json(folder / "config.json", values)
            board = folder / "tensorboard" if options.tensorboard else None
            metrics = MetricsFile(folder / "metrics.jsonl", training.step, board)
        done = training.run(metrics, lambda: _save(folder, training))
    except torch.OutOfMemoryError as error:
        raise memory.out_of_memory(error, method, training.step, limit, folder) from error
    if not done:
        if group.is_first:
            print(f"stopped at step {training.step}; go on with --out {folder} --resume")
        return INTERRUPTED

    if spectra["before"]:
        spectra["after"] = _spectrum(model)
    if group.is_first:
        write_json(folder / "spectrum.json", spectra)
        draw(folder, None if options.compare is None else Path(options.compare))
    if not options.no_export:
        state = gathered(dict(model.state_dict()), group)
        if group.is_first:
            export(state, shapes, folder / "export")
            tokenizer.save(folder / "export")
    if options.sample_tokens:
        _sample(training, tokenizer, folder)
    if group.is_first:
        _conclude(training, facts["unigram_bpb"], folder)
    group.wait()
    return 0


def _facts(corpus: Corpus) -> dict[str, Any]:
    """What config.json says of a corpus of bytes."""
    return {
        "name": corpus.name,
        "documents": list(corpus.documents),
        "train_bytes": len(corpus.train),
        "validation_bytes": len(corpus.validation),
        "fingerprint": corpus.fingerprint,
        "unigram_bpb": corpus.unigram_bpb(),
    }


def _tokenizer(options: Options, corpus: Corpus, new: bool, group: Processes) -> Bytes | BPE:
    """Trained by the first process of a new run, else the one that the run has kept."""
    if options.tokenizer == "bytes":
        return Bytes()
    if not new:
        return BPE.read(Path(str(options.out)))
    with telling("training the tokenizer", shown=group.is_first):
        return BPE(group.of_first(lambda: train_bpe(corpus, options.vocabulary)))


def _compile(training: Training, new_folder: Path | None) -> None:
    """Compile; a `new_folder` is removed again where that is interrupted or fails."""
    first = training.group.is_first
    try:
        with telling("compiling", shown=first):
            seconds = training.compile()
    except torch.OutOfMemoryError:
        raise  # the folder will say so
    except BaseException:
        if new_folder is not None:
            new_folder.rmdir()  # nothing is in it yet
            print(f"nothing was trained: {new_folder} is gone again", file=sys.stderr)
        raise
    if first:
        print(f"compiled in {seconds:.0f} s", flush=True)


def _config(
    options: Options,
    shapes: LlamaConfig,
    poetx_settings: poetx.POETXConfig,
    method: Method,
    facts: dict[str, Any],
    corpus: Corpus,
    group: Processes,
) -> dict[str, Any]:
    """The values of config.json."""
    return {
        "label": method.label,
        "options": options.to_dict(),
        "model": dataclasses.asdict(shapes),
        "poetx": poetx_settings.to_dict() if options.method == "poetx" else None,
        "corpus": {**facts, "train_tokens": len(corpus.train)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "processes": group.count,
    }


def _sample(training: Training, tokenizer: Bytes | BPE, folder: Path) -> None:
    """Let the model go on with the beginning of the validation split; sample.txt, and shown."""
    options, prompt = training.options, training.corpus.validation[: sample.PROMPT]
    tokens = sample.continued(
        training.method.model,
        prompt,
        options.sample_tokens,
        length=options.seq_len,
        seed=options.seed,
        device=training.device,
        autocast=training.autocast,
    )
    if training.group.is_first:
        text = sample.shown(tokenizer, tokens, len(prompt))
        write_text(folder / "sample.txt", text)
        print(f"it goes on with a text (the prompt ends at ⟫):\n{text}")


def export(state: dict[str, Any], shapes: LlamaConfig, folder: Path) -> None:
    """Write the plain weights of a trained model's `state` as transformers has them.

    `AutoModelForCausalLM.from_pretrained` reads the folder, and so does `llama.load`.
    """
    plain = poetx.plain_state_dict(state, device="cpu")
    plain = {hugging_face_name(n): tensor.contiguous() for n, tensor in plain.items()}
    dtype = plain["lm_head.weight"].dtype
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", to_hugging_face(shapes, dtype))
    write_atomically(
        folder / "model.safetensors",
        lambda temporary: save_file(plain, temporary, {"format": "pt"}),
    )


def _spectrum(model: Llama) -> list[float]:
    linear = model.get_submodule(WATCHED)
    assert isinstance(linear, torch.nn.Linear)
    return spectrum(effective_weight(linear)).tolist()


def _options_and_checkpoint(given: dict[str, Any]) -> tuple[Options, dict[str, Any] | None]:
    """The options of the run, and where it goes on, its checkpoint; nothing is written yet."""
    out = Path(given["out"]) if "out" in given else None
    if not given.get("resume"):
        options = Options(**given)
        if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} exists already: --resume goes on with it, or name another --out")
        return options, None
    if out is None:
        raise RunError("--resume needs --out, the folder of the run")
    saved = read_json(out / "config.json")
    if not isinstance(saved, dict) or not isinstance(saved.get("options"), dict):
        raise RunError(f"{out} is no run folder of this script")
    options = resumed(saved["options"], given)
    checkpoint = load_checkpoint(out)
    if checkpoint["step"] >= options.steps:
        raise RunError(
            f"the run in {out} is finished at step {checkpoint['step']}: "
            "give a larger --steps to train on"
        )
    return options, checkpoint


def _new_folder(options: Options) -> Path:
    """The folder of a new run, created."""
    if options.out is not None:
        folder = Path(options.out)
    else:
        folder = _unused(f"{options.preset}-{options.method}")
    try:
        folder.mkdir(parents=True, exist_ok=options.out is not None)
    except OSError as error:
        raise RunError(f"cannot create {folder}: {error.strerror}") from error
    return folder


def _unused(name: str) -> Path:
    """A folder below runs/ that does not exist, named by the time and `name`."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder, count = Path("runs") / stem, 1
    while folder.exists():
        folder, count = Path("runs") / f"{stem}-{count}", count + 1
    return folder


def _save(folder: Path, training: Training) -> None:
    state = {**training.state(), "random": random_state()}
    if training.group.is_first:
        save_checkpoint(folder, state)
    training.group.wait()


def _announce(
    options: Options,
    facts: dict[str, Any],
    corpus: Corpus,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    autocast: bool,
    folder: Path,
    group: Processes,
) -> None:
    parameters = sum(p.numel() for p in method.model.parameters())
    precision = str(dtype).removeprefix("torch.") + (" with bfloat16 autocast" if autocast else "")
    print(f"run folder: {folder}")
    print(
        f"corpus: {corpus.name}, {facts['train_bytes']:,} bytes in {corpus.documents[0]} documents "
        f"to train, {facts['validation_bytes']:,} in {corpus.documents[1]} to validate"
    )
    if corpus.bytes_of is not None:
        each = facts["train_bytes"] / len(corpus.train)
        print(
            f"tokenizer: {options.tokenizer}, {len(corpus.bytes_of):,} tokens of {each:.2f} bytes: "
            f"{len(corpus.train):,} to train"
        )
    where = f"{device}" + (f" in {group.count} processes" if group.several else "")
    print(f"model: {options.preset}, {parameters:,} parameters, {precision}, on {where}")
    if method.summary:
        print(f"{method.label}: {method.summary}")
    sys.stdout.flush()


def _announce_memory(device: torch.device, limit: float | None) -> None:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / memory.GIB
        now = torch.cuda.memory_allocated(device) / memory.GIB
        most = "" if limit is None else f", of the {limit:.1f} GiB that the run may use"
        print(f"memory: built with a peak of {peak:.2f} GiB, {now:.2f} GiB now{most}", flush=True)


def _conclude(training: Training, unigram_bpb: float, folder: Path) -> None:
    """The summary; the last line is made for scripts."""
    bpb = training.val_loss / math.log(2)
    share = 100 * (1 - bpb / unigram_bpb)
    print(f"plots, checkpoint and export are in {folder}")
    print(
        f"a byte costs {bpb:.3f} bits; byte frequencies alone (unigram) need {unigram_bpb:.3f}: "
        + (f"{share:.0f} % below" if share > 0 else "NOT below: train longer")
    )
    print(
        f"final step={training.step} val_loss={training.val_loss:.4f} val_bpb={bpb:.4f} "
        f"unigram_bpb={unigram_bpb:.4f} tokens_per_s={training.tokens_per_s:.0f} "
        f"trainable={training.method.trainable:.1f}%",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
