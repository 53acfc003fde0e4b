"""Training and evaluation with Detectron2."""

import argparse
import functools
import logging
import math
import os
import time
import weakref
from collections.abc import Iterable, Sequence

import detectron2.modeling as modeling
import detectron2.utils.comm as comm
import numpy as np
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model, default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from ... import stop
from ...checkpointer import CheckpointMixin, refuse_average
from ...config import add_group_sampling_config, check_values, get_value, merge_config
from ...data.batching import BatchesBySize
from ...errors import describe, is_expected
from ..build import (
    build_training_loader,
    check_config,
    check_start,
    config_to_evaluate,
    describe_training,
    evaluation_autocast,
    resolve_seed,
)
from ..launch import Finish, launch
from ..monitoring import check_monitoring
from ..preflight import check_data, check_run, check_test_classes
from ..speed import prepare_network
from ..step import HealthLog, TrainingStep, is_due
from ..tv.extractor import TORCHVISION_BACKBONE, check_torchvision_backbone
from .data import GroupSamplingMapper, SingleImages, find_source, register_datasets, to_dataset_dict
from .evaluator import GroupSamplingEvaluator
from .events import EvaluationWatch, WandbWriter
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
    "TEST.AUG.ENABLED",
)
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.BACKBONE.BOTTOM_UP": modeling.BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
}


class GroupSamplingCheckpointer(CheckpointMixin, DetectionCheckpointer):
    """Detectron2's checkpointer: atomic, runs no code from files, and reads the torchvision engine's files as well."""

    naming = "detectron2"


