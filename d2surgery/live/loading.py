"""Models as transformers runs them: a directory as it is, with an adapter live in it, or merged in memory.

`unmerged` is what the adapter means: linear layers by their own forward (`attach`), everything else an adapter file
can hold (embeddings, convolutions, experts, added biases, replaced weights and token rows) by its effective values.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2surgery.adapters import Adapter
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import Header
from d2surgery.files.tensors import DTYPES, rounded
from d2surgery.files.tokenizers import TOKENIZER_CONFIG, VOCABULARIES
from d2surgery.formats.layout import About, AdapterLayout
from d2surgery.live import quiet
from d2surgery.live.attaching import attach, name_in
from d2surgery.live.layers import is_linear
from d2surgery.live.quantization import Quantization, by_bitsandbytes, loading_options, quantization_of
from d2surgery.placement.fit import new_labels
from d2surgery.placement.sites import sites

Directory = str | os.PathLike[str]

_HEADS = {  # an adapter's task_type -> transformers' class with the head it was trained with
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def load_model(
    directory: Directory,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kind: Any = None,
    quantization: Quantization | None = None,
) -> nn.Module:
    """The model of a directory, ready to run; `dtype` None keeps the stored one, `kind` None asks its config.

    Raises D2SurgeryError NOT_RUNNABLE when transformers cannot build it, or would make up weights that are missing;
    with `quantization` what `quantization_of` raises.
    """
    stored = BaseWeights(directory).config.get("quantization_config")
    held = (
        quantization_of(stored, quantization, base=str(directory)) if quantization or by_bitsandbytes(stored) else None
    )
    how = loading_options(held, stored=stored is not None, dtype=dtype or torch.float32, device=device)
    model, missing = _load(Path(directory), kind or model_kind(directory), dtype, how)
    if missing:
        got = f"{', '.join(sorted(missing)[:4])}{' …' if len(missing) > 4 else ''}"
        raise refuse("NOT_RUNNABLE", "weights are missing", file=str(directory), got=got)
    return model if how else model.to(device)


def unmerged(
    base: Directory,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kind: Any = None,
    quantization: Quantization | None = None,
) -> nn.Module:
    """The base with the adapter live in it, every tensor of the file in its place.

    With `quantization`, or where the base is stored so, only an adapter of linear layers fits. Raises what `sites` or
    `attach` finds, what `quantization_of` raises, and NOT_RUNNABLE.
    """
    stored = BaseWeights(base).config.get("quantization_config")
    held = quantization_of(stored, quantization, base=str(base))
    if held:
        model = load_model(base, dtype=dtype, device=device, kind=kind, quantization=held)
        attach(model, checkpoint, trainable=False)
        return model
    model = _with_replacements(base, checkpoint, dtype, kind)
    modules = dict(model.named_modules())
    live: dict[str, Adapter] = {}
    for entry in checkpoint.layout.adapters.values():
        name = name_in(model, modules, entry.module)
        if entry.stored == "linear" and name in modules and is_linear(modules[name]):
            live[name] = checkpoint.adapter(entry.module)
            _add_bias(modules[name], checkpoint, entry)
        else:
            _patch(model, checkpoint, entry)
    attach(model, live, trainable=False)
    return model.to(device)


def merged_in_memory(
    base: Directory,
    checkpoint: Checkpoint,
    *,
    to: torch.dtype,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    kind: Any = None,
) -> nn.Module:
    """What a right merge into the dtype `to` is: every effective weight rounded once, then computed with in `dtype`."""
    model = _with_replacements(base, checkpoint, dtype, kind)
    for entry in checkpoint.layout.adapters.values():
        _patch(model, checkpoint, entry)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, to))
    return model.to(device)


def model_kind(directory: Directory, about: About = About()) -> Any:  # noqa: B008  # a frozen value
    """transformers' class for a directory: its config's architecture, or the class with an adapter's head."""
    import transformers

    name = (BaseWeights(directory).config.get("architectures") or [None])[0]
    if name is None:
        raise refuse("NOT_RUNNABLE", "config.json names no architecture", file=str(directory))
    if not hasattr(transformers, name):
        raise refuse("NOT_RUNNABLE", "transformers has no such architecture", file=str(directory), got=str(name))
    kind = getattr(transformers, name)
    trained = getattr(transformers, about.model_class or "", None)
    if about.task is None and trained is not None and trained.__name__.endswith("Classification"):
        return trained
    mapping = getattr(transformers, _HEADS.get(about.task or "", ""), None)
    wanted = mapping._model_mapping.get(kind.config_class, None) if mapping is not None else None
    return wanted or kind


def stored_dtype(header: Header) -> torch.dtype:
    """The dtype of most floating-point tensors; float32 where there are none."""
    return DTYPES[header.usual_dtype or "F32"]


def load_tokenizer(*directories: Directory) -> Any:
    """The tokenizer of the first directory that has one; None when none has."""
    from transformers import AutoTokenizer

    for directory in directories:
        if not any((Path(directory) / name).exists() for name in (*VOCABULARIES, TOKENIZER_CONFIG)):
            continue
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise refuse("NOT_RUNNABLE", f"its tokenizer: {_first_line(error)}", file=str(directory)) from None
    return None


def tokenizer_of(*directories: Directory) -> Any:
    """As load_tokenizer; NOT_RUNNABLE when none has one."""
    tokenizer = load_tokenizer(*directories)
    if tokenizer is None:
        raise refuse("NOT_RUNNABLE", "there is no tokenizer", file=", ".join(map(str, directories)))
    return tokenizer


# Loading ---------------------------------------------------------------------------------------------------------


