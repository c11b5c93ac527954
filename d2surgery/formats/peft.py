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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, NamedTuple

from d2surgery.errors import Problem, Severity
from d2surgery.header import FLOATS, Header
from d2surgery.layout import PAIRS, RANK_GROUPS, AdapterLayout, Layout, Rows, Stored

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
_OTHER_METHODS = re.compile(r"(^|\.)(lora_|hada_|lokr_|vera_|oft_|boft_|ia3_|hra_|prompt_|delora_|vblora_|randlora_)")
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
    reader = _Reader(header, config if config is not None else {})
    embedded = _embedded(header)
    if config is None and embedded is not None:
        reader.config = embedded.get("config", {})
    elif config is not None and embedded is not None and embedded.get("config") != config:
        reader.problem("CONFIG_DISAGREES", "adapter_config.json is not the config inside the file", severity="warning")
        embedded = None
    if not reader.config and not _looks_like_peft(header):
        return None
    reader.exact_scaling = (embedded or {}).get("scaling", {})
    return reader.read()


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


def _embedded(header: Header) -> dict[str, Any] | None:
    """Our own config inside the file; diffusers puts a PEFT config there as well, but only its pipelines read it."""
    try:
        value = json.loads(header.metadata[METADATA])
    except (KeyError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _looks_like_peft(header: Header) -> bool:
    return any(key.startswith(PREFIX) or f".{_TOKENS}" in key for key in header.tensors) or any(
        part in _LEAVES and not key.startswith(("unet.", "transformer.", "text_encoder"))
        for key in header.tensors
        for part in key.split(".")
    )


class _Leaf(NamedTuple):
    slot: str
    stored: Stored
    adapter: str  # the adapter's name before .weight, mostly absent or "default"


@dataclass
class _Group:
    """The tensors found for one module, before they are known to fit."""

    stored: Stored = "linear"
    keys: dict[str, str] = field(default_factory=dict)
    adapter: str = ""


class _Reader:
    """One pass over the keys, one over the groups; problems pile up and nothing raises."""

    def __init__(self, header: Header, config: Mapping[str, Any]) -> None:
        self.header = header
        self.config = config
        self.exact_scaling: Mapping[str, float] = {}
        self.problems: list[Problem] = []
        self.unread: list[str] = []

    def problem(self, code: str, message: str, severity: Severity = "error", **where: str) -> None:
        where.setdefault("file", self.header.files[0].name)
        self.problems.append(Problem(code=code, message=message, severity=severity, **where))

    # Reading -----------------------------------------------------------------------------------------------------

    def read(self) -> Layout:
        if not self.config:
            self.problem("MISSING_CONFIG", "no adapter_config.json: ranks are known, scaling is not")
        self._check_config()
        method = self.config.get("peft_type", "LORA")
        if method not in METHODS:
            self.problem("UNSUPPORTED_METHOD", f"peft_type is {method}", wanted=", ".join(METHODS), got=str(method))
            return self._layout({}, {}, {}, unread=tuple(self.header.tensors))
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
            unread=unread,
            problems=tuple(self.problems),
        )

    def _sort_keys(self) -> tuple[dict[str, _Group], dict[str, str], dict[str, Rows]]:
        groups: dict[str, _Group] = {}
        replacements: dict[str, str] = {}
        rows: dict[str, Rows] = {}
        for key in self.header.tensors:
            name = _bare(key)
            module, leaf = _leaf(name)
            if 0 in self.header.tensors[key].shape:
                self._skip(key, "EMPTY_TENSOR", "no elements", got=str(self.header.tensors[key].shape))
            elif leaf is not None:
                self._add_slot(groups, module, leaf, key)
            elif _TOKENS in name.split("."):
                self._add_rows(rows, name, key)
            elif _OTHER_METHODS.search(name) or self.header.tensors[key].dtype not in (*FLOATS, "F8_E4M3", "F8_E5M2"):
                self._skip(key, "UNKNOWN_TENSOR", "no slot of LoRA, DoRA, Dual LoRA or D2-LoRA")
            else:
                self._add_replacement(replacements, name, key)
        return groups, replacements, rows

    def _skip(self, key: str, code: str, message: str, got: str = "") -> None:
        self.unread.append(key)
        self.problem(code, message, module=key, got=got)

    def _add_slot(self, groups: dict[str, _Group], module: str, leaf: _Leaf, key: str) -> None:
        group = groups.setdefault(module, _Group(adapter=leaf.adapter))
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
        count = self.header.tensors[key].shape[0]
        numbers = (
            tuple(indices) if isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices) else ()
        )
        if len(set(numbers)) != count:
            self._skip(key, "TOKEN_INDICES", f"{module} needs {count} different row numbers", got=str(indices)[:80])
        else:
            rows[f"{module}.weight"] = Rows(key, numbers)

    # One adapter -------------------------------------------------------------------------------------------------

    def _adapter(self, name: str, group: _Group) -> AdapterLayout | None:
        before = len(self.problems)
        kind = self._kind(name, group)
        module, experts = self._experts(name, group) if kind == "lora" and "A" in group.keys else (name, 1)
        ranks = self._ranks(module, kind, group, experts) if kind else {}
        if kind:
            self._check_shapes(module, kind, group, experts)
        if kind is None or any(problem.severity == "error" for problem in self.problems[before:]):
            self.unread.extend(group.keys.values())
            return None
        down, up = (self.header.tensors[group.keys[slot]] for slot in _first_pair(kind))
        stored: Stored = "experts" if module != name else "conv" if len(down.shape) > 2 else group.stored
        return AdapterLayout(
            module=module,
            kind=kind,
            stored=stored,
            slots=group.keys,
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
            kind = allowed[-1]
        missing = set(slots_of(kind)) - slots
        for slot in sorted(missing - {"magnitude"}):
            self.problem("MISSING_HALF", f"has {', '.join(sorted(slots))} but no {slot}", module=name)
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
        targets = self.config.get("target_parameters") or ()
        short = {t.rpartition(".")[2] for t in targets if _ends_with(module, t.rpartition(".")[0])}
        if not short:
            if depth:
                self.problem("UNSUPPORTED_VARIANT", "nested base_layer without target_parameters", module=name)
            return name, 1
        ordered = sorted(short, key=lambda p: _PARAMETER_ORDER.index(p) if p in _PARAMETER_ORDER else -1)
        if len(short) > 1 and not short <= set(_PARAMETER_ORDER):
            self.problem("AMBIGUOUS_PARAMETER", "cannot tell the parameters apart", module=name, got=", ".join(short))
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
        if self.config:
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
        return value if type(value) is int and value > 0 else 8  # _check_config has named what is not a rank

    def _scaling(self, module: str, kind: str, ranks: Mapping[str, int]) -> float | None:
        if not self.config:
            return None
        if module in self.exact_scaling:
            return float(self.exact_scaling[module])
        alpha = self.patterns["alpha_pattern"].value(module, self.config.get("lora_alpha", 8))
        if type(alpha) not in (int, float):
            return None
        if kind == "duallora":
            return float(alpha) / sqrt(prod(ranks.values()))
        rank = next(iter(ranks.values()))
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check_shapes(self, module: str, kind: str, group: _Group, experts: int) -> None:
        shapes = {slot: self.header.tensors[key].shape for slot, key in group.keys.items()}
        downs = [slot for slot in slots_of(kind) if slot in PAIRS]
        flat = [slot for slot in (*downs, *(PAIRS[d] for d in downs)) if len(shapes[slot]) < 2]
        for slot in flat:
            self.problem("SHAPE_UNEXPECTED", f"{slot} is not a matrix", module=module, got=str(shapes[slot]))
        if flat:
            return
        for down in downs:
            a, b = shapes[down], shapes[PAIRS[down]]
            if prod(b[1:]) != a[0]:
                code = "GROUPED_CONV" if len(a) > 2 and a[0] % prod(b[1:]) == 0 else "RANK_MISMATCH"
                self.problem(code, f"{down} {a} and {PAIRS[down]} {b} do not multiply", module=module)
        out = shapes[PAIRS[downs[0]]][0]
        for slot in {"magnitude", "bias"} & shapes.keys():
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
        for name in ("r", "r1", "r2"):
            if name in config and not (type(config[name]) is int and config[name] > 0):
                self.problem("BAD_CONFIG", f"{name} is not a rank", wanted="an integer from 1", got=str(config[name]))
        if type(config.get("lora_alpha", 8)) not in (int, float):
            self.problem("BAD_CONFIG", "lora_alpha is not a number", got=str(config["lora_alpha"]))
        self.patterns = {
            name: _Patterns(self._good_patterns(name, config.get(name) or {}))
            for name in ("rank_pattern", "alpha_pattern")
        }
        if config.get("along", "in_features") not in ("in_features", "out_features"):
            self.problem("BAD_CONFIG", "along", wanted="in_features or out_features", got=str(config["along"]))
        if config.get("form", FORMS[0]) not in FORMS:
            self.problem("BAD_CONFIG", "form", wanted=", ".join(FORMS), got=str(config["form"]))

    def _good_patterns(self, name: str, patterns: Any) -> dict[str, Any]:
        if not isinstance(patterns, Mapping):
            self.problem("BAD_CONFIG", f"{name} is not an object", got=type(patterns).__name__)
            return {}
        good = {key: value for key, value in patterns.items() if _is_regex(key) and _is_pattern_value(name, value)}
        for key in patterns.keys() - good.keys():
            self.problem("BAD_CONFIG", f"{name} entry {key!r}", wanted="a regular expression and a number")
        return good

    def _check_targets(self, adapters: Mapping[str, AdapterLayout]) -> None:
        for module, adapter in adapters.items():
            if adapter.stored != "experts" and self.config and not self._targeted(module):
                self.problem("NOT_TARGETED", "has factors but is not in target_modules", module=module)

    def _targeted(self, module: str) -> bool:
        config = self.config
        targets = config.get("target_modules")
        if config.get("ensure_weight_tying") or targets is None or targets == "all-linear":
            return True  # PEFT adds the tied module by itself; no list and the shorthand say nothing of names
        if isinstance(targets, str):
            return _is_regex(targets) and re.fullmatch(targets, module) is not None
        return any(_ends_with(module, target) for target in targets) and self._layer_chosen(module)

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
            for key in patterns.patterns.keys() - {key for found in matched.values() for key in found}:
                if adapters:
                    self.problem("PATTERN_UNMATCHED", f"{name}: {key!r}", severity="warning")
            for module, found in matched.items():
                values = sorted({str(patterns.patterns[key]) for key in found})
                if len(values) > 1:
                    message = f"{name} gives {', '.join(values)}"
                    self.problem("AMBIGUOUS_PATTERN", message, severity="warning", module=module)

    def _check_replacements(self, replacements: dict[str, str], adapters: Mapping[str, AdapterLayout]) -> None:
        bias = self.config.get("bias", "none")
        declared = self.config.get("modules_to_save") or ()
        for target, key in list(replacements.items()):
            module, _, leaf = target.rpartition(".")
            plain_bias = leaf == "bias" and module in adapters and ".base_layer." not in key
            if plain_bias and bias == "none":
                del replacements[target]
                self._skip(key, "UNEXPECTED_BIAS", "a full bias of an adapted module")
            elif plain_bias:
                self.problem("PEFT_IGNORES_BIAS", "applied all the same", severity="warning", module=target)
            elif self.config and not (
                (leaf == "bias" and bias != "none")
                or ".base_layer." in key
                or any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in declared)
            ):
                self.problem("UNDECLARED_REPLACEMENT", "saved in full", severity="info", module=target)
        saved_biases = any(target.endswith(".bias") for target in replacements)
        if bias == "lora_only" and not saved_biases and adapters:
            self.problem("BIAS_NOT_SAVED", "bias='lora_only' but the file holds no bias", severity="warning")


FORMS = ("projected_plus_update", "projected", "update")


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


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_pattern_value(field: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(v) is int and v > 0 if field == "rank_pattern" else type(v) in (int, float) for v in values)


def _version(text: Any) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)
