"""Damage: to bytes, to JSON, to safetensors and to zip archives, all decided by a random generator."""

from __future__ import annotations

import io
import json
import random
import zipfile
from dataclasses import dataclass
from typing import Any

from safetensors import deserialize

from mlx_kvret.core.tensors import CHECKSUM, Tensor, checksum

NEST = "@nest@"
WEIRD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
    2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**5, 10**8, 10**9, 10**18, 10**400, "", "a", "1", "NaN",
    "\ud800", "\x1b[31m\x07", "\u202e", "\0", "x" * 10_000, [], {}, [[]], [None], ["a", 1], {"": 1},
    {"a": {"b": []}},
    f"{NEST}30", f"{NEST}100", f"{NEST}5000",
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), float("-inf"), -1, 0, 1, 10**5, 10**9, 2**31 - 1, -(2**31), 0.5]


@dataclass
class Damaged:
    """What became of a file: its bytes, None if it is gone, and whether a checksum in it was made right."""

    content: bytes | None
    how: str
    resealed: bool = False


def damage(name: str, content: bytes, rng: random.Random) -> Damaged:
    """One change, or a few, to a file of any kind."""
    kinds: list[Any] = [_bytes]
    if name.endswith(".json"):
        kinds += [_json] * 3
    elif name.endswith(".jsonl"):
        kinds += [_lines] * 3
    elif name.endswith(".safetensors"):
        kinds += [_header, _header, _values, _values, _texts]
    elif name.endswith(".pth"):
        kinds += [_archive, _archive]
    return rng.choice(kinds)(content, rng)


def _bytes(content: bytes, rng: random.Random) -> Damaged:
    new, size = bytearray(content), max(1, len(content))
    place = rng.randrange(size)
    # headers are short and matter most
    place = rng.choice([place, place % 64, place % 1024])
    how = rng.choice(["flip", "flip", "flip", "cut", "grow", "zero", "repeat", "noise", "gone", "empty"])
    if how == "flip":
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            new[min(rng.choice([place, rng.randrange(size)]), size - 1)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del new[place:]
    elif how == "grow":
        new += rng.randbytes(rng.choice([1, 8, 4096]))
    elif how == "zero":
        end = min(size, place + rng.choice([1, 8, 256]))
        new[place:end] = bytes(end - place)
    elif how == "repeat":
        new[place:place] = new[place : place + rng.choice([1, 16, 512])]
    elif how == "noise":
        end = min(size, place + rng.choice([2, 16, 256]))
        new[place:end] = rng.randbytes(end - place)
    elif how == "gone":
        return Damaged(None, "gone")
    else:
        new.clear()
    return Damaged(bytes(new), how)


# ---------------------------------------------------------------- JSON


def _json(content: bytes, rng: random.Random) -> Damaged:
    return Damaged(changed_json(content.decode(), rng).encode("utf-8", "surrogatepass"), "json")


def _lines(content: bytes, rng: random.Random) -> Damaged:
    lines = content.decode().splitlines()
    index = rng.randrange(len(lines))
    lines[index] = changed_json(lines[index], rng)
    return Damaged(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"), "json line")


def changed_json(text: str, rng: random.Random) -> str:
    """The text of a JSON value with one node changed."""
    value = json.loads(text)
    nodes = list(_nodes(value))
    if not nodes or rng.random() < 0.05:
        return _dumped(rng.choice(WEIRD))
    holder, key = rng.choice(nodes)
    how = rng.choice(["swap", "swap", "swap", "near", "drop", "rename", "twin"])
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "x", f"{key}s", "__class__"])] = holder.pop(key)
    elif how == "twin" and isinstance(holder, dict):
        twin = json.dumps(key) + ": " + _dumped(rng.choice(WEIRD))
        holder["@twin@"] = 0
        return _dumped(value).replace('"@twin@": 0', twin)
    elif how == "near" and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] += rng.choice([-1, 1, 0.5, 10**6, -(10**6)])
    else:
        holder[key] = rng.choice(WEIRD)
    return _dumped(value)


def _nodes(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _nodes(value[key])


def _dumped(value: Any) -> str:
    text = json.dumps(value)
    for deep in (30, 100, 5000):
        text = text.replace(f'"{NEST}{deep}"', "[" * deep + "]" * deep)
    return text


# ---------------------------------------------------------------- safetensors


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _header(content: bytes, rng: random.Random) -> Damaged:
    header, data = parts(content)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    how = rng.choice(["dtype", "shape", "offsets", "size", "swap", "any"])
    if how == "dtype":
        entry["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", 3]
        )
    elif how == "shape":
        shape = entry["shape"]
        shapes = [[], [0], [2**62, 4], [-1], [10**9], shape[::-1], [*shape, 1], shape[1:]]
        entry["shape"] = rng.choice(shapes)
    elif how == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(
            [0, 1, -1, 2**40, 2**64, len(data), len(data) + 1]
        )
    elif how == "size":
        return Damaged(rng.choice([0, 1, 2**31, 2**62]).to_bytes(8, "little") + content[8:], how)
    elif how == "swap" and len(names) > 1:
        one, other = rng.sample(names, 2)
        header[one], header[other] = header[other], header[one]
    else:
        return Damaged(joined(changed_json(json.dumps(header), rng), data), "header")
    return Damaged(joined(header, data), how)


