"""A short campaign of kills, as `kills.py` runs a long one, in a process of its own: it forks."""

import subprocess
import sys
from pathlib import Path

KILLS = Path(__file__).with_name("kills.py")


def test_merges_that_are_killed_and_resumed_are_those_of_an_undisturbed_machine() -> None:
    done = subprocess.run(
        [sys.executable, KILLS, "--merges", "12", "--runs", "0"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
