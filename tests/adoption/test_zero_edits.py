"""A script that knows nothing of this package but the backend: what must hold in it.

Graphs run as the passes leave them (stage ``eager``) where it is not their compilation that counts.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.compile import backend
from poetx_compile.errors import AdoptionError
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim.schedule import schedule_of
from poetx_compile.optim.takeover import FOLLOWS
from tests.helpers import frozen
from tests.helpers.models import MLP, TinyLM
from tests.helpers.rotations import skews
from tests.helpers.tolerances import assert_close

OPTIONS = {
    "stage": "eager",
    "block_size": 4,
    "merge_interval": 3,
    "redraw_interval": 3,
    "max_angle": None,
}
CONFIG = poetx.POETXConfig(block_size=4, merge_interval=3, redraw_interval=3, max_angle=None)

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="poetx", options={**OPTIONS, **options})


def loss_of(run: Callable[[Tensor], Tensor]) -> Tensor:
    return F.mse_loss(run(X), TARGET)


def train(run: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(run)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return MLP()


# --- one run ------------------------------------------------------------------------------------


def test_a_training_script_trains_rotations_and_merges_them(caplog: pytest.LogCaptureFixture):
    """Built before compiling: groups, moments, merges, the frozen weights, the biases, one line."""
    caplog.set_level("INFO", "poetx_compile")
    model = mlp()
    weight, bias = model.up.weight, model.up.bias
    before, bias_before = weight.detach().clone(), bias.detach().clone()
    spectrum = torch.linalg.svdvals(before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    run = compiled(model, stage="aot_eager")
    losses = train(run, model, optimizer, 2)
    assert stored_weight(model.up) is weight
    assert torch.equal(weight, before), "frozen between merges"
    losses += train(run, model, optimizer, 6)
    assert losses[-1] < losses[0]
    assert (schedule_of(optimizer).step, schedule_of(optimizer).merges) == (8, 2)
    assert not torch.equal(model.up.weight, before)
    assert_close(torch.linalg.svdvals(model.up.weight), spectrum)
    assert not torch.equal(bias, bias_before), "biases train as before"
    assert set(optimizer.state) == {bias, model.down.bias, *skews(model)}
    user, ours = optimizer.param_groups
    assert (ours["lr"], ours["weight_decay"]) == (16 * user["lr"], 0.0)
    taken_over, *merges = caplog.records
    assert "AdamW trains 2 nn.Linear through rotations" in taken_over.getMessage()
    assert [(r.levelname, r.getMessage()) for r in merges] == [
        ("INFO", f"step {step}: the {what}")
        for step in (3, 6)
        for what in (
            "rotations of 2 nn.Linear are merged, on schedule",
            "permutations are drawn again",
        )
    ]


def test_an_optimiser_built_before_or_after_compiling_gives_one_run():
    """Before compiling, after compiling, after the first forward, after the first backward."""
    runs = []
    for when in range(4):
        model = mlp()

        def build(model=model):
            return torch.optim.AdamW(model.parameters(), lr=1e-3)

        optimizer = build() if when == 0 else None
        run = compiled(model)
        optimizer = build() if when == 1 else optimizer
        losses = []
        for _ in range(5):
            loss = loss_of(run)
            optimizer = build() if optimizer is None and when == 2 else optimizer
            loss.backward()
            optimizer = optimizer or build()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        groups = [(len(g["params"]), g["lr"]) for g in optimizer.param_groups]
        runs.append((losses, groups, [p.detach().clone() for p in model.parameters()]))
    for losses, groups, parameters in runs[1:]:
        assert losses == runs[0][0]
        assert groups == runs[0][1]
        assert all(map(torch.equal, parameters, runs[0][2]))


def test_from_the_first_backward_on_the_model_shows_its_rotations():
    """`parameters()`, `state_dict()`, `.grad`, and the norm that clipping sees."""
    model = mlp()
    run = compiled(model)
    loss_of(run).backward()
    names = dict(model.named_parameters())
    assert "up.parametrizations.weight.0.skew_in" in names
    assert "up.parametrizations.weight.0.skew_out" in model.state_dict()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 2 + 4, "biases and skews"
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = torch.stack([(g**2).sum() for g in gradients]).sum().sqrt()
    assert norm > 1e-3
    assert expected.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_first_pass_is_compiled_cheaply_and_the_second_in_full(monkeypatch):
    """Inductor, which costs most of the time, works on the prepared form alone."""
    stages = []
    compile_ = backend._compile

    def spy(graph, inputs, options, config):
        stages.append(options.stage)
        return compile_(
            graph, inputs, backend.dataclasses.replace(options, stage="aot_eager"), config
        )

    monkeypatch.setattr(backend, "_compile", spy)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = compiled(model, stage="inductor")
    with torch.no_grad():
        run(X)
    assert stages == ["inductor"], "nothing to adopt: compiled as it is"
    train(run, model, optimizer, 4)
    assert stages == ["inductor", "aot_eager", "inductor"]
    with torch.no_grad():
        run(X)
    assert stages == ["inductor", "aot_eager", "inductor", "inductor"]


def test_evaluation_before_training_creates_nothing():
    model = mlp()
    run = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(X), model(X))
    with torch.inference_mode():
        run(X)
    assert list(model.state_dict()) == list(MLP().state_dict())


def test_calls_without_a_backward_are_told_what_they_cost(monkeypatch, caplog):
    monkeypatch.setattr(backend, "PROVISIONAL", "eager")
    model = mlp()
    run = compiled(model, stage="inductor")
    for _ in range(20):
        run(X)
    (record,) = [r for r in caplog.records if r.name == "poetx_compile"]
    assert "16 times without a backward" in record.getMessage()


# --- ways to step -------------------------------------------------------------------------------


def test_gradient_accumulation_equals_one_batch():
    whole, parts = mlp(), mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (whole, parts)]
    runs = compiled(whole), compiled(parts)
    for _ in range(4):
        loss_of(runs[0]).backward()
        for x, target in zip(X.chunk(4), TARGET.chunk(4), strict=True):
            (F.mse_loss(runs[1](x), target) / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [schedule_of(o).step for o in optimizers] == [4, 4]
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_closure_is_served_from_the_first_step_on():
    runs = []
    for closes in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = compiled(model)

        def closure(run=run, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(run)
            loss.backward()
            return loss

        for _ in range(4):
            if closes:
                loss = optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
        runs.append((loss.item(), schedule_of(optimizer).step, schedule_of(optimizer).merges))
    assert runs[0] == runs[1]
    assert runs[0][1:] == (4, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_scales_the_rotations_too(fused: bool):
    """From the first step on, which is scaled before any optimiser holds a rotation."""
    runs = []
    for scale in (1.0, 1024.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=fused)
        run, scaler = compiled(model), torch.amp.GradScaler("cpu", init_scale=scale)
        for i in range(4):
            loss = loss_of(run) * (float("inf") if i == 2 else 1.0)
            scaler.scale(loss).backward()
            if not fused:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert schedule_of(optimizer).step == 3, "a skipped step does not count"
        runs.append([p.detach() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)


def test_two_losses_whose_backwards_follow_each_other():
    """The rotations move into the model between them, and no saved tensor changes."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = compiled(model, stage="aot_eager")
    first, second = loss_of(run), run(X).pow(3).mean()
    first.backward()
    kept = [p.grad.clone() for p in skews(model)]
    second.backward()
    assert all(not torch.equal(p.grad, g) for p, g in zip(skews(model), kept, strict=True))
    optimizer.step()
    assert len(optimizer.param_groups) == 2


