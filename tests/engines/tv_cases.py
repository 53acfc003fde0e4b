"""A detector small enough to train in seconds, and runs of it."""

from argparse import Namespace
from pathlib import Path

import yaml

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
    "TEST": {"EVAL_PERIOD": 0},
    "SEED": 3,
}


def write_tiny_config(folder: Path) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
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
