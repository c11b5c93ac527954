"""Reading PEFT's form: one pass over the keys, one over the modules. Problems pile up and nothing raises."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from d2surgery.errors import Problems
from d2surgery.files.header import FLOATS, Header, TensorInfo
from d2surgery.formats.layout import AdapterLayout, Layout, Rows, Slot, Stored
from d2surgery.formats.peft.config import Config, ends_with, methods, pattern_problems, peft_type, version_of
from d2surgery.formats.peft.fields import PACKED, PACKINGS
from d2surgery.formats.peft.keys import (
    METADATA,
    OTHER_METHODS,
    PARAMETER_ORDER,
    TOKENS,
    Leaf,
    bare,
    copies,
    in_declared_order,
    leaves,
    split,
    target_of,
    unwrapped,
)
from d2surgery.kinds import TABLE, Kind, kind_with

_WHY = {  # why a method is refused -> PEFT's, of which that is known
    "its update depends on the base's weights": ("IA3", "HIRA", "OFT", "BOFT", "HRA", "GLORA"),
    "its update has no low rank": ("RANDLORA", "FOURIERFT", "WAVEFT", "C3A", "SHIRA"),
}


def read(header: Header, found: Mapping[str, Any], *, exact: Mapping[str, float], disagrees: bool) -> Layout:
    """The layout of a file. exact: scalings to the last bit; disagrees: the config inside the file is another."""
    config = Config(found, exact)
    say = Problems(header.files[0].name if header.files else "")
    keys = _Keys(header, config, say)
    if disagrees:
        say("CONFIG_DISAGREES", "adapter_config.json is not the config inside the file", severity="warning")
    method = found.get("peft_type")
    if isinstance(method, str) and method not in methods():
        why = next((f": {why}" for why, names in _WHY.items() if method in names), "")
        say("UNSUPPORTED_METHOD", f"peft_type is {method}{why}", wanted=", ".join(methods()), got=str(method))
        keys.unread += header.tensors
        return _layout(header, config, keys, {}, say)
    if not found:
        say("MISSING_CONFIG", "no adapter_config.json: ranks are known, scaling is not")
    say.all += config.problems(say.file)
    if found.get("enable_lora"):
        keys.unread += header.tensors
        return _layout(header, config, keys, {}, say)
    keys.sort()
    modules = _Modules(config, say, Counter(unwrapped(name) for name in keys.groups))
    adapters: dict[str, AdapterLayout] = {}
    for name, group in keys.groups.items():
        if (adapter := modules.adapter(name, group)) is not None:
            adapters[adapter.module] = adapter
        else:
            keys.unread += group.keys.values()
    for module, adapter in adapters.items():
        if adapter.stored != "experts" and config and not config.targeted(module):
            say("NOT_TARGETED", "has factors but is not in target_modules", module=module)
    say.all += pattern_problems(config, adapters, say.file, complete=len(adapters) == len(keys.groups))
    keys.check_replacements(adapters)
    if not found:
        _doubt_ranks(adapters, say)
    elif header.tensors and not any(problem.severity == "error" for problem in say.all):
        if not adapters and (message := _of_model(keys, config)):
            say("NOT_AN_ADAPTER", message)
        else:
            _miss_promised(header, config, say, adapted=bool(adapters))
    return _layout(header, config, keys, _with_packing(header, config, adapters, say), say)


def _with_packing(
    header: Header, config: Config, adapters: Mapping[str, AdapterLayout], say: Problems
) -> dict[str, AdapterLayout]:
    """How experts share the columns of lora_B: as the file says, else as PEFT packs them, and that is said."""
    said = PACKINGS.get(config.get(PACKED) or header.metadata.get(PACKED, ""))
    several = [module for module, entry in adapters.items() if entry.experts > 1 and entry.ranks["update"] > 1]
    if several and not said and METADATA not in header.metadata:  # we write as PEFT does
        got = "unsloth's mark in the config" if config.by_unsloth else f"no {PACKED}"
        say("EXPERT_LAYOUT_ASSUMED", "lora_B of the experts is read interleaved", severity="warning", got=got)
    return {
        module: entry.with_packing(said or "interleaved") if entry.experts > 1 else entry
        for module, entry in adapters.items()
    }


def _of_model(keys: "_Keys", config: Config) -> str:
    """What to say of a model's own weights beside an adapter's config, as a merged model's directory may have them."""
    names = [name.rpartition(".")[0] for name in keys.replacements if name.endswith(".weight")]
    layers = (name for name in names if re.search(r"\.\d+\.", name))  # an embedding may be saved whole
    targeted = [name for name in layers if config.wants(name) and not config.declares(f"{name}.weight")]
    return f"the weights of a model, not factors: {len(targeted)} of targeted modules" if targeted else ""


