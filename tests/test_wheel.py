"""The wheel: built, unpacked into an empty folder and run from another one, where the checkout cannot be imported."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from measuring import write_adapter

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="pip install hatchling")
def test_the_wheel_holds_all_that_the_verbs_need(tmp_path: Path) -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a checkout")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    write_adapter(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"}
    for words in (
        ["-c", "import d2surgery; print(d2surgery.__file__)"],
        ["-m", "d2surgery", "inspect", "../lora"],
        ["-m", "d2surgery", "report", "../lora", "--out", "page.html"],
        ["-m", "d2surgery", "explain", "entropy_rank"],
        ["-m", "d2surgery", "completion", "fish"],
        ["-c", "from d2surgery.reporting.audit_files import schema; schema()"],
    ):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr[-2000:])
        if "__file__" in words[-1]:
            assert str(tmp_path / "installed") in done.stdout
    assert (tmp_path / "empty" / "page.html").stat().st_size > 1_000_000
