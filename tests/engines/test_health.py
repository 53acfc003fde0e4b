"""A head that is killed on purpose raises the health warning, on both engines, and a healthy one does not."""

import json
from types import SimpleNamespace

import pytest
import torch
from tv_cases import CONFIGS, SMALL_OPTS, d2_setup

from group_sampling.engines.tv import train as tv_train
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.events import logging_to
from group_sampling.engines.tv.model import build_model
from group_sampling.head import SoftmaxRPNHead


def zero_weights(head):
    torch.nn.init.zeros_(head.conv.weight)


def negative_bias(head):
    torch.nn.init.constant_(head.conv.bias, -1e3)


def constant_scale(head):
    """The anchors of scale 64, the third of a cell, have the same two logits everywhere, and stay so."""
    rows = [2, head.num_anchors + 2]
    with torch.no_grad():
        head.cls_logits.weight[rows] = 0.0
    head.cls_logits.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(rows), 0.0))


DEATHS = {
    "healthy": (lambda head: None, []),
    "zero weights": (zero_weights, ["0% of the head's hidden units fire", *["all anchors have the same score"] * 4]),
    "negative bias": (negative_bias, ["0% of the head's hidden units fire", *["all anchors have the same score"] * 4]),
    "one scale": (constant_scale, ["scale 64: all anchors have the same score"]),
}


def train_torchvision(config, opts, kill):
    cfg = load_config(config, opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    kill(model.rpn.head)
    with logging_to(cfg.OUTPUT_DIR, rank=0):
        tv_train.train(cfg, model, torch.device("cpu"), resume=False)


def train_detectron2(config, opts, kill):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from group_sampling.engines.d2.train import Trainer

    trainer = Trainer(d2_setup(SimpleNamespace(config_file=config, opts=opts, resume=False, eval_only=False)))
    kill(trainer.model.proposal_generator.rpn_head)
    trainer.train()


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("train", [train_torchvision, train_detectron2])
def test_killing_a_head_raises_the_warning(train, death, tmp_path):
    kill, expected = DEATHS[death]
    opts = [
        *SMALL_OPTS,
        "DATASETS.TEST",
        "()",
        "OUTPUT_DIR",
        str(tmp_path),
        "SOLVER.MAX_ITER",
        "2",
        "SOLVER.STEPS",
        "()",
    ]
    train(str(CONFIGS / "fpn_finest_sampling.yaml"), opts, kill)
    found = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "group_sampling.engines.step" in line]
    assert "iter: 1  health: units: " in found[0] and "grad_norm: " in found[0]
    assert len(found) == 1 + len(expected)
    for line, text in zip(found[1:], expected):
        assert "WARNING" in line and text in line and "The loss may look fine" in line

    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()][-1]
    assert metrics["iteration"] == 1 and 0 < metrics["total_loss"] < 10  # it shows nothing
    assert metrics["health/units"] == (0.0 if len(expected) == 5 else pytest.approx(1.0, abs=0.5))
    assert {f"health/logit_std@{scale}" for scale in (16, 32, 64, 128)} <= metrics.keys()
    assert (metrics["health/logit_std@64"] < 1e-5) == (death != "healthy")
    assert metrics["health/grad_norm_max"] >= metrics["grad_norm"] > 0


@pytest.mark.parametrize("num_samples", [4, 200])
def test_units_that_fire(num_samples):
    """At the drawn anchors alone where those are asked for, else anywhere."""
    from group_sampling.anchors import AnchorGrid, cell_anchors

    grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(16, 16)])
    head = SoftmaxRPNHead(6, 2).train()
    torch.nn.init.normal_(head.conv.bias, std=0.05, generator=torch.Generator().manual_seed(1))
    feature = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.conv.bias[2] = -1e3
        hidden = torch.relu(torch.nn.functional.conv2d(feature, head.conv.weight, head.conv.bias, padding=1))
    assert head.fired is None
    index = torch.randint(grid.num_anchors, (2, num_samples), generator=torch.Generator().manual_seed(2))
    head.predictor([feature], grid)(index)
    cells = index // 2 if num_samples == 4 else torch.arange(256).expand(2, -1)
    expected = [any(hidden[i, unit].flatten()[cell] > 0 for i in (0, 1) for cell in cells[i]) for unit in range(6)]
    assert head.fired.tolist() == expected and expected[2] is False and any(expected)
