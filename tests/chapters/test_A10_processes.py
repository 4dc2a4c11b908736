"""Made from nbs/A10_processes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

from signal import SIGINT, SIGTERM, getsignal, raise_signal

import pytest
import torch
from torch import nn

from metabook import processes
from metabook.engine import gradients
from metabook.episodes import Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.structures import tree_map


def test_one_process_is_a_world_of_its_own():
    # cell 28151bdf
    processes.join()  # nobody launched this
    assert not processes.launched() and processes.world() == 1
    assert processes.rank() == 0 and processes.main() and processes.recordable()
    t = torch.randn(3)
    before = t.clone()
    processes.summed_([t])
    processes.alike_([t])
    processes.agree(seed=1)
    processes.wait()
    assert torch.equal(t, before) and torch.equal(processes.gathered(t, 3), before)
    assert processes.share(3) == slice(0, 3) and processes.dealt([1, 2, 3]) == [1, 2, 3]
    assert torch.equal(processes.collected([t[:2], t[2:]], [2, 1]), before)


@pytest.mark.proves("eq-shares")
def test_shares_are_equal_and_complete():
    # cell 14218837
    assert [processes.share(5, r, 2) for r in range(2)] == [slice(0, 2), slice(2, 5)]
    for n, of in [(5, 2), (8, 3), (7, 7), (64, 5)]:
        parts = [list(range(n))[processes.share(n, r, of)] for r in range(of)]
        assert [i for p in parts for i in p] == list(range(n))
        assert {len(p) for p in parts} <= {n // of, n // of + 1}
    with pytest.raises(ValueError, match=r"2 tasks for 3 processes, .* raise meta_batch"):
        processes.share(2, 0, 3)


def test_tensors_travel_as_one():
    # cell 86c8cef0
    sent = []

    def twice(message):
        "What a sum over two processes does that have the same."
        sent.append(len(message))
        message.mul_(2)

    a, b, c = torch.ones(2, 3), torch.ones(4).double(), torch.arange(5.0)
    processes.as_one([a, b, c], twice)
    assert sent == [11, 4]  # six and five numbers of one type in one message
    assert a.eq(2).all() and b.eq(2).all() and c.tolist() == [0, 2, 4, 6, 8]

    def dead(message):
        raise RuntimeError(
            "[/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1234. And more"
        )

    with pytest.raises(
        processes.Lost, match=r"reached \(Connection closed by peer \[127.0.0.1\]:1234\)$"
    ):
        processes.as_one([a], dead)


def test_rows_find_their_places():
    # cell ded949d1
    rows = torch.randn(5, 2)
    shares = [processes.share(5, r, 3) for r in range(3)]
    assert torch.equal(sum(processes.placed(rows[s], 5, s) for s in shares), rows)


@pytest.mark.proves("eq-shared-gradient")
def test_shares_of_a_gradient_sum_to_it():
    # cell c6fea59a
    class Tempered(MAML):
        "Cares most for the tasks that went worst; learns how much."

        def __init__(self, net, **how):
            super().__init__(net, **how)
            self.heat = nn.Parameter(torch.tensor(0.5))

        def combine(self, losses):
            return (losses / self.heat).logsumexp(0) * self.heat

    def gradient_of(episodes, **how):
        "The gradient, and what the engine says of the tasks."
        learner.zero_grad()
        graded = gradients(learner, episodes, **how)
        return graded, [p.grad for p in learner.parameters()]

    torch.manual_seed(0)
    learner = Tempered(MLP([1, 8, 1]), lr=0.1, kind="regression").double()
    episodes = Sinusoids(3, 4).sample(5).to(dtype=torch.float64)
    whole, wanted = gradient_of(episodes)
    found = []
    for r in range(3):
        shared = processes.Shared(5, r, 3, losses=whole.losses)
        mine = tree_map(lambda t, s=shared.mine: t[s], episodes)
        for chunk in (None, 1):
            graded, parts = gradient_of(mine, shared=shared, chunk=chunk)
            assert torch.equal(graded.losses, shared.placed(graded.losses[shared.mine]))
        found.append((graded.losses, parts))
    torch.testing.assert_close(sum(losses for losses, _ in found), whole.losses)
    summed = [sum(p) for p in zip(*(parts for _, parts in found), strict=True)]
    torch.testing.assert_close(summed, wanted, rtol=1e-10, atol=1e-14)


def test_a_polite_request_to_end_is_heard_between_two_steps():
    # cell b1686937
    before = getsignal(SIGTERM), getsignal(SIGINT)
    with processes.stoppable() as request:
        assert not request.made
        raise_signal(SIGTERM)
        assert request.made
        with pytest.raises(KeyboardInterrupt):  # somebody is impatient
            raise_signal(SIGINT)
        request.heard, calm = False, True
        try:
            raise_signal(SIGTERM)  # who is writing a folder is not disturbed
        except KeyboardInterrupt:
            calm = False
    assert calm
    assert before == (getsignal(SIGTERM), getsignal(SIGINT))
