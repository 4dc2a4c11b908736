"""Made from nbs/A02_registry.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json

import pytest
import torch

from metabook.learners import Learner
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.prototypes import ProtoNet
from metabook.registry import build, methods, plain, register


def test_an_instance_notes_its_arguments():
    # cell 54d2c7c0
    learner = ProtoNet(MLP([2, 8, 3]))
    assert learner.config["name"] == "protonet" and learner.config["args"]["distance"] == "squared"
    assert learner.config["args"]["embed"].config == {"name": "mlp", "args": {"sizes": [2, 8, 3]}}


def test_only_registered_classes_are_saved():
    # cell 661d3739
    class Scaled(MLP):
        "Inherits from a registered class without being registered."

    for unknown in (ProtoNet(torch.nn.Linear(2, 2)), ProtoNet(Scaled([2, 2]))):
        with pytest.raises(TypeError, match="register"):
            plain("learner", unknown)
    assert plain("sizes", (1, 2.5, "a", None)) == [1, 2.5, "a", None]
    later = MAML(MLP([2, 3]), lr=0.5)
    later.lr, later.test_steps = 0.1, 20
    assert {"lr": 0.1, "steps": 1, "test_steps": 20}.items() <= plain("learner", later)[
        "args"
    ].items()

    with pytest.raises(ValueError, match="already names ProtoNet"):
        register("protonet")(Scaled)
    with pytest.raises(TypeError, match="spell its arguments out"):

        @register("anything")
        class Anything(Learner):
            def __init__(self, *layers: int):
                super().__init__()


def test_built_from_its_own_note():
    # cell e1eb6802
    learner = build(plain("learner", MAML(MLP([1, 40, 1]), lr=0.01, kind="regression")))
    assert isinstance(learner, MAML) and learner.lr == 0.01 and learner.kind == "regression"
    assert [tuple(p.shape) for p in learner.parameters()] == [(40, 1), (40,), (1, 40), (1,)]
    assert {"maml", "protonet"} <= set(methods())


def test_a_wrong_name_or_argument_says_so():
    # cell 584cef8c
    for config, message in {
        '{"name": "MALM", "args": {}}': "unknown method 'MALM': did you mean 'maml'",
        '{"name": "maml", "args": {"net": {"name": "conf4", "args": {}}}}': "network 'conf4': did you mean 'conv4'",
        '{"name": "maml", "args": {"net": {"name": "mlp", "args": {"size": [1]}}}}': "'mlp' cannot be built",
        '{"name": "maml", "args": {"net": {"name": "conv4", "args": {"width": -1}}}}': "'conv4' cannot be built",
    }.items():
        with pytest.raises(ValueError, match=message):
            build(json.loads(config))
