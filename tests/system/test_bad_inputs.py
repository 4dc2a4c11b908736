"""Bad input is refused where it enters, by an error that helps.

Each row of the tables does one wrong thing.  The error has to be of the right type, and its message has to
name the argument and the value, and to say what was expected and what to do.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pytest
import torch
from samples import learner_on
from test_bad_data import huge, png, read_all, tarred, zipped
from torch import nn

from metabook import datasets, processes, recipes, registry, reproduction, saving, sources
from metabook.checks import check_every_class
from metabook.classes import Classes
from metabook.cli import main
from metabook.closed_form import RidgeHead
from metabook.datasets import DataError
from metabook.engine import gradients
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, VariedWayShot
from metabook.explore import Explore
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.matching import MatchingNet
from metabook.meta_gradients import ANIL, ImplicitMAML, Reptile
from metabook.meta_lstm import LSTMOptimizer, MetaLSTM
from metabook.meta_transfer import HardTasks, MetaTransfer
from metabook.networks import MLP, BatchNorm, Conv4, ResNet12
from metabook.pgn import PGN
from metabook.prototypes import ProtoNet
from metabook.registry import NETWORKS, methods
from metabook.relation import RelationNet
from metabook.saving import save
from metabook.scores import calibration, evaluate, paired
from metabook.step_sizes import MAMLpp, MetaSGD
from metabook.testing import check_learner
from metabook.training import fit
from metabook.transfer import Batches, FineTune, Pretrained


class Row(NamedTuple):
    """Something wrong, and what is said of it."""

    do: Callable[[Path], Any]  # it is given an empty folder
    error: type[Exception]
    argument: str
    value: str
    expected: str
    remedy: str


@pytest.fixture(autouse=True)
def as_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types in signatures are checked in tests only: here nobody but the library looks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def says(message: str, row: Row | Line) -> None:
    """Hold a message against its row."""
    for what in ("argument", "value", "expected", "remedy"):
        assert getattr(row, what) in message, f"does not name the {what}: {message}"


# --- episodes

X, LABELS = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
AT_LEAST_1, FROM_0 = "expected an integer of at least 1", "number the classes of a task from 0"


def data(**more: Any) -> Classes:
    """Six classes of six points."""
    return Classes.of({name: torch.zeros(6, 2) for name in "abcdef"}, **more)


def of(labels: list, x: torch.Tensor = X[:, :1], way: Any = 2) -> Callable[[Path], Any]:
    return lambda _: Examples.of(x[: len(labels)], torch.tensor(labels), way)


def spoilt(value: float) -> torch.Tensor:
    x = torch.zeros(3, 2)
    x[2, 1] = value
    return x


def pixels(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


ONE_EACH = "every example needs exactly one label"
NOT_FINITE = ("expected finite numbers", "repair that example, or leave it out")
EPISODES = {
    "labels too large": Row(
        of([0, 1, 2]), ValueError, "labels", "from 0 to 2", "way=2 allows 0 to 1", FROM_0
    ),
    "labels that start at 1": Row(
        of([1, 2]), ValueError, "labels", "from 1 to 2", "way=2 allows 0 to 1", FROM_0
    ),
    "negative labels": Row(
        of([0, 1, -1]), ValueError, "labels", "from -1 to 1", "way=2 allows 0 to 1", FROM_0
    ),
    "too few labels": Row(
        lambda _: Examples.of(X, LABELS[:3], 2),
        *(ValueError, "labels", "shape (3,) and x (4, 3)", ONE_EACH, "give class indices [n]"),
    ),
    "rows in place of labels": Row(
        lambda _: Examples.of(X, torch.eye(4).long(), 4),
        *(ValueError, "labels", "shape (4, 4)", ONE_EACH, "give class indices [n]"),
    ),
    "a label for all": Row(
        lambda _: Examples.of(X, torch.tensor(1), 2),
        *(ValueError, "labels", "shape ()", ONE_EACH, "give class indices [n]"),
    ),
    "labels with a point": Row(
        of([0.0, 0.5]), ValueError, "labels", "torch.float32", "expected integers", "labels.long()"
    ),
    "a list of labels": Row(
        lambda _: Examples.of(X, [0, 0, 1, 1], 2),
        *(TypeError, "labels", "list", "expected a tensor", "torch.as_tensor"),
    ),
    "an array of examples": Row(
        lambda _: Examples.of(np.zeros((4, 3)), LABELS, 2),
        *(TypeError, "x is", "ndarray", "expected a tensor", "torch.as_tensor"),
    ),
    "labels on another device": Row(
        lambda _: Examples.of(X, LABELS.to("meta"), 2),
        *(ValueError, "labels", "meta", "expected cpu", "labels.to(x.device)"),
    ),
    "no classes": Row(of([0], way=0), ValueError, "way", "=0", AT_LEAST_1, "way=1"),
    "a way with a point": Row(of([0], way=2.0), ValueError, "way", "=2.0", AT_LEAST_1, "way=1"),
    "a NaN pixel": Row(of([0, 1, 1], spoilt(math.nan)), ValueError, "x[2, 1]", "nan", *NOT_FINITE),
    "an infinite pixel": Row(
        of([0, 1, 1], spoilt(-math.inf)), ValueError, "x[2, 1]", "-inf", *NOT_FINITE
    ),
    "more ways than classes": Row(
        lambda _: FewShot(data(), way=7),
        *(ValueError, "way", "=7", "the data has 6 classes", "lower way or bring more classes"),
    ),
    "more shots than examples": Row(
        lambda _: FewShot(data(), shot=6, query=1),
        *(ValueError, "shot", "=6", "need 7 (shot + query)", "lower them, or leave the class out"),
    ),
    "more queries than examples": Row(
        lambda _: FewShot(data(), query=15),
        *(ValueError, "query", "=15", "need 16 (shot + query)", "lower them, or leave the class"),
    ),
    "more shots than a side of the cut": Row(
        lambda _: FewShot(Classes(X, LABELS[2:] + 1, cut=LABELS[2:]), way=2, shot=2, query=1),
        *(ValueError, "shot", "=2", "need 2 on each side of its cut", "lower them, or leave the"),
    ),
    "no shots": Row(
        lambda _: FewShot(data(), shot=0), ValueError, "shot", "=0", AT_LEAST_1, "shot=1"
    ),
    "fewer queries than none": Row(
        lambda _: FewShot(data(), query=-1), ValueError, "query", "=-1", AT_LEAST_1, "query=1"
    ),
    "the name of data for data": Row(
        lambda _: FewShot("glyphs"),
        *(TypeError, "classes", "'glyphs'", "expected `Classes`", 'Glyphs("train")'),
    ),
    "a tensor for data": Row(
        lambda _: Batches(X), TypeError, "classes", "tensor(", "expected `Classes`", "Classes.of"
    ),
    "no tasks": Row(
        lambda _: FewShot(data(), query=5).sample(0), *(ValueError, "n", "=0", AT_LEAST_1, "n=1")
    ),
    "one number for a range": Row(
        lambda _: VariedWayShot(data(), way=5),
        *(ValueError, "way", "=5", "expected (smallest, largest)", "such as (2, 5)"),
    ),
    "a range upside down": Row(
        lambda _: VariedWayShot(data(), way=(2, 3), shot=(3, 2)),
        *(ValueError, "shot", "=(3, 2)", "expected (smallest, largest)", "such as (2, 5)"),
    ),
    "a range beyond the classes": Row(
        lambda _: VariedWayShot(data(), way=(2, 9), query=1),
        *(ValueError, "way", "=9", "the data has 6 classes", "lower way or bring more classes"),
    ),
    "a range from nothing": Row(
        lambda _: VariedWayShot(data(), way=(2, 3), shot=(0, 2)),
        *(ValueError, "shot[0]", "=0", AT_LEAST_1, "shot[0]=1"),
    ),
    "a range that ends between numbers": Row(
        lambda _: VariedWayShot(data(), way=(2, 3.5)),
        *(ValueError, "way[1]", "=3.5", AT_LEAST_1, "way[1]=1"),
    ),
    "waves without points": Row(
        lambda _: Sinusoids(shot=0), ValueError, "shot", "=0", AT_LEAST_1, "shot=1"
    ),
    "a word for a number": Row(
        lambda _: Sinusoids(query="ten"), ValueError, "query", "='ten'", AT_LEAST_1, "query=1"
    ),
    "no frozen tasks": Row(
        lambda _: Sinusoids().freeze(0), ValueError, "n", "=0", AT_LEAST_1, "n=1"
    ),
    "frozen tasks, none at a time": Row(
        lambda _: next(Sinusoids().freeze(2).episodes(0)),
        *(ValueError, "batch", "=0", AT_LEAST_1, "batch=1"),
    ),
    "sizes of other data": Row(
        lambda _: Classes(X, torch.tensor([5])),
        *(ValueError, "sizes", "add up to 5", "x holds 4 examples", "count the examples"),
    ),
    "a class without examples": Row(
        lambda _: Classes.of({"cat": X, "dog": X[:0]}),
        *(ValueError, "class 'dog'", "no examples", "expected one at least", "leave it out"),
    ),
    "data without classes": Row(
        lambda _: Classes.of({}),
        *(ValueError, "examples", "empty", "expected at least one class", "name: tensor"),
    ),
    "too few names": Row(
        lambda _: Classes(X, LABELS[2:] + 1, names=["cat"]),
        *(ValueError, "names", "1 names", "2 classes", "give one for each class"),
    ),
    "too few cuts": Row(
        lambda _: Classes(X, LABELS[2:] + 1, cut=LABELS[2:3]),
        *(ValueError, "cut", "1 cut", "2 classes", "give one for each class"),
    ),
    "bytes that are no images": Row(
        lambda _: Classes.of({"cat": pixels(3, 2)}),
        *(
            ValueError,
            "bytes of shape",
            "(3, 2)",
            "[n, channels, height, width]",
            "comes as floats",
        ),
    ),
    "a mean for other channels": Row(
        lambda _: Classes.of({"cat": pixels(1, 3, 2, 2)}, mean=(0.5, 0.5)),
        *(ValueError, "mean", "=(0.5, 0.5)", "images of 3 channels", "one for each channel"),
    ),
    "a mean that is no tuple": Row(
        lambda _: Classes.of({"cat": pixels(1, 1, 2, 2)}, mean=0.5),
        *(ValueError, "mean", "=0.5", "images of 1 channels", "give a tuple of one number"),
    ),
    "no deviation": Row(
        lambda _: Classes.of({"cat": pixels(1, 1, 2, 2)}, std=(0.0,)),
        *(ValueError, "std", "=(0.0,)", "expected positive numbers", "give 1.0"),
    ),
    "NaN in the data": Row(
        lambda _: Classes.of({"cat": X[:, :2], "dog": spoilt(math.nan)}),
        *(ValueError, "x[6, 1]", "nan", *NOT_FINITE),
    ),
    "infinity in the data": Row(
        lambda _: Classes(spoilt(math.inf), torch.tensor([3])),
        *(ValueError, "x[2, 1]", "inf", *NOT_FINITE),
    ),
    "a list for the data": Row(
        lambda _: Classes([[0.0]], torch.tensor([1])),
        *(TypeError, "x is", "list", "expected a tensor", "torch.as_tensor"),
    ),
    "a list of sizes": Row(
        lambda _: Classes(X, [2, 2]),
        *(TypeError, "sizes", "list", "expected a tensor", "torch.as_tensor"),
    ),
    "an array for a class": Row(
        lambda _: Classes.of({"cat": X, "dog": np.zeros((4, 3))}),
        *(TypeError, "examples['dog']", "ndarray", "expected a tensor", "torch.as_tensor"),
    ),
    "classes of different shapes": Row(
        lambda _: Classes.of({"cat": X, "dog": X[:, :2]}),
        *(ValueError, "examples['dog']", "(2,)", "expected torch.float32 (3,)", "resize one"),
    ),
    "classes of different types": Row(
        lambda _: Classes.of({"cat": X, "dog": X.byte()}),
        *(ValueError, "examples['dog']", "torch.uint8", "expected torch.float32", "convert"),
    ),
    "classes that are not there": Row(
        lambda _: data().select([0, 9]),
        *(ValueError, "classes", "[0, 9]", "the data has 6 classes", "by numbers from 0 to 5"),
    ),
    "none of the classes": Row(
        lambda _: data().select([]),
        *(ValueError, "classes", "=[]", "select at least one", "by numbers from 0 to 5"),
    ),
}

# --- every learner

WAY = 3
Y = torch.eye(WAY).repeat(2, 1)  # [6, way]
INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
META = INPUTS.to("meta")


def learner(name: str) -> Learner:
    """A method on a small network."""
    torch.manual_seed(0)
    return learner_on(name, MLP([4, 8, WAY]), WAY)


def asked(
    x: Any = INPUTS, y: Any = Y, query: Any = INPUTS, support: Any = None
) -> Callable[[str], Callable[[Path], Any]]:
    """Ask a method of some name about these examples."""
    return lambda name: lambda _: learner(name)(support or Examples(x, y), query)


def predicting(name: str) -> Callable[[Path], Any]:
    def predict(_: Path) -> Any:
        made = learner(name)
        return made.predict(made.adapt(Examples(INPUTS, Y)), torch.zeros(2, 5))

    return predict


def on_a_word(name: str) -> Callable[[Path], Any]:
    return lambda _: learner_on(name, "conv4", WAY)


def first_argument(name: str) -> str:
    return next(iter(inspect.signature(methods()[name]).parameters))


# What is wrong with the examples, and what every method says of it.
MISFITS: dict[
    str, tuple[Callable[[str], Callable[[Path], Any]], type[Exception], str, str, str, str]
] = {
    "class numbers": (
        asked(y=Y.argmax(-1)),
        *(ValueError, "support.y", "torch.int64", "floats [n, way]", "Examples.of(x, labels, way)"),
    ),
    "a row is missing": (
        asked(y=Y[:5]),
        *(ValueError, "support.y", "(5, 3)", "its own row in y", "makes one for each label"),
    ),
    "other queries": (
        asked(query=torch.zeros(2, 5)),
        *(ValueError, "queries", "(5,)", "both need the same", "resize or reshape one of them"),
    ),
    "bytes": (
        asked(INPUTS.byte(), query=INPUTS.byte()),
        *(ValueError, "support.x", "torch.uint8", "expected floats", "Classes.prepare"),
    ),
    "whole numbers": (
        asked(INPUTS.long(), query=INPUTS.long()),
        *(ValueError, "inputs", "torch.int64", "expected floats", "x.float()"),
    ),
    "double precision": (
        asked(INPUTS.double(), query=INPUTS.double()),
        *(
            ValueError,
            "support.x",
            "torch.float64",
            "the learner torch.float32",
            "move one of them",
        ),
    ),
    "queries in half precision": (
        asked(query=INPUTS.half()),
        *(ValueError, "query", "torch.float16", "the learner torch.float32", "move one of them"),
    ),
    "another device": (
        asked(META, Y.to("meta"), META),
        *(ValueError, "support.x", "meta", "torch.float32 on cpu", "move one of them"),
    ),
    "queries on another device": (
        asked(query=META),
        *(ValueError, "query", "meta", "torch.float32 on cpu", "move one of them"),
    ),
    "targets on another device": (
        asked(y=Y.to("meta")),
        *(ValueError, "support.y", "meta", "expected cpu", "episode.to(device)"),
    ),
    "one class": (
        asked(y=Y[:, :1]),
        *(ValueError, "support.y", "(6, 1)", "at least two classes", "show more"),
    ),
    "a pair": (
        asked(support=(INPUTS, Y)),
        *(TypeError, "support", "tuple", "expected Examples", "Examples.of(x, labels, way)"),
    ),
    "arrays": (
        asked(INPUTS.numpy()),
        *(TypeError, "support.x", "ndarray", "expected a tensor", "torch.as_tensor"),
    ),
    "features of another network": (
        asked(torch.zeros(6, 5), query=torch.zeros(2, 5)),
        *(ValueError, "inputs", "(6, 5)", "expected [n, 4]", "to fit the data"),
    ),
    "features that predict does not know": (
        predicting,
        *(ValueError, "inputs", "(2, 5)", "expected [n, 4]", "set sizes[0] to fit the data"),
    ),
}
EMPTY = Examples(INPUTS[:0], Y[:0])


def misfits() -> dict[str, Row]:
    """Each misfit for each method, and what not all methods say alike."""
    rows = {}
    for name, method in methods().items():
        if not method.__module__.startswith("metabook."):
            continue
        for what, (ask, *said) in MISFITS.items():
            rows[f"{name}: {what}"] = Row(ask(name), *said)
        argument = first_argument(name)
        said = TypeError, argument, "'conv4'", "expected a network", "build one, such as"
        rows[f"{name}: a word for a network"] = Row(on_a_word(name), *said)
        said = ValueError, "support", "is empty", "at least one example", "give"
        if not method.needs_support:
            said = ValueError, "way is 3", "empty", "0 of this learner", "classes=3 to pre-train"
        rows[f"{name}: an empty support set"] = Row(asked(support=EMPTY)(name), *said)
        if method.head:
            four = Examples(INPUTS[:4], torch.eye(4))
            said = ValueError, "task's way", "is 4", "network gives 3", "build the network with 4"
            rows[f"{name}: another way"] = Row(asked(support=four)(name), *said)
    return rows


# --- what single methods and networks do not take

FEATURES = MLP([4, 8])
RATE, WHOLE = "expected a positive inner rate", "expected at least 0 whole steps"


def told(info: dict[str, torch.Tensor]) -> Callable[[Path], Any]:
    """A method that wants to be told about its task."""
    made = PGN(MLP([4, WAY]), description="task", task_size=2)
    return lambda _: made(Examples(INPUTS, Y, info), INPUTS)


METHODS = {
    "adapting to nothing": Row(
        lambda _: learner("maml").adapt(EMPTY),
        *(ValueError, "targets", "(0, 3)", "expected at least one", "give examples"),
    ),
    "prototypes of nothing": Row(
        lambda _: learner("protonet").adapt(EMPTY),
        *(ValueError, "support set", "empty", "every class at least one example", "give"),
    ),
    "one class of three": Row(
        lambda _: check_every_class(Examples.of(INPUTS, torch.zeros(6).long(), 3)),
        *(ValueError, "support example of class", "1", "one at least of each of the 3", "show one"),
    ),
    "no inner rate": Row(lambda _: MAML(FEATURES, lr=0), ValueError, "lr", "=0", RATE, "lr=0.01"),
    "an inner rate that is no number": Row(
        lambda _: MetaTransfer(FEATURES, lr=math.nan), ValueError, "lr", "=nan", RATE, "lr=0.01"
    ),
    "an inner rate in words": Row(
        lambda _: FineTune(FEATURES, lr="fast"), ValueError, "lr", "='fast'", RATE, "lr=0.01"
    ),
    "fewer steps than none": Row(
        lambda _: LSTMOptimizer(FEATURES, steps=-1), ValueError, "steps", "=-1", WHOLE, "steps=0"
    ),
    "half a step": Row(
        lambda _: MAML(FEATURES, test_steps=1.5),
        *(ValueError, "test_steps", "=1.5", WHOLE, "test_steps=0"),
    ),
    "an unknown kind": Row(
        lambda _: PGN(FEATURES, kind="regresion"),
        *(ValueError, "kind", "'regresion'", "classification, regression", "mean 'regression'"),
    ),
    "a gate of one": Row(
        lambda _: MetaLSTM(FEATURES, lr=1.0),
        *(ValueError, "lr", "=1.0", "between 0 and 1", "take one such as 0.1"),
    ),
    "no memory": Row(
        lambda _: MetaLSTM(FEATURES, hidden=0), ValueError, "hidden", "=0", AT_LEAST_1, "hidden=1"
    ),
    "rates of what has no size yet": Row(
        lambda _: MetaSGD(nn.LazyLinear(1)),
        *(ValueError, "weight", "no size yet", "each of its entries needs a rate", "net(x)"),
    ),
    "rates for no step": Row(
        lambda _: MAMLpp(FEATURES, steps=0), ValueError, "steps", "=0", AT_LEAST_1, "steps=1"
    ),
    "more than the whole training": Row(
        lambda _: MAMLpp(FEATURES, multi_step=15),
        *(ValueError, "multi_step", "=15", "a share from 0 to 1", "multi_step=0.5"),
    ),
    "an unknown distance": Row(
        lambda _: ProtoNet(FEATURES, distance="cosin"),
        *(ValueError, "distance", "'cosin'", "known are cosine, plain", "did you mean 'cosine'"),
    ),
    "an unknown head": Row(
        lambda _: Pretrained(FEATURES, logits="liner"),
        *(ValueError, "logits", "'liner'", "known are cosine, linear", "did you mean 'linear'"),
    ),
    "no base classes": Row(
        lambda _: Pretrained(FEATURES, classes=0),
        *(ValueError, "classes", "=0", AT_LEAST_1, "classes=1"),
    ),
    "an embedding of unknown length": Row(
        lambda _: Pretrained(nn.Linear(4, 2), classes=5),
        *(ValueError, "features", "Linear", "how long its embeddings are", "set its attribute"),
    ),
    "pre-training without a support set to normalise by": Row(
        lambda _: Pretrained(Conv4(size=16, stats="support"), classes=5),
        *(
            ValueError,
            "stats",
            '"support"',
            "pre-training has none",
            'build it with stats="running"',
        ),
    ),
    "nothing to scale": Row(
        lambda _: MetaTransfer(nn.Identity()),
        *(ValueError, "net", "Identity", "no convolution and no linear layer", "give a network"),
    ),
    "a head for another way": Row(
        lambda _: MetaTransfer(FEATURES, way=5)(Examples(INPUTS, Y), INPUTS),
        *(ValueError, "way", "way is 3", "built for way=5", "build it with way=3"),
    ),
    "a layer to adapt that is not there": Row(
        lambda _: ANIL(FEATURES, adapts="hed"),
        *(ValueError, "adapts", "='hed'", "expected layers or parameters among", "leave it out"),
    ),
    "nothing to adapt": Row(
        lambda _: ANIL(FEATURES, adapts=[]),
        *(ValueError, "adapts", "=[]", "expected layers or parameters among", "leave it out"),
    ),
    "more minibatches than examples": Row(
        lambda _: Reptile(FEATURES, batches=40).loss(Episode(*[Examples(INPUTS, Y)] * 2)),
        *(ValueError, "batches", "=40", "expected at most as many", "lower batches"),
    ),
    "no minibatch": Row(
        lambda _: Reptile(FEATURES, batches=0), ValueError, "batches", "=0", AT_LEAST_1, "batches=1"
    ),
    "no penalty": Row(
        lambda _: ImplicitMAML(FEATURES, penalty=0),
        *(ValueError, "penalty", "=0", "expected a positive number", "penalty=1.0"),
    ),
    "no step of the solver": Row(
        lambda _: ImplicitMAML(FEATURES, solver_steps=0),
        *(ValueError, "solver_steps", "=0", AT_LEAST_1, "solver_steps=1"),
    ),
    "an unknown form": Row(
        lambda _: PGN(FEATURES, form="filme"),
        *(ValueError, "form", "'filme'", "known are chunks, film", "did you mean 'film'"),
    ),
    "a negative gain": Row(
        lambda _: PGN(FEATURES, gain=-1.0),
        *(ValueError, "gain", "=-1.0", "finite number of at least 0", "gain=0.1"),
    ),
    "nothing to write": Row(
        lambda _: PGN(nn.Flatten()),
        *(ValueError, "net", "Flatten", "expected at least one to write", "give a network"),
    ),
    "colour for a generator of grey": Row(
        lambda _: PGN(Conv4(out=WAY, size=16))(
            Examples(torch.zeros(6, 3, 16, 16), Y), torch.zeros(1, 3, 16, 16)
        ),
        *(
            ValueError,
            "inputs",
            "(6, 3, 16, 16)",
            "expected [n, 1, height, width]",
            "build it to fit",
        ),
    ),
    "a description that is not there": Row(
        told({}),
        *(ValueError, 'info["task"]', "no such entry", "a tensor of shape (2,)", "give the"),
    ),
    "a description of another length": Row(
        told({"task": torch.zeros(3)}),
        *(ValueError, 'info["task"]', "found shape (3,)", "a tensor of shape (2,)", "give the"),
    ),
    "hard tasks of varied way": Row(
        lambda _: HardTasks(VariedWayShot(data(), (2, 3), (1, 2), 2)),
        *(
            ValueError,
            "HardTasks",
            "not VariedWayShot",
            "a FewShot with a fixed way",
            "give it one",
        ),
    ),
    "hard tasks that stay": Row(
        lambda _: HardTasks(FewShot(data(), 2, 1, 2)).freeze(3),
        *(
            ValueError,
            "HardTasks(",
            "cannot be frozen",
            "hard tasks are for training",
            "freeze Few",
        ),
    ),
    "layers without an end": Row(
        lambda _: MLP([3]),
        *(ValueError, "sizes", "=[3]", "the number of inputs and of outputs", "as in [784, 64, 5]"),
    ),
    "one size": Row(
        lambda _: MLP(784),
        *(ValueError, "sizes", "=784", "the number of inputs and of outputs", "as in [784, 64, 5]"),
    ),
    "a layer of nothing": Row(
        lambda _: MLP([4, 0, 2]), ValueError, "sizes[1]", "=0", AT_LEAST_1, "sizes[1]=1"
    ),
    "an unknown pool": Row(
        lambda _: Conv4(pool="maxx"),
        *(ValueError, "pool", "'maxx'", "known are max, stride", "did you mean 'max'"),
    ),
    "unknown statistics": Row(
        lambda _: Conv4(stats="bach"),
        *(
            ValueError,
            "stats",
            "'bach'",
            "known are batch, running, support",
            "did you mean 'batch'",
        ),
    ),
    "images too small to pool": Row(
        lambda _: Conv4(size=8),
        *(ValueError, "size", "=8", "at least 16 pixels", 'or pool="stride"'),
    ),
    "colour for a network of grey": Row(
        lambda _: Conv4()(torch.zeros(2, 3, 28, 28)),
        *(ValueError, "images", "(2, 3, 28, 28)", "[n, 1, 28, 28]", "build it with the data's"),
    ),
    "bytes for a network": Row(
        lambda _: ResNet12()(pixels(1, 3, 16, 16)),
        *(ValueError, "inputs", "torch.uint8", "expected floats", "Classes.prepare"),
    ),
    "three blocks": Row(
        lambda _: ResNet12(widths=[8, 8, 8]),
        *(ValueError, "widths", "=[8, 8, 8]", "expected four numbers", "such as [64, 160"),
    ),
    "channels of another layer": Row(
        lambda _: BatchNorm(3)(torch.zeros(2, 4)),
        *(ValueError, "batch", "(2, 4)", "of 3 channels", "expected [n, 3, ...]"),
    ),
    "statistics of nothing": Row(
        lambda _: BatchNorm(3)(torch.zeros(0, 3)),
        *(ValueError, "batch", "(0, 3)", "it has no statistics", "bring examples"),
    ),
    "a penalty of nothing": Row(
        lambda _: RidgeHead(FEATURES, penalty=0.0),
        *(ValueError, "penalty", "=0.0", "expected a positive number", "penalty=1.0"),
    ),
    "logits turned round": Row(
        lambda _: RidgeHead(FEATURES, scale=-1.0),
        *(ValueError, "scale", "=-1.0", "expected a positive number", "scale=1.0"),
    ),
    "a head of an unknown kind": Row(
        lambda _: RidgeHead(FEATURES, kind="regresion"),
        *(ValueError, "kind", "'regresion'", "classification, regression", "mean 'regression'"),
    ),
    "a network in words": Row(
        lambda _: RidgeHead("conv4"), TypeError, "embed", "conv4", "a network", "embed=Conv4"
    ),
    "a scale that hears nobody": Row(
        lambda _: MatchingNet(FEATURES, scale=0.0),
        *(ValueError, "scale", "=0.0", "expected a positive number", "scale=1.0"),
    ),
    "a query that never reads": Row(
        lambda _: MatchingNet(FEATURES, context=True, reads=0),
        *(ValueError, "reads", "=0", AT_LEAST_1, "reads=1"),
    ),
    "a distance that matching does not know": Row(
        lambda _: MatchingNet(FEATURES, distance="cos"),
        *(ValueError, "distance", "'cos'", "known are cosine, plain", "did you mean 'cosine'"),
    ),
    "context for embeddings of unknown length": Row(
        lambda _: MatchingNet(nn.Flatten(), context=True),
        *(
            ValueError,
            "context=False",
            "Flatten",
            "how long its embeddings are",
            "its attribute features",
        ),
    ),
}

# --- data sets and folders of images


def images(at: Path, name: str | bytes = "1.png", content: bytes | None = None) -> Path:
    """A folder with a class of one good image, and another of whatever it is."""
    folder = at / "images"
    (folder / "good").mkdir(parents=True)
    (folder / "good" / "0.png").write_bytes(png())
    (folder / "good" / os.fsdecode(name)).write_bytes(png() if content is None else content)
    return folder


def reads(name: str | bytes = "1.png", content: bytes | None = None) -> Callable[[Path], Any]:
    return lambda at: datasets.from_folder(images(at, name, content), size=8)


def linked(at: Path) -> Any:
    (at / "secret.png").write_bytes(png())
    folder = images(at)
    (folder / "good" / "link.png").symlink_to(at / "secret.png")
    return datasets.from_folder(folder, size=8)


def classes_named(name: bytes, at: Path) -> Any:
    folder = images(at)
    (folder / os.fsdecode(name)).mkdir()
    return datasets.from_folder(folder, size=8)


def archive(content: bytes, name: str = "a.zip") -> Callable[[Path], Any]:
    def read(at: Path) -> Any:
        (at / name).write_bytes(content)
        return read_all(at / name)

    return read


REPAIR, DO_NOT = "Repair them or take them away", "Do not use it"
UNREADABLE = "1 of 2 images"
DATA = {
    "an unknown split": Row(
        lambda _: datasets.Glyphs("tset"),
        *(ValueError, "split", "'tset'", "known are test, train, val", "did you mean 'test'"),
    ),
    "an unknown protocol": Row(
        lambda _: datasets.Omniglot("test", protocol="alphabets"),
        *(ValueError, "protocol", "'alphabets'", "alphabet, random", "did you mean 'alphabet'"),
    ),
    "pictures of no size": Row(
        lambda _: datasets.Omniglot("test", size=0), ValueError, "size", "=0", AT_LEAST_1, "size=1"
    ),
    "a split of CIFAR-FS": Row(
        lambda _: datasets.CIFARFS("vall"),
        *(ValueError, "split", "'vall'", "known are test, train, val", "did you mean 'val'"),
    ),
    "a split of mini-ImageNet": Row(
        lambda _: datasets.MiniImageNet("trains"),
        *(ValueError, "split", "'trains'", "known are test, train, val", "did you mean 'train'"),
    ),
    "pictures that are not here": Row(
        lambda at: datasets.MiniImageNet("val", root=at),
        *(
            DataError,
            "miniimagenet",
            "cannot be fetched",
            "may not be handed on",
            "Put images, train",
        ),
    ),
    "an unknown data set": Row(
        lambda _: sources.check("omniglott"),
        *(ValueError, "data set", "'omniglott'", "known are cifarfs", "did you mean 'omniglot'"),
    ),
    "a folder that is not there": Row(
        lambda at: datasets.from_folder(at / "gone"),
        *(DataError, "gone", "is no folder", "a folder of images per class", "give one"),
    ),
    "a file for a folder": Row(
        lambda at: ((at / "file").write_bytes(png()), datasets.from_folder(at / "file")),
        *(DataError, "file", "is no folder", "a folder of images per class", "give one"),
    ),
    "a folder without folders": Row(
        lambda at: datasets.from_folder(at),
        *(DataError, "test_", "holds no folders", "the images of each class", "put"),
    ),
    "a folder without images": Row(
        lambda at: ((at / "cats").mkdir(), datasets.from_folder(at)),
        *(DataError, "1 of 1 classes", "cats", "have no image directly", "Add images or take"),
    ),
    "images of no size": Row(
        lambda at: datasets.from_folder(at, size=0), ValueError, "size", "=0", AT_LEAST_1, "size=1"
    ),
    "images of four channels": Row(
        lambda at: datasets.from_folder(at, channels=4),
        *(ValueError, "channels", "=4", "expected 3 (colour) or 1 (grey)", "take either"),
    ),
    "an image of zero bytes": Row(
        reads(content=b""), DataError, UNREADABLE, "1.png", "cannot identify image file", REPAIR
    ),
    "an image cut short": Row(
        reads(content=png((64, 64))[:5000]), DataError, UNREADABLE, "1.png", "truncated", REPAIR
    ),
    "a text named as an image": Row(
        reads("text.png", b"a text"), DataError, UNREADABLE, "text.png", "cannot identify", REPAIR
    ),
    "an image that unpacks to too much": Row(
        reads(content=huge()), DataError, UNREADABLE, "1.png", "decompression bomb", REPAIR
    ),
    "a link out of the folder": Row(
        linked, DataError, "1 of 3 images", "link.png", "a link that leaves the folder", REPAIR
    ),
    "a bad image whose name is no text": Row(
        reads(b"\xff\xfe.png", b""),
        DataError,
        UNREADABLE,
        r"\xff\xfe.png",
        "cannot identify",
        REPAIR,
    ),
    "a class whose name is no text": Row(
        lambda at: classes_named(b"caf\xe9", at),
        *(DataError, "1 of 2 classes", r"caf\xe9", "not UTF-8", "Rename the folder"),
    ),
    "a zip that climbs": Row(
        archive(zipped("../evil")),
        DataError,
        "a.zip",
        "'../evil'",
        "would leave the folder",
        DO_NOT,
    ),
    "a tar with an absolute path": Row(
        archive(tarred("/etc/evil"), "a.tar.gz"),
        *(DataError, "a.tar.gz", "'/etc/evil'", "would leave the folder", DO_NOT),
    ),
    "a zip bomb": Row(
        archive(zipped("big", content=bytes(3 << 20))),
        *(DataError, "a.zip", "'big'", "unpacks to more than 2,097,152 bytes", DO_NOT),
    ),
    "a zip cut short": Row(
        archive(zipped("a", "b")[:-40]),
        *(DataError, "a.zip", "is damaged or cut short", "not a zip file", "Delete it"),
    ),
}

# --- training, scores, trained folders, recipes, figures


def small(kind: str = "regression") -> Learner:
    return MAML(MLP([1, 4, 1]) if kind == "regression" else MLP([2, 4, 2]), lr=0.01, kind=kind)


def fitting(
    made: Callable[[], Learner] = small, tasks: Any = None, **how: Any
) -> Callable[[Path], Any]:
    """Train for a step, unless the arguments say otherwise."""
    given = {"steps": 1, "meta_batch": 2, "progress": False} | how
    return lambda _: fit(made(), Sinusoids() if tasks is None else tasks, **given)


def scoring(
    made: Callable[[], Learner] = small, tasks: Any = None, **how: Any
) -> Callable[[Path], Any]:
    return lambda _: evaluate(made(), Sinusoids() if tasks is None else tasks, **({"n": 2} | how))


def in_a_used_folder(at: Path) -> Any:
    (at / "log.jsonl").touch()
    return fitting(folder=at)(at)


def loaded(spoil: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Load a folder of which something was spoilt."""

    def load(at: Path) -> Any:
        save(at, small())
        spoil(at)
        return saving.load(at)

    return load


