"""The readers of bytes under atheris, which follows what their code does: `python tests/fuzz/run.py --atheris 60`."""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["d2surgery"]):
    from d2surgery.errors import D2SurgeryError
    from d2surgery.evaluating.items import read_items
    from d2surgery.files.header import read_header
    from d2surgery.files.pickled import read_pickled
    from d2surgery.files.unpickling import unpickle
    from d2surgery.formats.patterns import BadExpression, Matcher


def run(seconds: int) -> None:
    """Until the time is up or something foreign is raised, which atheris shows with the bytes that did it."""
    folder = Path(tempfile.mkdtemp(prefix="d2surgery-fuzz-"))

    def one(data: bytes) -> None:
        path = folder / "x"
        path.write_bytes(data)
        for read in (read_header, read_pickled, read_items):
            with contextlib.suppress(D2SurgeryError):
                read(path)
        with contextlib.suppress(ValueError):
            unpickle(data)
        expression, _, name = data.decode(errors="replace").partition("\n")
        with contextlib.suppress(BadExpression, D2SurgeryError):
            Matcher().fits(expression, name)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1500"], one)
    atheris.Fuzz()
