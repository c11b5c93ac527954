"""The formats: how adapters lie on disk, a module each. See `Format` for what such a module has."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.header import Header, TensorInfo, is_gguf, is_pickle, read_header, small_values
from d2surgery.files.held import Seen
from d2surgery.files.locate import PICKLES, left_out, locate
from d2surgery.files.reading import read_json
from d2surgery.formats.format import Format, Holding
from d2surgery.formats.layout import Layout, Packing, with_expert_layout, with_scaling
from d2surgery.machine import uncollected


class _Lazy:
    """A format whose module is imported when more is asked than its name: describing a PEFT file needs three of them.

    marks: what some key, between line breaks, has in it in every file of the format; none: any file may be of it.
    """

    def __init__(self, module: str, *marks: str, name: str = "") -> None:
        self.module, self.marks, self.NAME = module, marks, name or module

    def recognise(self, header: Header, config: Mapping[str, Any] | None) -> str:
        may_be = not self.marks or any(mark in header.names for mark in self.marks)
        found: str = self.__getattr__("recognise")(header, config) if may_be else ""
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"{__name__}.{self.module}"), name)


FORMATS: tuple[Format, ...] = (
    _Lazy("gguf", "general.architecture"),
    _Lazy("nvlabs", ".weight_m_wdecomp."),
    _Lazy("fsdp_qlora", ".dora_layer.", ".magnitude_layer.", ".lora_AB."),
    _Lazy("megatron", ".adapter."),
    _Lazy("adapterhub", ".loras."),
    _Lazy("tinker", "unembed_tokens.", ".experts.w"),
    _Lazy("litgpt", ".lora_A\n", ".lora_B\n"),
    _Lazy("loralib", ".lora_A\n"),
    _Lazy(
        "diffusers",
        "lora_adapter_metadata",
        ".down.weight",
        ".up.weight",
        "\nunet.",
        "\ntext_encoder",
        "\ntransformer",
        "\ndiffusion_model.",
    ),
    _Lazy("peft_methods", ".hada_", ".lokr_", ".delora_", ".vera_", name="peft-methods"),
    _Lazy("peft"),
    _Lazy("lycoris"),
    _Lazy("kohya"),
    _Lazy("comfyui"),
    _Lazy("mlx"),
    _Lazy("torchtune"),
    _Lazy("serving", name="peft-serving"),
    _Lazy("foreign"),
)
"""In the order of detection; the last recognises every file."""


def open_layout(
    adapter: str | os.PathLike[str],
    *,
    expert_layout: Packing | None = None,
    scale: float | None = None,
    alpha: float | None = None,
) -> Layout:
    """What the adapter at a path or hub id holds, by names and shapes; its misfits stand in `problems`.

    expert_layout: how experts share the columns of lora_B; None: as the file says, or as PEFT packs them. scale, or
    alpha over the rank: what multiplies B·A, of a file that does not say it.

    Raises D2SurgeryError where nothing can be said of it: no such file, a file that is not what it should be; USAGE for
    a scale or an alpha of a file that has its own.
    """
    files = locate(adapter)
    beside = (Seen(files.config),) if files.config else ()  # before it is read
    header = _with_whole(_header(files.weights), files.whole)
    header = replace(header, seen=(*header.seen, *beside))
    found = layout(header, read_json(files.config) if files.config else None)
    others = [
        Problem(code="LEFT_OUT", severity="warning", message="is not read", file=name)
        for name in left_out(files.weights)
    ]
    found = replace(found, problems=(*found.problems, *others))
    found = found if expert_layout is None else with_expert_layout(found, expert_layout)
    return found if scale is None and alpha is None else with_scaling(found, scale, alpha)


def layout(header: Header, config: Mapping[str, Any] | None) -> Layout:
    """The layout by the first format that recognises the file."""
    format, rule = next((each, rule) for each in FORMATS if (rule := each.recognise(header, config)))
    found = format.layout(header, config, lambda key: small_values(header, key))
    found = replace(found, rule=rule, problems=(*found.problems, *_mixed(found, format)))
    broken = any(problem.severity == "error" for problem in found.problems)
    if broken or found.adapters or found.replacements or found.rows:
        return found
    got = "no tensor" if not header.tensors else f"{len(header.tensors)} tensors that change nothing"
    nothing = Problem(code="NOTHING_TO_APPLY", message="the adapter is empty", file=str(header.files[0]), got=got)
    return replace(found, problems=(*found.problems, nothing))


def with_base(found: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """A layout with what its base's tensors and config say: paths of flattened names, how many heads share rows, and
    the kernel of a convolution whose file does not say it."""
    from d2surgery.formats import families, flat
    from d2surgery.formats.pairs import as_stored  # what a lone file needs none of

    if (format := next((each for each in FORMATS if found.format == each.NAME), None)) is not None:
        found = format.with_base(found, tensors, model)
    found = families.apart(found, tensors)
    paths = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    named = flat.with_paths(replace(found, about=replace(found.about, model=model)), paths)
    adapters = {}
    for module, entry in named.adapters.items():
        inside = module.partition(".")[2]  # of a component, such as unet
        info = tensors.get(f"{module}.weight") or tensors.get(f"{inside}.weight")
        adapters[module] = as_stored(entry, info.shape if info else ())
    return replace(named, adapters=adapters)


def _mixed(found: Layout, format: Format) -> Iterator[Problem]:
    """The other format of which what was not understood is, where it is of one."""
    unknown = {problem.module for problem in found.problems if problem.code == "UNKNOWN_TENSOR"}
    left = {key: found.header.tensors[key] for key in found.unread if key in unknown}
    header = replace(found.header, tensors=left, metadata={})
    for other in FORMATS[:-1] if left and format is not FORMATS[-1] else ():
        if other is not format and (rule := other.recognise(header, None)):
            message = f"the keys of {format.NAME}, and {len(left)} of another: {rule}, which is {other.NAME}"
            yield Problem(code="MIXED_FORMATS", message=message, file=str(found.path))
            return


def write(checkpoint: Holding, directory: str | os.PathLike[str], name: str) -> None:
    """Write a checkpoint in the format of this name.

    Raises D2SurgeryError before anything is written: USAGE for no such format, what is wrong with the checkpoint,
    FORMAT_CANNOT_HOLD with all that the format has no place for.
    """
    format = next((each for each in FORMATS if name == each.NAME), None)
    if format is None:
        raise refuse("USAGE", "no such format", wanted=" or ".join(each.NAME for each in FORMATS), got=name)
    layout = checkpoint.layout
    raise_errors(layout.problems)
    raise_errors(
        Problem(code="FORMAT_CANNOT_HOLD", message=f"{name} has no place for {entry.kind} on {entry.stored} modules",
                module=module)
        for module, entry in layout.adapters.items()
        if entry.stored not in format.holds(entry.kind)
    )  # fmt: skip
    format.write(checkpoint, Path(directory))


def _with_whole(header: Header, files: tuple[Path, ...]) -> Header:
    """The header with the tensors of other files beside the adapter's."""
    for file in files:
        with uncollected():  # torch, and only here
            from d2surgery.files.pickled import locate_pickled, read_pickled_header

        seen = Seen(file)
        more = locate_pickled(file) if header.loaded is None else read_pickled_header(file)
        twice = sorted(header.tensors.keys() & more.tensors.keys())
        raise_errors(
            Problem(code="DUPLICATE_KEY", message=f"also in {header.files[0].name}", file=str(file), module=key)
            for key in twice
        )
        header = replace(
            header,
            files=(*header.files, file),
            tensors={**header.tensors, **more.tensors},
            loaded=None if header.loaded is None else {**header.loaded, **(more.loaded or {})},
            seen=(*header.seen, *(more.seen or (seen,))),
        )
    return header


def _header(weights: Path) -> Header:
    if weights.suffix in PICKLES and is_pickle(weights):
        with uncollected():  # torch, and only here
            from d2surgery.files.pickled import read_pickled_header

        seen = Seen(weights)
        return replace(read_pickled_header(weights), seen=(seen,))
    if is_gguf(weights):
        from d2surgery.files.gguf import read_gguf  # its types, which few need

        return read_gguf(weights)
    if weights.suffix == ".npz":
        from d2surgery.files.npz import read_npz  # zipfile, which few need

        return read_npz(weights)
    return read_header(weights)
