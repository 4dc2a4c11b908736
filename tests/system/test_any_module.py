"""Any module, any caller: inputs of users, each with its right value or its refusal.

Every test holds the library against a plain loop that is written here, in float64.
"""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from metabook import lending, primitives, trust
from metabook.classes import Classes
from metabook.engine import Engine, gradients, losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.meta_lstm import MetaLSTM
from metabook.networks import MLP, Conv4
from metabook.pgn import PGN
from metabook.processes import Shared
from metabook.prototypes import ProtoNet
from metabook.runs import Run
from metabook.scores import evaluate
from metabook.structures import tree_map
from metabook.training import Outer, fit

QUIET = {"meta_batch": 2, "progress": False}
VECTORS = FewShot(
    Classes.of({str(i): torch.randn(8, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(6)}),
    2, 1, 3,
)  # fmt: skip
SENTENCES = FewShot(
    Classes.of({str(i): torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)}),
    2, 1, 3,
)  # fmt: skip


def waves(n: int = 8, shot: int = 10) -> Episode:
    return Sinusoids(shot, 10).sample(n, torch.Generator().manual_seed(0)).to(None, torch.float64)


def by_hand(net: nn.Module, episodes: Episode, lr: float, steps: int) -> list[Tensor]:
    """The meta-gradient of MAML for squared errors: `torch.autograd` and copies, nothing else."""
    total = 0
    for i in range(len(episodes.support.x)):
        x, y, qx, qy = (t[i] for part in episodes for t in part[:2])
        phi = dict(net.named_parameters())
        for _ in range(steps):
            loss = (run(net, phi, x) - y).square().mean()
            found = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {k: p - lr * g for (k, p), g in zip(phi.items(), found, strict=True)}
        total = total + (run(net, phi, qx) - qy).square().mean() / len(episodes.support.x)
    return list(torch.autograd.grad(total, list(net.parameters())))


def run(net: nn.Module, phi: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(net, phi, (x,))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(16),
    "batch": lambda: nn.BatchNorm1d(16, track_running_stats=False),
    "group": lambda: nn.GroupNorm(1, 16),
    "weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lift", ["auto", "loop", "vmap"])
def test_the_meta_gradient_through_a_normalisation_is_that_of_a_plain_loop(norm: str, lift: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), NORMS[norm](), nn.Tanh(), nn.Linear(16, 1)).double()
    learner, episodes = MAML(net, lr=0.1, steps=5, kind="regression").train(), waves()
    if norm == "weight":  # PyTorch's own second derivative is wrong on a CPU, so the loop is ours
        with primitives.composing(primitives.TWICE):
            wanted = by_hand(net, episodes, 0.1, 5)
    else:
        wanted = by_hand(net, episodes, 0.1, 5)
    losses(learner, episodes, lift).mean().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], wanted, rtol=1e-9, atol=1e-11)


def test_the_padding_of_an_embedding_does_not_learn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 6, padding_idx=0), nn.Flatten(), nn.Linear(24, 2))
    tokens = {str(i): torch.randint(0, 20, (8, 4)) * torch.tensor([1, 1, 1, 0]) for i in range(6)}
    learner = MAML(net, lr=0.1)
    fit(learner, FewShot(Classes.of(tokens), 2, 1, 3), steps=20, lr=0.01, **QUIET)
    assert not net[0].weight[0].any() and net[0].weight[1].any()


