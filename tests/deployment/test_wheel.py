"""The wheel contains every module and data file of the production code."""

import subprocess
import sys
import zipfile
from pathlib import Path

from demo.processes import ROOT

PACKAGES = ("cli", "config", "demo", "simulator", "tasks", "webhook", "worker")


def test_wheel_contains_every_production_file(tmp_path: Path) -> None:
    """An editable install and the image do not show a package that is missing in the wheel."""
    sources = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*")]
    needed = {str(path) for path in sources if path.suffix in (".py", ".lua", ".toml")}
    copy = tmp_path / "source"
    for name in [*needed, "pyproject.toml", "README.md", "LICENSE"]:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert needed - set(archive.namelist()) == set()
