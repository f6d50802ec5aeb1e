"""Every test starts alike: seeded, one thread, no compiled code or Inductor cache left over."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator

_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
# The models are too small for threads, which wait for each other spinning: on cores that are busy
# a test takes twenty times as long.
os.environ["OMP_NUM_THREADS"] = "1"
if _PARALLEL:
    # A process a core already: compile workers of each would only compete.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Compiling makes objects by the million, and the collector would walk over them again and again.
gc.set_threshold(50_000)
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
# Inductor believes the processor: it would build a program for each of its vector instructions.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers import frozen  # noqa: E402

# pytest listens to loggers that do not propagate, and for any listener the compiler formats every
# graph, guard and stack of its trace: a tenth of the time.
logging.getLogger("torch.__trace").propagate = True

NO_GPU = "needs a CUDA GPU"
# What a test may need of the machine, or of torch's version: the reasons of skips that CI allows.
NOT_IN_A_PACKAGE = (
    NO_GPU,
    "no headless browser",
    "Triton exists for Linux alone",
    "this torch ",
    "pins other versions: ",  # a host that cannot be installed beside what is tested here
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=NO_GPU)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") and not may_be_skipped(report):
        report.outcome = "failed"
        report.longrepr = f"not to be skipped where CI is set: {report.longrepr}"
    return report


def may_be_skipped(report: pytest.TestReport) -> bool:
    """Whether CI may leave this out: for what no package of the `test` extra can bring."""
    if not report.skipped or not isinstance(report.longrepr, tuple):  # (file, line, reason)
        return True
    return report.longrepr[2].removeprefix("Skipped: ").startswith(NOT_IN_A_PACKAGE)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # in a worker, pytest may have imported torch already


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """The collector leaves alone what was there before the first test, and walks the rest.

    The owner of an adopted weight is looked for among the objects it knows: of the whole suite's
    modules alone there are seven hundred thousand. What tests import (Dynamo, Inductor, hosts) is
    frozen behind them.
    """
    frozen.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poetx_compile.adoption.eligibility.hidden", frozen.hidden)
        yield


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The session's own cache folder: nothing stale is hit, nothing is left behind.

    All processes of a session have one: it takes Inductor ten seconds to try which vector
    instructions the machine has and to precompile its headers.
    """
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if _PARALLEL else base) / "inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        patch.setenv("TRITON_CACHE_DIR", os.path.join(folder, "triton"))
        yield folder


@pytest.fixture
def fresh_inductor_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty Inductor cache for one test (for tests of the cache itself)."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return str(tmp_path / "inductor")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    if (guards := sys.modules.get("torch._dynamo.guards")) is not None:
        # It empties the processor's caches to time each set of guards once, for a debug line.
        guards.profile_guard_manager = lambda *_: 0.0
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision("highest")
    # Importing Dynamo costs seconds: only a test that compiled has it loaded.
    dynamo = getattr(torch, "_dynamo", None)
    if dynamo is not None and hasattr(dynamo, "reset"):
        dynamo.reset()
    frozen.freeze()


@pytest.fixture
def graphs() -> Callable[[], int]:
    """The number of graphs that Dynamo gave to a backend since the test began."""
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN: a kernel that leaves an entry unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
