"""What is measured: the cases, and for each case a network, its twin of built-in layers and episodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metabook.classes import Classes
from metabook.episodes import Episode, FewShot, Frozen
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import Conv4
from metabook.prototypes import ProtoNet
from metabook.sources import SOURCES, present

Method = Literal["maml", "first-order", "prototypes"]
QUERIES = {"omniglot": 15, "glyphs": 10}  # a class of Glyphs has ten drawings for queries


@dataclass(frozen=True)
class Case:
    """One meta-gradient: the method, and the sizes that decide what it costs."""

    method: Method = "maml"
    steps: int = 1  # inner steps; of prototypical networks none counts
    way: int = 5
    shot: int = 1
    query: int = 15  # of each class
    tasks: int = 8  # in one outer step
    pool: Literal["max", "stride"] = "max"  # how Conv4 halves the image
    size: int = 28  # height and width of the images
    width: int = 64  # filters of Conv4
    data: str = "omniglot"  # or "glyphs", or "random": Gaussian noise, of any size

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        inner = "" if self.method == "prototypes" else f"-{self.steps}step"
        return f"{self.method}{inner}-{self.way}way-{self.shot}shot-{self.pool}"

    @property
    def rate(self) -> float:
        """The inner rate: 0.4 for one step, 0.01 for several, as in Finn et al. 2017 on Omniglot and mini-ImageNet."""
        return 0.4 if self.steps == 1 else 0.01

    @property
    def out(self) -> int | None:
        """Outputs of the network; prototypical networks compare embeddings."""
        return None if self.method == "prototypes" else self.way


def data_here() -> str:
    """Omniglot where it has been fetched, else the book's own drawings."""
    return "omniglot" if present("omniglot") else "glyphs"


def speed_cases(
    device: str,  # "cpu" or "cuda": a GPU gets more tasks at once
    data: str,  # "omniglot" or "glyphs"
) -> list[Case]:
    """Every method on 5-way 1-shot and 20-way 5-shot tasks, with both ways of pooling; the main case first."""
    methods = [("maml", 1), ("maml", 5), ("first-order", 1), ("prototypes", 1)]
    small, large = ((5, 1, 32), (20, 5, 8)) if device == "cuda" else ((5, 1, 8), (20, 5, 2))
    return [
        Case(method, steps, way, shot, QUERIES[data], tasks, pool, data=data)
        for way, shot, tasks in (small, large)
        for pool in ("max", "stride")
        for method, steps in methods
    ]


class Plain(nn.Module):
    """Conv4 of built-in layers, as people write it; parameters have the names of `metabook.networks.Conv4`."""

    def __init__(self, case: Case):
        super().__init__()
        step, width = (2 if case.pool == "stride" else 1), case.width
        inputs = [1, width, width, width]
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, step, padding=1) for c in inputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for _ in inputs)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2) if case.pool == "max" else nn.Identity()
        self.end = nn.Flatten() if case.pool == "max" else MeanOverSpace()
        features = width * (case.size // 16) ** 2 if case.pool == "max" else width
        self.head = nn.Linear(features, case.out) if case.out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.pool(self.relu(norm(conv(x))))
        return self.head(self.end(x))


class MeanOverSpace(nn.Module):
    """[n, channels, height, width] -> [n, channels]"""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@dataclass(frozen=True)
class Job:
    """A case on a device: the same weights and the same episodes for every contender."""

    case: Case
    device: str = "cpu"
    precision: str = "float32"  # "tf32", "bfloat16"; "float64" is the reference's

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32

    @cached_property
    def conv4(self) -> Conv4:
        """The library's network, with the weights of seed 0."""
        torch.manual_seed(0)
        case = self.case
        net = Conv4(1, case.out, case.size, case.width, case.pool, stats="batch")
        return net.to(self.device, self.dtype)

    @cached_property
    def plain(self) -> Plain:
        """The same network of built-in layers, with the same weights."""
        net = Plain(self.case).to(self.device, self.dtype)
        net.load_state_dict(self.conv4.state_dict())
        return net

    @cached_property
    def learner(self) -> Learner:
        """The library's learner around its network."""
        case = self.case
        if case.method == "prototypes":
            return ProtoNet(self.conv4)
        first_order = case.method == "first-order"
        return MAML(self.conv4, lr=case.rate, steps=case.steps, first_order=first_order)

    @cached_property
    def episodes(self) -> Episode:
        """The episodes of seed 0, on the device."""
        frozen = episodes_of(self.case)
        return next(frozen.episodes(self.case.tasks)).to(self.device, self.dtype)


def episodes_of(case: Case) -> Frozen:
    """The episodes of a case, frozen: `hash` names them."""
    images = noise(case) if case.data == "random" else SOURCES[case.data].load("train")
    return FewShot(images, case.way, case.shot, case.query).freeze(case.tasks, seed=0)


def noise(case: Case) -> Classes:
    """Gaussian images of the case's size: what a step costs does not depend on what they show."""
    each, generator = case.shot + case.query, torch.Generator().manual_seed(0)
    x = torch.randn(case.way * each, 1, case.size, case.size, generator=generator)
    return Classes(x, torch.full((case.way,), each))


def job_of(settings: dict[str, Any]) -> Job:
    """A job from JSON values."""
    return Job(Case(**settings["case"]), settings["device"], settings["precision"])
