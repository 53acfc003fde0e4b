"""SOLVER.CLIP_GRADIENTS on both engines: the clipped gradients, the logged norm, gradient scalers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from tv_cases import CONFIGS, SMALL_OPTS, d2_setup

from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.engines.step import GradientClipper, TrainingStep
from group_sampling.engines.tv import train as tv_train
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model

TYPES = ["value", "norm", "full_model"]


def clipping(clip_type, value=1.0, norm_type=2.0, enabled=True):
    solver = {"ENABLED": enabled, "CLIP_TYPE": clip_type, "CLIP_VALUE": value, "NORM_TYPE": norm_type}
    return CfgNode({"SOLVER": {"CLIP_GRADIENTS": solver}})


def expected_gradients(gradients, clip_type, value, norm_type):
    """numpy, in double precision."""

    def norm(x):
        x = np.abs(np.concatenate([np.ravel(part) for part in x]))
        return x.max() if norm_type == math.inf else (x**norm_type).sum() ** (1 / norm_type)

    if clip_type == "value":
        return [np.clip(x, -value, value) for x in gradients]
    if clip_type == "norm":
        return [x * min(1, value / norm([x])) for x in gradients]
    return [x * min(1, value / norm(gradients)) for x in gradients]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("value", [0.7, 100.0])
@pytest.mark.parametrize("clip_type", TYPES)
def test_gradients_are_clipped_before_the_step(clip_type, value, norm_type):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in [(4, 3), (5,), (1,)]]
    weights = [torch.nn.Parameter(torch.zeros_like(x)) for x in gradients]
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [*weights[:2], unused]}, {"params": weights[2:]}], lr=1.0)
    clipper = GradientClipper(clipping(clip_type, value, norm_type), optimizer)
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.clone()
    optimizer.step()
    expected = expected_gradients([x.double().numpy() for x in gradients], clip_type, value, norm_type)
    for weight, x in zip(weights, expected):
        np.testing.assert_allclose(-weight.detach().numpy(), x, rtol=1e-5)
    assert torch.equal(unused, torch.ones(2))
    norm = math.sqrt(sum((x.double() ** 2).sum().item() for x in gradients))
    assert clipper.norm.item() == pytest.approx(norm)  # Euclidean and before clipping, whatever is clipped


def test_nothing_is_clipped_unless_enabled():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradientClipper(clipping("full_model", enabled=False), optimizer)
    weight.grad = torch.tensor([30.0, 40.0])
    optimizer.step()
    assert weight.tolist() == [-30.0, -40.0] and clipper.norm == 50.0


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_detectron2s_types_are_detectron2s(clip_type):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.solver.build import maybe_add_gradient_clipping

    cfg = clipping(clip_type, 0.5)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in [(4, 3), (5,)]]
    results = []
    for optimizer_class in (torch.optim.SGD, maybe_add_gradient_clipping(cfg, torch.optim.SGD)):
        weights = [torch.nn.Parameter(torch.zeros_like(x)) for x in gradients]
        optimizer = optimizer_class(weights, lr=1.0, momentum=0.9)
        if optimizer_class is torch.optim.SGD:
            GradientClipper(cfg, optimizer)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
        optimizer.step()
        results.append(weights)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_first(fused):
    """The step with a gradient scaler, as with float16 on a GPU; a step that overflows is skipped."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    cfg = clipping("full_model", 1.0)
    cfg.MODEL, cfg.SOLVER.AMP = CfgNode({"DEVICE": "cpu"}), CfgNode({"ENABLED": False})
    cfg.SOLVER.ACCUMULATE_STEPS, cfg.SOLVER.EMA = 1, CfgNode({"ENABLED": False})
    step = TrainingStep(cfg, torch.nn.Identity(), optimizer)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for iteration, factor in enumerate((1.0, 1e36)):
        losses = step(
            iteration, [factor], lambda x: {"loss": (weight * torch.tensor([3.0, 4.0]) * x[0]).sum()}, ["a.jpg"]
        )
        assert losses["loss"].isfinite() and not losses["loss"].requires_grad
        assert weight.tolist() == pytest.approx([-0.6, -0.8])
        assert math.isfinite(step.clipper.norm) == (factor == 1.0 or not fused)
    assert step.scaler.get_scale() == 512.0


@pytest.mark.parametrize("clip_type", ["value", "full_model"])
def test_engines_agree(clip_type, tmp_path):
    """Equal weights and batches: three steps of each engine's own trainer leave equal weights and log equal norms."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from group_sampling.engines.d2.train import Trainer

    config = str(CONFIGS / "fpn_finest_sampling.yaml")
    opts = [*SMALL_OPTS, "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path), "SOLVER.BASE_LR", "5.0"]
    opts += ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type]
    opts += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", {"value": "0.0001", "full_model": "0.01"}[clip_type]]
    tv_cfg = load_config(config, opts)
    torch.manual_seed(0)
    model = build_model(tv_cfg)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tv_train.train(tv_cfg, model, torch.device("cpu"), resume=False)
    (line,) = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())

    args = SimpleNamespace(config_file=config, opts=opts, resume=False, eval_only=False)
    trainer = Trainer(d2_setup(args))
    trainer.model.load_state_dict(convert_names(start, "detectron2"), strict=False)
    trainer.train()
    found = convert_names(dict(trainer.model.named_parameters()), "torchvision")
    moved = 0.0
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, found[name], atol=1e-4), name
        moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-3
    assert trainer.storage.history("grad_norm").median(3) == pytest.approx(line["grad_norm"], abs=1e-4)
    assert line["grad_norm"] > 0.01
    if clip_type == "full_model":  # at most three steps of the clipped norm, momentum 0.9, and a little weight decay
        distance = sum(((p - start[name]) ** 2).sum() for name, p in model.named_parameters()).sqrt()
        assert distance < 5 * (0.01 + 1e-4 * 100) * (1 + 1.9 + 2.71)


def test_what_cannot_be_clipped():
    config = str(CONFIGS / "fpn_finest_sampling.yaml")
    key = "SOLVER.CLIP_GRADIENTS"
    with pytest.raises(ConfigError, match=rf"{key}\.CLIP_TYPE: expected 'value' or 'norm' or 'full_model', got 'all'"):
        load_config(config, [*SMALL_OPTS, f"{key}.CLIP_TYPE", "all"])
    for option, value in (("CLIP_VALUE", "0.0"), ("NORM_TYPE", "-1.0")):
        with pytest.raises(ConfigError, match=rf"{key}.*expected positive numbers"):
            load_config(config, [*SMALL_OPTS, f"{key}.{option}", value])
