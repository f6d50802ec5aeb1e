"""What a step, a merge and a redraw leave alone, so that guards below a module may be skipped."""

import pickle

import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.layers.registry import registry


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def prepared(**config) -> Block:
    model = Block()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, **config))
    return model


def test_steps_and_redraws_change_no_dict_of_a_module():
    for interval in (1, 2):
        model = prepared(merge_interval=interval, redraw_interval=2)
        optimizer = poetx.POETXAdamW(model, lr=1e-2)
        pairs = [e.perm_in.draw for _, _, e in prepared_linears(model)]

        def step(model=model, optimizer=optimizer) -> None:
            model(torch.randn(3, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        before = {m: dict(vars(m)) for m in model.modules()}
        for _ in range(4):
            step()
        for module, values in before.items():
            now = vars(module)
            assert now.keys() == values.keys()
            assert [k for k in now if now[k] is not values[k]] == []
        assert [e.perm_in.draw for _, _, e in prepared_linears(model)] != pairs


def test_guards_ask_for_no_property_of_a_class():
    for interval in (1, 200):
        torch._dynamo.reset()
        model = prepared(merge_interval=interval)
        options = {"stage": "eager"}
        torch.compile(model, backend=poetx.poetx_backend, options=options)(torch.randn(3, 8))
        (entry,) = _debug_get_cache_entry_list(Block.forward.__code__)
        guards = [line for line in str(entry.guard_manager).splitlines() if "L['self']" in line]
        assert any("skew_in" in line for line in guards)
        assert [line for line in guards if "fget" in line or "['0'].config" in line] == []


def test_a_copy_of_an_interrupted_layer_is_one():
    model = prepared()
    _, _, e = next(prepared_linears(model))
    e.interrupted = True
    copied = pickle.loads(pickle.dumps(e))
    e.interrupted = False
    assert registry.some_interrupted
    assert copied.interrupted
    copied.interrupted = False
    assert not registry.some_interrupted


def test_a_layer_is_read_as_older_versions_pickled_it():
    model = prepared(merge_interval=1)
    _, _, e = next(prepared_linears(model))
    state = e.__getstate__()
    old = state | {"interrupted": False} | state["_aside"]
    for name in ("_aside", "merged", "_interrupted"):
        del old[name]
    loaded = type(e).__new__(type(e))
    loaded.__setstate__(old)
    assert (loaded.merged, loaded.interrupted, loaded.loads) == (True, False, e.loads)
    assert "loads" not in vars(loaded)
