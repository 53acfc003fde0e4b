"""SOLVER.AMP and TEST.PRECISION on both engines: near float32, what stays float32, refusals, no waits, exact resume."""

import numpy as np
import pytest
import torch
from test_tv_train import assert_equal
from tv_cases import CONFIGS, SMALL_OPTS, arguments, d2_setup, first_step, gradients_of, train_module

import group_sampling.engines.step as step
import group_sampling.engines.tv.train as tv_train
from group_sampling.config import ConfigError
from group_sampling.detections import Detections
from group_sampling.engines.build import build_training_loader, load_records, training_precision
from group_sampling.engines.step import TrainingStep
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.evaluation.run import Evaluation

BF16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
FP16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"]
CONFIG = str(CONFIGS / "fpn_finest_sampling.yaml")


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
@pytest.mark.parametrize("name", ["fpn_finest_sampling", "table4/ohem", "table5/grouped_fast_rcnn"])
@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_losses_and_gradients_are_near_those_of_float32(engine, name, norm, tmp_path):
    opts = ["MODEL.RESNETS.NORM", norm]
    found, expected = (first_step(engine, name, [*opts, *more], tmp_path) for more in (BF16, []))
    assert found[1].keys() == expected[1].keys() >= {"loss_rpn_cls", "loss_rpn_loc"}
    assert {loss.dtype for loss in found[1].values()} == {torch.float32}
    for key in ("loss_rpn_cls", "loss_rpn_loc"):  # 8 bits of mantissa are 0.4 % of a value
        assert found[1][key].item() == pytest.approx(expected[1][key].item(), rel=0.01), key
    if "loss_cls" in found[1]:  # of other proposals: which ones are best depends on every bit
        assert found[1]["loss_cls"].item() == pytest.approx(expected[1]["loss_cls"].item(), rel=0.05)
        return
    assert all(parameter.dtype == torch.float32 for parameter in found[0].parameters())
    gradients = [gradients_of(model) for model, _ in (found, expected)]
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_the_network_runs_in_16_bits_and_the_losses_do_not(norm, monkeypatch):
    """The features that the head reads, and what the losses are made of."""
    cfg = load_config(CONFIG, [*SMALL_OPTS, *BF16, "MODEL.RESNETS.NORM", norm])
    model, types, seen = build_model(cfg).train(), [], []
    for module in model.backbone.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    sampler = model.rpn.criterion.sampler
    classification = sampler.classification

    def watched(logits, chosen):
        seen.append(logits.dtype)
        return classification(logits, chosen)

    sampler.classification = watched
    update = TrainingStep(cfg, model, tv_train.build_optimizer(cfg, model))
    batch = next(iter(build_training_loader(cfg, load_records(cfg, cfg.DATASETS.TRAIN), tv_train.to_example)))
    tv_train.train_step(model, update, batch, torch.device("cpu"), 0)
    assert len(types) > 40 and set(types) == {torch.bfloat16}
    assert seen == [torch.float32]


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_float16_on_a_cpu_is_refused_for_a_training_only(engine, tmp_path):
    """A detector that was trained in float16 on a GPU detects on a CPU."""
    train = train_module(engine)
    args = arguments(tmp_path, *FP16)
    message = r"^SOLVER\.AMP\.PRECISION: expected 'bfloat16' with MODEL\.DEVICE cpu, got 'float16'"
    with pytest.raises(ConfigError, match=message):
        train.main(args)
    assert not (tmp_path / "config.yaml").exists()
    cfg = train.load_config(args.config_file, args.opts)
    with pytest.raises(ConfigError, match=message):
        training_precision(cfg)
    with pytest.raises(ConfigError, match=r"^SOLVER\.AMP\.PRECISION: expected 'float16' or 'bfloat16', got 'int8'"):
        train.load_config(args.config_file, [*args.opts, "SOLVER.AMP.PRECISION", "int8"])


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
@pytest.mark.parametrize("precision", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_resumed_is_uninterrupted_bit_for_bit(engine, precision, tmp_path, monkeypatch):
    """With float16 the state of the scaler as well; on the CPU, which is slow at it, autocast takes bfloat16."""
    train = train_module(engine)
    monkeypatch.setattr(step, "training_precision", lambda cfg: getattr(torch, precision))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype: autocast(device_type, torch.bfloat16))
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", (2.0**16, 2.0, 0.5, 2, True))  # grows soon
    checkpoints = []
    for folder, ends in ((tmp_path / "whole", (4,)), (tmp_path / "halves", (2, 4))):
        folder.mkdir()
        for end in ends:
            opts = [*BF16, "DATASETS.TEST", "()", "SOLVER.BASE_LR", 0.0001, "SOLVER.STEPS", "(9,)"]
            # The schedule is that of four iterations in each run: constant.
            args = arguments(folder, *opts, "SOLVER.MAX_ITER", end, "SOLVER.WARMUP_ITERS", 0, resume=True)
            if engine == "detectron2":
                trainer = train.Trainer(d2_setup(args))
                trainer.resume_or_load(resume=True)
                trainer.train()
            else:
                train.main(args)
        checkpoints.append(torch.load(folder / "model_final.pth", weights_only=True))
    whole, halves = checkpoints
    assert_equal(whole["model"], halves["model"])
    scalers = [x["trainer"]["_trainer"] if engine == "detectron2" else x for x in checkpoints]
    if precision == "float16":
        assert_equal(*[x["grad_scaler"] for x in scalers])
        assert scalers[0]["grad_scaler"]["scale"] != 2.0**16
    else:
        assert all("grad_scaler" not in x for x in scalers)


