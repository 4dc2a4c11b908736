"""Made from nbs/10_meta_gradients.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import copy
import weakref
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metabook.classes import Classes
from metabook.engine import gradients
from metabook.episodes import Episode, Examples, FewShot, Sinusoids
from metabook.learners import Learner
from metabook.maml import MAML
from metabook.meta_gradients import ANIL, Directed, ImplicitMAML, Reptile, conjugate_gradients, dot
from metabook.networks import MLP, Conv4, call
from metabook.structures import tree_map
from metabook.testing import check_learner


def cell_10cf0016():
    # cell 10cf0016
    def points(kappa, best):
        "Examples of y = best . x; their mean squared error is 1/2 sum kappa (theta - best)^2."
        r = torch.diag((kappa * len(kappa) / 2).sqrt())
        x = torch.cat([r, -r])
        return Examples(x, x @ best[:, None])

    def plane(theta):
        "The network f(x) = theta . x."
        net = MLP([len(theta), 1]).double()
        with torch.no_grad():
            net.layers[0].weight.copy_(theta)
            net.layers[0].bias.zero_()
        return net

    def slope(learner, episode):
        "The gradient of the learner's loss by the weights of a plane."
        return torch.autograd.grad(learner.loss(episode), learner.net.layers[0].weight)[0][0]

    return plane, points, slope


@pytest.mark.proves("eq-reptile-update")
def test_reptile_by_hand():
    plane, points, slope = cell_10cf0016()
    # cell 10cf0017
    side = points(torch.tensor([4.0]).double(), torch.ones(1).double())
    learner = Reptile(plane(torch.zeros(1).double()), lr=0.1, steps=2, kind="regression")
    torch.testing.assert_close(slope(learner, Episode(side, side)).item(), -0.64)

    torch.optim.SGD(learner.parameters(), lr=1.0).zero_grad()
    learner.loss(Episode(side, side)).backward()
    torch.optim.SGD(learner.parameters(), lr=1.0).step()
    torch.testing.assert_close(learner.net.layers[0].weight.item(), 0.64)


def test_reptile_as_its_authors_write_it():
    # cell 10cf1002
    torch.manual_seed(0)
    net = MLP([1, 4, 1]).double()
    batch = Sinusoids(3, 4).sample(2, torch.Generator().manual_seed(1)).to(dtype=torch.float64)
    old, ends = [p.detach().clone() for p in net.parameters()], []
    for i in range(2):  # the tasks of a meta-batch
        twin = copy.deepcopy(net)
        inner = torch.optim.SGD(twin.parameters(), lr=0.05)
        x, y = (
            torch.cat([a[i], b[i]]) for a, b in zip(batch.support[:2], batch.query[:2], strict=True)
        )
        for rows in (
            (0, 2, 4, 6),
            (1, 3, 5),
            (0, 2, 4, 6),
        ):  # three minibatches of the seven examples
            inner.zero_grad()
            nn.functional.mse_loss(twin(x[list(rows)]), y[list(rows)]).backward()
            inner.step()
        ends.append([p.detach() for p in twin.parameters()])
    wish = [o + 0.25 * ((a + b) / 2 - o) for o, a, b in zip(old, *ends, strict=True)]

    outer = torch.optim.SGD(net.parameters(), lr=0.25)
    outer.zero_grad()
    gradients(Reptile(net, lr=0.05, steps=3, batches=2, kind="regression"), batch)
    outer.step()
    torch.testing.assert_close([p.detach() for p in net.parameters()], wish)


@pytest.mark.proves("eq-meta-expansion", "eq-meta-inner-product")
def test_three_directions_from_two_vectors():
    plane, points, slope = cell_10cf0016()
    # cell 10cf0021
    g = torch.Generator().manual_seed(0)
    kappas = [torch.rand(2, generator=g).double() + 0.5 for _ in range(3)]
    minima = [torch.randn(2, generator=g).double() for _ in range(3)]
    theta = torch.randn(2, generator=g).double()
    t, pairs = 3, list(permutations(range(3), 2))

    def at(j, phi):
        "The gradient of minibatch j."
        return kappas[j] * (phi - minima[j])

    def reptile(order, alpha):
        parts = [points(kappas[j], minima[j]) for j in order]
        x, y = (
            torch.stack(part, 1).flatten(0, 1)
            for part in ([p.x for p in parts], [p.y for p in parts])
        )
        episode = Episode(Examples(x[:6], y[:6]), Examples(x[6:], y[6:]))
        return slope(Reptile(plane(theta), alpha, t, batches=t, kind="regression"), episode) / alpha

    def maml(order, alpha, exact):
        phi = theta
        for j in order[:-1]:
            phi = phi - alpha * at(j, phi)
        wish = at(order[-1], phi)
        for j in order[:-1] if exact else ():
            wish = wish - alpha * kappas[j] * wish
        return wish

    mean = sum(at(j, theta) for j in range(t)) / t
    inner = sum(kappas[j] * at(i, theta) for i, j in pairs) / len(pairs)
    start = theta.clone().requires_grad_()
    product = sum(at(i, start) @ at(j, start) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(torch.autograd.grad(product, start)[0] / 2, inner)

    for direction, a, b in (
        (lambda order, alpha: maml(order, alpha, True), 1, -2 * (t - 1)),
        (lambda order, alpha: maml(order, alpha, False), 1, -(t - 1)),
        (reptile, t, -t * (t - 1) / 2),
    ):
        found = {
            alpha: sum(direction(o, alpha) for o in permutations(range(t))) / 6
            for alpha in (1e-3, 1e-4)
        }
        rest = [(v - a * mean - b * alpha * inner).norm().item() for alpha, v in found.items()]
        assert 50 < rest[0] / rest[1] < 200


@pytest.mark.proves("eq-anil-step")
def test_only_the_head_moves():
    # cell 10cf0031
    torch.manual_seed(0)
    net = MLP([1, 4, 2]).double()
    support = Examples(torch.randn(5, 1).double(), torch.randn(5, 2).double())
    phi, _ = ANIL(net, lr=0.3, steps=2, kind="regression").adapt(support)
    assert list(phi) == ["layers.1.weight", "layers.1.bias"]

    z = torch.relu(net.layers[0](support.x))
    z = torch.cat([z, torch.ones(5, 1)], 1).detach()  # features, and a one for the bias
    zeta = torch.cat([net.layers[1].weight, net.layers[1].bias[:, None]], 1).detach()
    for _ in range(2):
        zeta = zeta - 0.3 * 2 * (z @ zeta.T - support.y).T @ z / support.y.numel()
    torch.testing.assert_close(
        torch.cat([phi["layers.1.weight"], phi["layers.1.bias"][:, None]], 1), zeta
    )

    everything = ANIL(net, lr=0.3, steps=2, adapts="layers", kind="regression")
    whole = MAML(net, lr=0.3, steps=2, kind="regression")
    torch.testing.assert_close(everything(support, support.x), whole(support, support.x))


def test_conjugate_gradients_solve():
    # cell 10cf0041
    scale = {
        "a": torch.tensor([1.0, 2.0, 2.0]).double(),
        "b": torch.tensor([[5.0], [1.0]]).double(),
    }
    b = {k: torch.randn_like(v) for k, v in scale.items()}

    def product(v):
        return {k: scale[k] * p for k, p in v.items()}

    for steps in (3, 12):  # three different eigenvalues; and steps to spare
        solved = conjugate_gradients(product, b, steps)
        torch.testing.assert_close(solved, {k: v / scale[k] for k, v in b.items()})
    once = conjugate_gradients(product, b, 1)  # one step goes along the right-hand side
    torch.testing.assert_close(
        dot(once, b) / (dot(once, once) * dot(b, b)).sqrt(), torch.tensor(1.0).double()
    )


def test_implicit_by_hand():
    plane, points, slope = cell_10cf0016()
    # cell 10cf1003
    side = points(torch.tensor([4.0]).double(), torch.ones(1).double())
    start = plane(torch.zeros(1).double())
    learner = ImplicitMAML(start, 0.1, steps=100, penalty=4.0, kind="regression")
    torch.testing.assert_close(learner.end(side)["layers.0.weight"].item(), 0.5)
    torch.testing.assert_close(slope(learner, Episode(side, side)).item(), -1.0)

    short = ImplicitMAML(start, 0.1, steps=1, penalty=4.0, kind="regression")  # arrives at 0.4
    torch.testing.assert_close(short.residual(side).item(), 0.8)  # |4 (0.4 - 1) + 4 (0.4 - 0)|


@pytest.mark.proves("eq-imaml-gradient")
def test_the_gradient_of_the_place():
    # cell 10cf0043
    torch.manual_seed(0)
    episodes = Sinusoids(5, 8).sample(1, torch.Generator().manual_seed(3)).to(dtype=torch.float64)
    wave = tree_map(lambda t: t[0], episodes)

    def gradient(steps, solver_steps=20, penalty=4.0):
        "By conjugate gradients, or through the steps for `solver_steps=0`; and what the inner loop left."
        torch.manual_seed(0)
        net = MLP([1, 5, 5, 1]).double()
        learner = ImplicitMAML(
            net, 0.05, steps, penalty=penalty, solver_steps=solver_steps or 1, kind="regression"
        )
        loss = learner.loss(wave) if solver_steps else Learner.loss(learner, wave)
        found = torch.autograd.grad(loss, list(net.parameters()))
        return torch.cat([g.flatten() for g in found]), learner.residual(wave.support).item()

    implicit, residual = gradient(100)
    through, _ = gradient(100, solver_steps=0)
    assert residual < 1e-6
    torch.testing.assert_close(implicit, through, rtol=1e-5, atol=1e-7)


def test_the_direction_is_the_inverse_written_out():
    # cell 10cf1004
    torch.manual_seed(0)
    net = MLP([1, 3, 1]).double()
    net.layers[0].bias.requires_grad_(False)  # what is frozen stays out of the system, too
    support, query = (
        Examples(torch.randn(n, 1).double(), torch.randn(n, 1).double()) for n in (5, 6)
    )
    learner = ImplicitMAML(net, 0.05, 3, penalty=4.0, solver_steps=30, kind="regression")
    phi = {k: p for k, p in learner.end(support).items() if k != "layers.0.bias"}

    def mean_error(flat, side):
        "The loss as a function of one long vector."
        parts = flat.split([p.numel() for p in phi.values()])
        given = {k: part.reshape(p.shape) for (k, p), part in zip(phi.items(), parts, strict=True)}
        return (call(net, given, side.x) - side.y).square().mean()

    flat = torch.cat([p.detach().flatten() for p in phi.values()])
    curvature = torch.autograd.functional.hessian(lambda v: mean_error(v, support), flat)
    g = torch.autograd.functional.jacobian(lambda v: mean_error(v, query), flat)
    wish = torch.linalg.solve(torch.eye(len(flat)).double() + curvature / 4.0, g)
    found = torch.cat([v.flatten() for v in learner.direction(Episode(support, query)).values()])
    torch.testing.assert_close(found, wish)


def test_keeps_the_contract(device):
    # cell 10cf0018
    noise = Classes(torch.rand(96, 1, 16, 16), sizes=torch.full((8,), 12))
    few = FewShot(noise, way=3, shot=1, query=2)
    for learner in (
        Reptile(Conv4(out=3, size=16, width=2, pool="stride", stats="running"), steps=1, batches=2),
        ANIL(
            Conv4(out=3, size=16, width=2, pool="stride", stats="support"),
            adapts=["convs", "norms"],
        ),
    ):
        check_learner(learner.to(device), few)
    curve = ImplicitMAML(
        MLP([1, 8, 1]), lr=0.01, steps=2, penalty=2.0, solver_steps=1, kind="regression"
    )
    check_learner(curve.to(device), Sinusoids(5, 5))


def test_what_is_refused():
    # cell 10cf0019
    with pytest.raises(ValueError, match="batches=40, but a task has 15 examples"):
        Reptile(MLP([1, 8, 1]), kind="regression", batches=40).loss(
            Episode(
                Examples(torch.zeros(5, 1), torch.zeros(5, 1)),
                Examples(torch.zeros(10, 1), torch.zeros(10, 1)),
            )
        )
    with pytest.raises(ValueError, match="batches=0"):
        Reptile(MLP([1, 1]), batches=0)
    for adapts in (["hed"], [], ["layers", "hed"]):
        with pytest.raises(
            ValueError, match="names no part of MLP: expected layers or parameters among"
        ):
            ANIL(MLP([1, 1]), adapts=adapts)
    with pytest.raises(ValueError, match=r"penalty=0\.0, expected a positive number"):
        ImplicitMAML(MLP([1, 1]), penalty=0.0)
    with pytest.raises(ValueError, match="solver_steps=0"):
        ImplicitMAML(MLP([1, 1]), solver_steps=0)
    with pytest.raises(NotImplementedError, match="Directed does not say its direction"):
        Directed(MLP([1, 1]), kind="regression").direction(
            Episode(*[Examples(torch.zeros(5, 1), torch.zeros(5, 1))] * 2)
        )


@pytest.mark.proves("eq-start-weights")
def test_where_each_one_settles():
    # cell 10cf0098
    KAPPA = torch.tensor(
        [[8.0, 1.0], [1.0, 8.0]]
    ).double()  # curvatures of two tasks along two axes
    BEST = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double()  # their minima

    def weights(method, alpha, t, penalty=1.0):
        "How much each task counts along each axis, [2, 2]: the equation of the section on where each one settles."
        left = (1 - alpha * KAPPA) ** t
        return {
            "pre-training": KAPPA,
            "Reptile": 1 - left,
            "first order": KAPPA * left,
            "MAML": KAPPA * left**2,
            "implicit MAML": KAPPA * (penalty / (KAPPA + penalty)) ** 2,
        }[method]

    def settles(method, alpha, t, penalty=1.0):
        "The start, [2]: a weighted mean of the minima."
        v = weights(method, alpha, t, penalty)
        return (v * BEST).sum(0) / v.sum(0)

    plane, points, slope = cell_10cf0016()
    # cell 10cf0023
    learners = {
        "Reptile": lambda net: Reptile(net, 0.1, 2, kind="regression"),
        "first order": lambda net: MAML(net, 0.1, 2, first_order=True, kind="regression"),
        "MAML": lambda net: MAML(net, 0.1, 2, kind="regression"),
        "implicit MAML": lambda net: ImplicitMAML(net, 0.1, 300, penalty=0.5, kind="regression"),
    }
    theta = torch.tensor([0.3, -0.7]).double()
    for name, make in learners.items():
        for kappa, best, v in zip(KAPPA, BEST, weights(name, 0.1, 2, 0.5), strict=True):
            side = points(kappa, best)
            torch.testing.assert_close(
                slope(make(plane(theta)), Episode(side, side)), v * (theta - best)
            )

    for t, reptile, first, maml in ((1, -0.78, -0.28, 0.43), (2, -0.67, 0.43, 0.96)):
        for name, place in (("Reptile", reptile), ("first order", first), ("MAML", maml)):
            assert (settles(name, 0.1, t) - place).abs().max() < 0.006
    assert settles("Reptile", 0.1, 10_000).abs().max() < 1e-6
    assert (settles("MAML", 0.1, 300) - 1).abs().max() < 1e-6
    assert (settles("implicit MAML", 0.1, 1, penalty=1e-6) - 7 / 9).abs().max() < 1e-5


def test_the_path_is_forgotten():
    # cell 10cf0051
    class Living(TorchDispatchMode):
        "Counts the bytes of tensors that are alive, their most, and the products of convolutions and layers."

        def __init__(self):
            super().__init__()
            self.now = self.most = self.products = 0
            self.seen = weakref.WeakSet()

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            result = f(*args, **(kwargs or {}))
            tree_map(self.note, result)
            if f.overloadpacket in flop_registry:  # each product is counted with its addition
                self.products += (
                    flop_registry[f.overloadpacket](*args, **(kwargs or {}), out_val=result) / 2
                )
            return result

        def note(self, t):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, size)

        def gone(self, size):
            self.now -= size

    def meta_gradient(learner, episode):
        "What the outer loop needs from one task, without what is only logged."
        if isinstance(learner, Directed):
            with torch.no_grad():
                return list(learner.direction(episode).values())
        return torch.autograd.grad(learner.loss(episode), list(learner.net.parameters()))

    def cost(learner, episode):
        "Megabytes at the most, and millions of products."
        with Living() as living:
            meta_gradient(learner, episode)
        return living.most / 2**20, living.products / 1e6

    # cell 10cf0055
    torch.manual_seed(0)
    episode = tree_map(
        lambda t: t[0],
        FewShot(Classes(torch.rand(40, 1, 16, 16), sizes=torch.full((4,), 10)), 3, 2, 3).sample(1),
    )

    def megabytes(cls, steps, **more):
        "At the most."
        net = Conv4(1, out=3, size=16, width=8, pool="stride")
        return cost(cls(net, 0.1, steps, **more), episode)[0]

    for cls, more in ((Reptile, {}), (ImplicitMAML, {"solver_steps": 2})):
        assert megabytes(cls, 12, **more) < 1.01 * megabytes(cls, 3, **more)
    assert megabytes(MAML, 8) > 1.4 * megabytes(MAML, 3)

    def held(steps):
        "Bytes at the most while implicit MAML walks to the end of its inner loop."
        learner = ImplicitMAML(Conv4(1, out=3, size=16, width=8, pool="stride"), 0.1, steps)
        with torch.no_grad(), Living() as living:
            learner.end(episode.support)
        return living.most

    assert held(12) < 1.01 * held(3)


def test_one_step_of_reptile_is_pretraining():
    # cell 10cf0071
    torch.manual_seed(0)
    net = MLP([1, 6, 1])
    support, query = (Examples(torch.randn(n, 1), torch.randn(n, 1)) for n in (4, 6))
    together = Examples(*(torch.cat(pair) for pair in zip(support[:2], query[:2], strict=True)))
    plain = torch.autograd.grad(
        MAML(net, kind="regression").support_loss({}, together), list(net.parameters())
    )

    def reptile_direction(steps):
        loss = Reptile(net, lr=0.1, steps=steps, kind="regression").loss(Episode(support, query))
        return torch.autograd.grad(loss, list(net.parameters()))

    torch.testing.assert_close(list(reptile_direction(1)), [0.1 * g for g in plain])
    assert not torch.allclose(reptile_direction(3)[0], 0.3 * plain[0])


def test_the_surrogate_is_no_loss():
    plane, points, slope = cell_10cf0016()
    # cell 10cf0073
    side = points(torch.tensor([4.0]).double(), torch.ones(1).double())
    batch = tree_map(lambda t: t[None], Episode(side, side))
    learner = Reptile(plane(torch.tensor([0.5]).double()), lr=0.1, steps=2, kind="regression")
    assert learner.loss(Episode(side, side)) < 0  # (0.5 - 0.82) * 0.5
    logged = gradients(learner, batch).losses
    torch.testing.assert_close(logged.item(), 0.5 * 4 * 0.18**2)  # phi_2 = 0.82


def test_a_detached_head_still_sees_the_body():
    # cell 10cf0075
    torch.manual_seed(0)
    net = MLP([1, 6, 1]).double()
    support, query = (
        Examples(torch.randn(5, 1).double(), torch.randn(5, 1).double()) for _ in range(2)
    )

    def body_gradient(detach_features):
        learner = ANIL(net, lr=0.1, kind="regression")
        learner.first_order = True  # the mistake
        phi, _ = learner.adapt(support)
        if detach_features:
            phi = {
                k: net.get_parameter(k) + (p - net.get_parameter(k)).detach()
                for k, p in phi.items()
            }
        loss = learner.criterion(learner.predict((phi, {}), query.x), query.y)
        return torch.autograd.grad(loss, net.layers[0].weight)[0]

    assert not torch.allclose(body_gradient(False), body_gradient(True))


def test_three_directions_at_distance_one():
    plane, points, slope = cell_10cf0016()
    # cell 10cf0081
    # P = (1 - 0.5)^2 = 0.25.  Reptile: 1 - P; first order: kappa P; MAML: kappa P^2.  Here kappa = 5.
    side = points(torch.tensor([5.0]).double(), torch.zeros(1).double())
    for make, wish in (
        (lambda net: Reptile(net, 0.1, 2, kind="regression"), 0.75),
        (lambda net: MAML(net, 0.1, 2, first_order=True, kind="regression"), 5 * 0.25),
        (lambda net: MAML(net, 0.1, 2, kind="regression"), 5 * 0.25**2),
    ):
        found = slope(make(plane(torch.ones(1).double())), Episode(side, side))
        torch.testing.assert_close(found.item(), wish)


def test_boil_in_one_line():
    # cell 10cf0082
    boil = ANIL(Conv4(1, out=3, size=16, width=4), adapts=["convs", "norms"])
    phi, _ = boil.adapt(Examples(torch.randn(3, 1, 16, 16), torch.eye(3)))
    assert not any(k.startswith("head") for k in phi)
    assert not torch.equal(phi["convs.3.weight"], boil.net.convs[3].weight)


def test_the_square_of_the_distance_is_another_objective():
    plane, points, slope = cell_10cf0016()
    # cell 10cf0083
    # theta - phi = (I - P)(theta - best), so its half square has the gradient (I - P)^2 (theta - best): steep directions
    # count for even more. The weights are (1 - P)^2 in place of 1 - P.
    theta = torch.tensor([0.3, -0.7]).double()
    for kappa, best in ((torch.tensor([8.0, 1.0]).double(), torch.tensor([-1.0, 1.0]).double()),):
        learner = MAML(plane(theta), 0.1, 2, kind="regression")
        phi, _ = learner.adapt(points(kappa, best))
        half = 0.5 * sum((p - phi[k]).square().sum() for k, p in learner.net.named_parameters())
        left = (1 - 0.1 * kappa) ** 2
        found = torch.autograd.grad(half, learner.net.layers[0].weight)[0][0]
        torch.testing.assert_close(found, (1 - left) ** 2 * (theta - best))


def test_a_series_in_place_of_a_solver():
    # cell 10cf0084
    # Along an axis of curvature kappa it is a geometric series with ratio -kappa / lambda: it diverges for kappa > lambda,
    # where conjugate gradients still need one step for each different eigenvalue.
    def series(kappa, penalty, terms=200):
        return sum((-kappa / penalty) ** i for i in range(terms))

    torch.testing.assert_close(series(0.5, 1.0), 1 / (1 + 0.5))
    assert abs(series(2.0, 1.0)) > 1e6
