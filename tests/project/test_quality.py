"""`benchmarks.quality` at tiny sizes on the CPU: plans, corpora, methods, the queue, tables."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality import (
    __main__ as command,
)
from benchmarks.quality import (
    corpora,
    figures,
    lines,
    methods,
    queue,
    results,
    tables,
    training,
)
from benchmarks.quality.baselines import lora, scale, variant
from benchmarks.quality.settings import PLANS, PlanError, Settings, expand, from_dict, load
from benchmarks.quality.training import Place, Run
from benchmarks.rows import read, write
from poetx_compile import poetx_backend
from poetx_compile.layers import permutation

TINY: dict[str, Any] = {
    "preset": "tiny", "width": 64, "layers": 1, "steps": 10, "batch_size": 4, "seq_len": 16,
    "warmup": 2, "lr": 3e-3,
}  # fmt: skip

ADAMW = TINY | {"method": "dense", "optimizer": "adamw"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("quality")
    text = found / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)), encoding="utf-8")
    corpora.store(found, [str(text)])
    return found


def place(folder: Path) -> Place:
    return Place(torch.device("cpu"), "none", (8, 16), folder / "models")


def trained(folder: Path, values: dict[str, Any]) -> training.Row:
    settings = from_dict(values)
    methods.check(settings)
    return Run(settings, corpora.load(folder), place(folder)).run()


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_expands_into_all_combinations_each_once() -> None:
    plan = {
        "base": {"block_size": 16, "config": {"max_angle": 0.2}},
        "runs": [
            {"grid": {"lr": [1e-3, 2e-3], "block_size": [8, [8, 16]]}},
            {"grid": {"lr,block_size": [[1e-3, 8], [2e-3, 8]]}},  # there already
            {"config.moments": "reset", "grid": {"config.max_angle": [0.1, None]}},
        ],
    }
    runs = expand(plan)
    assert [(r.lr, r.block_size) for r in runs[:4]] == [
        (1e-3, 8), (1e-3, (8, 16)), (2e-3, 8), (2e-3, (8, 16)),
    ]  # fmt: skip
    assert [r.config for r in runs[3:]] == [
        {"max_angle": 0.2},
        {"max_angle": 0.1, "moments": "reset"},
        {"max_angle": None, "moments": "reset"},
    ]
    assert len({r.run for r in runs}) == 6
    assert all(from_dict(json.loads(json.dumps(r.to_dict()))) == r for r in runs)


@pytest.mark.parametrize("name", sorted(p.stem for p in PLANS.glob("*.json")))
def test_the_plans_expand_into_what_this_checkout_can_run(name: str) -> None:
    assert len(load(name)) == len({run.run for run in load(name)}) > 1
    for run in load(name):
        methods.check(run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_sizes": 8}, "unknown setting.* block_sizes"),
        ({"block_size": 8, "config": {"no_such_field": 1}}, "POETXConfig .* no_such_field"),
        ({"block_size": 8, "config": {"max_angle": 2}}, "max_angle = 2"),
        ({"block_size": 8, "options": {"beta": 1}}, "POETXMuon .* beta"),
        ({}, "needs block_size"),
        ({"method": "dense", "optimizer": "adamw", "config": {"seed": 1}}, "no rotations"),
        ({"method": "lora", "optimizer": "adamw"}, "needs rank"),
        ({"method": "dense", "optimizer": "sgd"}, "'sgd' of dense"),
        ({"block_size": 8, "start": ADAMW}, "same shapes"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        methods.check(from_dict(values))


# --- corpora and batches --------------------------------------------------------------------------


def test_python_sources_are_split_alike_everywhere(tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / part / "deep").mkdir(parents=True)
        for i in range(30):
            (tmp_path / part / "deep" / f"{i}.py").write_text(f"x = {i}\n")  # twice the same
        (tmp_path / part / "zero.py").write_bytes(b"a\0b")
        (tmp_path / part / "data.txt").write_text("no source")
    one = corpora.python_sources([tmp_path / "one", tmp_path / "two"])
    assert one.fingerprint == corpora.python_sources([tmp_path / "two"]).fingerprint
    assert one.documents == (28, 2)
    texts = [bytes(split.tolist()).split(b"\0") for split in (one.train, one.validation)]
    assert not set(texts[0][:-1]) & set(texts[1][:-1])


def test_a_stored_corpus_is_what_was_read(folder: Path) -> None:
    path = folder / "text.txt"
    stored = corpora.store(folder, [str(path)])
    assert bytes(torch.cat([stored.train[:-1], stored.validation[:-1]]).tolist()) == (
        path.read_bytes()
    )
    with pytest.raises(ValueError, match="other data"):
        corpora.store(folder)


def test_batches_follow_from_the_seed_and_the_step_and_go_on_after_another_run() -> None:
    data = torch.arange(40 * 16 + 1) % 251
    first = from_dict(ADAMW | {"steps": 4})
    muon = dataclasses.replace(first, optimizer="muon", lr=1.0)
    starts = training.batch_starts(first, data)
    assert torch.equal(starts, training.batch_starts(muon, data))
    assert starts.shape == (4, 4)
    assert not torch.equal(starts, training.batch_starts(dataclasses.replace(first, seed=1), data))
    twice = training.batch_starts(dataclasses.replace(first, steps=8), data)
    after = dataclasses.replace(first, start=first.to_dict())
    assert torch.equal(torch.cat([starts, training.batch_starts(after, data)]), twice)


def test_the_schedule_the_curve_and_the_spike() -> None:
    settings = Settings(block_size=8, steps=100, warmup=10)
    factors = [training.lr_factor(settings, step) for step in range(100)]
    assert factors[:2] == [0.1, 0.2]
    assert max(factors) == factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.01)
    losses = [1.0] * 60
    losses[40] = 1.5
    assert training.spike(losses, 10) == 0.5
    assert training.spike(losses, 10**6) == 0.5  # the first half is warm-up at most
    assert training.curve(losses, 6)[3:] == [[40, 1.0], [50, 1.05], [60, 1.0]]
    assert training.curve([1.0, 1.0, float("nan"), 1.0], 2) == [[2, 1.0]]


# --- methods --------------------------------------------------------------------------------------

METHODS = {
    "adamw": ADAMW,
    "muon": ADAMW | {"optimizer": "muon"},
    "scale": ADAMW | {"optimizer": "scale"},
    "lora": ADAMW | {"method": "lora", "rank": 4, "restart": 4},
    "poet": TINY
    | {"method": "poet", "optimizer": "adamw", "block_size": 16}
    | {"config": {"merge_interval": 4}},
    "poetx": TINY
    | {"block_size": (16, 32), "poetx_lr": 0.02, "weights": "bfloat16"}
    | {"config": {"max_angle": None, "merge_interval": 5}, "options": {"momentum": 0.9}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_leaves_a_row(name: str, folder: Path) -> None:
    values = METHODS[name]
    row = trained(folder, values)
    keys = {"gpu", "torch", "method", "optimizer", "params", "trained", "state_bytes", "tokens"}
    keys |= {"lr", "poetx_lr", "block_size", "width", "val_loss", "seed", "seconds", "spike"}
    assert keys <= set(row)
    assert json.loads(json.dumps(row, allow_nan=False))["run"] == from_dict(values).run
    (first, start), *_, (last, end) = row["validation"]
    assert (first, last) == (0, 10)
    assert row["val_loss"] == end < start - 0.1
    assert row["tokens"] == 10 * 4 * 16
    assert 0 < row["trained"] <= row["params"]
    assert (row["trained"] == row["params"]) == (values.get("method") == "dense")
    assert row["gradient_bytes"] == row["trained_bytes"]
    # A parameter, its gradient, and one moment or two with a counter of steps.
    bytes_a_plane = {"poet": 16.0, "poetx": 12.0}.get(name, 0.0)
    assert (row["plane_bytes"] or 0.0) == pytest.approx(bytes_a_plane, rel=0.01)
    assert row["merges"] == {"poet": 2, "poetx": 2}.get(name)
    for spectrum in row["spectra"].values():
        assert len(spectrum["start"]) == len(spectrum["end"]) == 33
        assert spectrum["drift"] > (0.0 if name == "poet" else -1.0)


def test_what_trains_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **given: asked.append(given))
    for name in ("adamw", "poetx"):
        settings = from_dict(METHODS[name])
        methods.build(settings, methods.Llama(settings.shapes()), "aot_eager")
    assert asked == [
        {"backend": "aot_eager", "dynamic": False},
        {"backend": poetx_backend, "options": {"stage": "aot_eager"}, "dynamic": False},
    ]


def test_the_bytes_of_state_are_the_moments(folder: Path) -> None:
    adamw, scaled = (trained(folder, METHODS[name]) for name in ("adamw", "scale"))
    vectors = 3 * 64  # norms
    steps = 4 * len(list(methods.Llama(from_dict(ADAMW).shapes()).parameters()))
    assert adamw["state_bytes"] == 8 * adamw["params"] + steps
    assert scaled["state_bytes"] == 4 * 256 * 64 + 8 * vectors


@pytest.mark.parametrize("name", ["adamw", "lora", "poetx"])
def test_a_run_goes_on_where_another_one_ended(name: str, folder: Path) -> None:
    settings = from_dict(ADAMW)
    run = Run(settings, corpora.load(folder), place(folder))
    before = run.run()
    run.save(training.model_path(place(folder), settings))
    after = trained(folder, METHODS[name] | {"weights": "float32", "start": ADAMW, "steps": 5})
    # At the end the loss was taken over more windows.
    again = Run(dataclasses.replace(settings, start=ADAMW), corpora.load(folder), place(folder))
    again._validate(settings.steps)
    assert again.validated[-1][1] == pytest.approx(before["val_loss"], abs=1e-5)
    again._validate(0)
    assert after["validation"][0][1] == pytest.approx(again.validated[-1][1], abs=1e-5)
    if name == "poetx":
        assert after["resolved"]["init"] == "keep"


def test_a_run_that_diverges_says_so(folder: Path) -> None:
    row = trained(folder, METHODS["scale"] | {"lr": 1e30})
    assert row["diverged"]
    assert row["val_loss"] is row["spike"] is None


def test_scale_beside_a_computation_by_hand() -> None:
    model = nn.ModuleDict(
        {"hidden": nn.Linear(2, 2, bias=False), "lm_head": nn.Linear(2, 1, bias=False)}
    )
    model["embed"] = nn.Embedding(2, 2)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = scale.optimizer(model, lr=0.1, weight_decay=0.5)
    gradients = {
        "hidden.weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        "lm_head.weight": torch.tensor([[1.0, 7.0]]),
        "embed.weight": torch.tensor([[3.0, 0.0], [4.0, 1.0]]),
    }
    root = 2**0.5
    # Rows have the root mean square 5/√2 and 2/√2, an embedding's columns 5/√2 and 1/√2; the head's
    # momentum is a tenth of its gradient, whose root mean square is 5.
    expected = {
        "hidden.weight": torch.tensor([[0.6 * root, 0.8 * root], [0.0, root]]),
        "lm_head.weight": torch.tensor([[0.2, 1.4]]),
        "embed.weight": torch.tensor([[0.6 * root, 0.0], [0.8 * root, root]]),
    }
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), 0.95 * weights[name] - 0.1 * expected[name])
    head = model["lm_head"].weight
    head.grad = torch.tensor([[9.1, -16.3]])  # with the momentum: (1, −1)
    before = head.detach().clone()
    optimizer.step()
    torch.testing.assert_close(head.detach(), 0.95 * before - torch.tensor([[0.1, -0.1]]))


def test_relora_merges_without_a_change_and_starts_again() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5, bias=False), "lm_head": nn.Linear(5, 3)})
    (layer,) = lora.prepare(model, rank=2)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "a.a", "a.b", "lm_head.weight", "lm_head.bias",
    ]  # fmt: skip
    optimizer = lora.optimizer(model, lr=0.1, weight_decay=0.0)
    x = torch.randn(7, 6)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
    restarts = lora.Restarts([layer], optimizer, 3)
    outputs, weight, before = layer(x).detach(), layer.weight.detach(), layer.frozen.clone()
    restarts.after(2, 9)
    assert torch.equal(layer.frozen, before)
    restarts.after(3, 9)
    assert not torch.equal(layer.frozen, before)
    torch.testing.assert_close(layer(x).detach(), outputs)
    torch.testing.assert_close(lora.plain_state_dict(model)["a.weight"], weight)
    assert set(lora.plain_state_dict(model)) == {"a.weight", "lm_head.weight", "lm_head.bias"}
    assert layer.b.count_nonzero() == 0
    assert layer.a not in optimizer.state
    assert [restarts.rate(step) for step in (0, 2, 3, 4, 5)] == [1, 1, 0.1, 0.2, 0.3]


# --- the queue ------------------------------------------------------------------------------------


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers that write a row after `lr` seconds, and break where the seed is 7."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, pathlib, sys, time
            task = json.load(open(sys.argv[1]))
            folder, settings = pathlib.Path(sys.argv[2]), task["settings"]
            name = pathlib.Path(sys.argv[1]).stem
            time.sleep(settings["lr"])
            if settings["seed"] == 7:
                raise SystemExit("the run broke")
            if task["save"]:
                (folder / "models").mkdir(exist_ok=True)
                (folder / "models" / f"{name}.pt").touch()
            (folder / "rows").mkdir(exist_ok=True)
            row = settings | {"run": name, "val_loss": 1.0, "diverged": False, "corpus": "c"}
            row |= {"slot": os.environ["CUDA_VISIBLE_DEVICES"], "seconds": 1, "first_step_s": 0}
            (folder / "rows" / f"{name}.json").write_text(json.dumps([row]))
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.setattr(queue, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(queue, "POLL_S", 0.01)
    return tmp_path / "out"


def test_a_queue_does_each_run_once_and_goes_on_after_a_failure(fake_worker: Path) -> None:
    machine = queue.Machine(("4", "5"), 1, "none", (1, 1), fake_worker)
    runs = [from_dict(ADAMW | {"lr": 0.0, "seed": seed}) for seed in range(3)]
    broken = from_dict(ADAMW | {"lr": 0.0, "seed": 7})
    after = from_dict(ADAMW | {"lr": 0.0, "start": runs[1].to_dict()})
    seen: list[int] = []
    first = queue.Queue([[after, broken], runs], machine, finished=lambda r: seen.append(len(r)))
    assert first.total == 5
    assert not first.run()
    assert seen == [1, 2, 3, 4]
    assert {row["slot"] for row in first.rows.values()} == {"4", "5"}
    assert read(fake_worker / "errors" / f"{broken.run}.json")[0]["error"] == "the run broke"
    again = queue.Queue([[after, broken], runs], machine)
    assert [run.run for run in again.pending] == [broken.run]
    known = queue.Queue([[*runs, dataclasses.replace(after, lr=0.5)]], dataclasses.replace(
        machine, folder=fake_worker / "new"), first.rows.values())  # fmt: skip
    # The weights that a run starts from are not there: its start is done again.
    assert {run.lr for run in known.pending} == {0.0, 0.5}
    assert len(known.pending) == 2


def test_a_queue_ends_what_is_not_done_in_time(fake_worker: Path) -> None:
    machine = queue.Machine((), 2, "none", (1, 1), fake_worker)
    short, long = (from_dict(ADAMW | {"lr": lr}) for lr in (0.0, 60.0))
    begun = time.monotonic()
    once = queue.Queue([[short, long]], machine)
    assert not once.run(limit_s=0.5)
    assert time.monotonic() - begun < 30
    assert set(once.rows) == {short.run}
    assert [run.run for run in queue.Queue([[short, long]], machine).pending] == [long.run]


def test_the_longest_runs_of_the_first_plan_come_first(tmp_path: Path) -> None:
    machine = queue.Machine((), 1, "none", (1, 1), tmp_path)
    short, long = (from_dict(ADAMW | {"steps": steps}) for steps in (5, 50))
    other = from_dict(ADAMW | {"steps": 500})
    runs = queue.Queue([[short, long], [other]], machine)
    assert runs._next(None) == long
    runs.times = [(1.0, 1.0 / short.cost())]  # a second to start, a second for the short one
    assert runs._next(time.monotonic() + 3) == short
    assert runs._next(time.monotonic() + 1.5) is None


# --- rows, tables, figures ------------------------------------------------------------------------


def rows_of(tmp_path: Path) -> list[training.Row]:
    common = {
        "gpu": "cpu", "torch": "2", "dtype": "float32", "weights": "float32", "options": {},
        "config": {}, "rank": None, "restart": None, "layers": None, "width": 64, "lr": 1e-3,
        "seed": 0, "diverged": False, "params": 100, "trained": 100, "state_bytes": 2**20,
        "tokens": 5e6, "spike": 0.1, "method": "dense", "optimizer": "adamw", "block_size": None,
        "peak_lr": {"group0": 1e-3}, "run": "a", "val_loss": 0.8, "corpus": "c",
    }  # fmt: skip
    rotated = common | {"method": "poetx", "optimizer": "muon", "peak_lr": {"poetx b=8": 2e-3}}
    return [
        common,
        rotated | {"block_size": 8, "trained": 20, "val_loss": 1.0, "run": "b"},
        rotated | {"block_size": 32, "config": {"gains": "rows"}, "val_loss": 0.76, "run": "c"},
        common | {"lr": 1.0, "diverged": True, "val_loss": None, "spike": None, "run": "d"},
    ]


def test_a_table_of_rows(tmp_path: Path) -> None:
    found = rows_of(tmp_path)
    write(results.path(tmp_path, "some"), found)
    assert results.all_rows([tmp_path]) == results.load("some", tmp_path) == found
    columns = ("name", "block_size", "changes", "trained_share", "seeds", "val_loss", "over")
    assert tables.markdown(found, columns) == (
        "| method | b | other than the rest | trained | seeds | loss | over AdamW |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| POETXMuon | 32 | gains rows | 100 % | 0 | 0.7600 | -5.0 % |\n"
        "| AdamW |  |  | 100 % | 0 | 0.8000 | +0.0 % |\n"
        "| POETXMuon | 8 |  | 20 % | 0 | 1.0000 | +25.0 % |\n"
        "| AdamW |  |  | 100 % | 0 | diverged |  |"
    )
    assert tables.markdown([], columns) == tables.NONE


def test_seeds_are_one_line_and_compared_with_the_same_seeds(tmp_path: Path) -> None:
    adamw, small, *_ = rows_of(tmp_path)
    adamw = [adamw, adamw | {"seed": 1, "val_loss": 1.2}, adamw | {"lr": 2e-3, "val_loss": 0.7}]
    small = [small, small | {"seed": 1, "val_loss": 1.4}, small | {"lr": 1.0, "val_loss": 0.5}]
    known = lines.lines(adamw)
    two, one = lines.lines(small)
    assert (two.seeds, two.loss) == ([0, 1], pytest.approx(1.2))
    assert two.over(known) == pytest.approx(20.0)  # over the mean of seeds 0 and 1: 1.0
    assert one.over(known) == pytest.approx(100 * (0.5 / 0.7 - 1))
    assert one.over(lines.lines(row | {"corpus": "other"} for row in adamw)) is None
    assert [line.loss for line in lines.best([one, two])] == [one.loss]
    near = lines.Line([one.row | {"val_loss": 1.195}])
    assert [line.loss for line in lines.best([near, two])] == [two.loss]  # two seeds say more


def test_what_most_runs_have_is_said_once(tmp_path: Path) -> None:
    _, row, *_ = rows_of(tmp_path)
    usual = {"gains": "rows", "redraw_interval": 200}
    rows = [row | {"config": usual, "lr": lr} for lr in (1.0, 2.0)]
    rows.append(row | {"config": {"gains": "none"}, "resolved": {"redraw_interval": 50}})
    table = tables.markdown(rows, ("changes",))
    assert "The rest, of all that rotate: `gains=rows`, `redraw_interval=200`." in table
    assert "| redraw_interval 50, gains none |" in table
    assert table.count("200") == 1


def test_the_page_of_quality_has_the_tables_of_the_rows() -> None:
    text = command.PAGE.path.read_text(encoding="utf-8")
    assert command.PAGE.filled(text) == text, "run python -m benchmarks.quality page"
    plans = {word for words in command.PAGE.commands(text) for word in words}
    assert plans >= {path.stem for path in PLANS.glob("*.json")} - {"smoke"}


def test_figures_of_rows(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    found = rows_of(tmp_path)
    axes = Figure().subplots(1, 3)
    figures.KINDS["blocks"][1](axes, found[1:3], found)
    ends = [line.get_xdata().tolist() for line in (panel.get_lines()[0] for panel in axes)]
    assert ends == [[8 / 64, 32 / 64], [8, 32], [20, 100]]
    assert list(axes[0].get_lines()[0].get_ydata()) == pytest.approx([25.0, -5.0])
    axes = Figure().subplots(1, 2)
    figures.KINDS["rates"][1](axes, [*found, found[0] | {"lr": 4e-3, "val_loss": 9.0}], found)
    drawn = {line.get_label(): line for line in axes[0].get_lines()}
    assert set(drawn) >= {"AdamW", "POETXMuon b=8", "POETXMuon b=32"}
    assert list(drawn["AdamW"].get_xdata()) == [1e-3]  # what is far above is a triangle
    with pytest.raises(ValueError, match="no row"):
        figures.draw(found[:0], "curves", tmp_path / "none.png")


# --- variants -------------------------------------------------------------------------------------

VARIANT: dict[str, Any] = TINY | {"method": "variant", "poetx_lr": 6e-3, "block_size": 16}


def losses_of(folder: Path, values: dict[str, Any]) -> torch.Tensor:
    run = Run(from_dict(values), corpora.load(folder), place(folder))
    run.run()
    return run.losses


def test_a_variant_without_options_is_the_merged_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is drawn: here nothing moves."""
    draw, order = permutation.draw_permutation, torch.arange
    monkeypatch.setattr(
        permutation, "draw_permutation", lambda size, **to: draw(size, **to | {"draw": 0})
    )
    monkeypatch.setattr(
        variant.Side, "draw", lambda side: order(side.size).expand(len(side.all), -1)
    )
    config = {"merge_interval": 1, "gains": "both", "init": "spectrum", "redraw_interval": 4}
    ours, simulated = (
        losses_of(folder, VARIANT | {"method": method, "config": config})
        for method in ("poetx", "variant")
    )
    torch.testing.assert_close(simulated, ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": 0.5, "whitening": 2, "cautious": True, "by_size": 0.5},
        {"fresh": 0.5, "wide_block": 32, "rates": {"in": 2.0, "q_proj": 0.5}},
        {"planes": "subspace", "chance": 0.5, "scales": {"o_proj": 2.0}},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_options_of_a_variant_keep_the_spectrum(folder: Path, options: dict[str, Any]) -> None:
    values = VARIANT | {"steps": 4, "config": {"redraw_interval": 2}, "options": options}
    run = Run(from_dict(values), corpora.load(folder), place(folder))
    stacks = run.trained.optimizer.stacks
    before = [(stack.inner, torch.linalg.svdvals(stack.inner)) for stack in stacks]
    run.run()
    assert run.losses.isfinite().all()
    for stack, (inner, spectrum) in zip(stacks, before, strict=True):
        assert not torch.allclose(stack.inner, inner, rtol=0.01)
        torch.testing.assert_close(torch.linalg.svdvals(stack.inner), spectrum)
