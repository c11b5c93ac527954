"""Will it land? What engines make of an adapter file, by names and shapes: what they apply, at which scale, what they
drop without a word, what they refuse.

The rules are data, each with where it was read and when; engines change, and `d2surgery explain ENGINE` prints what is
assumed here. What was not read is not a rule: an engine without one for something is taken to do it right.
"""

from collections.abc import Iterator
from math import isclose, sqrt
from typing import Any, Literal, NamedTuple

from d2surgery.errors import Problem
from d2surgery.formats.layout import AdapterLayout, Layout, Stored, alpha_divisor
from d2surgery.kinds import TABLE

Fate = Literal["applied", "misread", "dropped", "refused"]
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank
OUTPUTS = ("lm_head", "embed_out", "embed_tokens", "wte")  # what engines do not serve, or only some
PATTERNS, RSLORA = "rank_pattern and alpha_pattern", "use_rslora"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*_ATTENTION, "up_proj", "down_proj", "gate_proj", "w1", "w2", "w3", "gate")


class Sloppy(NamedTuple):
    """What an engine makes of a kind without a word: of files of these formats, along this axis (none: of any)."""

    kind: str
    words: str
    formats: tuple[str, ...] = ()
    axis: str = ""


class Engine(NamedTuple):
    """How an engine reads an adapter; the defaults are those of an engine that serves plain LoRA of linear layers."""

    title: str
    formats: tuple[str, ...]  # that it reads
    takes: str  # the format to write for it
    source: str  # where that was read, and when
    kinds: tuple[str, ...] = ("lora",)
    sloppy: tuple[Sloppy, ...] = ()
    products: bool = False  # LyCORIS's LoHa, LoKr and the like
    stored: tuple[Stored, ...] = ("linear",)
    outputs: bool = False  # also on embeddings and heads
    whole: bool = False  # tensors that replace the base's, token rows
    biases: bool = False
    ignores: tuple[str, ...] = ()  # of PEFT's config
    modules: tuple[str, ...] = ()  # by the last part of the name; none: all
    ranks: tuple[int, ...] = ()  # the steps that it allows; none: any
    usual_rank: int = 0  # the largest that it takes without `option`
    option: str = ""


_GGUF = "convert_lora_to_gguf.py and llama-adapter.cpp of llama.cpp 56bf500; read in November 2026"
ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM", ("peft", "peft-serving"), "peft-serving",
        "vllm/lora/peft_helper.py at e745baf, vllm#10849; read in November 2026",
        ignores=(PATTERNS,), ranks=RANKS, option="--max-lora-rank", usual_rank=16,
    ),
    "sglang": Engine(
        "SGLang", ("peft", "peft-serving"), "peft-serving",
        "sglang's lora.py at 002c60aa, sglang#40835 (open in September 2026)", ignores=(RSLORA,),
    ),
    "lorax": Engine(
        "LoRAX", ("peft", "peft-serving"), "peft-serving",
        "predibase/lorax#299 (rsLoRA, March 2024); of DoRA nothing was found", ignores=(),
    ),
    "tgi": Engine(
        "TGI", ("peft", "peft-serving"), "peft-serving", "nothing was read of it: taken to need the plainest file",
        ignores=(PATTERNS, RSLORA),
    ),
    "tensorrt-llm": Engine(
        "TensorRT-LLM", ("peft", "peft-serving"), "peft-serving",
        "TensorRT-LLM#1668 (rsLoRA, July 2024), #2132 (no DoRA)", ignores=(PATTERNS,),
    ),
    "fireworks": Engine(
        "Fireworks", ("peft", "peft-serving"), "peft-serving", "a copy of its documentation, read in November 2026",
        ignores=(PATTERNS, RSLORA), sloppy=(Sloppy("dora", "applied as LoRA: its config's use_dora is ignored"),),
        modules=_LINEAR, ranks=(4, 8, 16, 32, 64),
    ),
    "llama.cpp": Engine("llama.cpp", ("gguf",), "gguf", _GGUF),
    "ollama": Engine(
        "Ollama", ("gguf",), "gguf", f"{_GGUF}; Ollama's own converter of safetensors permutes lora_A and not lora_B",
    ),
    "mlx": Engine(
        "MLX-LM", ("mlx",), "mlx", "mlx-lm 0.32, tuner/utils.py; run in November 2026",
        kinds=("lora", "dora"), stored=("linear", "embedding", "experts"), outputs=True,
    ),
    "diffusers": Engine(
        "diffusers", ("diffusers", "kohya", "lycoris", "peft"), "diffusers",
        "diffusers 58eb52c, loaders; read in November 2026",
        sloppy=(Sloppy("dora", "applied as LoRA: dora_scale is left out", formats=("lycoris",)),),
        kinds=("lora", "dora"), stored=("linear", "conv"),
    ),
    "comfyui": Engine(
        "ComfyUI", ("kohya", "lycoris", "diffusers"), "lycoris",
        "comfy/weight_adapter at 9c0cf36, ComfyUI#15458 (open in August 2026)",
        sloppy=(Sloppy("dora", "divided by the norm of the base, not of base plus update", axis="out_features"),),
        kinds=("lora", "dora"), products=True, stored=("linear", "conv"), outputs=True, whole=True, biases=True,
    ),
}  # fmt: skip


