"""The state in which every test starts."""

from __future__ import annotations

import random

import numpy as np
import torch


def start_afresh() -> None:
    """The same random numbers, the same default type, and nobody who listens to every module, whatever ran before.

    A broken test may end before it takes its hooks away.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    for name, hooks in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and name.endswith("_hooks"):
            hooks.clear()
