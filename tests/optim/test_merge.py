"""The merge: outputs, spectra, addresses, compiled code, and what an exception leaves behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import poetx_compile as poetx
from poetx_compile.errors import DivergedError, InterruptedMergeError
from poetx_compile.inspect.diagnostics import spectrum, spectrum_drift
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim import blocks
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim.merge import merge, merged_rotation, polar_factor
from tests.helpers.models import Siblings
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close, relative_error, tolerance


def config(**fields) -> poetx.POETXConfig:
    return poetx.POETXConfig(**{"block_size": 16, "exclude_modules": (), **fields})


CASES = {
    "bias": (lambda: nn.Linear(48, 32), {}),
    "no bias": (lambda: nn.Linear(48, 32, bias=False), {}),
    "odd sizes": (lambda: nn.Linear(37, 51), {}),
    "partial rotation": (lambda: nn.Linear(50, 41), {"block_size": 16}),
    "output of size 1": (lambda: nn.Linear(40, 1), {}),
    "input of size 1": (lambda: nn.Linear(1, 40), {}),
    "block per side": (lambda: nn.Linear(48, 64), {"block_size": (8, 32)}),
    "short side": (lambda: nn.Linear(6, 64), {"block_size": 32}),
    "shared permutations": (lambda: Siblings(), {}),
    "chunked": (lambda: nn.Linear(64, 48), {"permutation": "chunked"}),
    "chunked, odd sizes": (lambda: nn.Linear(40, 51), {"permutation": "chunked"}),
    "order 1": (lambda: nn.Linear(48, 32), {"neumann_order": 1, "merge_rotation": "plain"}),
    "order 4": (lambda: nn.Linear(48, 32), {"neumann_order": 4}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_outputs_survive_a_merge(case: str, dtype: torch.dtype) -> None:
    build, fields = CASES[case]
    model = build().to(dtype)
    poetx.prepare(model, config(**fields))
    angle = 0.2
    turn(model, angle)
    features = next(m for m in model.modules() if isinstance(m, nn.Linear)).in_features
    x = torch.randn(64, features, dtype=dtype)
    before = model(x)
    merge(model, redraw=True)
    after = model(x)
    # Order k shrinks by θ^(k+1) on either side, and even orders turn by it.
    k = fields.get("neumann_order", 3)
    exact = fields.get("merge_rotation") == "plain"
    bound = tolerance(dtype) + (0 if exact else 2 * angle ** (k + 1))
    assert torch.isfinite(after).all()
    assert relative_error(after, before) <= bound
    for _, _, e in prepared_linears(model):
        drawn = [1 if side.permutation.size <= side.block else 2 for side in e.sides]
        assert e.layout.tolist()[1:4] == [e.seed, *drawn]
        assert not e.skew_in.any()
        assert not e.skew_out.any()


@pytest.mark.parametrize("fields", [{"cayley": "exact"}, {"merge_rotation": "plain"}])
def test_exact_and_plain_merges_change_nothing_but_rounding(fields: dict) -> None:
    model = Siblings().double()
    poetx.prepare(model, config(**fields))
    turn(model, 0.5)
    x = torch.randn(32, 48, dtype=torch.float64)
    before = model(x)
    merge(model, redraw=True)
    assert_close(model(x), before, torch.float64)


@pytest.mark.parametrize("permutation", ["random", "chunked"])
def test_a_merge_at_zero_moves_no_bit(permutation: str) -> None:
    model = Siblings().bfloat16()
    poetx.prepare(model, config(permutation=permutation))
    before = [m.weight.clone() for _, m, _ in prepared_linears(model)]
    merge(model, redraw=True)
    for weight, (_, module, _) in zip(before, prepared_linears(model), strict=True):
        assert torch.equal(weight, module.weight)


def test_siblings_still_share_their_permutation() -> None:
    model = Siblings()
    poetx.prepare(model, config())
    q, k = equivalence_of(model.q), equivalence_of(model.k)
    assert q is not None
    assert k is not None
    old = q.perm_in.pair.clone()
    merge(model, redraw=True)
    assert q.perm_in is k.perm_in
    assert q.draw == k.draw == 2
    assert not torch.equal(q.perm_in.pair, old)
    assert torch.equal(stored_weight(model.q), q.stored_form(model.q.weight))


@pytest.mark.parametrize("angle", [0.1, 0.25, 0.6])
def test_polar_factor_is_the_nearest_orthogonal_matrix(angle: float) -> None:
    linear = nn.Linear(64, 64).double()
    poetx.prepare(linear, config(block_size=32))
    turn(linear, angle)
    e = equivalence_of(linear)
    assert e is not None
    g = merged_rotation(e.skew_in, e.block_in, e.order, "plain")
    u, _, vh = torch.linalg.svd(g)
    polar = merged_rotation(e.skew_in, e.block_in, e.order, "polar")
    # Quadratic convergence: four steps from 0.6 end at 1e-11, two from 0.25 at 1e-9.
    assert relative_error(polar, u @ vh) < 1e-9
    eye = torch.eye(32, dtype=torch.float64)
    assert (polar.mT @ polar - eye).abs().max() < 1e-9
    if angle == 0.25:
        two = polar_factor(g, steps=2)
        assert (two.mT @ two - eye).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_polar_factor_is_exact_for_its_dtype_at_every_angle(dtype: torch.dtype) -> None:
    """Also where the iteration has come near, and not all of the way, after its four steps."""
    linear = nn.Linear(24, 24).to(dtype)
    poetx.prepare(linear, config(block_size=24))
    e = equivalence_of(linear)
    assert e is not None
    for angle in torch.linspace(0.5, 0.85, 36).tolist():
        turn(linear, angle)
        g = merged_rotation(e.skew_in, e.block_in, e.order, "plain")
        u, _, vh = torch.linalg.svd(g.double())
        assert_close(polar_factor(g), u @ vh, dtype, f"polar factor at {angle:.2f}")


def test_three_hundred_merges_keep_the_spectrum() -> None:
    """bf16 weights, fp32 rotations, every block at the guard's default angle."""
    linear = nn.Linear(256, 192, bias=False).bfloat16()
    poetx.prepare(linear, config(block_size=32))
    reference = spectrum(linear.weight)
    turn(linear, 0.25)
    e = equivalence_of(linear)
    assert e is not None
    skew_in, skew_out = e.skew_in.detach().clone(), e.skew_out.detach().clone()
    for i in range(300):
        e.skew_in.data.copy_(skew_in.roll(i, dims=0))
        e.skew_out.data.copy_(skew_out.roll(i, dims=0) * (-1) ** i)
        merge(linear, redraw=True)
    assert spectrum_drift(linear.weight, reference) <= 0.002


