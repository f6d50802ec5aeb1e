"""Kernels of the step that are compiled in the background: those that it then launches."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.ops import kernels
from tests.helpers.kernel_cases import needs_triton
from tests.helpers.rotations import skews

pytestmark = needs_triton

_devices = itertools.count(1000)  # Triton keeps what it has compiled by device: each test has one


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> int:
    """A device for Triton that is not there, and computes zeros; the tensors are on the CPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    number = next(_devices)
    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
    )
    active = SimpleNamespace(
        get_current_device=lambda: number,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, _: launcher(source.fn),
        utils=utils,
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    # Trials of the optimiser want more than zeros.
    probe = poetx.optim.schedule.probe

    def elsewhere(*args: Any) -> Any:
        monkeypatch.setattr(kernels, "_DEVICE_TYPE", "cuda")
        probed = probe(*args)
        monkeypatch.setattr(kernels, "_DEVICE_TYPE", "cpu")
        return probed

    monkeypatch.setattr(poetx.optim.schedule, "probe", elsewhere)
    return number


def launcher(kernel: Any) -> Callable[..., None]:
    def run(*args: Any) -> None:
        for name, value in zip(kernel.arg_names[::-1], args[::-1], strict=False):
            if name in ("direction", "norms") or name.endswith("out"):
                value.zero_()

    return run


@pytest.fixture
def compiled(hopper: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What Triton compiles, by name, and whether early; it does not take the time to do so."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, bool]] = []

    def compile_nothing(kernel: Any, key: str, *args: Any) -> Any:
        found.append((kernel.__name__, args[-1]))
        made = SimpleNamespace(src=SimpleNamespace(fn=kernel), metadata=None, function=None)
        made.run, made.launch_metadata, made.packed_metadata = launcher(kernel), launcher(kernel), 0
        kernel.device_caches[hopper][0][key] = made
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    return found


def linears(b: int) -> nn.Module:
    sizes = itertools.pairwise([2 * b, 2 * b, b, 2 * b])
    return nn.Sequential(*[nn.Linear(*of, bias=False) for of in sizes]).bfloat16()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    rotations = skews(model)
    for _ in range(count):
        for skew in rotations:
            skew.grad = torch.zeros(skew.shape, dtype=skew.grad_dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("b", "momentum", "turn_every", "interval"),
    [
        (64, "float32", 1, 1),
        (256, "bfloat16", 4, 1),
        (512, "int8", 4, 1),
        (512, "float32", 1, 1),
        (64, "int8", 4, 1000),
    ],
)
def test_a_step_finds_all_its_kernels(b, momentum, turn_every, interval, compiled) -> None:
    model = linears(b)
    config = poetx.POETXConfig(block_size=b, merge_interval=interval)
    poetx.prepare(model, config)
    for skew in skews(model) if momentum == "bfloat16" else ():
        skew.grad_dtype = torch.bfloat16
    optimizer = poetx.POETXMuon(model, momentum_dtype=momentum, turn_every=turn_every)
    steps(model, optimizer, turn_every)
    assert {"momentum_kernel"} < {name for name, _ in compiled}
    assert [name for name, early in compiled if not early] == []


@pytest.mark.parametrize("kind", ["adamw", "attached"])
def test_the_steps_of_other_optimisers_turn_weights_as_well(kind, compiled) -> None:
    model = linears(64)
    poetx.prepare(model, poetx.POETXConfig(block_size=64, merge_interval=1))
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = poetx.POETXAdamW(model)
    else:
        optimizer = torch.optim.SGD(poetx.param_groups(model, lr=1e-3))
        poetx.attach(optimizer, model)
    steps(model, optimizer, 1)
    assert compiled
    assert [name for name, early in compiled if not early] == []


def test_a_launch_finds_what_triton_has_compiled(hopper, monkeypatch) -> None:
    from triton.runtime.jit import JITFunction

    model = linears(4)
    optimizer = poetx.POETXMuon(model, config=poetx.POETXConfig(block_size=4))
    for early in optimizer.schedule._early:
        early.wait()
    monkeypatch.setattr(JITFunction, "_do_compile", None)
    steps(model, optimizer, 1)


def test_a_kernel_that_cannot_be_compiled_is_an_error_of_the_step(hopper, monkeypatch, caplog):
    from triton.runtime.jit import JITFunction

    def fail(kernel: Any, *_: Any) -> Any:
        raise RuntimeError(f"{kernel.__name__} is none")

    monkeypatch.setattr(JITFunction, "_do_compile", fail)
    model = linears(4)
    with caplog.at_level(logging.DEBUG, "poetx_compile"):
        optimizer = poetx.POETXMuon(model, config=poetx.POETXConfig(block_size=4))
        for early in optimizer.schedule._early:
            early.wait()
    assert "momentum_kernel cannot be compiled early" in caplog.text
    with pytest.raises(RuntimeError, match="momentum_kernel is none"):
        steps(model, optimizer, 1)


def test_a_process_that_ends_compiles_no_more(compiled, monkeypatch) -> None:
    ended = SimpleNamespace(is_alive=lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "main_thread", lambda: ended)
        optimizer = poetx.POETXMuon(linears(4), config=poetx.POETXConfig(block_size=4))
        for early in optimizer.schedule._early:
            early.wait()
    assert optimizer.schedule._early
    assert compiled == []


def test_where_no_kernel_runs_there_is_no_thread() -> None:
    before = threading.active_count()
    config = poetx.POETXConfig(block_size=4, merge_interval=1)
    optimizer = poetx.POETXMuon(linears(4), config=config)
    assert optimizer.schedule._early == []
    assert threading.active_count() == before
