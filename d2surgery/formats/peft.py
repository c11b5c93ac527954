"""PEFT's on-disk form of LoRA and DoRA, and our own PEFT-shaped form of Dual LoRA and D2-LoRA.

    adapter_config.json + adapter_model.safetensors (or .bin)
    key    := ["base_model.model."] module "." leaf
    module := dotted name in the base model; ".base_layer" once per parameter adapted outside it (target_parameters)

    leaf                                 shape                       meaning
    lora_A.weight, lora_B.weight         (r, in), (out, r)           Linear, and Conv1D, whose weight lies (in, out)
                                         (r, Cin, *k), (out, r, 1…)  convolution
                                         (E·r, in), (out, r·E)       E experts: rows of A expert-slowest, columns of B
                                                                     expert-fastest (PEFT 0.19.1 and later)
    lora_embedding_A, lora_embedding_B   (r, vocab), (dim, r)        Embedding, whose weight lies (vocab, dim)
    lora_magnitude_vector                (out,) | (1, out, 1…)       DoRA
    lora_B.bias                          (out,)                      lora_bias: the bias grows by scaling times it
    token_adapter.trainable_tokens_delta (n, dim)                    rows that replace the base's rows
    weight, bias, base_layer.weight …    as in the base              values that replace the base's
    lora_C.weight, lora_D.weight         (r2, in), (out, r2)         Dual LoRA's direction group
    lora_{A,B}_{plus,minus}.weight       (r, in), (out, r)           D2-LoRA's branches

scaling = lora_alpha/r, or lora_alpha/√r with use_rslora; Dual LoRA lora_alpha/√(r1·r2).  r and lora_alpha of a module
are those of the first pattern, in file order, that matches `(.*\\.)?(pattern)$`.  Source: PEFT 0.21.2 as it reads and
writes; `.weight` may be absent, an adapter name may stand before it, wrappers' prefixes may stand before the module.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, NamedTuple

from d2surgery.errors import Problem, Severity
from d2surgery.files.header import FLOATS, Header
from d2surgery.formats.layout import PAIRS, RANK_GROUPS, AdapterLayout, Layout, Rows, Stored

PREFIX = "base_model.model."
METADATA = "d2surgery"  # our key in the safetensors metadata: JSON {"config": …, "scaling": {module: …}}
METHODS = {"LORA": ("lora", "dora"), "DUALLORA": ("duallora",), "D2LORA": ("d2lora",)}  # peft_type -> kinds
PEFT_TYPES = {kind: peft_type for peft_type, kinds in METHODS.items() for kind in kinds}

_LEAVES: dict[str, tuple[str, Stored]] = {  # leaf -> (slot, how the base stores the module)
    "lora_A": ("A", "linear"),
    "lora_B": ("B", "linear"),
    "lora_embedding_A": ("A", "embedding"),
    "lora_embedding_B": ("B", "embedding"),
    "lora_magnitude_vector": ("magnitude", "linear"),
    "lora_C": ("C", "linear"),
    "lora_D": ("D", "linear"),
    **{f"lora_{slot}": (slot, "linear") for slot in ("A_plus", "B_plus", "A_minus", "B_minus")},
}
_TOKENS = "trainable_tokens_delta"
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_OTHER_METHODS = re.compile(
    r"(^|\.)(lora_|hada_|lokr_|vera_|oft_|boft_|ia3_|hra_|prompt_embeddings|delora_|vblora_|randlora_)"
)
_DIFFUSERS = re.compile(r"(unet|text_encoder\w*|transformer)\.(?!h\.)")  # transformer.h. is GPT-2's
_VARIANTS = {  # config field -> the variant's name, when the field is set
    "alora_invocation_tokens": "aLoRA (applies to some tokens only)",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow (routes between adapters)",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PARAMETER_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # as the models declare them
FORMS = ("projected_plus_update", "projected", "update")
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern")
_OURS = ("r1", "r2", "tau", "along", "form", "format_version", "training")
_FIELDS = frozenset(  # every field of PEFT 0.21.2's LoraConfig, and ours
    re.findall(
        r"\w+",
        """
        task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
        exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
        layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
        trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora alora_invocation_tokens
        use_qalora qalora_group_size layer_replication runtime_config lora_bias target_parameters use_bdlora
        arrow_config ensure_weight_tying kasa_config velora_config monteclora_config
        """,
    )
) | frozenset(_OURS)


def layout(header: Header, config: Mapping[str, Any] | None) -> Layout | None:
    """The file's layout with every misfit in `problems`, or None when nothing marks it as PEFT's."""
    inside, scaling = _embedded(header)
    reader = _Reader(header, (inside or {}) if config is None else config)
    if inside is not None and reader.config != inside:
        reader.problem("CONFIG_DISAGREES", "adapter_config.json is not the config inside the file", severity="warning")
    elif inside is not None:
        reader.exact_scaling = scaling
    return reader.read() if "peft_type" in reader.config or _looks_like_peft(header) else None


class _Patterns:
    """A rank_pattern or alpha_pattern: PEFT takes the first that matches `(.*\\.)?(pattern)$`, in file order."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self.patterns = patterns
        self._ends = [(key, _literal_end(key)) for key in patterns]
        self._found: dict[str, list[str]] = {}

    def matching(self, module: str) -> list[str]:
        if module not in self._found:
            near = [(key, end) for key, end in self._ends if module.endswith(end)]
            self._found[module] = [key for key, end in near if _matches(key, bool(end), module)]
        return self._found[module]

    def value(self, module: str, default: Any) -> Any:
        found = self.matching(module)
        return self.patterns[found[0]] if found else default