def test_plain_merges_shrink_the_spectrum_and_polar_ones_do_not() -> None:
    means = {}
    for how in ("polar", "plain"):
        torch.manual_seed(0)
        linear = nn.Linear(64, 64, bias=False)
        poetx.prepare(linear, config(merge_rotation=how))
        reference = spectrum(linear.weight)
        for i in range(50):
            turn(linear, 0.4, seed=i)
            merge(linear, redraw=True)
        assert linear.weight.isfinite().all()
        means[how] = (spectrum(linear.weight).mean() / reference.mean()).item()
    assert abs(means["polar"] - 1) < 1e-4
    assert means["plain"] < 0.9


def test_an_output_projection_that_its_owner_reads_raw_survives_merges() -> None:
    """`nn.MultiheadAttention` gives ``out_proj.weight`` to a function of its own."""
    model = nn.MultiheadAttention(16, 4, batch_first=True).double()
    poetx.prepare(model, config(block_size=8))

    def attend(x: Tensor) -> Tensor:
        return model(x, x, x)[0]

    compiled = torch.compile(attend, backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    x = torch.randn(2, 5, 16).double()
    for seed in range(2):
        turn(model, 0.05, seed)
        before = attend(x)
        assert_close(compiled(x), before)
        merge(model, redraw=True)
        # Polar factors: the output moves by about 2θ⁴.
        assert relative_error(attend(x), before) < 1e-4
        assert_close(compiled(x), attend(x))


@pytest.mark.parametrize("permutation", ["random", "chunked"])
def test_in_place_without_recompilation(permutation: str) -> None:
    model = Siblings()
    poetx.prepare(model, config(permutation=permutation))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(8, 48)
    compiled(x).sum().backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    frames = counter.frame_count
    assert frames > 0
    for i in range(3):
        turn(model, 0.2, seed=i)
        before = compiled(x)
        merge(compiled, redraw=True)
        assert relative_error(compiled(x), before) <= tolerance(torch.float32) + 2 * 0.2**4
        assert relative_error(compiled(x), model(x)) <= tolerance(torch.float32)
    assert counter.frame_count == frames
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: t.data_ptr() for name, t in tensors.items()} == addresses


