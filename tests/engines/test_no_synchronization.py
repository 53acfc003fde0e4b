"""A training step of both engines, from the loader's batch to the optimizer's, must not make the host wait for a GPU.

There is no GPU here: the step runs on tensors of the meta device in its place, which have shapes and no values, and a
dispatch mode notes each operation that would wait for a GPU's values, with the function that asks for it. Where the
size of a result depends on values, the largest one stands for it.
"""

import functools
import itertools
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.weak import WeakIdKeyDictionary
from tv_cases import CONFIGS, SMALL_OPTS, write_tiny_config

import group_sampling.engines.step as step
import group_sampling.engines.tv.train as tv_train
from group_sampling.data.loader import Batch
from group_sampling.data.records import ImageRecord
from group_sampling.engines.build import build_training_loader, load_records
from group_sampling.engines.step import FiniteLossGuard, TrainingStep
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.ops import _library

GPU = torch.device("meta")
SIZE = 96
NOTHING = np.zeros(0)
RECORD = ImageRecord("a.jpg", "a", SIZE, SIZE, boxes=NOTHING, classes=NOTHING, ignore=NOTHING)
_PLACE = re.compile(r"/(group_sampling|torchvision|detectron2|tests)/(.*)\.py$")


class Waits(TorchDispatchMode):
    """Counts in ``found`` what waits for the GPU: "file:function operation"."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.moved = WeakIdKeyDictionary()  # tensor on the GPU -> the one on the CPU that it is a copy of
        self.numbers = _Numbers(self)

    def __enter__(self):
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def note(self, operation):
        frame = sys._getframe(2)
        while frame.f_code.co_name.startswith("__torch_") or not _PLACE.search(frame.f_code.co_filename):
            frame = frame.f_back
        place = _PLACE.search(frame.f_code.co_filename)
        self.found[f"{place[1]}/{place[2]}:{frame.f_code.co_name} {operation}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        if name == "_fused_sgd_":  # in place; the meta device has none
            assert kwargs["found_inf"].device == GPU
            return None
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or first.device)
            if target != first.device and not kwargs.get("non_blocking"):
                self.note(f"copy to {target.type}")
            if target.type == "cpu" and first.device == GPU:
                return torch.full(first.shape, int(not first.is_floating_point()), dtype=first.dtype)  # a count: 1
            result = func(*args, **kwargs)
            if target == GPU and first.device.type == "cpu":
                self.moved[result] = first
            return result
        if name == "copy_" and args[1].device != first.device and not (args[2:] and args[2]):
            self.note(f"copy to {first.device.type}")
        if first is None or first.device != GPU:
            return func(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal"):
            self.note("read")
            return False if first.dtype == torch.bool else 0
        if name == "nonzero":
            self.note(name)
            return first.new_empty((first.numel(), first.dim()), dtype=torch.int64)
        if name == "nms":
            self.note(name)
            return first.new_empty(len(first), dtype=torch.int64)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.note("boolean index")
                if name == "index":
                    (mask,) = masks
                    return first.new_empty((mask.numel(), *first.shape[mask.dim() :]))
        if name in ("masked_select", "bincount", "histc", "_unique2", "unique_dim", "unique_consecutive"):
            self.note(name)
            values = first.flatten()
            return (values, values.long(), values.long()) if name.lstrip("_").startswith("unique") else values
        if name == "repeat_interleave":
            self.note(name)
            return first.new_empty(self.moved[first].sum() if first in self.moved else len(first), dtype=torch.int64)
        return func(*args, **kwargs)


class _Numbers(TorchFunctionMode):
    """Tells ``waits`` of tensors made of Python's numbers: copies to a GPU, and no operation of the meta device."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_factory = func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        if is_factory and result.device == GPU and not isinstance(args[-1], torch.Tensor):
            self.waits.note("tensor of numbers")
        return result