def _miss_promised(header: Header, config: Config, say: Problems, *, adapted: bool) -> None:
    held = (target_of(bare(key)) for key in header.tensors)
    for promised in config.absent(held, adapted=adapted):
        say("PROMISED_BUT_ABSENT", f"{promised}, of which the file holds nothing", severity="warning")


def _doubt_ranks(adapters: Mapping[str, AdapterLayout], say: Problems) -> None:
    """No config confirms the rank that the shapes give."""
    for module, adapter in adapters.items():
        sides = min(adapter.in_features, adapter.out_features)
        if (rank := max(adapter.ranks.values())) > sides and adapter.stored == "linear":
            say("RANK_DOUBTFUL", f"rank {rank} of {sides} at most", severity="warning", module=module)


class _Group:
    """The tensors found for one module, before they are known to fit."""

    def __init__(self) -> None:
        self.stored: Stored = "linear"
        self.keys: dict[str, str] = {}  # slot -> key
        self.infos: dict[str, TensorInfo] = {}


def _layout(
    header: Header, config: Config, keys: "_Keys", adapters: Mapping[str, AdapterLayout], say: Problems
) -> Layout:
    return Layout(
        path=header.files[0],
        format="peft",
        header=header,
        about=config.about(),
        adapters=adapters,
        replacements=keys.replacements,
        rows=keys.rows,
        superseded=tuple(keys.superseded),
        unread=tuple(keys.unread),
        problems=tuple(say.all),
    )


# Keys ------------------------------------------------------------------------------------------------------------