@pytest.mark.parametrize(("limit", "calls"), [(1, 10), (12_000, 5)])
def test_how_many_layers_are_merged_at_once_does_not_matter(
    limit: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of several block sizes, more than one to a batch, and a side without any block."""
    torch.manual_seed(0)
    model = nn.ModuleList([Siblings(), nn.Linear(40, 1), nn.Linear(1, 40), nn.Linear(37, 8)])
    poetx.prepare(model, config())
    turn(model, 0.2)
    other = copy.deepcopy(model)
    merge(model, redraw=True)
    sizes = []
    real = merge_module.merged_rotation

    def counted(skew, *args):
        sizes.append(len(skew))
        return real(skew, *args)

    monkeypatch.setattr(blocks, "ROTATIONS_BYTES", limit)
    monkeypatch.setattr(merge_module, "merged_rotation", counted)
    merge(other, redraw=True)
    assert len(sizes) == calls
    for (name, value), same in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        if value.is_floating_point():
            assert_close(same, value, what=name)
        else:
            assert torch.equal(same, value)


def _break_second_layer(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    calls = []
    real = merge_module.rotate_weight

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(merge_module, "rotate_weight", fail)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_cut_off_merge_is_refused_everywhere_until_a_checkpoint_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = Siblings()
    poetx.prepare(model, config())
    turn(model, 0.1)
    merge(model, redraw=True)
    turn(model, 0.2)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(8, 48)
    expected = compiled(x)
    checkpoint = {k: v.clone() for k, v in model.state_dict().items()}
    with monkeypatch.context() as patch:
        _break_second_layer(patch, error)
        with pytest.raises(type(error)) as caught:
            merge(model, redraw=True)
        assert "Load the last checkpoint" in caught.value.__notes__[0]
    for refused in (
        lambda: model(x),
        lambda: compiled(x),
        lambda: model.o.weight,
        model.state_dict,
        model.v.state_dict,
        lambda: merge(model, redraw=True),
        lambda: poetx.merge_and_unload(model),
    ):
        with pytest.raises(InterruptedMergeError, match="Load the last checkpoint"):
            refused()
    model.load_state_dict(checkpoint)
    assert_close(model(x), expected)
    assert_close(compiled(x), expected)
    merge(model, redraw=True)
    assert {e.draw for _, _, e in prepared_linears(model)} == {3}


def test_a_model_is_compiled_again_once_a_checkpoint_ends_a_cut_off_merge(
    monkeypatch: pytest.MonkeyPatch, graphs: Callable[[], int]
) -> None:
    model, x = Siblings(), torch.randn(8, 48)
    poetx.prepare(model, config())
    compiled = torch.compile(model, backend="poetx", options={"stage": "eager"})
    expected = compiled(x)
    checkpoint = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        with monkeypatch.context() as patch:
            _break_second_layer(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                merge(model, redraw=True)
        with pytest.raises(InterruptedMergeError):
            compiled(x)
        before = graphs()
        model.load_state_dict(checkpoint)
        assert torch.equal(compiled(x), expected)
        assert graphs() == before + 1
        model.load_state_dict(checkpoint)  # nothing was cut off: the code stays
        compiled(x)
        assert graphs() == before + 1


_MERGES = """
import torch
import poetx_compile as poetx
from poetx_compile.optim.merge import merge
from tests.helpers.models import Siblings
from tests.helpers.rotations import turn
torch.manual_seed(5)
torch.set_num_threads(1)
model = Siblings()
torch.manual_seed({seed})
torch.rand({seed})
poetx.prepare(model, poetx.POETXConfig(block_size=16, exclude_modules=(), seed=3))
for i in range(2):
    turn(model, 0.2, seed=i)
    merge(model, redraw=True)
torch.save(model.state_dict(), {path!r})
"""


def test_two_processes_merge_to_the_same_bits(tmp_path) -> None:
    """Whatever the global generators hold: nothing but the seed decides."""
    paths = [str(tmp_path / f"{seed}.pt") for seed in (1, 99)]
    here, there = (_MERGES.format(seed=len(path), path=path) for path in paths)
    exec(here, {})
    subprocess.run([sys.executable, "-c", there], check=True)
    saved = [torch.load(path, weights_only=True) for path in paths]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name]), name


@pytest.mark.parametrize("angle", [0.99, 1.2, 3.0])
def test_angles_no_expansion_holds_still_merge_to_orthogonal_matrices(angle: float) -> None:
    """Without the guard nothing bounds θ: Newton-Schulz would diverge there."""
    linear = nn.Linear(32, 32)
    poetx.prepare(linear, config(max_angle=None))
    turn(linear, angle)
    reference = spectrum(linear.parametrizations["weight"].original)
    merge(linear, redraw=True)
    assert spectrum_drift(linear.weight, reference) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"max_angle": None}, {"cayley": "exact"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_became_nan_is_told_so_and_its_last_checkpoint_loads(
    fields: dict, value: float
) -> None:
    torch.manual_seed(0)
    model, x = Siblings(), torch.randn(4, 48)
    optimizer = poetx.POETXAdamW(model, lr=1e-3, config=config(merge_interval=3, **fields))
    before, state = model(x), copy.deepcopy(model.state_dict())
    for _ in range(2):
        (model(x).square().mean() * value).backward()
        optimizer.step()
    with pytest.raises(DivergedError, match="NaN or infinite"):
        optimizer.step()
    with torch.no_grad():
        assert not torch.isfinite(model(x)).all()  # as it was: no merge was begun
    model.load_state_dict(state)
    assert torch.equal(model(x), before)
