"""Bases that bitsandbytes holds in 4 or 8 bit: made so when they are loaded, or stored so.

    4bit    QLoRA's: NF4 in blocks of 64, their scales quantised again (Dettmers et al. 2023, arXiv:2305.14314)
    8bit    int8 with a scale per row (Dettmers et al. 2022, arXiv:2208.07339)

What a quantised layer's W0 is says `attaching.base_weight`: the dequantised weight. A base that is stored with other
options of bitsandbytes (FP4, scales in float32) is loaded as it is.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from d2surgery.errors import refuse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Quantization = Literal["4bit", "8bit"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


def quantization_of(
    stored: Mapping[str, Any] | None, asked: Quantization | None = None, *, base: str = ""
) -> Quantization | None:
    """How a base is held in memory: as it is stored (the quantization_config of its config.json), else as asked.

    Raises OTHER_QUANTIZATION for what bitsandbytes did not quantise, BAD_CONFIG where the two differ, NO_BITSANDBYTES.
    """
    found = None if stored is None else _stored(stored, base)
    if found and asked and found != asked:
        message = f"the base is stored in {found} already"
        raise refuse("BAD_CONFIG", message, module="quantization", file=base, wanted=f"{found}, or none", got=asked)
    if (found or asked) and importlib.util.find_spec("bitsandbytes") is None:
        raise refuse(
            "NO_BITSANDBYTES", f"the base is {'stored' if found else 'to be held'} in {found or asked}", file=base
        )
    return found or asked


def by_bitsandbytes(stored: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config is of bitsandbytes; its first ones name no method."""
    return stored is not None and stored.get("quant_method", "bitsandbytes") == "bitsandbytes"


def loading_options(
    quantization: Quantization | None, *, stored: bool, dtype: "torch.dtype", device: "str | torch.device"
) -> dict[str, Any]:
    """What `from_pretrained` is told: a quantised model changes neither its dtype nor its place later."""
    if quantization is None:
        return {}
    options: dict[str, Any] = {"device_map": {"": device}}
    if not stored:
        options["quantization_config"] = _bitsandbytes(quantization, dtype)
    return options


def quantization_in(model: Any) -> Quantization | None:
    """How a model of transformers is held."""
    return next((name for name in QUANTIZATIONS if getattr(model, f"is_loaded_in_{name}", False)), None)


def entries(parameter: "Tensor") -> int:
    """The entries of the matrix that a parameter stands for: two to a byte in 4 bit."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _bitsandbytes(quantization: Quantization, dtype: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _stored(config: Mapping[str, Any], base: str) -> Quantization:
    bits = [name for name in QUANTIZATIONS if config.get(f"load_in_{name}")]
    if not by_bitsandbytes(config) or len(bits) != 1:
        method = str(config.get("quant_method", "a method without a name"))
        raise refuse("OTHER_QUANTIZATION", "its weights are quantised by another method", file=base,
                     wanted="bitsandbytes, 4bit or 8bit", got=method)  # fmt: skip
    return bits[0]
