"""Reading and writing a TrainConfig: from a TOML file, from options, or from both.

A section of the file is a dataclass of `settings`, a key one of its fields, and an option of the command line the same
field again: nothing is listed twice. `resolved` is written back as TOML that reads as the same config.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from d2surgery.errors import Problem, brief, raise_errors
from d2surgery.files.reading import read_toml
from d2surgery.kinds import TABLE
from d2surgery.machine import uncollected
from d2surgery.training.settings import KIND_OPTIONS, Hint, Range, TrainConfig

_SHOWN, _LARGEST = 60, 1e300  # keys of a section; of a number, as is NaN not


class Setting(NamedTuple):
    """A field of the config: the section it stands in ("" for the top), its name, type and default, and what it is."""

    section: str
    name: str
    type: Any
    default: Any  # MISSING where it has to be given
    about: Hint

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def words(self) -> tuple[str, ...]:
        """What it may be, where that is one of several words."""
        kind = plain(self.type)
        return get_args(kind) if get_origin(kind) is Literal else self.about.among


def settings() -> list[Setting]:
    """Every setting, in the order of the file."""
    return [*_settings(TrainConfig, "")]


def read_config(path: str | os.PathLike[str] | None, options: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a TOML file, overridden by options by their bare names (`rank`, not `adapter.rank`).

    Raises D2SurgeryError: FILE_MISSING, FILE_UNREADABLE, and BAD_CONFIG with everything that does not fit.
    """
    document = {} if path is None else read_toml(Path(path))
    where = "" if path is None else str(path)
    sections = {setting.name: setting.section for setting in settings()}
    for name, value in (options or {}).items():
        part = document.setdefault(sections[name], {}) if sections[name] else document
        if isinstance(part, dict):  # else a problem of its own
            part[name] = value
    return parse(document, where)


def parse(document: Mapping[str, Any], where: str = "") -> TrainConfig:
    """A config from nested values. Raises BAD_CONFIG with everything that does not fit."""
    problems = [replace(problem, file=where) for problem in _unknown(document)]
    values: dict[str, Any] = {}
    for setting in settings():
        part = document.get(setting.section, {}) if setting.section else document
        if not isinstance(part, Mapping):
            continue
        if setting.name not in part:
            problems += [_bad(setting.key, "not given", setting, where)] if setting.required else []
            continue
        try:
            values[setting.key] = _converted(part[setting.name], setting)
        except ValueError as error:
            problems.append(_bad(setting.key, str(error), setting, where, _shown(part[setting.name])))
    raise_errors(problems)
    config: TrainConfig = _build(TrainConfig, "", values)
    raise_errors(replace(problem, file=where) for problem in _contradictions(config))
    return config


def to_toml(config: TrainConfig) -> str:
    """The config as a file that reads as the same config."""
    lines: list[str] = []
    section = ""
    for setting in settings():
        value = getattr(getattr(config, setting.section) if setting.section else config, setting.name)
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        lines += [] if value is None else [f"{setting.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def differences(one: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that change what is learnt and differ, by key."""
    a, b = asdict(one), asdict(other)
    pairs = {
        setting.key: tuple((d[setting.section] if setting.section else d)[setting.name] for d in (a, b))
        for setting in settings()
        if setting.about.numbers
    }
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y}


# Reading ---------------------------------------------------------------------------------------------------------


def _settings(section: type, name: str) -> Iterator[Setting]:
    hints = get_type_hints(section, include_extras=True)
    for part in fields(section):
        if not is_dataclass(hints[part.name]):
            kind, about = get_args(hints[part.name])
            default = part.default if part.default_factory is MISSING else part.default_factory()
            yield Setting(name, part.name, kind, default, about)
    for part in fields(section):
        if is_dataclass(hints[part.name]):
            yield from _settings(hints[part.name], part.name)