def newer(at: Path) -> None:
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"layout": 99}))


def damaged(at: Path) -> None:
    with open(at / "learner.safetensors", "r+b") as file:
        file.truncate(99)


class Stray(Learner):
    """A method that nobody registered."""


def drawn(**grids: Any) -> Callable[[Path], Any]:
    return lambda _: Explore(lambda a: None, alt="nothing", **grids).frames()


def split_up(*names: str) -> Callable[[Path], Any]:
    """Take a folder with these folders for data."""

    def name(at: Path) -> Any:
        for part in names:
            (at / part).mkdir(parents=True)
        return recipes.data_named(str(at))

    return name


def from_recipe(**changes: Any) -> Callable[[Path], Any]:
    recipe = recipes.Recipe("mlp", **changes)
    return lambda _: recipes.make_learner("maml", recipe, FewShot(data(), 2, 1, 2))


def trained_on_more(at: Path) -> Any:
    recipe, task = recipes.Recipe(steps=1, way=7), {"data": "glyphs", "way": 5, "shot": 1}
    return recipes.run_recipe("maml", recipe, task, torch.device("cpu"), 0, at / "run")


def into_a_file(at: Path) -> Any:
    (at / "file").touch()
    task = {"data": "sinusoids", "way": 5, "shot": 5}
    return recipes.run_recipe("maml", recipes.Recipe(), task, torch.device("cpu"), 0, at / "file")


