"""Right merges by what installs here, in every mode: PEFT's, our plugin's, torch's casts, before and after."""

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers as T
from peft import PeftModel

from mutations.world import DTYPES, KINDS, PEFT_KINDS, Case, Setting, load

import d2surgery.peft_plugin  # noqa: F401  isort: skip

HOW = (
    "merge_and_unload",
    "low_cpu_mem_usage",
    "autocast_adapter_dtype=False",
    "the whole model cast before",
    "the adapter in bfloat16 before",
    "the adapter in float16 before",
    "under autocast to bfloat16",
    "under autocast to float16",
    "merged and unmerged before",
    "merged and unmerged twice before",
    "merge_adapter alone",
    "linear combination of one",
    "cat combination of one",
    "svd combination of one",
)
ONLY_LORA = HOW[-3:]


@dataclass(frozen=True)
class Merged:
    """PEFT's merge onto a base loaded in one dtype, saved in another."""

    how: str
    load: str
    saved: str
    safe: bool

    def __call__(self, setting: Setting, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = self._merged(setting).to(DTYPES[self.saved])
            shutil.rmtree(out)
            merged.save_pretrained(out)
        words = setting.adapter if setting.extra.more_rows else setting.base
        T.AutoTokenizer.from_pretrained(words).save_pretrained(out)

    def _merged(self, setting: Setting) -> Any:
        how, dtype = self.how, DTYPES[self.load]
        options: dict[str, Any] = {"low_cpu_mem_usage": True} if how == "low_cpu_mem_usage" else {}
        if how.startswith("autocast_adapter"):
            options = {"autocast_adapter_dtype": False}
        model = PeftModel.from_pretrained(load(setting.base, dtype, setting.extra), setting.adapter, **options)
        if how == "the whole model cast before":
            model = model.to(dtype)
        if how.startswith("the adapter in"):
            low = torch.bfloat16 if "bfloat16" in how else torch.float16
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(low)
        if how.endswith("combination of one"):
            model.add_weighted_adapter(["default"], [1.0], "one", combination_type=how.split()[0])
            model.set_adapter("one")
        if how.startswith("merged and unmerged"):
            for _ in range(2 if "twice" in how else 1):
                model.merge_adapter(safe_merge=self.safe)
                model.unmerge_adapter()
        if how == "merge_adapter alone":
            model.merge_adapter(safe_merge=self.safe)
            return model.unload()
        if how.startswith("under autocast"):
            with torch.autocast("cpu", dtype=torch.bfloat16 if "bfloat16" in how else torch.float16):
                return model.merge_and_unload(safe_merge=self.safe)
        return model.merge_and_unload(safe_merge=self.safe)


def installed() -> Iterator[Case]:
    """Every mode that differs from another: more than a thousand."""
    for kind, dtype, how, loaded, saved, safe in product(KINDS, DTYPES, HOW, DTYPES, DTYPES, (False, True)):
        if kind not in PEFT_KINDS and (how not in HOW[:4] or safe):
            continue
        if kind == "rslora" and how in ONLY_LORA:
            continue  # PEFT 0.21 counts the root of the rank twice: no right merge
        if kind == "dora" and (how in ONLY_LORA or safe):
            continue  # its safe merge is the other
        if safe and loaded == "F32":
            continue
        name = f"PEFT, {how}, in {loaded}, saved as {saved}{', safely' * safe}"
        yield Case(
            group="healthy", name=name, kind=kind, dtype=dtype, change=Merged(how, loaded, saved, safe), verdict="pass"
        )