def _literal_end(pattern: str) -> str:
    """What a matching name must end with, where the pattern is a plain name.

    EVA writes a pattern for every module: 450 × 450 regular expressions would take longer than all else.
    """
    return pattern.rpartition(".")[2] if re.fullmatch(r"[\w.]*", pattern) else ""


def _matches(pattern: str, plain: bool, module: str) -> bool:
    before, end = module[: -len(pattern)], module[-len(pattern) :]
    if plain and end.count(".") >= pattern.count("."):  # then no dot stands for another character
        return end == pattern and (not before or before.endswith("."))
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _embedded(header: Header) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """Our own config inside the file and the exact scaling by module; anything else under our key is not ours."""
    try:
        value = json.loads(header.metadata[METADATA])
        config, scaling = value["config"], value.get("scaling", {})
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None, {}
    if not isinstance(config, dict) or not isinstance(scaling, dict):
        return None, {}
    return config, {module: float(number) for module, number in scaling.items() if _is_number(number)}


def _looks_like_peft(header: Header) -> bool:
    return any(key.startswith(PREFIX) or f".{_TOKENS}" in key for key in header.tensors) or any(
        part in _LEAVES and not _DIFFUSERS.match(key) for key in header.tensors for part in key.split(".")
    )


# Beside `lm_head.weight`, trained, PEFT saves with the embeddings what its wrapper holds: the untrained original, and
# the trained weight once more. Loading, it takes `lm_head.weight` alone.
_COPY = re.compile(r"(.+)\.(?:original_module|modules_to_save)\.([^.]+)")


class _Leaf(NamedTuple):
    slot: str
    stored: Stored
    adapter: str  # the adapter's name before .weight, mostly absent or "default"


@dataclass
class _Group:
    """The tensors found for one module, before they are known to fit."""

    stored: Stored = "linear"
    keys: dict[str, str] = field(default_factory=dict)


class _Reader:
    """One pass over the keys, one over the groups; problems pile up and nothing raises."""

    def __init__(self, header: Header, config: Mapping[str, Any]) -> None:
        self.header = header
        self.config = config
        self.exact_scaling: Mapping[str, float] = {}
        self.unusable: set[str] = set()  # config fields that are there but make no sense
        self.patterns = {name: _Patterns({}) for name in _PATTERN_FIELDS}
        self.adapter_name = ""
        self.problems: list[Problem] = []
        self.unread: list[str] = []
        self.superseded: list[str] = []

    def problem(self, code: str, message: str, severity: Severity = "error", **where: str) -> None:
        where.setdefault("file", self.header.files[0].name)
        self.problems.append(Problem(code=code, message=message, severity=severity, **where))

    # Reading -----------------------------------------------------------------------------------------------------

    def read(self) -> Layout:
        method = self.config.get("peft_type")
        if isinstance(method, str) and method not in METHODS:
            self.problem("UNSUPPORTED_METHOD", f"peft_type is {method}", wanted=", ".join(METHODS), got=str(method))
            return self._layout({}, {}, {}, unread=tuple(self.header.tensors))
        if not self.config:
            self.problem("MISSING_CONFIG", "no adapter_config.json: ranks are known, scaling is not")
        self._check_config()
        groups, replacements, rows = self._sort_keys()
        adapters = {a.module: a for name, group in groups.items() if (a := self._adapter(name, group)) is not None}
        self._check_targets(adapters)
        self._check_patterns(adapters)
        self._check_replacements(replacements, adapters)
        return self._layout(adapters, replacements, rows, tuple(self.unread))

    def _layout(
        self,
        adapters: Mapping[str, AdapterLayout],
        replacements: Mapping[str, str],
        rows: Mapping[str, Rows],
        unread: tuple[str, ...],
    ) -> Layout:
        return Layout(
            path=self.header.files[0],
            format="peft",
            header=self.header,
            config=self.config,
            adapters=adapters,
            replacements=replacements,
            rows=rows,
            superseded=tuple(self.superseded),
            unread=unread,
            problems=tuple(self.problems),
        )

    def _sort_keys(self) -> tuple[dict[str, _Group], dict[str, str], dict[str, Rows]]:
        groups: dict[str, _Group] = {}
        replacements: dict[str, str] = {}
        rows: dict[str, Rows] = {}
        names = {_bare(key) for key in self.header.tensors}
        for key in self.header.tensors:
            name = _bare(key)
            module, leaf = _leaf(name)
            if (copied := _COPY.fullmatch(name)) and f"{copied[1]}.{copied[2]}" in names:
                self.superseded.append(key)
                self.problem("SUPERSEDED", f"a copy beside {copied[1]}.{copied[2]}", severity="info", module=key)
            elif 0 in self.header.tensors[key].shape:
                self._skip(key, "EMPTY_TENSOR", "no elements", got=str(self.header.tensors[key].shape))
            elif leaf is not None:
                self._add_slot(groups, module, leaf, key)
            elif _TOKENS in name.split("."):
                self._add_rows(rows, name, key)
            elif _OTHER_METHODS.search(name) or not (self._is_float(key) or self._declared(name)):
                self._skip(key, "UNKNOWN_TENSOR", "no slot of LoRA, DoRA, Dual LoRA or D2-LoRA")
            else:
                self._add_replacement(replacements, name, key)
        return groups, replacements, rows

    def _is_float(self, key: str) -> bool:
        return self.header.tensors[key].dtype in (*FLOATS, "F8_E4M3", "F8_E5M2")

    def _declared(self, name: str) -> bool:
        """Part of a module in modules_to_save: a BatchNorm's integer counter is, for one."""
        saved = self.config.get("modules_to_save") or ()
        return any(re.match(rf"(^|.*\.){re.escape(module)}\.", name) for module in saved)

    def _skip(self, key: str, code: str, message: str, got: str = "") -> None:
        self.unread.append(key)
        self.problem(code, message, module=key, got=got)

    def _add_slot(self, groups: dict[str, _Group], module: str, leaf: _Leaf, key: str) -> None:
        self.adapter_name = self.adapter_name or leaf.adapter
        if leaf.adapter and leaf.adapter != self.adapter_name:
            self._skip(key, "TWO_ADAPTERS", f"belongs to adapter {leaf.adapter}", got=f"read {self.adapter_name}")
            return
        group = groups.setdefault(module, _Group())
        if leaf.slot in group.keys:
            other = group.keys[leaf.slot]
            self._skip(key, "TWO_ADAPTERS", f"{module} has this slot twice", got=f"also {other}")
            return
        group.keys[leaf.slot] = key
        if leaf.stored == "embedding":
            group.stored = "embedding"

    def _add_replacement(self, replacements: dict[str, str], name: str, key: str) -> None:
        target = re.sub(r"\.(modules_to_save\.[^.]+|token_adapter|base_layer|original_module)(?=\.)", "", name)
        if target in replacements:
            self._skip(key, "TWO_ADAPTERS", f"{target} is replaced twice", got=f"also {replacements[target]}")
        else:
            replacements[target] = key

    def _add_rows(self, rows: dict[str, Rows], name: str, key: str) -> None:
        module = name[: name.index(f".{_TOKENS}")].removesuffix(".token_adapter")
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
        shape = self.header.tensors[key].shape
        numbers = (
            tuple(indices) if isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices) else ()
        )
        if len(shape) != 2:
            self._skip(key, "SHAPE_UNEXPECTED", "wanted one row per token", got=str(shape))
        elif f"{module}.weight" in rows:
            self._skip(key, "TWO_ADAPTERS", f"{module} has its rows twice", got=f"also {rows[f'{module}.weight'].key}")
        elif not len(set(numbers)) == len(numbers) == shape[0]:
            self._skip(key, "TOKEN_INDICES", f"{module} needs {shape[0]} different row numbers", got=str(indices)[:80])
        else:
            rows[f"{module}.weight"] = Rows(key, numbers)

    # One adapter -------------------------------------------------------------------------------------------------

    def _adapter(self, name: str, group: _Group) -> AdapterLayout | None:
        """The module's adapter; None when something is wrong with it, and then its keys are unread."""
        before = len(self.problems)
        kind = self._kind(name, group)
        adapter = self._fitted(name, kind, group) if kind and self._are_matrices(name, kind, group) else None
        if any(problem.severity == "error" for problem in self.problems[before:]):
            self.unread.extend(group.keys.values())
            return None
        return adapter

    def _fitted(self, name: str, kind: str, group: _Group) -> AdapterLayout | None:
        before = len(self.problems)
        module, experts = self._experts(name, group) if kind == "lora" else (name, 1)
        self._check_shapes(module, kind, group)
        if len(self.problems) > before:
            return None
        ranks = self._ranks(module, kind, group, experts)
        down, up = (self.header.tensors[group.keys[slot]] for slot in _first_pair(kind))
        stored: Stored = "experts" if module != name else "conv" if len(down.shape) > 2 else group.stored
        return AdapterLayout(
            module=module,
            kind=kind,
            stored=stored,
            slots={slot: group.keys[slot] for slot in (*slots_of(kind), "bias") if slot in group.keys},
            ranks=ranks,
            out_features=up.shape[0],
            in_features=prod(down.shape[1:]),
            dtype=down.dtype,
            scaling=self._scaling(module, kind, ranks),
            along={"dora": "out_features", "d2lora": self.config.get("along", "in_features")}.get(kind),
            tau=float(self.config.get("tau", 0.5)) if kind == "d2lora" else None,
            form=self.config.get("form", "projected_plus_update") if kind == "d2lora" else None,
            experts=experts,
        )

    def _kind(self, name: str, group: _Group) -> str | None:
        """The kind whose slots these are; a half pair or a missing magnitude is a problem, not another kind."""
        slots = set(group.keys)
        kind = (
            "duallora" if slots & {"C", "D"}
            else "d2lora" if any(slot.endswith(("plus", "minus")) for slot in slots)
            else "dora" if "magnitude" in slots
            else "lora"
        )  # fmt: skip
        allowed = METHODS[self.config.get("peft_type", PEFT_TYPES[kind])]
        if kind not in allowed:
            kind = allowed[0]
        missing = set(slots_of(kind)) - slots
        for slot in sorted(missing - {"magnitude"}):
            self.problem("MISSING_HALF", f"has {', '.join(sorted(slots))} but no {slot}", module=name)
        if self.config.get("lora_bias") and "B" in slots and not slots & {"bias", "magnitude"}:
            self.problem("MISSING_HALF", "lora_bias is set but there is no lora_B.bias", module=name)
        if "bias" in slots and self.config and not self.config.get("lora_bias"):
            self.problem("UNEXPECTED_BIAS", "a lora_B.bias although lora_bias is not set", module=name)
        if "magnitude" in missing or ("magnitude" not in slots and self.config.get("use_dora")):
            self.problem("MISSING_MAGNITUDE", "use_dora is set but there is no lora_magnitude_vector", module=name)
            return None
        if kind == "dora" and self.config and not self.config.get("use_dora"):
            self.problem("BAD_CONFIG", "a magnitude vector although use_dora is not set", module=name)
        extra = slots - set(slots_of(kind)) - ({"bias"} if kind == "lora" else set())
        for slot in sorted(extra):
            self.problem("UNKNOWN_TENSOR", f"{kind} has no slot {slot}", module=name, got=group.keys[slot])
        return None if missing or extra else kind

    def _experts(self, name: str, group: _Group) -> tuple[str, int]:
        """The parameter's full name and the number of experts, for a module adapted through target_parameters."""
        module = name
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        depth = name.count(".base_layer") - module.count(".base_layer")
        split = [target.rpartition(".") for target in self.config.get("target_parameters") or ()]
        # A target without a dot names a parameter of any module that is not itself a target.
        bare = any(not first for first, _, _ in split) and not self._listed(module)
        short = {last for first, _, last in split if (_ends_with(module, first) if first else bare)}
        if not short:
            if ".base_layer" in name:
                what = "MultiheadAttention, or a base_layer that target_parameters does not explain"
                self.problem("UNSUPPORTED_VARIANT", what, module=name)
            return name, 1
        ordered = sorted(sorted(short), key=lambda p: _PARAMETER_ORDER.index(p) if p in _PARAMETER_ORDER else -1)
        if len(short) > 1 and not short <= set(_PARAMETER_ORDER):
            self.problem("AMBIGUOUS_PARAMETER", "cannot tell the parameters apart", module=name, got=", ".join(ordered))
            return name, 1
        if depth >= len(ordered):
            self.problem("AMBIGUOUS_PARAMETER", "nested deeper than target_parameters has names", module=name)
            return name, 1
        parameter = f"{module}.{ordered[len(ordered) - 1 - depth]}"  # the innermost wrapper came first
        r = self._r(parameter)
        rows = self.header.tensors[group.keys["A"]].shape[0]
        if rows % r:
            self.problem(
                "RANK_DISAGREES", "rows of A are not a multiple of r", module=name, wanted=f"k·{r}", got=str(rows)
            )
            return parameter, 1
        if rows > r and _version(self.config.get("peft_version")) < (0, 19, 1):
            got = str(self.config.get("peft_version"))
            self.problem(
                "OLD_EXPERT_PACKING", "saved before PEFT 0.19.1", module=name, wanted="0.19.1 or later", got=got
            )
        return parameter, rows // r

    def _ranks(self, module: str, kind: str, group: _Group, experts: int) -> dict[str, int]:
        ranks = {
            name: self.header.tensors[group.keys[slot]].shape[0] // experts for name, slot in RANK_GROUPS[kind].items()
        }
        if self.config and not self.unusable & {"r", "r1", "r2", "rank_pattern"}:
            fields = ("r1", "r2") if kind == "duallora" else ("r",) * len(ranks)
            want = {name: self._r(module, field) for name, field in zip(ranks, fields, strict=True)}
            if want != ranks:
                got = f"{list(ranks.values())}"
                self.problem("RANK_DISAGREES", "ranks", module=module, wanted=f"{list(want.values())}", got=got)
        return ranks

    def _r(self, module: str, field: str = "r") -> int:
        default = self.config.get(field, self.config.get("r", 8))
        value = self.patterns["rank_pattern"].value(module, default)
        if isinstance(value, list) and len(value) == 2:  # Dual LoRA's [r1, r2]
            value = value[field == "r2"]
        return int(value)

    def _scaling(self, module: str, kind: str, ranks: Mapping[str, int]) -> float | None:
        if not self.config or self.unusable & {"lora_alpha", "alpha_pattern", "use_rslora"}:
            return None
        if module in self.exact_scaling:
            return float(self.exact_scaling[module])
        alpha = self.patterns["alpha_pattern"].value(module, self.config.get("lora_alpha", 8))
        if kind == "duallora":
            return float(alpha) / sqrt(prod(ranks.values()))
        rank = next(iter(ranks.values()))
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _are_matrices(self, module: str, kind: str, group: _Group) -> bool:
        shapes = {slot: self.header.tensors[group.keys[slot]].shape for slot in slots_of(kind) if slot != "magnitude"}
        flat = {slot: shape for slot, shape in shapes.items() if len(shape) < 2}
        for slot, shape in flat.items():
            self.problem("SHAPE_UNEXPECTED", f"{slot} is not a matrix", module=module, got=str(shape))
        return not flat

    def _check_shapes(self, module: str, kind: str, group: _Group) -> None:
        shapes = {slot: self.header.tensors[key].shape for slot, key in group.keys.items()}
        downs = [slot for slot in slots_of(kind) if slot in PAIRS]
        for down in downs:
            a, b = shapes[down], shapes[PAIRS[down]]
            if prod(b[1:]) != a[0]:
                code = "GROUPED_CONV" if len(a) > 2 and a[0] % prod(b[1:]) == 0 else "RANK_MISMATCH"
                self.problem(code, f"{down} {a} and {PAIRS[down]} {b} do not multiply", module=module)
        if len({(shapes[PAIRS[down]][0], *shapes[down][1:]) for down in downs}) > 1:
            got = "; ".join(f"{slot} {shape}" for slot, shape in shapes.items())
            self.problem("SHAPE_UNEXPECTED", "the groups differ in out or in", module=module, got=got)
        out = shapes[PAIRS[downs[0]]][0]
        for slot in sorted({"magnitude", "bias"} & shapes.keys()):
            if prod(shapes[slot]) != out:
                got = str(shapes[slot])
                self.problem("SHAPE_UNEXPECTED", slot, module=module, wanted=f"{out} numbers", got=got)
        if kind in ("duallora", "d2lora") and (group.stored != "linear" or len(shapes[downs[0]]) > 2):
            self.problem("UNSUPPORTED_VARIANT", f"{kind} exists for linear modules only", module=module)
        for slot, key in group.keys.items():
            dtype = self.header.tensors[key].dtype
            if dtype not in FLOATS:
                self.problem("SHAPE_UNEXPECTED", f"{slot} is {dtype}", module=module, wanted=", ".join(FLOATS))

    # The config --------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        config = self.config
        for name in sorted(set(config) - _FIELDS):
            self.problem("UNKNOWN_CONFIG_FIELD", f"{name} = {str(config[name])[:60]}", severity="warning")
        for name, variant in _VARIANTS.items():
            if config.get(name):
                self.problem("UNSUPPORTED_VARIANT", f"{variant}: {name} is set")
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
            self.problem("MUTATED_BASE", f"init_lora_weights is {init}")
        if config.get("layer_replication"):
            self.problem("LAYER_REPLICATION", f"layer_replication is {config['layer_replication']}")
        for name, (wanted, fits) in _CHECKS.items():
            if name in config and not fits(config[name]):
                self.problem("BAD_CONFIG", f"{name} cannot be used", wanted=wanted, got=str(config[name])[:80])
                self.unusable.add(name)
        self.patterns = {name: _Patterns(self._good_patterns(name, config.get(name) or {})) for name in _PATTERN_FIELDS}
        self.config = {name: value for name, value in config.items() if name not in self.unusable}

    def _good_patterns(self, name: str, patterns: Any) -> dict[str, Any]:
        if not isinstance(patterns, Mapping):
            self.problem("BAD_CONFIG", f"{name} is not an object", got=type(patterns).__name__)
            self.unusable.add(name)
            return {}
        good = {key: value for key, value in patterns.items() if _is_regex(key) and _is_pattern_value(name, value)}
        for key in sorted(patterns.keys() - good.keys()):
            self.problem("BAD_CONFIG", f"{name} entry {key!r}", wanted="a regular expression and a number")
            self.unusable.add(name)
        return good

    def _check_targets(self, adapters: Mapping[str, AdapterLayout]) -> None:
        for module, adapter in adapters.items():
            if adapter.stored != "experts" and self.config and not self._targeted(module):
                self.problem("NOT_TARGETED", "has factors but is not in target_modules", module=module)

    def _targeted(self, module: str) -> bool:
        if self.config.get("ensure_weight_tying"):
            return True  # PEFT adds the tied module by itself
        if self.config.get("target_modules") in (None, "all-linear"):
            return True  # neither says anything of names
        return self._listed(module) and not _names(self.config.get("exclude_modules"), module)

    def _listed(self, module: str) -> bool:
        targets = self.config.get("target_modules")
        return _names(targets, module) and (isinstance(targets, str) or self._layer_chosen(module))

    def _layer_chosen(self, module: str) -> bool:
        chosen = self.config.get("layers_to_transform")
        if chosen in (None, []):
            return True
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)
        return False

    def _check_patterns(self, adapters: Mapping[str, AdapterLayout]) -> None:
        for name, patterns in self.patterns.items():
            matched = {module: patterns.matching(module) for module in adapters}
            used = {key for found in matched.values() for key in found}
            for key in patterns.patterns:
                if adapters and key not in used:
                    self.problem("PATTERN_UNMATCHED", f"{name}: {key!r}", severity="warning")
            for module, found in matched.items():
                values = sorted({str(patterns.patterns[key]) for key in found})
                if len(values) > 1:
                    message = f"{name} gives {', '.join(values)}"
                    self.problem("AMBIGUOUS_PATTERN", message, severity="warning", module=module)

    def _check_replacements(self, replacements: dict[str, str], adapters: Mapping[str, AdapterLayout]) -> None:
        bias = self.config.get("bias", "none")
        for target, key in list(replacements.items()):
            module, _, leaf = target.rpartition(".")
            plain_bias = leaf == "bias" and module in adapters and ".base_layer." not in key
            if plain_bias and bias == "none":
                del replacements[target]
                self._skip(key, "UNEXPECTED_BIAS", "a full bias of an adapted module")
            elif plain_bias:
                self.problem("PEFT_IGNORES_BIAS", "applied all the same", severity="warning", module=target)
            elif self.config and not (
                (leaf == "bias" and bias != "none") or ".base_layer." in key or self._declared(target)
            ):
                self.problem("UNDECLARED_REPLACEMENT", "saved in full", severity="info", module=target)
        saved_biases = any(target.endswith(".bias") for target in replacements)
        if bias == "lora_only" and not saved_biases and adapters:
            self.problem("BIAS_NOT_SAVED", "bias='lora_only' but the file holds no bias", severity="warning")