class _StepTrainer(SimpleTrainer):
    """A trainer of Detectron2 with this project's :class:`~group_sampling.engines.step.TrainingStep`.

    It reads its losses back, and gathers them, when the log is written: in one go. Its state has what
    ``TrainingStep.stateful`` has, such as the "grad_scaler" of Detectron2's own trainer.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer):
        super().__init__(model, loader, optimizer)
        self.update = TrainingStep(cfg, model, optimizer)
        self._unread: list[tuple[int, float, dict[str, Tensor]]] = []  # iteration, data time, losses and "grad_norm"

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        files = [example.get("file_name") for example in batch]
        losses = self.update(self.iter, batch, self.model, files)
        self._unread.append((self.iter, data_time, {**losses, "grad_norm": self.update.clipper.norm}))

    def state_dict(self) -> dict:
        return {**super().state_dict(), **{name: part.state_dict() for name, part in self.update.stateful.items()}}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for name, part in self.update.stateful.items():
            part.load_state_dict(state_dict[name])
        if "ema" in state_dict and self.update.average is None:
            refuse_average()

    def read_metrics(self) -> list[float]:
        """Put what ``SimpleTrainer.write_metrics`` does into the event storage, for the iterations since last time.

        Returns:
            The norms of the gradients in them.
        """
        iterations, data_times, scalars = zip(*self._unread)
        self._unread.clear()
        names, values = list(scalars[0]), torch.stack([torch.stack(list(step.values())).float() for step in scalars])
        ranks = comm.gather((values.tolist(), data_times))
        storage = get_event_storage()
        for i, iteration in enumerate(iterations):
            put = functools.partial(storage.put_scalar, cur_iter=iteration)
            put("rank_data_time", data_times[i])
            if comm.is_main_process():
                put("data_time", max(times[i] for _, times in ranks))
                means = [float(np.mean(column)) for column in zip(*(rows[i] for rows, _ in ranks))]
                named = dict(zip(names, means))
                put("total_loss", sum(mean for name, mean in named.items() if name != "grad_norm"))
                for name, mean in named.items():
                    if math.isfinite(mean):  # the norm is not where a gradient scaler skipped the step
                        put(name, mean)
        return values[:, names.index("grad_norm")].tolist()


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with this project's loader, evaluator and checkpointer, also for several CPU processes.

    On a GPU, a step of a single-stage detector does not wait for it; losses are read back when the log is written.
    """

    def __init__(self, cfg: CfgNode):
        # In place of DefaultTrainer's own, which names a GPU for each process and a checkpointer of Detectron2.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        check_config(cfg)
        cfg.defrost()
        resolve_seed(cfg, keep=False)
        cfg.freeze()
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER

        model = self.build_model(cfg)
        prepare_network(cfg, model, (BasicBlock, BottleneckBlock, DeformBottleneckBlock))
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = [torch.cuda.current_device()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = _StepTrainer(cfg, model, loader, optimizer)
        self._guard = self._trainer.update.guard
        self._health = HealthLog(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = GroupSamplingCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.saved_weights = self._trainer.update.averaged
        if comm.is_main_process():
            sources = [find_source(cfg, name) for name in cfg.DATASETS.TRAIN]
            self.checkpointer.description = describe_training(cfg, get_cfg(), sources)
        self._watch = EvaluationWatch(cfg, self.checkpointer)
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        found = super().build_hooks()
        index = next(i for i, hook in enumerate(found) if isinstance(hook, EvalHook))
        found[index] = EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        return found

    def _evaluate(self) -> dict:
        """For the hook, which logs what it returns."""
        with self._trainer.update.averaged():
            self._last_eval_results = results = self.test(self.cfg, self.model) or {}
            self._watch(min(self.iter, self.max_iter - 1), self.model, results)
        return results

    def build_writers(self) -> list[EventWriter]:
        writers = super().build_writers()
        trainer = weakref.proxy(self)
        # Before that of TensorBoard, which removes the pictures.
        own = [WandbWriter(self.cfg, lambda: trainer.start_iter > 0)] if self.cfg.LOGGING.WANDB else []
        return [*own, *writers]

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        check_start(self.cfg, self.start_iter)
        if self.start_iter > 0:  # the loader of __init__ starts at iteration 0
            self.data_loader = self.build_train_loader(self.cfg, self.start_iter)
            # The last evaluation is resumed as well.
            self.test = functools.partial(self.test, resume=True)
            self._watch.best.resume()

    @stop.handler.deferred()
    def train(self):
        self.checkpointer.complete(self.start_iter, self.max_iter)
        return super().train()

    def after_step(self) -> None:
        stops = self._guard.stop_signal and self.iter + 1 < self.max_iter
        if stops or is_due(self.iter, self.max_iter, self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD):
            self._guard.check()
        if is_due(self.iter, self.max_iter):
            norms = self._trainer.read_metrics()
            if comm.is_main_process():
                for name, value in self._health.read(self.iter, norms).items():
                    self.storage.put_scalar(name, value, smoothing_hint=False)
        try:
            super().after_step()
        except stop.Stopped as stopped:  # in an evaluation
            stop.save_and_stop(self.checkpointer, self.iter, stopped.number)
        if stops:
            stop.save_and_stop(self.checkpointer, self.iter, self._guard.stop_signal)

    def after_train(self) -> None:
        super().after_train()
        if self.iter < self.max_iter:  # an error ends the training, and other processes may not be here
            return
        left_out = self.data_loader.summary()
        if left_out:
            logging.getLogger(__name__).warning(left_out)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's; on a GPU fused, so that :class:`FiniteLossGuard` and gradient scalers need not wait.

        On a CPU it takes the parameters one by one: the same bits without Detectron2's copies of all gradients.

        It does not clip: :class:`GradientClipper` does, since Detectron2's own way knows no "full_model" and would clip
        the scaled gradients of a fused optimizer.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)
        how = {"foreach": False, "fused": next(model.parameters()).device.type != "cpu"}
        return type(optimizer)([{**group, **how} for group in optimizer.param_groups], **optimizer.defaults | how)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        records = [record for name in cfg.DATASETS.TRAIN for record in find_source(cfg, name).records]
        return build_training_loader(cfg, records, GroupSamplingMapper.to_example, start_iter=start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        if dataset_name in DatasetCatalog.list():
            images = DatasetCatalog.get(dataset_name)
        else:
            images = list(map(to_dataset_dict, find_source(cfg, dataset_name).records))
        return cls._build_loader(cfg, images[comm.get_rank() :: comm.get_world_size()])

    @staticmethod
    def _build_loader(cfg: CfgNode, images: list[dict], *, skip_unreadable: bool = False):
        """Loader of this process's images. There may be none, which Detectron2's sampler and serialization refuse."""
        return build_detection_test_loader(
            DatasetFromList(images, copy=False, serialize=False),
            mapper=GroupSamplingMapper(cfg, is_train=False, skip_unreadable=skip_unreadable),
            sampler=SequentialSampler(images),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """This project's evaluator; Detectron2's for a set of several classes that is registered as dicts alone."""
        if find_source(cfg, dataset_name).protocol == "detectron2":
            return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))
        return GroupSamplingEvaluator(cfg, dataset_name)

    @classmethod
    @stop.handler.at_once()
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None, *, resume: bool = False):
        """``DefaultTrainer.test``, on the image pyramid of ``TEST.PYRAMID`` if its ``SCALES`` are set.

        Args:
            resume: continue an interrupted evaluation. With other evaluators than this project's, all images are
                evaluated.
        """
        detector = GroupSamplingTTA(cfg, model) if cfg.TEST.PYRAMID.SCALES else model
        if evaluators is not None:
            return super().test(cfg, detector, evaluators)
        results = {}
        for name in cfg.DATASETS.TEST:
            evaluator = cls.build_evaluator(cfg, name)
            if isinstance(evaluator, GroupSamplingEvaluator):
                share = evaluator.start(model, resume=resume)
                loader = cls._build_loader(cfg, list(map(to_dataset_dict, share)), skip_unreadable=True)
            else:
                loader = cls.build_test_loader(cfg, name)
            if cfg.TEST.IMS_PER_BATCH > 1:
                loader = BatchesBySize(SingleImages(loader), cfg.TEST.IMS_PER_BATCH, lambda x: tuple(x["image"].shape))
            with evaluation_autocast(cfg):
                results[name] = inference_on_dataset(detector, loader, evaluator)
            if comm.is_main_process():
                print_csv_format(results[name])
        return results[name] if len(results) == 1 else results


