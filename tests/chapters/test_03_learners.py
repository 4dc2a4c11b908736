"""Made from nbs/03_learners.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap

from metabook.classes import Classes
from metabook.engine import losses
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.learners import FastWeights, InnerLoop, Learner, task_loss, task_score
from metabook.networks import MLP
from metabook.prototypes import ProtoNet
from metabook.registry import register
from metabook.scores import evaluate
from metabook.testing import ContractError, check_learner
from metabook.training import fit


def cell_4122cac2():
    # cell 4122cac2
    class RidgeWave(Learner):
        "Across tasks: the frequency.  Within a task: a wave of that frequency, by ridge regression."

        kind = "regression"

        def __init__(self, omega=0.6, ridge=1.0):
            super().__init__()
            self.omega = nn.Parameter(torch.tensor(float(omega)))
            self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))

        def features(self, x):  # z, or Z [n, 2]
            return torch.cat([torch.sin(self.omega * x), torch.cos(self.omega * x)], -1)

        def adapt(self, support):  # phi [2, 1]
            z = self.features(support.x)
            gram = z.T @ z + self.log_ridge.exp() * torch.eye(2).to(z)
            return torch.linalg.solve(gram, z.T @ support.y)

        def predict(self, phi, x):
            return self.features(x) @ phi

    return RidgeWave


def cell_c581f961():
    # cell c581f961
    def by_numpy(episodes, omega, ridge):
        "The loss of every task of a batch, without torch and without `Learner`."
        found = []
        for x, y, xq, yq in zip(*(t.numpy() for side in episodes for t in side[:2]), strict=True):
            z, z_q = (np.concatenate([np.sin(omega * u), np.cos(omega * u)], 1) for u in (x, xq))
            phi = np.linalg.solve(z.T @ z + ridge * np.eye(2), z.T @ y)
            found.append(np.mean((z_q @ phi - yq) ** 2))
        return torch.tensor(np.array(found))

    return by_numpy


def cell_d1cfa56c():
    # cell d1cfa56c
    def four_tasks():
        "Four tasks in double precision."
        return Sinusoids(5, 10).sample(4, torch.Generator().manual_seed(0)).to(dtype=torch.float64)

    return four_tasks


def cell_581c2635():
    # cell 581c2635
    def flaws_of(learner, tasks):
        "The promises that a learner breaks, besides that it has no name yet."
        try:
            check_learner(learner, tasks)
        except ContractError as error:
            return {name: flaw for name, flaw in error.flaws.items() if name != "survives_saving"}
        return {}

    return flaws_of


def test_each_part_keeps_its_mode():
    # cell 4401ba57
    frozen, resting = torch.nn.BatchNorm1d(8).requires_grad_(False), torch.nn.BatchNorm1d(8)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), frozen, resting, torch.nn.Linear(8, 4))
    learner = ProtoNet(net)
    tasks = FewShot(Classes.of({str(i): torch.randn(8, 3) + i for i in range(6)}), 2, 1, 3)

    def averages_after(prepare, *layers):
        "Whether training leaves the running averages of layers alone."
        learner.train()
        prepare()
        modes = {name: module.training for name, module in learner.named_modules()}
        evaluate(learner, tasks, 4)
        assert modes == {name: module.training for name, module in learner.named_modules()}
        before = [layer.running_mean.clone() for layer in layers]
        fit(learner, tasks, steps=2, meta_batch=2, progress=False)
        return [torch.equal(layer.running_mean, b) for layer, b in zip(layers, before, strict=True)]

    def set_parts():
        frozen.eval(), resting.eval()

    assert averages_after(set_parts, frozen, resting) == [True, True]
    assert averages_after(learner.eval, frozen, resting) == [True, False]  # as one that was loaded


@pytest.mark.proves("eq-meta-learner")
def test_a_learner_is_adapt_then_predict():
    RidgeWave = cell_4122cac2()
    # cell b25f01cd
    learner = RidgeWave(omega=1.0, ridge=1.0)
    support = Examples(torch.tensor([[0.0], [math.pi / 2]]), torch.tensor([[3.0], [2.0]]))
    x = torch.tensor([[math.pi / 2], [0.0], [-math.pi / 2]])

    phi = learner.adapt(support)
    torch.testing.assert_close(phi, torch.tensor([[1.0], [1.5]]))
    torch.testing.assert_close(learner(support, x), torch.tensor([[1.0], [1.5], [-1.0]]))
    torch.testing.assert_close(learner(support, x), learner.predict(phi, x))
    phi, learner(support, x)


def test_what_is_frozen_is_not_trained():
    RidgeWave = cell_4122cac2()
    # cell 4a44eb4e
    learner = RidgeWave()
    learner.log_ridge.requires_grad_(False)
    assert [group["params"] for group in learner.param_groups()] == [[learner.omega]]


def test_examples_that_do_not_fit_are_refused():
    RidgeWave = cell_4122cac2()
    # cell 3eddb1b5
    learner, x = RidgeWave(), torch.randn(4, 1)
    wrong = {
        "make one-hot rows": (Examples(x, torch.tensor([0, 1, 1, 0])), x),
        "its own row in y": (Examples(x, torch.randn(3, 1)), x),
        "support set is empty": (Examples(x[:0], torch.randn(0, 1)), x),
        "both need the same": (Examples(x, torch.randn(4, 1)), torch.randn(4, 2)),
        "are bytes": (Examples(x.byte(), torch.randn(4, 1)), x.byte()),
    }
    messages = []
    for part, (support, query) in wrong.items():
        try:
            learner(support, query)
        except ValueError as error:
            messages.append(str(error))
        assert part in messages[-1]
    elsewhere = RidgeWave().to("meta")  # a device that holds nothing
    for part, refusing, support in (
        ("support set is empty", learner, Examples(torch.randn(0, 1), torch.randn(0, 1))),
        ("move one of them", elsewhere, Examples(x, torch.randn(4, 1))),
    ):
        try:
            refusing.check(support, support.x)
        except ValueError as error:
            messages.append(str(error))
        assert part in messages[-1]
    assert len(messages) == len(wrong) + 2
    messages


def test_steps_lead_to_the_solution():
    RidgeWave = cell_4122cac2()

    # cell 3b5d7c1c
    class WaveBySteps(InnerLoop):
        "The weights of a wave, by steps downhill."

        kind = "regression"

        def __init__(self, wave, lr, steps, test_steps=None):
            super().__init__(steps, test_steps)
            self.wave, self.lr = wave, lr

        def start(self, support):
            return torch.zeros(2, 1)

        def step(self, phi, support):
            z = self.wave.features(support.x)
            slope = z.T @ (z @ phi - support.y) + self.wave.log_ridge.exp() * phi
            return phi - self.lr * slope

        def predict(self, phi, x):
            return self.wave.features(x) @ phi

    wave = RidgeWave(omega=1.0, ridge=1.0)
    support = Examples(torch.tensor([[0.0], [math.pi / 2]]), torch.tensor([[3.0], [2.0]]))
    walker = WaveBySteps(wave, lr=0.25, steps=2, test_steps=30)
    path = torch.stack(list(walker.path(support)))[..., 0]
    torch.testing.assert_close(path, torch.tensor([[0.0, 0.0], [0.5, 0.75], [0.75, 1.125]]))
    torch.testing.assert_close(walker.eval().adapt(support), wave.adapt(support))  # 30 steps later
    path


def test_an_inner_loop_that_cannot_work_is_refused():
    # cell d1498452
    refusals = []
    for impossible in (
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("steps", -1),
        ("test_steps", -1),
    ):
        try:
            FastWeights(torch.nn.Linear(1, 1), **dict([impossible]))
        except ValueError as error:
            refusals.append(str(error))
        assert refusals[-1].startswith("{}={}, expected".format(*impossible))
    assert len(refusals) == 5
    FastWeights(torch.nn.Linear(1, 1), steps=0)  # no step at all is possible
    refusals


@pytest.mark.proves("eq-cross-entropy")
def test_cross_entropy_by_hand():
    # cell a02f42d4
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    by_hand = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert math.isclose(task_loss("classification", logits, y), by_hand, rel_tol=1e-6)
    soft = torch.tensor([[0.5, 0.5], [0.5, 0.5]])  # soft labels are fine too
    assert math.isclose(task_loss("classification", logits, soft), by_hand, rel_tol=1e-6)
    by_hand


@pytest.mark.proves("eq-squared-error")
def test_squared_error_by_hand():
    # cell 5ccc136f
    predictions, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert task_loss("regression", predictions, y) == (1 + 4) / 2
    assert task_score("regression", predictions, y) == (1 + 4) / 2
    try:
        task_loss("regression", predictions, torch.zeros(2, 3))
    except ValueError as error:
        message = str(error)
    assert "3 outputs" in message
    message


def test_accuracy_by_hand():
    # cell cbd16f9f
    answers = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0], [5.0, 6.0, 9.0]])
    classes = torch.eye(3)[[1, 0, 1, 2]]  # the third answer is wrong
    assert task_score("classification", answers, classes) == 3 / 4
    answers[1, 2] = math.nan  # no answer is no wrong answer, and no right one
    assert math.isnan(task_score("classification", answers, classes))


def test_a_learner_owns_criterion_and_score():
    # cell 7a2c9e10
    @register("unsure")
    class Unsure(FastWeights):
        "A mean and the logarithm of a variance; one step of gradient descent."

        def start(self, support):
            return dict(self.net.named_parameters())

        def step(self, phi, support):
            g = self.gradient(phi, support)
            return {k: p - self.lr * g[k] for k, p in phi.items()}

        def criterion(self, predictions, y):
            mean, log_var = predictions.chunk(2, -1)
            return 0.5 * (log_var + (y - mean) ** 2 / log_var.exp()).mean()

        def score(self, predictions, y):
            return (predictions[:, :1] - y).square().mean()

    torch.manual_seed(0)
    unsure = Unsure(MLP([1, 2]), kind="regression")
    check_learner(unsure, Sinusoids(5, 5))
    score = evaluate(unsure, Sinusoids(5, 10), 20)
    assert unsure.metric.name == "mse" and unsure.metric.better(1.0, 2.0)
    assert ProtoNet(torch.nn.Linear(1, 2)).metric.better(0.6, 0.5)
    score


def test_tokens_and_their_mask():
    # cell 1d9b4c21
    @register("sentences")
    class Sentences(Learner):
        "Prototypes of sentences."

        def __init__(self, words: int, d: int = 4):
            super().__init__()
            self.embed = torch.nn.Embedding(words, d)

        def read(self, x):
            there = x["mask"].to(self.embed.weight)[..., None]
            return (self.embed(x["tokens"]) * there).sum(1) / there.sum(1)

        def adapt(self, support):
            return support.y.T @ self.read(support.x) / support.y.sum(0)[:, None]

        def predict(self, state, x):
            return -(self.read(x)[:, None] - state).square().sum(-1)

    tokens, mask = (
        torch.randint(0, 9, (2, 4, 5)),
        torch.arange(5) < torch.tensor([[2], [5], [3], [4]]),
    )
    sentences = [{"tokens": t, "mask": mask} for t in tokens]
    labels = torch.eye(2).repeat(2, 1)
    learner, support = Sentences(9), Examples(sentences[0], labels)
    answers = learner(support, sentences[1])
    padded = sentences[1] | {"tokens": torch.where(mask, sentences[1]["tokens"], 0)}
    assert answers.shape == (4, 2) and torch.equal(learner(support, padded), answers)
    batch = Episode(
        *(Examples({k: t[None] for k, t in x.items()}, labels[None]) for x in sentences)
    )
    assert losses(learner, batch, "vmap").allclose(losses(learner, batch, "loop"))
    try:
        learner(support._replace(x={"tokens": tokens[0], "mask": mask[1:]}), sentences[1])
    except ValueError as error:
        message = str(error)
    assert "support.x['mask'] (3, 5)" in message
    message


def test_a_price_falls_as_the_training_goes_on():
    RidgeWave = cell_4122cac2()

    # cell 1d9b4c23
    class Cooling(RidgeWave):
        "Pays for a frequency far from 1, less and less."

        def loss(self, episode):
            return super().loss(episode) + (1 - self.progress) * 100 * (self.omega - 1) ** 2

    how = {"steps": 4, "meta_batch": 8, "lr": 1e-9, "log_every": 1, "progress": False}
    learner, plain = Cooling(0.5), RidgeWave(0.5)
    cooling, without = (fit(m, Sinusoids(5, 10), **how).curve("loss")[1] for m in (learner, plain))
    prices = torch.tensor(cooling) - torch.tensor(without)  # on the same tasks
    torch.testing.assert_close(prices, torch.tensor([25, 18.75, 12.5, 6.25]), rtol=1e-3, atol=1e-3)
    assert learner.progress == 1
    prices


@pytest.mark.proves("eq-outer-objective")
def test_the_objective_is_the_mean_over_tasks():
    RidgeWave = cell_4122cac2()
    by_numpy = cell_c581f961()
    four_tasks = cell_d1cfa56c()
    # cell 03160d73
    learner, episodes = RidgeWave(0.8, 1.0).double(), four_tasks()
    values = losses(learner, episodes)
    torch.testing.assert_close(
        values, by_numpy(episodes, learner.omega.item(), 1.0), rtol=1e-9, atol=0
    )
    assert math.isclose(learner.combine(values).item(), sum(values.tolist()) / 4, rel_tol=1e-12)
    values


@pytest.mark.proves("eq-mean-gradient")
def test_the_gradient_is_the_mean_of_task_gradients():
    RidgeWave = cell_4122cac2()
    by_numpy = cell_c581f961()
    four_tasks = cell_d1cfa56c()
    # cell 215f5635
    learner, episodes = RidgeWave(0.8, 1.0).double(), four_tasks()
    whole = torch.autograd.grad(learner.combine(losses(learner, episodes)), learner.omega)[0]

    alone = []
    for i in range(4):
        sides = (Examples(side.x[i], side.y[i]) for side in episodes)
        alone.append(torch.autograd.grad(learner.loss(Episode(*sides)), learner.omega)[0])
    assert math.isclose(whole, sum(alone) / 4, rel_tol=1e-12)

    omega, step = learner.omega.item(), 1e-6
    up, down = (by_numpy(episodes, omega + s, 1.0).mean() for s in (step, -step))
    assert math.isclose(whole, (up - down) / (2 * step), rel_tol=1e-7)
    [g.item() for g in alone], whole.item()


@pytest.mark.proves("eq-lifted-objective")
def test_loop_and_vmap_agree():
    RidgeWave = cell_4122cac2()
    by_numpy = cell_c581f961()
    four_tasks = cell_d1cfa56c()
    # cell 6c182fed
    learner, episodes = RidgeWave(0.8, 1.0).double(), four_tasks()
    parameters = list(learner.parameters())
    expected = by_numpy(episodes, learner.omega.item(), 1.0)
    gradients = {}
    for way, values in {
        "loop": losses(learner, episodes, lift="loop"),
        "vmap": losses(learner, episodes, lift="vmap"),
        "vmap by hand": vmap(learner.loss)(episodes),
    }.items():
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
        gradients[way] = torch.stack(torch.autograd.grad(learner.combine(values), parameters))
    torch.testing.assert_close(gradients["vmap"], gradients["loop"], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients["vmap by hand"], gradients["loop"], rtol=1e-12, atol=0)
    gradients


@pytest.mark.proves("eq-combine-weights")
def test_weights_stand_for_combine():
    RidgeWave = cell_4122cac2()
    four_tasks = cell_d1cfa56c()

    # cell a776b222
    class WorstFirst(RidgeWave):
        def combine(self, losses):
            return torch.logsumexp(losses, 0) - math.log(len(losses))

    learner, episodes = WorstFirst(0.8, 1.0).double(), four_tasks()
    values = losses(learner, episodes)
    whole = torch.autograd.grad(learner.combine(values), learner.omega)[0]

    known = losses(learner, episodes).detach().requires_grad_()  # how they came about is forgotten
    weights = torch.autograd.grad(learner.combine(known), known)[0]
    torch.testing.assert_close(weights, known.softmax(0), rtol=1e-12, atol=0)
    for i in range(4):  # one task in memory at a time
        sides = (Examples(side.x[i], side.y[i]) for side in episodes)
        (weights[i] * learner.loss(Episode(*sides))).backward()
    assert math.isclose(learner.omega.grad, whole, rel_tol=1e-12)

    plain = torch.autograd.grad(RidgeWave().combine(known), known)[0]
    torch.testing.assert_close(plain, torch.full_like(known, 1 / 4))
    known.tolist(), weights.tolist()


def test_centroids_by_hand():
    # cell 81191a4d
    class PixelCentroids(Learner):
        "Across tasks: which pixels count.  Within a task: the mean image of each class."

        head = False

        def __init__(self, pixels=784):
            super().__init__()
            self.weight = nn.Parameter(torch.full((pixels,), 3 / math.sqrt(pixels)))

        def adapt(self, support):  # one centroid a class [way, pixels]
            z = support.x.flatten(1) * self.weight
            return support.y.T @ z / support.y.sum(0)[:, None]

        def predict(self, centroids, x):  # minus the squared distance to each
            z = x.flatten(1) * self.weight
            return -(z[:, None] - centroids).square().sum(-1)

    # cell 28c172d6
    learner = PixelCentroids(pixels=2)
    learner.weight.data.fill_(1.0)
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    centroids = learner.adapt(Examples.of(x, torch.tensor([0, 0, 1]), way=2))
    torch.testing.assert_close(centroids, torch.tensor([[1.0, 0.0], [5.0, 5.0]]))
    torch.testing.assert_close(learner.predict(centroids, x[:1]), torch.tensor([[-1.0, -50.0]]))


def test_only_a_name_is_missing():
    RidgeWave = cell_4122cac2()
    # cell 76b3aa0e
    try:
        check_learner(RidgeWave(), Sinusoids(5, 10))
    except ContractError as error:
        found = error
    assert list(found.flaws) == ["survives_saving"]
    assert "@register" in str(found)
    print(found)


def test_a_cut_graph_is_found():
    RidgeWave = cell_4122cac2()
    flaws_of = cell_581c2635()

    # cell f433ae78
    class CutWave(RidgeWave):
        def adapt(self, support):
            return super().adapt(support).detach()

    flaws = flaws_of(CutWave(), Sinusoids(5, 10))
    assert set(flaws) == {"gradients_arrive", "gradients_are_true"}
    print(*flaws.values(), sep="\n\n")


def test_a_forgetful_state_is_found():
    RidgeWave = cell_4122cac2()
    flaws_of = cell_581c2635()

    # cell de6b8ddc
    class Forgetful(RidgeWave):
        def adapt(self, support):
            self.latest = super().adapt(support)
            return self.latest

        def predict(self, phi, x):
            return self.features(x) @ self.latest

    flaws = flaws_of(Forgetful(), Sinusoids(5, 10))
    assert "state_is_complete" in flaws
    print(flaws["state_is_complete"])


def test_whispering_queries_are_found():
    RidgeWave = cell_4122cac2()
    flaws_of = cell_581c2635()

    # cell 9e42fd33
    class Whispering(RidgeWave):
        def predict(self, phi, x):
            raw = super().predict(phi, x)
            return raw - raw.mean(0)

    class HonestlyWhispering(Whispering):
        transductive = True

    assert list(flaws_of(Whispering(), Sinusoids(5, 10))) == ["queries_stand_alone"]
    assert not flaws_of(HonestlyWhispering(), Sinusoids(5, 10))


def test_a_far_start_ends_elsewhere():
    RidgeWave = cell_4122cac2()
    # cell 22804119
    far = RidgeWave(omega=0.3)
    fit(far, Sinusoids(5, 10), steps=300, lr=0.02, seed=0, progress=False)
    assert abs(far.omega.item() - 1) > 0.5
    assert far.log_ridge.exp() > 5
    score = evaluate(far, Sinusoids(5, 10), n=300, seed=1)
    assert score.mean + score.ci95 > 4
    print(f"frequency {far.omega.item():.2f}, ridge {far.log_ridge.exp().item():.1f}, {score}")
