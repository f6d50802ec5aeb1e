"""`estimate` against what a GPU measured, against real objects, and against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from benchmarks import estimate as benchmark
from benchmarks.step_worker import StepCase
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.partition import storages
from poetx_compile.errors import ConfigError, EstimateError, NothingToTrainError
from poetx_compile.inspect.estimate import MIB, MemoryRow, _Step
from poetx_compile.inspect.memory import meta, parts
from poetx_compile.inspect.memory.attention import as_on_cuda
from poetx_compile.inspect.memory.liveness import run
from poetx_compile.layers.registry import registry
from tests.helpers.held import kept
from tests.helpers.models import MLP, Block
from tests.helpers.tolerances import MEMORY

RESULTS = Path(benchmark.__file__).parent / "results"


class Stack(nn.Module):
    """Residual layers without attention: what a CPU keeps of them is what a GPU keeps."""

    def __init__(self, layers: int = 5, width: int = 48, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(MLP(width, 3 * width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return self.head(x)


def test_a_llama_of_1b_takes_what_was_measured_on_a_gpu() -> None:
    """Recorded by `python -m benchmarks.step` on an H200: weights to peak, dense and POET-X."""
    rows = json.loads((RESULTS / "step-nvidia-h200.json").read_text(encoding="utf-8"))
    measured = {
        (row["method"], row["variant"]): row for row in rows if row["memory_budget"] is None
    }
    case = StepCase(method="dense", permutation="chunked")
    estimated = benchmark.estimates(case, ["fast", "mem"])
    keys = ("dense", None), ("poetx", "fast"), ("poetx", "mem")
    for key, estimate in zip(keys, estimated, strict=True):
        row = measured[key]
        shapes = (row["preset"], row["batch"], row["length"], row["vocabulary"], row["dtype"])
        assert shapes == (case.preset, case.batch, case.length, case.vocabulary, case.dtype)
        for part in benchmark.compared(row, estimate):
            assert abs(part["error_percent"]) <= 100 * MEMORY, (key, part)
        assert estimate.peak_in == "backward"


# --- against real objects -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_state_are_those_of_real_objects(optimizer: str) -> None:
    model = Stack(2)
    poetx.prepare(model, poetx.POETXConfig(block_size=16))
    kind = poetx.POETXAdamW if optimizer == "adamw" else poetx.POETXMuon
    real = kind(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    real.step()
    states = [v for s in real.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert parts.optimizer_state(meta.copied(model), optimizer) == sum(v.nbytes for v in states)
    assert parts.weights(meta.copied(model)) == parts.weights(model)


def test_activations_are_what_autograd_holds() -> None:
    """The graphs of the estimate keep what a compiled model keeps, here of the CPU's AOT graphs."""
    model, x = Stack(2), torch.randn(30, 48)
    found = poetx.estimate(
        model, x, config=poetx.POETXConfig(block_size=16), loss=lambda y: y.square().mean()
    )
    dense, fast, mem = (row.activations for row in found.rows)
    assert dense == pytest.approx(kept(model, x), rel=MEMORY)
    poetx.prepare(model, poetx.POETXConfig(block_size=16))
    for variant, estimated in (("fast", fast), ("mem", mem)):
        actual = kept(model, x, stage="aot_eager", variant=variant)
        assert estimated == pytest.approx(actual, rel=MEMORY), variant
    config = poetx.POETXConfig(block_size=16, memory_budget=0.8)
    plain = Stack(2)
    under = poetx.estimate(plain, x, config=config, loss=lambda y: y.square().mean())
    assert [row.method for row in under.rows[1:]] == ["POET-X fast, budget 0.8", "POET-X mem"]
    actual = kept(model, x, stage="aot_eager", memory_budget=0.8)
    assert under.rows[1].activations == pytest.approx(actual, rel=MEMORY)
    assert mem < actual <= 0.8 * fast
    assert mem < fast
    text = str(found)
    for name in ("Stack", "float32 [30 x 48]", "nn.Linear", "POET-X mem", "POETXMuon", "peak in"):
        assert name in text
    values = json.loads(json.dumps(found.to_dict()))
    assert [row["peak"] for row in values["rows"]] == [row.peak for row in found.rows]
    assert poetx.POETXConfig.from_dict(values["config"]) == found.config
    assert [row.gradients for row in found.rows[1:]] == [
        sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ] * 2


