"""adapter_config.json: which of its fields can be used, and what they say of each module."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from math import sqrt
from types import MappingProxyType
from typing import Any

from d2surgery.errors import Problem, brief, refuse
from d2surgery.formats.layout import About, alpha_divisor, lies_within
from d2surgery.formats.patterns import Matcher
from d2surgery.formats.peft.fields import PLAIN, good, is_number, is_table, misfits
from d2surgery.formats.peft.keys import TOKENS
from d2surgery.kinds import TABLE

_OURS = ("r1", "r2", "tau", "along", "form", "format_version", "training")
_FIELDS = frozenset(  # every field of PEFT 0.21.2's LoraConfig, 0.2's two that are gone, unsloth's and ours
    re.findall(
        r"\w+",
        """
        task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
        exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
        layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
        trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora alora_invocation_tokens
        use_qalora qalora_group_size layer_replication runtime_config lora_bias target_parameters use_bdlora
        arrow_config ensure_weight_tying kasa_config velora_config monteclora_config enable_lora merge_weights
        lora_B_layout
        """,
    )
) | frozenset(_OURS)
_VARIANTS = {  # config field -> the variant's name, when the field is set
    "alora_invocation_tokens": "aLoRA (applies to some tokens only)",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow (routes between adapters)",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def peft_type(kind: str, settings: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The config's peft_type for a kind: PEFT's own LoRA and DoRA share one. Its DoRA keeps a magnitude per output
    feature; another's form is ours, and PEFT refuses it."""
    theirs = kind == "lora" or (kind == "dora" and settings.get("along", "out_features") == "out_features")
    return "LORA" if theirs else kind.upper()


