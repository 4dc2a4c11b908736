"""Stands in for `metabook.engine.gradients` and `precise` until they are there."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from metabook.engine import losses


def gradients(learner, episodes, *, lift="auto", chunk=None, recompute=False):
    learner.combine(losses(learner, episodes, lift)).backward()


@contextmanager
def precise(precision):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield
