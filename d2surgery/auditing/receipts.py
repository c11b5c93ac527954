"""A merge's receipt against the files: by sha256 only, nothing is computed again."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from d2surgery.auditing.findings import Audit, ReceiptAudit, Status, TensorAudit, Thresholds, several, verdict_of
from d2surgery.auditing.loading import directory_problems, open_merged
from d2surgery.cards import RECEIPT
from d2surgery.errors import D2SurgeryError, Problem, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import TensorInfo
from d2surgery.files.reading import read_json
from d2surgery.files.stored import read_stored
from d2surgery.formats import open_layout
from d2surgery.machine import ahead, peak_memory, workers

_PIECE = 1 << 22
_SAMPLE = 1 << 22  # bytes of the base's smallest tensors, by which another base is known where nothing else is wrong


def verify_receipt(
    merged: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Is `merged` what its d2surgery_merge.json says was written, from this base and adapter where they are given?

    Names, dtypes, shapes and bytes of every tensor, and the files beside them.

    Raises D2SurgeryError NO_RECEIPT where there is none, or one without hashes.
    """
    began = time.monotonic()
    receipt = _receipt(Path(merged))
    found = open_merged(merged)
    want, forms = receipt["outputs"]["tensors"], receipt["outputs"].get("forms")
    there = dict(_hashes(found.header.tensors, progress))
    tensors = {
        name: _tensor(name, found.header.tensors.get(name), want.get(name), there, _form(forms, name))
        for name in want | there
    }
    reasons = [
        *directory_problems(found, None),
        *_tensor_problems(tensors.values()),
        *_file_problems(Path(merged), receipt["outputs"].get("files", {})),
    ]
    checked = ["merged"]
    if base is not None:
        reasons += _base_problems(BaseWeights(base), receipt["base"]["tensors"])
        checked.append("base")
    if adapter is not None:
        reasons += _adapter_problems(adapter, receipt["adapter"]["tensors"])
        checked.append("adapter")
    unread = [f"{side}: not given" for side in ("base", "adapter") if side not in checked]
    unread += [] if isinstance(forms, dict) else ["dtypes and shapes: a receipt of an older version says none"]
    return Audit(
        verdict=verdict_of(tuple(reasons)),
        reasons=tuple(reasons),
        base=str(base or ""),
        adapter=str(adapter or ""),
        merged=str(merged),
        levels=(),
        thresholds=Thresholds(),
        recipe=None,
        modules={},
        tensors=tensors,
        not_checked=("whether the merge was right: the receipt says what was written", *unread),
        receipt=ReceiptAudit(
            checked=tuple(checked),
            tensors=len(want),
            mismatched=tuple(name for name, tensor in tensors.items() if tensor.code),
        ),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
    )


def has_receipt(directory: Path) -> bool:
    return (directory / RECEIPT).is_file()


def other_receipt(
    directory: Path, base: BaseWeights, adapter: Mapping[str, str], strength: float, *, thorough: bool
) -> Iterator[Problem]:
    """Warnings where a merged directory's receipt is of another merge than the audited one: it may say why that fails.

    adapter: sha256 by key. thorough: hash the base's tensors until one differs, not the smallest ones only.
    """
    if not has_receipt(directory):
        return
    try:
        receipt = _receipt(directory)
    except D2SurgeryError as error:
        message = f"it cannot be read: {error.problems[0].message}"
        yield Problem(code="OTHER_RECEIPT", severity="warning", message=message, file=RECEIPT)
        return
    recipe = receipt.get("recipe")
    merged_at = recipe.get("strength") if isinstance(recipe, dict) else None
    wrong = []
    want = receipt["adapter"]["tensors"]
    if want and any(want.get(key) != adapter.get(key) for key in want | adapter):
        wrong.append("another adapter")
    if merged_at is not None and merged_at != strength:
        wrong.append(f"strength {merged_at}")
    if _is_other_base(base, receipt["base"]["tensors"], thorough=thorough):
        wrong.append("another base")
    if wrong:
        message = f"it names {' and '.join(wrong)}"
        yield Problem(code="OTHER_RECEIPT", severity="warning", message=message, file=RECEIPT)


def _is_other_base(base: BaseWeights, want: Mapping[str, str], *, thorough: bool) -> bool:
    tensors = base.header.tensors
    if want.keys() - tensors.keys():
        return True
    done = 0
    for name in sorted(want, key=lambda name: tensors[name].nbytes):
        done += tensors[name].nbytes
        if done > _SAMPLE and not thorough:
            return False
        if _hash(tensors[name]) != want[name]:
            return True
    return False


