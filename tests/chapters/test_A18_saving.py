"""Made from nbs/A18_saving.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

import metabook
from metabook.classes import Classes
from metabook.episodes import FewShot
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP, Conv4, ResNet12
from metabook.prototypes import ProtoNet
from metabook.registry import NETWORKS, plain, register
from metabook.saving import rehearse, save, write_atomically


def cell_18000005():
    # cell 18000005
    room = tempfile.TemporaryDirectory()  # goes away with this notebook

    def fresh():
        "A new empty folder."
        return Path(tempfile.mkdtemp(dir=room.name))

    return fresh


def cell_291e6ef6():
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

    return predictions, some_learners, tasks_for


def cell_bd42338f(fresh):
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

    return broken, edit


def test_a_failed_write_leaves_the_old_file():
    fresh = cell_18000005()
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
    fresh = cell_18000005()
    predictions, some_learners, tasks_for = cell_291e6ef6()
    # cell 00063326
    for learner in some_learners():
        before = torch.get_rng_state()
        again = metabook.load(save(fresh(), learner))
        assert torch.equal(before, torch.get_rng_state())
        assert type(again) is type(learner) and not again.training
        assert torch.equal(predictions(learner), predictions(again))
        assert plain("learner", again) == plain("learner", learner)


def test_each_part_keeps_its_precision():
    fresh = cell_18000005()

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
    fresh = cell_18000005()
    # cell 516a67d6
    tied = MAML(MLP([2, 2, 2, 2]))
    tied.net.layers[1].weight = tied.net.layers[0].weight
    reordered = ProtoNet(Conv4(3, size=16, width=4)).to(memory_format=torch.channels_last)
    for learner in (tied, reordered):
        again = metabook.load(save(fresh(), learner)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in learner.state_dict().items())


def test_what_cannot_be_loaded_is_not_trained():
    fresh = cell_18000005()

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
    fresh = cell_18000005()

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
    predictions, some_learners, tasks_for = cell_291e6ef6()

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
    fresh = cell_18000005()
    broken, edit = cell_bd42338f(fresh)

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
    fresh = cell_18000005()
    broken, edit = cell_bd42338f(fresh)

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
    fresh = cell_18000005()
    predictions, some_learners, tasks_for = cell_291e6ef6()
    broken, edit = cell_bd42338f(fresh)
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