def _values(content: bytes, rng: random.Random) -> Damaged:
    """One value of a tensor, in half of the cases with a checksum that is right again."""
    header, data = parts(content)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    begin, end = entry["data_offsets"]
    count = end - begin
    size = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I64": 8}.get(entry["dtype"], 1)
    new = bytearray(data)
    if count >= size:
        place = begin + size * rng.choice([0, count // size - 1, rng.randrange(count // size)])
        new[place : place + size] = _encoded(entry["dtype"], rng.choice(NUMBERS), size)
    return _sealed(joined(header, bytes(new)), rng, "value")


def _encoded(dtype: str, number: float, size: int) -> bytes:
    if dtype in ("F32", "F16", "BF16"):
        with_limits = max(-6e4, min(6e4, number)) if dtype == "F16" and abs(number) < 1e39 else number
        return Tensor.of([with_limits], dtype).bits.tobytes()
    whole = int(number) if abs(number) < 2**62 else -1
    return (whole % 2 ** (8 * size)).to_bytes(size, "little")


def _texts(content: bytes, rng: random.Random) -> Damaged:
    """JSON within the header's texts, or within a text that is stored as an array of characters."""
    header, data = parts(content)
    texts = header.get("__metadata__", {})
    inner = [name for name, text in texts.items() if text[:1] in "[{" and text]
    if inner:
        name = rng.choice(inner)
        texts[name] = changed_json(texts[name], rng)
        return _sealed(joined(header, data), rng, "text")
    places = [name for name in header if name.endswith(".0") and _characters(header, data, name)[:1] == "{"]
    if not places:
        return _header(content, rng)
    name = rng.choice(places)
    text = changed_json(_characters(header, data, name), rng)
    if rng.random() < 0.7 and f'"{CHECKSUM}"' in text:
        text = text.replace(f'"{CHECKSUM}"', '"seen"' if rng.random() < 0.1 else '"unused"')
    return Damaged(_with_characters(header, data, name, text), "text", resealed=f'"{CHECKSUM}"' not in text)


def _characters(header: dict[str, Any], data: bytes, name: str) -> str:
    entry = header[name]
    begin, end = entry["data_offsets"]
    size = {"I64": 8, "I32": 4}.get(entry["dtype"], 0)
    if not size:
        return ""
    codes = [int.from_bytes(data[i : i + size], "little") for i in range(begin, end, size)]
    return "".join(map(chr, codes)) if all(code < 0x110000 for code in codes) else ""


def _with_characters(header: dict[str, Any], data: bytes, name: str, text: str) -> bytes:
    """The file with one array replaced by the characters of a text, all others moved up."""
    size = 8 if header[name]["dtype"] == "I64" else 4
    new, pieces, offset = {}, [], 0
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            new[tensor] = entry
            continue
        begin, end = entry["data_offsets"]
        piece, shape = data[begin:end], entry["shape"]
        if tensor == name:
            piece, shape = b"".join(ord(c).to_bytes(size, "little") for c in text), [len(text)]
        new[tensor] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [offset, offset + len(piece)]}
        pieces.append(piece)
        offset += len(piece)
    return joined(new, b"".join(pieces))


def _sealed(content: bytes, rng: random.Random, how: str) -> Damaged:
    """A checksum that is right for what the file holds now, in most cases."""
    header, data = parts(content)
    texts = header.get("__metadata__", {})
    if CHECKSUM not in texts or rng.random() < 0.3:
        return Damaged(content, how)
    del texts[CHECKSUM]
    try:
        tensors = {name: _tensor(entry) for name, entry in deserialize(content)}
    except Exception:
        return Damaged(content, how)
    texts[CHECKSUM] = checksum(tensors, texts)
    return Damaged(joined(header, data), how, resealed=True)


def _tensor(entry: dict[str, Any]) -> Tensor:
    import numpy as np

    storage = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U32": "<u4", "U8": "u1"}
    bits = np.frombuffer(entry["data"], storage[entry["dtype"]]).reshape(entry["shape"])
    return Tensor(entry["dtype"], bits)


# ---------------------------------------------------------------- zip archives


def _archive(content: bytes, rng: random.Random) -> Damaged:
    """A torch file whose records were changed and packed again, their checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(records))
    how = rng.choice(["flip", "flip", "cut", "noise", "drop", "rename"])
    record = bytearray(records[name])
    if how == "drop":
        del records[name]
    elif how == "rename":
        records[rng.choice(["../x", "a/b", "archive/data/99", name + "x"])] = records.pop(name)
    elif record:
        place = rng.randrange(len(record))
        if how == "cut":
            del record[place:]
        elif how == "noise":
            record[place : place + 4] = rng.randbytes(len(record[place : place + 4]))
        else:
            record[place] ^= 1 << rng.randrange(8)
        records[name] = bytes(record)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return Damaged(packed.getvalue(), f"archive {how}", resealed=True)
