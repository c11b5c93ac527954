"""d2surgery: model surgery and adapter analysis. Importing it imports nothing heavy: names load when first used.

A tour. The verbs of the command line are functions of the same names, of paths or hub ids:

    import d2surgery

    d2surgery.inspect("./my-adapter")                  # what it is; names and shapes only, no torch
    found = d2surgery.spectrum("./my-adapter")         # module -> Spectrum: ranks, norms, singular values
    found.to_frame()                                   # with pandas; found.rows() without
    found.figures()["rank_map"]                        # plotly figures, as the report has them
    d2surgery.drift("./my-adapter", "./model")         # how far each module moves the base
    d2surgery.diff("./my-adapter", "./another")        # what two have in common, beside chance
    d2surgery.report("./my-adapter", base="./model", out="page.html")

    d2surgery.plan("./model", "./my-adapter", "./merged").survival
    d2surgery.merge("./model", "./my-adapter", "./merged", dtype="bf16")
    d2surgery.audit("./model", "./my-adapter", "./merged").verdict     # "pass"

Adapters are values, and everything else is a function of them:

    adapters = d2surgery.load("./my-adapter")          # a Mapping: module -> LoRA, DoRA, DualLoRA or D2LoRA
    base = d2surgery.BaseWeights("./model")            # a Mapping: name -> tensor, read when asked for
    adapters[module].delta(base[f"{module}.weight"])   # effective weight minus base weight
    smaller, lost = d2surgery.resize(adapters, keep=d2surgery.Keep(rank=4))
    d2surgery.save(smaller, "./smaller")

    d2surgery.attach(model, adapters)                  # in a live torch model, to run or to train
    d2surgery.train(d2surgery.read_config("run.toml"))

What goes wrong is a D2SurgeryError; its `problems` each have a code, which `d2surgery explain CODE` explains.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {  # name -> the module that defines it
    **dict.fromkeys(("Problem", "D2SurgeryError", "NoSuchName"), "errors"),
    **dict.fromkeys(("About", "Layout", "AdapterLayout"), "formats.layout"),
    "open_layout": "formats",
    "LowRank": "adapters.lowrank",
    **dict.fromkeys(("Adapter", "LoRA", "DoRA", "DualLoRA", "D2LoRA", "KINDS"), "adapters"),
    **dict.fromkeys(("Checkpoint", "load", "save", "from_adapters"), "checkpoint"),
    "BaseWeights": "files.base",
    "Spectrum": "measures.ranks",
    **dict.fromkeys(("delta_spectrum", "update_spectrum"), "measures.spectrum"),
    **dict.fromkeys(("Drift", "delta_drift"), "measures.drift"),
    **dict.fromkeys(("spectra", "drifts", "differences"), "surveying.modules"),
    **dict.fromkeys(("inspect", "Inspection"), "verbs.inspecting"),
    **dict.fromkeys(("spectrum", "drift", "diff", "Spectra", "Drifts", "Comparison"), "verbs.measuring"),
    **dict.fromkeys(("report", "Report"), "verbs.reporting"),
    **dict.fromkeys(("card", "write_card"), "cards"),
    "audit": "auditing",
    "verify_receipt": "auditing.receipts",
    **dict.fromkeys(("Audit", "ModuleAudit", "TensorAudit", "Thresholds"), "auditing.findings"),
    **dict.fromkeys(("convert", "resize", "budget", "against_base"), "surgery.resizing"),
    **dict.fromkeys(("combine", "scale"), "surgery.algebra"),
    "extract": "surgery.extracting",
    "rescale": "surgery.rescaling",
    **dict.fromkeys(("Keep", "Recipe"), "surgery.choices"),
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
