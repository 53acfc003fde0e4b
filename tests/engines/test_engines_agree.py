"""Same weights, same batch: both engines draw the same samples and agree on losses, detections and a training step."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from types import SimpleNamespace

from detectron2.modeling import build_model as build_d2
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from tv_cases import d2_setup

import group_sampling.engines.d2 as d2
from group_sampling.checkpoint import convert_names
from group_sampling.engines.build import build_training_loader, load_records
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model as build_tv
from group_sampling.engines.tv.train import build_lr_schedule, to_example
from group_sampling.engines.tv.train import build_optimizer as build_tv_optimizer

COMMON = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RPN.PRE_NMS_TOPK_TEST", "500", "SEED", "7"),
    *("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "128", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "512"),
    *("SOLVER.WARMUP_ITERS", "2"),
    *("INPUT.CROP.SIZE", "[160, 160]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATASETS.TRAIN", "('synthetic_faces_train',)", "DATASETS.TEST", "('synthetic_faces_val',)"),
    *("DATASETS.SYNTHETIC.NUM_TRAIN", "10", "DATASETS.SYNTHETIC.NUM_VAL", "2"),
]
SMALL = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "64"]
SCRATCH = ["MODEL.BACKBONE.FREEZE_AT", "0"]
TORCHVISION = ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.BACKBONE.TORCHVISION_NAME"]
VARIANTS = {
    "sampling by weight, R18, frozen": (
        "fpn_finest_sampling",
        [*SMALL, "MODEL.GROUP_SAMPLING.FILL", "weight", "MODEL.GROUP_SAMPLING.LOSS_MEAN", "group"],
    ),
    "uniform, R18, BN": ("fpn_finest", [*SMALL, *SCRATCH, "MODEL.RESNETS.NORM", "BN"]),
    "sampling, repeated, R18, GN, P2 and P3": (
        "fpn_finest_sampling",
        [
            *SMALL,
            *SCRATCH,
            *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN", "MODEL.RPN.IN_FEATURES", "['p2', 'p3']"),
            *("MODEL.GROUP_SAMPLING.FILL", "repeat", "MODEL.GROUP_SAMPLING.BBOX_REG_LOSS_MEAN", "drawn"),
        ],
    ),
    "sampling, R50": ("fpn_finest_sampling", []),
    "C4, R18, GN": ("rpn_c4", [*SMALL, *SCRATCH, "MODEL.RESNETS.NORM", "GN"]),
    "MobileNetV3, BN": (
        "fpn_finest_sampling",
        [*TORCHVISION, "mobilenet_v3_small", *SCRATCH, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", "64"],
    ),
    "EfficientNet, P3, frozen": (
        "table2/p3_sampling",
        [*TORCHVISION, "efficientnet_b0", "MODEL.FPN.OUT_CHANNELS", "64"],
    ),
    "FPN, R18, frozen": ("fpn", SMALL),
    "FPN-finest-stride, R18, frozen": ("fpn_finest_stride", SMALL),
    "OHEM, R18, frozen": ("table4/ohem", [*SMALL, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "4096"]),
    "focal, R18, frozen": ("table4/focal", SMALL),
}


# The fast suite takes one of each sampler, norm and layout.
FAST = (
    "uniform, R18, BN",
    "sampling, repeated, R18, GN, P2 and P3",
    "FPN-finest-stride, R18, frozen",
    "OHEM, R18, frozen",
)


@pytest.fixture(
    params=[
        pytest.param(variant, id=name, marks=[] if name in FAST else [pytest.mark.slow])
        for name, variant in VARIANTS.items()
    ]
)
def engines(request, repository, tmp_path):
    """Both configs and models, the torchvision one with the weights of the Detectron2 one."""
    name, opts = request.param
    config = str(repository / f"projects/GroupSampling/configs/{name}.yaml")
    opts = [*COMMON, *opts, "OUTPUT_DIR", str(tmp_path)]
    d2_cfg = d2_setup(SimpleNamespace(config_file=config, opts=opts, resume=False, eval_only=False))
    tv_cfg = load_config(config, opts)
    d2_model, tv_model = build_d2(d2_cfg), build_tv(tv_cfg)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in d2_model.named_parameters():
        if "rpn_head" in parameter_name:  # fresh heads score all boxes alike, and ties need not be broken alike
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    assert (
        dict(tv_model.named_parameters()).keys()
        == convert_names(dict(d2_model.named_parameters()), "torchvision").keys()
    ), "the engines train other parameters"
    loaded = tv_model.load_state_dict(convert_names(d2_model.state_dict(), "torchvision"), strict=False)
    assert loaded.missing_keys == [] and [name for name in loaded.unexpected_keys if "pixel" not in name] == []
    d2_batch = next(iter(d2.Trainer.build_train_loader(d2_cfg)))
    tv_records = load_records(tv_cfg, tv_cfg.DATASETS.TRAIN)
    tv_batch = next(iter(build_training_loader(tv_cfg, tv_records, to_example)))
    return SimpleNamespace(**{k: v for k, v in locals().items() if k.startswith(("d2_", "tv_"))})


def tv_forward(engines):
    images = [example.image.float() for example in engines.tv_batch]
    return engines.tv_model(
        images, [example.target for example in engines.tv_batch] if engines.tv_model.training else None
    )


def test_weights_convert_back(engines):
    back = convert_names(engines.tv_model.state_dict(), "detectron2")
    original = engines.d2_model.state_dict()
    assert all(torch.equal(original[name], value) for name, value in back.items())
    assert {name for name in original if name not in back and "pixel" not in name} == set()


def test_batches_are_equal(engines):
    for ours, theirs in zip(engines.d2_batch, engines.tv_batch):
        assert torch.equal(ours["image"], theirs.image)
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs.target["boxes"])
        assert torch.equal(ours["instances"].ignore_boxes.tensor, theirs.target["ignore_boxes"])


def test_samples_losses_and_detections_agree(engines, monkeypatch):
    drawn = []
    original = type(engines.d2_model.proposal_generator.criterion.sampler).__call__
    monkeypatch.setattr(
        type(engines.d2_model.proposal_generator.criterion.sampler),
        "__call__",
        lambda self, *args, **kwargs: drawn.append(original(self, *args, **kwargs)) or drawn[-1],
    )
    engines.d2_model.train(), engines.tv_model.train()
    engines.tv_model.set_iteration(3)
    with EventStorage(3):
        d2_losses = engines.d2_model(engines.d2_batch)
    tv_losses = tv_forward(engines)
    assert len(drawn) == 2
    if engines.d2_cfg.MODEL.GROUP_SAMPLING.SAMPLER == "ohem":  # in the order of losses, which are only nearly equal
        assert torch.equal(drawn[0].indices.sort(dim=-1).values, drawn[1].indices.sort(dim=-1).values)
    else:
        for ours, theirs in zip(*drawn):
            assert torch.equal(ours, theirs)
    assert drawn[0].num_pos.sum() > 0, "a batch without positives would show little"
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        assert d2_losses[name].item() == pytest.approx(tv_losses[name].item(), abs=1e-4)

    engines.d2_model.eval(), engines.tv_model.eval()
    with torch.no_grad():
        d2_found = engines.d2_model(engines.d2_batch)
        tv_found = tv_forward(engines)
    for d2_output, tv_output in zip(d2_found, tv_found):
        d2_scales, tv_scales = d2_output["sub_detectors"], tv_output["sub_detectors"]
        assert list(d2_scales) == list(tv_scales) == [16, 32, 64, 128]
        lists = [(d2_output["instances"], tv_output), *((d2_scales[s], tv_scales[s]) for s in tv_scales)]
        assert len(tv_output["boxes"]) > 0  # a sub-detector of random weights may find nothing
        for ours, theirs in lists:
            assert len(ours) == len(theirs["boxes"])
            assert torch.allclose(ours.pred_boxes.tensor, theirs["boxes"], atol=1e-4, rtol=1e-4)
            assert torch.allclose(ours.scores, theirs["scores"], atol=1e-4)
            assert torch.equal(ours.anchor_scales, theirs["anchor_scales"])


def test_training_steps_agree(engines):
    """Three iterations with each engine's own optimizer and schedule leave the same weights."""
    engines.d2_model.train(), engines.tv_model.train()
    d2_optimizer = build_optimizer(engines.d2_cfg, engines.d2_model)
    d2_schedule = build_lr_scheduler(engines.d2_cfg, d2_optimizer)
    tv_optimizer, tv_schedule = build_tv_optimizer(engines.tv_cfg, engines.tv_model), build_lr_schedule(engines.tv_cfg)
    with EventStorage(0) as storage:
        for iteration in range(3):
            lr = engines.tv_cfg.SOLVER.BASE_LR * tv_schedule(iteration / engines.tv_cfg.SOLVER.MAX_ITER)
            assert d2_optimizer.param_groups[0]["lr"] == pytest.approx(lr)
            for group in tv_optimizer.param_groups:
                group["lr"] = lr
            for optimizer, losses in (
                (d2_optimizer, engines.d2_model(engines.d2_batch)),
                (tv_optimizer, tv_forward(engines)),
            ):
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
            d2_schedule.step()
            storage.step()
    theirs = dict(engines.tv_model.named_parameters())
    for name, ours in convert_names(dict(engines.d2_model.named_parameters()), "torchvision").items():
        assert torch.allclose(ours, theirs[name], atol=1e-4), name
