"""The Trainer of Hugging Face transformers, with `for_trainer` and by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, UnownedRotationsError
from poetx_compile.integrations.huggingface import for_trainer
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers import huggingface
from tests.helpers.rotations import skews
from tests.helpers.tolerances import assert_close, relative_error, tolerance
from tests.helpers.trainer import CONFIG, arguments, logged, padded, samples, trainer

_EVALUATION = 1 if torch.__version__ >= "2.13" else 3
"""Graphs of an evaluation: with checkpointing transformers hooks a `requires_grad_` behind the
embedding, where older Dynamo breaks one that runs without gradients."""


class NormsAfterClipping(TrainerCallback):
    """Norms of the gradients that the optimiser is given: of all of them, of the rotations."""

    def __init__(self):
        self.seen: list[tuple[float, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        everything = [p.grad for p in model.parameters() if p.grad is not None]
        rotations = [p.grad for p in skews(model)]
        norm = torch.nn.utils.get_total_norm
        self.seen.append((norm(everything).item(), norm(rotations).item()))


def full_run(folder: Path, compile: bool) -> tuple[Trainer, NormsAfterClipping]:
    """Accumulation 4, bf16, checkpointing, cosine with warm-up, clipping, evaluation mid-run."""
    torch.manual_seed(0)
    model = huggingface.llama(tie_word_embeddings=True)
    args = arguments(
        folder,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_grad_norm=0.05,
        eval_strategy="steps",
        eval_steps=2,
        torch_compile_backend="poetx",
    )
    norms = NormsAfterClipping()
    # AOTAutograd: `test_gradient_checkpointing` of the architectures, and bf16 by accelerate.
    how = {"compile": compile, "dynamic": True, "options": {"stage": "eager"}, "poetx_lr": 1e-2}
    done = trainer(model, args, callbacks=[norms], **how)
    done.train()
    return done, norms


def test_accumulation_bf16_checkpointing_cosine_clipping_and_evaluation(tmp_path, graphs):
    done, norms = full_run(tmp_path, compile=True)
    assert graphs() == 1 + _EVALUATION, "training, and evaluation, whatever the sizes"
    eager, _ = full_run(tmp_path, compile=False)
    for key in ("loss", "eval_loss"):
        mine, theirs = (torch.tensor(logged(run, key)) for run in (done, eager))
        assert len(mine) == (6 if key == "loss" else 3)
        assert relative_error(mine, theirs) < tolerance(torch.bfloat16)
    assert logged(done, "loss")[-1] < logged(done, "loss")[0]

    # Learning rates of every group as the schedule says, in the step they were used.
    cosine = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    for key, peak in (
        ("learning_rate", 2e-2),
        ("learning_rate/dense", 2e-2),
        ("learning_rate/dense no decay", 2e-2),
        ("learning_rate/poetx b=8", 1e-2),
    ):
        assert logged(done, key) == pytest.approx([peak * part for part in cosine], abs=1e-9)
    assert logged(done, "poetx_last_merge") == [0, 0, 3, 3, 3, 6]
    assert max(logged(done, "poetx_angle")) > 0

    # Clipping is over all parameters, and the rotations are among them.
    assert min(logged(done, "grad_norm")) > 0.05
    assert [norm for norm, _ in norms.seen] == pytest.approx([0.05] * 6, rel=1e-3)
    assert min(skew for _, skew in norms.seen) > 0


def test_a_resumed_run_equals_the_uninterrupted_one_and_exports_plain_weights(tmp_path):
    def run(folder: Path, seed: int, resume_from: str | None = None) -> Trainer:
        torch.manual_seed(seed)
        model = huggingface.llama(tie_word_embeddings=True)
        args = arguments(folder, save_strategy="steps", save_steps=4)
        done = trainer(model, args, dynamic=True, options={"stage": "eager"})
        done.train(resume_from_checkpoint=resume_from)
        return done

    whole = run(tmp_path / "whole", 0)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert CONFIG.merge_interval < 4 < 2 * CONFIG.merge_interval, "in the middle of an interval"
    saved = load_file(checkpoint / "model.safetensors")
    for name, _, _ in prepared_linears(whole.model):
        parts = (
            f"{name}.parametrizations.weight.{p}" for p in ("original", "0.skew_in", "0.layout")
        )
        assert set(parts) < set(saved)
    assert "lm_head.weight" not in saved, "tied: saved once"
    resumed = run(tmp_path / "resumed", 1, str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 6
    assert logged(resumed, "loss") == logged(whole, "loss")
    for (name, mine), theirs in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    states = (run.optimizer.state_dict()["state"] for run in (resumed, whole))
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)

    tokens = huggingface.inputs(huggingface.llama)["input_ids"]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = whole.model.eval()(tokens).logits
    copied = copy.deepcopy(whole.model)
    poetx.merge_and_unload(whole.model)
    whole.save_model(tmp_path / "export")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert list(exported.state_dict()) == list(huggingface.llama().state_dict())
    assert_close(exported(tokens).logits, expected)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(copied(tokens).logits, expected)
    poetx.merge_and_unload(copied).save_pretrained(tmp_path / "copy")
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("export", "copy"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("make", [huggingface.mixtral, huggingface.vit], ids=["mixtral", "vit"])
def test_checkpoints_load_whatever_names_transformers_would_save_under(make, tmp_path):
    def setup(seed: int) -> Trainer:
        torch.manual_seed(seed)
        example = {k: v[0] for k, v in huggingface.inputs(make, batch=1).items()}
        how = {"max_steps": 2, "warmup_steps": 0, "save_strategy": "steps", "save_steps": 1}
        args = arguments(tmp_path, **how)
        made = for_trainer(make(), args, CONFIG, compile=False)
        return Trainer(train_dataset=[example] * 12, **made)

    whole = setup(1)
    whole.train()
    resumed = setup(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, mine), theirs in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    poetx.merge_and_unload(whole.model)
    whole.save_model(tmp_path / "export")
    exported = type(whole.model).from_pretrained(tmp_path / "export")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name


def test_an_optimiser_of_your_own(tmp_path):
    model = huggingface.llama()
    poetx.prepare(model, CONFIG)
    groups = poetx.param_groups(model, lr=1e-2)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(UnownedRotationsError, match=r"poetx_compile.attach\(optimizer, model\)"):
        for_trainer(model, args, optimizer=optimizer)
    poetx.attach(optimizer, model)
    with pytest.raises(ConfigError, match="weight_decay: the optimiser is made already"):
        for_trainer(model, args, optimizer=optimizer, weight_decay=0.1)
    made = for_trainer(model, args, optimizer=optimizer, compile=False)
    assert made["optimizers"] == (optimizer, None)
    before = [e.skew_in.clone() for _, _, e in prepared_linears(model)]
    Trainer(train_dataset=samples(24), data_collator=padded, **made).train()
    after = [e.skew_in for _, _, e in prepared_linears(model)]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_arguments_are_those_of_the_trainer(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=3e-3,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.97,
        adam_epsilon=1e-7,
        torch_compile=True,
        torch_compile_mode="max-autotune",
    )
    compiled: dict[str, Any] = {}
    model = huggingface.llama()
    model.compile = lambda **settings: compiled.update(settings)
    made = for_trainer(model, args, CONFIG, optimizer=poetx.POETXAdamW)
    optimizer, _ = made["optimizers"]
    assert type(optimizer) is poetx.POETXAdamW
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.97)
        assert group["eps"] == 1e-7
        assert group["weight_decay"] == (0.2 if group["name"] == "dense" else 0)
        assert group["lr"] == pytest.approx(3e-3 * (64 / 8 if "poetx" in group["name"] else 1))
    assert compiled["backend"] is poetx.poetx_backend
    assert compiled["mode"] == "max-autotune"
    assert args.torch_compile is False
    assert args.torch_compile_backend is args.torch_compile_mode is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_compile_backend": "aot_eager"}, "torch_compile_backend = 'aot_eager'"),
        ({"fsdp": "full_shard"}, "takes no optimiser under FSDP"),
        ({"deepspeed": "zero.json"}, "DeepSpeed flattens"),
        ({"_n_gpu": 2}, "2 GPUs in one process"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_prepared(changes, message, tmp_path):
    args = arguments(tmp_path)
    for name, value in changes.items():
        setattr(args, name, value)
    model = huggingface.llama()
    with pytest.raises(ConfigError, match=message):
        for_trainer(model, args, CONFIG)
    assert not any(True for _ in prepared_linears(model))
