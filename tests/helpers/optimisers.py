"""Small optimisers in the forms that third-party packages have, and all of torch's, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Build = Callable[[Any], Optimizer]


def with_gradients(optimizer: Optimizer) -> Iterable[tuple[dict[str, Any], Tensor, Tensor]]:
    """(group, parameter, gradient) of every parameter that has one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield group, p, p.grad


class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al., 2023)."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            p.add_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
            state["exp_avg"].lerp_(grad, 1 - beta2)


class Lamb(Optimizer):
    """Adam with a trust ratio: its step depends on the size of a parameter (You et al., 2020)."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            state = self.state[p]
            if not state:
                state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state["step"] += 1
            state["m"].lerp_(grad, 0.1)
            state["v"].lerp_(grad.square(), 0.01)
            update = state["m"] / (state["v"].sqrt() + 1e-6)
            state["weight_norm"] = p.norm()
            ratio = 1.0 if state["weight_norm"] == 0 else state["weight_norm"] / update.norm()
            p.sub_(group["lr"] * ratio * update)


class ScheduleFreeSGD(Optimizer):
    """Schedule-free averaging (Defazio et al., 2024): z is stepped, x is the average of z, and the
    parameters are y = (1 − β) z + β x in training, x in evaluation."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def train(self) -> None:
        self._move(True, lambda y_or_x, z, beta: y_or_x.lerp_(z, 1 - beta))

    @torch.no_grad()
    def eval(self) -> None:
        self._move(False, lambda y_or_x, z, beta: y_or_x.lerp_(z, 1 - 1 / beta))

    def _move(self, train: bool, move: Callable[..., Any]) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        move(p, self.state[p]["z"], group["beta"])
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call .train() before the first step")
            group["k"] += 1
        for group, y, grad in with_gradients(self):
            z = self.state[y].setdefault("z", y.clone())
            c = 1 / group["k"]
            y.lerp_(z, c)
            y.add_(grad, alpha=group["lr"] * (group["beta"] * (1 - c) - 1))
            z.sub_(grad, alpha=group["lr"])


class Lookahead(Optimizer):
    """Every k steps of another optimiser, halfway back to where it was (Zhang et al., 2019)."""

    def __init__(self, base: Optimizer, k: int = 10):
        super().__init__(base.param_groups, {})
        self.base, self.k, self.steps = base, k, 0
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.steps += 1
        if self.steps % self.k == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow", p.clone())
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class SAM(Optimizer):
    """Sharpness-aware minimisation (Foret et al., 2021): a step with the gradient at the worst
    point nearby; within one step it goes there and comes back."""

    def __init__(self, params: Any, base: Build, rho: float = 0.05):
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "SAM needs a closure"
        again = torch.enable_grad()(closure)
        norm = torch.stack([grad.norm() for _, _, grad in with_gradients(self)]).norm()
        for group, p, grad in with_gradients(self):
            self.state[p]["old"] = p.clone()
            p.add_(grad, alpha=float(group["rho"] / (norm + 1e-12)))
        again()
        for _, p, _ in with_gradients(self):
            p.copy_(self.state[p]["old"])
        self.base.step()


class MADGRAD(Optimizer):
    """Dual averaging: every step begins at the starting point x0 (Defazio and Jelassi, 2021)."""

    def __init__(self, params: Any, lr: float = 1e-2):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
        for group, p, grad in with_gradients(self):
            state = self.state[p]
            if not state:
                state |= {"sum": torch.zeros_like(p), "squares": torch.zeros_like(p)}
                state["x0"] = p.clone()
            rate = group["lr"] * group["k"] ** 0.5
            state["sum"].add_(grad, alpha=rate)
            state["squares"].addcmul_(grad, grad, value=rate)
            p.copy_(state["x0"] - state["sum"] / (state["squares"] ** (1 / 3) + 1e-6))


class Prodigy(Optimizer):
    """The distance to the starting point sets the rate (Mishchenko and Defazio, 2023)."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, {"lr": lr, "d": 1e-6})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            start = self.state[p].setdefault("p0", p.clone())
            group["d"] = max(group["d"], float((grad * (start - p)).sum()))
        for group, p, grad in with_gradients(self):
            p.sub_(grad.sign(), alpha=group["d"] * group["lr"])


class MasterWeights(Optimizer):
    """SGD on copies of the parameters, which are then written into them."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.masters = [[p.detach().double() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            for p, master in zip(group["params"], masters, strict=True):
                if p.grad is not None:
                    p.copy_(master.sub_(p.grad, alpha=group["lr"]))


class AveragesBesides(torch.optim.SGD):
    """SGD with an average of the parameters that training never reads."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for _, p, _ in with_gradients(self):
            self.state[p].setdefault("average", p.clone()).lerp_(p, 0.01)


class CountsInGroup(Optimizer):
    """Adam with a step counter for a whole group, as fused third-party kernels have it."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
        for group, p, grad in with_gradients(self):
            m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(grad, 0.1)
            v = self.state[p].setdefault("v", torch.zeros_like(p)).lerp_(grad.square(), 0.01)
            m, v = m / (1 - 0.9 ** group["step"]), v / (1 - 0.99 ** group["step"])
            p.sub_(m / (v.sqrt() + 1e-8), alpha=group["lr"])


class EarlyState(Optimizer):
    """RMSprop whose state is made with the optimiser, and starts at something else than zero."""

    def __init__(self, params: Any, lr: float = 1e-2, start: float = 0.5):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["square"] = torch.full_like(p, start)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            square = self.state[p]["square"].lerp_(grad.square(), 0.01)
            p.sub_(grad / square.sqrt(), alpha=group["lr"])


class Counting(torch.optim.SGD):
    """SGD whose state of a parameter is a number of Python's: the rate falls with it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
            p.sub_(grad, alpha=group["lr"] / count)


ACCEPTED: dict[str, Build] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.3),
    "Lion": Lion,
    "LAMB": Lamb,
    "SAM": lambda p: SAM(p, lambda q: torch.optim.SGD(q, lr=0.02)),
    "counting": lambda p: Counting(p, lr=0.05),
    "counter of a group": CountsInGroup,
    "early state": EarlyState,
}
"""What trains rotations."""

REFUSED: dict[str, tuple[str, Build]] = {
    "ASGD": (r"state\.0\.ax", lambda p: torch.optim.ASGD(p)),
    "L-BFGS": ("history is of one vector", lambda p: torch.optim.LBFGS(p)),
    "Muon": ("POETXMuon", lambda p: torch.optim.Muon([x for x in p if x.ndim == 2])),
    "SparseAdam": ("dense gradients", lambda p: torch.optim.SparseAdam(p)),
    "schedule-free": (r"state\.0\.z", ScheduleFreeSGD),
    "Lookahead": (r"state\.\d\.slow", lambda p: Lookahead(torch.optim.Adam(p, lr=1e-3))),
    "MADGRAD": (r"state\.\d\.x0", MADGRAD),
    "Prodigy": (r"state\.\d\.p0", Prodigy),
    "master weights": ("step fails on small parameters", MasterWeights),
    "averages": (r"state\.0\.average", lambda p: AveragesBesides(p, lr=0.05)),
}
"""What does not, and a part of the reason."""


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