def names(layout: Layout) -> dict[str, str]:
    """The name under which PEFT writes each tensor of a layout -> its key in the file at hand."""
    return {_canonical(key): key for key in layout.accounted()}


def key_of(module: str, slot: str) -> str:
    """The key of a linear module's slot."""
    return f"{PREFIX}{module}.lora_magnitude_vector" if slot == "magnitude" else f"{PREFIX}{module}.lora_{slot}.weight"


def _canonical(key: str) -> str:
    name = _bare(key)
    module, leaf = _leaf(name)
    if leaf is None:
        return PREFIX + re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", name)
    if leaf.slot == "bias":
        return f"{PREFIX}{module}.lora_B.bias"
    return f"{PREFIX}{module}.lora_embedding_{leaf.slot}" if leaf.stored == "embedding" else key_of(module, leaf.slot)


def slots_of(kind: str) -> Iterator[str]:
    """The slots a kind must have, in the order in which they are written."""
    for down in RANK_GROUPS[kind].values():
        yield from (down, PAIRS[down])
    if kind == "dora":
        yield "magnitude"


def _first_pair(kind: str) -> Sequence[str]:
    return tuple(slots_of(kind))[:2]


def _bare(key: str) -> str:
    """The key without the prefixes of PEFT and of training wrappers."""
    return _WRAPPERS.sub("", key).removeprefix("module.").lstrip(".").removeprefix(PREFIX)


