"""What a run trains on: the base and its tokenizer, on the device that the run has."""

import os
from typing import Any

import torch

from d2surgery.errors import refuse
from d2surgery.live.quantization import loading_options, quantization_of
from d2surgery.training.data import Corpus
from d2surgery.training.planning import first_on_host
from d2surgery.training.settings import TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tokenizer_of(config: TrainConfig) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _loaded(AutoTokenizer, config)
    if tokenizer.eos_token_id is None and config.data.goal == "answers":
        raise refuse("BAD_BASE", "its tokenizer has no end-of-text token, so no answer would end", file=config.base)
    return tokenizer


def model_of(config: TrainConfig, corpus: Corpus, tokenizer: Any) -> tuple[Any, set[str]]:
    """The base, and the names of those of a classifier's tensors that it has not: they start at random."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype, stored = _DTYPES[config.run.precision], getattr(_loaded(AutoConfig, config), "quantization_config", None)
    quantization = quantization_of(stored, config.run.quantization, base=config.base)
    device = device_of(config)
    how = loading_options(quantization, stored=stored is not None, dtype=dtype, device=device)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true" and not first_on_host():
            how["device_map"] = {"": "meta"}  # accelerate sends it its part
    elif device.type != "cpu":
        how["device_map"] = {"": device}  # past the host's memory, where each process would hold it whole
    if config.run.attention:
        how["attn_implementation"] = config.run.attention
    if corpus.labels:
        torch.manual_seed(config.run.seed)  # of the head, which the base may not have
        how |= {"id2label": dict(enumerate(corpus.labels)), "pad_token_id": pad_token(tokenizer)}
        how["output_loading_info"] = True
        model, info = _loaded(AutoModelForSequenceClassification, config, dtype=dtype, **how)
        made_up = set(info["missing_keys"])
    else:
        made_up = set()
        model = _loaded(AutoModelForCausalLM, config, dtype=dtype, **how)
    model.config.use_cache = False  # with a cache, packed items would see one another
    if config.run.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, made_up


def device_of(config: TrainConfig) -> torch.device:
    """Where this process trains, before accelerate says so: a base is loaded in its place."""
    found = accelerator() if config.run.device != "cpu" else None
    if found is None or found.type == "mps":  # which has no float64
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def accelerator() -> torch.device | None:
    """The kind of device beside the CPU that torch finds here."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _loaded(kind: Any, config: TrainConfig, **options: Any) -> Any:
    try:
        return kind.from_pretrained(config.base, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise refuse("BAD_BASE", reason[:300], file=config.base) from None


def check_fit(config: TrainConfig, model: Any, corpus: Corpus) -> None:
    """The rows and their tokens are ones that the model has."""
    every = [*corpus.train, *corpus.held_out]
    most = _longest(model)
    longest = max(len(item.tokens) for item in every)
    if most is not None and longest > most:
        raise refuse("BAD_CONFIG", "rows longer than the model's context", module="data.max_length",
                     wanted=f"at most {most}", got=str(config.data.max_length))  # fmt: skip
    vocabulary, largest = model.get_input_embeddings().num_embeddings, max(max(item.tokens) for item in every)
    if largest >= vocabulary:
        message = f"its tokenizer has tokens that the model has not ({largest} of {vocabulary})"
        raise refuse("BAD_BASE", message, file=config.base)


def _longest(model: Any) -> int | None:
    """The tokens that a row may have: of RoBERTa and its kin fewer than max_position_embeddings, for they count
    positions from the one after the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    return most


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Changing the first item of a packed row must not change one bit of what follows the second."""
    if model.device.type == "meta":  # FSDP's other processes; the first one looks
        return
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    model.eval()
    one, other = (
        model(input_ids=torch.tensor([[*first, 4, 5, 6]], device=model.device), position_ids=positions).logits[0, 3:]
        for first in ((1, 2, 3), (7, 8, 9))
    )
    if not torch.equal(one, other):
        message = f"in {type(model).__name__} packed items see one another"
        raise refuse("BAD_CONFIG", message, module="data.batching", wanted="shuffled or by_length", got="packed")


def pad_token(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