class Repeated(nn.Module):
    """One layer under two names, and a part that is reached by a third."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(4, 4)
        self.layers, self.head = nn.ModuleList([block, block]), nn.Linear(4, 2)
        self.first = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("method", [MAML, MetaLSTM, PGN])
def test_asking_leaves_every_parameter_as_it_was(method):
    torch.manual_seed(0)
    learner = method(Repeated()).eval()
    before = copy.deepcopy(learner.state_dict())
    task = Examples(torch.ones(4, 4), torch.eye(2).repeat(2, 1))
    answers = [learner(task, torch.ones(1, 4)) for _ in range(2)]
    assert torch.equal(*answers)
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())


@pytest.mark.parametrize("method", [MAML, MetaLSTM, PGN])
def test_frozen_layers_stay_in_the_inner_loop(method):
    torch.manual_seed(0)
    net = MLP([3, 8, 2])
    net.layers[0].requires_grad_(False)
    learner = method(net, lr=0.5, steps=3).eval()
    phi, _ = learner.adapt(Examples(torch.randn(10, 3), torch.eye(2).repeat(5, 1)))
    assert torch.equal(phi.get("layers.0.weight", net.layers[0].weight), net.layers[0].weight)
    assert not torch.equal(phi["layers.1.weight"], net.layers[1].weight)
    before = copy.deepcopy(net)
    fit(learner, VECTORS, steps=2, **QUIET)
    assert torch.equal(net.layers[0].weight, before.layers[0].weight)
    assert not torch.equal(net.layers[1].weight, before.layers[1].weight)


def test_a_network_without_a_layer_that_learns_is_refused_by_the_inner_loop():
    learner = MAML(MLP([3, 2]).requires_grad_(False))
    with pytest.raises(ValueError, match=r"all 2 parameters of MLP are frozen.*torch\.no_grad"):
        learner(Examples(torch.randn(4, 3), torch.eye(2).repeat(2, 1)), torch.randn(1, 3))


class Detaching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


IDLE: dict[str, tuple[Callable[[], Learner], str]] = {
    "frozen": (lambda: ProtoNet(MLP([3, 4]).requires_grad_(False)), "all 2 parameters of this"),
    "detached": (lambda: ProtoNet(Detaching(3, 4)), "no parameter of this ProtoNet gets a grad.*detach"),
}  # fmt: skip


@pytest.mark.parametrize("name", IDLE)
def test_training_that_would_change_nothing_is_refused(name: str):
    made, why = IDLE[name]
    with pytest.raises(ValueError, match=why):
        fit(made(), VECTORS, steps=2, **QUIET)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(off):
    with (
        off(),
        pytest.raises(ValueError, match=f"gradients are switched off here .torch.{off.__name__}"),
    ):
        fit(ProtoNet(MLP([3, 4])), VECTORS, steps=2, **QUIET)


def poisoned(tasks: int) -> Episode:
    episodes = tree_map(torch.clone, Sinusoids().sample(tasks, torch.Generator().manual_seed(0)))
    episodes.query.y[-1] = float("nan")
    return episodes


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_the_first_step_after_a_rejected_one_is_a_first_step(name: str, how: str):
    torch.manual_seed(0)
    start = MAML(MLP([1, 8, 1]), kind="regression", lr=0.01)
    bad = poisoned(3)
    ends = []
    for rejected in (0, 2):
        learner = copy.deepcopy(start)
        outer = Outer(learner, OPTIMIZERS[name](learner.param_groups()), engine=Engine(run=how))
        for _ in range(rejected):
            outer.turn(bad)
            outer.guard.verdict.forget()
        outer.turn(tree_map(lambda t: t[:2], bad))
        ends.append([p.detach().clone() for p in learner.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_step_without_a_skipped_task_is_that_of_the_others():
    torch.manual_seed(0)
    start, bad, ends = MAML(MLP([1, 8, 1]), kind="regression", lr=0.01), poisoned(3), []
    for episodes in (bad, tree_map(lambda t: t[:2], bad)):
        learner = copy.deepcopy(start)
        engine = Engine(nonfinite="skip")
        Outer(learner, torch.optim.Adam(learner.param_groups(), lr=0.01), engine=engine).step(
            episodes
        )
        ends.append([p.detach().clone() for p in learner.parameters()])
    torch.testing.assert_close(*ends)


def test_steps_that_draw_are_not_computed_again():
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 1))
    learner = MAML(net.double(), lr=0.1, steps=3, kind="regression").train()
    for lift in ("auto", "loop"):
        with pytest.raises(
            ValueError, match=r"recompute=True, but an inner step .* random numbers"
        ):
            gradients(learner, waves(4), lift=lift, recompute=True)
    assert "step" not in vars(learner)
    gradients(learner.eval(), waves(4), lift="loop", recompute=True)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.b = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean(1))


@pytest.mark.parametrize("lift", ["auto", "loop", "vmap"])
def test_a_transformer_learns_in_inner_steps(lift: str):
    torch.manual_seed(0)
    fit(MAML(Attentive()), SENTENCES, steps=1, engine=Engine(lift=lift), **QUIET)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.all = nn.Linear(1, 8), nn.Linear(8, 1), []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.a(x).tanh()
        self.all.append(self.hidden)
        return self.b(self.hidden)


@pytest.mark.parametrize("lift", ["auto", "loop"])
def test_after_training_a_network_can_be_copied_and_saved(lift: str):
    learner = MAML(Remembering(), kind="regression", lr=0.01)
    fit(learner, Sinusoids(), steps=2, engine=Engine(lift=lift), **QUIET)
    twin = copy.deepcopy(learner)
    torch.save(learner, io.BytesIO())
    task = waves(1).to(None, torch.float32)
    asked = Examples(task.support.x[0], task.support.y[0]), task.query.x[0]
    torch.testing.assert_close(twin(*asked), learner(*asked))


@pytest.mark.parametrize("method", ["protonet", "maml", "pgn", "own weights"])
def test_eight_threads_get_the_answers_of_one(method: str):
    torch.manual_seed(0)
    made = {
        "protonet": lambda: ProtoNet(Conv4(width=4, stats="support")),
        "maml": lambda: MAML(Conv4(out=2, width=4, stats="support"), steps=2),
        "pgn": lambda: PGN(Conv4(out=2, width=4), hidden=8, steps=1),
        "own weights": lambda: MAML(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), steps=3),
    }
    learner = made[method]().eval()
    before = copy.deepcopy(learner.state_dict())
    images = Classes.of({str(i): torch.randn(8, 1, 28, 28) * (i + 1) for i in range(6)})
    many = FewShot(images, 2, 2, 4).sample(32)
    tasks = [(Examples(x, y), q) for x, y, q in zip(*many.support[:2], many.query.x, strict=True)]

    def ask(task: tuple[Examples, Tensor]) -> Tensor:
        with torch.no_grad():
            state = learner.adapt(task[0])
            return torch.cat([learner(*task), learner.predict(state, task[1])])

    alone = [ask(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, tasks))
    assert all(map(torch.equal, together, alone))
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())


def test_two_threads_cannot_train_one_learner():
    learner = ProtoNet(MLP([3, 4]))

    def train() -> Run:
        return fit(learner, VECTORS, steps=1, **QUIET)

    with lending.claiming(learner), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match=r"ProtoNet is being trained.* in another thread"):
            pool.submit(train).result()
        with pytest.raises(RuntimeError, match="in another thread"):
            pool.submit(evaluate, learner, VECTORS, 2).result()
    train()


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def test_what_cannot_be_lifted_is_looped_and_said_once(caplog):
    learner = ProtoNet(Last())
    with caplog.at_level(logging.WARNING):
        fit(learner, SENTENCES, steps=3, **QUIET)
        evaluate(learner, SENTENCES, 4, queries="single")
        evaluate(learner, SENTENCES, 4, queries="single", engine=Engine(lift="loop"))
    assert [r.getMessage() for r in caplog.records] == [
        "ProtoNet takes its tasks in a loop: embed.rnn (LSTM): PyTorch has no rule for many tasks at once"
    ]
    with pytest.raises(RuntimeError, match=r'lift="vmap" for ProtoNet: embed.rnn \(LSTM\)'):
        evaluate(learner, SENTENCES, 4, engine=Engine(lift="vmap"))


@pytest.mark.parametrize("lift", ["auto", "loop", "vmap"])
def test_running_buffers_in_an_inner_step_are_refused_with_the_way_out(lift: str):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(RuntimeError, match=r"net.1 \(BatchNorm1d\).*metabook.networks.BatchNorm"):
        fit(MAML(net), VECTORS, steps=1, engine=Engine(lift=lift), **QUIET)
    net[1].eval()
    fit(MAML(net), VECTORS, steps=1, engine=Engine(lift=lift), **QUIET)


class Saving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False).tanh())


@pytest.mark.parametrize("method", [MAML, PGN])
def test_activations_that_would_be_computed_again_with_other_weights_are_refused(method):
    with pytest.raises(RuntimeError, match=r"hooks on saved tensors.*recompute=True"):
        fit(method(Saving()), VECTORS, steps=1, **QUIET)


def test_a_trial_disturbs_nothing():
    class Odd(nn.Linear):
        pass

    learner = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), Odd(8, 1)), kind="regression").train()
    learner.register_buffer("kept", torch.ones(2))
    state, before = torch.get_rng_state(), copy.deepcopy(learner.state_dict())
    losses(learner, waves(4).to(None, torch.float32))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())


def test_arguments_of_the_first_version_still_work():
    with pytest.warns(
        DeprecationWarning, match=r"say engine=Engine\(lift='loop', precision='float32'\)"
    ):
        evaluate(ProtoNet(MLP([3, 4])), VECTORS, 2, lift="loop", precision="float32")
    with pytest.warns(DeprecationWarning, match="say engine="):
        fit(ProtoNet(MLP([3, 4])), VECTORS, steps=1, lift="graph", chunk=1, **QUIET)
    with pytest.raises(TypeError, match="unknown argument 'lifts'"):
        fit(ProtoNet(MLP([3, 4])), VECTORS, steps=1, lifts="loop", **QUIET)
    with pytest.raises(ValueError, match="'graph' is a word for run"):
        Engine(lift="graph")


class Assigning(nn.Module):
    """A running average that is replaced, and a state that is carried on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(1, 1), None
        self.register_buffer("average", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(0).detach()
        z = self.layer(x) - self.average
        z, self.last = z if self.last is None else z + self.last, z.mean(0)
        return z


def test_what_a_network_carries_on_is_not_carried_from_task_to_task():
    learner = MAML(Assigning(), kind="regression", lr=0.01).eval()
    first, second = (evaluate(learner, Sinusoids(), 20) for _ in range(2))
    assert torch.equal(first.per_task, second.per_task) and learner.net.last is None


def test_an_average_that_is_replaced_is_kept_in_a_loop_and_refused_in_an_inner_step():
    class Averaging(Assigning):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :1])

    learner = ProtoNet(Averaging())
    fit(learner, VECTORS, steps=2, **QUIET)
    assert learner.embed.average.any()
    with pytest.raises(
        RuntimeError, match="Assigning: it puts a tensor of one task into its buffer"
    ):
        fit(MAML(Assigning(), kind="regression", lr=0.01), Sinusoids(), steps=1, **QUIET)