def methods() -> dict[str, tuple[str, ...]]:
    """peft_type -> the kinds that a file of it may hold."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in reversed(TABLE):
        for name in dict.fromkeys((peft_type(kind), kind.upper())):
            found[name] = (*found.get(name, ()), kind)
    return found


class Patterns:
    """A rank_pattern or alpha_pattern: PEFT takes the first that matches `(.*\\.)?(pattern)$`, in file order."""

    def __init__(self, patterns: Mapping[str, Any], matcher: Matcher | None = None) -> None:
        self.patterns, self.matcher = patterns, matcher or Matcher()
        self._ends = [(key, _literal_end(key)) for key in patterns]
        self._found: dict[str, list[str]] = {}

    def matching(self, module: str) -> list[str]:
        if module not in self._found:
            self.matcher.spend(len(self._ends) // 8)
            near = [(key, end) for key, end in self._ends if module.endswith(end)]
            self._found[module] = [key for key, end in near if self._matches(key, bool(end), module)]
        return self._found[module]

    def value(self, module: str, default: Any) -> Any:
        found = self.matching(module) if self.patterns else []
        return self.patterns[found[0]] if found else default

    def _matches(self, pattern: str, plain: bool, module: str) -> bool:
        before, end = module[: -len(pattern)], module[-len(pattern) :]
        if plain and end.count(".") >= pattern.count("."):  # then no dot stands for another character
            return end == pattern and (not before or before.endswith("."))
        return self.matcher.fits(rf"(.*\.)?({pattern})$", module)


class Config:
    """A config without the fields that make no sense, `unusable`."""

    def __init__(self, found: Mapping[str, Any], exact: Mapping[str, float]) -> None:
        self.found, self.exact = found, exact  # exact: module -> scaling to its last bit, from the file's own header

    @cached_property
    def matcher(self) -> Matcher:
        return Matcher()

    @cached_property
    def misfits(self) -> tuple[tuple[str, dict[str, str]], ...]:
        """Each field that cannot be used, and what is wrong with it."""
        return tuple(misfits(self.found, self.matcher))

    @cached_property
    def unusable(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.misfits)

    @cached_property
    def values(self) -> dict[str, Any]:
        return {name: value for name, value in self.found.items() if name not in self.unusable}

    @cached_property
    def rank_pattern(self) -> Patterns:
        return Patterns(good("rank_pattern", self.found, self.matcher), self.matcher)

    @cached_property
    def alpha_pattern(self) -> Patterns:
        return Patterns(good("alpha_pattern", self.found, self.matcher), self.matcher)

    @cached_property
    def get(self) -> Callable[..., Any]:
        """`values.get` itself: every module asks a dozen times."""
        return self.values.get

    def __bool__(self) -> bool:
        return bool(self.values)

    # Of one module -----------------------------------------------------------------------------------------------

    def rank(self, module: str, field: str = "r") -> int:
        value = self.rank_pattern.value(module, self.get(field, self.get("r", 8)))
        if isinstance(value, list) and len(value) == 2:  # Dual LoRA's [r1, r2]
            value = value[field == "r2"]
        return int(value)

    def ranks(self, module: str, kind: str) -> dict[str, int] | None:
        """Group -> rank; None where the config does not say."""
        if not self or self.unusable & {"r", "r1", "r2", "rank_pattern"}:
            return None
        return {name: self.rank(module, group.rank) for name, group in TABLE[kind].groups.items()}

    def scaling(self, module: str, kind: str, ranks: Mapping[str, int]) -> float | None:
        if not self or self.unusable & {"lora_alpha", "alpha_pattern", "use_rslora"}:
            return None
        if module in self.exact:
            return float(self.exact[module])
        alpha, rank = self.alpha_pattern.value(module, self.get("lora_alpha", 8)), alpha_divisor(ranks)
        return float(alpha) / (sqrt(rank) if self.root(kind) else rank)

    def root(self, kind: str) -> bool:
        """rsLoRA, which is not defined for groups with a rank of their own each."""
        return bool(self.get("use_rslora")) and len({group.rank for group in TABLE[kind].groups.values()}) == 1

    def misread(self, kind: str, scaling: float | None, ranks: Iterable[tuple[str, int]]) -> dict[str, float]:
        """What other readers of this config take for the scaling of a module with these ranks by group."""
        if scaling is None:
            return {}
        rank, root = alpha_divisor(dict(ranks)), self.root(kind)
        alpha = scaling * (sqrt(rank) if root else rank)
        first = {"alpha/r instead of alpha/√r": alpha / rank} if root else {
            "alpha/√r instead of alpha/r": alpha / sqrt(rank)
        }  # fmt: skip
        found = first | {"alpha": alpha}
        general = self.get("lora_alpha"), self.get("r")
        usual_alpha, usual_rank = (x if isinstance(x, int | float) else None for x in general)
        if (self.get("alpha_pattern") or self.get("rank_pattern")) and usual_alpha and usual_rank:
            divided = sqrt if root else float
            found["alpha/r of the config, no patterns"] = usual_alpha / divided(usual_rank)
            found["alpha of the config over this module's r"] = usual_alpha / divided(rank)
            found["this module's alpha over r of the config"] = alpha / divided(usual_rank)
        return found

    def targeted(self, module: str) -> bool:
        if self.get("ensure_weight_tying"):
            return True  # PEFT adds the tied module by itself
        if self.get("target_modules") in (None, "all-linear"):
            return True  # neither says anything of names
        return self.listed(module) and not self._named("exclude_modules", module)

    def listed(self, module: str) -> bool:
        is_expression = isinstance(self.get("target_modules"), str)
        return self._named("target_modules", module) and (is_expression or self._layer_chosen(module))

    def _named(self, field: str, module: str) -> bool:
        """PEFT's rule: a string is a regular expression for the whole name, a list holds ends of names."""
        targets = self.get(field)
        if isinstance(targets, str):
            return self.matcher.fits(targets, module)
        if field not in self._lists:
            self._lists[field] = frozenset(targets or ())
        return bool(self._lists[field]) and not self._lists[field].isdisjoint(ends(module))

    @cached_property
    def _lists(self) -> dict[str, frozenset[str]]:
        return {}

    def _layer_chosen(self, module: str) -> bool:
        chosen = self.get("layers_to_transform")
        if chosen in (None, []):
            return True
        patterns = self.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if (number := _layer(self.matcher, pattern, module)) is not None:
                return number in ([chosen] if isinstance(chosen, int) else chosen)
        return False

    def wants(self, module: str) -> bool | None:
        """Whether target_modules name it; None where they name nothing. What is saved whole gets no factors."""
        if self.get("target_modules") in (None, "all-linear"):
            return None
        saved = any(f".{name}." in f".{module}." for name in self.get("modules_to_save") or ())
        return self.listed(module) and not saved and not self._named("exclude_modules", module)

    def absent(self, held: Iterable[str], *, adapted: bool) -> Iterator[str]:
        """What the config names and the file lacks; held: the base tensors that its keys belong to."""
        held = list(held) if self.get("modules_to_save") or self.get("trainable_token_indices") else []
        saved = [name for name in self.get("modules_to_save") or () if not any(lies_within([name], t) for t in held)]
        heads = _HEADS.get(str(self.get("task_type")), ())
        found = any(lies_within(heads, tensor) for tensor in held)  # PEFT adds every name that a head may have
        yield from (f"modules_to_save: {name}" for name in saved if not (found and name in heads))
        if self.get("trainable_token_indices") and not any(TOKENS in tensor.split(".") for tensor in held):
            yield "trainable_token_indices"
        if self.get("target_modules") and not adapted:
            yield f"target_modules: {brief(self.get('target_modules'))}"

    def declares(self, name: str) -> bool:
        """Part of a module that is saved whole: a BatchNorm's integer counter is, for one. PEFT adds a task's heads."""
        heads = _HEADS.get(str(self.get("task_type")), ())
        return lies_within([*(self.get("modules_to_save") or ()), *heads], name)

    def settings(self, kind: str) -> dict[str, Any]:
        """The kind's own settings; PEFT's DoRA has none of its own."""
        row, training = TABLE[kind], self.get("training")
        ours = row.settings if self.get("peft_type", peft_type(kind)) != "LORA" else {}
        chosen = {name: type(default)(self.get(name, default)) for name, default in ours.items()}
        how = {name: training[name] for name in row.training if name in training} if is_table(training) else {}
        return dict(row.settings) | chosen | how

    def about(self) -> About:
        base, version, training = (self.get(n) for n in ("base_model_name_or_path", "peft_version", "training"))
        return About(
            base_model=base if isinstance(base, str) and base else None,
            task=self.get("task_type") if isinstance(self.get("task_type"), str) else None,
            model_class=self._model_class,
            tied=bool(self.get("ensure_weight_tying")),
            transposed=bool(self.get("fan_in_fan_out")),
            saved_modules=tuple(self.get("modules_to_save") or ()),
            version=version if isinstance(version, str) else None,
            alpha=self.get("lora_alpha") if is_number(self.get("lora_alpha")) else None,
            dropout=self.get("lora_dropout") if is_number(self.get("lora_dropout")) else None,
            training=dict(training) if is_table(training) else {},
            settings=self.values,
            targets=self.wants,
        )

    @property
    def _model_class(self) -> str | None:
        """PEFT notes it where no task_type is given."""
        mapping = self.get("auto_mapping")
        name = mapping.get("base_model_class") if is_table(mapping) else None
        return name if isinstance(name, str) else None

    @property
    def by_unsloth(self) -> bool:
        """Whether unsloth has left a mark: in the mapping that it writes, or as the owner of the base."""
        mapping, base = self.get("auto_mapping"), self.get("base_model_name_or_path")
        return (is_table(mapping) and "unsloth_fixed" in mapping) or str(base).startswith("unsloth/")

    def problems(self, file: str) -> Iterator[Problem]:
        """What is wrong with the config by itself."""

        def said(code: str, message: str, **details: str) -> Problem:
            return Problem(code=code, message=message, file=file, **details)  # type: ignore[arg-type]

        for name in sorted(set(self.found) - _FIELDS - {s for kind in TABLE.values() for s in kind.settings}):
            yield said("UNKNOWN_CONFIG_FIELD", f"{brief(name)} = {brief(self.found[name])}", severity="warning")
        for name, variant in _VARIANTS.items():
            if self.found.get(name):
                yield said("UNSUPPORTED_VARIANT", f"{variant}: {name} is set")
        init = self.found.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
            yield said("MUTATED_BASE", f"init_lora_weights is {brief(init)}")
        if self.found.get("enable_lora"):
            yield said("MERGED_LINEAR", f"enable_lora is {brief(self.found['enable_lora'])}")
        if self.found.get("layer_replication"):
            yield said("LAYER_REPLICATION", f"layer_replication is {brief(self.found['layer_replication'])}")
        for _, problem in self.misfits:
            yield said("BAD_CONFIG", **problem)


