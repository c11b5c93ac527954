"""What does a training step of each kind cost, against LoRA of as many parameters and against PEFT?

A stack of Llama blocks, adapters on all seven linear layers, forward and backward under a random linear loss. Every
round is one process, and begins with another run.

    python analyses/training_cost/study.py [--device cuda [--eager]] [--rounds N] [--tiny]
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, versions, write

HERE = Path(__file__).resolve().parent
SEED, ROUNDS, STEPS, WARM_UP = 0, 5, 5, 1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name -> library, kind, rank as a share of LoRA's: D2-LoRA and Dual LoRA have two pairs. The first is compared with.
RUNS: dict[str, tuple[str, str, float]] = {
    "LoRA": ("d2surgery", "lora", 1),
    "DoRA": ("d2surgery", "dora", 1),
    "D2-LoRA": ("d2surgery", "d2lora", 0.5),
    "D2-LoRA, norm detached": ("d2surgery", "d2lora", 0.5),
    "Dual LoRA": ("d2surgery", "duallora", 0.5),
    "PEFT LoRA": ("peft", "lora", 1),
    "PEFT DoRA": ("peft", "dora", 1),
    "LoRA, logits of all": ("d2surgery", "lora", 1),
    "LoRA, logits of answers": ("d2surgery", "lora", 1),
}
PAIRS = [(name, "LoRA") for name in RUNS if name != "LoRA" and "logits" not in name]
PAIRS += [("DoRA", "PEFT DoRA"), ("LoRA, logits of answers", "LoRA, logits of all")]
ANSWERS, VOCABULARY = 16, 49152  # of the tokens of a row one in so many is an answer's, the last ones; SmolLM2's rows
TIME_TARGETS = {"DoRA": 1.05, "D2-LoRA": 1.05, "Dual LoRA": 1.6}  # of an H200-class GPU, over LoRA
MEMORY_TARGETS = {"DoRA": 1.05, "D2-LoRA": 1.05}
GPU = {
    "hidden 2048": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "layers": 2, "rows": 1, "tokens": 2048, "rank": 32},
    "hidden 4096": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "layers": 2, "rows": 1, "tokens": 2048, "rank": 32},
}  # fmt: skip
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "layers": 2, "rank": 32}  # fmt: skip
CPU = {  # hidden 576; rows × tokens
    "1 × 2048": SMALL | {"rows": 1, "tokens": 2048},
    "8 × 256": SMALL | {"rows": 8, "tokens": 256},
    "4 × 67": SMALL | {"rows": 4, "tokens": 67},
}
TINY = {
    "2 × 32": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
               "num_key_value_heads": 2, "layers": 1, "rows": 2, "tokens": 32, "rank": 4},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--eager", action="store_true", help="on a GPU: without torch.compile")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--shape", action="append", help="some of the shapes only, by name")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one round: does it run?")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json and figure.svg go")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        names = options.measure.pop("names")
        way = {"device": options.device, "compiled": options.device == "cuda" and not options.eager}
        print(json.dumps({name: measure(name, options.measure, **way) for name in names}))
        return
    shapes = TINY if options.tiny else GPU if options.device == "cuda" else CPU
    shapes = {name: sizes for name, sizes in shapes.items() if name in (options.shape or shapes)}
    results = study(shapes, options.device, 1 if options.tiny else options.rounds, eager=options.eager)
    write(results, options.results)
    subprocess.run([sys.executable, str(HERE / "figure.py"), str(options.results)], check=True)
    print(table(results))


def study(shapes: dict[str, dict[str, int]], device: str, rounds: int, *, eager: bool = False) -> dict[str, Any]:
    """The whole of results.json; the runs of one round stand side by side, each time in another order."""
    runs = []
    for number in range(rounds):
        first = number * len(RUNS) // rounds
        names = [*list(RUNS)[first:], *list(RUNS)[:first]]
        for shape, sizes in shapes.items():
            for name, found in in_its_own_process(sizes, names, device, eager).items():
                line = f"{shape:12} {name:24} {found['seconds']:9.4f} s {found['memory_bytes'] / 1e6:9.1f} MB"
                print(line, file=sys.stderr)
                runs.append({"round": number, "shape": shape, "run": name} | found)
    hashes = {run["shape"]: run.pop("base_sha256") for run in runs}
    return {
        "question": "What does a training step of each kind cost, against LoRA and PEFT?",
        "device": runs[0].pop("device"),
        "machine": machine(),
        "versions": versions("transformers", "peft"),
        "seed": SEED,
        "shapes": shapes,
        "inputs_sha256": hashes,
        "rounds": rounds,
        "runs": [{key: value for key, value in run.items() if key != "device"} for run in runs],
        "ratios": [
            {"shape": shape, "run": name, "over": over} | ratio(runs, shape, name, over, key, label)
            for shape in shapes
            for name, over in PAIRS
            for key, label in (("seconds", "time"), ("memory_bytes", "memory"))
        ],
    }


def in_its_own_process(sizes: dict[str, int], names: list[str], device: str, eager: bool) -> dict[str, dict[str, Any]]:
    """Every run of a round, one after another."""
    command = [sys.executable, __file__, "--device", device, "--measure", json.dumps(sizes | {"names": names})]
    command += ["--eager"] if eager else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a round failed:\n{done.stderr}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio(runs: list[dict[str, Any]], shape: str, name: str, over: str, key: str, label: str) -> dict[str, Any]:
    """Of the two runs of each round."""
    values = {(run["run"], run["round"]): run[key] for run in runs if run["shape"] == shape}
    each = [value / values[over, number] for (run, number), value in values.items() if run == name]
    return {"of": label, "median": round(median(each), 3), "min": round(min(each), 3), "max": round(max(each), 3)}


# One measurement ------------------------------------------------------------------------------------------------------


def measure(name: str, sizes: dict[str, int], *, device: str, compiled: bool) -> dict[str, Any]:
    """Seconds of a step, and the most that a step's tensors hold beside the model at once, temporaries included."""
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = blocks(sizes).to(device, dtype)
    digest = hashlib.sha256(b"".join(p.detach().cpu().view(torch.uint8).numpy().tobytes() for p in model.parameters()))
    model = adapted(model, name, sizes["rank"]).train()
    shape = (sizes["rows"], sizes["tokens"], sizes["hidden_size"])
    draw = torch.Generator().manual_seed(SEED)  # the same for all runs, whose adapters take numbers of their own
    x = torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()
    step_of = torch.compile(model) if compiled else model
    learning = [p for p in model.parameters() if p.requires_grad]
    loss_of = loss_function(name, sizes, device, dtype)

    def step() -> Any:
        loss = loss_of(step_of(inputs_embeds=x).last_hidden_state)
        loss.backward()
        for parameter in [*learning, x]:
            parameter.grad = None
        return loss.detach()

    loss = [step() for _ in range(WARM_UP)][-1]
    times = [timed(step, device) for _ in range(STEPS)]
    memory = peak_on_gpu(step) if device == "cuda" else peak_on_cpu(step)
    roof = matmul_rate(sizes, device, dtype)
    return {
        "seconds": round(median(times), 5),
        "memory_bytes": memory,
        "roofline_share": round(useful_work(sizes) / median(times) / roof, 3),
        "trainable": sum(p.numel() for p in learning),
        "loss": float(loss),
        "base_sha256": digest.hexdigest(),
        "device": f"{torch.cuda.get_device_name()}, {'compiled' if compiled else 'eager'}"
        if device == "cuda"
        else "cpu, one thread, float32, not compiled",
    }


