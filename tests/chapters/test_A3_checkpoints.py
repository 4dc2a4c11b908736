"""Made from nbs/A3_checkpoints.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

import metabook
from metabook.checkpoints import (
    NETWORKS,
    build,
    differences,
    methods,
    newest_checkpoint,
    occupied,
    pack,
    plain,
    random_state,
    register,
    rehearse,
    restore_random,
    save,
    unpack,
    write_atomically,
    write_checkpoint,
)
from metabook.episodes import Classes, FewShot
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, ResNet12
from metabook.prototypes import ProtoNet


def test_an_instance_notes_its_arguments():
    # cell 54d2c7c0
    learner = ProtoNet(MLP([2, 8, 3]))
    assert learner.config["name"] == "protonet" and learner.config["args"]["distance"] == "squared"
    assert learner.config["args"]["embed"].config == {"name": "mlp", "args": {"sizes": [2, 8, 3]}}


def test_only_registered_classes_are_saved():
    # cell 661d3739
    class Scaled(MLP):
        "Inherits from a registered class without being registered."

    for unknown in (ProtoNet(torch.nn.Linear(2, 2)), ProtoNet(Scaled([2, 2]))):
        with pytest.raises(TypeError, match="register"):
            plain("learner", unknown)
    assert plain("sizes", (1, 2.5, "a", None)) == [1, 2.5, "a", None]
    later = MAML(MLP([2, 3]), lr=0.5)
    later.lr, later.test_steps = 0.1, 20
    assert {"lr": 0.1, "steps": 1, "test_steps": 20}.items() <= plain("learner", later)[
        "args"
    ].items()

    with pytest.raises(ValueError, match="already names ProtoNet"):
        register("protonet")(Scaled)
    with pytest.raises(TypeError, match="spell its arguments out"):

        @register("anything")
        class Anything(Learner):
            def __init__(self, *layers: int):
                super().__init__()


def test_built_from_its_own_note():
    # cell e1eb6802
    learner = build(plain("learner", MAML(MLP([1, 40, 1]), lr=0.01, kind="regression")))
    assert isinstance(learner, MAML) and learner.lr == 0.01 and learner.kind == "regression"
    assert [tuple(p.shape) for p in learner.parameters()] == [(40, 1), (40,), (1, 40), (1,)]
    assert {"maml", "protonet"} <= set(methods())


def test_a_wrong_name_or_argument_says_so():
    # cell 584cef8c
    for config, message in {
        '{"name": "MALM", "args": {}}': "unknown method 'MALM': did you mean 'maml'",
        '{"name": "maml", "args": {"net": {"name": "conf4", "args": {}}}}': "network 'conf4': did you mean 'conv4'",
        '{"name": "maml", "args": {"net": {"name": "mlp", "args": {"size": [1]}}}}': "'mlp' cannot be built",
        '{"name": "maml", "args": {"net": {"name": "conv4", "args": {"width": -1}}}}': "'conv4' cannot be built",
    }.items():
        with pytest.raises(ValueError, match=message):
            build(json.loads(config))


def test_a_failed_write_leaves_the_old_file():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 1b537d9d
    folder = fresh()
    write_atomically(folder / "a.txt", b"old")

    original, os.replace = os.replace, lambda *paths: (_ for _ in ()).throw(OSError("power cut"))
    try:
        with pytest.raises(OSError, match="power cut"):
            write_atomically(folder / "a.txt", b"new")
    finally:
        os.replace = original
    assert (folder / "a.txt").read_bytes() == b"old" and len(list(folder.iterdir())) == 1


def test_every_network_comes_back_bit_by_bit():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)


def test_each_part_keeps_its_precision():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)

    # cell 3d90be17
    @register("half-and-half", NETWORKS)
    class HalfAndHalf(torch.nn.Module):
        "A frozen layer in bfloat16 under one in float32, and a table in float64."

        def __init__(self, width: int = 4):
            super().__init__()
            self.frozen = torch.nn.Linear(2, width).bfloat16().requires_grad_(False)
            self.free = torch.nn.Linear(width, width)
            self.register_buffer("table", torch.full((width,), 1 / 3, dtype=torch.float64))

        def forward(self, x):
            return self.free(self.frozen(x.bfloat16()).float()) + self.table.float()

    halves = ProtoNet(HalfAndHalf())
    halves.embed.table = halves.embed.table.float()  # another precision than it was built in
    loaded, points = metabook.load(save(fresh(), halves)), torch.randn(5, 2)
    kinds = [{k: v.dtype for k, v in m.state_dict().items()} for m in (halves, loaded)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == 2
    assert torch.equal(loaded.embed(points), halves.embed(points))


def test_shared_and_reordered_tensors_are_saved():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)

    # cell 3d90be17
    @register("half-and-half", NETWORKS)
    class HalfAndHalf(torch.nn.Module):
        "A frozen layer in bfloat16 under one in float32, and a table in float64."

        def __init__(self, width: int = 4):
            super().__init__()
            self.frozen = torch.nn.Linear(2, width).bfloat16().requires_grad_(False)
            self.free = torch.nn.Linear(width, width)
            self.register_buffer("table", torch.full((width,), 1 / 3, dtype=torch.float64))

        def forward(self, x):
            return self.free(self.frozen(x.bfloat16()).float()) + self.table.float()

    halves = ProtoNet(HalfAndHalf())
    halves.embed.table = halves.embed.table.float()  # another precision than it was built in
    loaded, points = metabook.load(save(fresh(), halves)), torch.randn(5, 2)
    kinds = [{k: v.dtype for k, v in m.state_dict().items()} for m in (halves, loaded)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == 2
    assert torch.equal(loaded.embed(points), halves.embed(points))
    # cell 516a67d6
    tied = MAML(MLP([2, 2, 2, 2]))
    tied.net.layers[1].weight = tied.net.layers[0].weight
    reordered = ProtoNet(Conv4(3, size=16, width=4)).to(memory_format=torch.channels_last)
    for learner in (tied, reordered):
        again = metabook.load(save(fresh(), learner)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in learner.state_dict().items())


def test_what_cannot_be_loaded_is_not_trained():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)

    # cell 3d90be17
    @register("half-and-half", NETWORKS)
    class HalfAndHalf(torch.nn.Module):
        "A frozen layer in bfloat16 under one in float32, and a table in float64."

        def __init__(self, width: int = 4):
            super().__init__()
            self.frozen = torch.nn.Linear(2, width).bfloat16().requires_grad_(False)
            self.free = torch.nn.Linear(width, width)
            self.register_buffer("table", torch.full((width,), 1 / 3, dtype=torch.float64))

        def forward(self, x):
            return self.free(self.frozen(x.bfloat16()).float()) + self.table.float()

    halves = ProtoNet(HalfAndHalf())
    halves.embed.table = halves.embed.table.float()  # another precision than it was built in
    loaded, points = metabook.load(save(fresh(), halves)), torch.randn(5, 2)
    kinds = [{k: v.dtype for k, v in m.state_dict().items()} for m in (halves, loaded)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == 2
    assert torch.equal(loaded.embed(points), halves.embed(points))
    # cell 516a67d6
    tied = MAML(MLP([2, 2, 2, 2]))
    tied.net.layers[1].weight = tied.net.layers[0].weight
    reordered = ProtoNet(Conv4(3, size=16, width=4)).to(memory_format=torch.channels_last)
    for learner in (tied, reordered):
        again = metabook.load(save(fresh(), learner)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in learner.state_dict().items())

    # cell 0e4f6b52
    @register("reads-a-value", NETWORKS)
    class ReadsAValue(torch.nn.Module):
        "Its constructor asks a tensor for a number, as those of vision transformers do."

        def __init__(self, depth: int = 2):
            super().__init__()
            self.rates = [r.item() for r in torch.linspace(0, 0.1, depth)]
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in self.rates)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    rehearse(learner := ProtoNet(ReadsAValue()))
    again = metabook.load(save(fresh(), learner))
    assert torch.equal(again.embed.layers[1].weight, learner.embed.layers[1].weight)
    learner.embed.layers.append(torch.nn.Linear(2, 2))  # behind the constructor's back
    with pytest.raises(ValueError, match=r"saved, but never loaded as it is: .*layers\.2"):
        rehearse(learner)
    learner = ProtoNet(MLP([2, 4]))
    learner.distance = "cosine"  # the constructor would have made a scale as well
    with pytest.raises(ValueError, match="scale was "):
        save(fresh(), learner)


def test_a_learner_that_holds_a_learner_comes_back():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)

    # cell 3d90be17
    @register("half-and-half", NETWORKS)
    class HalfAndHalf(torch.nn.Module):
        "A frozen layer in bfloat16 under one in float32, and a table in float64."

        def __init__(self, width: int = 4):
            super().__init__()
            self.frozen = torch.nn.Linear(2, width).bfloat16().requires_grad_(False)
            self.free = torch.nn.Linear(width, width)
            self.register_buffer("table", torch.full((width,), 1 / 3, dtype=torch.float64))

        def forward(self, x):
            return self.free(self.frozen(x.bfloat16()).float()) + self.table.float()

    halves = ProtoNet(HalfAndHalf())
    halves.embed.table = halves.embed.table.float()  # another precision than it was built in
    loaded, points = metabook.load(save(fresh(), halves)), torch.randn(5, 2)
    kinds = [{k: v.dtype for k, v in m.state_dict().items()} for m in (halves, loaded)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == 2
    assert torch.equal(loaded.embed(points), halves.embed(points))
    # cell 516a67d6
    tied = MAML(MLP([2, 2, 2, 2]))
    tied.net.layers[1].weight = tied.net.layers[0].weight
    reordered = ProtoNet(Conv4(3, size=16, width=4)).to(memory_format=torch.channels_last)
    for learner in (tied, reordered):
        again = metabook.load(save(fresh(), learner)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in learner.state_dict().items())

    # cell 0e4f6b52
    @register("reads-a-value", NETWORKS)
    class ReadsAValue(torch.nn.Module):
        "Its constructor asks a tensor for a number, as those of vision transformers do."

        def __init__(self, depth: int = 2):
            super().__init__()
            self.rates = [r.item() for r in torch.linspace(0, 0.1, depth)]
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in self.rates)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    rehearse(learner := ProtoNet(ReadsAValue()))
    again = metabook.load(save(fresh(), learner))
    assert torch.equal(again.embed.layers[1].weight, learner.embed.layers[1].weight)
    learner.embed.layers.append(torch.nn.Linear(2, 2))  # behind the constructor's back
    with pytest.raises(ValueError, match=r"saved, but never loaded as it is: .*layers\.2"):
        rehearse(learner)
    learner = ProtoNet(MLP([2, 4]))
    learner.distance = "cosine"  # the constructor would have made a scale as well
    with pytest.raises(ValueError, match="scale was "):
        save(fresh(), learner)

    # cell 64b8f0e1
    @register("tempered")
    class Cautious(Learner):
        "Another learner, half as sure."

        head = False

        def __init__(self, learner: Learner):
            super().__init__()
            self.learner = learner

        def adapt(self, support):
            return self.learner.adapt(support)

        def predict(self, state, x):
            return self.learner.predict(state, x) / 2

    learner = Cautious(Cautious(ProtoNet(MLP([2, 8, 4]))))
    again = metabook.load(save(fresh(), learner))
    assert isinstance(again.learner.learner, ProtoNet)
    assert torch.equal(
        again.learner.learner.embed.layers[0].weight, learner.learner.learner.embed.layers[0].weight
    )


def test_an_adapted_learner_is_exported():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)

    # cell 3d90be17
    @register("half-and-half", NETWORKS)
    class HalfAndHalf(torch.nn.Module):
        "A frozen layer in bfloat16 under one in float32, and a table in float64."

        def __init__(self, width: int = 4):
            super().__init__()
            self.frozen = torch.nn.Linear(2, width).bfloat16().requires_grad_(False)
            self.free = torch.nn.Linear(width, width)
            self.register_buffer("table", torch.full((width,), 1 / 3, dtype=torch.float64))

        def forward(self, x):
            return self.free(self.frozen(x.bfloat16()).float()) + self.table.float()

    halves = ProtoNet(HalfAndHalf())
    halves.embed.table = halves.embed.table.float()  # another precision than it was built in
    loaded, points = metabook.load(save(fresh(), halves)), torch.randn(5, 2)
    kinds = [{k: v.dtype for k, v in m.state_dict().items()} for m in (halves, loaded)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == 2
    assert torch.equal(loaded.embed(points), halves.embed(points))
    # cell 516a67d6
    tied = MAML(MLP([2, 2, 2, 2]))
    tied.net.layers[1].weight = tied.net.layers[0].weight
    reordered = ProtoNet(Conv4(3, size=16, width=4)).to(memory_format=torch.channels_last)
    for learner in (tied, reordered):
        again = metabook.load(save(fresh(), learner)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in learner.state_dict().items())

    # cell 0e4f6b52
    @register("reads-a-value", NETWORKS)
    class ReadsAValue(torch.nn.Module):
        "Its constructor asks a tensor for a number, as those of vision transformers do."

        def __init__(self, depth: int = 2):
            super().__init__()
            self.rates = [r.item() for r in torch.linspace(0, 0.1, depth)]
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in self.rates)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    rehearse(learner := ProtoNet(ReadsAValue()))
    again = metabook.load(save(fresh(), learner))
    assert torch.equal(again.embed.layers[1].weight, learner.embed.layers[1].weight)
    learner.embed.layers.append(torch.nn.Linear(2, 2))  # behind the constructor's back
    with pytest.raises(ValueError, match=r"saved, but never loaded as it is: .*layers\.2"):
        rehearse(learner)
    learner = ProtoNet(MLP([2, 4]))
    learner.distance = "cosine"  # the constructor would have made a scale as well
    with pytest.raises(ValueError, match="scale was "):
        save(fresh(), learner)

    # cell 64b8f0e1
    @register("tempered")
    class Cautious(Learner):
        "Another learner, half as sure."

        head = False

        def __init__(self, learner: Learner):
            super().__init__()
            self.learner = learner

        def adapt(self, support):
            return self.learner.adapt(support)

        def predict(self, state, x):
            return self.learner.predict(state, x) / 2

    learner = Cautious(Cautious(ProtoNet(MLP([2, 8, 4]))))
    again = metabook.load(save(fresh(), learner))
    assert isinstance(again.learner.learner, ProtoNet)
    assert torch.equal(
        again.learner.learner.embed.layers[0].weight, learner.learner.learner.embed.layers[0].weight
    )

    # cell 7f3a95d2
    class Served(torch.nn.Module):
        "A learner and what it learned about one task."

        def __init__(self, learner, support):
            super().__init__()
            self.learner, self.state = learner.eval(), learner.adapt(support)

        def forward(self, x):
            return self.learner.predict(self.state, x)

    support = next(tasks_for(MLP([2, 8, 3])).freeze(1).episodes()).support
    with torch.no_grad():
        served = Served(MAML(MLP([2, 8, 3])), support._replace(x=support.x[0], y=support.y[0]))
        some = {"x": {0: torch.export.Dim("n", min=1, max=1000)}}
        program = torch.export.export(served, (torch.randn(4, 2),), dynamic_shapes=some)
        called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert called and all(name.startswith("aten.") for name in called)  # PyTorch's own
        for n in (1, 4, 100):
            x = torch.randn(n, 2)
            torch.testing.assert_close(program.module()(x), served(x))
    with pytest.raises(RuntimeError, match=r"expected torch\.export"):
        torch.jit.trace(served, torch.randn(4, 2))


def test_damage_is_noticed_and_named():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell d8d93a81
    def truncate(folder):
        path = folder / "learner.safetensors"
        path.write_bytes(path.read_bytes()[:-5])

    def swap(folder):
        other = save(fresh(), MAML(MLP([2, 9, 3])))
        os.replace(other / "learner.safetensors", folder / "learner.safetensors")

    for damage, message in [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not the configuration"),
        (lambda f: (f / "config.json").write_text("[]"), "not the configuration"),
        (lambda f: (f / "learner.safetensors").unlink(), "No such file"),
        (truncate, "checksum"),
        (swap, "checksum"),
        (lambda f: edit(f, lambda c: c.update(layout=99, metabook="9.0")), r"layout 99.*\(9.0\)"),
        (lambda f: edit(f, lambda c: c["method"].update(name="mamal")), "did you mean 'maml'"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(rate=1)), "'maml' cannot be built"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(net=3)), "cannot be"),
        (lambda f: edit(f, lambda c: c["method"].pop("args")), "args"),
        (
            lambda f: edit(f, lambda c: c["method"]["args"]["net"]["args"].update(sizes=[2, 9, 3])),
            r"layers.0.weight was \(9, 2\) and is \(8, 2\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            metabook.load(broken(damage))


def test_half_an_update_is_undone():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell d8d93a81
    def truncate(folder):
        path = folder / "learner.safetensors"
        path.write_bytes(path.read_bytes()[:-5])

    def swap(folder):
        other = save(fresh(), MAML(MLP([2, 9, 3])))
        os.replace(other / "learner.safetensors", folder / "learner.safetensors")

    for damage, message in [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not the configuration"),
        (lambda f: (f / "config.json").write_text("[]"), "not the configuration"),
        (lambda f: (f / "learner.safetensors").unlink(), "No such file"),
        (truncate, "checksum"),
        (swap, "checksum"),
        (lambda f: edit(f, lambda c: c.update(layout=99, metabook="9.0")), r"layout 99.*\(9.0\)"),
        (lambda f: edit(f, lambda c: c["method"].update(name="mamal")), "did you mean 'maml'"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(rate=1)), "'maml' cannot be built"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(net=3)), "cannot be"),
        (lambda f: edit(f, lambda c: c["method"].pop("args")), "args"),
        (
            lambda f: edit(f, lambda c: c["method"]["args"]["net"]["args"].update(sizes=[2, 9, 3])),
            r"layers.0.weight was \(9, 2\) and is \(8, 2\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            metabook.load(broken(damage))

    # cell c5a79e16
    def update(folder, *fail, after=False):
        "Save another learner; the renames of these numbers fail, or fail once they are done."
        original, renames = os.replace, []

        def replace(source, target):
            renames.append(target)
            if len(renames) in fail and not after:
                raise OSError("power cut")
            original(source, target)
            if len(renames) in fail:
                raise OSError("power cut")

        os.replace = replace
        try:
            with pytest.raises(OSError, match="power cut"):
                save(folder, MAML(MLP([2, 8, 3]), lr=0.7))
        finally:
            os.replace = original

    folder = save(fresh(), MAML(MLP([2, 8, 3]), lr=0.3))
    update(folder, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "learner.safetensors"]
    assert metabook.load(folder).lr == 0.3
    update(folder, 2, 3)
    assert metabook.load(folder).lr == 0.3
    update(folder, 3, 4)  # and again; the first rename is now a repair
    assert metabook.load(folder).lr == 0.3
    update(folder, 3, after=True)  # everything was done but to say so
    assert metabook.load(folder).lr == 0.7
    update(folder, 1)  # nothing of what happened before is remembered
    assert metabook.load(folder).lr == 0.7
    update(folder, 2, 3)
    assert metabook.load(folder).lr == 0.7
    hidden = folder / ".learner.safetensors.before"
    hidden.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="only one of the two files was replaced"):
        metabook.load(folder)
    (folder / "elsewhere").rename(hidden)
    save(folder, MAML(MLP([2, 8, 3]), lr=0.9))
    assert metabook.load(folder).lr == 0.9 and not hidden.exists()
    hidden.write_bytes(b"left by somebody")
    (folder / "config.json").write_text("{")  # and nobody knows what was meant
    save(folder, MAML(MLP([2, 8, 3]), lr=0.6))
    assert metabook.load(folder).lr == 0.6 and not hidden.exists()


def test_an_error_while_writing_keeps_the_earlier_folder():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell 291e6ef6
    def tasks_for(net):
        "A few tasks that a network can take, from random examples."
        shape = (2,) if isinstance(net, MLP) else (net.channels, 16, 16)
        g = torch.Generator().manual_seed(1)
        data = {name: torch.randn(6, *shape, generator=g) for name in "abcd"}
        return FewShot(Classes.of(data), way=3, shot=1, query=2)

    def predictions(learner):
        "What a learner answers on one task."
        episode = tasks_for(next(learner.children())).freeze(1).episodes()
        dtype = next(learner.parameters()).dtype
        support, query = next(episode).to(dtype=dtype)
        first = support._replace(x=support.x[0], y=support.y[0], info={})
        return learner.eval()(first, query.x[0]).detach()

    def some_learners():
        "Both methods with every network and every kind of normalisation."
        for stats in ("batch", "support", "running"):
            yield MAML(Conv4(3, out=3, size=16, width=4, stats=stats), test_steps=2)
            yield ProtoNet(Conv4(1, size=16, width=4, pool="stride", stats=stats))
            yield ProtoNet(ResNet12(3, widths=[2, 3, 4, 5], stats=stats))
        yield MAML(MLP([2, 8, 3]), lr=0.1, first_order=True)
        yield ProtoNet(MLP([2, 8, 4])).double()

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell d8d93a81
    def truncate(folder):
        path = folder / "learner.safetensors"
        path.write_bytes(path.read_bytes()[:-5])

    def swap(folder):
        other = save(fresh(), MAML(MLP([2, 9, 3])))
        os.replace(other / "learner.safetensors", folder / "learner.safetensors")

    for damage, message in [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not the configuration"),
        (lambda f: (f / "config.json").write_text("[]"), "not the configuration"),
        (lambda f: (f / "learner.safetensors").unlink(), "No such file"),
        (truncate, "checksum"),
        (swap, "checksum"),
        (lambda f: edit(f, lambda c: c.update(layout=99, metabook="9.0")), r"layout 99.*\(9.0\)"),
        (lambda f: edit(f, lambda c: c["method"].update(name="mamal")), "did you mean 'maml'"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(rate=1)), "'maml' cannot be built"),
        (lambda f: edit(f, lambda c: c["method"]["args"].update(net=3)), "cannot be"),
        (lambda f: edit(f, lambda c: c["method"].pop("args")), "args"),
        (
            lambda f: edit(f, lambda c: c["method"]["args"]["net"]["args"].update(sizes=[2, 9, 3])),
            r"layers.0.weight was \(9, 2\) and is \(8, 2\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            metabook.load(broken(damage))

    # cell c5a79e16
    def update(folder, *fail, after=False):
        "Save another learner; the renames of these numbers fail, or fail once they are done."
        original, renames = os.replace, []

        def replace(source, target):
            renames.append(target)
            if len(renames) in fail and not after:
                raise OSError("power cut")
            original(source, target)
            if len(renames) in fail:
                raise OSError("power cut")

        os.replace = replace
        try:
            with pytest.raises(OSError, match="power cut"):
                save(folder, MAML(MLP([2, 8, 3]), lr=0.7))
        finally:
            os.replace = original

    folder = save(fresh(), MAML(MLP([2, 8, 3]), lr=0.3))
    update(folder, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "learner.safetensors"]
    assert metabook.load(folder).lr == 0.3
    update(folder, 2, 3)
    assert metabook.load(folder).lr == 0.3
    update(folder, 3, 4)  # and again; the first rename is now a repair
    assert metabook.load(folder).lr == 0.3
    update(folder, 3, after=True)  # everything was done but to say so
    assert metabook.load(folder).lr == 0.7
    update(folder, 1)  # nothing of what happened before is remembered
    assert metabook.load(folder).lr == 0.7
    update(folder, 2, 3)
    assert metabook.load(folder).lr == 0.7
    hidden = folder / ".learner.safetensors.before"
    hidden.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="only one of the two files was replaced"):
        metabook.load(folder)
    (folder / "elsewhere").rename(hidden)
    save(folder, MAML(MLP([2, 8, 3]), lr=0.9))
    assert metabook.load(folder).lr == 0.9 and not hidden.exists()
    hidden.write_bytes(b"left by somebody")
    (folder / "config.json").write_text("{")  # and nobody knows what was meant
    save(folder, MAML(MLP([2, 8, 3]), lr=0.6))
    assert metabook.load(folder).lr == 0.6 and not hidden.exists()
    # cell 74b3ee62
    learner = MAML(MLP([2, 8, 3]))
    folder = save(fresh(), learner)
    with pytest.raises(TypeError, match="JSON"):
        save(folder, MAML(MLP([2, 8, 3])), note=torch.ones(1))  # a tensor is no JSON value
    original, os.fsync = os.fsync, lambda *file: (_ for _ in ()).throw(OSError("disk full"))
    try:
        with pytest.raises(OSError, match="disk full"):
            save(folder, MAML(MLP([2, 8, 3])))
    finally:
        os.fsync = original
    assert torch.equal(predictions(metabook.load(folder)), predictions(learner))
    assert len(list(folder.iterdir())) == 2


def test_what_is_packed_comes_out_again():
    # cell e6e99f56
    state = {"a": {0: torch.ones(2), 1: [1.5, None]}, "a.0": torch.zeros(3), "items": True, 3: {}}
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(packed, tensors)
    assert list(again) == ["a", "a.0", "items", 3] and again["a"][1] == [1.5, None]
    assert torch.equal(again["a"][0], torch.ones(2)) and torch.equal(again["a.0"], torch.zeros(3))
    with pytest.raises(TypeError, match=r"run.a=<object .* cannot be written as JSON"):
        pack({"a": object()}, {})


def test_the_last_checkpoints_are_kept():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell 6d0d32a8
    folder = fresh()
    assert newest_checkpoint(folder) is None
    for step in (5, 99_999_999, 100_000_000):
        write_checkpoint(folder, step, {"x": torch.full((2,), float(step))}, keep=2)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith("json")] == ["step-100000000.json", "step-99999999.json"]
    assert len(names) == 4
    assert newest_checkpoint(folder)["x"].tolist() == [1e8, 1e8]
    (folder / "checkpoints" / "step-00000006.json.mine").write_text("a copy by somebody")
    write_checkpoint(
        folder, 7, {}, keep=2
    )  # a run that went back: what came later is another story
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.json.mine", "step-00000007.json", "step-00000007.safetensors"]


def test_damage_is_told_and_the_one_before_is_used():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell e6e99f56
    state = {"a": {0: torch.ones(2), 1: [1.5, None]}, "a.0": torch.zeros(3), "items": True, 3: {}}
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(packed, tensors)
    assert list(again) == ["a", "a.0", "items", 3] and again["a"][1] == [1.5, None]
    assert torch.equal(again["a"][0], torch.ones(2)) and torch.equal(again["a.0"], torch.zeros(3))
    with pytest.raises(TypeError, match=r"run.a=<object .* cannot be written as JSON"):
        pack({"a": object()}, {})

    # cell 43ac94ca
    def heard(f):
        "What `f` does, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    # cell 6d0d32a8
    folder = fresh()
    assert newest_checkpoint(folder) is None
    for step in (5, 99_999_999, 100_000_000):
        write_checkpoint(folder, step, {"x": torch.full((2,), float(step))}, keep=2)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith("json")] == ["step-100000000.json", "step-99999999.json"]
    assert len(names) == 4
    assert newest_checkpoint(folder)["x"].tolist() == [1e8, 1e8]
    (folder / "checkpoints" / "step-00000006.json.mine").write_text("a copy by somebody")
    write_checkpoint(
        folder, 7, {}, keep=2
    )  # a run that went back: what came later is another story
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.json.mine", "step-00000007.json", "step-00000007.safetensors"]

    # cell 458d04f8
    def cut(path):
        path.write_bytes(path.read_bytes()[:-3])

    def alter(path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    def other_number(path):
        path.write_text(path.read_text().replace("0.25", "0.75"))

    for which, damage, reason in [
        (".json", cut, "Unterminated|Expecting"),
        (".json", other_number, "altered since"),
        (".json", lambda p: p.write_text("[" * 100_000), "Recursion"),
        (".json", lambda p: p.write_text("[]"), "list indices"),
        (".safetensors", cut, "checksum"),
        (".safetensors", alter, "checksum"),
        (".safetensors", lambda p: p.unlink(), "No such file"),
    ]:
        folder = fresh()
        write_checkpoint(folder, 1, {"x": torch.ones(9)})
        newest = write_checkpoint(folder, 2, {"x": torch.zeros(9), "rate": 0.25})
        damage(newest.with_suffix(which))
        state, said = heard(lambda f=folder: newest_checkpoint(f))
        assert state["x"].sum() == 9 and len(said) == 1, (which, said)
        assert "step-00000002" in said[0] and re.search(reason, said[0]), said
        cut(folder / "checkpoints" / "step-00000001.json")
        with pytest.raises(ValueError, match="has 2 checkpoints, and none of them can be read"):
            heard(lambda f=folder: newest_checkpoint(f))


def test_one_process_at_a_time():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell e6e99f56
    state = {"a": {0: torch.ones(2), 1: [1.5, None]}, "a.0": torch.zeros(3), "items": True, 3: {}}
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(packed, tensors)
    assert list(again) == ["a", "a.0", "items", 3] and again["a"][1] == [1.5, None]
    assert torch.equal(again["a"][0], torch.ones(2)) and torch.equal(again["a.0"], torch.zeros(3))
    with pytest.raises(TypeError, match=r"run.a=<object .* cannot be written as JSON"):
        pack({"a": object()}, {})

    # cell 43ac94ca
    def heard(f):
        "What `f` does, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    # cell 6d0d32a8
    folder = fresh()
    assert newest_checkpoint(folder) is None
    for step in (5, 99_999_999, 100_000_000):
        write_checkpoint(folder, step, {"x": torch.full((2,), float(step))}, keep=2)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith("json")] == ["step-100000000.json", "step-99999999.json"]
    assert len(names) == 4
    assert newest_checkpoint(folder)["x"].tolist() == [1e8, 1e8]
    (folder / "checkpoints" / "step-00000006.json.mine").write_text("a copy by somebody")
    write_checkpoint(
        folder, 7, {}, keep=2
    )  # a run that went back: what came later is another story
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.json.mine", "step-00000007.json", "step-00000007.safetensors"]

    # cell 458d04f8
    def cut(path):
        path.write_bytes(path.read_bytes()[:-3])

    def alter(path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    def other_number(path):
        path.write_text(path.read_text().replace("0.25", "0.75"))

    for which, damage, reason in [
        (".json", cut, "Unterminated|Expecting"),
        (".json", other_number, "altered since"),
        (".json", lambda p: p.write_text("[" * 100_000), "Recursion"),
        (".json", lambda p: p.write_text("[]"), "list indices"),
        (".safetensors", cut, "checksum"),
        (".safetensors", alter, "checksum"),
        (".safetensors", lambda p: p.unlink(), "No such file"),
    ]:
        folder = fresh()
        write_checkpoint(folder, 1, {"x": torch.ones(9)})
        newest = write_checkpoint(folder, 2, {"x": torch.zeros(9), "rate": 0.25})
        damage(newest.with_suffix(which))
        state, said = heard(lambda f=folder: newest_checkpoint(f))
        assert state["x"].sum() == 9 and len(said) == 1, (which, said)
        assert "step-00000002" in said[0] and re.search(reason, said[0]), said
        cut(folder / "checkpoints" / "step-00000001.json")
        with pytest.raises(ValueError, match="has 2 checkpoints, and none of them can be read"):
            heard(lambda f=folder: newest_checkpoint(f))
    # cell 3e81edb8
    folder = fresh()
    refused = pytest.raises(FileExistsError, match="another process is training into")
    with occupied(folder), refused, occupied(folder):
        pass
    with occupied(folder), occupied(None):
        pass


def test_the_dice_fall_as_they_would_have():
    # cell 7614b6d9
    before = random_state()
    first = torch.rand(3)
    restore_random(before)
    assert torch.equal(first, torch.rand(3))


def test_what_differs_is_named():
    # cell ddcb3616
    maml = {"name": "maml", "args": {"lr": 0.4, "net": {"name": "mlp", "args": {"sizes": [1, 8]}}}}
    wide = {"name": "maml", "args": {"lr": 0.4, "net": {"name": "mlp", "args": {"sizes": [1, 9]}}}}
    assert differences(maml, maml) == []
    assert differences({"learner": maml}, {"learner": wide}) == [
        "learner.args.net.args.sizes was [1, 8] and is [1, 9]"
    ]
    other = {"name": "protonet", "args": {}}
    assert differences({"learner": maml}, {"learner": other}) == [
        "learner was 'maml' and is 'protonet'"
    ]
    assert differences({"seed": 0}, {}) == ["seed was 0 and is None"]


def test_a_killed_run_goes_on_to_the_bit():
    # cell 7f37a552
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    # cell bd42338f
    def broken(damage):
        "A trained folder after something happened to it."
        folder = save(
            fresh(), MAML(MLP([2, 8, 3])), layout=7
        )  # a name that is taken changes nothing
        damage(folder)
        return folder

    def edit(folder, change):
        "Change the configuration of a trained folder and leave its parameters alone."
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    # cell e6e99f56
    state = {"a": {0: torch.ones(2), 1: [1.5, None]}, "a.0": torch.zeros(3), "items": True, 3: {}}
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(packed, tensors)
    assert list(again) == ["a", "a.0", "items", 3] and again["a"][1] == [1.5, None]
    assert torch.equal(again["a"][0], torch.ones(2)) and torch.equal(again["a.0"], torch.zeros(3))
    with pytest.raises(TypeError, match=r"run.a=<object .* cannot be written as JSON"):
        pack({"a": object()}, {})

    # cell 43ac94ca
    def heard(f):
        "What `f` does, and what the library said meanwhile."
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("metabook").addHandler(handler)
        try:
            return f(), said
        finally:
            logging.getLogger("metabook").removeHandler(handler)

    # cell 6d0d32a8
    folder = fresh()
    assert newest_checkpoint(folder) is None
    for step in (5, 99_999_999, 100_000_000):
        write_checkpoint(folder, step, {"x": torch.full((2,), float(step))}, keep=2)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith("json")] == ["step-100000000.json", "step-99999999.json"]
    assert len(names) == 4
    assert newest_checkpoint(folder)["x"].tolist() == [1e8, 1e8]
    (folder / "checkpoints" / "step-00000006.json.mine").write_text("a copy by somebody")
    write_checkpoint(
        folder, 7, {}, keep=2
    )  # a run that went back: what came later is another story
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.json.mine", "step-00000007.json", "step-00000007.safetensors"]

    # cell 458d04f8
    def cut(path):
        path.write_bytes(path.read_bytes()[:-3])

    def alter(path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    def other_number(path):
        path.write_text(path.read_text().replace("0.25", "0.75"))

    for which, damage, reason in [
        (".json", cut, "Unterminated|Expecting"),
        (".json", other_number, "altered since"),
        (".json", lambda p: p.write_text("[" * 100_000), "Recursion"),
        (".json", lambda p: p.write_text("[]"), "list indices"),
        (".safetensors", cut, "checksum"),
        (".safetensors", alter, "checksum"),
        (".safetensors", lambda p: p.unlink(), "No such file"),
    ]:
        folder = fresh()
        write_checkpoint(folder, 1, {"x": torch.ones(9)})
        newest = write_checkpoint(folder, 2, {"x": torch.zeros(9), "rate": 0.25})
        damage(newest.with_suffix(which))
        state, said = heard(lambda f=folder: newest_checkpoint(f))
        assert state["x"].sum() == 9 and len(said) == 1, (which, said)
        assert "step-00000002" in said[0] and re.search(reason, said[0]), said
        cut(folder / "checkpoints" / "step-00000001.json")
        with pytest.raises(ValueError, match="has 2 checkpoints, and none of them can be read"):
            heard(lambda f=folder: newest_checkpoint(f))
    # cell 3e81edb8
    folder = fresh()
    refused = pytest.raises(FileExistsError, match="another process is training into")
    with occupied(folder), refused, occupied(folder):
        pass
    with occupied(folder), occupied(None):
        pass
    # cell 7614b6d9
    before = random_state()
    first = torch.rand(3)
    restore_random(before)
    assert torch.equal(first, torch.rand(3))
    # cell 520d4a14
    JOB = """
    import os, signal, sys, torch, metabook.checkpoints
    from metabook.episodes import Sinusoids
    from metabook.maml import MAML
    from metabook.networks import MLP
    from metabook.training import fit

    folder, what, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def rate(taken):  # a schedule under which the process dies at a step
        if what == "at step" and taken == when:
            die()
        return 1 / (1 + taken / 10)

    rename = os.replace

    def replace(source, target):  # and a disk under which it dies while a checkpoint gets its names
        its = target.name.startswith(f"step-{when:08d}")
        if its and what == "before" and target.suffix == ".safetensors":
            die()
        if its and what == "between" and target.suffix == ".json":
            die()
        rename(source, target)

    class Noisy(Sinusoids):  # draws from the global random numbers, too
        def gather(self, indices):
            episode = super().gather(indices)
            return episode._replace(query=episode.query._replace(
                y=episode.query.y + 0.1 * torch.randn(episode.query.y.shape)))

    os.replace = replace
    torch.manual_seed(0)
    learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression")
    fit(
        learner, Noisy(5, 10), steps=30, meta_batch=4, schedule=rate, every=5, log_every=2,
        validate=Sinusoids(5, 15).freeze(20), folder=folder, resume=True, progress=False,
    )