class Event:
    """An event of the GPU, which knows in which step it was recorded."""

    step = 0
    waits = []  # (step that waits, step that is waited for)

    def record(self, stream):
        self.recorded = Event.step

    def synchronize(self):
        Event.waits.append((Event.step, self.recorded))


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    """What a GPU has and the meta device lacks: events, fused optimizers, kernels of the project's operators."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    monkeypatch.setattr(_library, "has_kernels", lambda device: True)
    monkeypatch.setattr(Event, "waits", [])


def batch(to_example):
    """What the loader gives, on the CPU: an image with three faces, and one without."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    boxes, classes = np.ones((3, 4), np.float32), np.zeros(3, np.int64)
    return Batch(to_example(image, boxes[:m], classes[:m], boxes[:1], RECORD, 0) for m in (3, 0))


def waits_of_torchvision(name, opts=(), change=lambda model: None):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), [*SMALL_OPTS, *opts])
    model, examples = build_model(cfg).train().to(GPU), batch(tv_train.to_example)
    change(model)
    tv_train.prepare_network(cfg, model, (tv_train.BasicBlock,))
    optimizer = tv_train.build_optimizer(cfg, model)
    update = TrainingStep(cfg, model, optimizer)
    for Event.step in range(2):
        with Waits() as waits:
            tv_train.train_step(model, update, examples, GPU, Event.step)
    return dict(waits.found)


def waits_of_detectron2(name, opts=(), change=lambda model: None):
    """Of ``Trainer``'s step with all of its hooks, in two iterations far from those that are logged."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.utils.events import EventStorage

    import group_sampling.engines.d2.train as d2_train

    class Trainer(d2_train.Trainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg).to(GPU)
            change(model)
            return model

        @classmethod
        def build_train_loader(cls, cfg, start_iter=0):
            return itertools.repeat(batch(d2_train.GroupSamplingMapper.to_example))

    opts = [*SMALL_OPTS, "SOLVER.MAX_ITER", "30", *opts]
    cfg = d2_train.load_config(str(CONFIGS / f"{name}.yaml"), opts)
    trainer = Trainer(cfg)
    with EventStorage(5) as trainer.storage:
        trainer.iter = 5
        for hook in trainer._hooks:
            hook.before_train()
        for iteration in (5, 6):
            Event.step = trainer.iter = iteration
            with Waits() as waits:
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
    return dict(waits.found)


SINGLE_STAGE = [
    "fpn_finest_sampling",
    "fpn_finest_stride",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("fpn", "rpn_c4")),
]


@pytest.mark.parametrize("name", SINGLE_STAGE)
def test_torchvision(name):
    assert waits_of_torchvision(name) == {}
    assert Event.waits == [(1, 0)]  # in the second step, for the first


@pytest.mark.parametrize("name", SINGLE_STAGE)
def test_detectron2(name, tmp_path):
    assert waits_of_detectron2(name, ("OUTPUT_DIR", str(tmp_path))) == {}
    assert Event.waits == [(6, 5)]


@pytest.mark.parametrize("fill", ["repeat", "weight"])
def test_readings_of_group_sampling(fill):
    reading = ("MODEL.GROUP_SAMPLING.FILL", fill, "MODEL.GROUP_SAMPLING.LOSS_MEAN", "group")
    assert waits_of_torchvision(SINGLE_STAGE[0], (*reading, "MODEL.GROUP_SAMPLING.BBOX_REG_LOSS_MEAN", "drawn")) == {}


@pytest.mark.parametrize("precision", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("waits_of", [waits_of_torchvision, waits_of_detectron2])
def test_mixed_precision(waits_of, precision, tmp_path, monkeypatch):
    """With float16 the scaler's part of the step; autocast, which the meta device lacks, does nothing here."""
    monkeypatch.setattr(step, "training_precision", lambda cfg: precision)
    scaler = functools.partial(torch.amp.GradScaler, "meta")
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device_type: scaler())
    assert waits_of(SINGLE_STAGE[0], ("OUTPUT_DIR", str(tmp_path))) == {}


@pytest.mark.parametrize(
    "clip_type", ["full_model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("value", "norm"))]
)
@pytest.mark.parametrize("waits_of", [waits_of_torchvision, waits_of_detectron2])
def test_clipping(waits_of, clip_type, tmp_path):
    clipping = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type)
    assert waits_of(SINGLE_STAGE[0], (*clipping, "OUTPUT_DIR", str(tmp_path))) == {}


