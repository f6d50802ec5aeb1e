"""Attributes of a module that change while a model trains, kept out of the module's own dict.

Dynamo guards every module that compiled code reads: some 80 guards a prepared linear. It skips the
guards below a module while no dict in there has changed (dict tags), and gives that up for good at
the first change. So what steps and merges note about a layer is not in the layer's dict.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_NAME = "_aside"


class Aside:
    """An attribute of a module, in a dict of its own that no compiled code reads."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return vars(module)[_NAME][self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module).setdefault(_NAME, {})[self._name] = value


def set_aside(module: nn.Module) -> None:
    """Move the attributes that a module was pickled with before they were kept apart."""
    for owner in type(module).__mro__:
        for name, attribute in vars(owner).items():
            if isinstance(attribute, Aside) and name in vars(module):
                setattr(module, name, vars(module).pop(name))