def test_activation_checkpointing_around_compiled_blocks():
    """What the first backward recomputes finds the blocks as they were in the forward."""
    losses = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(MLP(), MLP())
        for block in model:
            block.compile(backend="poetx", options=OPTIONS | {"stage": "aot_eager"})

        def call(x, model=model, checkpointed=checkpointed):
            for block in model:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            return x

        losses.append(train(call, model, torch.optim.SGD(model.parameters(), lr=1e-2), 4))
    assert losses[0] == losses[1]


def test_a_compiled_training_step():
    """Forward, backward and step in one compiled function."""
    losses = []
    for whole in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def step(x, target, model=model, optimizer=optimizer):
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        if whole:
            run = compiled(step)
            losses.append([run(X, TARGET).item() for _ in range(5)])
            assert (schedule_of(optimizer).step, schedule_of(optimizer).merges) == (5, 1)
        else:
            losses.append([])
            call = compiled(model)
            for _ in range(5):
                loss = loss_of(call)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[0].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_autocast_and_a_bf16_model_train_fp32_rotations():
    for model, dtype in ((mlp(), torch.float32), (mlp().bfloat16(), torch.bfloat16)):
        torch._dynamo.reset()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = compiled(model)
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                loss = F.mse_loss(run(X.to(dtype)).float(), TARGET)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert stored_weight(model.up).dtype == dtype
        for skew in skews(model):
            assert skew.dtype == torch.float32
            state = optimizer.state[skew]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


