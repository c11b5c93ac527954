"""What formats with two factors a module have in common: keys by module, and a pair, checked, as an adapter."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import NamedTuple

from d2surgery.errors import D2SurgeryError, Problems
from d2surgery.files.header import FLOATS, Header
from d2surgery.formats.format import Values
from d2surgery.formats.layout import About, AdapterLayout, Layout, Slot, Stored, lies_transposed

Group = Mapping[str, str]  # what it is -> key, of one module


class Factor(NamedTuple):
    """A factor as it is multiplied: (r, in, *kernel) or (out, r, 1…), whatever way it is stored."""

    slot: Slot
    shape: tuple[int, ...]


@dataclass
class Pairs:
    """The adapters of a file so far; nothing raises, every key that finds no place is `unread` and named."""

    header: Header
    values: Values
    say: Problems = field(default_factory=Problems)
    adapters: dict[str, AdapterLayout] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.say.file = self.header.files[0].name

    def groups(
        self, leaves: Mapping[str, str], spelled: Callable[[str], str] = lambda key: key
    ) -> dict[str, dict[str, str]]:
        """Module -> its keys by what each is. leaves: how a key ends -> what it is; spelled: an old key as a new one.

        A key that ends in none of them is unread, and so are an empty tensor and a second of the same.
        """
        ends, found = sorted(leaves, key=len, reverse=True), dict[str, dict[str, str]]()
        for key, info in self.header.tensors.items():
            name = spelled(key)
            leaf = next((leaf for leaf in ends if name.endswith(f".{leaf}") and len(name) > len(leaf) + 1), "")
            module, what = name[: len(name) - len(leaf) - 1], leaves.get(leaf, "")
            if not leaf:
                self.skip([key], "UNKNOWN_TENSOR", "no tensor of an adapter in this format", module=key)
            elif 0 in info.shape:
                self.skip([key], "EMPTY_TENSOR", "no elements", module=key, got=str(info.shape))
            elif what in found.setdefault(module, {}):
                self.skip(
                    [key], "TWO_ADAPTERS", f"{module} has this twice", module=key, got=f"also {found[module][what]}"
                )
            else:
                found[module][what] = key
        return found

    def skip(self, keys: Iterable[str], code: str, message: str, **details: str) -> None:
        self.unread += keys
        self.say(code, message, "error", **details)

    def lacks(self, module: str, group: Group, *wanted: str) -> bool:
        """Whether a module has not all that is wanted; then it is unread, and what is missing said."""
        if missing := sorted(set(wanted) - group.keys()):
            message = f"has {', '.join(sorted(group))} but no {', '.join(missing)}"
            self.skip(group.values(), "MISSING_HALF", message, module=module)
        return bool(missing)

    def no_column(self, module: str, group: Group, what: str) -> bool:
        """Whether what should be (out, 1) is something else; then the module is unread, and that is said."""
        shape = self.shape(group[what])
        if wrong := len(shape) != 2 or shape[1] != 1:
            got = str(shape)
            self.skip(group.values(), "SHAPE_UNEXPECTED", "magnitude", module=module, wanted="(out, 1)", got=got)
        return wrong

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape

    def factor(self, key: str, *, transposed: bool = False) -> Factor:
        shape = self.shape(key)
        return Factor(Slot(key, transposed=transposed), shape[::-1] if transposed else shape)

    def number(self, key: str, module: str) -> float | None:
        """A stored number; None, and a problem, where it is none."""
        try:
            values = self.values(key)
        except D2SurgeryError as error:
            self.say.all += error.problems
            return None
        if len(values) != 1 or not isfinite(values[0]):
            self.say("NOT_A_NUMBER", key.rpartition(".")[2], module=module, got=str(values)[:80])
            return None
        return values[0]

    def add(
        self,
        module: str,
        group: Group,
        down: Factor,
        up: Factor,
        *,
        scaling: float | None,
        magnitude: str = "",
        along: str = "out_features",
        stored: Stored = "linear",
        bias: str = "",
    ) -> None:
        """One module's adapter, or what is wrong with it. Keys of its group that fill no slot count as its numbers."""
        vectors = {name: Slot(key) for name, key in (("magnitude", magnitude), ("bias", bias)) if key}
        slots, before = {"A": down.slot, "B": up.slot} | vectors, len(self.say.all)
        self._check(module, group, down, up)
        out, inside = up.shape[:1], prod(down.shape[1:])
        for name, slot in vectors.items():
            wanted = inside if name == "magnitude" and along == "in_features" else prod(out)
            if prod(self.shape(slot.key)) != wanted:
                got = str(self.shape(slot.key))
                self.say("SHAPE_UNEXPECTED", name, module=module, wanted=f"{wanted} numbers", got=got)
        if module in self.adapters:
            self.say("TWO_ADAPTERS", "the module has two pairs of factors", module=module)
        if len(self.say.all) > before:
            self.unread += group.values()
            return
        filled, stored_as = {slot.key for slot in slots.values()}, self.header.tensors[down.slot.key].dtype
        self.adapters[module] = AdapterLayout(
            module=module,
            kind="dora" if magnitude else "lora",
            stored="conv" if len(down.shape) > 2 else stored,
            slots=slots,
            ranks={"update": down.shape[0]},
            out_features=out[0],
            in_features=inside,
            dtype=stored_as if down.slot.made is None or stored_as == "F64" else "F32",
            scaling=scaling,
            settings={"along": along} if magnitude else {},
            kernel=down.shape[1:] if len(down.shape) > 2 else (),
            numbers=tuple(key for key in group.values() if key not in filled),
        )

    def _check(self, module: str, group: Group, down: Factor, up: Factor) -> None:
        for key in group.values():
            info = self.header.tensors[key]
            if info.dtype not in FLOATS and info.shape:
                self.say("DTYPE_UNEXPECTED", f"{key.rpartition('.')[2]} is {info.dtype}", module=module,
                         wanted=", ".join(FLOATS))  # fmt: skip
        if min(len(down.shape), len(up.shape)) < 2:
            self.say("SHAPE_UNEXPECTED", "a factor is not a matrix", module=module, got=f"{down.shape}, {up.shape}")
        elif prod(up.shape[1:]) != down.shape[0]:
            self.say("RANK_MISMATCH", f"the factors {down.shape} and {up.shape} do not multiply", module=module)

    def _turned(self) -> bool:
        """Whether the factors as stored fit better the other way round."""
        return lies_transposed(
            ((entry.ranks["update"], entry.in_features), (entry.out_features, entry.ranks["update"]))
            for entry in self.adapters.values()
            if not entry.kernel and entry.slots["A"].made is None
        )

    def layout(self, format: str, about: About = About()) -> Layout:  # noqa: B008  # a frozen value
        if self._turned():
            self.say("RANK_DOUBTFUL", "the factors lie the other way round")
        return Layout(
            path=self.header.files[0],
            format=format,
            header=self.header,
            about=about,
            adapters=self.adapters,
            unread=tuple(self.unread),
            problems=tuple(self.say.all),
        )


def as_stored(entry: AdapterLayout, shape: tuple[int, ...]) -> AdapterLayout:
    """A module's adapter by the shape of its base weight: kohya may store a linear module's with a kernel of ones, and
    LyCORIS's products of a convolution do not say its kernel."""
    if entry.stored == "conv" and prod(entry.kernel[1:]) == 1 and shape == (entry.out_features, entry.in_features):
        return replace(entry, stored="linear", kernel=())
    flat = entry.stored == "linear" and len(shape) > 2 and any(slot.made for slot in entry.slots.values())
    if flat and (shape[0], prod(shape[1:])) == (entry.out_features, entry.in_features):
        return replace(entry, stored="conv", kernel=shape[1:])
    return entry
