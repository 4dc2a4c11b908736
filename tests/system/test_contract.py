"""Every learner of the library keeps the contract, and learners that do not are found out.

The checks themselves are shown one by one in nbs/A15_contract.ipynb.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from samples import learner_on

from metabook import engine, learners
from metabook.classes import Classes
from metabook.episodes import Examples, FewShot, Sinusoids, Tasks
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.registry import methods
from metabook.testing import ContractError, check_learner, unregistered_learners
from metabook.transfer import Batches, FineTune, Pretrained

WAY, SIZE, WIDTH = 3, 16, 8

# For a method whose network ends in a head, the number of outputs is given; None asks for an embedding.
NETWORKS: dict[str, Callable[[int | None], torch.nn.Module]] = {
    "mlp": lambda out: MLP([SIZE * SIZE, 12, out or 6]),
    **{
        f"conv4-{pool}-{stats}": lambda out, pool=pool, stats=stats: Conv4(
            out=out, size=SIZE, width=WIDTH, pool=pool, stats=stats
        )
        for pool in ("max", "stride")
        for stats in ("batch", "support", "running")
    },
}


def pictures() -> Tasks:
    """Classification tasks of small random images, as bytes as data sets hold them."""
    images = torch.randint(0, 256, (5, 6, 1, SIZE, SIZE), dtype=torch.uint8)
    return FewShot(Classes.of({str(i): x for i, x in enumerate(images)}), WAY, 2, 2)


def settings() -> Iterator[tuple[str, str, str]]:
    """What every method of the book is built for: its name, the kind of tasks, the network."""
    for name, method in methods().items():
        if not method.__module__.startswith("metabook."):
            continue
        free = "kind" in inspect.signature(method).parameters
        if free or method.kind == "classification":
            yield from ((name, "classification", network) for network in NETWORKS)
        if free or method.kind == "regression":
            yield name, "regression", "mlp"


def build(name: str, kind: str, network: str, **how: int) -> Learner:
    """A method on a small network."""
    method = methods()[name]
    outputs = WAY if kind == "classification" else 1
    head = outputs if method.head else None
    net = NETWORKS[network](head) if kind == "classification" else MLP([1, 12, head or 6])
    takes = inspect.signature(method).parameters
    given = {"kind": kind} if "kind" in takes else {}
    given |= {"steps": 2} if "steps" in takes else {}  # no promise is about their number
    features = net(torch.rand(2, 1, SIZE, SIZE) if kind == "classification" else torch.rand(2, 1))
    return learner_on(name, net, features.shape[1], **given | how)


def flaws(learner: Learner, tasks: Tasks) -> set[str]:
    """The checks that a learner fails."""
    try:
        check_learner(learner, tasks)
    except ContractError as error:
        return set(error.flaws)
    return set()


@pytest.mark.parametrize("name, kind, network", list(settings()))
def test_every_registered_method_keeps_the_contract(name: str, kind: str, network: str):
    check_learner(
        build(name, kind, network), pictures() if kind == "classification" else Sinusoids()
    )


@pytest.mark.parametrize("method", [Pretrained, FineTune])
@pytest.mark.parametrize("logits", ["linear", "cosine"])
def test_what_pre_trains_keeps_the_contract_on_batches(method: type[Learner], logits: str):
    batches = Batches(pictures().classes, size=6)
    net = NETWORKS["conv4-stride-running"](None)
    check_learner(method(net, classes=5, logits=logits), batches)


HOW = {"compile": {"lift": "vmap", "compiled": True}}


def meta_gradients(learner: Learner, tasks: Tasks, lift: str) -> list[torch.Tensor]:
    """Losses and meta-gradient of three tasks."""
    learner = copy.deepcopy(learner).double().train()
    episodes = tasks.sample(3, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    graded = engine.gradients(learner, episodes, **HOW.get(lift, {"lift": lift}))
    return [graded.losses, *(p.grad for p in learner.parameters() if p.grad is not None)]


@pytest.fixture
def compiling(monkeypatch) -> Callable[[str], None]:
    """Choose what `run="compile"` compiles with; nothing of other tests is remembered."""

    def choose(backend: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(engine._lifted, backend=backend)
        monkeypatch.setattr(engine, "_compiled", lambda: compiled)

    yield choose
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted({name for name, *_ in settings()}))
def test_what_a_compiler_sees_is_what_runs(name: str, compiling):
    """The whole way through the compiler but for the code that it writes, so none is needed here."""
    compiling("aot_eager")
    kind = next(kind for n, kind, _ in settings() if n == name)
    few = {"steps": 1} if "steps" in inspect.signature(methods()[name]).parameters else {}
    learner = build(name, kind, "mlp", **few)  # a compiler reads every step
    tasks = pictures() if kind == "classification" else Sinusoids()
    wanted = meta_gradients(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradients(learner, tasks, "compile"), wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on the path")
def test_compiled_code_computes_the_same(compiling):
    compiling("inductor")
    learner, tasks = build("maml", "classification", "conv4-max-running"), pictures()
    wanted = meta_gradients(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradients(learner, tasks, "compile"), wanted)


def test_every_exported_learner_is_registered():
    assert unregistered_learners() == []


def test_an_exported_learner_that_nobody_registered_is_named(monkeypatch):
    monkeypatch.setattr(learners, "Stray", type("Stray", (Learner,), {}), raising=False)
    monkeypatch.setattr(learners, "__all__", [*learners.__all__, "Stray"])
    assert unregistered_learners() == ["metabook.learners.Stray"]


def test_the_device_of_the_learner_is_the_one_that_is_checked(device):
    check_learner(ProtoNet(Conv4(size=SIZE, width=WIDTH, stats="support")).to(device), pictures())
    maml = MAML(MLP([1, 12, 1]), 0.01, steps=2, kind="regression").to(device)
    check_learner(maml, Sinusoids())


# --- learners that break one promise each


class Detached(ProtoNet):
    """The graph is cut between the support set and the prototypes."""

    def adapt(self, support):
        prototypes, statistics = super().adapt(support)
        return prototypes.detach(), statistics


class Gossip(ProtoNet):
    """Queries are centred on one another, and nothing says so."""

    def predict(self, state, x):
        logits = super().predict(state, x)
        return logits - logits.mean(0)


class Sequential(ProtoNet):
    """What comes last counts most."""

    def adapt(self, support):
        weight = torch.linspace(1, 2, len(support.y)).to(support.y)[:, None]
        return super().adapt(support._replace(y=support.y * weight))


class Partial(ProtoNet):
    """The first class has an advantage, whatever it is."""

    def predict(self, state, x):
        logits = super().predict(state, x)
        return torch.cat([logits[:, :1] + 1, logits[:, 1:]], 1)


class Counting(ProtoNet):
    """A buffer counts the tasks."""

    def __init__(self, embed: torch.nn.Module):
        super().__init__(embed)
        self.register_buffer("tasks", torch.zeros(()))

    def adapt(self, support):
        self.tasks = self.tasks + 1
        return super().adapt(support)


class Drifting(ProtoNet):
    """Adapting changes a parameter in place."""

    def adapt(self, support):
        with torch.no_grad():
            next(self.embed.parameters()).mul_(0.9)
        return super().adapt(support)


class Dice(ProtoNet):
    """Prototypes are jittered by random numbers."""

    def adapt(self, support):
        prototypes, statistics = super().adapt(support)
        return prototypes + torch.rand_like(prototypes), statistics


class Shared(ProtoNet):
    """The prototypes of the last task stay in the learner."""

    def adapt(self, support):
        self.latest = super().adapt(support)
        return ()

    def predict(self, state, x):
        return super().predict(self.latest, x)


class Rounded(ProtoNet):
    """A number leaves the tensors, so the code runs for one task only."""

    def predict(self, state, x):
        return super().predict(state, x) / max(1.0, float(x.abs().max()))


class Narrow(MAML):
    """The inner gradient is taken at detached parameters, and nothing says so."""

    def step(self, phi, support):
        at = {k: p.detach() for k, p in phi.items()}
        g = torch.func.grad(self.support_loss)(at, support)
        return {k: p - self.lr * g[k] for k, p in phi.items()}


class Frozen(ProtoNet):
    """A parameter that the outer optimiser never sees."""

    def param_groups(self):
        return [{"params": list(self.parameters())[1:]}]


class Numb(ProtoNet):
    """Whatever comes is taken, fitting or not."""

    def check(self, support: Examples, query: torch.Tensor) -> None:
        pass


BROKEN = {
    Detached: "gradients_are_true",
    Gossip: "queries_stand_alone",
    Sequential: "support_is_a_set",
    Partial: "classes_are_names",
    Counting: "nothing_is_written",
    Drifting: "nothing_is_written",
    Dice: "adapting_is_deterministic",
    Shared: "state_is_complete",
    Rounded: "loop_equals_vmap",
    Narrow: "gradients_are_true",
    Frozen: "param_groups_are_complete",
    Numb: "misfits_are_refused",
}


@pytest.mark.parametrize("method, check", BROKEN.items(), ids=lambda v: getattr(v, "__name__", v))
def test_a_learner_that_breaks_a_promise_fails_its_check(method: type[Learner], check: str):
    outputs = WAY if method.head else 6
    found = flaws(method(MLP([SIZE * SIZE, 12, outputs])), pictures())
    assert check in found
    assert "survives_saving" in found  # none of them has a name of its own


def test_one_broken_promise_is_not_taken_for_others():
    alone = {Detached, Gossip, Sequential, Partial, Narrow, Frozen}
    for method in alone:
        outputs = WAY if method.head else 6
        found = flaws(method(MLP([SIZE * SIZE, 12, outputs])), pictures())
        assert found == {BROKEN[method], "survives_saving"}, method.__name__


def test_what_is_declared_is_no_flaw():
    declared = {
        Gossip: {"transductive": True},
        Sequential: {"order_invariant": False},
        Partial: {"label_equivariant": False},
        Narrow: {"first_order": True},
    }
    for method, promises in declared.items():
        honest = type(f"Honest{method.__name__}", (method,), promises)
        learner = honest(MLP([SIZE * SIZE, 12, WAY if method.head else 6]))
        for name, value in promises.items():  # MAML sets its own in the constructor
            if getattr(learner, name) != value:
                setattr(learner, name, value)
        assert flaws(learner, pictures()) == {"survives_saving"}, method.__name__