def pictured(at: Path) -> Any:
    save(at, small())
    return recipes.network_of(at)


TWO_WAY = FewShot(data(), 2, 1, 2)
RUNS = {
    "no steps": Row(fitting(steps=0), ValueError, "steps", "=0", AT_LEAST_1, "steps=1"),
    "no tasks in a step": Row(
        fitting(meta_batch=0), ValueError, "meta_batch", "=0", AT_LEAST_1, "meta_batch=1"
    ),
    "no steps between validations": Row(
        fitting(every=0), ValueError, "every", "=0", AT_LEAST_1, "every=1"
    ),
    "no steps between rows": Row(
        fitting(log_every=0), ValueError, "log_every", "=0", AT_LEAST_1, "log_every=1"
    ),
    "an outer rate below zero": Row(
        fitting(lr=-1.0), ValueError, "lr", "=-1.0", "expected a positive", "for example 1e-3"
    ),
    "a norm of nothing": Row(
        fitting(clip=0), ValueError, "clip", "=0", "expected a positive norm", "or None for no"
    ),
    "no tasks at once": Row(fitting(chunk=0), ValueError, "chunk", "=0", AT_LEAST_1, "chunk=1"),
    "an unknown lift": Row(
        fitting(lift="fast"), ValueError, "lift", "'fast'", "expected one of", "auto, loop, vmap"
    ),
    "an unknown precision": Row(
        fitting(precision="half"),
        *(ValueError, "precision", "'half'", "expected one of", "float32, tf32, bfloat16"),
    ),
    "nothing to compute again": Row(
        fitting(lambda: ProtoNet(MLP([2, 4])), TWO_WAY, recompute=True),
        *(
            ValueError,
            "recompute",
            "=True",
            "ProtoNet has no inner `step`",
            "only learners that adapt by",
        ),
    ),
    "training on tasks of another kind": Row(
        fitting(lambda: small("classification")),
        *(
            ValueError,
            "classification learner",
            "regression tasks",
            "cannot be used",
            "build MAML for",
        ),
    ),
    "validation on tasks of another kind": Row(
        fitting(validate=TWO_WAY),
        *(ValueError, "regression learner", "FewShot(", "cannot be used", "build MAML for"),
    ),
    "training on tasks of another way": Row(
        fitting(lambda: small("classification"), FewShot(data(), 3, 1, 2)),
        *(
            ValueError,
            "task's way",
            "is 3",
            "the network gives 2 outputs",
            "build the network with 3",
        ),
    ),
    "training in a folder in use": Row(
        in_a_used_folder,
        *(FileExistsError, "test_", "already holds a run", "name another folder", "or delete it"),
    ),
    "training that runs away": Row(
        fitting(lr=1e30, steps=3),
        *(
            FloatingPointError,
            "step 2",
            "loss of task 0 is",
            "the outer loop has run away",
            "lower the outer lr",
        ),
    ),
    "a method that nobody can save": Row(
        lambda at: save(at, Stray()),
        *(TypeError, "learner", "Stray", "cannot be saved by name", "decorate the class"),
    ),
    "a meta-gradient of empty support sets": Row(
        lambda _: gradients(small(), Episode(*[Examples(X[None, :, :0], X[None, :0])] * 2)),
        *(ValueError, "support.y", "(0, 3)", "its own row in y", "makes one for each label"),
    ),
    "scores on no tasks": Row(scoring(n=0), ValueError, "n", "=0", AT_LEAST_1, "n=1"),
    "scores, none at a time": Row(
        scoring(batch=0), ValueError, "batch", "=0", AT_LEAST_1, "batch=1"
    ),
    "queries in no known way": Row(
        scoring(queries="one"), ValueError, "queries", "'one'", "expected", '"joint" or "single"'
    ),
    "scores on tasks of another kind": Row(
        scoring(tasks=TWO_WAY),
        *(
            ValueError,
            "regression learner",
            "classification tasks",
            "cannot be used",
            "build MAML for",
        ),
    ),
    "scores on tasks of another width": Row(
        scoring(lambda: ProtoNet(MLP([5, 4])), TWO_WAY),
        *(ValueError, "inputs", "(2, 2)", "expected [n, 5]", "set sizes[0] to fit the data"),
    ),
    "a difference between different episodes": Row(
        lambda at: paired(scoring()(at), scoring(seed=1)(at)),
        *(ValueError, "scores", "(2 tasks) against", "need the same episodes", "freeze once"),
    ),
    "the calibration of numbers": Row(
        lambda _: calibration(small(), Sinusoids(), 2),
        *(
            ValueError,
            "calibration",
            "regression learner",
            "expected a classification",
            "positive temp",
        ),
    ),
    "a folder of a later version": Row(
        loaded(newer),
        saving.OtherLayout,
        "config.json",
        "layout 99",
        "reads layout 2",
        "install the version",
    ),
    "parameters that are damaged": Row(
        loaded(damaged),
        *(
            ValueError,
            "learner.safetensors",
            "checksum",
            "that its JSON file describes",
            "copy both",
        ),
    ),
    "an unknown method": Row(
        lambda _: registry.build({"name": "mamel", "args": {}}),
        *(ValueError, "method", "'mamel'", "known are", "did you mean 'maml'"),
    ),
    "an unknown network": Row(
        lambda _: registry.build({"name": "conv5", "args": {}}, NETWORKS),
        *(ValueError, "network", "'conv5'", "known are conv4", "did you mean 'conv4'"),
    ),
    "an argument that no network takes": Row(
        lambda _: registry.build({"name": "conv4", "args": {"size": 8}}, NETWORKS),
        *(ValueError, "'conv4'", "size=8", "at least 16 pixels", 'pool="stride"'),
    ),
    "a value that cannot be written": Row(
        lambda _: registry.plain("lr", torch.zeros(2)),
        *(TypeError, "lr", "tensor([0., 0.])", "cannot be written as JSON", "pass a plain value"),
    ),
    "fewer tasks than processes": Row(
        lambda _: processes.share(1, 0, 2),
        *(ValueError, "meta_batch", "1 tasks", "each needs one at least", "raise meta_batch"),
    ),
    "a check of one task": Row(
        lambda _: check_learner(small(), Sinusoids(), n=1),
        *(ValueError, "n", "=1", "expected at least 2 tasks", "pass n=3"),
    ),
    "a figure without sliders": Row(
        drawn(), ValueError, "Explore", "has no grid", "at least one argument", "give"
    ),
    "a slider of one number": Row(
        drawn(a=3), TypeError, "'a'", "is 3", "expected a list of values", "such as a=[3]"
    ),
    "a slider without values": Row(
        drawn(a=[]), ValueError, "'a'", "is empty", "at least one value", "give its slider"
    ),
    "too many frames": Row(
        drawn(a=range(99)), ValueError, "99 a", "= 99 frames", "at most 80", "give fewer values"
    ),
    "a slider that the figure does not know": Row(
        drawn(a=[1], b=[2]),
        TypeError,
        "'b'",
        "unexpected",
        "takes (a)",
        "give a grid to each argument",
    ),
    "a figure that is not returned": Row(
        drawn(a=[1]), TypeError, "figure function", "None", "expected a matplotlib", "return fig"
    ),
    "an unknown folder of data": Row(
        lambda _: recipes.data_named("glyfs"),
        *(
            ValueError,
            "data set or folder",
            "'glyfs'",
            "known are cifarfs",
            "did you mean 'glyphs'",
        ),
    ),
    "a folder without splits": Row(
        split_up("train", "test"),
        *(ValueError, "--data", "test_", "holds train, val and test", "there is no"),
    ),
    "a class on two sides": Row(
        split_up("train/cat", "val/dog", "test/cat"),
        *(
            ValueError,
            "class 'cat'",
            "both train and test",
            "count what was trained on",
            "keep it in",
        ),
    ),
    "an argument that the method does not take": Row(
        from_recipe(method={"step": 3}),
        *(ValueError, "argument of maml", "'step'", "known are", "did you mean 'steps'"),
    ),
    "an argument that the network does not take": Row(
        from_recipe(net={"size": [3]}),
        *(ValueError, "argument of mlp", "'size'", "known are sizes", "did you mean 'sizes'"),
    ),
    "more classes in training than outputs": Row(
        trained_on_more,
        *(ValueError, "--train-way", "7", "expected 5 in training too", "leave --train-way out"),
    ),
    "a run in a file": Row(into_a_file, ValueError, "--out", "file", "is a file", "name a folder"),
    "a start that ends in a head": Row(
        pictured, ValueError, "maml learner", "ends in a head", "start from one without", "such as"
    ),
    "an unknown row": Row(
        lambda _: reproduction.reproduce("maml-omniglot"),
        *(
            ValueError,
            "row",
            "'maml-omniglot'",
            "known are",
            "did you mean 'maml-omniglot-5way-1shot'",
        ),
    ),
    "an unknown budget": Row(
        lambda _: reproduction.reproduce("maml-glyphs-5way-1shot", "cpus"),
        *(ValueError, "budget", "'cpus'", "known are cpu, gpu", "did you mean 'cpu'"),
    ),
    "a relation module for embeddings of another length": Row(
        lambda _: RelationNet(FEATURES, MLP([128, 8, 1])).adapt(Examples(INPUTS, Y)),
        *(
            ValueError,
            "relation",
            "128 inputs",
            "two embeddings have 16",
            "relation.sizes=[16,8,1]",
        ),
    ),
    "a relation module that gives two numbers": Row(
        lambda _: RelationNet(FEATURES, MLP([16, 2]))(Examples(INPUTS, Y), INPUTS),
        *(ValueError, "relation", "(18, 2)", "one number for each pair", "nn.Linear(..., 1)"),
    ),
    "an embedding that is one number for all": Row(
        lambda _: RelationNet(nn.Flatten(0), MLP([2, 1])).adapt(Examples(INPUTS, Y)),
        *(ValueError, "embed", "(24,)", "a row of numbers or a map for each", "return these alone"),
    ),
    "an unknown way to pool": Row(
        lambda _: RelationNet(FEATURES, MLP([16, 1]), pool="means"),
        *(ValueError, "pool", "'means'", "known are mean, sum", "did you mean 'mean'"),
    ),
    "an unknown error of scores": Row(
        lambda _: RelationNet(FEATURES, MLP([16, 1]), error="square"),
        *(ValueError, "error", "'square'", "known are", "did you mean 'squared'"),
    ),
}

