"""Made from nbs/20_meta_transfer.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import torch

from metabook.episodes import Classes, FewShot
from metabook.meta_transfer import MetaTransfer
from metabook.networks import MLP, Conv4, ResNet12
from metabook.testing import check_learner


def test_contract():
    # cell 40ad2edc
    tasks = FewShot(
        Classes.of(
            {str(i): torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8) for i in range(5)}
        ),
        way=3,
        shot=2,
        query=2,
    )
    for net in (
        *(Conv4(size=16, width=4, pool="stride", stats=s) for s in ("batch", "support", "running")),
        Conv4(size=16, width=4),
        MLP([256, 12, 6]),
    ):
        check_learner(MetaTransfer(net), tasks)
    check_learner(MetaTransfer(net, way=3, steps=2, test_steps=4), tasks)
    check_learner(MetaTransfer(net, first_order=True), tasks)
    check_learner(MetaTransfer(ResNet12(1, widths=[2, 2, 3, 4], stats="running"), steps=3), tasks)
