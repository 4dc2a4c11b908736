"""Give scores of metabook 0.1.0 the names that their episodes have now: python -m tools.rename_episodes results

Until 0.1.0 the hash of frozen episodes stood for the drawn indices and for the names and sizes of the classes, but not
for what the classes hold.  This draws the episodes of the book's tables again, from the data, compares the old
hash, and writes the new one; the old one stays as `migrated_from`.  The scores are not measured again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.cases import QUERIES, episodes_of, speed_cases
from metabook.datasets import DataError
from metabook.episodes import Frozen
from metabook.recipes import unseen_tasks
from metabook.saving import write_atomically
from metabook.sources import SOURCES, present
from metabook.structures import tree_leaves
from metabook.training import VALIDATION, VALIDATION_TASKS

SETS = {
    "test": [(600, 0), (1000, 0)],
    "val": [(VALIDATION_TASKS, s) for s in (VALIDATION, 0, 1, 2)],
}


def older_hash(frozen: Frozen) -> str:
    """As 0.1.0 made it."""
    found = hashlib.sha256(repr(frozen.tasks).encode())
    for leaf in tree_leaves(frozen.groups):
        found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + leaf.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def episodes_of_the_tables() -> Iterator[Frozen]:
    """All that rows of results were scored on, as far as the data is here."""
    data = [name for name in SOURCES if present(name)]
    for name, split, shot in itertools.product(data, SETS, (1, 5)):
        try:
            task = {"data": name, "way": 5, "shot": shot}
            tasks = unseen_tasks(task, split, torch.device("cpu"))
        except (ValueError, DataError) as error:  # such as glyphs that are drawn otherwise here
            print(f"{name}, {split}, {shot} shot: {error}", file=sys.stderr)
            continue
        yield from (tasks.freeze(n, seed) for n, seed in SETS[split])
    for name in QUERIES:
        if name in data:
            yield from map(episodes_of, speed_cases("cpu", name))


def renamed(text: str, names: dict[str, str]) -> tuple[str, list[str]]:
    """The text of a file with new names, and the names of episodes that nobody knows."""
    unknown = []

    def change(found: re.Match[str]) -> str:
        space, old = found.groups()
        if old not in names:
            unknown.append(old)
            return found[0]
        return f'{space}"episodes": "{names[old]}",{space}"migrated_from": "{old}"'

    pattern = r'(\s*)"episodes": "([0-9a-f]{12})"(?!,\s*"migrated_from")'
    return re.sub(pattern, change, text), unknown


def main(folder: Path) -> None:
    """Rename in every JSON file of a folder; ends with status 1 where names were kept."""
    names, kept = {older_hash(frozen): frozen.hash for frozen in episodes_of_the_tables()}, 0
    for path in sorted(folder.glob("*.json")):
        text, unknown = renamed(path.read_text(encoding="utf-8"), names)
        write_atomically(path, text.encode())
        if unknown := sorted(set(unknown) - set(names.values())):
            print(f"{path.name}: kept {', '.join(unknown)}: no episodes that can be drawn here")
            kept = 1
    sys.exit(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
