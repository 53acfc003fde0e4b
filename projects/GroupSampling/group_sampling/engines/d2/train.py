"""Training and evaluation with Detectron2."""

import contextlib
import functools
import logging
import os
from unittest import mock

import detectron2.utils.comm as comm
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_test_loader
from detectron2.engine import DefaultTrainer, create_ddp_model, default_setup, defaults, launch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.utils.data import SequentialSampler

from ...checkpoint import CheckpointMixin
from ...config import add_group_sampling_config
from ..build import (
    build_training_loader,
    check_config,
    check_datasets,
    check_values,
    get_value,
    merge_config,
    resolve_seed,
)
from .data import GroupSamplingMapper, register_datasets, to_dataset_dict
from .evaluator import GroupSamplingEvaluator
from .tta import GroupSamplingTTA

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
    "TEST.AUG.ENABLED",
)


class GroupSamplingCheckpointer(CheckpointMixin, DetectionCheckpointer):
    """Detectron2's checkpointer: atomic, code-free, and reads the torchvision engine's files as well."""

    naming = "detectron2"


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with this project's loader, evaluator and checkpointer, also for several CPU processes."""

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer names a device for each process, which DistributedDataParallel refuses for a model on the CPU.
        without_device = functools.partial(create_ddp_model, device_ids=None)
        is_cpu = cfg.MODEL.DEVICE == "cpu"
        with mock.patch.object(defaults, "create_ddp_model", without_device) if is_cpu else contextlib.nullcontext():
            super().__init__(cfg)
        self._trainer.model.register_forward_hook(_stop_all_at_a_loss_that_is_not_finite)

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
            # The hooks evaluate with it: also the last evaluation goes on where it stopped.
            self.test = functools.partial(self.test, resume=True)

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
        images = DatasetCatalog.get(dataset_name)
        return cls._build_loader(cfg, images[comm.get_rank() :: comm.get_world_size()])

    @staticmethod
    def _build_loader(cfg: CfgNode, images: list[dict]):
        """Loader of this process's images. There may be none, which Detectron2's sampler and serialisation refuse."""
        return build_detection_test_loader(
            DatasetFromList(images, copy=False, serialize=False),
            mapper=GroupSamplingMapper(cfg, is_train=False),
            sampler=SequentialSampler(images),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model, evaluators=None, *, resume: bool = False):
        """``DefaultTrainer.test``, on the image pyramid of ``TEST.PYRAMID`` where there is one.

        Args:
            resume: take up an interrupted evaluation. Where ``evaluators`` are given, or ``build_evaluator`` makes
                others than this project's, all images are evaluated.
        """
        detector = GroupSamplingTTA(cfg, model) if cfg.TEST.PYRAMID.SCALES else model
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
            if all(isinstance(evaluator, GroupSamplingEvaluator) for evaluator in evaluators):
                return cls._test_resumable(cfg, model, detector, evaluators, resume)
        return super().test(cfg, detector, evaluators)

    @classmethod
    def _test_resumable(cls, cfg: CfgNode, model, detector, evaluators: list[GroupSamplingEvaluator], resume: bool):
        results = {}
        for name, evaluator in zip(cfg.DATASETS.TEST, evaluators):
            share = [to_dataset_dict(record) for record in evaluator.start(model, resume=resume)]
            results[name] = inference_on_dataset(detector, cls._build_loader(cfg, share), evaluator)
            if comm.is_main_process():
                print_csv_format(results[name])
        return results[name] if len(results) == 1 else results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return GroupSamplingEvaluator(cfg, dataset_name)


def _stop_all_at_a_loss_that_is_not_finite(model: nn.Module, inputs: tuple[list[dict]], losses: dict) -> None:
    """Forward hook. Detectron2 itself raises on the main process only, and the others wait until they time out."""
    if not model.training:
        return
    is_finite = sum(losses.values()).detach().isfinite().float()
    is_finite_everywhere = is_finite.clone()
    if comm.get_world_size() > 1:
        dist.all_reduce(is_finite_everywhere, dist.ReduceOp.MIN)
    if not is_finite_everywhere:
        where = "another process" if is_finite else "this process"
        values = {name: loss.item() for name, loss in losses.items()}
        raise FloatingPointError(
            f"iteration {get_event_storage().iter}: the loss of {where} is not finite. No weight was changed. Here the "
            f"losses are {values}, of the images {[example.get('file_name') for example in inputs[0]]}"
        )


def _load_config(args) -> CfgNode:
    """The checked config of a run."""
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
    return cfg


def setup(args) -> CfgNode:
    """The frozen config of a run, checked; logging and seeds are set up."""
    cfg = _load_config(args)
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
        results = Trainer.test(cfg, model, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args) -> None:
    """Run what ``train_net.py`` was asked for; ``args`` are those of Detectron2's ``default_argument_parser``."""
    # Where GPUs are visible, launch() takes NCCL and a GPU for each process, whatever the config says.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if _load_config(args).MODEL.DEVICE == "cpu" and args.num_gpus > 1 else {}
    with mock.patch.dict(os.environ, hidden):
        launch(
            _work,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
