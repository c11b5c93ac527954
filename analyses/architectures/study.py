"""Does every adapter that PEFT saves land where PEFT put it, in every architecture that transformers has?

python analyses/architectures/study.py [--results DIR] [--part I/N] [--tiny] [MODEL_TYPE …]
"""

import argparse
import hashlib
import json
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from d2surgery import D2SurgeryError, merge

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from studying import machine, versions, write  # noqa: E402
from tiny import architectures, config_of, inputs_of  # noqa: E402

HERE = Path(__file__).resolve().parent

SEED = 0
RIGHT = 1e-6  # ‖ours − PEFT's‖∞/‖PEFT's‖∞, of outputs in float64 and of weights
LARGEST = 8_000_000  # parameters; a larger model was not made small
PATIENCE = 120  # seconds for one architecture
ATTENTION = re.compile(r"q|k|v|query|key|value|qkv|c_attn|attn|attention|proj|dense|out|in")
FEW = ["gpt2", "mixtral", "llava", "vit", "gpt_oss", "bert"]  # of --tiny
CELLS = ("lora", "older names", "dora", "all-linear", "embeddings", "heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--part", default="0/1", help="of the architectures, for several processes")
    parser.add_argument("--tiny", action="store_true", help="a few architectures")
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = options.types or (FEW if options.tiny else list(architectures()))
    results = study(chosen[part::parts])
    write(results, options.results)
    print(table(results))


def study(types: list[str]) -> dict[str, Any]:
    """The whole of results.json."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    runs = []
    for model_type in types:
        name, task = architectures()[model_type]
        runs.append({"model_type": model_type, "class": name, "task": task} | swept(name))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return {
        "question": "Does every adapter that PEFT saves land where PEFT put it?",
        "machine": machine(),
        "versions": versions("transformers", "peft"),
        "seed": SEED,
        "right": RIGHT,
        "inputs_sha256": {"model types": hashlib.sha256(" ".join(types).encode()).hexdigest()},
        "runs": runs,
    }


def swept(name: str) -> dict[str, Any]:
    """Every cell of one architecture, or why it cannot be built."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    signal.alarm(PATIENCE)
    folder = Path(tempfile.mkdtemp())
    try:
        model = built(name, folder / "base")
        cells = {cell: judged(model, folder, cell, options) for cell, options in cells_of(model, folder / "base")}
    except (Exception, TimeoutError) as error:  # whatever transformers raises for a config of ours
        return {"not_built": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:160]}
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)
    return {"cells": cells}


def built(name: str, path: Path) -> Any:
    """A small model with no parameter at zero or one, saved, that runs and comes back as it was saved."""
    torch.manual_seed(SEED)
    kind = getattr(transformers, name)
    config = config_of(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters} parameters")
    model = kind(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    again = loaded(kind, path)
    if difference(outputs(again), outputs(loaded(kind, path))) > 0:
        raise ValueError("its forward is not deterministic")
    if difference(weights(again), weights(model)) > 0:
        raise ValueError("transformers does not load what it saved")
    return again


def loaded(kind: Any, path: Path) -> Any:
    model = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def cells_of(model: Any, base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)})
    output = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    linear = [n for n in linear if n != output.rpartition(".")[2]]
    attention = [n for n in linear if ATTENTION.fullmatch(n.replace("_proj", ""))] or linear
    yield "lora", {"target_modules": attention}
    if older(model, base):
        yield "older names", {"target_modules": attention}
    yield "dora", {"target_modules": attention, "use_dora": True}
    yield "all-linear", {"target_modules": "all-linear", "target_parameters": parameters_of(model) or None}
    embedding = next((n for n, m in model.named_modules() if m is embeddings(model)), None)
    if embedding:
        yield "embeddings", {"target_modules": [embedding, *attention]}
    head = output or next(
        (n for n, _ in model.named_children() if re.search(r"head|classifier|score|decoder$|cls$", n)), None
    )  # fmt: skip
    if head:
        targets = [n for n in attention if not head.endswith(n)]
        yield "heads", {"target_modules": targets, "modules_to_save": [head]}


