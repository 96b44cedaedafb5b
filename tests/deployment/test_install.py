"""payready is installed as the README says: from a checkout, never as a package."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from demo.processes import ROOT

pytestmark = pytest.mark.slow

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
FROM_HERE = ["--quiet", "--no-deps", "--no-build-isolation"]


def _copy_checkout(target: Path) -> Path:
    """Copy the files that git would check out: an install writes into its folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.mark.parametrize("command", ["wheel", "install"])
def test_package_is_refused_with_one_sentence(tmp_path: Path, command: str) -> None:
    """A package would be incomplete, and would install modules named `config`, `tasks` and `worker`."""
    checkout, empty = _copy_checkout(tmp_path / "checkout"), tmp_path / "empty"
    empty.mkdir()
    targets = {"wheel": ["--wheel-dir", "."], "install": ["--target", "."]}
    pip = [*PIP, command, *FROM_HERE, *targets[command], str(checkout)]
    refused = subprocess.run(pip, cwd=empty, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "payready cannot be built as a package: run it from a checkout" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert list(empty.iterdir()) == []


def test_editable_install_provides_the_command_in_any_folder(tmp_path: Path) -> None:
    checkout, empty, venv = _copy_checkout(tmp_path / "checkout"), tmp_path / "empty", tmp_path / "venv"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next((venv / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [*PIP, "--python", str(venv / "bin" / "python"), "install", *FROM_HERE, "--editable", str(checkout)]
    subprocess.run(pip, cwd=empty, check=True)
    script = "import cli, tasks.app, worker.flow; print(cli.__file__)"
    python = [str(venv / "bin" / "python"), "-c", script]
    imported = subprocess.run(python, cwd=empty, capture_output=True, text=True, check=True).stdout
    assert Path(imported.strip()).is_relative_to(checkout)
    assert subprocess.run([str(venv / "bin" / "payready"), "--help"], cwd=empty, check=True, stdout=subprocess.PIPE)