class Landing(NamedTuple):
    """What becomes of every module, and of what replaces the base's tensors, by name; `problems` say why."""

    engine: str
    fates: dict[str, Fate]
    problems: tuple[Problem, ...]

    @property
    def title(self) -> str:
        """The engine's own name."""
        return ENGINES[self.engine].title

    @property
    def applied(self) -> int:
        return sum(fate == "applied" for fate in self.fates.values())


def lands(layout: Layout, name: str) -> Landing:
    """What the engine of this name makes of an adapter. Raises KeyError for one that ENGINES lacks."""
    engine = ENGINES[name]
    fates: dict[str, Fate] = {}
    problems: list[Problem] = []
    every = [*layout.adapters, *layout.replacements, *layout.rows]
    if layout.format not in engine.formats:
        wanted = f"`d2surgery convert --for {name}`, which writes {engine.takes}"
        message = f"{engine.title} reads {' and '.join(engine.formats)}"
        refused = Problem(code="ENGINE_REFUSES", message=message, wanted=wanted, got=layout.format)
        return Landing(name, dict.fromkeys(every, "refused"), (refused,))
    for module in every:
        entry = layout.adapters.get(module)
        fate, why, wanted, got = _of_adapter(layout, entry, engine) if entry else _of_whole(engine)
        fates[module] = fate
        if fate != "applied":
            message = f"{engine.title}: {why}"
            problems.append(Problem(code=_CODES[fate], message=message, module=module, wanted=wanted, got=got))
    return Landing(name, fates, (*problems, *_rank_option(layout, engine)))


_CODES: dict[Fate, str] = {"misread": "ENGINE_MISREADS", "dropped": "ENGINE_DROPS", "refused": "ENGINE_REFUSES"}


class _Ruling(NamedTuple):
    fate: Fate = "applied"
    why: str = ""
    wanted: str = ""
    got: str = ""


def _of_adapter(layout: Layout, entry: AdapterLayout, engine: Engine) -> _Ruling:
    leaf, title = entry.module.rpartition(".")[2], TABLE[entry.kind].title
    rank = max(entry.ranks.values())
    for sloppy in engine.sloppy:
        of_it = sloppy.kind == entry.kind and sloppy.axis in ("", entry.axis)
        if of_it and (not sloppy.formats or layout.format in sloppy.formats):
            return _Ruling("misread", f"{title} is {sloppy.words}")
    if entry.kind not in engine.kinds:
        return _Ruling("refused", f"no {title}")
    if layout.format == "lycoris" and entry.slots["A"].made and not engine.products:
        return _Ruling("refused", "no products of LyCORIS's")
    if entry.stored not in engine.stored or (leaf in OUTPUTS and not engine.outputs):
        return _Ruling("refused", f"none on {'embeddings and heads' if leaf in OUTPUTS else f'{entry.stored} modules'}")
    if engine.modules and leaf not in engine.modules:
        return _Ruling("dropped", "not among the modules that it serves", ", ".join(engine.modules))
    if "bias" in entry.slots and not engine.biases:
        return _Ruling("refused", "no lora_bias")
    if engine.ranks and rank > engine.ranks[-1]:
        return _Ruling("refused", "the rank", f"at most {engine.ranks[-1]}", str(rank))
    theirs = _scaling(layout, entry, engine)
    if entry.scaling is not None and theirs is not None and not isclose(theirs, entry.scaling, rel_tol=1e-6):
        why = f"ignores {' and '.join(engine.ignores)}"
        return _Ruling("misread", why, f"scaling {entry.scaling:g}", f"{theirs:g}")
    return _Ruling()


def _of_whole(engine: Engine) -> _Ruling:
    why = "no tensors in place of the base's (modules_to_save, token rows)"
    return _Ruling() if engine.whole else _Ruling("refused", why)


def _scaling(layout: Layout, entry: AdapterLayout, engine: Engine) -> float | None:
    """What an engine takes for the scaling that ignores fields of PEFT's config; others read it as it is."""
    config = layout.about.settings
    if layout.format != "peft" or entry.scaling is None or not engine.ignores:
        return entry.scaling
    rank, root = alpha_divisor(entry.ranks), bool(config.get("use_rslora"))
    alpha = entry.scaling * (sqrt(rank) if root else rank)
    if PATTERNS in engine.ignores and (usual := _numbers(config)):
        alpha, rank = usual
    root = root and RSLORA not in engine.ignores
    return alpha / (sqrt(rank) if root else rank)


def _numbers(config: Any) -> tuple[float, float] | None:
    alpha, rank = config.get("lora_alpha"), config.get("r")
    return (alpha, rank) if isinstance(alpha, int | float) and isinstance(rank, int | float) and rank else None


def _rank_option(layout: Layout, engine: Engine) -> Iterator[Problem]:
    """The option to start the engine with, where the usual rank does not do."""
    most = max((rank for entry in layout.adapters.values() for rank in entry.ranks.values()), default=0)
    step = next((allowed for allowed in engine.ranks if allowed >= most), None)
    if engine.option and step is not None and most > engine.usual_rank:
        message = f"start {engine.title} with {engine.option} {step}"
        yield Problem(code="ENGINE_OPTION", severity="info", message=message, got=f"rank {most}")
