"""What does each conversion of a trained adapter lose, in weights, in logits and in answers?

python analyses/conversions/study.py --base DIR --dora DIR --d2lora DIR --items FILE [--limit N] [--mergekit PYTHON]
python analyses/conversions/study.py --tiny
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import d2surgery
from d2surgery import KINDS, Adapter, BaseWeights, Checkpoint, DoRA, Keep, LoRA, from_adapters

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, sha256, versions, write

HERE = Path(__file__).resolve().parent
SEED, LIMIT, RANK = 0, 16, 16
QUESTION = "What does each conversion of a trained adapter lose, in weights, in logits and in answers?"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 300}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    for name in ("base", "dora", "d2lora", "items"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--limit", type=int, default=LIMIT, help="questions")
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment that has mergekit 0.1.4")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if options.tiny:
            options.limit = 4
            options.base, options.dora, options.d2lora, options.items = tiny(Path(work))
        results = study(options.base, options.dora, options.d2lora, options.items, options.limit, options.mergekit)
    write(results, options.results)
    print(table(results))


def study(base: Path, dora: Path, d2lora: Path, items: Path, limit: int, mergekit: Path | None) -> dict[str, Any]:
    """The whole of results.json."""
    weights = BaseWeights(base)
    text = gzip.decompress(items.read_bytes()) if items.suffix == ".gz" else items.read_bytes()
    questions: list[dict[str, str]] = json.loads(text)[:limit]
    rows: list[dict[str, Any]] = []
    none = answers(base, None, questions)
    for source in (dora, d2lora):
        checkpoint = d2surgery.load(source)
        wanted = answers(base, checkpoint, questions)
        kind = checkpoint.layout.kinds[0]
        rows.append({"from": kind, "to": "itself", "weights": 0.0} | against(wanted, wanted))
        rows.append({"from": kind, "to": "no adapter", "weights": 1.0} | against(none, wanted))
        for name, make in conversions(kind, base, source, mergekit).items():
            made, error = make(checkpoint, weights)
            rows.append({"from": kind, "to": name, "weights": error} | against(answers(base, made, questions), wanted))
    files = {"base": next(iter(weights.header.files)), "dora": dora / "adapter_model.safetensors",
             "d2lora": d2lora / "adapter_model.safetensors", "items": items}  # fmt: skip
    return {
        "question": QUESTION,
        "machine": machine(),
        "versions": versions("transformers", "peft"),
        "seed": SEED,
        "questions": len(questions),
        "inputs_sha256": {name: sha256(file) for name, file in files.items()},
        "rows": rows,
    }


# Conversions ----------------------------------------------------------------------------------------------------------

Make = Callable[[Checkpoint, BaseWeights], tuple[Checkpoint, float]]


def conversions(kind: str, base: Path, source: Path, mergekit: Path | None) -> dict[str, Make]:
    """Name -> what it makes of a checkpoint, and the relative error of its delta."""
    if kind != "dora":
        return {"DoRA of twice the rank, on its axis": ours("dora", 2), "LoRA of twice the rank": ours("lora", 2)}
    made: dict[str, Make] = {
        "LoRA of the same rank": ours("lora", 1),
        "LoRA of twice the rank": ours("lora", 2),
        "LoRA of the same rank, PEFT's convert_to_lora": lambda found, weights: by_peft(found, weights, base, source),
        "LoRA of the same rank, the magnitude dropped": dropped,
    }
    if mergekit:
        made["LoRA of the same rank, mergekit's of the merged model"] = lambda found, weights: by_mergekit(
            found, weights, base, source, mergekit
        )
    return made | {"D2-LoRA of the same rank": ours("d2lora", 1)}


def ours(to: str, times: int) -> Make:
    def make(checkpoint: Checkpoint, base: BaseWeights) -> tuple[Checkpoint, float]:
        made, certificate = d2surgery.convert(checkpoint, to, base, keep=Keep(rank=times * rank_of(checkpoint)))
        return made, certificate.relative_error

    return make


def rank_of(checkpoint: Checkpoint) -> int:
    ranks: list[int] = [rank for entry in checkpoint.layout.adapters.values() for rank in entry.ranks.values()]
    return max(ranks)


def by_peft(checkpoint: Checkpoint, weights: BaseWeights, base: Path, source: Path) -> tuple[Checkpoint, float]:
    from peft import PeftModel, save_as_lora
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), source)
    with tempfile.TemporaryDirectory() as folder:
        save_as_lora(folder, model, rank=rank_of(checkpoint))
        return compared(d2surgery.load(folder), checkpoint, weights)


def by_mergekit(
    checkpoint: Checkpoint, weights: BaseWeights, base: Path, source: Path, python: Path
) -> tuple[Checkpoint, float]:
    with tempfile.TemporaryDirectory() as folder:
        merged, out = Path(folder) / "merged", Path(folder) / "lora"
        d2surgery.merge(base, source, merged)
        words = ["--model", merged, "--base-model", base, "--max-rank", rank_of(checkpoint), "--out-path", out]
        subprocess.run([python.with_name("mergekit-extract-lora"), *map(str, words)], check=True)
        return compared(d2surgery.load(out), checkpoint, weights)


def dropped(checkpoint: Checkpoint, weights: BaseWeights) -> tuple[Checkpoint, float]:
    adapters: dict[str, Adapter] = {}
    for module, adapter in checkpoint.items():
        assert isinstance(adapter, DoRA)
        adapters[module] = LoRA(A=adapter.A, B=adapter.B, scaling=adapter.scaling)
    return compared(adapters, checkpoint, weights)


def compared(made: Mapping[str, Adapter], checkpoint: Checkpoint, weights: BaseWeights) -> tuple[Checkpoint, float]:
    """Of the checkpoint's modules what was made, and its relative error."""
    adapters = {module: made[module] for module in checkpoint}
    wrong = whole = 0.0
    for module, adapter in checkpoint.items():
        W = weights[f"{module}.weight"].double()
        wanted = adapter.delta(W)
        wrong += float((adapters[module].delta(W) - wanted).square().sum())
        whole += float(wanted.square().sum())
    return from_adapters(adapters), float((wrong / whole) ** 0.5)