def _without_traceback(entry: logging.LogRecord) -> bool:
    """Log filter: what a user can mend is a message in Detectron2's log as well."""
    if entry.exc_info and entry.exc_info[1] is not None and is_expected(entry.exc_info[1]):
        entry.msg, entry.args = f"Training ended: {describe(entry.exc_info[1])}", ()
        entry.exc_info = None
    return True


def load_config(config_file: str, opts: Sequence[str] = (), *, saved: str = "") -> CfgNode:
    """The checked config of a run: Detectron2's keys and this project's.

    Args:
        saved: the config of a checkpoint, of either engine, on which file and ``opts`` build.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used.
    """
    cfg = get_cfg()
    add_group_sampling_config(cfg)
    defaults = cfg.clone()
    merge_config(cfg, config_file, opts, saved=saved)
    check_config(cfg)
    check_values(
        cfg,
        {key: (get_value(defaults, key),) for key in _REPLACED_KEYS},
        "this project replaces the part of Detectron2 that reads it",
    )
    for key, registry in _REGISTRIES.items():
        check_values(cfg, {key: [name for name, _ in registry]}, "Detectron2 has no other registered")
    if cfg.MODEL.BACKBONE.NAME == TORCHVISION_BACKBONE:
        check_torchvision_backbone(cfg)
    if cfg.TEST.SUB_DETECTORS:
        reason = "other ones cannot do TEST.SUB_DETECTORS; with that False there is no AP@16, ..."
        check_values(cfg, {"MODEL.META_ARCHITECTURE": ("GroupSamplingRCNN",)}, reason)
    return cfg


def setup(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Set up logging and seeds of a run, and register its data sets; returns the frozen config."""
    resolve_seed(cfg, keep=args.resume or args.eval_only)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="group_sampling")
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    register_datasets(cfg)
    return cfg


def _work(cfg: CfgNode, args: argparse.Namespace, device: torch.device) -> dict | None:
    """What each process does."""
    if dist.is_initialized():
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    cfg = setup(cfg, args)
    find = functools.partial(find_source, cfg)
    check_data(cfg, find, eval_only=args.eval_only)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    model.train(getattr(args, "allow_partial_weights", False))  # a detector to evaluate needs all weights
    checkpointer = GroupSamplingCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    saved = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    check_test_classes(cfg, saved.get("class_names", ()), list(map(find, cfg.DATASETS.TEST)))
    results = Trainer.test(cfg, model, resume=args.resume)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: argparse.Namespace, finish: Finish | None = None) -> dict | None:
    """Train or evaluate as ``train_net.py`` does; see :func:`~group_sampling.engines.launch.launch` for the arguments.

    Raises:
        ConfigError: the config or the number of processes is not usable here.
        MissingDatasetError: files of a data set are missing.
    """
    cfg = load_config(args.config_file, args.opts, saved=config_to_evaluate(args))
    check_run(cfg, args, functools.partial(find_source, cfg))
    if not args.eval_only:
        check_monitoring(cfg)
    return launch(_work, cfg, args, finish)
