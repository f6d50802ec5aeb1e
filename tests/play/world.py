"""The world of a play: the two copies that live through the actions, and how they are made."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import prepared_linears, stored_weight

RATE, TURN = 3e-3, 2e-2
"""Learning rates of dense parameters and of rotations: a few steps reach the angle guard."""

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "Adamax": {},
    "RAdam": {},
    "RMSprop": {},
    "Adagrad": {},
}
"""Optimisers of torch, and their arguments."""

OPTIMIZERS = (
    "POETXAdamW",
    "POETXMuon",
    *(f"attach {name}" for name in CLASSES),
    *(f"adopt {name}" for name in CLASSES),
)


class Model(nn.Module):
    """Odd sizes, a side of size 1, layers used twice, dense matrices, norms, buffers."""

    def __init__(self, tied: bool = False, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(7)
        self.q = nn.Linear(7, 9)
        self.k = nn.Linear(7, 9, bias=False)
        self.scale = nn.Linear(7, 1)
        self.o = nn.Linear(9, 7)
        self.lm_head = nn.Linear(7, 11, bias=False)
        self.register_buffer("shift", torch.linspace(-0.3, 0.3, 7))
        self.register_buffer("count", torch.tensor(3))
        if tied:
            self.lm_head.weight = self.embedding.weight

    def block(self, x: Tensor) -> Tensor:
        h = self.norm(x) + self.shift
        return x + self.o(torch.tanh(self.q(h)) * self.k(h)) * torch.sigmoid(self.scale(h))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.lm_head(x + self.o(torch.tanh(self.q(x))))


PRODUCTS = 5
"""Products in a row from the tokens to the logits; each of them rounds."""

SHARED = [("q.out", "k.out", "o.in")]


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a play begins: everything that is chosen before the first action."""

    config: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "POETXAdamW"
    dtype: str = "float64"
    adopted: bool = False
    tied: bool = False
    checkpointed: bool = False
    shared: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> Setup:
        max_angle = rng.choice([None, 0.25, 0.25, 0.1])
        config = {
            "block_size": rng.choice([3, 4, 8, (4, 3)]),
            "merge_interval": rng.choice([1, 2, 3] if max_angle is None else [1, 3, 5, 100]),
            "max_angle": max_angle,
            "merge_rotation": rng.choice(["polar", "polar", "plain"]),
            "redraw_interval": rng.choice([1, 2, 4, 4, None]),
            "moments": rng.choice(["transport", "transport", "keep", "reset"]),
            "permutation": rng.choice(["random", "chunked", "chunked"]),
            "cayley": rng.choice(["neumann", "neumann", "exact"]),
            "neumann_order": rng.choice([3, 3, 2, 1, 4]),
            "keep_in_eval": rng.random() < 0.8,
            "seed": rng.randrange(5),
            "gains": rng.choice(["none", "none", "rows", "both"]),
        }
        if config["merge_interval"] == 1:
            config["neumann_order"] = max(2, config["neumann_order"])
        adopted = rng.random() < 0.15
        names = [name for name in OPTIMIZERS if name != "adopt Adagrad"]
        names = [name for name in names if name.startswith("adopt")] if adopted else names
        return cls(
            config=config,
            options=draw_options(rng, config),
            optimizer=rng.choice(names),
            dtype=rng.choice(["float64", "float64", "float32"]),
            adopted=adopted,
            tied=rng.random() < 0.3,
            checkpointed=rng.random() < 0.15,
            shared=not adopted and rng.random() < 0.3,
        )