# --- several of everything ----------------------------------------------------------------------


def count_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    rewrite = backend.rewrite
    monkeypatch.setattr(backend, "rewrite", lambda *a, **k: calls.append(1) or rewrite(*a, **k))
    return calls


def test_twelve_identical_blocks_are_compiled_twice(monkeypatch):
    """Once to be adopted, once as they are afterwards; each has rotations of its own."""
    calls = count_graphs(monkeypatch)
    torch.manual_seed(3)
    model = nn.Sequential(*(MLP() for _ in range(12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for block in model:
        block.compile(backend="poetx", fullgraph=True, options=OPTIONS)
    # The input of the first block takes a gradient here, as that of every other one does.
    train(lambda x: model(x.clone().requires_grad_()), model, optimizer, 4)
    assert len(calls) == 2
    assert len({id(p) for p in skews(model)}) == 12 * 4
    assert all(p.grad is None or p.grad.any() for p in skews(model))
    groups = [e.perm_in.group for _, _, e in prepared_linears(model)]
    assert len(set(groups)) == 24, "permutations of their own, numbered through the model"
    assert (schedule_of(optimizer).step, schedule_of(optimizer).merges) == (4, 1)


def test_two_instances_and_two_optimisers(monkeypatch):
    calls = count_graphs(monkeypatch)
    models = [mlp(), mlp()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in models]
    runs = [compiled(m) for m in models]
    for _ in range(4):
        for run, optimizer in zip(runs, optimizers, strict=True):
            loss_of(run).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(calls) == 2
    assert [schedule_of(o).merges for o in optimizers] == [1, 1]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)


def test_several_optimisers_over_parts_of_one_model():
    torch.manual_seed(3)
    model = nn.Sequential(MLP(), MLP())
    body = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
    head = torch.optim.SGD(model[1].parameters(), lr=1e-2)
    run = compiled(model)
    for i in range(6):
        loss_of(run).backward()
        body.step()
        if i % 2:
            head.step()
            head.zero_grad()
        body.zero_grad()
    assert [len(o.param_groups[1]["params"]) for o in (body, head)] == [4, 4]
    assert [schedule_of(o).step for o in (body, head)] == [6, 3]
    assert [e.draw for _, _, e in prepared_linears(model)] == [2, 2, 1, 1]


class Heads(nn.Module):
    """A trunk and two heads, one of them called at a time."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(12, 12)
        self.heads = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.trunk(x)))


def test_a_head_that_is_called_later_joins_the_run():
    torch.manual_seed(3)
    model = Heads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run = compiled(model)
    for i in range(8):
        F.mse_loss(run(X, int(i >= 4 and i % 2)), TARGET).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert {n: e.draw for n, _, e in prepared_linears(model)} == {
        "trunk": 2, "heads.0": 2, "heads.1": 2
    }  # fmt: skip
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 6]
    assert model.heads[0].parametrizations.weight[0].perm_in is (
        model.heads[1].parametrizations.weight[0].perm_in
    )
    fresh = Heads()
    poetx.prepare(fresh, CONFIG)
    fresh.load_state_dict(model.state_dict())
    for head in (0, 1):
        assert torch.equal(fresh(X, head), model(X, head))


# --- resume -------------------------------------------------------------------------------------


def test_a_run_resumes_bit_for_bit_in_a_fresh_process():
    """`prepare`, the script's own optimiser and scheduler, `adopt`, and then what was saved."""

    def build(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, 1e-4)

    def steps(run, model, optimizer, scheduler, which):
        losses = []
        for i in which:
            if i == 5:
                parts = model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
                torch.save(parts, file)
            tokens = torch.randint(0, 24, (2, 7), generator=torch.Generator().manual_seed(i))
            logits = run(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    file = io.BytesIO()
    torch.manual_seed(3)
    model = TinyLM(layers=1)
    optimizer, scheduler = build(model)
    losses = steps(compiled(model, max_angle=0.25), model, optimizer, scheduler, range(9))
    assert schedule_of(optimizer).merges >= 2

    torch._dynamo.reset()
    torch.manual_seed(4)
    resumed = TinyLM(layers=1)
    poetx.prepare(resumed, poetx.POETXConfig(block_size=4, merge_interval=3, redraw_interval=3))
    again, scheduler_again = build(resumed)
    poetx.adopt(again, resumed)
    file.seek(0)
    weights, state, rates = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    scheduler_again.load_state_dict(rates)
    assert (schedule_of(again).step, schedule_of(again).last_merge) == (5, 3)
    run = compiled(resumed, max_angle=0.25)
    assert steps(run, resumed, again, scheduler_again, range(5, 9)) == losses[5:]
    for (name, p), q in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert optimizer.state_dict()["param_groups"] == again.state_dict()["param_groups"]
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, again.state_dict()["state"][index][key]), key


# --- refusals -----------------------------------------------------------------------------------


def raised(call: Callable[[], Any]) -> BaseException:
    """What a call raises, out of Dynamo's wrapping."""
    with pytest.raises(Exception) as error:  # noqa: PT011
        call()
    return getattr(error.value, "inner_exception", error.value)


def test_adoption_can_be_refused():
    model = mlp()
    run = compiled(model, unprepared="refuse")
    with torch.no_grad():
        run(X)
    error = raised(lambda: run(X))
    assert isinstance(error, AdoptionError)
    assert "poetx_compile.prepare(model) first" in str(error)
    poetx.prepare(model, CONFIG)
    train(run, model, poetx.POETXAdamW(model), 1)
    assert "unprepared = 'no'" in str(raised(lambda: compiled(MLP(), unprepared="no")(X)))


def test_muon_over_the_matrices_of_an_unprepared_model_is_refused():
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    _ = torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest)
    error = raised(lambda: loss_of(compiled(model)).backward())
    assert isinstance(error, AdoptionError)
    assert "POETXMuon" in str(error)


def test_an_optimiser_built_later_that_cannot_train_rotations_is_refused_at_its_first_step():
    model = mlp()
    run = compiled(model)
    loss_of(run).backward()
    optimizer = torch.optim.LBFGS(model.parameters())
    error = raised(lambda: optimizer.step(lambda: 0.0))
    assert isinstance(error, AdoptionError)
    assert "history" in str(error)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    import torch.distributed as dist

    where = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["compile DDP", "DDP of compiled", "shard", "compile, shard"])