def test_learners_are_copied_and_saved_while_others_ask():
    torch.manual_seed(0)
    learner = MAML(MLP([3, 16, 2]), steps=3).eval()
    before = copy.deepcopy(learner.state_dict())
    task = Examples(torch.randn(4, 3), torch.eye(2).repeat(2, 1)), torch.randn(2, 3)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(learner, *task) for _ in range(60)]
        for _ in range(60):
            for state in (learner.state_dict(), copy.deepcopy(learner).state_dict()):
                assert all(torch.equal(v, before[k]) for k, v in state.items())
        assert all(torch.equal(a.result(), asked[0].result()) for a in asked)


def test_a_network_that_cannot_be_copied_is_looped():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    net.lock = threading.Lock()
    learner = MAML(net.double(), kind="regression", lr=0.01).train()
    torch.testing.assert_close(losses(learner, waves(3)), losses(learner, waves(3), "loop"))


COMPILED = """
import copy, torch
from torch import nn
from metabook import engine
from metabook.episodes import Sinusoids
from metabook.maml import MAML

compiled = torch.compile(engine._lifted, backend="eager")
engine._compiled = lambda: compiled
waves = Sinusoids(10, 10).sample(4).to(None, torch.float64)
for layer in (nn.LayerNorm(16), nn.Hardsigmoid()):
    net = nn.Sequential(nn.Linear(1, 16), layer, nn.Tanh(), nn.Linear(16, 1)).double()
    learner, found = MAML(net, lr=0.1, steps=2, kind="regression").train(), []
    for how in ({"lift": "vmap", "compiled": True}, {"lift": "loop"}):
        learner.zero_grad()
        engine.gradients(learner, waves, **how)
        found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
"""


def test_a_compiled_step_is_composed_too():
    """In a process of its own: a compiler does not read through what checks shapes in tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("here, others, verdict", [
    ("", [0.0, 1.0], "in another process its lift is not right"),
    ("mine", [0.0, 1.0], "mine"),
    ("", [1.0, 0.0], None),
    ("", [0.0, 0.0], ""),
])  # fmt: skip
def test_all_processes_take_the_worst_verdict(here, others, verdict, monkeypatch):
    def summed(tensors: list[Tensor]) -> None:
        tensors[0] += torch.tensor(others)

    monkeypatch.setattr(trust, "summed_", summed)
    assert trust._agreed(here, Shared(4, 0, 2)) == verdict
