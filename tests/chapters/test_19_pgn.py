"""Made from nbs/19_pgn.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import torch

from metabook.episodes import Classes, FewShot, Sinusoids
from metabook.networks import MLP, Conv4
from metabook.pgn import FORMS, PGN
from metabook.testing import check_learner


def test_keeps_the_contract():
    # cell d0d21962
    def small_pgn(**options):
        torch.manual_seed(0)
        return PGN(MLP([1, 12, 1]), kind="regression", hidden=8, **options)

    torch.manual_seed(0)
    noise = torch.randn(40, 1, 16, 16)
    few_images = FewShot(Classes(noise, torch.full((8,), 5)), way=3, shot=2, query=2)
    # cell 6d4622bd
    for form in FORMS:
        check_learner(small_pgn(form=form), Sinusoids(5, 4))
    check_learner(small_pgn(description="task", task_size=2), Sinusoids(5, 4))
    check_learner(
        small_pgn(description="both", task_size=2, steps=2, loss_steps="all"), Sinusoids(5, 4)
    )
    for stats in ("batch", "support"):
        net = Conv4(1, out=3, size=16, width=4, pool="stride", stats=stats)
        check_learner(PGN(net, form="film", hidden=8), few_images)
