"""torchtitan's own Llama, sharding, initialisation and state dicts, in one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears

CONFIG = poetx.POETXConfig(block_size=32, merge_interval=3)


class Attention(nn.Module):
    """In place of FlexAttention, which needs a GPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, attention_masks=None, **settings: Any
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, **settings).transpose(1, 2)


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("torchtitan", reason="pins other versions: torchtitan")
    from torchtitan.distributed import parallel_dims

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", os.environ.get("MASTER_PORT", "0"))
    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def built() -> tuple[nn.Module, Any]:
    """As torchtitan's trainer does: on meta, parallelised, initialised, then the optimiser."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from poetx_compile.integrations.torchtitan import with_poetx

    config = with_poetx(
        llama3_debugmodel(), CONFIG, lr=1e-2, weight_decay=0.0, options={"stage": "eager"}
    )
    spec = config.model_spec
    spec.model.layers = spec.model.layers[:1]
    dims = ParallelDims.from_config(config.parallelism, 1)
    dims.build_mesh()
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    for block in model.layers.values():
        block.attention.inner_attention = Attention()
    torch.manual_seed(0)
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train(), config.optimizer.build(model_parts=[model])


def trained(model: nn.Module, optimizers: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step % 2)
        tokens = torch.randint(0, 2048, (2, 9), generator=generator)
        logits = model(tokens[:, :-1], torch.arange(8).expand(2, 8)).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("_one_process")
def test_a_configuration_of_torchtitan_trains_merges_and_goes_on(graphs):
    model, optimizers = built()
    layers = list(prepared_linears(model))
    assert len(layers) == 5
    for name, linear, equivalence in layers:
        stored = linear.parametrizations.weight.original.full_tensor()
        assert 0.005 < stored.std() < 0.03, name
        assert not equivalence.skew_in.full_tensor().any(), name
    losses = trained(model, optimizers, range(4))
    assert losses[-1] < 0.8 * losses[0]
    assert graphs() == 1
    (optimizer,) = optimizers
    assert optimizer.schedule.merges == 1
    assert all(e.skew_in.dtype == torch.float32 for _, _, e in layers)

    weights, state = copy.deepcopy((model.state_dict(), optimizers.state_dict()))
    expected = trained(model, optimizers, range(4, 8))
    resumed, others = built()
    resumed.load_state_dict(weights)
    others.load_state_dict(state)
    assert trained(resumed, others, range(4, 8)) == expected
