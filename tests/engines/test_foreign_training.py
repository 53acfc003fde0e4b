"""This project's components in models and training loops that are not its own."""

import copy
from argparse import Namespace

import pytest
import torch
from fvcore.common.config import CfgNode
from test_roi_heads import FACES, TinyBackbone, make_heads, make_target
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from group_sampling import distributed
from group_sampling.criterion import AnchorCriterion
from group_sampling.engines.build import AnchorLayout
from group_sampling.engines.launch import launch
from group_sampling.engines.tv.rpn import GroupedAnchorGenerator, GroupSamplingRPN
from group_sampling.engines.tv.sampling import SamplingModule
from group_sampling.head import SoftmaxRPNHead
from group_sampling.samplers import GroupSampler


def make_rpn():
    layout = AnchorLayout(sizes=((16.0, 32.0, 64.0),), aspect_ratios=((1.0,),), strides=(4,))
    return GroupSamplingRPN(
        GroupedAnchorGenerator(layout),
        SoftmaxRPNHead(8, layout.anchors_per_cell),
        fg_iou_thresh=0.6,
        bg_iou_thresh=0.4,
        batch_size_per_image=64,
        positive_fraction=0.25,
        pre_nms_top_n={"training": 200, "testing": 100},
        post_nms_top_n={"training": 100, "testing": 50},
        nms_thresh=0.7,
        criterion=AnchorCriterion(GroupSampler(num_samples=16)),
        loss_weights={"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0},
        min_size=1.0,
        single_stage=False,
    )


def make_faster_rcnn():
    """torchvision's own model, transform and RPN head; RPN and ROI heads are exchanged."""
    torch.manual_seed(0)
    model = FasterRCNN(
        TinyBackbone(),
        num_classes=4,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((1.0,),)),
        min_size=96,
        max_size=96,
    )
    model.rpn = make_rpn()
    model.roi_heads = make_heads(num_classes=3)
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0"], 3, 2)
    return model


class Loop:
    """A training loop of other code, without an iteration count. Notes what the samplers draw in every forward pass."""

    def __init__(self, model, wrap=lambda model: model):
        self.model = model.train()
        self.wrapped = wrap(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.anchors, self.proposals = [], []
        for sampler, drawn in ((model.rpn.criterion.sampler, self.anchors), (model.roi_heads.sampler, self.proposals)):
            self._observe(sampler, drawn)

    @staticmethod
    def _observe(sampler, drawn):
        original = type(sampler).__call__

        class Observed(type(sampler)):
            def __call__(self, *args, **kwargs):
                result = original(self, *args, **kwargs)
                images = [result.indices] if hasattr(result, "indices") else [image.indices for image in result]
                drawn.append([image.clone() for image in images])
                return result

        sampler.__class__ = Observed

    def step(self, num_passes=1):
        image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1))
        self.optimizer.zero_grad()
        for _ in range(num_passes):
            losses = self.wrapped([image, image], [make_target(FACES, [1, 3]), make_target([])])
            sum(losses.values()).backward()
        self.optimizer.step()

    def state(self):
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("num_passes", [1, 2], ids=["plain", "accumulated gradients"])
def test_every_pass_draws_other_samples(num_passes):
    loop = Loop(make_faster_rcnn())
    for _ in range(3):
        loop.step(num_passes)
    for drawn in (loop.anchors, loop.proposals):
        assert len(drawn) == 3 * num_passes
        assert not any(equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_resumed_from_the_state_dict_bit_for_bit():
    """Interrupted after two of five steps, with an evaluation and a validation loss in between."""
    whole = Loop(make_faster_rcnn())
    for _ in range(5):
        whole.step()
    first = Loop(make_faster_rcnn())
    first.step()
    with torch.no_grad():
        first.model.eval()([torch.rand(3, 96, 96)])
    first.model.train()
    first.step()
    saved = first.state()

    resumed = Loop(make_faster_rcnn())
    resumed.model.load_state_dict(saved["model"], strict=True)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for _ in range(3):
        resumed.step()
    assert all(map(equal, whole.anchors, first.anchors + resumed.anchors))
    assert all(map(equal, whole.proposals, first.proposals + resumed.proposals))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected["rpn._extra_state"] == expected["roi_heads._extra_state"] == 5
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_state_dict_without_counts_loads_strictly():
    """A checkpoint of version 0.1, or of torchvision's own modules: the count stays as it is."""
    model = make_faster_rcnn()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    model.rpn.iteration = 4
    model.load_state_dict(state, strict=True)
    assert model.rpn.iteration == 4
    with pytest.raises(RuntimeError, match="Missing.*rpn.head.conv.weight"):
        model.load_state_dict({name: value for name, value in state.items() if "conv.weight" not in name}, strict=True)


def test_counts_are_no_buffers():
    """DistributedDataParallel would broadcast buffers at every step, and to read one waits for the GPU."""
    model = make_faster_rcnn()
    assert not [name for name, _ in model.named_buffers() if "iteration" in name or "extra" in name]
    module = nn.DataParallel(copy.deepcopy(model)).module
    module.rpn.iteration = 3
    assert isinstance(module.rpn, SamplingModule) and model.rpn.iteration == 0
    assert module.to(torch.float64).state_dict()["rpn._extra_state"].device.type == "cpu"


def train_in_a_group(cfg, args, device):
    """DistributedDataParallel as it is by default, which broadcasts buffers."""
    loop = Loop(make_faster_rcnn(), DistributedDataParallel)
    for _ in range(2):
        loop.step()
    drawn = [[image.tolist() for image in images] for images in loop.anchors]
    return distributed.all_gather((loop.model.rpn.iteration, loop.model.roi_heads.iteration, drawn))


@pytest.mark.slow
def test_processes_count_alike_and_draw_apart(tmp_path):
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    cfg = CfgNode({"MODEL": {"DEVICE": "cpu"}, "OUTPUT_DIR": str(tmp_path)})
    (*counts, first), (*other_counts, second) = launch(train_in_a_group, cfg, args)
    assert counts == other_counts == [2, 2]
    images = [str(image) for drawn in (first, second) for (step,) in drawn for image in step]
    assert len(images) == 8 and len(set(images)) == 8, "a draw is repeated in another step, process or image"
    single = Loop(make_faster_rcnn())
    single.step()
    assert [image.tolist() for image in single.anchors[0]] == first[0]
