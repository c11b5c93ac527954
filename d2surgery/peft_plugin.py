"""D2-LoRA and Dual LoRA as PEFT methods: `import d2surgery.peft_plugin` registers D2LORA and DUALLORA.

    get_peft_model(model, D2LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

Then save_pretrained, PeftModel.from_pretrained, merge_and_unload and disable_adapter are PEFT's own; the files are
those that `d2surgery.load` and `d2surgery.save` read and write. One adapter is active at a time: two would not add up,
since D2-LoRA's norm and Dual LoRA's sign are not linear. Each row of a batch may have its own (`adapter_names`). PEFT's
list of methods is closed, so its members are added here, for releases that were tested; others are refused.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import peft
import torch
import torch.nn.functional as F
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from d2surgery.adapters import Adapter, D2LoRA, DualLoRA
from d2surgery.errors import refuse
from d2surgery.files.tensors import rounded
from d2surgery.live.layers import OverFrozen, base_weight, is_linear, is_quantized

SUPPORTED = ((0, 19, 1), (0, 22, 0))
"""From the first of these PEFT releases to before the last."""


@dataclass(kw_only=True)
class _Config(PeftConfig):  # type: ignore[misc]
    """The fields of adapter_config.json that both kinds share.

    target_modules, exclude_modules, modules_to_save, rank_pattern, alpha_pattern: as LoraConfig's.
    training: choices that change no value, under their names in d2surgery (see each config).
    """

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1

    warmup: ClassVar[float] = 1.0  # a factor of the moment, and no field: `set_warmup` gives an instance its own

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            chosen = getattr(self, name)
            setattr(self, name, set(chosen) if isinstance(chosen, list) else chosen)

    def to_dict(self) -> dict[str, Any]:
        """What is saved; a warm-up that is not over is folded into alpha and recorded."""
        values: dict[str, Any] = super().to_dict()
        if self.warmup != 1:
            values["lora_alpha"] *= self.warmup
            values["alpha_pattern"] = {name: alpha * self.warmup for name, alpha in self.alpha_pattern.items()}
            values["training"] = {**self.training, "warmup": self.warmup}
        return values

    def start(self, weight: Tensor, module: str) -> Adapter:
        """What a module's training starts from."""
        raise NotImplementedError

    def _of(self, module: str, patterns: dict[str, Any], default: Any) -> Any:
        return patterns.get(get_pattern_key(patterns.keys(), module), default)


@dataclass(kw_only=True)
class D2LoraConfig(_Config):
    """Ŵ = W* + ΔW, ΔW = lora_alpha/r·(B₊A₊ − τ·B₋A₋): see `d2surgery.D2LoRA`.

    training: detach_norm and detach_minus (default False), and sigma, the spread of A₋ at the start (default 0.02).
    """

    r: int = 8
    tau: float = 0.5
    along: Literal["in_features", "out_features"] = "in_features"
    form: Literal["projected_plus_update", "projected", "update"] = "projected_plus_update"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["D2LORA"]

    def start(self, weight: Tensor, module: str) -> Adapter:
        rank = self._of(module, self.rank_pattern, self.r)
        scaling = self._of(module, self.alpha_pattern, self.lora_alpha) / rank
        start = D2LoRA.init(weight, rank=rank, scaling=scaling, sigma=self.training.get("sigma", 0.02))
        return D2LoRA(
            **start.slots(), scaling=scaling, tau=self.tau, along=self.along, form=self.form,
            detach_norm=self.training.get("detach_norm", False),
            detach_minus=self.training.get("detach_minus", False),
        )  # fmt: skip


@dataclass(kw_only=True)
class DualLoraConfig(_Config):
    """W' = W0 + s·ReLU(B·A) ⊙ sign(D·C), s = lora_alpha/√(r1·r2): see `d2surgery.DualLoRA`.

    Its delta is not zero at the start: call `d2surgery.set_warmup(model, w)` with w rising from 0 to 1 over the first
    steps. training: ste (default "clip") and sigma, the spread of all factors at the start (default: by the base,
    which the start then moves by 1 % at w = 1).
    rank_pattern maps to [r1, r2].
    """

    r1: int = 4
    r2: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["DUALLORA"]

    def start(self, weight: Tensor, module: str) -> Adapter:
        r1, r2 = self._of(module, self.rank_pattern, (self.r1, self.r2))
        scaling = self._of(module, self.alpha_pattern, self.lora_alpha) / (r1 * r2) ** 0.5
        sigma = self.training.get("sigma")
        size, sign = (DualLoRA.init(weight, rank=rank, scaling=scaling, sigma=sigma) for rank in (r1, r2))
        return DualLoRA(A=size.A, B=size.B, C=sign.C, D=sign.D, scaling=scaling, ste=self.training.get("ste", "clip"))