def _build(section: type[Any], name: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(section)
    chosen = {}
    for part in fields(section):
        if is_dataclass(hints[part.name]):
            chosen[part.name] = _build(hints[part.name], part.name, values)
        elif (key := f"{name}.{part.name}" if name else part.name) in values:
            chosen[part.name] = values[key]
    return section(**chosen)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 80 else brief(value)


def _unknown(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that are no setting, with the nearest that is."""
    known = {setting.key for setting in settings()}
    sections = {setting.section for setting in settings()} - {""}
    for key, value in islice(document.items(), _SHOWN):
        if key in sections and not isinstance(value, Mapping):
            yield Problem(code="BAD_CONFIG", message="not a section", module=key, wanted=f"[{key}]", got=brief(value))
            continue
        inner = value if key in sections else None
        for full in [key] if inner is None else [f"{key}.{name}" for name in islice(inner, _SHOWN)]:
            if full not in known:
                is_section = isinstance(value, Mapping) and inner is None
                near = difflib.get_close_matches(full, sections, n=1, cutoff=0.5) or sorted(sections)
                wanted = ", ".join(f"[{name}]" for name in near) if is_section else _nearest(full, known)
                message = "no such section" if is_section else "no such key"
                yield Problem(code="BAD_CONFIG", message=message, module=brief(full), wanted=wanted)


def _nearest(key: str, known: set[str]) -> str:
    """The key itself in another section, else the likest, else those of its section."""
    name = key.rpartition(".")[2]
    same = sorted(other for other in known if other.rpartition(".")[2] == name)
    near = same or difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.6)
    near = near or [k for k in sorted(known) if difflib.SequenceMatcher(None, name, k.rpartition(".")[2]).ratio() > 0.6]
    section = key.rpartition(".")[0]
    return " or ".join(near[:2]) or ", ".join(sorted(other for other in known if other.rpartition(".")[0] == section))


def _bad(key: str, message: str, setting: Setting, where: str, got: str = "") -> Problem:
    wanted = _in_words(setting)
    return Problem(code="BAD_CONFIG", message=message, module=key, file=where, wanted=wanted, got=got)


def _in_words(setting: Setting) -> str:
    kind = plain(setting.type)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if setting.words:
        text = " or ".join(setting.words)
    elif get_origin(kind) is tuple:
        text = "a list of texts"
    elif get_origin(kind) is dict:
        text = "numbers by name"
    else:
        text = words[kind]
    within = setting.about.within
    return text + (f", {within.words}" if within else "")


def plain(hint: Any) -> Any:
    """The type of an annotation without `| None`."""
    parts = get_args(hint)
    return next(part for part in parts if part is not type(None)) if type(None) in parts else hint


def _converted(value: Any, setting: Setting) -> Any:
    """The value in its field's type. Raises ValueError with the short reason."""
    kind = plain(setting.type)
    within = setting.about.within
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ValueError("not numbers by name")
        return {str(name): _number(number, float, within) for name, number in value.items()}
    if get_origin(kind) is tuple:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) and part for part in parts):
            raise ValueError("not a list of texts")
        if setting.required and not parts:
            raise ValueError("empty")
        return tuple(parts)
    if setting.words:
        if value not in setting.words:
            raise ValueError("no such choice")
        return value
    if kind in (int, float):
        return _number(value, kind, within)
    if not isinstance(value, kind) or value == "":
        raise ValueError("of another type" if value != "" else "empty")
    return value


def _number(value: Any, kind: type, within: Range | None) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        raise ValueError("not a number, or one of no sensible size")
    if kind is int and value != int(value):
        raise ValueError("not a whole number")
    if within and not within.holds(value):
        raise ValueError("out of range")
    return kind(value)


def _contradictions(config: TrainConfig) -> Iterator[Problem]:
    """Settings that are right by themselves and not together."""
    adapter = config.adapter

    def bad(key: str, message: str, **details: str) -> Problem:
        return Problem(code="BAD_CONFIG", message=message, module=key, **details)  # type: ignore[arg-type]

    if config.kind_options:
        with uncollected():  # torch, which other configs can do without until they train
            from d2surgery.adapters import KINDS
            from d2surgery.live.attaching import options_of

        known = options_of(KINDS[adapter.kind])
        has = ", ".join(sorted(known & set(KIND_OPTIONS))) or "none"
        for name in sorted(set(config.kind_options) - known):
            yield bad(f"adapter.{name}", f"{adapter.kind} has no such option", wanted=has)
    if adapter.kind == "dora" and adapter.along == "in_features":
        message = "a DoRA that is saved in PEFT's form keeps one magnitude per output feature"
        yield bad("adapter.along", message, wanted="out_features", got="in_features")
    if adapter.rslora and len(TABLE[adapter.kind].groups) > 1:
        yield bad("adapter.rslora", f"{adapter.kind} has no such scaling", wanted="alpha alone")
    if adapter.scaling_warmup is not None and adapter.kind != "duallora":
        yield bad("adapter.scaling_warmup", "only Dual LoRA starts away from the base", wanted="optimizer.warmup")
    if config.group_rank < 1 or (config.group_rank != adapter.rank and adapter.rank % 2):
        message = f"the two groups of {adapter.kind} share the rank"
        yield bad("adapter.rank", message, wanted="an even rank, or matched = false", got=str(adapter.rank))
    if config.run.precision == "fp16" and adapter.kind == "duallora" and adapter.ste in (None, "clip"):
        message = "fp16 multiplies gradients by the scaler's factor, and clipping would see them so"
        yield bad("adapter.ste", message, wanted="bf16, or ste mask or identity", got="clip")
    slots = TABLE[adapter.kind].slots
    learning = [slot for slot in slots if not (adapter.detach_minus and slot.endswith("_minus"))]
    for slot in config.optimizer.lr_ratio:
        if slot not in learning:
            message = "it does not learn" if slot in slots else "no such slot"
            yield bad(f"optimizer.lr_ratio.{slot}", message, wanted=" or ".join(learning))
    if config.data.goal == "labels" and config.data.batching == "packed":
        yield bad("data.batching", "a row has one label", wanted="shuffled or by_length", got="packed")
    if config.data.goal == "labels" and config.run.quantization:
        yield bad("run.quantization", "the head is trained whole", wanted="none", got=config.run.quantization)
    for name in ("patience", "best"):
        if getattr(config.run, name) and not config.data.held_out_limit:
            yield bad(f"run.{name}", "nothing is held out to be judged by", wanted="held_out_limit of more than 0")
    if config.optimizer.steps and (adapter.scaling_warmup or 0) > config.optimizer.steps:
        message = "the scaling would not have finished rising"
        yield bad("adapter.scaling_warmup", message, wanted=f"at most {config.optimizer.steps}")


# Writing ---------------------------------------------------------------------------------------------------------


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, save that TOML also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(name)} = {_toml(number)}' for name, number in value.items())}}}"
    return repr(value)