class _Keys:
    """Every key in its place: a slot of a module, a replacement, token rows, a copy, or unread."""

    def __init__(self, header: Header, config: Config, say: Problems) -> None:
        self.header, self.config, self.say = header, config, say
        self.groups: dict[str, _Group] = {}
        self.replacements: dict[str, str] = {}
        self.rows: dict[str, Rows] = {}
        self.superseded: list[str] = []
        self.unread: list[str] = []
        self.adapter_name = ""

    def sort(self) -> None:
        known, names = leaves(), {key: bare(key) for key in self.header.tensors}
        superseded = copies(set(names.values()))
        for key, info in self.header.tensors.items():
            name = names[key]
            module, leaf = split(name, known)
            if name in superseded:
                beside = superseded[name]
                message = f"a copy beside {beside}" if beside else "the untrained original, and no trained weight"
                self.superseded.append(key)
                self.say("SUPERSEDED", message, severity="info", module=key)
            elif 0 in info.shape:
                self._skip(key, "EMPTY_TENSOR", "no elements", got=str(info.shape))
            elif leaf is not None:
                self._add_slot(module, leaf, key, info)
            elif TOKENS in name.split("."):
                self._add_rows(name, key)
            elif re.search(OTHER_METHODS, name) or not (_is_float(info) or self.config.declares(name)):
                kinds = [kind.title for kind in reversed(TABLE.values())]
                self._skip(key, "UNKNOWN_TENSOR", f"no slot of {', '.join(kinds[:-1])} or {kinds[-1]}")
            else:
                self._add_replacement(target_of(name), key)

    def _skip(self, key: str, code: str, message: str, got: str = "") -> None:
        self.unread.append(key)
        self.say(code, message, module=key, got=got)

    def _add_slot(self, module: str, leaf: Leaf, key: str, info: TensorInfo) -> None:
        self.adapter_name = self.adapter_name or leaf.adapter
        if leaf.adapter and leaf.adapter != self.adapter_name:
            self._skip(key, "TWO_ADAPTERS", f"belongs to adapter {leaf.adapter}", got=f"read {self.adapter_name}")
            return
        group = self.groups.setdefault(module, _Group())
        if leaf.slot in group.keys:
            other = group.keys[leaf.slot]
            self._skip(key, "TWO_ADAPTERS", f"{module} has this slot twice", got=f"also {other}")
            return
        group.keys[leaf.slot], group.infos[leaf.slot] = key, info
        if leaf.stored == "embedding":
            group.stored = "embedding"

    def _add_replacement(self, target: str, key: str) -> None:
        if target in self.replacements:
            self._skip(key, "TWO_ADAPTERS", f"{target} is replaced twice", got=f"also {self.replacements[target]}")
        else:
            self.replacements[target] = key

    def _add_rows(self, name: str, key: str) -> None:
        module = name[: name.index(f".{TOKENS}")].removesuffix(".token_adapter")
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
        shape = self.header.tensors[key].shape
        numbers = (
            tuple(indices) if isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices) else ()
        )
        if len(shape) != 2:
            self._skip(key, "SHAPE_UNEXPECTED", "wanted one row per token", got=str(shape))
        elif f"{module}.weight" in self.rows:
            also = self.rows[f"{module}.weight"].key
            self._skip(key, "TWO_ADAPTERS", f"{module} has its rows twice", got=f"also {also}")
        elif not len(set(numbers)) == len(numbers) == shape[0]:
            self._skip(key, "TOKEN_INDICES", f"{module} needs {shape[0]} different row numbers", got=str(indices)[:80])
        else:
            self.rows[f"{module}.weight"] = Rows(key, numbers)

    def check_replacements(self, adapters: Mapping[str, AdapterLayout]) -> None:
        """Which full weights and biases the config explains."""
        bias = self.config.get("bias", "none")
        for target, key in list(self.replacements.items()):
            module, _, leaf = target.rpartition(".")
            plain_bias = leaf == "bias" and module in adapters and ".base_layer." not in key
            if plain_bias and bias == "none":
                del self.replacements[target]
                self._skip(key, "UNEXPECTED_BIAS", "a full bias of an adapted module")
            elif plain_bias:
                self.say("PEFT_IGNORES_BIAS", "applied all the same", severity="warning", module=target)
            elif self.config and not (
                (leaf == "bias" and bias != "none") or ".base_layer." in key or self.config.declares(target)
            ):
                self.say("UNDECLARED_REPLACEMENT", "saved in full", severity="info", module=target)
        saved_biases = any(target.endswith(".bias") for target in self.replacements)
        if bias == "lora_only" and not saved_biases and adapters:
            self.say("BIAS_NOT_SAVED", "bias='lora_only' but the file holds no bias", severity="warning")


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in (*FLOATS, "F8_E4M3", "F8_E5M2")


# Modules ---------------------------------------------------------------------------------------------------------


