"""What can happen to a directory of right merged weights, and what transformers then loads: the oracle.

Every change is generic: it knows no architecture, only the tensors, the config and the tokenizer that are there.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as T
from models import CASES, Built, byte_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[["Right", Path], object]
Tensors = dict[str, Tensor]
ARCHITECTURES = ("llama", "tied", "gpt2", "mixtral", "t5")
SINGLE, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
TEXTS = [
    "Hello world",
    "  a\tb\n\nc ",
    "<s>x</s> <new> a<new>b<mask>",
    "Ünïcödé 你好 😀 שלום",
    "12 345.6 x==y",
    "ﬁ Ａ ½ e\u0301",
    "",
]


# The oracle -----------------------------------------------------------------------------------------------------------


class Right:
    """A base, an adapter and the right merge of the two, with tokenizer and generation config."""

    def __init__(self, name: str, folder: Path) -> None:
        self.built = Built(CASES[name], folder)
        tokenizer = byte_tokenizer(chat=True)
        tokenizer.add_tokens(["<new>"])
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(self.built.base)
        self.directory = self.built.merged
        (self.directory / "d2surgery_merge.json").unlink()
        self.kind = self.built.kind
        self.state, self.config, self.generation = loaded(self.kind, self.directory)
        self.tokenizing = tokenized(self.directory)

    @property
    def tensors(self) -> Tensors:
        return dict(load_file(self.directory / SINGLE))

    def copy(self, out: Path) -> Path:
        shutil.copytree(self.directory, out)
        return out


def loaded(kind: Any, directory: Path) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """State, config and generation config of what transformers loads. Raises what it raises, or for what it misses."""
    config = T.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):  # defaults are those of models of billions
        if sum(parameter.numel() for parameter in kind(config).parameters()) > 5_000_000:
            raise ValueError("a model of another size")
    model, info = kind.from_pretrained(
        directory, output_loading_info=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    if any(info.values()):
        raise ValueError(str(info))
    generation = model.generation_config.to_dict() if model.can_generate() else {}
    return model.state_dict(), model.config.to_dict(), generation


def tokenized(directory: Path) -> dict[str, Any]:
    tokenizer = T.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    chat = [{"role": "user", "content": "hi"}]
    return {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "text": [tokenizer.decode([number]) for number in range(len(tokenizer))],
        "special": [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False),
        "padding": tokenizer.padding_side,
    }


# Of a config these say nothing about the model, or who wrote it; of generation nothing but these is left out.
SILENT = frozenset((
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "id2label",
    "label2id", "initializer_range", "initializer_factor", "output_attentions", "output_hidden_states", "return_dict",
    "pretraining_tp", "problem_type",
    "chunk_size_feed_forward", "_attn_implementation",
    "transformers_weights", "auto_map", "nobody_knows",
))  # fmt: skip


def is_right(right: Right, directory: Path) -> tuple[bool, str]:
    """Whether transformers makes of a directory what it makes of the right one, and the first thing that is not so."""
    try:
        state, config, generation = loaded(right.kind, directory)
    except Exception as error:  # whatever is raised, it is not loaded
        return False, f"does not load: {str(error)[:120]}"
    if state.keys() != right.state.keys():
        return False, "other parameters"
    if other := [name for name, tensor in right.state.items() if not torch.equal(tensor, state[name])]:
        return False, f"{other[0]} differs"
    for before, after, what in ((right.config, config, "config"), (right.generation, generation, "generation")):
        filled = {name for name in before if name.endswith("_token_id") and before[name] is None}
        names = (
            {name for name in (*before, *after) if not _is_share(name, after.get(name))}
            - SILENT
            - {"_from_model_config"}
            - filled
        )
        if differ := [name for name in sorted(names) if before.get(name) != after.get(name)]:
            return False, f"{what}: {differ[0]} {before.get(differ[0])} {after.get(differ[0])}"
    try:
        tokenizing = tokenized(directory)
    except Exception as error:
        return False, f"tokenizer does not load: {str(error)[:120]}"
    other = [name for name in tokenizing if tokenizing[name] != right.tokenizing[name]]
    return not other, f"tokenizer: {other[0]}" if other else ""


def _is_share(name: str, value: Any) -> bool:
    """Dropout, of training, where transformers takes it."""
    return "drop" in name and (value is None or 0 <= value <= 1)


# Weights --------------------------------------------------------------------------------------------------------------


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata or {"format": "pt"})


def weights(change: Callable[[Tensors], Mapping[str, Tensor]]) -> Change:
    """The one file, with other tensors in it."""
    return lambda right, out: write(change(right.tensors), out / SINGLE)


def shards(
    tensors: Tensors,
    out: Path,
    *,
    ending: str = "safetensors",
    index: Mapping[str, Any] | None = None,
    stem: str = "model",
) -> list[Path]:
    """Two shards and their index, in place of the one file."""
    (out / SINGLE).unlink(missing_ok=True)
    names = sorted(tensors)
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, held in parts.items():
        part = {name: tensors[name] for name in held}
        write(part, out / file) if ending == "safetensors" else torch.save(part, out / file)
    where = {name: file for file, held in parts.items() for name in held}
    content = {"metadata": {"total_size": 1}, "weight_map": where} | dict(index or {})
    kept = {key: value for key, value in content.items() if value is not ...}
    usual = {"safetensors": INDEX, "bin": f"{PICKLE}.index.json"}[ending]
    (out / usual).write_text(json.dumps(kept))
    return [out / file for file in parts]


def wrong(tensors: Tensors) -> Tensors:
    return {name: 1.5 * t if t.is_floating_point() else t for name, t in tensors.items()}


def picked(tensors: Tensors, which: str) -> str:
    matrices = [name for name in sorted(tensors) if tensors[name].dim() == 2]
    vectors = [name for name in sorted(tensors) if tensors[name].dim() == 1]
    return {"first": matrices[0], "middle": matrices[len(matrices) // 2], "vector": vectors[-1]}[which]


def renamed(how: Callable[[str], str], *which: str) -> Change:
    """Some tensors, or all of them, under another name."""

    def change(tensors: Tensors) -> Tensors:
        names = {picked(tensors, one) for one in which} or {*tensors}
        return {how(name) if name in names else name: t for name, t in tensors.items()}

    return weights(change)


def behind(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def without_root(name: str) -> str:
    return name.partition(".")[2] if name.count(".") > 1 else name


def one(which: str, f: Callable[[Tensor], Mapping[str, Tensor] | Tensor | None]) -> Change:
    """One tensor changed, taken away, or with others beside it."""

    def change(tensors: Tensors) -> Tensors:
        name = picked(tensors, which)
        value = f(tensors[name])
        if isinstance(value, Tensor):
            return tensors | {name: value}
        return {n: t for n, t in tensors.items() if n != name} if value is None else tensors | dict(value)

    return weights(change)


def copied(prefix: str, factor: float) -> Change:
    def change(tensors: Tensors) -> Tensors:
        name = picked(tensors, "middle")
        return tensors | {prefix + name: factor * tensors[name]}

    return weights(change)


def base_layers(right: Right, out: Path) -> None:
    """As PEFT saves what was never unloaded."""
    found = right.tensors
    names = {name for name in found if name.endswith("proj.weight")} or {picked(found, "first")}
    write({n.replace(".weight", ".base_layer.weight") if n in names else n: t for n, t in found.items()}, out / SINGLE)


def swapped(right: Right, out: Path) -> None:
    found = right.tensors
    first = picked(found, "middle")
    other = next((n for n in sorted(found) if n != first and found[n].shape == found[first].shape), first)
    write(found | {first: found[other], other: found[first]}, out / SINGLE)


def in_shards(index: Mapping[str, Any] | None = None, **options: Any) -> Change:
    return lambda right, out: shards(right.tensors, out, index=index, **options)


def both_sets(single: bool, index: bool) -> Change:
    """The one file and an index: which of the two is right?"""

    def change(right: Right, out: Path) -> None:
        found = right.tensors
        shards(found if index else wrong(found), out)
        write(found if single else wrong(found), out / SINGLE)

    return change


def moved_in_index(right: Right, out: Path) -> None:
    """Every tensor in the other shard than the index says."""
    files = [file.name for file in shards(right.tensors, out)]
    index = json.loads((out / INDEX).read_text())
    where = {name: files[1 - files.index(file)] for name, file in index["weight_map"].items()}
    (out / INDEX).write_text(json.dumps(index | {"weight_map": where}))


def twice(last: bool, same: bool) -> Change:
    """One tensor in both shards."""

    def change(right: Right, out: Path) -> None:
        found = right.tensors
        files = shards(found, out)
        name = picked(found, "middle")
        for file, holds in zip(files, (not last, last), strict=True):
            write(load_file(file) | {name: found[name] if holds or same else 1.5 * found[name]}, file)

    return change


def shard_short(right: Right, out: Path) -> None:
    first, _ = shards(right.tensors, out)
    held = load_file(first)
    write(dict([*held.items()][1:]), first)


def shard_gone(right: Right, out: Path) -> None:
    shards(right.tensors, out)[1].unlink()


def extra_shard(factor: float) -> Change:
    def change(right: Right, out: Path) -> None:
        found = right.tensors
        shards(found, out)
        name = picked(found, "middle")
        write({name: factor * found[name]}, out / "model-00003-of-00003.safetensors")

    return change


def alone(name: str) -> Change:
    return lambda right, out: (out / SINGLE).rename(out / name)


def beside(name: str, factor: float = 1.5) -> Change:
    """Another file of weights beside the right one."""

    def change(right: Right, out: Path) -> None:
        other = {n: factor * t for n, t in right.tensors.items()}
        torch.save(other, out / name) if name.endswith(".bin") else write(other, out / name)

    return change


def pickled(factor: float = 1.0, name: str = PICKLE) -> Change:
    def change(right: Right, out: Path) -> None:
        (out / SINGLE).unlink()
        torch.save({n: factor * t for n, t in right.tensors.items()}, out / name)

    return change


def pickled_beside(right: Right, out: Path) -> None:
    shards(wrong(right.tensors), out, ending="bin")
    write(right.tensors, out / SINGLE)


def named_in_config(single: bool, named: bool) -> Change:
    """`transformers_weights` sends elsewhere than to the usual file."""

    def change(right: Right, out: Path) -> None:
        write(right.tensors if named else wrong(right.tensors), out / "mine.safetensors")
        write(right.tensors if single else wrong(right.tensors), out / SINGLE)
        json_edit("config.json", transformers_weights="mine.safetensors")(right, out)

    return change


def in_subfolder(right: Right, out: Path) -> None:
    (out / "sub").mkdir()
    (out / SINGLE).rename(out / "sub" / SINGLE)


def adapter_beside(*names: str, folder: str = "") -> Change:
    def change(right: Right, out: Path) -> None:
        (out / folder).mkdir(exist_ok=True)
        for name in names:
            target = out / folder / name
            if name.endswith(".bin"):
                torch.save(load_file(right.built.adapter / "adapter_model.safetensors"), target)
            else:
                shutil.copy(right.built.adapter / name, target)

    return change


def cut(right: Right, out: Path) -> None:
    (out / SINGLE).write_bytes((out / SINGLE).read_bytes()[:-100])


# Config and tokenizer -------------------------------------------------------------------------------------------------


def json_edit(file: str, **fields: Any) -> Change:
    """Fields set, or taken away (...)."""

    def change(right: Right, out: Path) -> None:
        path = out / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not ...}))

    return change


def field(number: int, how: str) -> Change:
    """The config's nth field that is not only a name: taken away, or another value."""

    def change(right: Right, out: Path) -> None:
        content = json.loads((out / "config.json").read_text())
        names = [name for name in content if name not in ("architectures", "transformers_version", "dtype")]
        name = names[number % len(names)]
        value = content[name]
        if how == "gone":
            new: Any = ...
        elif isinstance(value, bool):
            new = not value
        elif isinstance(value, int | float):
            new = value * 2 + 1
        else:
            new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} if isinstance(value, dict) else 7
        json_edit("config.json", **{name: new})(right, out)

    return change