def _receipt(directory: Path) -> dict[str, Any]:
    path = directory / RECEIPT
    if not path.is_file():
        raise refuse("NO_RECEIPT", "there is none", file=str(path))
    receipt = read_json(path)
    for part in ("outputs", "base", "adapter"):
        tensors = receipt[part].get("tensors") if isinstance(receipt.get(part), dict) else None
        if not isinstance(tensors, dict) or (part == "outputs" and not tensors):
            raise refuse("NO_RECEIPT", f"it has no hashes of {part}", file=str(path))
        if not isinstance(receipt[part].get("files", {}), dict):
            raise refuse("NO_RECEIPT", f"its files of {part} are no hashes by name", file=str(path))
    return receipt


def _hashes(
    tensors: Mapping[str, TensorInfo], progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[str, str]]:
    """In order, each core with a tensor of its own."""
    total, done = sum(info.nbytes for info in tensors.values()), 0
    for (name, info), digest in zip(tensors.items(), ahead(_hash, [*tensors.values()], workers()), strict=True):
        yield name, digest
        done += info.nbytes
        progress(done, total)


def _hash(info: TensorInfo) -> str:
    digest, piece, read = hashlib.sha256(), bytearray(min(_PIECE, max(info.nbytes, 1))), read_stored
    if info.heads or info.added or info.grid:  # of a GGUF or MLX: not as it is stored
        from d2surgery.files.tensors import read_part as read  # torch
    for start in range(0, info.nbytes, _PIECE):
        view = memoryview(piece)[: min(_PIECE, info.nbytes - start)]
        read(info, start, view)
        digest.update(view)
    return digest.hexdigest()


def _form(forms: Any, name: str) -> list[Any] | None:
    """What a receipt says of a tensor's dtype and shape: [dtype, sizes …]; None where it says nothing."""
    form = forms.get(name) if isinstance(forms, dict) else None
    return form if isinstance(form, list) else None


def _tensor(
    name: str, info: TensorInfo | None, want: str | None, there: Mapping[str, str], form: list[Any] | None
) -> TensorAudit:
    right: Mapping[bool, tuple[Status, str]] = {True: ("unchanged", ""), False: ("changed", "TENSOR_CHANGED")}
    status, code = right[there.get(name) == want]
    if info is not None and form is not None and [info.dtype, *info.shape] != form:
        status, code = ("resized", "TENSOR_RESIZED") if [*info.shape] != form[1:] else ("changed", "TENSOR_CHANGED")
    if info is None:
        status, code = "missing", "TENSOR_MISSING"
    elif want is None:
        status, code = "extra", "TENSOR_EXTRA"
    shape = info.shape if info else ()
    dtype = info.dtype if info else ""
    return TensorAudit(
        name=name, status=status, dtype=dtype, shape=shape, elements=prod(shape) if info else 0, code=code
    )


def _tensor_problems(tensors: Any) -> Iterator[Problem]:
    codes = dict.fromkeys(tensor.code for tensor in tensors if tensor.code)
    for code in codes:
        names = [tensor.name for tensor in tensors if tensor.code == code]
        yield Problem(code=code, message="not as the receipt says", module=several(names))


def _file_problems(directory: Path, files: Mapping[str, str]) -> Iterator[Problem]:
    for name, want in files.items():
        path = directory / name
        got = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if got != want:
            code = "CONFIG_CHANGED" if name.endswith("config.json") and "token" not in name else "TOKENIZER_CHANGED"
            if name.endswith(".index.json"):
                continue  # sharding may change; the tensors were compared
            message = "not as the receipt says" if got else "missing"
            yield Problem(code=code, severity="error" if code == "CONFIG_CHANGED" or not got else "warning",
                          message=message, file=name)  # fmt: skip


def _base_problems(base: BaseWeights, want: Mapping[str, str]) -> Iterator[Problem]:
    there = {name: info for name, info in base.header.tensors.items() if name in want}
    wrong = [name for name, got in _hashes(there) if got != want[name]] + sorted(want.keys() - there.keys())
    if wrong:
        yield Problem(code="WRONG_BASE", message="not the base that the receipt names", module=several(wrong))


def _adapter_problems(adapter: str | os.PathLike[str], want: Mapping[str, str]) -> Iterator[Problem]:
    header = open_layout(adapter).header
    if header.loaded is None:
        there = dict(_hashes(header.tensors))
    else:
        from d2surgery.files.tensors import as_bytes  # torch, which has read them

        there = {key: hashlib.sha256(as_bytes(held.contiguous())).hexdigest() for key, held in header.loaded.items()}
    wrong = sorted(key for key in want.keys() | there.keys() if want.get(key) != there.get(key))
    if wrong:
        yield Problem(code="WRONG_ADAPTER", message="not the adapter that the receipt names", module=several(wrong))
