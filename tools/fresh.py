"""The state in which every test starts."""

from __future__ import annotations

import random

import numpy as np
import torch


def start_afresh() -> None:
    """The same random numbers and the same default type, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
