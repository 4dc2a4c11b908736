"""The process in which one target is fuzzed: python -m fuzz.worker NAME FOLDER [options of libFuzzer]"""

from __future__ import annotations

import sys
from functools import partial
from random import Random

import atheris

READERS = ["PIL", "csv", "gzip", "json", "metabook", "safetensors", "tarfile", "zipfile"]

with atheris.instrument_imports(include=READERS):
    from fuzz.survive import survive
    from fuzz.targets import TARGETS, Target

    for target in TARGETS.values():
        target.seeds()  # imports what is imported at its first use


def mutate(target: Target, data: bytes, most: int, seed: int) -> bytes:
    """Change what the bytes mean, or the bytes."""
    rng = Random(seed)
    if target.mutate and rng.random() < 0.5:
        return target.mutate(data, rng)[:most]
    return atheris.Mutate(data, most)


def main() -> None:
    name, *options = sys.argv[1:]
    change = partial(mutate, TARGETS[name])
    atheris.Setup(
        [sys.argv[0], *options],
        partial(survive, name),
        custom_mutator=lambda data, most, seed: change(data, most, seed),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