def _leaf(name: str) -> tuple[str, _Leaf | None]:
    """Split `module.leaf[.adapter][.weight|.bias]`."""
    parts = name.split(".")
    at = next((i for i in reversed(range(len(parts))) if parts[i] in _LEAVES), 0)
    rest = parts[at + 1 :]
    if not at or len(rest) > 2:
        return name, None
    ending = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if len(rest) > 1:
        return name, None
    slot, stored = _LEAVES[parts[at]]
    if ending == "bias":
        if slot != "B":
            return name, None
        slot = "bias"
    return ".".join(parts[:at]), _Leaf(slot, stored, rest[0] if rest else "")


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _names(targets: str | Sequence[str] | None, module: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(_ends_with(module, target) for target in targets or ())


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_pattern_value(field: str, value: Any) -> bool:
    if field == "alpha_pattern":
        return _is_number(value)
    return _is_rank(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_rank, value)))


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and so not NaN


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_expression(value: Any) -> bool:
    """A regular expression or a list of names, as target_modules and exclude_modules are."""
    return _is_regex(value) if isinstance(value, str) else _is_names(value)


def _is_layers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(n) is int for n in value))


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> what is wanted of it, and the test
    **dict.fromkeys(("r", "r1", "r2"), ("an integer from 1", _is_rank)),
    **dict.fromkeys(("lora_alpha", "tau"), ("a finite number", _is_number)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), ("true or false", _is_flag)),
    **dict.fromkeys(("target_modules", "exclude_modules"), ("names or a regular expression", _is_expression)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ("a list of names", _is_names)),
    "peft_type": ("a name", lambda value: isinstance(value, str)),
    "layers_to_transform": ("layer numbers", _is_layers),
    "layers_pattern": ("names", lambda v: all(map(_is_regex, v or [""])) if _is_names(v) else _is_expression(v)),
    "trainable_token_indices": ("row numbers", lambda v: v is None or isinstance(v, list | dict)),
    "along": ("in_features or out_features", lambda value: value in ("in_features", "out_features")),
    "form": (", ".join(FORMS), lambda value: value in FORMS),
    "bias": ("none, all or lora_only", lambda value: value in (None, "none", "all", "lora_only")),
}


def _version(text: Any) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)
