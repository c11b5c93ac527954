"""Names of floating-point dtypes, as people, torch and safetensors write them. No torch."""

from typing import Any

from d2surgery.errors import refuse

DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64"}
"""By the name the command line shows."""
_SPELLINGS = DTYPE_NAMES | {
    "bfloat16": "BF16", "float16": "F16", "half": "F16", "f16": "F16", "float32": "F32", "float": "F32", "f32": "F32",
    "float64": "F64", "double": "F64", "f64": "F64",
}  # fmt: skip


def dtype_name(value: Any) -> str | None:
    """The safetensors name: of "bf16", "bfloat16", "BF16", torch.bfloat16 it is "BF16"; None stays None.

    Raises D2SurgeryError USAGE for what is none of the four.
    """
    if value is None:
        return None
    name = _SPELLINGS.get(str(value).strip().lower().removeprefix("torch."))
    if name is None:
        wanted = f"{', '.join(DTYPE_NAMES)}, or torch's name for one of them"
        raise refuse("USAGE", "is no floating-point dtype known here", wanted=wanted, got=str(value))
    return name