def test_under_ddp_and_fsdp2_prepare_comes_first(order: str, one_process: None):
    """Compiled inside or outside: the wrapper would not see what the compiler adds."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Sequential(mlp())
    if order == "compile DDP":
        run = compiled(DistributedDataParallel(model))
    elif order == "DDP of compiled":
        run = DistributedDataParallel(compiled(model))
    elif order == "shard":
        run = compiled(fully_shard(model))
    else:
        model[0].compile(backend="poetx", options=OPTIONS)
        run = fully_shard(nn.Sequential(fully_shard(model[0])))
    error = raised(lambda: run(X))
    assert isinstance(error, AdoptionError)
    for part in ("0.up was not prepared", "prepare(model)", "FSDP" if "shard" in order else "Dist"):
        assert part in str(error)


def test_options_that_change_the_weights_need_prepare():
    error = raised(lambda: compiled(mlp(), init="rows")(X))
    assert isinstance(error, AdoptionError)
    assert "prepare(model, config)" in str(error)


def test_a_weight_tied_outside_of_the_graph_is_left_alone():
    """No graph shows it: the embedding is read outside of the compiled part."""

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.body, self.out = nn.Linear(12, 12), nn.Linear(12, 9, bias=False)
            self.out.weight = weight

        def forward(self, x):
            return self.out(torch.tanh(self.body(x)))

    embedding = nn.Embedding(9, 12)
    head = Head(embedding.weight)
    run = compiled(head)
    F.cross_entropy(run(embedding(torch.arange(9))), torch.arange(9)).backward()
    assert equivalence_of(head.body) is not None
    assert equivalence_of(head.out) is None
    assert head.out.weight is embedding.weight
    assert embedding.weight.grad.any()


def test_a_model_that_the_garbage_collector_hides_is_refused():
    model = mlp()
    gc.freeze()
    try:
        error = raised(lambda: compiled(model)(X))
    finally:
        frozen.freeze()
    assert isinstance(error, AdoptionError)
    assert "gc.freeze() hides it: call poetx_compile.prepare(model)" in str(error)


def test_exclusions_by_whole_name_hold_in_reused_code():
    torch.manual_seed(3)
    model = nn.Sequential(MLP(), MLP())
    options = OPTIONS | {"exclude_modules": ["1.down"]}
    for block in model:
        block.compile(backend="poetx", options=options)
    x = X.clone().requires_grad_()  # as every block but the first gets it: one graph for both
    error = raised(lambda: F.mse_loss(model(x), TARGET).backward())
    assert isinstance(error, AdoptionError)
    assert "excluded by name: 1.down" in str(error)
    assert "prepare on every instance" in str(error)


def test_rotations_of_the_scripts_own_groups_follow_them():
    model = mlp()
    groups = [
        {"params": [model.up.weight, model.down.weight], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [model.up.bias, model.down.bias], "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    train(compiled(model), model, optimizer, 1)
    ours = optimizer.param_groups[2]
    assert (ours[FOLLOWS], ours["lr"], ours["weight_decay"]) == (0, 16e-3, 0.0)
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 2, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_on_a_gpu_with_every_kernel_of_the_optimiser(kernel: dict[str, bool]):
    """fp16 autocast and a scaler that starts far too high."""
    model, x, target = mlp().cuda(), X.cuda(), TARGET.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **kernel)
    run, scaler = compiled(model, stage="inductor"), torch.amp.GradScaler("cuda", 2.0**20)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = F.mse_loss(run(x).float(), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert schedule_of(optimizer).merges >= 2
    assert all(kernel.items() <= group.items() for group in optimizer.param_groups)
    assert all(skew.is_cuda for skew in skews(model))


# --- hooks of gradients -------------------------------------------------------------------------


def test_gradient_hooks_of_frozen_weights_are_not_called_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not even with ``None``, which no hook expects."""
    model = mlp()
    called = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: called.append(name) or g * 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = train(compiled(model), model, optimizer, 3)
    assert losses[-1] < losses[0]
    assert called
    assert all(name.endswith("bias") for name in called)
    assert caplog.text.count("a gradient hook of a weight of shape") == len(skews(model)) // 2


def test_an_optimiser_step_in_the_backward_is_refused() -> None:
    """Frozen weights would never run it, and the rotations would stand still."""
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(BackendCompilerFailed, match="post-accumulate-grad hook"):
        loss_of(compiled(model))