def pattern_problems(config: Config, modules: Iterable[str], file: str, *, complete: bool) -> Iterator[Problem]:
    """Patterns that match nothing, where all modules are `complete`, and modules for which several with different
    values match."""
    modules = list(modules)
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        matched = {module: patterns.matching(module) for module in modules}
        used = {key for found in matched.values() for key in found}
        for key in patterns.patterns:
            if modules and complete and key not in used:
                yield Problem(code="PATTERN_UNMATCHED", message=f"{name}: {key!r}", severity="warning", file=file)
        for module, found in matched.items():
            values = sorted({str(patterns.patterns[key]) for key in found})
            if len(values) > 1:
                message = f"{name} gives {', '.join(values)}"
                yield Problem(code="AMBIGUOUS_PATTERN", message=message, severity="warning", file=file, module=module)


# Names -----------------------------------------------------------------------------------------------------------


def _literal_end(pattern: str) -> str:
    """What a matching name must end with, where the pattern is a plain name.

    EVA writes a pattern for every module: 450 × 450 regular expressions would take longer than all else.
    """
    return pattern.rpartition(".")[2] if PLAIN.fullmatch(pattern) else ""


def ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _layer(matcher: Matcher, pattern: str, module: str) -> int | None:
    """The number in `(?:^|.*?\\.)pattern\\.(\\d+)\\.`, from the first place where that fits."""
    for start in (0, *(at + 1 for at, sign in enumerate(module) if sign == ".")):
        found = matcher.ends(pattern, module, start)
        numbers = {m[1] for m in re.finditer(r"\.(\d{1,9})(?=\.)", module) if found >> m.start() & 1}
        if len(numbers) > 1:
            raise refuse("BAD_CONFIG", "layers_pattern gives a module several numbers", module=module, got=pattern)
        if numbers:
            return int(numbers.pop())
    return None


def ends(module: str) -> Iterator[str]:
    """The module's name and all that is left of it after a dot: `a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def version_of(text: Any) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text) if isinstance(text, str) else None
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)