ROWS = EPISODES | misfits() | METHODS | DATA | RUNS


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_bad_input_is_refused_by_an_error_that_helps(row: Row, tmp_path: Path) -> None:
    with pytest.raises(row.error) as caught:
        row.do(tmp_path)
    assert type(caught.value) is row.error
    says(str(caught.value), row)


def test_an_ending_and_a_name_are_only_names(tmp_path: Path) -> None:
    folder = images(tmp_path, b"\xff.jpg", png())  # a PNG, under a name that is no text
    assert datasets.from_folder(folder, size=8).sizes.tolist() == [2]


# --- the command line


class Line(NamedTuple):
    """A command line, and what is said of it."""

    words: Callable[[Path], list[Any]]  # it is given an empty folder
    argument: str
    value: str
    expected: str
    remedy: str


def line(text: str) -> Callable[[Path], list[Any]]:
    """These words, with {at} for the folder."""
    return lambda at: text.format(at=at).split()


@cache
def config_of(name: str) -> tuple[Learner, dict[str, Any]]:
    """An untrained learner, and what a folder says of it."""
    made = methods()[name](Conv4(out=5 if methods()[name].head else None, size=28, width=4))
    scale = {"size": 28, "channels": 1, "invert": True, "mean": [0.0], "std": [1.0]}
    return made, {"task": {"data": "glyphs", "way": 5, "shot": 1}, "preprocessing": scale}


