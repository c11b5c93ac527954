"""A short part of `matrix` in every run: tests that once held on some processors only, under settings that differ."""

import subprocess
import sys

import pytest
from longer import one_in
from processors.matrix import ROOT, SETTINGS, environment, missing, used

SHORT = ("MKL compatible", "MKL as on Intel, SSE4.2", "ATen default")
TESTS = ("tests/measures/test_spectrum.py", "tests/adapters/test_adapters.py", "tests/merging/test_tiles.py")
NAMED = "edges or nearly_cancel or two_per_cent"


@pytest.mark.parametrize("name", one_in(len(SHORT), SHORT))
def test_numbers_hold_elsewhere(name: str) -> None:
    if reason := missing(SETTINGS[name]):
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numerical", "-p", "no:cacheprovider", "-k", NAMED, *TESTS]
    done = subprocess.run(command, env=environment(SETTINGS[name]), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_what_is_used_is_known_and_is_the_same_twice() -> None:
    usual = used("as it is")
    assert usual.keys() == {"mkl", "onednn", "threads", "library", "instructions", "sums"}
    used.cache_clear()
    assert used("as it is") == usual
    assert used("4 threads") == usual | {"threads": "4"}


def test_a_setting_that_the_processor_lacks_is_said() -> None:
    flags = [name for name in SETTINGS if "AVX-512" in name]
    assert len({missing(SETTINGS[name]) for name in flags}) == 1
    assert not missing(SETTINGS["MKL compatible"])
