"""What weight decay pulls on."""

import minilora as ml
from minilora.runs.loop import build_optimizer
from tests.models import tiny_model


def test_weight_decay_pulls_on_matrices_alone():
    model = tiny_model("llama-bias-tied-wide-heads")
    groups = build_optimizer(model, ml.TrainConfig(weight_decay=0.3)).param_groups
    expected = {name: 0.3 if p.dim() == 2 else 0.0 for name, p in model.named_parameters()}
    assert {name: group["weight_decay"] for group in groups for name in group["param_names"]} == expected
    assert {group["weight_decay"] for group in build_optimizer(model, ml.TrainConfig()).param_groups} == {0.0}
