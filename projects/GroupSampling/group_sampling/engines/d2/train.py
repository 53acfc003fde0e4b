"""Training and evaluation with Detectron2."""

import logging

import detectron2.utils.comm as comm
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils.logger import setup_logger

from ...checkpoint import CheckpointMixin
from ...config import add_group_sampling_config
from ..common import (
    build_training_loader,
    check_config,
    check_datasets,
    check_values,
    get_value,
    merge_config,
    resolve_seed,
)
from .data import GroupSamplingMapper, register_datasets
from .evaluator import WiderFaceEvaluator

# Keys of Detectron2's own mapper and samplers, which this project's loader replaces: they keep their defaults.
_REPLACED_KEYS = (
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.MAX_SIZE_TRAIN",
    "DATALOADER.ASPECT_RATIO_GROUPING",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.SAMPLER_TRAIN",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "MODEL.RPN.BOUNDARY_THRESH",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
)


class GroupSamplingCheckpointer(CheckpointMixin, DetectionCheckpointer):
    """Detectron2's checkpointer: atomic, code-free, and reads the torchvision engine's files as well."""

    naming = "detectron2"


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with this project's loader, evaluator and checkpointer."""

    def build_hooks(self):
        # DefaultTrainer makes its own checkpointer just before the hooks that use it.
        self.checkpointer = GroupSamplingCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        return super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        # The loader of __init__ starts at iteration 0; a resumed run goes on where it stopped.
        if self.start_iter > 0:
            self.data_loader = self.build_train_loader(self.cfg, self.start_iter)

    def after_train(self) -> None:
        super().after_train()
        if self.data_loader.summary():
            logging.getLogger(__name__).warning(self.data_loader.summary())

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        return build_training_loader(
            cfg,
            GroupSamplingMapper.to_example,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            start_iter=start_iter,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(
            DatasetCatalog.get(dataset_name),
            mapper=GroupSamplingMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> WiderFaceEvaluator:
        return WiderFaceEvaluator(cfg, dataset_name)


def setup(args) -> CfgNode:
    """The frozen config of a run, checked; logging and seeds are set up."""
    cfg = get_cfg()
    add_group_sampling_config(cfg)
    defaults = cfg.clone()
    merge_config(cfg, args.config_file, args.opts)
    check_config(cfg)
    check_datasets(cfg, eval_only=args.eval_only)
    check_values(
        cfg,
        {key: (get_value(defaults, key),) for key in _REPLACED_KEYS},
        "this project replaces the part of Detectron2 that reads it",
    )
    resolve_seed(cfg, args.resume or args.eval_only, comm.shared_random_seed)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="group_sampling")
    register_datasets(cfg)
    return cfg


def _work(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        GroupSamplingCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args) -> None:
    """Run what ``train_net.py`` was asked for; ``args`` are those of Detectron2's ``default_argument_parser``."""
    launch(
        _work,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
