"""What makes a training faster or smaller does not change it: channels last, recomputation, compilation, accumulation.

And the average of the weights: what it is, which files have it, exact resume.
"""

import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_tv_train import assert_equal
from tv_cases import CONFIGS, SMALL_OPTS, arguments, d2_setup, first_step, gradients_of, train_module

from group_sampling import distributed
from group_sampling.config import ConfigError
from group_sampling.engines.averaging import WeightAverage
from group_sampling.engines.speed import _recompute
from group_sampling.engines.step import TrainingStep
from group_sampling.evaluation.run import Evaluation
from group_sampling.samplers import AnchorSampler

ENGINES = ["torchvision", "detectron2"]
BATCH = ["SOLVER.IMS_PER_BATCH", "4", "INPUT.SCALE_JITTER", "(1.0,)"]
ACCUMULATE = ["SOLVER.ACCUMULATE_STEPS", 2]
EMA = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7]


@pytest.mark.parametrize(
    "key, norm",
    [
        *itertools.product(["MODEL.CHANNELS_LAST", "MODEL.BACKBONE.RECOMPUTE"], ["FrozenBN", "BN", "GN"]),
        *(
            pytest.param("MODEL.BACKBONE.COMPILE", norm, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
            for norm in ("FrozenBN", "BN", "GN")
        ),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_is_the_same(engine, norm, key, tmp_path):
    """Up to the rounding of sums in another order; statistics of batch norms move once."""
    opts = ["MODEL.RESNETS.NORM", norm]
    (plain, expected), (model, losses) = (first_step(engine, "fpn_finest_sampling", [*opts, *more], tmp_path)
                                          for more in ([], [key, "True"]))  # fmt: skip
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    found, wanted = gradients_of(model), gradients_of(plain)
    assert torch.linalg.vector_norm(found - wanted) < 1e-4 * torch.linalg.vector_norm(wanted)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    buffers = dict(plain.named_buffers())
    for name, value in model.named_buffers():
        assert torch.allclose(value, buffers[name], rtol=1e-5, atol=1e-6), name
        assert not name.endswith("num_batches_tracked") or value == 1
    if key == "MODEL.CHANNELS_LAST":
        weight = model.get_parameter({"torchvision": "rpn.head", "detectron2": "proposal_generator.rpn_head"}[engine]
                                     + ".conv.weight")  # fmt: skip
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_recomputed_blocks_keep_their_input_alone():
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    x, sizes = torch.rand(2, 4, 8, 8, requires_grad=True), []

    def kept():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            block(x).sum().backward()
        return sum(saved)

    sizes.append(kept())
    _recompute(block)
    sizes.append(kept())
    assert sizes[1] <= x.numel() + 1 < sizes[0] / 2
    with torch.no_grad():
        block.eval()
        assert block(x).shape == x.shape


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.BACKBONE.RECOMPUTE", "True"],
            r"^MODEL\.BACKBONE\.RECOMPUTE: expected a ResNet of this engine, got build_torchvision_fpn_backbone",
        ),
        (
            ["MODEL.BACKBONE.COMPILE", "True", "MODEL.BACKBONE.RECOMPUTE", "True"],
            r"^MODEL\.BACKBONE\.COMPILE and RECOMPUTE: expected one of them, got both",
        ),
        (["SOLVER.ACCUMULATE_STEPS", "0"], r"^SOLVER\.ACCUMULATE_STEPS: expected a number at least 1, got 0"),
        (
            ["SOLVER.IMS_PER_BATCH", "3", "SOLVER.ACCUMULATE_STEPS", "2"],
            r"^SOLVER\.IMS_PER_BATCH: expected a multiple of the 1 processes, times SOLVER\.ACCUMULATE_STEPS 2, got 3",
        ),
        (["SOLVER.EMA.DECAY", "1.5"], r"^SOLVER\.EMA\.DECAY: expected a number from 0 to 1, got 1\.5"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_done(engine, opts, message, tmp_path):
    if "build_torchvision_fpn_backbone" in opts:
        opts = [*opts, "MODEL.BACKBONE.TORCHVISION_NAME", "resnet18", "MODEL.RESNETS.NORM", "BN"]
    with pytest.raises(ConfigError, match=message):
        train_module(engine).main(arguments(tmp_path, *opts))


# -- Accumulation -----------------------------------------------------------------------------------------------------


def watch_draws(monkeypatch):
    drawn = []
    call = AnchorSampler.__call__

    def watched(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        drawn.append(result.indices)
        return result

    monkeypatch.setattr(AnchorSampler, "__call__", watched)
    return drawn


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_parts_are_one_large_batch(engine, parts, tmp_path, monkeypatch):
    """Images of one size, the same draws; a mean over all that was drawn is the mean of the parts' means, then."""
    opts = [*BATCH, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.GROUP_SAMPLING.BBOX_REG_LOSS_MEAN", "drawn"]
    runs = []
    for count in (1, parts):
        drawn = watch_draws(monkeypatch)
        more = ["SOLVER.ACCUMULATE_STEPS", str(count)]
        runs.append((*first_step(engine, "fpn_finest_sampling", [*opts, *more], tmp_path), drawn))
        monkeypatch.undo()
    (plain, expected, drawn), (model, losses, drawn_in_parts) = runs
    assert (len(drawn), len(drawn_in_parts)) == (1, parts)
    assert torch.equal(torch.cat(drawn_in_parts), drawn[0])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    found, wanted = gradients_of(model), gradients_of(plain)
    assert torch.linalg.vector_norm(found - wanted) < 1e-4 * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_stage_draws_by_image_as_well(engine, tmp_path, monkeypatch):
    from group_sampling import roi_sampling

    numbers = []
    sample = roi_sampling.sample_groups

    def watched(*args, **kwargs):
        numbers.append((kwargs["iteration"], kwargs["first_image"]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(roi_sampling, "sample_groups", watched)
    first_step(engine, "table5/grouped_fast_rcnn", [*BATCH, "SOLVER.ACCUMULATE_STEPS", "2"], tmp_path)
    assert numbers == [(0, image) for image in range(4)]


def test_images_of_all_processes_have_numbers_of_their_own(monkeypatch):
    numbers = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for part in range(3):
            with distributed.part_of_batch(2 * part, 6):
                numbers += [distributed.first_image(2) + image for image in range(2)]
        assert distributed.first_image(6) == 6 * rank
    assert numbers == list(range(12))


def test_gradients_are_exchanged_once(monkeypatch):
    """With several processes, only the last part's backward pass exchanges gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))
        exchanged = []
        model.register_comm_hook(None, lambda state, bucket: exchanged.append(1) or _done(bucket))
        step = TrainingStep(step_config(parts=3), model, torch.optim.SGD(model.parameters(), lr=1.0))
        before = model.module.weight.detach().clone()
        step(0, torch.eye(3).tolist(), lambda part: {"loss": model(torch.tensor(part)).sum()}, ["a"] * 3)
        assert exchanged == [1]
        assert torch.allclose(before - model.module.weight, torch.full((1, 3), 1 / 3))
    finally:
        dist.destroy_process_group()


def _done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def step_config(parts=1, decay=None):
    """What :class:`TrainingStep` reads."""
    solver = SimpleNamespace(ACCUMULATE_STEPS=parts, AMP=SimpleNamespace(ENABLED=False))
    solver.EMA = SimpleNamespace(ENABLED=decay is not None, DECAY=decay)
    cfg = train_module("torchvision").load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), SMALL_OPTS)
    solver.CLIP_GRADIENTS = cfg.SOLVER.CLIP_GRADIENTS
    return SimpleNamespace(MODEL=cfg.MODEL, SOLVER=solver)


# -- Average of the weights -------------------------------------------------------------------------------------------


def test_the_average_is_exponential():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    step = TrainingStep(step_config(decay=0.9), model, torch.optim.SGD([model.weight], lr=0.1))
    with step.averaged():  # before the first step
        first = model.weight.detach().clone()
    expected, weights = None, [first]
    for iteration in range(5):
        step(iteration, [iteration + 1.0], lambda part: {"loss": (model.weight**2).sum() * part[0]}, ["a"])
        weight = model.weight.detach().double().numpy()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
        weights.append(model.weight.detach().clone())
    with step.averaged():
        np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6)
        state = copy.deepcopy(step.average.state_dict())
        with step.averaged():  # what is saved in an evaluation
            np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6)
        saved = model.state_dict()["weight"].clone()
    assert torch.equal(model.weight, weights[-1]) and list(state) == ["weight"]
    assert torch.equal(state["weight"], weights[-1])

    other = torch.nn.Linear(2, 1)
    other.bias.requires_grad_(False)
    average = WeightAverage(other, 0.9)
    with torch.no_grad():
        other.weight.copy_(saved)
    average.load_state_dict(state)
    assert torch.equal(other.weight, weights[-1])
    with average.applied():
        assert torch.equal(other.weight, saved)
    for wrong in ({}, {"weight": torch.zeros(3)}, {**state, "bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"^ema: expected (weight|bias) of shape"):
            average.load_state_dict(wrong)


def run(engine, folder, end, *opts, resume=True):
    train = train_module(engine)
    opts = ["DATASETS.TEST", "()", "SOLVER.STEPS", "(9,)", "SOLVER.WARMUP_ITERS", 0, *opts]
    args = arguments(folder, *opts, "SOLVER.MAX_ITER", end, resume=resume)
    if engine == "torchvision":
        train.main(args)
    else:
        trainer = train.Trainer(d2_setup(args))
        trainer.resume_or_load(resume=resume)
        trainer.train()
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize(
    "engine, opts",
    [
        pytest.param("torchvision", ACCUMULATE, id="torchvision-accumulation"),
        pytest.param("torchvision", EMA, id="torchvision-average", marks=pytest.mark.slow),
        pytest.param("detectron2", ACCUMULATE, id="detectron2-accumulation", marks=pytest.mark.slow),
        pytest.param("detectron2", EMA, id="detectron2-average"),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(engine, opts, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    expected = run(engine, whole, 4, *opts)
    run(engine, halves, 2, *opts)
    found = run(engine, halves, 4, *opts)
    assert_equal(found["model"], expected["model"])
    if opts is EMA:
        found, expected = (x["trainer"]["_trainer"] if engine == "detectron2" else x for x in (found, expected))
        assert_equal(found["ema"], expected["ema"])


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_and_evaluations_have_the_average(engine, tmp_path, monkeypatch):
    train = train_module(engine)
    weights, tested = [], []
    update = WeightAverage.update

    def watched(self):
        update(self)
        weights.append({name: value.detach().clone() for name, value in self._parameters.items()})

    monkeypatch.setattr(WeightAverage, "update", watched)
    note = lambda model: tested.append({n: v.detach().clone() for n, v in model.named_parameters()})  # noqa: E731
    if engine == "torchvision":
        monkeypatch.setattr(train, "evaluate", lambda cfg, model, device, resume=False: note(model) or {})
    else:
        monkeypatch.setattr(train.DefaultTrainer, "test", classmethod(lambda cls, cfg, model, evaluators: note(model)))
        monkeypatch.setattr(train.Trainer, "test", classmethod(lambda cls, cfg, model, **_: note(model) or {}))
    saved = run(engine, tmp_path, 4, *EMA, "TEST.EVAL_PERIOD", 2, resume=False)
    expected = weights[0]
    averages = [expected]
    for now in weights[1:]:
        expected = {name: 0.7 * expected[name].double() + 0.3 * value.double() for name, value in now.items()}
        averages.append(expected)
    assert len(weights) == 4 and len(tested) >= 2
    for found, average in ((tested[0], averages[1]), (tested[-1], averages[3]), (saved["model"], averages[3])):
        for name, value in average.items():
            assert torch.allclose(found[name], value.float(), atol=1e-6), name
    in_training = (saved["trainer"]["_trainer"] if engine == "detectron2" else saved)["ema"]
    assert_equal(in_training, weights[-1])

    with pytest.raises(ConfigError, match=r"^--resume: SOLVER\.EMA\.ENABLED: expected True"):
        run(engine, tmp_path, 8)
    assert yaml.safe_load(saved["config"])["SOLVER"]["EMA"] == {"ENABLED": True, "DECAY": 0.7}


# -- Evaluation in batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_in_batches_finds_the_same(engine, tmp_path, monkeypatch):
    """Images of two sizes; those of one size go through the model together, and detections are equal up to rounding."""
    train = train_module(engine)
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    for k in range(5):
        width = 96 if k % 2 else 64
        pixels = np.random.default_rng(k).integers(0, 256, (64, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{k}.png")
        entries.append({"id": k + 1, "file_name": f"{k}.png", "width": width, "height": 64})
    boxes = [{"id": k + 1, "image_id": k + 1, "category_id": 1, "bbox": [8, 8, 30, 30]} for k in range(5)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "face"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    sizes, added, per_run = [], {}, []
    add = Evaluation.add
    monkeypatch.setattr(
        Evaluation, "add", lambda self, name, found: added.update({name: found}) or add(self, name, found)
    )
    for size in (1, 2):
        opts = ["DATASETS.COCO_FORMAT", "(('set', 'set.json', 'images'),)", "DATASETS.TEST", "('set',)"]
        args = arguments(tmp_path, *opts, "DATASETS.TRAIN", "()", "TEST.IMS_PER_BATCH", size)
        args.opts[1] = str(tmp_path / str(size))  # OUTPUT_DIR
        cfg = d2_setup(args) if engine == "detectron2" else train.load_config(args.config_file, args.opts)
        torch.manual_seed(0)
        model = (train.Trainer.build_model(cfg) if engine == "detectron2" else train.build_model(cfg)).eval()
        model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        if engine == "detectron2":
            train.Trainer.test(cfg, model)
        else:
            train.evaluate(cfg, model, torch.device("cpu"))
        per_run.append((list(sizes), dict(added)))
        sizes.clear()
        added.clear()
    (alone, expected), (together, found) = per_run
    assert alone == [1] * 5 and sorted(together) == [1, 2, 2]
    assert found.keys() == expected.keys() and len(found) == 5
    for name, detections in expected.items():
        assert len(detections.boxes) > 0
        np.testing.assert_allclose(found[name].boxes, detections.boxes, atol=1e-2)
        np.testing.assert_allclose(found[name].scores, detections.scores, atol=1e-5)
