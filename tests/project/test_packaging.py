"""What gets installed: the packages, the entry point, the type marker; imports without Triton."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
TARGET = "poetx_compile.compile.backend:poetx_backend"
COMMAND = "poetx_compile.inspect.command_line:main"


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def _require_build_tools() -> None:
    (needed,) = PROJECT["build-system"]["requires"]
    minimum = int(needed.removeprefix("setuptools>="))
    for tool in ("pip", "setuptools"):
        try:
            version = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{tool} is not installed")
        if tool == "setuptools" and int(version.split(".")[0]) < minimum:
            pytest.skip(f"setuptools {version} is older than {minimum}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that no build folder is left in them."""
    _require_build_tools()
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("poetx_compile", "passes", "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    _run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), ".", cwd=source)
    (built,) = folder.glob("*.whl")
    return built


def _modules(folder: Path, package: str) -> set[str]:
    return {f"{package.replace('.', '/')}/{f.name}" for f in folder.glob("*.py")}


def test_every_folder_with_code_is_a_listed_package() -> None:
    inside = {
        ".".join(f.parent.relative_to(ROOT).parts)
        for f in (ROOT / "poetx_compile").rglob("__init__.py")
    }
    assert set(PACKAGES) == inside | {"poetx_compile.passes"}


def test_the_wheel_holds_every_module_the_marker_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"poetx_compile/py.typed"}
    expected |= {f"poetx_compile/inspect/html/page.{kind}" for kind in ("html", "css", "js")}
    for package in PACKAGES:
        folder = ROOT / "passes" if package == "poetx_compile.passes" else None
        expected |= _modules(folder or ROOT / package.replace(".", "/"), package)
    assert expected <= names
    assert {n.partition("/")[0] for n in names if ".dist-info/" not in n} == {"poetx_compile"}
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


@pytest.fixture(scope="module")
def imported(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a process prints that imports the wheel: modules, places, entry points."""
    folder = tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import poetx_compile\n"
        "print(sorted({{*sys.modules}} - before))\n"
        "import importlib.metadata, poetx_compile.passes\n"
        "print(poetx_compile.explain.__module__, poetx_compile.poetx_backend.__module__)\n"
        "(found,) = importlib.metadata.distributions(name='poetx-compile', path=[{site!r}])\n"
        "print(poetx_compile.__file__, poetx_compile.passes.__file__)\n"
        "for entry in found.entry_points: print(entry.group, entry.name, entry.value)\n"
    ).format(site=str(folder / "site"))
    # -P and a folder elsewhere: nothing but the wheel can be found first.
    out = _run(sys.executable, "-P", "-c", code, cwd=folder, PYTHONPATH=str(folder / "site"))
    return out.splitlines()


def test_the_wheel_imports_by_itself(imported: list[str]) -> None:
    _, _, files, *entries = imported
    package, passes = (Path(f).parent for f in files.split())
    assert passes == package / "passes"
    assert package.parts[-2:] == ("site", "poetx_compile")
    assert sorted(entries) == [
        f"console_scripts poetx {COMMAND}",
        f"torch_dynamo_backends poetx {TARGET}",
    ]


def test_an_editable_installation_is_one_path_with_all_packages_in_it() -> None:
    # Of a package folder named "" setuptools makes a path, which mypy and editors follow; of any
    # other mapping an import hook, which they do not.
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"": "src"}
    for package in PACKAGES:
        folder = ROOT / "src" / package.replace(".", "/")
        module = "passes" if package == "poetx_compile.passes" else package.replace(".", "/")
        assert (folder / "__init__.py").resolve() == ROOT / module / "__init__.py"
    assert [f.name for f in (ROOT / "src").iterdir() if f.suffix != ".egg-info"] == [
        "poetx_compile"
    ]


def _installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("poetx-compile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("poetx-compile is not installed in this environment (PYTHONPATH is used)")


def test_the_installation_imports_from_anywhere_and_ships_no_package_passes(tmp_path: Path) -> None:
    assert (_installed().read_text("top_level.txt") or "").split() == ["poetx_compile"]
    code = (
        "import importlib.util, poetx_compile, poetx_compile.passes\n"
        "assert importlib.util.find_spec('passes') is None"
    )
    _run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH="")


def test_the_backend_is_an_entry_point_that_loads() -> None:
    from torch._dynamo import list_backends

    (entry,) = _installed().entry_points.select(group="torch_dynamo_backends")
    assert (entry.name, entry.value) == ("poetx", TARGET)
    assert callable(entry.load())
    assert "poetx" in list_backends()


def test_the_metadata_say_what_the_project_says() -> None:
    metadata = _installed().metadata
    assert metadata["Name"] == "poetx-compile"
    assert metadata["Version"] == PROJECT["project"]["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {"test", "examples"}


def test_the_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(PROJECT['project']['version'])}\]", changelog, re.M)


def test_every_module_imports_without_triton_or_a_gpu(tmp_path: Path) -> None:
    modules = sorted(
        f"{package}.{f.stem}" if f.stem != "__init__" else package
        for package in PACKAGES
        for f in (
            ROOT / "passes"
            if package == "poetx_compile.passes"
            else ROOT / package.replace(".", "/")
        ).glob("*.py")
        # The kernels themselves are written in Triton and imported where it is; two hosts are not
        # installed here.
        if f.stem not in ("axolotl", "torchtitan")
        and (package != "poetx_compile.ops.kernels" or f.stem == "__init__")
    )
    code = (
        "import sys, importlib\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "import torch, poetx_compile.ops as ops\n"
        "print(ops.cayley_neumann(torch.zeros(1, 1), 2, 3).tolist())\n"
    )
    out = _run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""
    )
    assert out.strip() == "[[[1.0, 0.0], [0.0, 1.0]]]"


def test_importing_the_package_loads_little_more_than_torch(imported: list[str]) -> None:
    loaded, late, *_ = imported
    modules = ast.literal_eval(loaded)
    kernels = "poetx_compile.ops.kernels"
    assert [m for m in modules if m.startswith(kernels)] == [
        kernels,
        f"{kernels}.common",
        f"{kernels}.early",
        f"{kernels}.low_precision",
    ]
    # Neither Dynamo nor Inductor, nor what they load: sympy, Triton.
    assert {m.partition(".")[0] for m in modules} == {"poetx_compile"}
    assert late == "poetx_compile.inspect.explain poetx_compile.compile.backend"


def test_no_public_name_hides_a_module() -> None:
    # `import poetx_compile.explain as x` must not give what is no module. The ops are an exception
    # that is meant: each is in the module of its name, and `poetx_compile.ops.rotate_blocks` is it.
    for package in {*PACKAGES} - {"poetx_compile.ops", "poetx_compile.ops.kernels"}:
        module = importlib.import_module(package)
        for found in pkgutil.iter_modules(module.__path__):
            full = f"{package}.{found.name}"
            assert getattr(module, found.name, None) in (None, sys.modules.get(full)), full


def test_the_readme_commands_are_one_line_each() -> None:
    # `.ci/run` reads the commands from there.
    readme = (ROOT / "README.md").read_text()
    for name, part in (("run", "examples/pretrain.py"), ("test", "-m pytest")):
        found = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", readme, re.S)
        assert len(found) == 1, name
        assert "\n" not in found[0]
        assert part in found[0]
        assert "-c constraints.txt" in found[0]
