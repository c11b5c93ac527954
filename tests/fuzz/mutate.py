"""How files are changed: bytes, fields of JSON and TOML to every type, entries of headers, records of archives."""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "none",
    "\ud800", "\x1b[2J\n", "=1+1", "../../etc", "a" * 5000, "(a+)+$", "((((", ".*", [], [None], [1, "a"], ["q_proj"],
    [[[[]]]], {}, {"a": 1}, {"": None}, {"q_proj": "x"}, {"a": {"b": {"c": []}}}, [0] * 3000, {"\u202e": "\x00"},
]  # fmt: skip
SIZES = [0, 1, 2**8 - 1, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]

Path = tuple[str | int, ...]


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Of every field, however deep."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from paths(each, (*at, name))


def replaced(value: Any, at: Path, new: Any) -> Any:
    """A copy with another value in one place."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)  # type: ignore[index]
    return copy


def mutated_json(value: Any, random: Random) -> bytes:
    """One to three fields changed, taken away, doubled or renamed; seldom the bytes, too."""
    text = ""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at = random.choice([*paths(value)])
        action = random.randrange(10)
        if action < 7 or not at:
            value = replaced(value, at, random.choice(VALUES))
        elif action == 7:
            value = _without(value, at)
        elif action == 8 and isinstance(value, dict):
            value = {**value, str(random.choice(VALUES))[:40]: random.choice(VALUES)}
        else:
            text = json.dumps(value)
            field = json.dumps(str(at[0]))
            text = f"{text[:-1]}, {field}: {json.dumps(random.choice(VALUES))}}}"
    data = (text or json.dumps(value)).encode()
    return mutated_bytes(data, random) if random.random() < 0.1 else data


def _without(value: Any, at: Path) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1:
        del copy[at[0]]  # type: ignore[arg-type]
    else:
        copy[at[0]] = _without(value[at[0]], at[1:])  # type: ignore[index]
    return copy


def mutated_toml(text: str, random: Random) -> bytes:
    lines = text.splitlines()
    for _ in range(random.choice([1, 1, 2])):
        at = random.randrange(len(lines))
        key = lines[at].partition("=")[0]
        value = random.choice([
            "1", "-1", "0", "nan", "inf", "true", '"x"', "[]", "{}", "[[]]", "1979-05-27", "0x" + "f" * 5000, "9" * 400,
            '"\\u001b[2J"', "[" * 2000, "{a = {b = 1}}", "1e400", '["q_proj", 1]', '""', "07:32:00", "'(a+)+$'",
        ])  # fmt: skip
        lines[at] = random.choice([f"{key}= {value}", lines[at] + "\n" + lines[at], "", f"[{value}]", f"{key}{value}",
                                   f"unknown_{at} = {value}", "a." * 3000 + "b = 1"])  # fmt: skip
    data = "\n".join(lines).encode()
    return mutated_bytes(data, random) if random.random() < 0.1 else data


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Flipped, cut, doubled, exchanged, filled, or with a number of interest in it."""
    found = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        if not found:
            return bytes(found)
        at, size = random.randrange(len(found)), random.choice([1, 4, 8, 64])
        match random.randrange(7):
            case 0:
                found[at] ^= 1 << random.randrange(8)
            case 1:
                del found[at : at + random.choice([size, len(found)])]
            case 2:
                found[at:at] = found[at : at + size] * random.choice([1, 2, 100])
            case 3:
                found[at : at + 8] = struct.pack("<Q", random.choice(SIZES))
            case 4:
                found[at : at + 4] = struct.pack("<I", random.choice(SIZES) & 0xFFFFFFFF)
            case 5:
                found[at : at + size] = bytes([random.choice([0, 255, 10, 34, 91, 123])]) * size
            case _:
                found[at : at + 1] = random.choice([b"[", b"{", b'"', b"\\", b"\x1b", b"\xff", b",", b"e9", b"-"])
    return bytes(found)


