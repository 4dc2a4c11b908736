"""Methods that people write: each is a small learner, as a user would write it, and goes through everything.

It passes `check_learner`, trains the same in every way of lifting, is scored, saved, loaded and resumed; where it
makes sense, the command line trains it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn
from typer.testing import CliRunner

from metabook import cli
from metabook.classes import Classes
from metabook.engine import Engine, gradients, losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids, Tasks, one_hot
from metabook.learners import InnerLoop, Learner, Metric
from metabook.maml import MAML
from metabook.meta_transfer import HardTasks
from metabook.networks import MLP, parameters_of
from metabook.pgn import PGN
from metabook.prototypes import ProtoNet, prototypes
from metabook.registry import METHODS, NETWORKS, register
from metabook.runs import Run
from metabook.saving import load, save
from metabook.scores import Score, evaluate, paired
from metabook.structures import tree_leaves, tree_map
from metabook.testing import check_learner
from metabook.training import Outer, fit

# --- data that people have


class Mixed(Tasks):
    """Points of two classes, many negative and few positive: in some tasks no query is positive."""

    kind = "classification"

    def draw(self, n: int, generator: Generator | None = None) -> Tensor:
        return torch.randn(n, 16, 3, generator=generator)

    def gather(self, indices: Tensor) -> Episode:
        positive = (indices[..., 0] > 1).long()
        positive[:, :2] = torch.tensor([0, 1])  # one of each to learn from
        y = one_hot(positive, 2)
        x = indices + positive[..., None]
        return Episode(Examples(x[:, :8], y[:, :8]), Examples(x[:, 8:], y[:, 8:]))


class Sentences(Tasks):
    """Sentences of different lengths, as tokens and a mask: a class has words of its own."""

    kind = "classification"
    way, shot, length, words = 3, 2, 7, 12

    def draw(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        of_class = torch.stack([torch.randperm(self.words, generator=generator) for _ in range(n)])
        luck = torch.rand(n, 2 * self.way * self.shot, self.length, 2, generator=generator)
        return of_class, luck

    def gather(self, indices: tuple[Tensor, Tensor]) -> Episode:
        of_class, luck = indices
        labels = torch.arange(luck.shape[1]) % self.way
        own = of_class[:, labels, None] if of_class.ndim == 1 else of_class[:, labels][..., None]
        tokens = torch.where(luck[..., 0] < 0.7, own, (luck[..., 1] * self.words).long())
        mask = torch.arange(self.length) < 2 + (luck[..., 0, 1] * 5).long()[..., None]
        x = {"tokens": tokens * mask, "mask": mask}
        y = one_hot(labels, self.way).expand(len(luck), -1, -1)
        half = luck.shape[1] // 2
        first, second = (
            tree_map(lambda t, s=s: t[:, s], x) for s in (slice(half), slice(half, None))
        )
        return Episode(Examples(first, y[:, :half]), Examples(second, y[:, half:]))


class Rows(Tasks):
    """Sequences of five tasks: the same classes, a little further on in each."""

    kind = "classification"

    def draw(self, n: int, generator: Generator | None = None) -> Tensor:
        return torch.randn(n, 5, 2, 6, 3, generator=generator)

    def gather(self, indices: Tensor) -> Episode:
        y = one_hot(torch.arange(6) % 2, 2).expand(*indices.shape[:2], 6, 2)
        x = indices + y[:, :, None, :, :1] * torch.arange(5.0)[:, None, None, None]
        return Episode(Examples(x[:, :, 0], y), Examples(x[:, :, 1], y))


class Arms(Tasks):
    """Bandits with two arms: how likely each pays, and the luck of every round, drawn beforehand."""

    kind = "control"
    rounds = 12

    def draw(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        pays = torch.rand(n, 2, generator=generator)
        return pays, torch.rand(n, 2, self.rounds, 2, generator=generator)

    def gather(self, indices: tuple[Tensor, Tensor]) -> Episode:
        pays, luck = indices
        support, query = luck.unbind(1)
        return Episode(*(Examples(x, (), {"pays": pays}) for x in (support, query)))


class Domains(Sinusoids):
    """Sinusoids that say whether they are high or low."""

    def gather(self, indices: Any) -> Episode:
        support, query = super().gather(indices)
        high = {"domain": (support.info["task"][:, 0] > 2.5).long()}
        return Episode(support._replace(info=support.info | high), query)


def points(classes: int = 6) -> FewShot:
    """Points of three numbers, in clouds."""
    generator = torch.Generator().manual_seed(5)
    clouds = {str(i): torch.randn(8, 3, generator=generator) + i for i in range(classes)}
    return FewShot(Classes.of(clouds), 3, 2, 3)


# --- a learner owns its likelihood and its score


@register("probe-likelihood")
class Likelihood(MAML):
    "Predicts a mean and a logarithm of the variance; judged by the mean."

    def criterion(self, predictions, y):
        mean, log_var = predictions.chunk(2, -1)
        return 0.5 * (log_var + (y - mean).square() * (-log_var).exp()).mean()

    def score(self, predictions, y):
        return (predictions[:, :1] - y).square().mean()


@register("probe-structure")
class Structure(Likelihood):
    "The same, with predictions that have names."

    def predict(self, state, x):
        mean, log_var = super().predict(state, x).chunk(2, -1)
        return {"mean": mean, "log_var": log_var}

    def support_loss(self, phi, support):
        predictions = self.predict((phi, {}), support.x)
        return self.criterion(predictions, support.y)

    def criterion(self, predictions, y):
        both = torch.cat([predictions["mean"], predictions["log_var"]], -1)
        return super().criterion(both, y)

    def score(self, predictions, y):
        return (predictions["mean"] - y).square().mean()


@register("probe-precision")
class Precision(ProtoNet):
    "Judged by average precision, which a task without positives does not have."

    metric = Metric("average precision")

    def score(self, predictions, y):
        positive = y[:, 1].numpy()[(predictions[:, 0] - predictions[:, 1]).argsort().numpy()]
        if not positive.any():
            return None
        return (positive.cumsum() / range(1, 1 + len(positive)))[positive > 0].mean()


# --- inputs and targets are structures


@register("probe-words")
class Words(Learner):
    "Prototypes of sentences: the mean of the embeddings of the words that are there."

    def __init__(self, words: int, d: int = 8):
        super().__init__()
        self.embed = nn.Embedding(words, d)

    def read(self, x):
        there = x["mask"].to(self.embed.weight.dtype)[..., None]
        return (self.embed(x["tokens"]) * there).sum(1) / there.sum(1)

    def adapt(self, support):
        return prototypes(self.read(support.x), support.y)

    def predict(self, state, x):
        return -(self.read(x)[:, None] - state).square().sum(-1)


# --- inner loops


@register("probe-anil")
class ANIL(MAML):
    "MAML that adapts the last layer only."

    def start(self, support):
        return dict(list(parameters_of(self.net).items())[-2:])


@register("probe-meta-sgd")
class MetaSGD(MAML):
    "MAML that learns a rate for each parameter."

    def __init__(self, net: nn.Module, lr: float = 0.01, steps: int = 1, kind: str = "regression"):
        super().__init__(net, lr, steps, kind=kind)
        self.rates = nn.ParameterList(torch.full_like(p, lr) for p in net.parameters())

    def step(self, phi, support):
        g = self.gradient(phi, support)
        return {k: p - r * g[k] for (k, p), r in zip(phi.items(), self.rates, strict=True)}


@register("probe-steps")
class Traced(MAML):
    "Keeps what each inner step saw, as methods with statistics of their own for each step need it."

    def start(self, support):
        return super().start(support), ()

    def step(self, state, support):
        phi, seen = state
        error = self.support_loss(phi, support).detach()
        return super().step(phi, support), (*seen, error)

    def result(self, state, support):
        phi, seen = state
        return *super().result(phi, support), seen

    def predict(self, state, x):
        return super().predict(state[:2], x)


# --- progress


@register("probe-annealed")
class Annealed(MAML):
    "A price on the parameters that falls to zero."

    def loss(self, episode):
        price = sum(p.square().sum() for p in self.net.parameters())
        return super().loss(episode) + (1 - self.progress) * price


@register("probe-halfway")
class Halfway(MAML):
    "First order until half of the training is done."

    def phase_at(self, progress):
        return "exact" if progress >= 0.5 else "first order"

    @property
    def first_order(self):
        return self.phase == "first order"

    @first_order.setter
    def first_order(self, _):
        pass


# --- surrogates, objectives, sequences, wrappers, rollouts


@register("probe-reptile")
class Reptile(MAML):
    "Walks towards the adapted parameters."

    approximate = True

    def loss(self, episode):
        (phi, _), theta = self.adapt(episode.support), parameters_of(self.net)
        return sum(((p - phi[k]).detach() * p).sum() for k, p in theta.items())


@register("probe-hardest")
class Hardest(Reptile):
    "Weighs tasks by how badly they are solved."

    def combine(self, losses):
        return losses.logsumexp(0)


@register("probe-domains")
class WorstDomain(MAML):
    "Trained on the domain with the larger mean loss."

    def combine(self, losses, info):
        high = info["domain"].to(losses.dtype)
        means = [(losses * w).sum() / (w.sum() + 1e-6) for w in (high, 1 - high)]
        return torch.stack(means).logsumexp(0)


@register("probe-sequence")
class Carried(Learner):
    "Solves the tasks of a sequence one after the other, each from what it knew before."

    order_invariant, transductive = False, True  # an item is a sequence

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.keep = nn.Parameter(torch.tensor(0.0))

    def check(self, support, query):
        if query.ndim != 3:
            raise ValueError(f"query of shape {tuple(query.shape)}, expected a sequence [T, n, d]")

    def adapt(self, support):
        z, known, all_of_them = self.net(support.x), None, []
        for z_t, y_t in zip(z, support.y, strict=True):
            new, share = prototypes(z_t, y_t), self.keep.sigmoid()
            known = new if known is None else share * known + (1 - share) * new
            all_of_them.append(known)
        return torch.stack(all_of_them)

    def predict(self, state, x):
        return -(self.net(x)[:, :, None] - state[:, None]).square().sum(-1)


@register("probe-wrapper")
class Tempered(Learner):
    "Another learner with a learned temperature."

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner, self.log_t = learner, nn.Parameter(torch.zeros(()))
        self.kind, self.head = learner.kind, learner.head
        self.label_equivariant = learner.label_equivariant

    def adapt(self, support):
        return self.learner.adapt(support)

    def predict(self, state, x):
        return self.learner.predict(state, x) * self.log_t.exp()


@register("probe-bandit")
class Bandit(Learner):
    "Plays some rounds at random, then a soft choice; what that is worth is known exactly."

    kind = "control"
    metric = Metric("expected return", unit="coins")

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(1.0))

    def adapt(self, support):
        arm = one_hot((support.x[:, 0] < 0.5).long(), 2).to(support.x)  # in each round
        paid = (support.x[:, 1] < (arm * support.info["pays"]).sum(-1)).to(arm.dtype)
        return (arm * paid[:, None]).sum(0) / (1 + arm.sum(0)), support.info["pays"]

    def predict(self, state, x):
        seen, pays = state
        return ((self.sure * seen).softmax(-1) * pays).sum(-1).expand(len(x))

    def criterion(self, predictions, y):
        return -predictions.mean()

    def score(self, predictions, y):
        return predictions.mean()


class Probe(NamedTuple):
    make: Callable[[], Learner]
    tasks: Tasks


WAVES = Sinusoids(5, 6)


def wave(cls: type[MAML], **how: Any) -> Callable[[], MAML]:
    """A learner for sinusoids."""
    outputs = 2 if issubclass(cls, Likelihood) else 1
    return lambda: cls(MLP([1, 6, outputs]), lr=0.01, kind="regression", **how)


PROBES = {
    "likelihood": Probe(wave(Likelihood), WAVES),
    "predictions with names": Probe(wave(Structure), WAVES),
    "average precision": Probe(lambda: Precision(MLP([3, 4])), Mixed()),
    "text with a mask": Probe(lambda: Words(Sentences.words), Sentences()),
    "ANIL": Probe(wave(ANIL, steps=2), WAVES),
    "Meta-SGD": Probe(wave(MetaSGD, steps=2), WAVES),
    "something of each step": Probe(wave(Traced, steps=2), WAVES),
    "annealed": Probe(wave(Annealed), WAVES),
    "second order half-way": Probe(wave(Halfway, steps=2), WAVES),
    "Reptile": Probe(wave(Reptile, steps=3), WAVES),
    "inequality over Reptile": Probe(wave(Hardest, steps=3), WAVES),
    "domains": Probe(wave(WorstDomain), Domains(5, 6)),
    "sequences of tasks": Probe(lambda: Carried(MLP3()), Rows()),
    "wrapper": Probe(lambda: Tempered(MAML(MLP([3, 6, 3]))), points()),
    "wrapper of another learner": Probe(lambda: Tempered(ProtoNet(MLP([3, 6]))), points()),
    "bandit": Probe(Bandit, Arms()),
}
EACH = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())


@register("probe-rows", NETWORKS)
class MLP3(nn.Module):
    "A linear layer over the last axis, whatever stands before."

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x)


# Other tests look at every method there is: these are known while a probe is held, and not before.
KNOWN = [
    (registry, name, registry.pop(name))
    for registry in (METHODS, NETWORKS)
    for name in list(registry)
    if name.startswith("probe-")
]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, name, cls in KNOWN:
        monkeypatch.setitem(registry, name, cls)


def fresh(probe: Probe) -> Learner:
    torch.manual_seed(0)
    return probe.make()


QUIET = {"progress": False, "meta_batch": 4, "log_every": 1}


@EACH
def test_it_keeps_the_contract(probe: Probe):
    check_learner(fresh(probe), probe.tasks)


WAYS = {
    "loop": {"lift": "loop"},
    "vmap": {"lift": "vmap"},
    "in chunks": {"lift": "vmap", "chunk": 3},
    "one by one": {"lift": "loop", "chunk": 1},
}


@EACH
def test_it_trains_the_same_in_every_way(probe: Probe):
    found = {}
    for name, how in WAYS.items():
        learner = fresh(probe)
        run = fit(learner, probe.tasks, steps=4, engine=Engine(**how), **QUIET)
        found[name] = torch.tensor(run.curve("loss")[1] + run.curve("gradient_norm")[1])
        assert found[name].isfinite().all()
        if any(isinstance(m, InnerLoop) for m in learner.modules()):
            again = fit(
                fresh(probe), probe.tasks, steps=4, engine=Engine(recompute=True, **how), **QUIET
            )
            torch.testing.assert_close(torch.tensor(again.curve("loss")[1]), found[name][:4])
    for name in WAYS:
        torch.testing.assert_close(found[name], found["loop"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["likelihood", "text with a mask", "annealed", "second order half-way", "Reptile"]
)
def test_it_trains_the_same_when_compiled(name: str):
    found = []
    for how in ({"lift": "vmap"}, {"run": "compile"}):
        run = fit(fresh(PROBES[name]), PROBES[name].tasks, steps=4, engine=Engine(**how), **QUIET)
        found.append(torch.tensor(run.curve("loss")[1] + run.curve("gradient_norm")[1]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@EACH
def test_it_is_scored_saved_and_loaded(probe: Probe, tmp_path: Path):
    learner = fresh(probe)
    run = fit(
        learner, probe.tasks, steps=2, validate=probe.tasks.freeze(6), folder=tmp_path, **QUIET
    )
    frozen = probe.tasks.freeze(9)
    together = learner.transductive or probe.tasks.kind == "control"
    for queries in ("joint",) if together else ("joint", "single"):
        score, again = (evaluate(m, frozen, queries=queries) for m in (learner, load(tmp_path)))
        assert score.metric == learner.metric and torch.equal(score.defined, again.defined)
        looped, lifted = (
            evaluate(learner, frozen, queries=queries, engine=Engine(lift=how))
            for how in ("loop", "vmap")
        )
        torch.testing.assert_close(looped.per_task, lifted.per_task, equal_nan=True)
    assert run.best is not None and math.isfinite(run.best.mean)


@EACH
def test_it_goes_on_where_it_was(probe: Probe, tmp_path: Path):
    whole = fit(fresh(probe), probe.tasks, steps=4, every=1, folder=tmp_path / "whole", **QUIET)
    with pytest.raises(RuntimeError, match="the power failed"):
        fit(
            fresh(probe),
            Failing(probe.tasks, 3),
            steps=4,
            every=1,
            folder=tmp_path / "run",
            **QUIET,
        )
    learner = fresh(probe)
    run = fit(
        learner,
        Failing(probe.tasks, 99),
        steps=4,
        every=1,
        folder=tmp_path / "run",
        resume=True,
        **QUIET,
    )
    assert run.curve("loss") == whole.curve("loss")
    for a, b in zip(learner.parameters(), whole.learner.parameters(), strict=True):
        assert torch.equal(a, b)


class Failing(Tasks):
    """Other tasks; after some draws the power fails."""

    def __init__(self, tasks: Tasks, after: int):
        self.tasks, self.kind, self._left = tasks, tasks.kind, after

    def __repr__(self) -> str:
        return f"Failing({self.tasks})"

    def describe(self) -> dict[str, Any]:
        return self.tasks.describe()

    def draw(self, n: int, generator: Generator | None = None) -> Any:
        self._left -= n > 1  # the look that `fit` takes is one task
        if self._left < 0:
            raise RuntimeError("the power failed")
        return self.tasks.draw(n, generator)

    def gather(self, indices: Any) -> Episode:
        return self.tasks.gather(indices)


ON_THE_COMMAND_LINE = {
    "probe-anil": ("sinusoids", ["--set", "lr=0.01"]),
    "probe-meta-sgd": ("sinusoids", []),
    "probe-annealed": ("sinusoids", ["--set", "lr=0.01"]),
    "probe-halfway": ("sinusoids", ["--set", "lr=0.01"]),
    "probe-reptile": ("sinusoids", ["--set", "lr=0.01", "--set", "steps=3"]),
    "probe-precision": ("glyphs", ["--way", "2", "--net", "width=4"]),
    "probe-wrapper": ("glyphs", ["--set", "learner=protonet", "--net", "width=4"]),
}


@pytest.mark.parametrize("name", ON_THE_COMMAND_LINE)
def test_the_command_line_trains_it(name: str, tmp_path: Path):
    data, more = ON_THE_COMMAND_LINE[name]
    out = str(tmp_path / "run")
    words = [
        "train",
        name,
        "--data",
        data,
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    done = CliRunner().invoke(cli.app, [*words, *more])
    assert done.exit_code == 0, (done.output, done.exception)
    scored = CliRunner().invoke(
        cli.app, ["evaluate", out, "--tasks", "4", "--device", "cpu", "--json"]
    )
    assert scored.exit_code == 0, (scored.output, scored.exception)
    [row, *_] = json.loads(scored.stdout)
    assert row["metric"] == load(out).metric.label


# --- what each of them is for


def test_what_is_reported_is_not_what_is_differentiated():
    learner = fresh(PROBES["likelihood"])
    episode = tree_map(lambda t: t[0], WAVES.sample(1, torch.Generator().manual_seed(0)))
    predictions = learner(episode.support, episode.query.x)
    mean, log_var = predictions.detach().chunk(2, -1)
    wanted = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(episode.query.y)
    found = learner.loss(episode).item()
    assert found == pytest.approx(-wanted.mean().item() - 0.5 * math.log(2 * math.pi), rel=1e-4)
    frozen = WAVES.freeze(5)
    by_hand = [
        (learner(e.support, e.query.x)[:, :1] - e.query.y).square().mean().item()
        for batch in frozen.episodes(1)
        for e in [tree_map(lambda t: t[0], batch)]
    ]
    assert evaluate(learner.eval(), frozen).per_task.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_a_task_without_positives_does_not_count():
    frozen = Mixed().freeze(60)
    without = torch.cat([e.query.y[..., 1].sum(1) == 0 for e in frozen.episodes()])
    assert 0 < without.sum() < 60
    score = evaluate(fresh(PROBES["average precision"]), frozen)
    assert torch.equal(score.undefined, without) and score.lost == 0
    assert score.n == 60 - int(without.sum()) and 0 < score.mean <= 1
    assert f"({score.n} of 60 tasks, undefined for {int(without.sum())}" in str(score)
    assert (
        score.row()["undefined"] == int(without.sum())
        and score.row()["metric"] == "average precision"
    )
    same = paired(score, score)
    assert (
        same.mean == 0 and same.n == score.n and "average precision difference +0.0000" in str(same)
    )
    assert same.metric.difference and Score(torch.tensor([0.5]), score.metric).beats(None)


def test_a_metric_says_which_way_is_up_and_how_it_is_written():
    one, two = (
        Score(torch.tensor([v, v]), Metric("loss of power", False, "W")) for v in (1.0, 2.0)
    )
    assert one.beats(two) and not two.beats(one)
    assert str(one).startswith("loss of power 1.0000 ± 0.0000 W (2 tasks")


@pytest.mark.parametrize("reported", [torch.zeros(3), [0.1, 0.2]])
def test_a_score_that_is_no_number_is_refused(reported: Any):
    learner = fresh(PROBES["average precision"])
    learner.score = lambda predictions, y: reported
    with pytest.raises(TypeError, match="expected one number for a task, or None"):
        evaluate(learner, Mixed().freeze(3))


def test_kinds_of_ones_own_need_a_criterion_and_a_score():
    class Nothing(Bandit):
        criterion, score = Learner.criterion, Learner.score

    with pytest.raises(
        NotImplementedError, match="Nothing is for control tasks and does not say its criterion"
    ):
        fit(Nothing(), Arms(), steps=1, **QUIET)
    with pytest.raises(NotImplementedError, match="does not say its score"):
        evaluate(Nothing(), Arms().freeze(2))


def test_the_mask_hides_what_is_padding():
    learner = fresh(PROBES["text with a mask"])
    episode = tree_map(lambda t: t[0], Sentences().sample(1))
    x = episode.query.x
    other = x | {"tokens": torch.where(x["mask"], x["tokens"], 5)}
    assert not torch.equal(x["tokens"], other["tokens"])
    torch.testing.assert_close(learner(episode.support, x), learner(episode.support, other))


WRONG = {
    "no mask for the queries": lambda s, q: (s, q.x["tokens"]),
    "a mask too short": lambda s, q: (s._replace(x=s.x | {"mask": s.x["mask"][1:]}), q.x),
    "queries of another length": lambda s, q: (s, tree_map(lambda t: t[:, 1:], q.x)),
    "nothing to learn from": lambda s, q: (Examples(*tree_map(lambda t: t[:0], s[:2])), q.x),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_structures_that_do_not_fit_are_refused(wrong: Callable[..., Any]):
    episode = tree_map(lambda t: t[0], Sentences().sample(1))
    with pytest.raises(ValueError, match=r"expected|need|empty"):
        fresh(PROBES["text with a mask"])(*wrong(*episode))


def test_anil_moves_the_last_layer_only():
    learner = fresh(PROBES["ANIL"])
    support = tree_map(lambda t: t[0], WAVES.sample(1)).support
    phi, _ = learner.adapt(support)
    assert list(phi) == ["layers.1.weight", "layers.1.bias"]
    whole = MAML(learner.net, lr=0.01, steps=2, kind="regression").adapt(support)[0]
    assert not torch.equal(phi["layers.1.weight"], whole["layers.1.weight"])


def test_meta_sgd_is_maml_while_all_rates_are_alike():
    learner = fresh(PROBES["Meta-SGD"])
    plain = MAML(learner.net, lr=0.01, steps=2, kind="regression")
    episodes = WAVES.sample(3)
    torch.testing.assert_close(losses(learner, episodes), losses(plain, episodes))
    learner.zero_grad()
    gradients(learner, episodes)
    assert all(r.grad is not None and r.grad.any() for r in learner.rates)


def test_each_step_leaves_what_it_saw():
    learner = fresh(PROBES["something of each step"])
    support = tree_map(lambda t: t[0], WAVES.sample(1)).support
    _, _, seen = learner.adapt(support)
    plain = MAML(learner.net, lr=0.01, steps=2, kind="regression")
    wanted = [plain.support_loss(phi, support) for phi in plain.path(support)][:2]
    torch.testing.assert_close(torch.stack(seen), torch.stack(wanted))


@pytest.mark.parametrize("how", [{"lift": "loop"}, {"lift": "vmap"}, {"run": "compile"}], ids=str)
def test_the_price_falls_to_zero(how: dict[str, str]):
    learner, plain = fresh(PROBES["annealed"]), fresh(Probe(wave(MAML), WAVES))
    price = sum(p.square().sum() for p in learner.net.parameters()).item()
    still = {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=1e-30), "engine": Engine(**how)}
    runs = [fit(m, WAVES, steps=4, **still, **QUIET) for m in (learner, plain)]
    extra = torch.tensor(runs[0].curve("loss")[1]) - torch.tensor(runs[1].curve("loss")[1])
    torch.testing.assert_close(
        extra / price, torch.tensor([1, 0.75, 0.5, 0.25]), rtol=1e-4, atol=1e-4
    )
    assert learner.progress == 1 and "_progress" not in learner.state_dict()


def test_a_learner_that_is_scored_is_one_that_is_trained():
    class Hot(Annealed):
        seen: list[float] = []

        def predict(self, state, x):
            self.seen.append(float(self.progress))
            return super().predict(state, x)

    learner = Hot(MLP([1, 6, 1]), kind="regression")
    check = {"engine": Engine(lift="loop", check=False)}
    fit(learner, WAVES, steps=2, every=1, validate=WAVES.freeze(2), **check, **QUIET)
    training, scored = [0.0] * 4, [1.0] * 2
    tried = scored  # before the first step: would a score fail?
    assert Hot.seen == [*tried, *training, *scored, *[0.5] * 4, *scored]


def test_the_number_of_steps_is_part_of_a_run_whose_learner_asks_how_far_it_is(tmp_path: Path):
    for name, asks in {"annealed": True, "second order half-way": True, "ANIL": False}.items():
        folder, probe = tmp_path / name, PROBES[name]
        with pytest.raises(RuntimeError, match="the power failed"):
            fit(fresh(probe), Failing(probe.tasks, 2), steps=4, every=1, folder=folder, **QUIET)
        more = {"folder": folder, "every": 1, "resume": True}
        if asks:
            with pytest.raises(ValueError, match=r"another run: steps was 4 and is 6"):
                fit(fresh(probe), Failing(probe.tasks, 99), steps=6, **more, **QUIET)
        else:
            fit(fresh(probe), Failing(probe.tasks, 99), steps=6, **more, **QUIET)


@pytest.mark.parametrize("how", [{"lift": "loop"}, {"lift": "vmap"}, {"run": "compile"}], ids=str)
def test_the_order_of_derivatives_switches_half_way(how: dict[str, str]):
    def norms(cls: type[MAML], **more: Any) -> list[float]:
        learner = fresh(Probe(wave(cls, steps=2, **more), WAVES))
        still = {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=1e-30), "engine": Engine(**how)}
        return fit(learner, WAVES, steps=4, **still, **QUIET).curve("gradient_norm")[1]

    exact, first, found = norms(MAML), norms(MAML, first_order=True), norms(Halfway)
    assert exact[0] != pytest.approx(first[0], rel=1e-3)
    assert found == pytest.approx(first[:2] + exact[2:], rel=1e-4)


def test_a_surrogate_is_differentiated_and_the_criterion_is_logged():
    learner = fresh(PROBES["Reptile"])
    episodes = WAVES.sample(4, torch.Generator().manual_seed(0))
    plain = MAML(learner.net, lr=0.01, steps=3, kind="regression")
    wanted = losses(plain, episodes).detach()
    towards = []
    for i in range(4):
        phi, _ = plain.adapt(tree_map(lambda t, i=i: t[i], episodes).support)
        towards.append(torch.cat([(p - phi[k]).flatten() for k, p in plain.net.named_parameters()]))
    for lift in ("loop", "vmap"):
        for learner, weights in (
            (fresh(PROBES["Reptile"]), torch.full((4,), 0.25)),
            (fresh(PROBES["inequality over Reptile"]), wanted.softmax(0)),  # by the criterion
        ):
            for chunk in (None, 1):
                learner.zero_grad()
                graded = gradients(learner, episodes, lift=lift, chunk=chunk)
                torch.testing.assert_close(graded.losses, wanted)
                found = torch.cat([p.grad.flatten() for p in learner.parameters()])
                torch.testing.assert_close(
                    found, (weights[:, None] * torch.stack(towards)).sum(0).detach()
                )


def test_an_objective_reads_domains_whatever_the_chunk():
    episodes = Domains(5, 6).sample(6, torch.Generator().manual_seed(1))
    learner = fresh(PROBES["domains"])
    whole = torch.autograd.grad(
        learner.combine(losses(learner, episodes), episodes.support.info),
        list(learner.parameters()),
    )
    for chunk in (None, 2, 1):
        learner.zero_grad()
        gradients(learner, episodes, chunk=chunk)
        torch.testing.assert_close([p.grad for p in learner.parameters()], list(whole))


def test_a_sequence_is_one_item():
    episodes = Rows().sample(3)
    learner = fresh(PROBES["sequences of tasks"])
    assert learner(*tree_map(lambda t: t[0], (episodes.support, episodes.query.x))).shape == (
        5,
        6,
        2,
    )
    with pytest.raises(ValueError, match="expected a sequence"):
        learner(
            Examples(episodes.support.x[0, 0], episodes.support.y[0, 0]), episodes.query.x[0, 0]
        )


def test_a_bandits_return_is_exact():
    learner, frozen = fresh(PROBES["bandit"]), Arms().freeze(40)
    by_hand = []
    for batch in frozen.episodes(1):
        luck, pays = batch.support.x[0], batch.support.info["pays"][0]
        wins, pulls = torch.zeros(2), torch.zeros(2)
        for which, paid in luck:
            arm = int(which < 0.5)
            pulls[arm] += 1
            wins[arm] += float(paid < pays[arm])
        chosen = (wins / (1 + pulls)).softmax(0)
        by_hand.append((chosen @ pays).item())
    score = evaluate(learner, frozen)
    assert score.per_task.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert "expected return" in str(score) and "coins" in str(score)
    fit(learner, Arms(), steps=60, lr=0.1, meta_batch=32, progress=False)
    assert evaluate(learner, frozen).mean > score.mean


# --- what is overridden leaves the rest as it was


class Priced(ProtoNet):
    "A loss of one's own, which does not call `forward`."

    def loss(self, episode):
        answer = self.predict(self.adapt(episode.support), episode.query.x)
        return self.criterion(answer, episode.query.y) + 0.01 * answer.square().mean()


class Softer(ProtoNet):
    "A criterion of one's own."

    def criterion(self, predictions, y):
        return super().criterion(predictions, 0.9 * y + 0.1 / y.shape[-1])


@pytest.mark.parametrize("cls", [Priced, Softer])
def test_hard_tasks_hear_what_was_answered(cls: type[ProtoNet]):
    torch.manual_seed(0)
    learner, tasks = cls(MLP([3, 4])), HardTasks(points(), every=2)
    run = fit(learner, tasks, steps=4, **QUIET)
    assert tasks.heard == 4 and len(run.curve("loss")[1]) == 4
    outer = Outer(learner, torch.optim.SGD(learner.param_groups(), lr=0.0))
    outer.gradient.answers = True
    episodes = points().sample(3)
    outer.step(episodes)
    for i in range(3):
        support, query = tree_map(lambda t, i=i: t[i], episodes)
        torch.testing.assert_close(outer.latest.answers[i], learner(support, query.x))


def test_a_generator_that_is_judged_all_along_hears_hard_tasks():
    torch.manual_seed(0)
    learner = PGN(MLP([3, 6, 3]), hidden=4, steps=1, loss_steps="all")
    assert isinstance(fit(learner, HardTasks(points(), every=2), steps=3, **QUIET), Run)


def test_a_criterion_of_ones_own_is_lifted_by_parts():
    from metabook.engine import in_parts

    assert in_parts(Softer(MLP([3, 4]))) and not in_parts(Priced(MLP([3, 4])))


def test_everything_of_a_probe_is_on_the_cpu_when_it_is_scored(monkeypatch: pytest.MonkeyPatch):
    learner = fresh(PROBES["text with a mask"])
    seen = []
    monkeypatch.setattr(
        Words,
        "score",
        lambda self, p, y: seen.append([t.device.type for t in tree_leaves((p, y))]) or 0.5,
    )
    assert evaluate(learner, Sentences().freeze(3)).mean == 0.5
    assert seen == [["cpu", "cpu"]] * 3


def test_probes_are_saved_by_hand_too(tmp_path: Path):
    for name, probe in PROBES.items():
        folder = save(tmp_path / name, fresh(probe))
        assert isinstance(load(folder), type(fresh(probe)))


# --- found by trying


def test_a_module_under_the_name_of_a_method_is_refused():
    learner = ProtoNet(MLP([3, 4]))
    with pytest.raises(
        TypeError, match=r"criterion=L1Loss\(\.\.\.\) is a module, and criterion a method"
    ):
        learner.criterion = nn.L1Loss()
    learner.likelihood = nn.L1Loss()


OBJECTIVES = {
    "with a setting": lambda losses, temperature=2.0: (losses / temperature).mean(),
    "with any words": lambda losses, **words: losses.mean() + 0 * len(words),
    "of PyTorch": torch.mean,
    "a module": nn.Identity(),
}


@pytest.mark.parametrize("name", ["with a setting", "with any words", "of PyTorch"])
def test_objectives_that_ask_for_losses_alone_get_them(name: str):
    learner = fresh(Probe(wave(MAML), WAVES))
    learner.combine = OBJECTIVES[name]
    assert gradients(learner, WAVES.sample(3)).losses.isfinite().all()


class Weighted(Learner):
    "Another learner, whose inner loop uses a number of this one."

    kind = "regression"
    head = True

    def __init__(self, inner: MAML):
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.tensor(2.0))
        plain = inner.criterion
        inner.support_loss = lambda phi, support: (
            self.weight * plain(torch.func.functional_call(inner.net, phi, (support.x,)), support.y)
        )

    def adapt(self, support):
        return self.inner.adapt(support)

    def predict(self, state, x):
        return self.inner.predict(state, x)


@pytest.mark.parametrize("lift", ["loop", "vmap"])
def test_steps_that_are_computed_again_reach_all_parameters(lift: str):
    episodes, found = WAVES.sample(3, torch.Generator().manual_seed(0)), []
    for recompute in (False, True):
        learner = Weighted(fresh(Probe(wave(MAML, steps=2), WAVES)))
        gradients(learner, episodes, recompute=recompute, lift=lift)
        found.append([p.grad for p in learner.parameters()])
    torch.testing.assert_close(*found)
    assert found[0][0] is not None


class Counted(MAML):
    "Counts its steps in its state."

    def start(self, support):
        return super().start(support), 0

    def step(self, state, support):
        phi, k = state
        return super().step(phi, support=support), k + 1

    def result(self, state, support):
        return super().result(state[0], support)


def test_a_state_may_hold_what_is_no_tensor_while_steps_are_computed_again():
    episodes, found = WAVES.sample(3), []
    for recompute in (False, True):
        learner = fresh(Probe(wave(Counted, steps=2), WAVES))
        gradients(learner, episodes, recompute=recompute)
        found.append([p.grad for p in learner.parameters()])
    torch.testing.assert_close(*found)


class Spoiled(Sinusoids):
    "Waves; of each batch the first has a query that is no number."

    def gather(self, indices):
        episodes = super().gather(indices)
        if len(episodes.query.y) > 1:
            episodes.query.y[0] = math.nan
        return episodes


def test_a_surrogates_bad_task_is_skipped():
    run = fit(
        fresh(PROBES["Reptile"]), Spoiled(5, 6), steps=2, engine=Engine(nonfinite="skip"), **QUIET
    )
    assert run.outer.guard.skipped == 2


class Twice(ProtoNet):
    "Asks itself twice, last about something else."

    def loss(self, episode):
        support, query = episode
        first = self.criterion(self(support, query.x), query.y)
        return first + 0.1 * self.criterion(self(support, query.x.flip(0)), query.y.flip(0))


def test_what_was_answered_is_what_the_queries_got():
    learner = Twice(MLP([3, 4]))
    episodes = points().sample(2)
    heard = gradients(learner, episodes, answers=True).answers
    for i in range(2):
        support, query = tree_map(lambda t, i=i: t[i], episodes)
        torch.testing.assert_close(heard[i], learner(support, query.x).detach())


class Dearer(MAML):
    "A loss of its own, which first order does not turn into a surrogate."

    def loss(self, episode):
        return super().loss(episode) + 100


def test_first_order_is_no_surrogate():
    found = [fresh(Probe(wave(Dearer, first_order=f), WAVES)) for f in (False, True)]
    episodes = WAVES.sample(3)
    values = [gradients(m, episodes).losses for m in found]
    torch.testing.assert_close(*values)
    assert (values[0] > 100).all()


@pytest.mark.parametrize(
    "reported", [1, True, torch.tensor(1), torch.tensor(True), torch.tensor(1.0).double()]
)
def test_scores_may_be_numbers_of_any_kind(reported: Any):
    learner = fresh(PROBES["average precision"])
    learner.score = lambda predictions, y: reported
    score = evaluate(learner, Mixed().freeze(3))
    assert score.mean == 1 and score.per_task.dtype == torch.float32


def test_a_class_may_say_a_kind_and_an_instance_a_metric():
    class Driven(MAML):
        kind = "control"

    assert (
        Driven(MLP([1, 1])).kind == "control"
        and MAML(MLP([1, 1]), kind="regression").kind == "regression"
    )
    learner = ProtoNet(MLP([3, 4]))
    learner.metric = Metric("hits")
    assert learner.metric.name == "hits"

    class Named(ProtoNet):
        metric = "f1"

    with pytest.raises(TypeError, match=r"metric='f1', expected a metabook\.learners\.Metric"):
        fit(Named(MLP([3, 4])), points(), steps=1, validate=points(), **QUIET)


def test_a_score_is_taken_as_of_a_learner_that_is_trained():
    class Asked(ProtoNet):
        seen: list[Any] = []

        def score(self, predictions, y):
            self.seen.append((float(self.progress), self.training, torch.is_grad_enabled()))
            return super().score(predictions, y)

    fit(Asked(MLP([3, 4])), points(), steps=2, every=1, validate=points().freeze(2), **QUIET)
    assert set(Asked.seen) == {(1.0, False, False)}


def test_queries_of_other_parts_are_refused_by_name():
    support, query = tree_map(lambda t: t[0], Sentences().sample(1))
    learner = fresh(PROBES["text with a mask"])
    turned = dict(reversed(list(query.x.items())))
    torch.testing.assert_close(learner(support, turned), learner(support, query.x))
    with pytest.raises(ValueError, match=r"expected \[\"query\['mask'\]\""):
        learner(support, {"tokens": query.x["tokens"]})
    with pytest.raises(ValueError, match="give every query its row"):
        learner(support, query.x | {"mask": query.x["mask"][:1]})


# --- what a learner of one's own gets wrong is named


class Misinformed(MAML):
    "An objective that reads what these tasks do not say."

    def combine(self, losses, info):
        return (losses * info["weight"]).mean()


class Unreduced(MAML):
    "A criterion that forgets the mean."

    def criterion(self, predictions, y):
        return (predictions - y).square()


class UnreducedLoss(MAML):
    "A loss that forgets it."

    def loss(self, episode):
        return (self(episode.support, episode.query.x) - episode.query.y).square()


class Unscored(MAML):
    "A score that fails."

    def score(self, predictions, y):
        raise ArithmeticError("no score")


class TwoRows(MAML):
    "Answers twice to a single query."

    def predict(self, state, x):
        answers = super().predict(state, x)
        return torch.cat([answers, answers])[: max(len(answers), 2)]


@pytest.mark.parametrize("lift", ["loop", "vmap"])
@pytest.mark.parametrize(
    "cls, message",
    [
        (
            Misinformed,
            r"Misinformed.combine reads info\['weight'\], but these tasks say \['task'\]",
        ),
        (Unreduced, r"Unreduced.criterion gives a tensor of shape \(5, 1\), expected one number"),
        (
            UnreducedLoss,
            r"UnreducedLoss.loss gives a tensor of shape \(10, 1\), expected one number",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_named(cls, message, lift):
    learner = cls(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(ValueError, match=message):
        fit(learner, Sinusoids(5, 10), steps=2, engine=Engine(lift), **QUIET)


def test_a_score_that_fails_does_so_before_the_first_step():
    learner = Unscored(MLP([1, 8, 1]), kind="regression")
    before = [p.clone() for p in learner.parameters()]
    with pytest.raises(ArithmeticError, match="no score"):
        fit(learner, Sinusoids(5, 10), steps=2, validate=Sinusoids(5, 10), **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), before, strict=True))


def test_a_single_query_has_a_single_answer():
    learner = TwoRows(MLP([1, 8, 1]), kind="regression")
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for one query, expected \(1, \.\.\.\)"):
        evaluate(learner, Sinusoids(5, 10), 4, queries="single")
