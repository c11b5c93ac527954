"""d2surgery: model surgery and adapter analysis. Importing it imports nothing heavy: names load when first used."""

from importlib import import_module
from typing import Any

_PUBLIC = {  # name -> the module that defines it
    **dict.fromkeys(("Problem", "D2SurgeryError"), "errors"),
    **dict.fromkeys(("About", "Layout", "AdapterLayout"), "formats.layout"),
    "open_layout": "formats",
    "LowRank": "adapters.lowrank",
    **dict.fromkeys(("Adapter", "LoRA", "DoRA", "DualLoRA", "D2LoRA", "KINDS"), "adapters"),
    **dict.fromkeys(("Checkpoint", "load", "save", "from_adapters"), "checkpoint"),
    "BaseWeights": "files.base",
    "Spectrum": "measures.ranks",
    **dict.fromkeys(("delta_spectrum", "update_spectrum"), "measures.spectrum"),
    **dict.fromkeys(("Drift", "drift"), "measures.drift"),
    **dict.fromkeys(("spectra", "drifts", "differences"), "surveying.modules"),
    "audit": "auditing",
    "verify_receipt": "auditing.receipts",
    **dict.fromkeys(("Audit", "ModuleAudit", "TensorAudit", "Thresholds"), "auditing.findings"),
    **dict.fromkeys(("convert", "resize", "budget", "against_base"), "surgery.resizing"),
    **dict.fromkeys(("combine", "scale"), "surgery.algebra"),
    "Recipe": "surgery.combining",
    "extract": "surgery.extracting",
    "rescale": "surgery.rescaling",
    "Keep": "surgery.truncation",
    **dict.fromkeys(("Certificate", "Loss"), "surgery.certificate"),
    **dict.fromkeys(("merge", "plan", "MergeReport", "PlanReport"), "merging"),
    "AdaptedLinear": "live.layers",
    **dict.fromkeys(("attach", "initial", "adapted", "detach", "snapshot", "set_warmup"), "live.attaching"),
    **dict.fromkeys(("compare_outputs", "compare_tasks"), "evaluating.behaviour"),
    **dict.fromkeys(("train", "TrainReport"), "training.loop"),
    "TrainConfig": "training.settings",
    "read_config": "training.config",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("d2surgery")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'd2surgery' has no attribute {name!r}")
    return getattr(import_module(f"d2surgery.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
