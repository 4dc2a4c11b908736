"""Made from nbs/A15_contract.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import grad

from metabook.classes import Classes
from metabook.episodes import FewShot, Sinusoids
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP, Conv4
from metabook.prototypes import ProtoNet
from metabook.testing import (
    CHECKS,
    Case,
    ContractError,
    Flaw,
    adapting_is_deterministic,
    another_shot,
    another_way,
    check_learner,
    classes_are_names,
    far_apart,
    gradients_are_true,
    gradients_arrive,
    kind_matches,
    loop_equals_vmap,
    misfits_are_refused,
    nothing_is_written,
    param_groups_are_complete,
    predictions_fit,
    queries_stand_alone,
    snapshot,
    state_is_complete,
    support_is_a_set,
    survives_saving,
    unregistered_learners,
    works_without_grad,
)


def cell_5d98c66f():
    # cell 5d98c66f
    class Smoother(Learner):
        "Answers with a mean of the support targets, the closest counting most."

        def __init__(self, features=1, kind="regression"):
            super().__init__()
            self.kind, self.embed = kind, nn.Linear(features, 3)

        def adapt(self, support):
            return self.embed(support.x.flatten(1)), support.y

        def predict(self, state, x):
            z, y = state
            far = (self.embed(x.flatten(1))[:, None] - z).square().sum(-1)
            return (-far).softmax(-1) @ y

    sinusoids = Sinusoids(5, 6)
    pictures = FewShot(Classes.of({str(i): torch.rand(6, 1, 4, 4) for i in range(6)}), 4, 1, 3)

    def fails(check, learner, tasks=sinusoids):
        "What a check says against a learner; nothing if it has nothing to say."
        try:
            check(Case.of(learner, tasks, 3, 0))
        except Flaw as flaw:
            return str(flaw)
        return ""

    return Smoother, fails, pictures, sinusoids


def test_how_far_apart():
    # cell 3a974f30
    one, same = {"z": torch.tensor([1.0, 2.0])}, {"z": torch.tensor([1.0, 2.0 + 1e-9]).double()}
    assert far_apart(one, same) is None
    assert far_apart(one, {"z": torch.tensor([1.0, 2.5])}) == 0.5
    assert far_apart(one, {"z": torch.tensor([1.0, 2.0, 2.0])}) == math.inf
    assert math.isnan(far_apart(one, {"z": torch.tensor([1.0, math.nan])}))
    assert far_apart([], []) is None


def test_wrong_kinds_and_shapes_are_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 6db0e685
    class Flat(Smoother):
        def predict(self, state, x):
            return super().predict(state, x)[:, 0]

    class Infinite(Smoother):
        def predict(self, state, x):
            return super().predict(state, x) / 0

    class Untrained(Smoother):
        def param_groups(self):
            return [{"params": [self.embed.weight]}]

    class TwiceTrained(Smoother):
        def param_groups(self):
            return super().param_groups() * 2

    for check in (kind_matches, predictions_fit, param_groups_are_complete):
        assert not fails(check, Smoother())
    assert "'classification'" in fails(kind_matches, Smoother(16, "classification"))
    assert "shape (6, 1)" in fails(predictions_fit, Flat())
    assert "not finite" in fails(predictions_fit, Infinite())
    assert "embed.bias 0 times" in fails(param_groups_are_complete, Untrained())
    assert "embed.weight 2 times" in fails(param_groups_are_complete, TwiceTrained())
    print(fails(predictions_fit, Flat()))


def test_what_does_not_lift_is_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell abcd3ed6
    class Branching(Smoother):
        def predict(self, state, x):
            return (
                super().predict(state, x) if x.mean() > 0 else state[1].mean(0).expand(len(x), -1)
            )

    assert not fails(loop_equals_vmap, Smoother())
    assert not fails(loop_equals_vmap, MAML(MLP([1, 8, 1]), 0.01, kind="regression"))
    found = fails(loop_equals_vmap, Branching())
    assert "vmap refuses" in found
    print(found)


def test_gradients_that_are_not_derivatives_are_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 2dbe8d3c
    class Cut(Smoother):
        def adapt(self, support):
            z, y = super().adapt(support)
            return z.detach(), y

    class Unused(Smoother):
        def __init__(self):
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(1))

    class Kinked(Smoother):
        "Its only parameter stands next to a kink: the larger step jumps over it."

        def __init__(self):
            super().__init__()
            self.embed.requires_grad_(False)
            self.level = nn.Parameter(torch.tensor(3e-7))

        def predict(self, state, x):
            return super().predict(state, x) + self.level.abs()

    assert gradients_are_true(Case.of(Kinked(), sinusoids, 3, 0)) is None
    for check in (gradients_arrive, gradients_are_true):
        assert check(Case.of(Smoother(), sinusoids, 3, 0)) is None
    assert "not the derivative, at embed.weight" in fails(gradients_are_true, Cut())
    assert "no gradient for spare" in fails(gradients_arrive, Unused())
    print(fails(gradients_are_true, Cut()))


def test_what_is_approximate_says_so():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 892c3c13
    class Undeclared(MAML):
        def step(self, phi, support):
            g = grad(self.support_loss)({k: p.detach() for k, p in phi.items()}, support)
            return {k: p - self.lr * g[k] for k, p in phi.items()}

    net = MLP([1, 8, 1])
    exact = MAML(net, 0.1, kind="regression")
    first_order = MAML(net, 0.1, first_order=True, kind="regression")
    assert gradients_are_true(Case.of(exact, sinusoids, 3, 0)) is None
    assert "on purpose" in gradients_are_true(Case.of(first_order, sinusoids, 3, 0))
    assert "approximate" in fails(gradients_are_true, Undeclared(net, 0.1, kind="regression"))


def test_broken_symmetries_are_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 0ee2a784
    class LastCounts(Smoother):
        def predict(self, state, x):
            z, y = state
            return super().predict((z, y * torch.arange(len(y)).to(y)[:, None]), x)

    class FirstClassWins(Smoother):
        def predict(self, state, x):
            answers = super().predict(state, x)
            return answers + torch.eye(answers.shape[-1])[0].to(answers)

    class Peeking(Smoother):
        def predict(self, state, x):
            return super().predict(state, x - x.mean(0))

    for_pictures = Smoother(16, "classification")
    for check in (support_is_a_set, classes_are_names, queries_stand_alone):
        assert not fails(check, Smoother()) + fails(check, for_pictures, pictures)
    assert "another order" in fails(support_is_a_set, LastCounts())
    assert "renumbered" in fails(classes_are_names, FirstClassWins(16, "classification"), pictures)
    assert "single queries" in fails(queries_stand_alone, Peeking())
    transductive = ProtoNet(Conv4(size=16, width=4, stats="batch"))
    assert "transductive" in queries_stand_alone(Case.of(transductive, pictures, 3, 0))
    print(fails(queries_stand_alone, Peeking()))


def test_learners_for_one_size_only_are_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 2bd1d076
    class FourOnly(Smoother):
        def adapt(self, support):
            z, y = super().adapt(support)
            return z, y @ torch.eye(4).to(y)

    class OneShot(Smoother):
        def adapt(self, support):
            z, y = super().adapt(support)
            return z[:4], y[:4] / (len(y) == 4)

    class Careless(Smoother):
        def forward(self, support, query):
            return self.predict(self.adapt(support), query)

    for_pictures = Smoother(16, "classification")
    for check in (another_way, another_shot, misfits_are_refused):
        assert not fails(check, Smoother()) + fails(check, for_pictures, pictures)
    assert "names the way" in fails(another_way, FourOnly(16, "classification"), pictures)
    assert "whatever the number" in fails(another_shot, OneShot(16, "classification"), pictures)
    assert "ValueError" in fails(misfits_are_refused, Careless())
    print(fails(misfits_are_refused, Careless()))


def test_what_happens_behind_the_scenes_is_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 4cde9c5b
    class Counting(Smoother):
        def __init__(self):
            super().__init__()
            self.register_buffer("tasks", torch.zeros(()))

        def adapt(self, support):
            self.tasks += 1
            return super().adapt(support)

    class CountingInTraining(Counting):
        def adapt(self, support):
            return super().adapt(support) if self.training else Smoother.adapt(self, support)

    class Remembering(Smoother):
        def adapt(self, support):
            self.latest = super().adapt(support)
            return ()

        def predict(self, state, x):
            return super().predict(self.latest, x)

    class Noisy(Smoother):
        def adapt(self, support):
            z, y = super().adapt(support)
            return z + 0.1 * torch.randn_like(z), y

    class Autograd(Smoother):
        def adapt(self, support):
            z, y = super().adapt(support)
            return z - torch.autograd.grad(z.square().sum(), z, create_graph=True)[0] / 4, y

    quiet = (nothing_is_written, state_is_complete, adapting_is_deterministic, works_without_grad)
    assert not any(fails(check, Smoother()) for check in quiet)
    assert "tasks changed" in fails(nothing_is_written, Counting())
    assert "training=True" in fails(nothing_is_written, CountingInTraining())
    assert "in between" in fails(state_is_complete, Remembering())
    assert "two adaptations" in fails(adapting_is_deterministic, Noisy())
    assert "torch.func.grad" in fails(works_without_grad, Autograd())
    print(fails(nothing_is_written, Counting()))


def test_what_cannot_be_saved_is_found():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()
    # cell 8781cebf
    assert "@register" in fails(survives_saving, Smoother())
    good = ProtoNet(MLP([16, 4, 3]))
    assert not fails(survives_saving, good, pictures)
    good.embed.layers[0].scale = 2.0
    good.predict = lambda state, x: -x.flatten(1)  # set on the instance, so it is lost
    assert "other predictions" in fails(survives_saving, good, pictures)


def test_a_good_learner_passes_the_battery():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()
    # cell 2532a1f9
    learner = ProtoNet(MLP([16, 8, 4]))
    before = snapshot(learner)
    verdicts = check_learner(learner, pictures)
    assert list(verdicts) == [check.__name__ for check in CHECKS]
    assert set(verdicts.values()) == {"passed"}
    after = snapshot(learner)
    assert all(torch.equal(before[k], after[k]) for k in before)
    verdicts


def test_all_failures_are_reported_together():
    Smoother, fails, pictures, sinusoids = cell_5d98c66f()

    # cell 2588c107
    class Wrong(Smoother):
        def adapt(self, support):
            self.embed.bias.data += 1
            raise KeyError("phi")

    try:
        check_learner(Wrong(), pictures)
    except ContractError as error:
        report = error
    assert {"kind_matches", "nothing_is_written", "another_shot"} <= set(report.flaws)
    assert "KeyError: 'phi'" in str(report) and "Wrong fails" in str(report)
    print(str(report)[:600])


def test_every_exported_learner_is_registered():
    # cell 3bb51431
    assert unregistered_learners() == []