def kept(text: str, name: str = "protonet", of: int = 2) -> Callable[[Path], list[Any]]:
    """A line about a folder {run} with a learner, a folder {support} of images, and one bad {image}."""

    def words(at: Path) -> list[Any]:
        made, config = config_of(name)
        save(at / "run", made, **config)
        for i in range(of):
            (at / "support" / f"class{i}").mkdir(parents=True)
            (at / "support" / f"class{i}" / "0.png").write_bytes(png())
        (at / "bad.png").write_bytes(b"a text")
        there = {"run": at / "run", "support": at / "support", "image": at / "bad.png"}
        return text.format(at=at, **there).split()

    return words


def own(spoil: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
    """Train on a folder of images in which something is wrong."""

    def words(at: Path) -> list[Any]:
        for split in ("train", "val", "test"):
            for i in range(2):
                (at / split / f"{split}{i}").mkdir(parents=True)
                for j in range(2):
                    (at / split / f"{split}{i}" / f"{j}.png").write_bytes(png())
        spoil(at / "train" / "train0")
        return f"train protonet --data {at} --way 2 --query 1 --size 16 --out {at}/run".split()

    return words


def link_out(at: Path) -> None:
    (at / "link.png").symlink_to(sys.executable)


def renamed(name: bytes) -> Callable[[Path], Any]:
    return lambda at: at.rename(at.parent / os.fsdecode(name))


IMAGES = "1 of 5 images"
LINES = {
    "an unknown method": Line(
        line("train mamel"), "method", "'mamel'", "known are anil", "did you mean 'maml'"
    ),
    "unknown data": Line(
        line("train maml --data glyfs"),
        *("data set or folder", "'glyfs'", "known are cifarfs", "did you mean 'glyphs'"),
    ),
    "an unknown network": Line(
        line("train maml --network conv5"),
        *("network", "'conv5'", "known are conv4", "did you mean 'conv4'"),
    ),
    "an unknown argument of the method": Line(
        line("train maml --set step=2"),
        *("argument of maml", "'step'", "known are", "did you mean 'steps'"),
    ),
    "an unknown argument of the network": Line(
        line("train maml --net widht=8"),
        *("argument of conv4", "'widht'", "known are", "did you mean 'width'"),
    ),
    "an argument without a value": Line(
        line("train maml --set lr"), "--set", "lr", "expected NAME=VALUE", "for example lr=0.4"
    ),
    "an inner rate in words": Line(
        line("train maml --set lr=fast"), "lr", "='fast'", RATE, "pass one, such as lr=0.01"
    ),
    "an unknown pool": Line(
        line("train maml --net pool=mean"), "pool", "'mean'", "known are max", "stride"
    ),
    "an unknown device": Line(
        line("train maml --device tpu"), "--device", "tpu", "expected", "cpu, cuda or auto"
    ),
    "an outer rate of nothing": Line(
        line("train maml --lr 0"), "--lr", "0.0", "expected", "a positive outer rate"
    ),
    "an unknown argument of the engine": Line(
        line("train maml --engine speed=9"),
        "--engine",
        "speed",
        "expected one of",
        "lift, run, chunk",
    ),
    "two networks at once": Line(
        line("train maml --start {at} --network conv4"),
        *("--start", "its own network", "leave out", "--network and --net"),
    ),
    "a network that the method does not have": Line(
        line("train protonet --network embeds=mlp --out {at}/run"),
        *("network of protonet", "'embeds'", "known are embed", "did you mean 'embed'"),
    ),
    "an argument of a network that the method does not have": Line(
        line("train protonet --net embeds.width=4 --out {at}/run"),
        *("network of protonet", "'embeds'", "known are embed", "did you mean 'embed'"),
    ),
    "two networks for one": Line(
        line("train protonet --network mlp --network conv4"),
        *(
            "--network",
            "mlp",
            "expected one for all networks",
            "say its name, --network NAME=conv4",
        ),
    ),
    "another network than the one to start from": Line(
        kept("train protonet --start {run} --network embed=mlp --out {run}/next"),
        *(
            "embed=mlp",
            "trained conv4",
            "is asked for",
            "leave that out, or start from another folder",
        ),
    ),
    "curves for a network that reads images": Line(
        line("train maml --data sinusoids --network conv4 --out {at}/run"),
        *("examples of these tasks", "(5, 1)", "reads images", "take a network that reads them"),
    ),
    "more classes in training than outputs": Line(
        line("train maml --train-way 7 --out {at}/run"),
        *("--train-way", "7", "expected 5 in training too", "leave --train-way out"),
    ),
    "more classes than there are": Line(
        line("train protonet --way 5000 --out {at}/run"),
        *("way", "=5000", "the data has", "lower way or bring more classes"),
    ),
    "more shots than there are": Line(
        line("train protonet --shot 11 --out {at}/run"),
        *("shot", "=11", "need 11 on each side of its cut", "lower them"),
    ),
    "numbers for a classifier": Line(
        line("train protonet --data sinusoids --out {at}/run"),
        *("protonet", "Sinusoids(", "is for classification", "use maml"),
    ),
    "a start that is no folder": Line(
        line("train protonet --start {at} --out {at}/run"),
        *("test_", "no trained folder", "config.json", "it has no"),
    ),
    "a run that is there": Line(
        kept("train protonet --batch 1 --train-way 5 --out {run}"),
        *("run", "already holds a run", "name another folder", "or delete it"),
    ),
    "data without splits": Line(
        line("train protonet --data {at}"),
        *("--data", "test_", "a folder that holds train, val and test", "there is no"),
    ),
    "images of zero bytes": Line(
        own(lambda at: (at / "x.png").write_bytes(b"")), IMAGES, "x.png", "cannot identify", REPAIR
    ),
    "images cut short": Line(
        own(lambda at: (at / "x.png").write_bytes(png((64, 64))[:5000])),
        *(IMAGES, "x.png", "truncated", REPAIR),
    ),
    "a text named as an image": Line(
        own(lambda at: (at / "x.jpg").write_text("a text")),
        IMAGES,
        "x.jpg",
        "cannot identify",
        REPAIR,
    ),
    "a huge image": Line(
        own(lambda at: (at / "x.png").write_bytes(huge())),
        IMAGES,
        "x.png",
        "decompression bomb",
        REPAIR,
    ),
    "a link out of the folder": Line(
        own(link_out), IMAGES, "link.png", "a link that leaves the folder", REPAIR
    ),
    "a bad image whose name is no text": Line(
        own(lambda at: (at / os.fsdecode(b"\xff.png")).touch()),
        *(IMAGES, r"\xff.png", "cannot identify", REPAIR),
    ),
    "a class whose name is no text": Line(
        own(renamed(b"caf\xe9")), "1 of 2 classes", r"caf\xe9", "not UTF-8", "Rename the folder"
    ),
    "a class without images": Line(
        own(lambda at: (at.parent / "empty").mkdir()),
        *("1 of 3 classes", "empty", "have no image", "Add images or take the folder away"),
    ),
    "an unknown data set to fetch": Line(
        line("data get omniglott"),
        *("data set", "'omniglott'", "known are cifarfs", "did you mean 'omniglot'"),
    ),
    "an unknown row": Line(
        line("reproduce maml-omniglot"),
        *("row", "'maml-omniglot'", "known are", "did you mean 'maml-omniglot-5way-1shot'"),
    ),
    "other classes than trained for": Line(
        kept("evaluate {run} --way 3", "maml"),
        *("--way", "has 3", "was trained for 5 classes", "train again with --way 3"),
    ),
    "unknown data to test on": Line(
        kept("evaluate {run} --data glyphz"),
        *("data set or folder", "'glyphz'", "known are cifarfs", "did you mean 'glyphs'"),
    ),
    "support for too few classes": Line(
        kept("classify {run} {image} --support {support}", "maml"),
        *("support", "has 2", "was trained for 5 classes", "bring 5, or train again"),
    ),
    "support of one class": Line(
        kept("classify {run} {support}/class0/0.png --support {support}", of=1),
        *("support.y", "(1, 1)", "at least two classes", "show more"),
    ),
    "support without folders": Line(
        kept("classify {run} {image} --support {run}"),
        *("run", "holds no folders", "the images of each class", "put"),
    ),
    "a relation module for embeddings of another length": Line(
        line("train relation --net embed.width=8 --steps 1 --device cpu --out {at}/run"),
        *("relation", "128 inputs", "two embeddings have 16", "--net relation.sizes=[16,64,1]"),
    ),
}
# What is said where the words themselves are wrong: by typer, which names the value of few of them.
USAGE = {
    "trian": ("No such command", "'trian'", "Did you mean 'train'"),
    "data gett omniglot": ("No such command", "'gett'", "Did you mean 'get'"),
    "train maml --step 3": ("No such option", "--step", "--steps"),
    "train maml --bach 3": ("No such option", "--bach", "--batch"),
    "train": ("Missing argument", "method", "train --help"),
    "train maml --way 1": ("'--way'", "greater than or equal to 2", "train --help"),
    "train maml --size 8": ("'--size'", "greater than or equal to 16", "train --help"),
    "train maml --shot many": ("'--shot'", "integer", "train --help"),
    "evaluate runs --tasks 1": ("'--tasks'", "greater than or equal to 2", "evaluate --help"),
}


def typed(monkeypatch: pytest.MonkeyPatch, words: list[Any]) -> Any:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["metabook", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("row", LINES.values(), ids=LINES)
def test_a_bad_command_line_is_answered_in_a_line(
    row: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = row.words(tmp_path)
    assert typed(monkeypatch, words) == 2
    out, said = capsys.readouterr()
    said = [text for text in said.splitlines() if text.strip()]
    assert out == "" and len(said) == 1 and said[0].startswith("error: ")
    says(said[0], row)


@pytest.mark.parametrize("text", USAGE)
def test_a_wrong_use_is_explained(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert typed(monkeypatch, text.split()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in said
    for part in USAGE[text]:
        assert part in said


@pytest.mark.parametrize(
    "name", ["an unknown method", "two networks at once", "a class whose name is no text"]
)
def test_a_process_ends_in_a_line_too(name: str, tmp_path: Path) -> None:
    row = LINES[name]
    command = [sys.executable, "-m", "metabook", *map(str, row.words(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    says(done.stderr, row)
