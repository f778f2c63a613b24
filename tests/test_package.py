"""The package as installed: wheel, sdist and editable, used from outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Run in a fresh process from an empty folder: the three packages are there, and the guard of the folder's own name holds.
PROBE = """
import importlib, sys
import bptoolkit as bp
assert "torch._dynamo" not in sys.modules, "importing bptoolkit imported Dynamo"
assert sys.modules.get("triton") is None, "importing bptoolkit imported Triton"
assert sys.modules.get("lightning") is None, "importing bptoolkit imported Lightning"
import bptoolkit.triton_kernels, bptoolkit.recipes, torch
x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
torch.autograd.grad(bp.functional.linear(x, w), (x, w), torch.randn(4, 5))
assert importlib.resources.files("bptoolkit").joinpath("py.typed").is_file()
print(bp.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a clean copy of the sources."""
    source, out = tmp_path_factory.mktemp("source") / "s", tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, source, cwd=out)
    return source, out


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, but not its bptoolkit."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    parent = run(sys.executable, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])", cwd=tmp_path)
    # an entry in a .pth file comes after the environment's own packages, and its own .pth files are not read
    (site / "parent.pth").write_text(parent)
    return python, tmp_path


def install(python: Path, *what: object, cwd: Path) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        *what,
        cwd=cwd,
    )


def test_wheel(built, environment):
    _, out = built
    python, elsewhere = environment
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "bptoolkit/triton_kernels/__init__.py" in names
    assert "bptoolkit/recipes/__init__.py" in names
    assert "bptoolkit/py.typed" in names
    tops = {n.split("/")[0] for n in names if not n.startswith("bptoolkit-")}
    assert tops == {"bptoolkit", "bptoolkit_pytest.py"}, tops
    install(python, wheel, cwd=elsewhere)
    assert str(elsewhere) in run(python, "-c", PROBE, cwd=elsewhere)
    assert "linear" in run(python, "-m", "bptoolkit", "ops", cwd=elsewhere)
    assert "0.1" in run(python.parent / "bptoolkit", "--version", cwd=elsewhere)


def test_sdist(built, environment):
    _, out = built
    python, elsewhere = environment
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(n.endswith("/triton_kernels/__init__.py") for n in names)
    assert any(n.endswith("/LICENSE") for n in names)
    install(python, sdist, cwd=elsewhere)
    assert str(elsewhere) in run(python, "-c", PROBE, cwd=elsewhere)


def test_editable(built, environment):
    source, _ = built
    python, elsewhere = environment
    install(python, "--editable", source, cwd=elsewhere)
    assert str(source) in run(python, "-c", PROBE, cwd=elsewhere)
    (source / "triton_kernels" / "fresh.py").write_text("ANSWER = 42\n")  # new files are seen at once
    assert "42" in run(python, "-c", "import bptoolkit.triton_kernels.fresh as f; print(f.ANSWER)", cwd=elsewhere)


def test_the_folder_is_not_the_other_triton_kernels():
    """From the root of a checkout, `import triton_kernels` must not pass for triton-lang's package of that name."""
    done = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "bptoolkit.triton_kernels" in done.stderr


def test_packages_are_listed():
    """Mapped packages must be named one by one, or an editable install lacks them."""
    mapping = CONFIG["tool"]["setuptools"]["package-dir"]
    for package in CONFIG["tool"]["setuptools"]["packages"]:
        assert (ROOT / mapping.get(package, package.replace(".", "/")) / "__init__.py").is_file()
    listed = set(CONFIG["tool"]["setuptools"]["packages"])
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "bptoolkit").rglob("__init__.py")}
    assert found <= listed


def test_works_without_triton_and_lightning():
    code = "import sys; sys.modules['triton'] = sys.modules['lightning'] = None\n" + PROBE
    run(sys.executable, "-c", code, cwd=ROOT.parent)


def test_op_names_agree_with_the_files():
    from bptoolkit.ops import NAMES

    files = {p.stem for p in (ROOT / "bptoolkit" / "ops").glob("*.py")} - {"__init__"}
    assert set(NAMES) <= files
    text = ROOT / "bptoolkit" / "ops"
    for stem in files - set(NAMES):
        assert "OPS = (" not in (text / f"{stem}.py").read_text(), f"{stem} states ops but is not in NAMES"


def test_every_public_name_is_exported():
    import bptoolkit as bp

    for name, op in bp.OPS.items():
        assert getattr(bp.functional, name) is op.call, f"bptoolkit/functional.py lacks: from ... import {name} as {name}"
        for module in op.module:
            assert getattr(bp.nn, module.__name__) is module, f"bptoolkit/nn.py lacks {module.__name__}"
