"""Damages files: JSON by its structure, any file by its bytes, and names in a folder.

Every function takes a ``random.Random``, and nothing else decides what it does: a case is named
by its seed and number.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["mutated_bytes", "mutated_header", "mutated_json", "mutated_lines", "replace_by_special"]

# JSON that ``json.dumps`` cannot write: it is put in for a marked string.
_RAW = {
    "digits": "9" * 5000,
    "negative digits": "-" + "9" * 5000,
    "exponent": "1e999",
    "float": "0." + "1" * 3000,
    "lists": "[" * 20_000 + "]" * 20_000,
    "open lists": "[" * 20_000,
    "objects": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "surrogate": '"\\ud800"',
    "escape": '"\\u0000\\u001b[31m"',
}
_MARK = re.compile(r'"<raw ([a-z ]+)>"')

_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, -4, 255, 1000, 100_000, 10**9, 0.5, -0.0, 1e30, 1e308, -1e308, 1e-300),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(float("nan"), float("inf"), float("-inf")),
)
_TEXTS = (
    *("", " ", "x", "0", "1", "-1", "true", "None", "nan", "F32", "BF16", "I32", "C64", "F4"),
    *(
        "\0",
        "\n",
        "\x1b[2J",
        "\u202e",
        "é",
        "😀",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "C:\\x",
        "%s",
    ),
    *("{x}", "{{ 7 * 7 }}", "<b>", "a" * 300, "a" * 70_000, "(a+)+$", "auto", "llama", "gpt2"),
    *("__class__", "__float__", "weight", "model.layers.0", "layers." + "9" * 5000 + ".x"),
    *("flash_attention_2", "flex_attention", "kernels-community/x", "torch.float32", "int8"),
)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], [None], {"": None}, [0] * 1000, [1, 1, 1, 1] * 16),
    *({"__float__": "Infinity"}, {"__float__": []}, ["x", 1], {"a": {"b": {}}}),
    *(f"<raw {name}>" for name in _RAW),
)

# A container with the key or position of something in it.
_Place = tuple[Any, Any]


def mutated_json(value: Any, random: Random) -> bytes:
    """``value`` as JSON with one or more faults; a few of them also hit the text."""
    value = json.loads(json.dumps({"root": value}))
    while True:
        random.choice(_STRUCTURED)(value, random)
        if random.random() < 0.6:
            break
    text = _MARK.sub(lambda mark: _RAW[mark[1]], json.dumps(value.get("root")))
    data = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(data, random) if random.random() < 0.05 else data


def mutated_lines(data: bytes, random: Random) -> bytes:
    """A file of a JSON object per line: one line mutated, dropped, doubled, moved or cut."""
    lines = data.splitlines(keepends=True)
    number = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            lines.pop(number)
        case 1:
            lines.insert(random.randrange(len(lines)), lines[number])
        case 2:
            other = random.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
        case 3:
            lines[number] = mutated_bytes(lines[number], random)
        case 4:
            lines[number:] = []
        case _:
            lines[number] = mutated_json(json.loads(lines[number]), random) + b"\n"
    return b"".join(lines)


def mutated_header(data: bytes, random: Random) -> bytes:
    """A safetensors file with another header, length of header, or tail."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match random.randrange(12):
        case 0:
            length = random.choice((0, 1, 7, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + header + body
        case 1:
            return data[: random.randrange(len(data))]
        case 2:
            return data + bytes(random.choice((1, 3, 8, 4096)))
        case 3:
            return mutated_bytes(data, random)
        case 4:
            header = _shifted(header, random)
        case 5 if random.random() < 0.02:
            header = b'{"a":[' + b"[]," * random.choice((10_000, 3_000_000)) + b"[]]}"
        case _:
            header = mutated_json(json.loads(header), random)
    if random.random() < 0.3:
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def _shifted(header: bytes, random: Random) -> bytes:
    """Positions that still have the right lengths: holes, overlaps, swaps."""
    table = json.loads(header)
    names = [name for name in table if name != "__metadata__"]
    one, other = random.choice(names), random.choice(names)
    match random.randrange(4):
        case 0:
            table[one]["data_offsets"] = table[other]["data_offsets"]
        case 1:
            first, second = table[one], table[other]
            first["data_offsets"], second["data_offsets"] = (
                second["data_offsets"],
                first["data_offsets"],
            )
        case 2:
            step = random.choice((-8, -4, -1, 1, 4, 8))
            table[one]["data_offsets"] = [at + step for at in table[one]["data_offsets"]]
        case _:
            shape = table[one]["shape"]
            table[one]["shape"] = random.choice(
                ([*shape, 1], [1, *shape], shape[::-1], shape[1:], [-1, *shape], [*shape, 0])
            )
    return json.dumps(table).encode()


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """``data`` with flipped bits, a cut, an insertion, a hole, or a span twice."""
    if not data:
        return bytes(random.randrange(256) for _ in range(random.randrange(1, 64)))
    changed, start = bytearray(data), random.randrange(len(data))
    stop = min(len(data), start + random.choice((1, 2, 16, 256, len(data))))
    match random.randrange(7):
        case 0:
            changed[start] ^= 1 << random.randrange(8)
        case 1:
            for _ in range(random.randrange(2, 40)):
                changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        case 2:
            del changed[start:]
        case 3:
            del changed[start:stop]
        case 4:
            changed[start:stop] = bytes(stop - start)
        case 5:
            changed[start:start] = changed[start:stop]
        case _:
            pieces = (b"\0", b'"', b"{", b"]", b"\xff\xfe", b"\n", b"9" * 5000, b"[" * 20_000)
            changed[start:start] = random.choice(pieces)
    return bytes(changed)


def replace_by_special(path: Path, random: Random) -> str:
    """Replace ``path`` by something that is no file of its own; returns what."""
    path.unlink(missing_ok=True)
    kind = random.choice(("pipe", "endless", "folder", "dangling", "itself", "empty", "missing"))
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "endless":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to("nowhere")
        case "itself":
            path.symlink_to(path.name)
        case "empty":
            path.touch()
    return kind


# -- faults of structure -------------------------------------------------------------------------


def _places(container: Any) -> Iterator[_Place]:
    """Every place in ``container``, at any depth."""
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(pairs):
        yield container, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _any_place(root: Any, random: Random) -> _Place:
    """A place, where all keys that occur are as likely as each other.

    So settings with one value are hit as often as the numbers of a long list.
    """
    by_key: dict[Any, list[_Place]] = {}
    for place in _places(root):
        key = "#" if isinstance(place[1], int) else place[1]
        by_key.setdefault(re.sub(r"\d+", "#", key), []).append(place)
    places: list[_Place] = by_key[random.choice(sorted(by_key))]
    return random.choice(places)


def _any_value(random: Random) -> Any:
    """A copy: of a container that is put into itself there would be no end."""
    return copy.deepcopy(random.choice(random.choice((_NUMBERS, _TEXTS, _OTHERS))))


def _replace(root: Any, random: Random) -> None:
    container, key = _any_place(root, random)
    container[key] = _any_value(random)


def _nudge(root: Any, random: Random) -> None:
    """Change a number by a little or by much; anything else to a value of its own type."""
    container, key = _any_place(root, random)
    value = container[key]
    if isinstance(value, bool) or value is None:
        container[key] = not value
    elif isinstance(value, int):
        changes = (value - 1, value + 1, -value, 2 * value, value * 10**9, value // 2, 0)
        container[key] = random.choice(changes)
    elif isinstance(value, float):
        container[key] = random.choice((-value, value * 1e30, value * 1e-30, 0.0, float("nan")))
    elif isinstance(value, str):
        container[key] = random.choice((value[:-1], value + "x", value.upper(), value * 2))
    elif isinstance(value, list):
        container[key] = random.choice((value[:-1], value + value[:1], value[::-1], [value]))
    else:
        container[key] = dict(list(value.items())[1:])


def _retype(root: Any, random: Random) -> None:
    container, key = _any_place(root, random)
    value = container[key]
    try:
        text = str(value)
    except ValueError:
        text = "digits"
    ways = (text, [value], {"x": value}, {text[:100]: value}, value is not None, len(text), None)
    container[key] = random.choice(ways)


def _remove(root: Any, random: Random) -> None:
    container, key = _any_place(root, random)
    if container is not root:
        del container[key]


def _add(root: Any, random: Random) -> None:
    container, key = _any_place(root, random)
    if container is root:
        return
    if isinstance(container, list):
        container.insert(key, _any_value(random))
    else:
        name = random.choice(_TEXTS)
        container[name] = random.choice((_any_value(random), copy.deepcopy(container[key])))


def _swap(root: Any, random: Random) -> None:
    """Swap two values, of which neither is within the other."""
    (one, key), (other, name) = (_any_place(root, random) for _ in range(2))
    first, second = one[key], other[name]
    if any(isinstance(value, dict | list) for value in (first, second)):
        other[name] = json.loads(json.dumps(first))
    else:
        one[key], other[name] = second, first


def _rename(root: Any, random: Random) -> None:
    container, key = _any_place(root, random)
    if isinstance(container, dict) and container is not root:
        names = (*container, *(random.choice(_TEXTS) for _ in range(3)), key[:-1], key + "x")
        container[random.choice(names)] = container.pop(key)


_STRUCTURED: tuple[Callable[[Any, Random], None], ...] = (
    *(_replace, _replace, _replace, _nudge, _nudge, _retype, _remove, _add, _swap, _rename),
)
