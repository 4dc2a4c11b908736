"""Made from nbs/A25_messages.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from metabook.messages import Impossible, in_our_words


def test_refusals_name_the_layer_and_the_way_out():
    # cell 25000005
    class Looks(nn.Module):
        "Looks at a value, which nobody can of many tasks at once."

        def forward(self, x):
            return x if x.mean() > 0 else -x

    net = nn.Sequential(nn.Linear(3, 3), Looks())
    looking = pytest.raises(Impossible, match=r"1 \(Looks\): it looks at a value.*torch.where")
    with looking, in_our_words(net, x=torch.ones(3)):
        vmap(net)(torch.ones(2, 3))
    mixing = pytest.raises(ValueError, match=r"the examples are torch\.float64")
    with mixing, in_our_words(net, query=torch.ones(3).double()):
        net(torch.ones(3).double())