@pytest.mark.parametrize(
    "key", ["SOLVER.ACCUMULATE_STEPS 2", "SOLVER.EMA.ENABLED True", "MODEL.BACKBONE.RECOMPUTE True"]
)
@pytest.mark.parametrize("waits_of", [waits_of_torchvision, pytest.param(waits_of_detectron2, marks=pytest.mark.slow)])
def test_what_makes_a_step_smaller_or_averages_it(waits_of, key, tmp_path):
    assert waits_of(SINGLE_STAGE[0], (*key.split(), "OUTPUT_DIR", str(tmp_path))) == {}


# Of the two images of a batch. NMS and what is kept before it have a size that depends on values, and torchvision puts
# a constant on the GPU for it; the number of drawn proposals and which are positive are read to leave the others out.
SECOND_STAGE = {
    "group_sampling/inference:select_proposals nonzero": 2,
    "torchvision/ops/boxes:_batched_nms_coordinate_trick copy to meta": 2,
    "torchvision/ops/boxes:nms nms": 2,
    "group_sampling/roi_sampling:__call__ copy to cpu": 1,
}


def test_second_stage_of_torchvision():
    expected = {**SECOND_STAGE, "group_sampling/engines/tv/roi_heads:_losses nonzero": 1}
    assert waits_of_torchvision("table5/grouped_fast_rcnn") == expected


def test_second_stage_of_detectron2(tmp_path):
    """The pooler and the classification statistics are Detectron2's own."""
    expected = {
        **SECOND_STAGE,
        "group_sampling/engines/d2/roi_heads:box_reg_loss nonzero": 1,
        "detectron2/modeling/poolers:_convert_boxes_to_pooler_format copy to meta": 1,
        "detectron2/modeling/poolers:_convert_boxes_to_pooler_format repeat_interleave": 1,
        "detectron2/modeling/roi_heads/fast_rcnn:_log_classification_stats nonzero": 4,
        "detectron2/modeling/roi_heads/fast_rcnn:_log_classification_stats boolean index": 2,
    }
    assert waits_of_detectron2("table5/grouped_fast_rcnn", ("OUTPUT_DIR", str(tmp_path))) == expected


