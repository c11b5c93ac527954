"""What is opened at all, and how much of it is read."""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LORA, WriteAdapter, safetensors_bytes

from d2surgery.errors import D2SurgeryError
from d2surgery.files.header import read_header
from d2surgery.files.reading import open_file, parse_json, read_json, read_small

LIMITED = """
import resource, sys, time
from d2surgery.cli import main
code = main(sys.argv[1:])
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024
print('@', code, time.process_time(), peak, file=sys.stderr)
"""


def limited(*arguments: str) -> tuple[int, float, int, str]:
    """Exit code, seconds of CPU, peak memory in MB and what stood on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    said, _, numbers = done.stderr.rpartition("@")
    code, seconds, peak = numbers.split()
    return int(code), float(seconds), int(peak), said


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


OTHERS: list[Callable[[Path], None]] = [pipe, device, bound, Path.mkdir]


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("read", [open_file, read_small, read_header, read_json])
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("x"))
    with pytest.raises(D2SurgeryError, match="not a file but a") as error:
        read(Path("x"))
    assert {problem.code for problem in error.value.problems} == {"FILE_UNREADABLE"}


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_in_an_adapters_directory_either(adapter: WriteAdapter, make: Callable[[Path], None], name: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    directory = adapter()
    if name.endswith(".bin"):
        (directory / "adapter_model.safetensors").unlink()
    (directory / name).unlink(missing_ok=True)
    monkeypatch.chdir(directory)
    make(Path(name))
    code, _, _, said = limited("inspect", ".")
    assert code == 2
    assert "FILE_UNREADABLE" in said


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BOMBS = {
    "lists in a list": b'{"a":[' + b"[]," * 10_000_000 + b"[]]}",
    "lists at the top": b"[" + b"[]," * 10_000_000 + b"[]]",
    "lists in the metadata": b'{"__metadata__":{"a":[' + b"[]," * 10_000_000 + b"[]]}}",
    "objects": b"{" + b",".join(b'"%d":{}' % at for at in range(2_000_000)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % at for at in range(2_000_000)) + b"}}",
    "depth": b'{"a":' * 400_000,
    "digits": b'{"a":' + b"9" * 30_000_000 + b"}",
    "a fraction": b'{"a":0.' + b"9" * 30_000_000,
    "other letters": b'{"\xf0\x9f\x98\x80' + b"a" * 90_000_000 + b'":0}',
    "blanks": b'{"a":' + b" " * 30_000_000 + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_made_to_fill_memory_does_not(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(header(BOMBS[name]))
    code, seconds, peak, said = limited("inspect", str(tmp_path / "x.safetensors"))
    assert (code, "CORRUPT_HEADER" in said) == (2, True)
    assert seconds < 2
    assert peak < 300


@pytest.mark.parametrize("name", BOMBS)
def test_nor_does_a_config(adapter: WriteAdapter, name: str) -> None:
    directory = adapter()
    (directory / "adapter_config.json").write_bytes(BOMBS[name])
    code, seconds, peak, said = limited("inspect", str(directory))
    assert (code, "BAD_CONFIG" in said) == (2, True)
    assert seconds < 2
    assert peak < 300


def test_as_many_tensors_as_the_largest_models_have_are_read(tmp_path: Path) -> None:
    shapes = {f"base_model.model.layers.{at}.experts.w1.lora_A.weight": (1, 1) for at in range(100_000)}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(shapes))
    assert len(read_header(tmp_path / "x.safetensors").tensors) == 100_000


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b'{"a": 1, "a": 1}', "a stands twice"),
        (b'{"a": {"b": 1, "b": 1}}', "b stands twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "\xff"}', "decode"),
        (b"[" * 50_000, "nested too deeply"),
        (b"[0" * 50_000 + b"]" * 50_000, "nested too deeply|delimiter"),
    ],
)
def test_json_that_says_two_things_or_none_is_refused(text: bytes, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse_json(text)


def test_numbers_that_are_none_are_json_to_python_and_so_to_many_configs() -> None:
    assert json.dumps(parse_json(b'{"time_step_limit": [0.0, Infinity], "x": NaN}')) == (
        '{"time_step_limit": [0.0, Infinity], "x": NaN}'
    )


def test_a_whole_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_a_config_of_a_name_twice_is_refused(adapter: WriteAdapter) -> None:
    directory = adapter()
    text = json.dumps(LORA)
    (directory / "adapter_config.json").write_text(text[:-1] + ', "r": 16}')
    with pytest.raises(D2SurgeryError, match="r stands twice"):
        read_json(directory / "adapter_config.json")