# Answers --------------------------------------------------------------------------------------------------------------


def answers(base: Path, checkpoint: Checkpoint | None, questions: list[dict[str, str]]) -> dict[str, Any]:
    """The next token after "the correct answer is answer": log-probabilities, and the likeliest of the digits."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    encode = tokens_of(base)
    digits = [encode(f"answer{digit}")[-1] for digit in range(1, 5)]
    if checkpoint is not None:
        d2surgery.attach(model, checkpoint, trainable=False)
    logits = []
    with torch.no_grad():
        for item in questions:
            ids = encode(prompt(item["instruction"]))
            logits.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0))
    whole = torch.stack(logits)
    return {
        "logits": whole,
        "chosen": (whole[:, digits].argmax(1) + 1).tolist(),
        "right": [int(item["answer"][-1]) for item in questions],
    }


def prompt(instruction: str) -> str:
    """As the adapters were trained on it: SmolLM2's chat template."""
    return f"<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\nthe correct answer is answer"


def tokens_of(base: Path) -> Callable[[str], list[int]]:
    """The base's tokenizer; of a tiny base without one, bytes."""
    if not (base / "tokenizer.json").exists():
        return lambda text: list(text[-64:].encode())
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def against(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """KL(wanted ‖ got) of the next token in nats with its 95 % interval over questions, how many answers are other
    ones, and how many are right."""
    p, q = wanted["logits"], got["logits"]
    each = (p.exp() * (p - q)).sum(1)
    spread = 1.96 * float(each.std()) / len(each) ** 0.5
    return {
        "kl": float(each.mean()),
        "kl_interval": spread,
        "other_answers": sum(a != b for a, b in zip(got["chosen"], wanted["chosen"], strict=True)),
        "right": sum(a == b for a, b in zip(got["chosen"], got["right"], strict=True)),
    }


# --tiny, and the table ------------------------------------------------------------------------------------------------


def tiny(work: Path) -> tuple[Path, Path, Path, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    base = work / "base"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(base)
    weights, numbers = BaseWeights(base), torch.Generator().manual_seed(SEED)
    for kind in ("dora", "d2lora"):
        adapters = {}
        for name in weights:
            if "_proj" in name:
                made = KINDS[kind].init(weights[name], rank=2, scaling=2.0, generator=numbers)
                moved = {slot: t + 0.02 * torch.randn(t.shape, generator=numbers) for slot, t in made.slots().items()}
                adapters[name.removesuffix(".weight")] = KINDS[kind](scaling=2.0, **moved)
        d2surgery.save(from_adapters(adapters), work / kind)
    items = [{"instruction": f"is {n} even?", "answer": f"answer{1 + n % 2}"} for n in range(4)]
    (work / "items.json").write_text(json.dumps(items))
    return base, work / "dora", work / "d2lora", work / "items.json"


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    count = results["questions"]
    lines = [
        f"| from | to | error in weights | KL of the next token, nats | other answers of {count} | right of {count} |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        kl = f"{row['kl']:.2g} ± {row['kl_interval']:.1g}"
        title = {"dora": "DoRA", "d2lora": "D2-LoRA"}[row["from"]]
        lines.append(
            f"| {title} | {row['to']} | {row['weights']:.3g} | {kl} | {row['other_answers']} | {row['right']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