class _Slot(nn.Module):
    """One tensor of one adapter: PEFT's key of it ends in `.weight`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class _Layer(OverFrozen, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with adapters by name, each slot in a dict `lora_<slot>`."""

    kind: ClassVar[type[Adapter]]
    adapter_layer_names: tuple[str, ...]
    active_adapters: Any
    merged: Any
    set_adapter: Any
    disable_adapters: Any
    other_param_names = ("dropout", "fields", "configs")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.dropout: dict[str, float] = {}
        self.fields: dict[str, dict[str, Any]] = {}  # adapter name -> what of the value is no slot
        self.configs: dict[str, _Config] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | nn.Module | None = None

    def update_layer(self, adapter_name: str, start: Adapter, config: _Config) -> None:
        """Add an adapter, or begin one again."""
        slots = start.slots()
        for slot, values in slots.items():
            getattr(self, f"lora_{slot}")[adapter_name] = _Slot(values)
        self.fields[adapter_name] = {name: value for name, value in vars(start).items() if name not in slots}
        self.dropout[adapter_name] = config.lora_dropout
        self.configs[adapter_name] = config
        self.remember_squares()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapters(self) -> list[Adapter]:
        return [self.adapter(name) for name in self.fields]

    def adapter(self, name: str) -> Adapter:
        """The value around the live parameters."""
        slots = {slot: getattr(self, f"lora_{slot}")[name].weight for slot in self.kind.dimensions}
        scaling = self.warmed(self.fields[name]["scaling"])
        return self.kind(**{**self.fields[name], "scaling": scaling}, **slots)

    def warm(self, w: float) -> None:
        super().warm(w)
        for config in self.configs.values():
            config.warmup = w  # type: ignore[misc]

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None:
            return self._by_rows(x, adapter_names)
        active = [name for name in self.active_adapters if name in self.fields]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)  # type: ignore[no-any-return]
        name = _only(active)
        drops = self.training and self.dropout[name]
        return self.through(self.adapter(name), x, F.dropout(x, self.dropout[name]) if drops else None)

    def _by_rows(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row with its own adapter; "__base__", and what this layer has not, is the base. A beam search has
        several rows in the place of each."""
        if self.merged:
            raise refuse("USAGE", "an adapter is merged, so every row would have it", wanted="unmerge_adapter() before")
        if not names or len(x) % len(names):
            raise refuse(
                "USAGE", "adapter_names names an adapter for each row", wanted=f"{len(x)}", got=f"{len(names)}"
            )
        own = [name for name in names for _ in range(len(x) // len(names))]
        y: Tensor = self.base_layer(x)
        for name in [] if self.disable_adapters else dict.fromkeys(own):
            if name in self.fields:
                rows = torch.tensor([at for at, other in enumerate(own) if other == name], device=x.device)
                y = y.index_copy(0, rows, self.through(self.adapter(name), x[rows], None).to(y.dtype))
        return y

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own would round the slots to the dtype of the base."""
        slots = [getattr(self, name)[adapter_name] for name in self.adapter_layer_names]
        for slot in slots:
            if not slot.weight.is_meta:
                slot.to(device or self.weight.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W0 + delta in float32 at least, rounded once. The base's own parameter is kept for `unmerge`."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if is_quantized(self.base_layer):
            raise refuse("QUANTIZED_BASE", "a quantised layer is not merged")
        name, base = _only([*self.merged_adapters, *names]), self.base_layer
        W0, stored = base_weight(base).detach(), self.weight
        wide = W0.to(torch.promote_types(W0.dtype, torch.float32))
        with torch.no_grad():
            merged = rounded(wide + self.adapter(name).delta(wide), W0.dtype)
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._unmerged = base.weight
        as_stored = merged if W0.stride() == stored.stride() else merged.T.contiguous()
        base.weight = nn.Parameter(as_stored, requires_grad=False)  # a new one: a tied embedding keeps the old
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """The base's own parameter again, bit for bit."""
        if self._unmerged is not None:
            self.base_layer.weight = self._unmerged
        self.merged_adapters, self._unmerged = [], None


class D2LoraLinear(_Layer):
    kind = D2LoRA
    adapter_layer_names = tuple(f"lora_{slot}" for slot in D2LoRA.dimensions)


class DualLoraLinear(_Layer):
    kind = DualLoRA
    adapter_layer_names = tuple(f"lora_{slot}" for slot in DualLoRA.dimensions)


class _Model(BaseTuner):  # type: ignore[misc]
    """The model with these layers in the place of the targeted ones."""

    prefix = "lora_"
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **options: Any) -> Iterator[None]:
        """PEFT's way to answer each row of a batch by its own adapter."""
        if adapter_names is None:
            yield
            return
        layers = [m for m in self.modules() if isinstance(m, _Layer | AuxiliaryTrainingWrapper)]
        known = {name for layer in layers if isinstance(layer, _Layer) for name in layer.fields} | {"__base__"}
        if unknown := sorted(set(adapter_names) - known):
            raise refuse("USAGE", "no such adapter", wanted=", ".join(sorted(known)), got=", ".join(unknown))
        if self.training:
            raise refuse("USAGE", "adapter_names is for models in evaluation mode")

        def named(module: nn.Module, given: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return given, options | {"adapter_names": adapter_names}

        hooks = [layer.register_forward_pre_hook(named, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _create_and_replace(
        self,
        peft_config: _Config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, _Layer) else self.tuner_layer_cls(target) if is_linear(target) else None
        if layer is None:
            raise refuse("TARGETS_UNMATCHED", "not a linear layer", module=current_key, got=type(target).__name__)
        layer.update_layer(adapter_name, peft_config.start(base_weight(layer.base_layer), current_key), peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


class D2LoraModel(_Model):
    tuner_layer_cls = D2LoraLinear


class DualLoraModel(_Model):
    tuner_layer_cls = DualLoraLinear


def _only(names: list[str]) -> str:
    if len(names) > 1:
        raise refuse("USAGE", "these adapters do not add up: one at a time", got=", ".join(names))
    return names[0]


def _register(name: str, config: type[_Config], model: type[_Model]) -> None:
    """A member of PEFT's closed enumeration, and the method under it."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=_Model.prefix)


def _check_release(release: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:3])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        first, last = (".".join(map(str, numbers)) for numbers in SUPPORTED)
        raise refuse("PEFT_RELEASE", "this PEFT was not tested", wanted=f"{first} to before {last}", got=release)


_check_release(peft.__version__)
_register("D2LORA", D2LoraConfig, D2LoraModel)
_register("DUALLORA", DualLoraConfig, DualLoraModel)