def file_gone(name: str) -> Change:
    return lambda right, out: (out / name).unlink(missing_ok=True)


def tokenizer_json(f: Callable[[dict[str, Any]], Any]) -> Change:
    def change(right: Right, out: Path) -> None:
        content = json.loads((out / "tokenizer.json").read_text())
        f(content)
        (out / "tokenizer.json").write_text(json.dumps(content))

    return change


def part(name: str, value: Any) -> Change:
    return tokenizer_json(lambda content: content.update({name: value}))


def words_swapped(content: dict[str, Any]) -> None:
    words = content["model"]["vocab"]
    first, second = [*words][5], [*words][6]
    words[first], words[second] = words[second], words[first]


def merge_added(content: dict[str, Any]) -> None:
    """A merge to a token that is there only as an added one: `<` and `s`, say."""
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = len(content["model"]["vocab"]) + 50


def added_token(**fields: Any) -> Change:
    return tokenizer_json(lambda content: content["added_tokens"][-2].update(fields))


def resaved_tokenizer(right: Right, out: Path) -> None:
    T.AutoTokenizer.from_pretrained(out).save_pretrained(out)


def resaved_config(right: Right, out: Path) -> None:
    T.AutoConfig.from_pretrained(out).save_pretrained(out)


def whole_config(right: Right, out: Path) -> None:
    """Every default written out."""
    content = T.AutoConfig.from_pretrained(out).to_dict()
    (out / "config.json").write_text(json.dumps(content, default=str))