def _load(
    directory: Path, kind: Any, dtype: torch.dtype | None, changes: Mapping[str, Any]
) -> tuple[nn.Module, set[str]]:
    """The model and the names of the weights it lacks."""
    if (directory / "adapter_config.json").exists():
        message = "adapter_config.json lies beside the weights, and transformers would load that adapter on top of them"
        raise refuse("NOT_RUNNABLE", message, file=str(directory))
    torch.manual_seed(0)  # what is missing starts at random, until it is replaced or refused
    options: dict[str, Any] = {
        _dtype_option(): dtype or "auto",
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    try:
        with quiet():
            model, info = kind.from_pretrained(directory, **options, **changes)
            if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # grouped products know no float64
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise refuse("NOT_RUNNABLE", _first_line(error), file=str(directory)) from None
    return model.eval(), {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def _dtype_option() -> str:
    """What transformers calls the dtype to load in: another word before 4.56."""
    import transformers

    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    return "dtype" if release >= (4, 56) else "torch_dtype"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _with_replacements(base: Directory, checkpoint: Checkpoint, dtype: torch.dtype | None, kind: Any) -> nn.Module:
    """The base with replaced weights and token rows."""
    layout = checkpoint.layout
    weights = BaseWeights(base)
    raise_errors([*layout.problems, *sites(layout, weights.header, weights.config).problems])
    kind = kind or model_kind(base, layout.about)
    labels = new_labels(layout)
    changes = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    model, missing = _load(Path(base), kind, dtype, changes)
    names = dict(model.named_modules())
    for target, key in layout.replacements.items():
        module, _, parameter = target.rpartition(".")
        name = name_in(model, names, module)
        _replace(names, name, parameter, checkpoint.tensor(key), target)
        missing.discard(f"{name}.{parameter}")
    if missing:
        got = f"{', '.join(sorted(missing)[:4])}{' …' if len(missing) > 4 else ''}"
        raise refuse("NOT_RUNNABLE", "weights are missing", file=str(base), got=got)
    for target, rows in layout.rows.items():
        module, _, parameter = target.rpartition(".")
        weight = getattr(names[name_in(model, names, module)], parameter)
        with torch.no_grad():  # in place: a tied output has the same rows
            weight[list(rows.indices)] = checkpoint.tensor(rows.key).to(weight.dtype)
    return model


# Putting an adapter's tensors in place ---------------------------------------------------------------------------


def _replace(modules: dict[str, nn.Module], name: str, parameter: str, value: Tensor, target: str) -> None:
    """Give a module a tensor of its own: what was tied to it keeps the old one."""
    module = modules.get(name)
    old = getattr(module, parameter, None)
    if module is None or not isinstance(old, Tensor):
        raise refuse("NOT_RUNNABLE", "the model has no such tensor to replace", module=target)
    new = rounded(value, old.dtype) if old.is_floating_point() else value.to(old.dtype)
    setattr(module, parameter, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    for size in ("num_embeddings", "out_features"):
        if hasattr(module, size) and parameter == "weight":
            setattr(module, size, value.shape[0])


@torch.no_grad()
def _patch(model: nn.Module, checkpoint: Checkpoint, entry: AdapterLayout) -> None:
    """Make the effective weight of one adapter the module's own; what was tied to it keeps the base's."""
    if entry.stored == "experts":
        owner, _, parameter = entry.module.rpartition(".")
    else:
        owner, parameter = entry.module, "weight"
    modules = dict(model.named_modules(remove_duplicate=False))
    name = name_in(model, modules, owner)
    if not isinstance(getattr(modules.get(name), parameter, None), Tensor):
        raise refuse("NOT_RUNNABLE", "the model has no such module", module=entry.module)
    module = _own_module(model, name) if entry.stored == "embedding" else modules[name]
    weight = getattr(module, parameter).detach()
    swap = entry.stored == "embedding" or type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
    if weight.dim() == 3 and entry.stored == "experts":
        experts = range(entry.experts)
        new = torch.stack([_effective(weight[e], checkpoint.adapter(entry.module, e), swap) for e in experts])
    else:
        new = _effective(weight, checkpoint.adapter(entry.module), swap)
    setattr(module, parameter, nn.Parameter(new, requires_grad=False))
    _add_bias(module, checkpoint, entry)


def _effective(weight: Tensor, adapter: Adapter, transposed: bool) -> Tensor:
    """W0 + delta in the weight's own layout, formed in float32 at least and rounded once to its dtype."""
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32)).reshape(weight.shape[0], -1)
    stands = matrix.T if transposed else matrix
    effective = stands + adapter.delta(stands)
    return rounded(effective.T if transposed else effective, weight.dtype).reshape(weight.shape).contiguous()


def _own_module(model: nn.Module, name: str) -> nn.Module:
    """A copy in the place of this name: T5's `shared` embedding stands under three names, and only one is adapted."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, last, copy.deepcopy(getattr(owner, last)))
    module: nn.Module = getattr(owner, last)
    return module


@torch.no_grad()
def _add_bias(module: nn.Module, checkpoint: Checkpoint, entry: AdapterLayout) -> None:
    """lora_bias: b + s·(the learnt vector)."""
    if "bias" not in entry.slots:
        return
    assert entry.scaling is not None
    old: Tensor = module.bias  # type: ignore[assignment]
    wide = old.detach().to(torch.promote_types(old.dtype, torch.float32))
    new = wide + entry.scaling * checkpoint.bias(entry.module).to(wide.dtype)
    module.bias = nn.Parameter(rounded(new, old.dtype), requires_grad=False)