def mutated_safetensors(data: bytes, random: Random) -> bytes:
    """The header's entries by their fields, mostly; the length kept true, mostly."""
    if random.random() < 0.25:
        return mutated_bytes(data, random)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    match random.randrange(8):
        case 0:
            text = mutated_json(header, random)
        case 1:
            header[name + random.choice([".weight", "\ud800", "x" * 3000, "\x1b", ".lora_A", ".0" * 200])] = header.pop(
                name
            )
            text = json.dumps(header).encode()
        case 2:
            header[name] = mutated_entry(header[name], random)
            text = json.dumps(header).encode()
        case 3:
            other = random.choice(names)
            header[name], header[other] = header[other], header[name]
            text = json.dumps(header).encode()
        case 4:
            header[name.replace("lora_A", "lora_B")] = header.pop(name)
            text = json.dumps(header).encode()
        case 5:
            extra = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
            header["base_model.model." + random.choice([
                "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.lora_C.weight", "x", "score.weight",
                "model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lm_head.modules_to_save.default.weight",
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
                "model.layers.9.self_attn.q_proj.lora_A.weight",
                "model.layers.0.mlp.experts.lora_A.weight", "model.layers.0.self_attn.q_proj.base_layer.bias",
            ])] = extra  # fmt: skip
            text, body = json.dumps(header).encode(), body + bytes(8)
        case 6:
            header["__metadata__"] = {"d2surgery": mutated_json(
                {"config": {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, "scaling": {"a": 1.0}}, random
            ).decode(errors="replace"), "lora_B_layout": random.choice(["rank_major", "x"])}  # fmt: skip
            text = json.dumps(header).encode()
        case _:
            text = json.dumps(header).encode() + b" " * random.randrange(20)
            body = mutated_bytes(body, random)
    stated = len(text) if random.random() < 0.9 else random.choice(SIZES)
    return struct.pack("<Q", stated) + text + body


def mutated_entry(entry: dict[str, Any], random: Random) -> dict[str, Any]:
    field = random.choice(["dtype", "shape", "data_offsets"])
    start, stop = entry["data_offsets"]
    choices: dict[str, list[Any]] = {
        "dtype": ["F64", "F16", "BF16", "I64", "F4", "F8_E4M3", "BOOL", "C64", "x", None],
        "shape": [entry["shape"][::-1], [stop - start], [*entry["shape"], 1], [0], [1, *entry["shape"]], [2**62, 2]],
        "data_offsets": [[start, start], [stop, start], [start + 1, stop + 1], [0, 2**63], [start], [start, stop, 0]],
    }
    return entry | {field: random.choice([*choices[field], *VALUES])}


def mutated_archive(data: bytes, random: Random) -> bytes:
    """The records of what torch.save wrote, changed and packed again by Python; or the bytes of the whole."""
    if random.random() < 0.5 or not data.startswith(b"PK"):
        return mutated_bytes(data, random)
    buffer = io.BytesIO()
    how = random.choice([zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", how) as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            record = old.read(name)
            if name != chosen:
                new.writestr(name, record)
            elif random.random() < 0.8:
                new.writestr(
                    name, mutated_pickle(record, random) if name.endswith(".pkl") else mutated_bytes(record, random)
                )
    return buffer.getvalue()


def mutated_pickle(data: bytes, random: Random) -> bytes:
    """Bytes changed, or a piece of the pickle's own language put in."""
    if random.random() < 0.4:
        return mutated_bytes(data, random)
    at = random.randrange(len(data))
    piece = random.choice([
        b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x10\x85R", b"(" * 3000, b"]" * 3000,
        b"t",
        b"u", b"}", b"R", b"b", b"Q", b"h\x00", b"\x85" * 3000, b"J\xff\xff\xff\xff", b"X\xff\xff\xff\xff", b"N", b"0",
        b"\x8c\x03abc", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R", b"\x88", b"M\xff\xff",
    ])  # fmt: skip
    return data[:at] + piece + data[at + random.choice([0, 0, len(piece)]) :]


def mutated_lines(data: bytes, random: Random, mutate: Callable[[Any, Random], bytes] = mutated_json) -> bytes:
    """One line of JSON lines, as JSON."""
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = random.choice(
        [mutate(json.loads(lines[at]), random), lines[at] + lines[at], lines[at][:-3], b"", b"[" * 3000]
    )
    return b"\n".join(lines) + b"\n" * random.randrange(2)