def blocks(sizes: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaModel

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape = {name: sizes[name] for name in names}
    return LlamaModel(LlamaConfig(**shape, num_hidden_layers=sizes["layers"], vocab_size=8, use_cache=False))


def adapted(model: Any, name: str, rank: int) -> Any:
    library, kind, share = RUNS[name]
    rank = int(rank * share)
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        options = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS, "use_dora": kind == "dora"}
        return get_peft_model(model, LoraConfig(**options))
    from d2surgery import AdaptedLinear, initial

    options = {"detach_norm": True} if name.endswith("detached") else {}
    start = initial(model, kind, TARGETS, rank=rank, scaling=1.0, **options)
    model.requires_grad_(False)
    for place, adapter in start.items():
        parent, _, child = place.rpartition(".")
        layer = AdaptedLinear(model.get_submodule(place), adapter)
        setattr(model.get_submodule(parent), child, layer)
    return model


def timed(step: Callable[[], Any], device: str) -> float:
    import torch

    if device == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def loss_function(name: str, sizes: dict[str, int], device: str, dtype: Any) -> Callable[[Any], Any]:
    """A random linear function of the output, whose gradient is the same for every run; with a head the cross-entropy
    of the answers' tokens, from the logits of all positions or from theirs alone."""
    import torch

    draw = torch.Generator().manual_seed(SEED + 1)
    rows, tokens, hidden = sizes["rows"], sizes["tokens"], sizes["hidden_size"]
    if "logits" not in name:
        weights = torch.randn(rows, tokens, hidden, generator=draw).to(device)
        return lambda output: (output.float() * weights).sum() / weights[0, 0].numel() ** 0.5 / (rows * tokens)
    head = (torch.randn(VOCABULARY, hidden, generator=draw) / hidden**0.5).to(device, dtype)
    answers = max(1, tokens // ANSWERS)
    labels = torch.randint(VOCABULARY, (rows, tokens), generator=draw).to(device)
    labels[:, :-answers] = -100
    kept = slice(None) if "all" in name else slice(-answers, None)
    cross_entropy = torch.nn.functional.cross_entropy
    return lambda output: cross_entropy((output[:, kept] @ head.T).float().flatten(0, 1), labels[:, kept].flatten())


def peak_on_gpu(step: Callable[[], Any]) -> int:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(step: Callable[[], Any]) -> int:
    """By the profiler's record of what the allocator gave and took back."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def matmul_rate(sizes: dict[str, int], device: str, dtype: Any) -> float:
    """Floating-point operations per second of the largest product of the model by itself: the roof."""
    import torch

    tokens, hidden, wide = sizes["rows"] * sizes["tokens"], sizes["hidden_size"], sizes["intermediate_size"]
    x, W = (
        torch.randn(tokens, hidden, device=device, dtype=dtype),
        torch.randn(wide, hidden, device=device, dtype=dtype),
    )
    times = [timed(lambda: x @ W.T, device) for _ in range(5)]
    return 2 * tokens * hidden * wide / min(times[1:])


def useful_work(sizes: dict[str, int]) -> float:
    """Operations of a step that every method needs: both passes through W0 and through causal attention."""
    hidden, wide, tokens = sizes["hidden_size"], sizes["intermediate_size"], sizes["tokens"]
    shared = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    linear = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * wide
    attention = 2 * 2 * tokens * tokens * hidden / 2
    return sizes["rows"] * sizes["layers"] * (2 * 2 * tokens * linear + 3 * attention)


# What is said ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    if not results["runs"]:
        return "**Not run since the method changed.** No number stands here."
    lines = ["| blocks | run | parameters | ms a step: median (min to max) | share of the roof | memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for shape in results["shapes"]:
        for name in RUNS:
            mine = [run for run in results["runs"] if (run["shape"], run["run"]) == (shape, name)]
            times = [1000 * run["seconds"] for run in mine]
            wall = f"{median(times):.0f} ({min(times):.0f} to {max(times):.0f})"
            share = f"{median(run['roofline_share'] for run in mine):.2f}"
            peak = f"{median(run['memory_bytes'] for run in mine) / 1e6:.0f}"
            lines.append(f"| {shape} | {name} | {mine[0]['trainable']} | {wall} | {share} | {peak} |")
    lines += ["", "| blocks | run | over | time: median (min to max) | target on a GPU | memory | target on a GPU |"]
    lines.append("|---|---|---|---|---|---|---|")
    ratios = results["ratios"]
    for time_, memory_ in zip(ratios[::2], ratios[1::2], strict=True):
        over_lora = time_["over"] == "LoRA"
        times_ = f"{time_['median']:.2f} ({time_['min']:.2f} to {time_['max']:.2f})"
        targets = [t.get(time_["run"], "") if over_lora else "" for t in (TIME_TARGETS, MEMORY_TARGETS)]
        cells = [
            time_["shape"],
            time_["run"],
            time_["over"],
            times_,
            targets[0],
            f"{memory_['median']:.2f}",
            targets[1],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
