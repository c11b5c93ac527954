"""GGUF headers and NumPy archives by their bytes: what is damaged is refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
import toy_llama

from d2surgery.errors import D2SurgeryError
from d2surgery.files.gguf import read_gguf
from d2surgery.files.npz import read_npz

FIELDS = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.lora.alpha": 4.0}
ARRAYS = {"blk.0.attn_q.weight.lora_a": toy_llama.numbers(2, 8, seed=1)}


def gguf(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "x.gguf").write_bytes(data)
    return tmp_path / "x.gguf"


def code(error: pytest.ExceptionInfo[D2SurgeryError]) -> str:
    return error.value.problems[0].code


def test_a_header_is_read(tmp_path: Path) -> None:
    header = read_gguf(gguf(tmp_path, toy_llama.gguf_bytes(FIELDS, ARRAYS)))
    assert dict(header.metadata) == {name: str(value) for name, value in FIELDS.items()}
    ((name, info),) = header.tensors.items()
    assert (name, info.dtype, info.shape) == ("blk.0.attn_q.weight.lora_a", "F32", (2, 8))


def test_arrays_of_fields_are_passed_over(tmp_path: Path) -> None:
    data = toy_llama.gguf_bytes({"aaa": "x"}, ARRAYS)
    array = struct.pack("<IIQ", 9, 8, 2) + 2 * (struct.pack("<Q", 3) + b"abc")
    text = struct.pack("<I", 8) + struct.pack("<Q", 1) + b"x"
    longer = data.replace(text, array)
    pad = -len(longer[: len(data) - 64 + len(array) - len(text)]) % 32
    header = read_gguf(gguf(tmp_path, longer[:-64] + bytes(pad + 32) + longer[-64:]))
    assert header.metadata["aaa"] == "2 values"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda data: data[:100], "CORRUPT_HEADER"),
        (lambda data: data[:-8], "TRUNCATED_FILE"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "CORRUPT_HEADER"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "CORRUPT_HEADER"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "CORRUPT_HEADER"),
        (lambda data: data.replace(struct.pack("<I", 6) + struct.pack("<f", 4.0), struct.pack("<Iff", 99, 0, 0)[:8]),
         "CORRUPT_HEADER"),
        (lambda data: data.replace(b"qwen2", b"\xff\xfe\xff\xfe\xff"), "CORRUPT_HEADER"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path: Path, change: object, wanted: str) -> None:
    data = change(toy_llama.gguf_bytes(FIELDS, ARRAYS))  # type: ignore[operator]
    with pytest.raises(D2SurgeryError) as error:
        read_gguf(gguf(tmp_path, data))
    assert code(error) == wanted


def test_two_tensors_of_one_name_and_a_quantised_type_are_refused(tmp_path: Path) -> None:
    data = toy_llama.gguf_bytes(
        FIELDS, {"a": ARRAYS["blk.0.attn_q.weight.lora_a"], "b": toy_llama.numbers(2, 8, seed=2)}
    )
    twice = data.replace(struct.pack("<Q", 1) + b"b", struct.pack("<Q", 1) + b"a")
    with pytest.raises(D2SurgeryError) as error:
        read_gguf(gguf(tmp_path, twice))
    assert code(error) == "DUPLICATE_KEY"
    other = data.replace(struct.pack("<QQIQ", 8, 2, 0, 0), struct.pack("<QQIQ", 8, 2, 12, 0))
    with pytest.raises(D2SurgeryError) as error:
        read_gguf(gguf(tmp_path, other))
    assert code(error) == "DTYPE_UNEXPECTED"


def test_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((2, 3), np.float32), b=np.arange(4))
    header = read_npz(tmp_path / "x.npz")
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)), "b": ("I64", (4,))
    }  # fmt: skip
    info = header.tensors["a"]
    assert (tmp_path / "x.npz").read_bytes()[info.start : info.stop] == np.ones(6, np.float32).tobytes()


def test_what_is_no_stored_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.ones(100))
    with pytest.raises(D2SurgeryError) as error:
        read_npz(path)
    assert code(error) == "BAD_TENSOR_ENTRY"
    np.savez(path, a=np.array([object()], dtype=object))
    with pytest.raises(D2SurgeryError) as error:
        read_npz(path)
    assert code(error) == "BAD_TENSOR_ENTRY"
    np.savez(path, a=np.asfortranarray(np.ones((2, 3))))
    with pytest.raises(D2SurgeryError) as error:
        read_npz(path)
    assert code(error) == "BAD_TENSOR_ENTRY"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(D2SurgeryError) as error:
        read_npz(path)
    assert code(error) == "CORRUPT_HEADER"
