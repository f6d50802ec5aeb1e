"""Sequences: drawn from a seed, played, written down, read again, and shrunk."""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch._dynamo import config as dynamo_config

from tests.play.actions import ACTIONS
from tests.play.invariants import check, watched_merges
from tests.play.world import Setup, World


@dataclasses.dataclass(frozen=True)
class Call:
    """An action with its arguments; prints as it is called."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    @classmethod
    def parse(cls, text: str) -> Call:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call), text
        assert isinstance(call.func, ast.Name), text
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        return cls(call.func.id, arguments)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A setup and the actions that follow."""

    setup: Setup
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, *calls: str, **setup: Any) -> Sequence:
        """As it is written down: `Setup`'s fields, and the calls as text."""
        return cls(Setup(**setup), tuple(Call.parse(call) for call in calls))

    @classmethod
    def drawn(cls, seed: int, length: int) -> Sequence:
        rng = random.Random(seed)
        setup = Setup.draw(rng)
        calls: list[Call] = []
        without = "dense"  # what is not done to a prepared model, or to one that is not
        for _ in range(length):
            names = [name for name, action in ACTIONS.items() if action.needs != without]
            if setup.adopted and len(calls) == 1:
                names = ["train"]  # few actions make sense before
            (name,) = rng.choices(names, [ACTIONS[name].weight for name in names])
            calls.append(Call(name, ACTIONS[name].draw(rng)))
            without = {"unload": "prepared", "prepare_again": "dense"}.get(name, without)
        return cls(setup, tuple(calls))

    def __str__(self) -> str:
        lines = [repr(str(call)) for call in self.calls]
        for field in dataclasses.fields(Setup):
            value = getattr(self.setup, field.name)
            if field.name == "config" or value != _default(field):
                lines.append(f"{field.name}={value!r}")
        return "Sequence.of(\n" + "".join(f"    {line},\n" for line in lines) + ")"

    @classmethod
    def parse(cls, text: str) -> Sequence:
        call = ast.parse(text.strip(), mode="eval").body
        assert isinstance(call, ast.Call), text
        setup = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        return cls.of(*map(ast.literal_eval, call.args), **setup)


def _default(field: dataclasses.Field) -> Any:
    return {} if field.default_factory is not dataclasses.MISSING else field.default


def play(sequence: Sequence) -> int:
    """Play it, and check after each action; the number of actions that made sense.

    Raises:
        Broken, or whatever an action raised that should not: with the sequence as a note.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    done = 0
    here = "the beginning"
    limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    try:
        with dynamo_config.patch(limits), watched_merges():
            world = World(sequence.setup)
            check(world)
            for i, call in enumerate(sequence.calls):
                action = ACTIONS[call.name]
                if action.makes_sense(world):
                    here = f"action {i}, {call}"
                    action.function(world, **call.arguments)
                    check(world)
                    done += 1
    except Exception as error:
        error.add_note(f"in {here} of\n{sequence}")
        raise
    return done


def failure(sequence: Sequence) -> Exception | None:
    """What it fails with, or ``None``."""
    try:
        play(sequence)
    except Exception as error:
        return error
    return None


def shrunk(sequence: Sequence) -> Sequence:
    """A sequence that fails in the same way without some of the actions."""
    first = failure(sequence)
    assert first is not None
    kind = _kind(first)
    calls = list(sequence.calls)
    i = len(calls)
    while i > 0:
        i = min(i, len(calls)) - 1
        shorter = dataclasses.replace(sequence, calls=tuple(calls[:i] + calls[i + 1 :]))
        error = failure(shorter)
        if error is not None and _kind(error) == kind:
            del calls[i]
    return dataclasses.replace(sequence, calls=tuple(calls))


def _kind(error: Exception) -> tuple[type, str]:
    """Two failures are alike: the class, and the message without what varies."""
    words: Iterable[str] = str(error).split()[:4]
    return type(error), " ".join(w for w in words if not any(c.isdigit() for c in w))
