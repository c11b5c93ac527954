"""What torch.save wrote is read as torch reads it, and what it did not write is refused."""

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2surgery.errors import D2SurgeryError
from d2surgery.files.pickled import locate_pickled, read_pickled
from d2surgery.files.unpickling import unpickle

WHOLE = torch.arange(24.0).reshape(6, 4)
STATE: dict[str, torch.Tensor] = {
    "whole": WHOLE,
    "turned": WHOLE.T,
    "rows": WHOLE[1:3],
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3),
    "bf16": torch.randn(4).bfloat16(),
    "flags": torch.tensor([True, False]),
}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}],
    ids=str,
)
@pytest.mark.parametrize("table", [dict, OrderedDict, lambda state: torch.nn.Linear(3, 5).state_dict() | state])
def test_every_tensor_is_the_one_that_was_saved(tmp_path: Path, options: Any, table: Callable[[Any], Any]) -> None:
    state = table(STATE)
    (tmp_path / "x.bin").write_bytes(saved(state, **options))
    found = read_pickled(tmp_path / "x.bin")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_float8_has_a_form_of_its_own(tmp_path: Path) -> None:
    tensor = torch.randn(8).to(torch.float8_e4m3fn)
    torch.save({"a": tensor}, tmp_path / "x.bin")
    assert torch.equal(read_pickled(tmp_path / "x.bin")["a"].float(), tensor.float())


def again(data: bytes, change: Callable[[str, bytes], bytes], **options: Any) -> bytes:
    """The archive written anew by Python, every record changed by a function of its name and bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def cut(name: str, record: bytes) -> bytes:
    return record[:-8] if name.endswith("/data/0") else record


def longer(name: str, record: bytes) -> bytes:
    return record + bytes(64) if name.endswith("/data/0") else record


def big_endian(name: str, record: bytes) -> bytes:
    return b"big" if name.endswith("byteorder") else record


def dropped(data: bytes) -> bytes:
    """The archive without one storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith("/data/0"):
                new.writestr(name, old.read(name))
    return buffer.getvalue()


def moved(data: bytes) -> bytes:
    """The table of the archive says that the last storage lies where the first does."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        one, other = (next(e for e in archive.infolist() if e.filename.endswith(f"/data/{n}")) for n in (0, 1))
        table = archive.start_dir
    old, new = (struct.pack("<I", entry.header_offset) for entry in (other, one))
    at = data.index(b"/data/1", table) - len("archive") - 4
    assert data[at : at + 4] == old
    return data[:at] + new + data[at + 4 :]


DAMAGE = [  # (what happens to the file, part of the message)
    (lambda data: again(data, cut), "has 88 bytes and should have 96"),
    (lambda data: again(data, longer), "has 160 bytes and should have 96"),
    (lambda data: again(data, lambda name, record: record, compression=zipfile.ZIP_DEFLATED), "compressed"),
    (lambda data: again(data, lambda name, record: record, compression=zipfile.ZIP_LZMA), "compressed"),
    (lambda data: again(data, big_endian), "highest byte"),
    (dropped, "not in the file"),
    (moved, "another name"),
    (lambda data: data[:-30], "cut"),
    (lambda data: data[: len(data) // 2], "cut"),
]


@pytest.mark.parametrize(("damage", "part"), DAMAGE)
def test_a_record_that_is_not_what_the_pickle_says_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], part: str
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(damage(saved({"a": WHOLE, "b": torch.ones(3)})))
    for read in (read_pickled, locate_pickled):
        with pytest.raises(D2SurgeryError, match=part) as error:
            read(path)
        assert {problem.code for problem in error.value.problems} == {"PICKLE"}


@pytest.mark.parametrize("left", [8, 40, 100, 300])
def test_the_old_form_cut_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(saved({"a": WHOLE, "b": torch.ones(3)}, _use_new_zipfile_serialization=False)[:-left])
    with pytest.raises(D2SurgeryError) as error:
        read_pickled(path)
    assert {problem.code for problem in error.value.problems} == {"PICKLE"}


@pytest.mark.parametrize(
    "stored",
    [torch.ones(1).expand(1000), torch.as_strided(torch.ones(8), (4, 4), (1, 1))],
    ids=["expanded", "overlapping"],
)
def test_a_tensor_larger_than_its_memory_is_refused(tmp_path: Path, stored: torch.Tensor) -> None:
    torch.save({"a": stored}, tmp_path / "x.bin")
    with pytest.raises(D2SurgeryError, match="leaves its memory"):
        read_pickled(tmp_path / "x.bin")


TEXTS = [  # (pickle, part of the message)
    (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
    (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "builtins.bytearray"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    (b"\x80\x02" + b"]" * 1_000_000 + b".", "stack"),
    (b"\x80\x02N" + b"\x85" * 200_000 + b"q\x00}h\x00Ns.", "by something else than names"),
    (b"\x80\x02" + b"]](" * 1_500_000 + b".", "stack"),
    (b"\x80\x02(" * 2_000_000, "steps|end"),
    (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "twice"),
    (b"\x80\x02i.", "which tensors need not"),
    (b"\x80\x02R.", "nothing is there"),
    (b"\x80\x02h\x07.", "damaged"),
    (b"\x80\x02X\xff\xff\xff\xffabc.", "ends before"),
    (b"\x80\x02e.", "damaged"),
    (b"\x80\x02ctorch\nSize\n(K\x01J\xff\xff\xff\xfft\x85R.", "no count"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "part"), TEXTS)
def test_a_pickle_is_read_and_never_run(text: bytes, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        unpickle(text)
