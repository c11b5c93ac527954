"""What torch.save's pickle says, read without running it: a machine that knows tables, lists, numbers and tensors.

Of the pickle's language it has what tensors by name are written in, and of the names in it those of the table below;
nothing is imported or called, so there is nothing that a file could make it do. Tensors are `Stored`: which storage,
where in it, of which shape.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from d2surgery.errors import brief

_MAX_STEPS = 3_000_000  # about 30 a tensor
_MAX_STACK = 100_000  # torch puts a thousand names and tensors on it at a time
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "complex64": "complex64", "complex128": "complex128",
}  # fmt: skip
Bytes = Any  # bytes or a mapped file: what gives bytes for a slice


class Storage(NamedTuple):
    """A run of elements in the file; of one untyped `dtype` is "" and an element a byte."""

    dtype: str
    key: str
    elements: int


class Stored(NamedTuple):
    """A tensor: elements of its storage, counted from `offset`, `stride` apart."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def unpickle(data: Bytes, at: int = 0) -> tuple[Any, int]:
    """The object of the pickle at byte `at`, and where the pickle ends.

    Raises ValueError with the reason for all that is not tables, lists, texts, numbers and tensors.
    """
    machine = _Machine(data, at)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, TypeError, struct.error):
        raise ValueError(f"it is damaged before byte {machine.at}") from None


class _Global(NamedTuple):
    """A name of the table, as the pickle gives it."""

    module: str
    name: str


class _Machine:
    """A stack, what was remembered, and the place in the pickle."""

    def __init__(self, data: Bytes, at: int) -> None:
        self.data, self.at = data, at
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            sign = self.bytes(1)
            if sign == b".":
                return self.stack.pop()
            step = _STEPS.get(sign)
            if step is None:
                raise ValueError(f"it says {sign!r} at byte {self.at - 1}, which tensors need not")
            step(self)
        raise ValueError(f"more than {_MAX_STEPS} steps")

    def bytes(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise ValueError("it ends before its end")
        self.at += count
        return bytes(piece)

    def number(self, form: str) -> int:
        found: int = struct.unpack(form, self.bytes(struct.calcsize(form)))[0]
        return found

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 200)
        text = self.bytes(end - self.at if end >= 0 else 1 << 62).decode()
        self.at += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)
        if len(self.stack) > _MAX_STACK:
            raise ValueError("more lies on its stack than tensors need")

    def text(self, form: str) -> None:
        self.push(self.bytes(self.number(form)).decode("utf-8", "strict"))

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def popped(self, count: int) -> tuple[Any, ...]:
        found = tuple(self.stack[-count:])
        if len(found) != count:
            raise ValueError("nothing is there")
        del self.stack[-count:]
        return found

    def appended(self, values: Sequence[Any]) -> None:
        _of(list, self.stack[-1]).extend(values)

    def set(self, values: Sequence[Any]) -> None:
        table = _of(dict, self.stack[-1])
        for name, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(name, str | int | float | None):
                raise ValueError("a table by something else than names")
            if name in table:
                raise ValueError(f"{brief(name)} stands twice")
            table[name] = value

    def named(self, module: str, name: str) -> None:
        known = (module, name) in _CALLS or (module == "torch" and (name in _STORAGES or name in _DTYPES))
        if not known and (module, name) != ("torch.storage", "UntypedStorage"):
            raise ValueError(f"it asks for {module}.{name}, which is no part of a dense tensor")
        self.push(_Global(module, name))

    def called(self) -> None:
        what, arguments = self.popped(2)
        self.push(_CALLS[_of(_Global, what)](*_of(tuple, arguments)))

    def built(self) -> None:
        """What is set on an object: torch notes versions on a table; on anything else it is refused."""
        self.stack.pop()
        _of(dict, self.stack[-1])

    def persistent(self) -> None:
        what, kind, key, _, count, *view = _of(tuple, self.stack.pop())
        if what != "storage" or any(part is not None for part in view):
            raise ValueError("it refers to what is no storage")
        module, name = _of(_Global, kind)
        dtype = _STORAGES[name] if module == "torch" else ""
        self.push(Storage(dtype, _of(str, key), _count(count)))


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__} wanted, {type(value).__name__} found")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{brief(value)} is no count")
    return value


def _table(pairs: Any = ()) -> dict[Any, Any]:
    machine = _Machine(b"", 0)
    machine.push({})
    machine.set([part for name, value in pairs for part in (name, value)])
    return machine.stack[0]  # type: ignore[no-any-return]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any, dtype: str = "") -> Stored:
    held, sizes, steps = _of(Storage, storage), _of(tuple, shape), _of(tuple, stride)
    if len(sizes) != len(steps) or any(isinstance(part, dict) and part for part in more):
        raise ValueError("a tensor of another make")
    return Stored(held, dtype or held.dtype, _count(offset), tuple(map(_count, sizes)), tuple(map(_count, steps)))


def _typed(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any) -> Stored:
    name = _DTYPES[_of(_Global, dtype).name]
    return _tensor(storage, offset, shape, stride, hooks, *more, dtype=name)


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _table,
    ("torch", "Size"): lambda sizes=(): tuple(map(_count, _of(tuple, sizes))),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed,
    ("torch._utils", "_rebuild_parameter"): lambda data, grad, hooks: _of(Stored, data),
}
_STEPS: dict[bytes, Callable[[_Machine], Any]] = {  # by the sign that stands for it in the pickle
    b"\x80": lambda m: m.bytes(1),  # the protocol
    b"\x95": lambda m: m.bytes(8),  # a frame's length
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.bytes(m.number("<B")), "little", signed=True)),
    b"X": lambda m: m.text("<I"),
    b"\x8c": lambda m: m.text("<B"),
    b"\x8d": lambda m: m.text("<Q"),
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"t": lambda m: m.push(tuple(m.marked())),
    b"\x85": lambda m: m.push(m.popped(1)),
    b"\x86": lambda m: m.push(m.popped(2)),
    b"\x87": lambda m: m.push(m.popped(3)),
    b"a": lambda m: m.appended(m.popped(1)),
    b"e": lambda m: m.appended(m.marked()),
    b"s": lambda m: m.set(m.popped(2)),
    b"u": lambda m: m.set(m.marked()),
    b"q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    b"r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": lambda m: m.named(*(_of(str, part) for part in m.popped(2))),
    b"R": lambda m: m.called(),
    b"b": lambda m: m.built(),
    b"Q": lambda m: m.persistent(),
}
