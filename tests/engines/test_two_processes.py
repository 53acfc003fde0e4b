"""Every detector in two CPU processes, one of them without a single face and without an image to evaluate."""

import datetime
import importlib.util
import json
import os
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tv_cases import CONFIGS, SMALL_OPTS, run_configs

NAMES = [str(path.relative_to(CONFIGS).with_suffix("")) for path in run_configs()]
ENGINES = ("torchvision", "detectron2")
# One image to evaluate, and to compute a loss of, for two processes.
OPTS = [*SMALL_OPTS, "DATASETS.SYNTHETIC.NUM_VAL", "1", "TEST.VALIDATION_LOSS", "True", "TEST.EVAL_PERIOD", "2"]
OPTS += ["TEST.BEST_CHECKPOINTER.ENABLED", "True", "TEST.BEST_CHECKPOINTER.METRIC", "validation/total_loss"]


def without_faces(to_example):
    return lambda image, boxes, classes, *rest: to_example(image, boxes[:0], classes[:0], *rest)


def loss_of_nan(model, inputs, losses):
    return {name: loss * float("nan") for name, loss in losses.items()}


def run(rank, engine, names, folder, has_nan):
    """What each process does; leaves its findings in ``folder``."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    without_gradient = []

    def count(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        without_gradient.append(sum(p.grad is None for p in parameters))

    register_optimizer_step_pre_hook(count)
    # A process that waits in vain gives up, and the test fails instead of hanging.
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", limit, world_size=2, rank=rank)
    work = prepare(engine, rank, has_nan)
    findings = {}
    for name in names:
        opts = [*OPTS, "OUTPUT_DIR", str(folder / name)]
        args = Namespace(config_file=str(CONFIGS / f"{name}.yaml"), opts=opts, resume=False, eval_only=False)
        without_gradient.clear()
        try:
            work(args)
            outcome = "finished"
        except FloatingPointError as error:
            outcome = str(error)
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
        findings[name] = [outcome, list(without_gradient)]
        (folder / f"rank{rank}.json").write_text(json.dumps(findings))


def prepare(engine, rank, has_nan):
    """The engine's main function of one process; that of rank 1 finds no face in any image."""
    if engine == "torchvision":
        import group_sampling.engines.tv.train as tv_train

        if rank == 1:
            tv_train.to_example = without_faces(tv_train.to_example)
        return lambda args: tv_train._work(tv_train.load_config(args.config_file, args.opts), args, torch.device("cpu"))

    import detectron2.utils.comm as comm

    import group_sampling.engines.d2.train as d2_train

    comm.create_local_process_group(2)
    comm.create_local_process_group = lambda size: None  # once per run, and there are several here
    if rank == 1:
        mapper = d2_train.GroupSamplingMapper
        mapper.to_example = staticmethod(without_faces(mapper.to_example))
    if has_nan and rank == 1:
        build = d2_train.Trainer.build_model

        def build_with_nan(cfg):
            model = build(cfg)
            model.register_forward_hook(loss_of_nan)
            return model

        d2_train.Trainer.build_model = staticmethod(build_with_nan)
    return lambda args: d2_train._work(d2_train.load_config(args.config_file, args.opts), args, torch.device("cpu"))


def run_two(engine, names, folder, has_nan=False):
    if engine == "detectron2" and importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed")
    context = torch.multiprocessing.spawn(run, args=(engine, names, folder, has_nan), nprocs=2, join=False, daemon=True)
    while not context.join():
        pass
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_without_faces(tmp_path, engine):
    """No hang, and no parameter without a gradient in three iterations; the only image is evaluated once."""
    expected = {name: ["finished", [0, 0, 0]] for name in NAMES}
    assert run_two(engine, NAMES, tmp_path) == [expected, expected]
    for name in NAMES:
        folder = tmp_path / name / "inference/synthetic_faces_val"
        assert json.loads((folder / "results.json").read_text())["counts"]["images"] == 1, name
        assert len(list((folder / "predictions").rglob("*.txt"))) == 1, name
        assert not (folder / "partial").exists(), name
        rows = map(json.loads, (tmp_path / name / "metrics.json").read_text().splitlines())
        losses = [row["validation/total_loss"] for row in rows if "validation/total_loss" in row]
        best = torch.load(tmp_path / name / "model_best.pth", weights_only=True)["best"]["value"]
        assert len(losses) == 2 and best == max(losses) > 0, name  # by the mode "max"


@pytest.mark.slow
def test_nan_on_one_process_stops_detectron2_everywhere(tmp_path):
    """The torchvision engine's is in test_tv_train.py."""
    name = "fpn_finest_sampling"
    findings = run_two("detectron2", [name], tmp_path, has_nan=True)
    (main, steps), (other, other_steps) = (of_rank[name] for of_rank in findings)
    assert "iteration 0: the loss of another process is not finite" in main and "synthetic://train/" in main
    assert "iteration 0: the loss of this process is not finite" in other and "nan" in other
    assert steps == other_steps == [], "a weight was changed"
    assert not list(tmp_path.rglob("model_final.pth"))