def resaved(**options: Any) -> Change:
    def change(right: Right, out: Path) -> None:
        model = right.kind.from_pretrained(out, dtype="auto")
        for name in (SINGLE, "config.json"):
            (out / name).unlink()
        model.save_pretrained(out, **options)

    return change


def pefts(**options: Any) -> Change:
    """PEFT's own merge, saved by transformers; its rounding is the audit's business, not this oracle's."""

    def change(right: Right, out: Path) -> None:
        for name in (SINGLE, "config.json", "generation_config.json"):
            (out / name).unlink(missing_ok=True)
        right.built.with_peft().merge_and_unload().save_pretrained(out, **options)

    return change


def tie_written(right: Right, out: Path) -> None:
    """Every parameter of the model by its own name, tied ones too."""
    model = right.kind.from_pretrained(out)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(kept if right.tensors.keys() <= kept.keys() else right.tensors, out / SINGLE)


def buffers(right: Right, out: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(right.tensors | {name: torch.ones(4)}, out / SINGLE)


@dataclass(frozen=True)
class Mutation:
    group: str
    name: str
    change: Change
    open: bool = False  # which of two tensors for one parameter transformers takes is an accident of their names

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"


def mutations() -> list[Mutation]:
    return [
        Mutation(*row, open=row[1].startswith("also behind"))
        for row in (*_names(), *_files(), *_beside(), *_configs(), *_tokenizers(), *_healthy())
    ]


def _names() -> Iterator[tuple[str, str, Change]]:
    for prefix in (
        "x.",
        "ema.",
        "module.",
        "model.",
        "transformer.",
        "_orig_mod.",
        "base_model.model.",
        "model.model.",
    ):
        yield "names", f"all behind {prefix}", renamed(behind(prefix))
        yield "names", f"one behind {prefix}", renamed(behind(prefix), "middle")
    yield "names", "a vector behind x.", renamed(behind("x."), "vector")
    yield "names", "two behind two prefixes", renamed(lambda n: f"{n.count('1')}x.{n}", "first", "middle", "vector")
    yield "names", "roots gone", renamed(without_root)
    yield "names", "one root gone", renamed(without_root, "middle")
    yield "names", "an ending", renamed(lambda name: f"{name}_", "middle")
    yield "names", "capitals", renamed(str.upper, "middle")
    yield "names", "a slash", renamed(lambda name: name.replace(".", "/"), "middle")
    yield "names", "base_layer", base_layers
    yield "names", "two swapped", swapped
    yield "names", "one gone", one("middle", lambda t: None)
    yield "names", "a vector gone", one("vector", lambda t: None)
    yield "names", "one of another shape", one("middle", lambda t: t[:-1])
    yield "names", "one more", one("middle", lambda t: {"model.more.weight": t.clone()})
    for prefix in ("x.", "model.", "transformer.", "model.model."):
        for factor in (1.0, 1.5):
            yield "names", f"also behind {prefix} × {factor}", copied(prefix, factor)


def _files() -> Iterator[tuple[str, str, Change]]:
    for single in (True, False):
        for index in (True, False):
            yield "files", f"one file {single}, index {index}", both_sets(single, index)
            yield "files", f"usual {single}, named {index}", named_in_config(single, index)
        for same in (True, False):
            yield "files", f"in two shards, last right {single}, same {same}", twice(single, same)
    yield "files", "index without metadata", in_shards({"metadata": ...})
    yield "files", "index with null metadata", in_shards({"metadata": None})
    yield "files", "index with empty metadata", in_shards({"metadata": {}})
    yield "files", "index with a list as metadata", in_shards({"metadata": []})
    yield "files", "index of the wrong shards", moved_in_index
    yield "files", "a shard lacks a tensor", shard_short
    yield "files", "a shard is gone", shard_gone
    yield "files", "an extra shard", extra_shard(1.5)
    yield "files", "an extra shard of the same", extra_shard(1.0)
    yield "files", "shards of odd names", in_shards(stem="part")
    yield "files", "shards of .bin", in_shards(ending="bin", stem="pytorch_model")
    yield "files", "wrong shards of .bin beside", pickled_beside
    yield "files", ".bin index without metadata", in_shards({"metadata": ...}, ending="bin")
    for name in ("weights.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "Model.safetensors",
                 "pytorch_model.safetensors", "diffusion_pytorch_model.safetensors",
                 "adapter_model.safetensors"):  # fmt: skip
        yield "files", f"{name} alone", alone(name)
    for name in ("weights.safetensors", "consolidated.safetensors", "model.fp16.safetensors", PICKLE, "extra.bin"):
        yield "files", f"other {name} beside", beside(name)
        yield "files", f"the same {name} beside", beside(name, 1.0)
    yield "files", ".bin alone", pickled()
    yield "files", "wrong .bin alone", pickled(1.5)
    yield "files", "a .bin of another name", pickled(name="model.bin")
    yield "files", "in a subfolder", in_subfolder
    yield "files", "cut", cut
    yield "files", "empty", lambda r, out: (out / SINGLE).write_bytes(b"")
    yield "files", "no metadata in the header", lambda r, out: save_file(r.tensors, out / SINGLE)
    yield "files", "metadata of another framework", lambda r, out: save_file(r.tensors, out / SINGLE, {"format": "tf"})


def _beside() -> Iterator[tuple[str, str, Change]]:
    config, adapter, old = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
    yield "adapter beside", "config and weights", adapter_beside(config, adapter)
    yield "adapter beside", "config and .bin", adapter_beside(config, old)
    yield "adapter beside", "config alone", adapter_beside(config)
    yield "adapter beside", "weights alone", adapter_beside(adapter)
    yield "adapter beside", ".bin alone", adapter_beside(old)
    yield "adapter beside", "in a subfolder", adapter_beside(config, adapter, folder="adapter")


def _configs() -> Iterator[tuple[str, str, Change]]:
    for number in range(22):
        yield "config", f"field {number} gone", field(number, "gone")
        yield "config", f"field {number} changed", field(number, "changed")
    yield "config", "none", file_gone("config.json")
    yield "config", "empty", lambda r, out: (out / "config.json").write_text("{}")
    yield "config", "another architecture of the type", json_edit("config.json", architectures=["NoSuchModel"])
    yield "config", "no architecture", json_edit("config.json", architectures=...)
    yield "config", "model type gone", json_edit("config.json", model_type=...)
    yield "config", "model type unknown", json_edit("config.json", model_type="nosuch")
    yield "config", "quantised", json_edit("config.json", quantization_config={"quant_method": "bitsandbytes"})
    yield "config", "own code", json_edit("config.json", auto_map={"AutoConfig": "own.Own"})
    yield "config", "an unknown field", json_edit("config.json", nobody_knows=1)
    yield "config", "another version", json_edit("config.json", transformers_version="4.0.0", _name_or_path="x")
    yield "config", "no cache", json_edit("config.json", use_cache=False)
    generation = "generation_config.json"
    yield "generation", "none", file_gone(generation)
    yield "generation", "another end", json_edit(generation, eos_token_id=5)
    yield "generation", "several ends", json_edit(generation, eos_token_id=[2, 5])
    yield "generation", "sampling", json_edit(generation, do_sample=True, temperature=0.3)
    yield "generation", "another version", json_edit(generation, transformers_version="4.0.0")


def _tokenizers() -> Iterator[tuple[str, str, Change]]:
    config = "tokenizer_config.json"
    for name in ("tokenizer.json", config, "chat_template.jinja"):
        yield "tokenizer", f"no {name}", file_gone(name)
    yield "tokenizer", "words swapped", tokenizer_json(words_swapped)
    yield "tokenizer", "a merge more", tokenizer_json(merge_added)
    yield "tokenizer", "no pre-tokenizer", part("pre_tokenizer", None)
    yield "tokenizer", "another pre-tokenizer", part("pre_tokenizer", {"type": "Whitespace"})
    yield "tokenizer", "no post-processor", part("post_processor", None)
    yield "tokenizer", "no decoder", part("decoder", None)
    yield "tokenizer", "lower case", part("normalizer", {"type": "Lowercase"})
    yield "tokenizer", "unicode normalised", part("normalizer", {"type": "NFKC"})
    yield "tokenizer", "truncating", part("truncation", {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})  # fmt: skip
    yield "tokenizer", "added token strips", added_token(lstrip=True, rstrip=True)
    yield "tokenizer", "added token of whole words", added_token(single_word=True)
    yield "tokenizer", "added token of another text", added_token(content="<old>")
    yield "tokenizer", "added token gone", tokenizer_json(lambda c: c["added_tokens"].pop())
    for role in ("bos", "eos", "pad"):
        yield "tokenizer", f"another {role}", json_edit(config, **{f"{role}_token": "<new>"})
        yield "tokenizer", f"no {role}", json_edit(config, **{f"{role}_token": ...})
    yield "tokenizer", "an unknown token", json_edit(config, unk_token="<new>")
    yield "tokenizer", "another class", json_edit(config, tokenizer_class="GPT2Tokenizer")
    yield "tokenizer", "no such class", json_edit(config, tokenizer_class="NoSuchTokenizer")
    yield "tokenizer", "own code", json_edit(config, auto_map={"AutoTokenizer": ["own.Own", None]})
    yield "tokenizer", "padding left", json_edit(config, padding_side="left")
    yield "tokenizer", "prefix space", json_edit(config, add_prefix_space=True)
    yield "tokenizer", "another template", lambda r, out: (out / "chat_template.jinja").write_text("x")
    yield "tokenizer", "broken JSON", lambda r, out: (out / "tokenizer.json").write_text("{")
    yield "tokenizer", "formatted otherwise", tokenizer_json(lambda c: None)


def _healthy() -> Iterator[tuple[str, str, Change]]:
    yield "healthy", "ours", lambda right, out: None
    yield "healthy", "in shards", in_shards()
    yield "healthy", "mergekit's metadata", in_shards({"metadata": {"mergekit_version": "0.1", "total_size": 9}})
    yield "healthy", "saved again", resaved()
    yield "healthy", "saved again in shards", resaved(max_shard_size="20KB")
    yield "healthy", "tokenizer saved again", resaved_tokenizer
    yield "healthy", "config saved again", resaved_config
    yield "healthy", "every default written out", whole_config
    yield "healthy", "PEFT's", pefts()
    yield "healthy", "PEFT's in shards", pefts(max_shard_size="20KB")
    yield "healthy", "ties written out", tie_written
    yield "healthy", "old buffers", buffers
    yield (
        "healthy",
        "a README and a gitattributes",
        lambda r, out: (out / "README.md").write_text("x") and (out / ".gitattributes").write_text("x"),
    )
    yield "healthy", "an old dtype field", json_edit("config.json", dtype=..., torch_dtype="float32")
