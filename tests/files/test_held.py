"""Files as they were found: read from one descriptor, told when they are others."""

import copy
import gc
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2surgery.files.base import BaseWeights
from d2surgery.files.header import read_header
from d2surgery.files.held import Held, Seen, changes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"0123456789")
    return tmp_path / "file"


def put(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.unlink(), "is gone"),
        (lambda path: put(path, b"0123456789"), "replaced"),
        (lambda path: path.write_bytes(b"9876543210"), "written"),
        (lambda path: os.truncate(path, 3), "written"),
        (lambda path: (path.rename(path.with_name("other")), path.symlink_to("nothing")), "is gone"),
        (lambda path: (path.parent.rename(f"{path.parent} moved"), path.parent.write_text("")), "is gone"),
        (lambda path: None, ""),
        (lambda path: path.read_bytes(), ""),
    ],
    ids=["deleted", "renamed over", "in place", "cut", "dangling", "directory gone", "nothing", "read"],
)
@pytest.mark.parametrize("kind", [Seen, Held])
def test_what_became_of_a_file_is_told(file: Path, kind: Any, change: Callable[[Path], Any], told: str) -> None:
    found, times = kind(file), file.stat()
    change(file)
    if file.exists():
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns)) if told else None
    problems = changes([found], "BASE_CHANGED")
    assert len(problems) == bool(told)
    for problem in problems:
        assert told in problem.message
        assert problem.file == str(file)


def test_a_link_that_leads_elsewhere_now_is_told(file: Path) -> None:
    put(file.with_name("other"), file.read_bytes())
    link = file.with_name("link")
    link.symlink_to("file")
    held = Held(link)
    link.unlink()
    link.symlink_to("other")
    assert held.change() == "was replaced"
    assert held.read(3, 4) == b"456"


def test_what_is_held_is_read_whatever_takes_its_name(file: Path) -> None:
    held = Held(file)
    put(file, b"another")
    assert (held.read(100, 0), held.read(2, 9), held.read(1, 10)) == (b"0123456789", b"9", b"")


def test_a_descriptor_lives_as_long_as_what_holds_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    header = read_header(tmp_path / "model.safetensors")
    (held,) = header.seen
    assert isinstance(held, Held)
    fd, twin = held.fd, pickle.loads(pickle.dumps(held))
    again = copy.deepcopy(header)
    assert len({fd, twin.fd, again.tensors["a"].held.fd if again.tensors["a"].held else fd}) == 3
    del held, header
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert os.fstat(twin.fd).st_size


def test_a_model_of_more_shards_than_a_process_may_open_by_default_is_opened(tmp_path: Path) -> None:
    for i in range(40):
        save_file({f"w{i}": torch.full((2,), float(i))}, tmp_path / f"model-{i}.safetensors")
    weight_map = ", ".join(f'"w{i}": "model-{i}.safetensors"' for i in range(40))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 10, limits[1]))  # noqa: PTH208
    try:
        base = BaseWeights(tmp_path)
        assert all(base[f"w{i}"].tolist() == [i, i] for i in range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
