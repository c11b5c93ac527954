"""The safetensors header: what is read, and how every kind of damage is named."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import safetensors_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from d2surgery.errors import D2SurgeryError
from d2surgery.files.checkpoints import find_weights, read_checkpoint_header
from d2surgery.files.header import read_header
from d2surgery.files.reading import read_json


def raw(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: Any = 0, stop: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def codes(error: pytest.ExceptionInfo[D2SurgeryError]) -> set[str]:
    return {problem.code for problem in error.value.problems}


BAD_FILES = [  # (name, bytes, code, part of the message)
    ("empty", b"", "FILE_EMPTY", "no bytes"),
    ("lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS_POINTER", "LFS"),
    ("zip", b"PK\x03\x04" + bytes(60), "NOT_SAFETENSORS", "zip"),
    ("pickle", b"\x80\x02}q\x00." + bytes(60), "NOT_SAFETENSORS", "pickle"),
    ("gguf", b"GGUF" + bytes(60), "NOT_SAFETENSORS", "GGUF"),
    ("web page", b"<!DOCTYPE html><html>", "NOT_SAFETENSORS", "web page"),
    ("shorter than a length", b"\x10\x00", "TRUNCATED_FILE", "shorter"),
    ("absurd length", struct.pack("<Q", 2**60) + b"{}", "CORRUPT_HEADER", "absurd"),
    ("ends in the header", struct.pack("<Q", 100) + b'{"a":', "TRUNCATED_FILE", "inside its header"),
    ("not JSON", raw(b"{nope}"), "CORRUPT_HEADER", "not JSON"),
    ("not UTF-8", raw(b'{"\xff": 1}'), "CORRUPT_HEADER", "not JSON"),
    ("UTF-16", raw('{"a": {}}'.encode("utf-16")), "CORRUPT_HEADER", "not JSON"),
    ("nested without end", raw(b"[" * 100_000), "CORRUPT_HEADER", "not JSON"),
    ("a list", raw(b"[]"), "CORRUPT_HEADER", "object"),
    ("metadata of numbers", raw({"__metadata__": {"a": 1}}), "CORRUPT_HEADER", "__metadata__"),
    ("metadata a list", raw({"__metadata__": ["a"]}), "CORRUPT_HEADER", "__metadata__"),
    ("twice", raw(b'{"a": 1, "b": 2, "a": 1}'), "DUPLICATE_KEY", "a stands twice"),
    ("entry a number", raw({"a": 1}), "BAD_TENSOR_ENTRY", "wanted dtype"),
    ("no shape", raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "BAD_TENSOR_ENTRY", "wanted dtype"),
    ("one offset", raw({"a": {**entry(), "data_offsets": [0]}}, bytes(8)), "BAD_TENSOR_ENTRY", "two data_offsets"),
    ("unknown dtype", raw({"a": entry(dtype="F33")}, bytes(8)), "BAD_TENSOR_ENTRY", "unknown dtype"),
    ("dtype a list", raw({"a": entry(dtype=["F32"])}, bytes(8)), "BAD_TENSOR_ENTRY", "wanted dtype"),
    ("negative size", raw({"a": entry(shape=[-2])}, bytes(8)), "BAD_TENSOR_ENTRY", "not counts"),
    ("size true", raw({"a": entry(0, 4, shape=[True])}, bytes(4)), "BAD_TENSOR_ENTRY", "not counts"),
    ("size a fraction", raw({"a": entry(shape=[2.0])}, bytes(8)), "BAD_TENSOR_ENTRY", "not counts"),
    ("stops before it starts", raw({"a": entry(8, 0)}, bytes(8)), "BAD_TENSOR_ENTRY", "not counts"),
    ("span and shape differ", raw({"a": entry(0, 12)}, bytes(12)), "BAD_TENSOR_ENTRY", "needs 8 bytes"),
    ("overlap", raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "BAD_TENSOR_ENTRY", "overlaps"),
    ("gap", raw({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "BAD_TENSOR_ENTRY", "nobody owns"),
    ("gap at the start", raw({"a": entry(4, 12)}, bytes(12)), "BAD_TENSOR_ENTRY", "nobody owns"),
    ("data cut", raw({"a": entry()}, bytes(7)), "TRUNCATED_FILE", "before its tensors"),
    ("bytes too many", raw({"a": entry()}, bytes(9)), "BAD_TENSOR_ENTRY", "after the last"),
]


@pytest.mark.parametrize(("data", "code", "part"), [row[1:] for row in BAD_FILES], ids=[row[0] for row in BAD_FILES])
def test_damage_is_named_with_the_file_it_is_in(tmp_path: Path, data: bytes, code: str, part: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(D2SurgeryError) as error:
        read_header(path)
    assert codes(error) == {code}
    assert part in str(error.value)
    assert str(path) in str(error.value)


def test_every_bad_entry_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({name: entry(dtype="F33") for name in "abc"}, bytes(24)))
    with pytest.raises(D2SurgeryError) as error:
        read_header(path)
    assert [problem.module for problem in error.value.problems] == ["a", "b", "c"]


def test_a_missing_file_and_a_directory_have_codes_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError) as missing:
        read_header(tmp_path / "no")
    with pytest.raises(D2SurgeryError) as directory:
        read_header(tmp_path)
    assert (codes(missing), codes(directory)) == ({"FILE_MISSING"}, {"FILE_UNREADABLE"})


@pytest.mark.parametrize("length", [60, 316, 640, 640 + 65536])
def test_a_length_that_looks_like_another_format_is_a_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(b"{}".ljust(length)))
    assert dict(read_header(path).tensors) == {}


def test_names_shapes_and_bytes_are_those_that_safetensors_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U8": torch.uint8,
    }
    tensors = {f"t.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in dtypes.items()}
    tensors["scalar"], tensors["none"] = torch.tensor(1.5), torch.zeros(0, 4)
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    data = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert data[info.start : info.stop] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert info.nbytes == tensor.nbytes
    assert {name.removeprefix("t."): i.dtype for name, i in header.tensors.items() if "." in name} == {
        d: d for d in dtypes
    }


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_our_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except D2SurgeryError:
        return
    assert sum(info.nbytes for info in header.tensors.values()) <= len(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={"dtype": JSON | st.just("F32"), "shape": JSON | st.just([2]), "data_offsets": JSON | st.just([0, 8])}
)


@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=4), st.binary(max_size=16))
def test_random_headers_raise_nothing_but_our_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw(header, data))
    try:
        read = read_header(path)
    except D2SurgeryError:
        return
    assert set(read.tensors) == set(header) - {"__metadata__"}
    assert sum(info.nbytes for info in read.tensors.values()) == len(data)


# Checkpoints of several files -----------------------------------------------------------------------------------------


def checkpoint(directory: Path, weight_map: Any, **shards: dict[str, tuple[int, ...]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, shapes in shards.items():
        (directory / f"{name}.safetensors").write_bytes(safetensors_bytes(shapes))
    return directory


def test_shards_read_as_one(tmp_path: Path) -> None:
    weight_map = {"a": "x.safetensors", "b": "y.safetensors"}
    header = read_checkpoint_header(checkpoint(tmp_path, weight_map, x={"a": (2,)}, y={"b": (3,)}))
    assert {name: (info.file.name, info.shape) for name, info in header.tensors.items()} == {
        "a": ("x.safetensors", (2,)),
        "b": ("y.safetensors", (3,)),
    }


def test_one_file_needs_no_index_and_model_safetensors_goes_first(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(safetensors_bytes({"o": (1,)}))
    assert list(read_checkpoint_header(tmp_path).tensors) == ["o"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"m": (1,)}))
    assert list(read_checkpoint_header(tmp_path).tensors) == ["m"]


BAD_CHECKPOINTS = [  # (weight_map, shards, code, part)
    ({"a": "x.safetensors"}, {}, "MISSING_SHARD", "x.safetensors"),
    ({"a": "x.safetensors", "b": "x.safetensors"}, {"x": {"a": (2,)}}, "MISSING_SHARD", "b is not in"),
    (
        {"a": "x.safetensors", "b": "y.safetensors"},
        {"x": {"a": (2,)}, "y": {"a": (2,), "b": (1,)}},
        "DUPLICATE_KEY",
        "two shards",
    ),
    ({}, {}, "BAD_BASE", "no weight_map"),
    ([], {}, "BAD_BASE", "no weight_map"),
    ({"a": 1}, {}, "BAD_BASE", "not the name"),
    ({"a": "../x.safetensors"}, {}, "BAD_BASE", "not the name"),
]


@pytest.mark.parametrize(("weight_map", "shards", "code", "part"), BAD_CHECKPOINTS)
def test_a_broken_index_is_named(tmp_path: Path, weight_map: Any, shards: Any, code: str, part: str) -> None:
    with pytest.raises(D2SurgeryError, match=part) as error:
        read_checkpoint_header(checkpoint(tmp_path, weight_map, **shards))
    assert codes(error) == {code}


def test_every_broken_shard_is_listed(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(D2SurgeryError) as error:
        read_checkpoint_header(tmp_path)
    assert codes(error) == {"FILE_EMPTY", "MISSING_SHARD"}


def test_what_is_no_model_directory_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match="an empty directory"):
        read_checkpoint_header(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(D2SurgeryError, match="pytorch_model"):
        read_checkpoint_header(tmp_path)
    with pytest.raises(D2SurgeryError, match="not a directory"):
        read_checkpoint_header(tmp_path / "no")


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_no_object_is_a_bad_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(D2SurgeryError) as error:
        read_json(tmp_path / "c.json")
    assert codes(error) == {"BAD_CONFIG"}


def test_json_that_is_not_there_or_not_readable_says_so(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError) as missing:
        read_json(tmp_path / "no.json")
    with pytest.raises(D2SurgeryError) as directory:
        read_json(tmp_path)
    assert (codes(missing), codes(directory)) == ({"FILE_MISSING"}, {"FILE_UNREADABLE"})


# Which of several weights count --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["model.safetensors", "model.safetensors.index.json", "x.safetensors"], "model.safetensors"),
        (["model.safetensors.index.json", "x.safetensors", "pytorch_model.bin"], "model.safetensors.index.json"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json", "x.bin"], "pytorch_model.bin"),
        (["weights.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["consolidated.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["diffusion_pytorch_model.safetensors", "x.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
    ],
)
def test_transformers_order_decides(tmp_path: Path, files: list[str], found: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    weights = find_weights(tmp_path)
    assert (weights and weights.name) == found


def test_the_config_may_name_the_weights_but_not_outside_the_directory(tmp_path: Path) -> None:
    for name in ("model.safetensors", "mine.safetensors"):
        (tmp_path / name).touch()
    for said, found in (("mine.safetensors", "mine.safetensors"), ("../mine.safetensors", "model.safetensors")):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": said}))
        assert find_weights(tmp_path) == tmp_path / found


def test_an_index_beside_a_single_file_is_said_and_not_read(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a": "x.safetensors"}, x={"a": (2,)}, model={"a": (3,)})
    header = read_checkpoint_header(tmp_path)
    assert header.tensors["a"].shape == (3,)
    assert [(p.code, p.severity) for p in header.problems] == [("TWO_SETS_OF_WEIGHTS", "warning")]
    checkpoint(tmp_path, {"a": "model.safetensors"})
    assert read_checkpoint_header(tmp_path).problems == ()


def test_what_transformers_makes_of_a_wrong_index(tmp_path: Path) -> None:
    weight_map = {"a": "x.safetensors", "b": "x.safetensors"}
    checkpoint(tmp_path, weight_map | {"c": "y.safetensors"}, x={"a": (2,)}, y={"a": (4,), "b": (3,), "c": (1,)})
    header = read_checkpoint_header(tmp_path, as_loaded=True)
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (4,), "b": (3,), "c": (1,)}
    assert {problem.code for problem in header.problems} == {"INDEX_DISAGREES"}
    with pytest.raises(D2SurgeryError, match="gone is not in"):
        read_checkpoint_header(checkpoint(tmp_path, weight_map | {"gone": "y.safetensors"}), as_loaded=True)
