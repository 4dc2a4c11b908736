"""Episodes per second: the library's sampler beside a `DataLoader` over episodes.

Both hold the images as bytes in memory and give batches of the same tensors, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import sleep
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bench.cases import QUERIES, data_here
from bench.measure import quartiles
from bench.worker import Failed, Work, Worker
from metabook.classes import Classes
from metabook.episodes import FewShot
from metabook.graphs import Replayed
from metabook.sources import SOURCES

ROUND = 0.5  # seconds that a round lasts at least
PAUSE = 0.5  # seconds in which the workers of the one before finish what they fetch ahead
ENDLESS = 10**9  # episodes of the data set
SIZES = [(5, 1, 32), (20, 5, 32)]  # way, shot, episodes at once
LARGE = [(5, 1, 1024)]  # on a GPU, too


class Episodes(Dataset):
    """One episode an item, as people write it: classes, then examples of each, then tensors."""

    def __init__(self, classes: Classes, way: int, shot: int, query: int):
        self.classes, self.way, self.shot, self.query = classes, way, shot, query
        self.starts, self.sizes = classes.starts.tolist(), classes.sizes.tolist()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen = torch.randperm(len(self.classes))[: self.way].tolist()
        rows = torch.stack([self.rows(k) for k in chosen])
        x = self.classes.prepare(self.classes.x[rows.flatten()]).unflatten(0, rows.shape)
        y = one_hot(torch.arange(self.way), self.way).float()
        support, query = x[:, : self.shot].flatten(0, 1), x[:, self.shot :].flatten(0, 1)
        labels = [y.repeat_interleave(n, 0) for n in (self.shot, self.query)]
        return support, labels[0], query, labels[1]

    def rows(self, k: int) -> Tensor:
        """Different examples of class `k`: first those for support, then those for queries.

        Where the data has a cut, as Glyphs, each of the two stays on its own side, as in `FewShot`.
        """
        size, cut = self.sizes[k], self.classes.cut
        if cut is None:
            return self.starts[k] + torch.randperm(size)[: self.shot + self.query]
        sides = [torch.randperm(int(cut[k])), int(cut[k]) + torch.randperm(size - int(cut[k]))]
        first = int(torch.rand(()) < 0.5)
        parts = [sides[first][: self.shot], sides[1 - first][: self.query]]
        return self.starts[k] + torch.cat(parts)


def ours(
    classes: Classes, sizes: tuple[int, int, int], device: str, batch: int, record: bool = False
) -> Callable[[], None]:
    """A batch from `FewShot.sample`, with the images on the device; a training on a GPU records it."""
    tasks = FewShot(classes.to(device), *sizes)
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        tasks.sample(batch, generator)

    return Replayed(step, torch.device(device), generator) if record else step


def loader(
    classes: Classes, sizes: tuple[int, int, int], device: str, batch: int, workers: int
) -> Callable[[], None]:
    """The next batch of a `DataLoader`, moved to the device."""
    cuda = device == "cuda"
    batches = iter(
        DataLoader(Episodes(classes, *sizes), batch, num_workers=workers, pin_memory=cuda)
    )

    def step() -> None:
        for tensor in next(batches):
            tensor.to(device, non_blocking=cuda)

    return step


SAMPLERS: dict[str, Callable[..., Callable[[], None]]] = {
    "ours": ours,
    "ours, recorded": partial(ours, record=True),
    "DataLoader": partial(loader, workers=0),
    "DataLoader, 2 workers": partial(loader, workers=2),
    "DataLoader, 8 workers": partial(loader, workers=8),
}
# Batches that the workers of each may have fetched ahead, while others were measured.
AHEAD = {"DataLoader, 2 workers": 4, "DataLoader, 8 workers": 16}
# Only a GPU records, and its machine has the processors for eight workers.
ON_GPU = ("ours, recorded", "DataLoader, 8 workers")


def samplers(device: str) -> list[str]:
    """Who takes part."""
    return [name for name in SAMPLERS if device == "cuda" or name not in ON_GPU]


def make(settings: dict[str, Any]) -> Work:
    """What a worker process runs: one sampler."""
    classes = SOURCES[settings["data"]].load("train")
    sizes = (settings["way"], settings["shot"], settings["query"])
    sampler = SAMPLERS[settings["sampler"]]
    return Work(sampler(classes, sizes, settings["device"], settings["batch"]))


def contest(
    way: int, shot: int, batch: int, device: str, threads: int, rounds: int, data: str
) -> list[dict[str, Any]]:
    """All samplers on tasks of one size, each in its own process, rounds interleaved."""
    size = {"data": data, "way": way, "shot": shot, "query": QUERIES[data], "batch": batch}
    rows = [size | {"sampler": name} for name in samplers(device)]
    times: list[list[float]] = [[] for _ in rows]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(threads, device)) for _ in rows]
        for row, worker in zip(rows, workers, strict=True):
            settings = row | {"device": device}
            attempt(row, worker, "make", maker="bench.sampling:make", settings=settings)
            attempt(row, worker, "first")
        for _ in tqdm(range(rounds), desc=f"sampling {way}-way {shot}-shot, {batch}", leave=False):
            for row, worker, own in zip(rows, workers, times, strict=True):
                sleep(PAUSE)
                ahead = AHEAD.get(row["sampler"], 0)
                own.append(attempt(row, worker, "round", seconds=ROUND, ahead=ahead))
    return [scored(row, own) for row, own in zip(rows, times, strict=True)]


def attempt(row: dict[str, Any], worker: Worker, action: str, **how: Any) -> Any:
    """Ask a worker, unless it has failed; a failure is noted in its row."""
    if "reason" in row:
        return None
    try:
        return worker.ask(action, **how)
    except Failed as failed:
        row["reason"] = str(failed)
        return None


def scored(row: dict[str, Any], times: list[float]) -> dict[str, Any]:
    """A row with episodes and images per second, or as failed."""
    if "reason" in row:
        return row | {"status": "failed"}
    low, median, high = quartiles(times)
    images = row["way"] * (row["shot"] + row["query"])
    row |= {"status": "measured", "median": median, "quartiles": [low, high], "rounds": len(times)}
    return row | {
        "episodes_per_second": row["batch"] / median,
        "images_per_second": row["batch"] * images / median,
    }


def sampling(device: str, threads: int, rounds: int, only: str) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each size of tasks."""
    rows: list[dict[str, Any]] = []
    data = data_here()
    for way, shot, batch in SIZES + (LARGE if device == "cuda" else []):
        if only in f"sampling-{way}way-{shot}shot-{batch}":
            rows += contest(way, shot, batch, device, threads, rounds, data)
            yield rows
