"""Random changes of bytes, and of what they mean: the same random numbers make the same changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]


def flipped(data: bytes, rng: Random) -> bytes:
    """Up to eight bits are wrong."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_short(data: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return data[: rng.randint(0, len(data))]


def misplaced(data: bytes, rng: Random) -> bytes:
    """A piece is missing, or stands twice."""
    a, b = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:b] + data[a:] if rng.random() < 0.5 else data[:a] + data[b:]


BLIND: list[Mutation] = [flipped, cut_short, misplaced]

# Values at which programs stumble.
ODD = [None, True, 0, -1, 1, 0.5, 1e308, 10**30, float("nan"), "", "x", [], {}, [[]], "maml", "mlp"]


def changed_json(data: bytes, rng: Random) -> bytes:
    """One value of a JSON text is gone, odd, or another one's; what follows a zero byte stays."""
    text, zero, rest = data.partition(b"\0")
    try:
        value = json.loads(text)
        places = list(_places(value))
    except (ValueError, RecursionError):
        return flipped(data, rng)
    if not places:
        return flipped(data, rng)
    container, key = rng.choice(places)
    if rng.random() < 0.1:
        del container[key]
    else:
        others = [c[k] for c, k in places]
        container[key] = json.loads(json.dumps(rng.choice(ODD + others)))
    return json.dumps(value).encode() + zero + rest


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where in a structure values stand: container and key."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield value, key
        yield from _places(value[key])