PLANTS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.clone().masked_fill(x > 0, 0).__setitem__(x > 0, x[0, 0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "tensor from numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "to": lambda x: torch.zeros(3).to(x.device),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), dim=0),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wait_is_found(plant):
    x = torch.empty(4, 4, device=GPU)
    with Waits() as waits:
        PLANTS[plant](x)
    assert waits.found and all(place.startswith("tests/engines/test_no_synchronization") for place in waits.found)


def test_a_planted_item_is_found():
    def plant(model):
        model.backbone.register_forward_hook(lambda module, inputs, output: print(output["p2"].sum().item()))

    assert waits_of_torchvision(SINGLE_STAGE[0], change=plant) == {
        "tests/engines/test_no_synchronization:<lambda> read": 1
    }


# How a run ends whose optimizer is fused, as on a GPU: the update of a bad loss is skipped, the error comes later.


def fuse(optimizer):
    groups = [{**group, "foreach": False, "fused": True} for group in optimizer.param_groups]
    return type(optimizer)(groups, **{**optimizer.defaults, "foreach": False, "fused": True})


def spoil(model, criterion, bad_iteration):
    """Make a loss and its gradients NaN in one iteration; returns a list that gets the weights before it."""
    forward, before = criterion.forward, []

    def spoilt(*args, iteration, **kwargs):
        losses = forward(*args, iteration=iteration, **kwargs)
        if iteration != bad_iteration:
            return losses
        before.append([parameter.detach().clone() for parameter in model.parameters()])
        return losses._replace(localization=losses.localization * float("nan"))

    criterion.forward = spoilt
    return before


def assert_unchanged(model, before):
    (before,) = before
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("bad, seen", [(1, 2), (3, 3), (7, 7)], ids=["a step late", "before a save", "at the end"])
def test_torchvision_skips_and_stops(tmp_path, monkeypatch, bad, seen):
    build = tv_train.build_optimizer
    monkeypatch.setattr(tv_train, "build_optimizer", lambda cfg, model: fuse(build(cfg, model)))
    cfg = load_config(write_tiny_config(tmp_path), ["OUTPUT_DIR", str(tmp_path), "SOLVER.CHECKPOINT_PERIOD", "4"])
    model = build_model(cfg)
    before = spoil(model, model.rpn.criterion, bad)
    with pytest.raises(FloatingPointError, match=rf"iteration {bad}: .*this process.*loss_rpn_loc': nan.*synthetic://"):
        tv_train.train(cfg, model, torch.device("cpu"), resume=False)
    assert model.rpn.iteration == seen + 1
    assert_unchanged(model, before)
    saved = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert saved == (["model_0000003.pth"] if bad == 7 else [])


@pytest.mark.parametrize("bad", [1, 3])
def test_detectron2_skips_and_stops(tmp_path, bad):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import group_sampling.engines.d2.train as d2_train

    class Trainer(d2_train.Trainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return fuse(super().build_optimizer(cfg, model))

    opts = [*SMALL_OPTS, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4"]
    trainer = Trainer(d2_train.load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), opts))
    before = spoil(trainer.model, trainer.model.proposal_generator.criterion, bad)
    with pytest.raises(FloatingPointError, match=rf"iteration {bad}: .*this process.*loss_rpn_loc': nan.*synthetic://"):
        trainer.train()
    assert trainer.iter == {1: 2, 3: 3}[bad]
    assert_unchanged(trainer.model, before)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("loss, gradient", [(1.0, math.inf), (math.nan, 1.0), (1.0, 1.0)])
def test_a_gradient_scaler_and_the_guard_skip_independently(loss, gradient):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, weight_decay=0.1, fused=True)
    scaler, guard = torch.amp.GradScaler("cpu", init_scale=4.0), FiniteLossGuard(optimizer)
    guard.watch(0, {"loss": torch.tensor(loss)}, ["a.jpg"])
    scaler.scale((weight * gradient).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, torch.ones(3)) == (not math.isfinite(loss) or not math.isfinite(gradient))
    if math.isfinite(loss):
        guard.check()
    else:
        with pytest.raises(FloatingPointError, match=r"iteration 0.*a\.jpg"):
            guard.check()


def test_a_checkpoint_does_not_change_the_implementation():
    weight = torch.nn.Parameter(torch.ones(3))
    saved = torch.optim.SGD([weight], lr=0.5, momentum=0.9, foreach=True).state_dict()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    guard = FiniteLossGuard(optimizer)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["fused"] and not group["foreach"] and group["lr"] == 0.5
    guard.watch(0, {"loss": torch.tensor(math.nan)}, [])
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("name", ["fpn_finest_sampling", "table5/grouped_fast_rcnn"])
def test_losses_are_those_of_forward(name):
    """``losses`` runs on a GPU, ``forward`` of torchvision elsewhere."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), SMALL_OPTS)
    model = build_model(cfg).train()
    images = [255 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 30.0, 36.0], [40.0, 40.0, 80.0, 90.0]])
    targets = [{"boxes": boxes[:m], "labels": torch.zeros(m, dtype=torch.int64)} for m in (2, 0)]
    found = model.losses(images, targets)
    model.set_iteration(0)
    expected = model(images, targets)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_batches_for_a_gpu_are_pinned(engine, monkeypatch):
    if engine == "torchvision":
        cfg, to_example = load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), SMALL_OPTS), tv_train.to_example
    else:
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
        import group_sampling.engines.d2.train as d2_train

        cfg = d2_train.load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), SMALL_OPTS)
        to_example = d2_train.GroupSamplingMapper.to_example
    records = load_records(cfg, cfg.DATASETS.TRAIN)
    assert not build_training_loader(cfg, records, to_example).pin_memory
    cfg.MODEL.DEVICE = "cuda"
    assert build_training_loader(cfg, records, to_example).pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x.clone())
    examples = Batch(batch(to_example), outside={"a.jpg": 1})
    copies = pin_memory(examples)
    assert len(pinned) == 2 * 4 and type(copies) is Batch and copies.outside == {"a.jpg": 1}
    assert [type(example) for example in copies] == [type(example) for example in examples]