def test_a_few_layers_say_what_all_do() -> None:
    """Exactly, where all rotations are one batch. Where they fill several, these end within layers:
    the peak is within a batch (here a large part of it)."""
    config = poetx.POETXConfig(block_size=16, variant="mem")
    model = meta.prepared(Stack(4), config)
    x = torch.empty(30, 48, device="meta")
    batch = 2 * parts.rotations(model.layers[0])
    for budget, inexact in ((64 * 2**20, 0), (batch, batch)):
        options = BackendOptions.parse(None, config.to_dict() | {"cayley_batch_bytes": budget})
        few, whole = (_Step((x,), {}, None, None, whole=whole) for whole in (False, True))
        (some,), (every,) = few.memory(model, [options]), whole.memory(model, [options])
        assert (some.kept, some.gradients, some.forward) == (
            every.kept, every.gradients, every.forward,
        )  # fmt: skip
        assert abs(max(some.backward) - max(every.backward)) <= inexact
        assert few.traced == "traced with layers: 2 of 4 equal layers"
        assert whole.traced == "traced with every layer"
    few.apart, few.gradient = True, torch.bfloat16  # gradients are rounded layer by layer
    (rounded,) = few.memory(model, [options])
    skews = [p for name, p in model.layers[0].named_parameters() if ".skew" in name]
    saved = parts.rounded_off(model.layers[0], torch.bfloat16)
    assert saved == sum(p.nbytes // 2 for p in skews) > 0
    assert some.backward[-1] - rounded.backward[-1] == 2 * saved  # the layers beyond two


def test_a_few_checkpointed_layers_say_what_all_do() -> None:
    """Each keeps its input, and the last one's output is kept by nobody."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = nn.ModuleList(Block() for _ in range(4)), nn.RMSNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.norm(x)

    with torch.device("meta"):
        model, x = Model(), torch.empty(2, 33, 16)
    few, every = (_Step((x,), {}, None, None, whole=whole) for whole in (False, True))
    assert few.memory(model, [None])[0].kept == every.memory(model, [None])[0].kept > 3 * x.nbytes


def test_checkpoints_and_autocast_count() -> None:
    def activations(model: nn.Module, **options: object) -> int:
        x = torch.randn(64, 48)
        (row,) = poetx.estimate(model, x, variants=[], **options).rows
        return row.activations

    plain = activations(Stack(2))
    # Checkpointed it keeps the residual stream alone, 2 + 1 of what were 2 · (1 + 3) + 1 widths.
    assert activations(Stack(2, checkpointed=True)) < 0.5 * plain
    # Under autocast the hidden width is in bf16, the residual stream in fp32 and bf16.
    assert activations(Stack(2), autocast=torch.bfloat16) < 0.85 * plain


def test_the_model_is_left_as_it_is() -> None:
    model = Stack(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    poetx.estimate(torch.compile(model), torch.randn(3, 48), variants=["fast"])
    assert not model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert registry.adopted.get(model.head.weight) is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    dense = poetx.estimate(model, torch.randn(3, 48), variants=[]).rows[0]
    poetx.prepare(model, poetx.POETXConfig(block_size=16))
    expected = model(torch.ones(3, 48))
    assert poetx.estimate(model, torch.randn(3, 48), variants=[]).rows[0] == dense
    assert torch.equal(model(torch.ones(3, 48)), expected)
    assert [type(m) for m in poetx.merge_and_unload(model).modules() if hasattr(m, "weight")] == [
        nn.Linear
    ] * 3


# --- Hugging Face ---------------------------------------------------------------------------------


def test_a_configuration_file_is_enough(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = poetx.estimate(tmp_path, batch_size=2, sequence_length=16, variants=[])
    assert found.model == "LlamaForCausalLM"
    assert found.inputs == ("int64 [2 x 16]", "int64 [2 x 16]")
    assert found.rows[0].weights > 4 * transformers.LlamaForCausalLM(config).num_parameters()


def test_what_is_no_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        poetx.estimate(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        poetx.estimate(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ConfigError, match="has no model_type"):
        poetx.estimate(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(EstimateError, match=r"no-such-model|transformers"):
        poetx.estimate(tmp_path)


def test_arguments_are_checked() -> None:
    model, x = Stack(1), torch.randn(3, 48)
    with pytest.raises(ConfigError, match="sgd"):
        poetx.estimate(model, x, optimizer="sgd")
    with pytest.raises(ConfigError, match="gradient_dtype = 'int8'"):
        poetx.estimate(model, x, gradient_dtype="int8")
    with pytest.raises(ConfigError, match="compiled = 'blocks'"):
        poetx.estimate(model, x, compiled="blocks")
    with pytest.raises(ConfigError, match="beside example inputs"):
        poetx.estimate(model, x, batch_size=2)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        poetx.estimate(model, batch_size=0)
    with pytest.raises(ConfigError, match="block_size"):
        poetx.estimate(model, x, options={"block_size": 8})
    with pytest.raises(ConfigError, match="list is no model"):
        poetx.estimate([])
    with pytest.raises(NothingToTrainError):
        poetx.estimate(nn.ReLU(), x)
    with pytest.raises(EstimateError, match="Give example inputs"):
        poetx.estimate(model)  # token ids are no input of this model


# --- what it is made of ---------------------------------------------------------------------------


def test_liveness_by_hand() -> None:
    """Products are written; the elementwise op between them runs in place of the first."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w).relu() + 1) @ w

    graph = make_fx(f, tracing_mode="fake")(torch.ones(8, 4), torch.ones(4, 4)).graph
    unit = 8 * 4 * 4
    steps: list[int] = []
    left = run(graph, {}, lambda _, size, __: steps.append(size))
    assert steps == [0, unit, unit, 2 * unit]  # x@w; relu and + 1 in its place; the last product
    assert list(left.values()) == [unit]
    # A buffer that the graph may free is alive up to its last reader.
    x = next(iter(graph.nodes))
    steps.clear()
    run(graph, storages(x), lambda _, size, __: steps.append(size))
    assert steps == [unit, 2 * unit, unit, 2 * unit]


@pytest.mark.parametrize(
    ("dtype", "masked", "size", "kernel"),
    [
        (torch.bfloat16, False, 8, "flash_attention"),
        (torch.bfloat16, True, 8, "efficient_attention"),
        (torch.float32, False, 8, "efficient_attention"),
        (torch.bfloat16, False, 264, "efficient_attention"),
        (torch.float64, False, 8, "attention_math"),
    ],
)
def test_attention_is_that_of_cuda(
    dtype: torch.dtype, masked: bool, size: int, kernel: str
) -> None:
    def f(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask if masked else None)

    targets: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        as_on_cuda(gm)
        targets.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return lambda *_: (inputs[0],)  # CUDA's kernels do not run here

    q = torch.zeros(1, 2, 5, size, dtype=dtype)
    torch.compile(f, backend=backend)(q, torch.zeros(5, 5, dtype=torch.bool))
    assert [t for t in targets if "attention" in t] == [
        f"aten._scaled_dot_product_{kernel}.default"
    ]


def test_the_benchmark_compares_part_by_part() -> None:
    sizes = [n * MIB for n in (10, 4, 8, 30, 45)]
    estimated = MemoryRow("nn.Linear", "AdamW", 1000, *sizes, "backward")
    measured_mib = {f"{p}_mib": n for p, n in zip(benchmark.PARTS, (10, 4, 8, 25, 90), strict=True)}
    rows = benchmark.compared({"preset": "1b", **measured_mib}, estimated)
    assert [r["part"] for r in rows] == list(benchmark.PARTS)
    assert [r["error_percent"] for r in rows] == pytest.approx([0, 0, 0, 20, -50])
    assert benchmark.missed(rows) == [rows[-1]]
    assert rows[-1] == {
        "preset": "1b", "part": "peak", "measured_mib": 90, "estimated_mib": 45,
        "error_percent": pytest.approx(-50),
    }  # fmt: skip
    with pytest.raises(SystemExit, match="CUDA"):
        benchmark.main(["--device", "cpu"])