"""

    def job(folder, what="never", when=0):
        "Train in a process of its own: is it still alive at the end, and what did it say?"
        command = [sys.executable, "-c", textwrap.dedent(JOB), str(folder), what, str(when)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode == 0, done.stderr

    def left(folder):
        "What a run left behind: parameters, the newest checkpoint, and the log without its clock."
        clocks = ("seconds", "tasks_per_second")
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in row.items() if k not in clocks} for row in rows]
        state = newest_checkpoint(folder)
        tensors = {}
        pack({k: v for k, v in state.items() if k != "seconds"}, tensors)
        return metabook.load(folder).state_dict() | tensors, rows

    # cell f06b3eac
    wanted = fresh() / "run"
    assert job(wanted)[0]
    tensors, rows = left(wanted)
    assert len(rows) == 1 + 15 + 6  # settings, losses, validations

    for what, times, before in (
        ("at step", (3, 17), 15),
        ("before", (5, 20), 15),  # nothing of this checkpoint has its name
        ("between", (20, 25), 20),  # its tensors have, its JSON file has not
    ):
        folder = fresh() / "run"
        for when in times:  # killed, started again, killed again, ...
            assert not job(folder, what, when)[0]
        alive, said = job(folder)
        assert alive and f"going on after step {before}" in said, said
        again, rows_again = left(folder)
        assert rows_again == rows, what
        assert again.keys() == tensors.keys() and len(tensors) > 20
        assert all(torch.equal(value, again[name]) for name, value in tensors.items()), what