def draw_options(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Options of the backend for a model of that configuration."""
    variant = rng.choice(["fast", "fast", "mem"])
    guarded = config["max_angle"] is not None or config["cayley"] == "exact"
    return {
        "stage": "aot_eager" if rng.random() < 0.15 else "eager",
        "variant": variant,
        "formulation": rng.choice(["auto", "input_centric"] + ["folded"] * guarded),
        "keep_folded": rng.choice(["call", "step"] if variant == "fast" else ["call"]),
    }


@dataclasses.dataclass
class Copy:
    """One of the two copies that live: a model, what runs it, and its optimiser."""

    name: str
    model: nn.Module
    run: Any
    optimizer: Any = None
    scheduler: Any = None

    def layers(self) -> Iterator[tuple[str, nn.Linear, OrthogonalEquivalence]]:
        return prepared_linears(self.model)

    def draws(self) -> dict[str, int]:
        return {name: e.draw for name, _, e in self.layers()}


class World:
    """What an action acts upon.

    Attributes:
        compiled, eager: the two copies.
        kind: of the optimiser, one of `OPTIMIZERS`, or ``"dense"``.
        flags: `requires_grad` by name when the optimiser was built.
        edits: what was done to the groups of the optimiser since.
        made_scheduler: builds the scheduler of an optimiser, or ``None``.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.config = poetx.POETXConfig(**setup.config)
        self.options = dict(setup.options)
        self.kind = setup.optimizer
        self.flags: dict[str, bool] = {}
        self.edits: list[Any] = []
        self.made_scheduler: Any = None
        self._clock = 0
        dtype = getattr(torch, setup.dtype)
        eager, other = (self.plain().to(dtype) for _ in range(2))
        other.load_state_dict(eager.state_dict())
        self.eager = Copy("eager", eager, eager)
        self.compiled = Copy("compiled", other, other)
        self.prepare(self.eager)
        if setup.adopted:
            (name, arguments) = self._class()
            self.compiled.optimizer = name(other.parameters(), lr=RATE, **arguments)
            self.eager.optimizer = name(eager.parameters(), lr=RATE, **arguments)
            _as_adopted(eager)
            poetx.adopt(self.eager.optimizer, eager)
            self.note_flags()
        else:
            self.prepare(self.compiled)
            self.new_optimizers(self.kind)
        self.compile()

    @property
    def copies(self) -> tuple[Copy, Copy]:
        """Eager first: it is what the compiled one is compared with."""
        return self.eager, self.compiled

    @property
    def prepared(self) -> bool:
        """Whether both copies are prepared models."""
        return all(any(True for _ in copy.layers()) for copy in self.copies)

    @property
    def unsettled(self) -> bool:
        """Whether the compiled copy is still to be adopted."""
        return self.kind != "dense" and not self.prepared

    @property
    def dtype(self) -> torch.dtype:
        return self.eager.model.embedding.weight.dtype

    def plain(self) -> Model:
        return Model(self.setup.tied, self.setup.checkpointed)

    def prepare(self, copy: Copy) -> None:
        poetx.prepare(copy.model, self.config, shared=SHARED if self.setup.shared else ())

    def compile(self) -> None:
        options = {"stage": "eager"} | self.options
        if self.setup.adopted:  # `prepare_again` may have chosen other blocks
            options = self.setup.config | {"block_size": self.config.block_size} | options
        self.compiled_for = self.config.block_size
        model = self.compiled.model
        self.compiled.run = torch.compile(model, backend="poetx", options=options)
        self.eager.run = self.eager.model

    def tick(self) -> int:
        """The next number of a counter: seeds of what is random in an action."""
        self._clock += 1
        return self._clock

    def batch(self, rows: int = 3) -> Tensor:
        """The next tokens, int64 [rows, 5]."""
        generator = torch.Generator().manual_seed(self.tick())
        return torch.randint(0, 11, (rows, 5), generator=generator)

    # --- optimisers -------------------------------------------------------------------------------

    def _class(self) -> tuple[Any, dict[str, Any]]:
        name = self.kind.partition(" ")[2]
        return getattr(torch.optim, name), CLASSES[name]

    def _build(self, model: nn.Module) -> Any:
        """An optimiser of the kind in force, as a user would build it."""
        if self.kind == "dense":
            return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
        if self.kind.startswith("POETX"):
            return getattr(poetx, self.kind)(model, lr=RATE, poetx_lr=TURN, weight_decay=0.1)
        cls, arguments = self._class()
        if self.kind.startswith("attach"):
            groups = poetx.param_groups(model, lr=RATE, poetx_lr=TURN)
            optimizer = cls(groups, lr=RATE, **arguments)
            poetx.attach(optimizer, model)
        else:
            optimizer = cls(model.parameters(), lr=RATE, **arguments)
            poetx.adopt(optimizer, model, poetx_lr=TURN)
        return optimizer

    def note_flags(self) -> None:
        self.flags = {n: p.requires_grad for n, p in self.eager.model.named_parameters()}

    def new_optimizers(self, kind: str) -> None:
        """Give both copies a new optimiser, for what trains now."""
        self.kind, self.edits, self.made_scheduler = kind, [], None
        for copy in self.copies:
            copy.optimizer, copy.scheduler = self._build(copy.model), None
        self.note_flags()

    def like_before(self, copy: Copy, model: nn.Module, run: Any) -> Copy:
        """A copy with another model and an optimiser that is built as that of `copy` was."""
        now = {n: p.requires_grad for n, p in copy.model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.flags[name])
        optimizer = self._build(model)
        new = Copy(copy.name, model, run, optimizer)
        for edit in self.edits:
            edit(new)
        if copy.scheduler is not None:
            new.scheduler = self.made_scheduler(optimizer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(now[name])
        return new


@torch.no_grad()
def _as_adopted(model: nn.Module) -> None:
    """Begin under identity permutations, as the states do that the compiler makes."""
    weights = {linear: linear.weight.clone() for _, linear, _ in prepared_linears(model)}
    for _, linear, e in prepared_linears(model):
        for permutation in (e.perm_in, e.perm_out):
            permutation.redraw(permutation.seed, 0)
        stored_weight(linear).copy_(weights[linear])
        e.write_layout()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy, at least in fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
