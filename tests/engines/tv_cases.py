"""A detector small enough to train in seconds, and runs of it."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from group_sampling.engines.build import build_training_loader, load_records
from group_sampling.engines.step import TrainingStep
from group_sampling.files import write_atomically

CONFIGS = Path(__file__).resolve().parents[2] / "projects/GroupSampling/configs"

TINY = {
    "_BASE_": str(CONFIGS / "Base-GroupSampling.yaml"),
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": {"DEPTH": 18, "NORM": "GN", "STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 32},
        "FPN": {"OUT_CHANNELS": 32},
        "GROUP_SAMPLING": {"SAMPLES_PER_GROUP": 32},
    },
    "INPUT": {"CROP": {"SIZE": [96, 96]}, "SCALE_JITTER": [0.75, 1.0]},
    "DATASETS": {
        "TRAIN": ["synthetic_faces_train"],
        "TEST": ["synthetic_faces_val"],
        "SYNTHETIC": {"NUM_TRAIN": 8, "NUM_VAL": 3, "HEIGHT": 128, "WIDTH": 128},
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 8, "STEPS": [6], "WARMUP_ITERS": 2, "CHECKPOINT_PERIOD": 4},
    "TEST": {"EVAL_PERIOD": 0, "PYRAMID": {"SCALES": []}},
    "SEED": 3,
}


# Makes any config of the project small enough to train and evaluate in seconds on the built-in faces, on both engines.
SMALL_OPTS = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "32", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "128"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "200", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "100"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "200", "MODEL.RPN.POST_NMS_TOPK_TEST", "100"),
    *("MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "3"),
    *("INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[96, 96]", "DATALOADER.NUM_WORKERS", "0"),
    *("DATASETS.TRAIN", "('synthetic_faces_train',)", "DATASETS.TEST", "('synthetic_faces_val',)"),
    *("DATASETS.SYNTHETIC.NUM_TRAIN", "8", "DATASETS.SYNTHETIC.NUM_VAL", "3"),
    *("DATASETS.SYNTHETIC.HEIGHT", "128", "DATASETS.SYNTHETIC.WIDTH", "128"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "SOLVER.WARMUP_ITERS", "1"),
    *("TEST.EVAL_PERIOD", "0", "TEST.PYRAMID.SCALES", "()", "SEED", "3"),
]


def run_configs() -> list[Path]:
    """Every config that train_net.py can be given: not those for others to build on, nor tools' overrides.

    The latter have no base.
    """
    files = [path for path in sorted(CONFIGS.rglob("*.yaml")) if not path.name.startswith("Base-")]
    return [path for path in files if "_BASE_" in yaml.safe_load(path.read_text())]


def d2_setup(args: Namespace):
    """The frozen config of a run of the Detectron2 engine, with logging, seeds and data sets set up."""
    from group_sampling.engines.d2.train import load_config, setup

    return setup(load_config(args.config_file, args.opts), args)


def write_tiny_config(folder: Path) -> str:
    path = folder / "tiny.yaml"
    write_atomically(path, yaml.safe_dump(TINY).encode())  # the processes of a run write it at a time
    return str(path)


def arguments(
    folder: Path, *opts: object, resume: bool = False, eval_only: bool = False, num_gpus: int = 1
) -> Namespace:
    """What ``train_net.py`` would pass for the tiny detector, its output in ``folder``."""
    return Namespace(
        config_file=write_tiny_config(folder),
        resume=resume,
        eval_only=eval_only,
        num_gpus=num_gpus,
        num_machines=1,
        machine_rank=0,
        dist_url="auto",
        opts=["OUTPUT_DIR", str(folder), *map(str, opts)],
    )


def train_module(engine: str):
    """``engines.tv.train`` or ``engines.d2.train``; skips where Detectron2 is missing."""
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    return importlib.import_module(f"group_sampling.engines.{'d2' if engine == 'detectron2' else 'tv'}.train")


def first_step(engine: str, name: str, opts: list[str], folder: Path):
    """A model of SMALL_OPTS after its first training step, and the losses of it."""
    train = train_module(engine)
    cfg = train.load_config(str(CONFIGS / f"{name}.yaml"), [*SMALL_OPTS, *opts, "OUTPUT_DIR", str(folder)])
    torch.manual_seed(0)
    if engine == "torchvision":
        model = train.build_model(cfg).train()
        train.prepare_network(cfg, model, (train.BasicBlock, train.Bottleneck))
        update = TrainingStep(cfg, model, train.build_optimizer(cfg, model))
        batch = next(iter(build_training_loader(cfg, load_records(cfg, cfg.DATASETS.TRAIN), train.to_example)))
        return model, train.train_step(model, update, batch, torch.device("cpu"), 0)[0]

    from detectron2.utils.events import EventStorage

    trainer = train.Trainer(cfg)
    trainer.iter = 0
    with EventStorage(0):
        trainer.run_step()
    losses = trainer._trainer._unread[0][2]
    return trainer.model, {name: loss for name, loss in losses.items() if name != "grad_norm"}


def gradients_of(model: torch.nn.Module) -> torch.Tensor:
    """All of them in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