@pytest.mark.parametrize("name", ["fpn_finest_sampling", "table5/grouped_fast_rcnn"])
@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_an_evaluation_in_16_bits(engine, name, tmp_path, monkeypatch):
    """The features have 16 bits, scores and boxes 32, and the scores are those of float32 within 2 %."""
    train, found, types, evaluated = train_module(engine), [], set(), {}
    monkeypatch.setattr(Evaluation, "add", lambda self, image, detections: found.append(detections))
    monkeypatch.setattr(Evaluation, "finish", lambda self: {})
    for precision in ("float32", "bfloat16"):
        args = arguments(tmp_path, *SMALL_OPTS, "TEST.PRECISION", precision)
        args.config_file = str(CONFIGS / f"{name}.yaml")
        cfg = d2_setup(args) if engine == "detectron2" else train.load_config(args.config_file, args.opts)
        torch.manual_seed(0)
        model = (train.Trainer.build_model(cfg) if engine == "detectron2" else train.build_model(cfg)).eval()
        model.backbone.register_forward_hook(lambda *call: types.update(f.dtype for f in call[2].values()))
        if engine == "detectron2":
            train.Trainer.test(cfg, model)
        else:
            train.evaluate(cfg, model, torch.device("cpu"))
        assert {detections.boxes.dtype for detections in found} | {detections.scores.dtype for detections in found} == {
            np.dtype(np.float32)
        }
        evaluated[precision] = [detections.scores.max() for detections in found], set(types)
        types.clear(), found.clear()
    assert evaluated["float32"][1] == {torch.float32} and evaluated["bfloat16"][1] == {torch.bfloat16}
    assert evaluated["float32"][0] != evaluated["bfloat16"][0]
    np.testing.assert_allclose(evaluated["bfloat16"][0], evaluated["float32"][0], rtol=0.02)


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_an_evaluation_that_the_device_cannot_do(engine, tmp_path):
    args = arguments(tmp_path, "TEST.PRECISION", "float16")
    with pytest.raises(ConfigError, match=r"^TEST\.PRECISION: expected 'bfloat16' .*, got 'float16'"):
        train_module(engine).main(args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bits_can_be_written(dtype):
    """As Detectron2's own heads have them in such an evaluation."""
    scores = torch.tensor([0.75, 0.5], dtype=dtype)
    found = Detections(torch.zeros(2, 4, dtype=torch.float64), scores).numpy()
    assert found.scores.dtype == np.float32 and found.scores.tolist() == [0.75, 0.5]
    assert found.boxes.dtype == np.float64
