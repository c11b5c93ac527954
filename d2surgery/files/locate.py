"""Where the files of an adapter or a base are: a file, a directory, or a hub id."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from d2surgery.errors import refuse

WEIGHTS = (  # PEFT's; MLX-LM's; diffusers'; kohya's and llama.cpp's as written here; AdapterHub's; litgpt's
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "adapters.npz",
    "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "lora.safetensors", "adapter.gguf",
    "adapter.safetensors", "pytorch_adapter.bin", "lit_model.pth.lora",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".lora")
TRAINED_WHOLE = ("non_lora_trainables.bin", "non_lora_state_dict.bin")  # LLaVA's and its followers' second file
OTHERS = ("new_embeddings.safetensors", "new_embeddings.bin")  # vLLM's: rows of added tokens, without their numbers
_OF_A_MODEL = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
_STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")  # what trainers leave beside weights


class AdapterFiles(NamedTuple):
    weights: Path
    config: Path | None
    whole: tuple[Path, ...] = ()  # what was trained whole beside the factors, under the same names


def locate(adapter: str | os.PathLike[str]) -> AdapterFiles:
    """The weights and, where it exists, the config. A hub id is downloaded through huggingface_hub's cache;
    the hub is never contacted when the path exists locally.

    Raises D2SurgeryError: FILE_MISSING, NO_WEIGHTS, SEVERAL_WEIGHTS, HUB_UNREACHABLE.
    """
    path = Path(adapter)
    if (hub_id := hub_id_of(adapter)) is not None:
        path = _download(hub_id, _of_an_adapter())
    if path.is_dir():
        path = _weights_in(path)
    elif not path.exists():
        raise refuse("FILE_MISSING", "no such file or directory", file=str(adapter))
    config = path.parent / "adapter_config.json"
    whole = (path.parent / name for name in TRAINED_WHOLE if path.name in WEIGHTS)
    return AdapterFiles(path, config if config.exists() else None, tuple(file for file in whole if file.exists()))


def hub_id_of(given: str | os.PathLike[str]) -> str | None:
    """org/name[@revision] of what is none of this machine's paths; `hf://` says that it is meant for the hub.

    Raises D2SurgeryError USAGE for an hf:// that is no such id.
    """
    name = os.fspath(given)
    if name.startswith("hf:/"):  # a Path has lost one of the slashes
        hub_id = name.removeprefix("hf:").strip("/").removeprefix("models/")
        if not _is_hub_id(hub_id):
            raise refuse("USAGE", "is no hub id", wanted="hf://org/name or hf://org/name@revision", got=name)
        return hub_id
    return name if not Path(name).exists() and _is_hub_id(name) else None


def _is_hub_id(name: str) -> bool:
    """Not a mistyped path, nor one that leads out of the cache."""
    pattern = r"(?!.*\.\.)\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.bin)(@\w[\w./-]*)?"
    return bool(re.fullmatch(pattern, name, re.ASCII))


def left_out(weights: Path) -> list[str]:
    """Names of other files of weights beside an adapter's, which are not read; numbered shards as one.

    Those trained whole are, beside a file of a usual name.

    Not what trainers keep of their own state; not a model in whose directory the adapter lies. Beside a file of no
    usual name only those of a usual one: it may lie among other adapters.
    """
    beside = [p.name for p in weights.parent.iterdir() if p.suffix in (".safetensors", *PICKLES) and p != weights]
    if weights.name not in WEIGHTS:
        return sorted(name for name in beside if name in (*TRAINED_WHOLE, *OTHERS))
    model = ("model", "pytorch_model") if (weights.parent / "config.json").exists() else ()
    kept = (
        name
        for name in beside
        if not name.startswith((*_STATES, *model))
        and name not in TRAINED_WHOLE
        and not name.partition("_adapters.")[0].isdigit()  # MLX-LM's checkpoints on the way
    )
    return sorted({re.sub(r"-\d{5}-of-(\d{5})", r"-*-of-\1", name) for name in kept})


def locate_base(base: str | os.PathLike[str]) -> Path:
    """The directory of a model, also of a GGUF file that is alone in it; a hub id is downloaded as an adapter's is.

    Raises D2SurgeryError HUB_UNREACHABLE; BAD_BASE for a GGUF file among other weights.
    """
    path = Path(base)
    if path.suffix == ".gguf" and path.is_file():
        return _alone(path)
    hub_id = hub_id_of(base)
    if hub_id is None:
        return path
    path = _download(hub_id, _OF_A_MODEL)
    return path if any(path.glob("*.safetensors")) else _download(hub_id, [*_OF_A_MODEL, "*.bin"])


def _alone(path: Path) -> Path:
    others = [p.name for p in path.parent.iterdir() if p.suffix in (".gguf", ".safetensors", ".bin") and p != path]
    if others:
        got = ", ".join(sorted(others)[:8])
        raise refuse(
            "BAD_BASE", "it lies among other weights", file=str(path), wanted="a directory of its own", got=got
        )
    return path.parent


def _weights_in(directory: Path) -> Path:
    for name in WEIGHTS:  # PEFT's order: safetensors wins where both exist
        if (directory / name).exists():
            return directory / name
    if next(directory.glob("*.index.json"), None):
        raise refuse("NOT_AN_ADAPTER", "the directory holds a model in shards", file=str(directory))
    found = (
        sorted(directory.glob("*.safetensors"))
        or sorted(path for path in directory.iterdir() if path.suffix in PICKLES and path.stem not in _STATES)
        or sorted(directory.glob("*.gguf"))
    )
    if not found:
        got = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "an empty directory"
        raise refuse("NO_WEIGHTS", "no adapter weights", file=str(directory), wanted=" or ".join(WEIGHTS[:2]), got=got)
    if len(found) > 1:
        raise refuse("SEVERAL_WEIGHTS", "which one?", file=str(directory), got=", ".join(p.name for p in found[:8]))
    return found[0]


def _of_an_adapter() -> list[str]:
    from d2surgery.files.tokenizers import BEGINNINGS  # what lies here needs none of it

    beside = (f"{name}*" for name in BEGINNINGS)
    return ["adapter_config.json", *WEIGHTS, "*.safetensors", *TRAINED_WHOLE, *OTHERS, *beside]


def _download(hub_id: str, patterns: list[str]) -> Path:
    import huggingface_hub  # half a second, and only here

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        message = f"no such local path, and the hub did not give it: {_reason(error, repository, revision)}"
        raise refuse("HUB_UNREACHABLE", message, file=hub_id, **_nearest(repository)) from None


def _reason(error: Exception, repository: str, revision: str) -> str:
    """What the hub's error means; its own words where it is none of the usual ones."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    meant = {
        "RepositoryNotFoundError": f"there is no model {repository}, or it is private and no token of yours may "
        "read it (`hf auth login`, or HF_TOKEN)",
        "GatedRepoError": f"{repository} is gated: ask for access on its page, and log in (`hf auth login`)",
        "RevisionNotFoundError": f"{repository} has no branch, tag or commit {revision!r}",
        "LocalEntryNotFoundError": "it is not in the cache, and the hub cannot be reached (network, proxy, "
        "HF_HUB_OFFLINE)",
        "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub",
    }
    return meant.get(type(error).__name__, said)


def _nearest(repository: str) -> dict[str, str]:
    """A local path that may have been meant: a folder is easily mistyped into what looks like a hub id."""
    from difflib import get_close_matches  # seldom needed

    folder = Path(repository).parent
    beside = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(Path(repository).name, beside, n=2, cutoff=0.6)
    return {"wanted": " or ".join(str(folder / name) for name in near)} if near else {}