class _Modules:
    """One module's tensors as its adapter."""

    def __init__(self, config: Config, say: Problems, wrappers: Mapping[str, int]) -> None:
        self.config, self.say = config, say
        self.wrappers = wrappers  # how many wrap each module: one per adapted parameter
        self.methods = methods()  # peft_type -> kinds
        self.told: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.sound: set[tuple[Any, ...]] = set()  # forms in which nothing is wrong: most modules share one

    def adapter(self, name: str, group: _Group) -> AdapterLayout | None:
        """None when something is wrong with it."""
        before = len(self.say.all)
        kind = self._kind(name, group)
        adapter = self._fitted(name, kind, group) if kind and self._are_matrices(name, TABLE[kind], group) else None
        if adapter is None or any(problem.severity == "error" for problem in self.say.all[before:]):
            return None
        return self._with_rank_as_said(adapter)

    def _fitted(self, name: str, kind: str, group: _Group) -> AdapterLayout | None:
        before, row = len(self.say.all), TABLE[kind]
        module, experts = self._experts(name, group) if kind == "lora" else (name, 1)
        self._check_shapes(module, kind, group)
        if len(self.say.all) > before:
            return None
        first = next(iter(row.groups.values()))
        down, up = group.infos[first.down], group.infos[first.up]
        ranks = {name: group.infos[each.down].shape[0] // experts for name, each in row.groups.items()}
        scaling = self.config.scaling(module, kind, ranks)
        stored: Stored = "experts" if module != name else "conv" if len(down.shape) > 2 else group.stored
        slots = {slot: Slot(group.keys[slot]) for slot in (*row.slots, "bias") if slot in group.keys}
        out, inside = up.shape[0], prod(down.shape[1:])
        if turned := self._turned(experts):
            slots |= {"A": Slot(group.keys["B"], transposed=True), "B": Slot(group.keys["A"], transposed=True)}
            out, inside = inside, out
        return AdapterLayout(
            module=module,
            kind=kind,
            stored=stored,
            slots=slots,
            ranks=ranks,
            out_features=out,
            in_features=inside,
            blocked=("B",) if turned else ("A",),
            as_declared=turned,
            dtype=down.dtype,
            scaling=scaling,
            settings=self._told(self.config.settings, kind),
            kernel=down.shape[1:] if stored == "conv" else (),
            experts=experts,
            misread=self._told(self.config.misread, kind, scaling, tuple(ranks.items())),
        )

    def _told(self, ask: Callable[..., dict[str, Any]], *what: Any) -> dict[str, Any]:
        """What the config says; most modules ask the same, and share the answer."""
        if (key := (ask.__name__, *what)) not in self.told:
            self.told[key] = ask(*what)
        return self.told[key]

    def _kind(self, name: str, group: _Group) -> str | None:
        """The kind whose slots these are; a half pair or a missing vector is a problem, not another kind."""
        slots, config = set(group.keys), self.config
        kind = kind_with(slots)
        allowed = self.methods[config.get("peft_type", peft_type(kind))]
        if kind not in allowed:
            kind = allowed[0]
        row = TABLE[kind]
        missing = set(row.slots) - slots
        for slot in sorted(missing - {"magnitude"}):
            self.say("MISSING_HALF", f"has {', '.join(sorted(slots))} but no {slot}", module=name)
        if config.get("lora_bias") and "B" in slots and not slots & {"bias", "magnitude"}:
            self.say("MISSING_HALF", "lora_bias is set but there is no lora_B.bias", module=name)
        if "bias" in slots and config and not config.get("lora_bias"):
            self.say("UNEXPECTED_BIAS", "a lora_B.bias although lora_bias is not set", module=name)
        if "magnitude" in missing or ("magnitude" not in slots and config.get("use_dora")):
            self.say("MISSING_MAGNITUDE", "use_dora is set but there is no lora_magnitude_vector", module=name)
            return None
        if kind == "dora" and config and not config.get("use_dora"):
            self.say("BAD_CONFIG", "a magnitude vector although use_dora is not set", module=name)
        extra = slots - set(row.slots) - ({"bias"} if kind == "lora" else set())
        for slot in sorted(extra):
            self.say("UNKNOWN_TENSOR", f"{kind} has no slot {slot}", module=name, got=group.keys[slot])
        return None if missing or extra else kind

    def _experts(self, name: str, group: _Group) -> tuple[str, int]:
        """The parameter's full name and the number of experts, for a module adapted through target_parameters."""
        module = unwrapped(name)
        parameters = self._parameters(module)
        if not parameters:
            if ".base_layer" in name:
                what = "MultiheadAttention, or a base_layer that target_parameters does not explain"
                self.say("UNSUPPORTED_VARIANT", what, module=name)
            return name, 1
        ordered = in_declared_order(parameters)
        if len(parameters) > 1 and not parameters <= set(PARAMETER_ORDER):
            self.say("AMBIGUOUS_PARAMETER", "cannot tell the parameters apart", module=name, got=", ".join(ordered))
            return name, 1
        depth = name.count(".base_layer") - module.count(".base_layer")
        if depth >= len(ordered):
            self.say("AMBIGUOUS_PARAMETER", "nested deeper than target_parameters has names", module=name)
            return name, 1
        parameter = f"{module}.{ordered[len(ordered) - 1 - depth]}"  # the innermost wrapper came first
        return parameter, self._packed(name, parameter, group.infos["A"].shape[0])

    def _parameters(self, module: str) -> set[str]:
        """The parameters of a module that target_parameters names, as far as they can be the module's.

        A target with a dot names its module, one without a parameter of any module that is not itself a target
        (PEFT's own "all-linear" writes both: "gate.weight", "gate_up_proj", "down_proj"). Each has a wrapper in the
        file; where there are fewer wrappers, the targets that name the module come first.
        """
        if not (targets := self.config.get("target_parameters")):
            return set()
        parts = [target.rpartition(".") for target in targets]
        named = {last for first, _, last in parts if first and ends_with(module, first)}
        loose = set() if self.config.listed(module) else {last for first, _, last in parts if not first}
        if named and len(named) == self.wrappers[module]:
            return named
        return named | loose

    def _packed(self, name: str, parameter: str, rows: int) -> int:
        """How many experts lie in so many rows of A."""
        r = self.config.rank(parameter)
        if rows % r:
            self.say("RANK_DISAGREES", "rows of A are not a multiple of r", module=name, wanted=f"k·{r}", got=str(rows))
            return 1
        version = self.config.get("peft_version")
        if rows > r and version_of(version)[:2] < (0, 17):
            self.say("OLD_EXPERT_PACKING", "saved by an unknown PEFT", module=name, wanted="0.17", got=str(version))
        elif rows > r and version_of(version) == (0, 19, 0):
            self.say("OLD_EXPERT_PACKING", "saved by PEFT 0.19.0", module=name, wanted="another", got=str(version))
        return rows // r

    def _turned(self, experts: int) -> bool:
        """PEFT 0.17 and 0.18: ΔW = (B A)ᵀ of each expert, whatever the model, so A's columns are the update's rows."""
        return experts > 1 and version_of(self.config.get("peft_version")) < (0, 19)

    def _with_rank_as_said(self, adapter: AdapterLayout) -> AdapterLayout:
        """Where the config says another rank than the tensors have, the scaling is unknown."""
        want = self.config.ranks(adapter.module, adapter.kind)
        if want is None or want == adapter.ranks:
            return adapter
        wanted, got = (f"{list(ranks.values())}" for ranks in (want, adapter.ranks))
        self.say("RANK_DISAGREES", "ranks", module=adapter.module, wanted=wanted, got=got)
        return replace(adapter, scaling=None, misread={})

    def _are_matrices(self, module: str, row: Kind, group: _Group) -> bool:
        flat = {
            slot: info.shape
            for slot, info in group.infos.items()
            if len(info.shape) < 2 and slot in row.slots and slot not in row.vectors
        }
        for slot, shape in flat.items():
            self.say("SHAPE_UNEXPECTED", f"{slot} is not a matrix", module=module, got=str(shape))
        return not flat

    def _check_shapes(self, module: str, kind: str, group: _Group) -> None:
        form = (kind, group.stored, *((slot, info.dtype, info.shape) for slot, info in group.infos.items()))
        if form in self.sound:
            return
        before, row = len(self.say.all), TABLE[kind]
        shapes = {slot: info.shape for slot, info in group.infos.items()}
        pairs = [*row.groups.values()]
        for down, up, _ in pairs:
            a, b = shapes[down], shapes[up]
            if prod(b[1:]) != a[0] and (len(a), len(b)) == (2, 3) and a[0] % b[1] == 0:
                self.say("MERGED_LINEAR", f"{down} {a} and {up} {b}", module=module)
            elif prod(b[1:]) != a[0]:
                code = "GROUPED_CONV" if len(a) > 2 and a[0] % prod(b[1:]) == 0 else "RANK_MISMATCH"
                self.say(code, f"{down} {a} and {up} {b} do not multiply", module=module)
        if len({(shapes[up][0], *shapes[down][1:]) for down, up, _ in pairs}) > 1:
            got = "; ".join(f"{slot} {shape}" for slot, shape in shapes.items())
            self.say("SHAPE_UNEXPECTED", "the groups differ in out or in", module=module, got=got)
        out, inside = shapes[pairs[0].up][0], prod(shapes[pairs[0].down][1:])
        per_input = row.axis(self._told(self.config.settings, kind)) == "in_features"
        for slot in sorted({*row.vectors, "bias"} & shapes.keys()):
            wanted = inside if per_input and slot != "bias" else out
            if prod(shapes[slot]) != wanted:
                got = str(shapes[slot])
                self.say("SHAPE_UNEXPECTED", slot, module=module, wanted=f"{wanted} numbers", got=got)
        if row.linear_only and (group.stored != "linear" or len(shapes[pairs[0].down]) > 2):
            self.say("UNSUPPORTED_VARIANT", f"{kind} exists for linear modules only", module=module)
        for slot, info in group.infos.items():
            if info.dtype not in FLOATS:
                self.say("DTYPE_UNEXPECTED", f"{slot} is {info.dtype}", module=module, wanted=", ".join(FLOATS))
        if len(self.say.all) == before:
            self.sound.add(form)