def embeddings(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def parameters_of(model: Any) -> list[str]:
    """What PEFT's own all-linear names of a mixture of experts: stacked experts and routers."""
    found = set()
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            experts = value.ndim == 3 and "proj" in parameter and "experts" in name.rpartition(".")[2]
            router = parameter == "weight" and value.ndim == 2 and re.search(r"(^|\.)(gate|router)$", name)
            if experts or (router and not isinstance(module, nn.Linear)):
                found.add(f"{name.rpartition('.')[2]}.{parameter}")
    return sorted(found)


def judged(model: Any, folder: Path, cell: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One adapter, saved by PEFT, merged by d2surgery: right, refused or wrong."""
    kind, base, adapter, out = type(model), folder / "base", folder / f"a {cell}", folder / f"m {cell}"
    try:
        unmerged = trained(model, adapter, options)
        if cell == "older names":
            rename(adapter, older(model, base))
        expected = outputs(unmerged)
    except Exception as error:  # PEFT cannot, so there is nothing to judge
        return {"outcome": "no adapter", "reason": f"{type(error).__name__}: {error}"[:160]}
    try:
        merge(base, adapter, out)
    except D2SurgeryError as error:
        return {"outcome": "refused", "reason": " | ".join(sorted({str(problem) for problem in error.problems}))[:400]}
    merged = loaded(kind, out)
    found = {"outputs": difference(outputs(merged), expected), "moved": difference(outputs(model), expected)}
    if cell not in ("embeddings", "heads"):  # of ties PEFT's forward speaks, its merge does not
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        found["weights"] = difference(weights(merged, tied), weights(unmerged.merge_and_unload(), tied))
    if "weights" not in found and not found["moved"]:
        return {"outcome": "no adapter", "reason": "no output depends on what it trains"}
    wrong = max(found["outputs"], found.get("weights", 0)) > RIGHT
    return {"outcome": "wrong" if wrong else "right"} | {key: float(f"{value:.2g}") for key, value in found.items()}


def trained(base: Any, adapter: Path, options: Mapping[str, Any]) -> Any:
    """PEFT's model, saved, with noise for training: where no gradient comes, because a layer is never called, none."""
    torch.manual_seed(SEED + 1)
    model = get_peft_model(deepcopy(base), LoraConfig(r=4, lora_alpha=8, **options)).eval()
    never = bypassed(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(name.startswith(f"{layer}.") for layer in never):
                continue
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(adapter)
    return model


def bypassed(model: Any) -> list[str]:
    """PEFT's layers that are never called where the module around them is: its functions read the weight itself."""
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=n: called.add(n)) for n, m in model.named_modules()]
    outputs(model)
    for hook in hooks:
        hook.remove()
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return [name for name in layers if name not in called and name.rpartition(".")[0] in called]


def older(model: Any, base: Path) -> dict[str, str]:
    """Module in the model -> its name on disk, where that is another: what older versions' adapters are named by."""
    on_disk = {tensor.numpy().tobytes(): name for name, tensor in load_file(base / "model.safetensors").items()}
    found = {}
    for name, module in model.named_modules():
        tied = module is model.get_output_embeddings() or f"{name}.weight" in model.all_tied_weights_keys
        if type(module) in (nn.Linear, Conv1D) and module.weight.numel() > 8 and not tied:
            disk = on_disk.get(module.weight.detach().contiguous().numpy().tobytes())
            if disk and disk != f"{name}.weight":
                found[name] = disk.removesuffix(".weight")
    return found


def rename(adapter: Path, names: Mapping[str, str]) -> None:
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = {}
    for key, tensor in load_file(file).items():
        module, found, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"base_model.model.{names.get(module, module)}{found}{leaf}"] = tensor
    save_file(tensors, file)
    text = json.loads(config.read_text()) | {"target_modules": ".*"}
    config.write_text(json.dumps(text))


def outputs(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    inputs = inputs_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        found = model.double()(**exact)
    flat = dict(tensors_in("", found))
    model.float()
    return flat


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value.double()
    elif isinstance(value, Mapping | tuple | list):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from tensors_in(f"{name}.{key}", one)


def weights(model: Any, without: Container[str] = ()) -> dict[str, Tensor]:
    named = model.state_dict().items()
    return {name: tensor.double() for name, tensor in named if tensor.is_floating_point() and name not in without}


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest ‖a − b‖∞/‖b‖∞; infinite where one lacks a tensor."""
    if ours.keys() != theirs.keys() or not theirs:
        return float("inf")
    worst = 0.0
    for name, b in theirs.items():
        if b.numel() and (ours[name].shape != b.shape or (ours[name].isfinite() != b.isfinite()).any()):
            return float("inf")
        if b.numel() and (scale := float(b.nan_to_num(0, 0, 0).abs().max())):
            worst = max(worst, float((ours[name] - b).nan_to_num(0, 0, 0).abs().max()) / scale)
    return worst


def table(results: Mapping[str, Any]) -> str:
    """The README's table, and what is refused."""
    lines = ["| | architectures | right | refused | wrong |", "|---|---|---|---|---|"]
    runs = [run for run in results["runs"] if "cells" in run]
    for cell in CELLS:
        count = Counter(run["cells"][cell]["outcome"] for run in runs if cell in run["cells"])
        tried = count["right"] + count["refused"] + count["wrong"]
        lines.append(f"| {cell} | {tried} | {count['right']} | {count['refused']} | {count['wrong']} |")
    lines += [f"\n{len(runs)} of {len(results['runs'])} architectures can be built small.", ""]
    for run in runs:
        for cell, found in run["cells"].items():
            if found["outcome"] in ("refused", "wrong"):
                lines.append(f"- {run['model_type']}, {cell}: {found['outcome']} {found.get('reason', '')[:120]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
