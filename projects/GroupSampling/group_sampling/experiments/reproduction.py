"""The trainings behind the paper's tables and figures, and ablations: what is run, what is complete, what it gave."""

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from fvcore.common.config import CfgNode

from ..config import ConfigError, changed_keys, dump_config, flatten_config, get_value
from ..engines.build import load_records
from ..engines.tv.config import get_cfg, load_config
from ..env import hardware
from ..errors import UserError
from ..files import read_json, write_json
from ..project import ROOT
from ..samplers import SAMPLERS
from .balance import SampleBalance, sample_balance, total_variation
from .jobs import Job, run_jobs
from .rows import DETECTORS, EXPERIMENTS, Row
from .runs import Run

# Overrides of every row that fit it to two CPU cores, by scale; below the folder of the configs.
OVERRIDES = {"tiny": "quick/tiny.yaml", "photos": "quick/photos.yaml"}
# What these divide a row's numbers of samples by: anchors, RoIs. The ratio of the image areas, 1/47 and 1/22, would
# leave detectors that draw uniformly a handful of positives on the built-in faces; photographs have so few faces that
# more samples are nearly all negatives. The hardest examples are not fewer in a small image: their number stays.
COUNT_DIVISORS = {"tiny": (8, 8), "photos": (32, 8)}
_ANCHOR_COUNTS = ("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "MODEL.RPN.BATCH_SIZE_PER_IMAGE")
_ROI_COUNTS = ("MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE")
# Rows that differ in these keys alone are one training run twice if they draw the same samples nevertheless: less than
# SAME_SAMPLES apart in total variation and number, on the first IMAGES_TO_COMPARE images.
SAMPLING_KEYS = {
    *(f"MODEL.GROUP_SAMPLING.{key}" for key in ("SAMPLER", "SAMPLES_PER_GROUP", "FILL", "LOSS_MEAN")),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
}
SAME_SAMPLES = 0.02
IMAGES_TO_COMPARE = 100
MARKER = "reproduce.json"  # in a row's folder: its settings, and how long it took once it is complete


class Reproduction:
    """Trainings of the rows of the paper's tables and figures: which, where, with which settings.

    Each row is one config, trained into its own folder for each seed. A row that several tables share is trained once,
    a complete one is not repeated, and an interrupted one continues from its last checkpoint.

    Args:
        tables, figures: numbers, such as (1, 4) and (2, 4).
        ablations: names of :data:`~group_sampling.experiments.rows.ABLATIONS`.
        scale: "tiny" or "photos", with the overrides of ``OVERRIDES`` and the row's numbers of samples divided by
            ``COUNT_DIVISORS``; or "wider", which changes nothing.
        num_seeds: seeds 0, 1, ... of every row.
        folder: what is written goes below ``folder / scale``.
        configs: folder of the configs.
        train_net: the training script.
        engine: "detectron2" or "torchvision".
        opts: overrides KEY VALUE ... of every config.
        num_gpus: of a training; None: 8 for "wider", else one process.
        side_by_side: trainings at a time.
        known: the ``report.json`` of an earlier run. A training that it has, with the same settings, is not repeated.

    Raises:
        ConfigError: a config is missing.
        UserError: ``known`` is no such report.
    """

    def __init__(
        self,
        tables: Sequence[int],
        figures: Sequence[int],
        ablations: Sequence[str] = (),
        *,
        scale: str,
        num_seeds: int,
        folder: Path,
        configs: Path,
        train_net: Path,
        engine: str,
        opts: Sequence[str] = (),
        num_gpus: int | None = None,
        side_by_side: int = 1,
        known: Path | None = None,
    ) -> None:
        self.scale = scale
        self.folder = folder.resolve() / scale
        self.engine = engine
        self.seeds = list(range(num_seeds))
        self.overrides = list(opts)
        self._configs = configs
        self._train_net = train_net
        self._num_gpus = num_gpus or (8 if scale == "wider" else 1)
        self._side_by_side = side_by_side
        names = [f"table{number}" for number in tables] + (["figure4"] if 4 in figures else []) + list(ablations)
        self.experiments = {name: EXPERIMENTS[name] for name in dict.fromkeys(names)}
        self.figure2_rows = DETECTORS if 2 in figures else ()
        rows = [row for experiment in self.experiments.values() for row in experiment.rows]
        self.configs = list(dict.fromkeys(row.config for row in rows))
        needed = list(dict.fromkeys(self.configs + [row.config for row in self.figure2_rows]))
        missing = [str(self._file(config)) for config in needed if not self._file(config).exists()]
        if missing:
            raise ConfigError("expected a config for every row, got none for:\n  " + "\n  ".join(missing))
        self.opts = {config: scale_opts(configs, config, scale) + self.overrides for config in needed}
        self.datasets = tuple(self.config(needed[0]).DATASETS.TEST)
        self._known = {} if known is None else _read_known(known)

    @functools.cached_property
    def same_samples(self) -> list[tuple[str, Row, Row, float]]:
        """Pairs of rows that are compared and train on the same samples: experiment, both rows, total variation.

        Such rows have nothing to compare: what differs between them is noise.

        Raises:
            MissingDatasetError: the data set to train on is not there.
        """
        found, balance_of = [], functools.cache(self._balance)
        for name, experiment in self.experiments.items():
            for a, b in itertools.combinations(experiment.rows, 2):
                if a.config != b.config and self._differs_in_samples_alone(a.config, b.config):
                    balances = balance_of(a.config), balance_of(b.config)
                    numbers = [sum(balance.positives + balance.negatives) for balance in balances]
                    distance = total_variation(*balances, effective=True)
                    if max(distance, 1 - min(numbers) / max(numbers)) < SAME_SAMPLES:
                        found.append((name, a, b, distance))
        return found

    def _differs_in_samples_alone(self, a: str, b: str) -> bool:
        cfgs = self.config(a), self.config(b)
        samplers = [SAMPLERS[cfg.MODEL.GROUP_SAMPLING.SAMPLER] for cfg in cfgs]
        if any(sampler.needs_logits or sampler.count_key is None for sampler in samplers):
            return False  # what OHEM draws is not known before the training, and focal loss is another loss
        keys = {key for key, *_ in changed_keys(*(dump_config(cfg, get_cfg()) for cfg in cfgs))}
        return keys <= SAMPLING_KEYS

    def _balance(self, config: str) -> SampleBalance:
        cfg = self.config(config)
        synthetic = cfg.DATASETS.SYNTHETIC
        synthetic.NUM_TRAIN = min(synthetic.NUM_TRAIN, IMAGES_TO_COMPARE)  # to make them all takes a while
        return sample_balance(cfg, load_records(cfg, cfg.DATASETS.TRAIN)[:IMAGES_TO_COMPARE])

    def _file(self, config: str) -> Path:
        return self._configs / f"{config}.yaml"

    def config(self, config: str) -> CfgNode:
        """The config of a row, as it is trained."""
        # It is read here and runs elsewhere, so it does not matter that there may be no GPU here.
        return load_config(str(self._file(config)), [*self.opts[config], "MODEL.DEVICE", "cpu"])

    def run(self, config: str, seed: int) -> Run:
        return Run(config, self.folder / config / f"seed{seed}")

    def settings(self, config: str) -> dict:
        """What a finished training must have been run with to count."""
        return {"config": config, "engine": self.engine, "opts": self.opts[config]}

    def marker(self, config: str, seed: int) -> dict | None:
        """What the folder of a training says of it; None: it was never started.

        Raises:
            ConfigError: it was started with other settings.
        """
        file = self.run(config, seed).folder / MARKER
        if not file.exists():
            return None
        content = read_json(file)
        self._check_settings(config, content, f"{file.parent}")
        return content

    def _check_settings(self, config: str, content: Mapping, where: str) -> None:
        settings = self.settings(config)
        found = {key: content.get(key) for key in settings}
        if found != settings:
            raise ConfigError(
                f"{where}: expected a run with the settings\n  {settings}\ngot\n  {found}\n"
                "Remove it, or name another --output."
            )

    def training(self, config: str, seed: int) -> dict | None:
        """A complete training as the report keeps it, or None: not run.

        Its settings; "ap": data set -> subset -> AP in percent; "health": the last health line of its log; "seconds",
        "hardware" and "torch" of the run.

        Raises:
            ConfigError: there is one with other settings.
        """
        marker = self.marker(config, seed)
        if marker is None or "seconds" not in marker:
            return self._known_training(config, seed)
        run = self.run(config, seed)
        ap = {name: run.results(name)["ap"] for name in self.datasets}
        return {
            **marker,
            "seed": seed,
            "ap": {
                name: {subset: round(100 * value, 4) for subset, value in values.items() if value is not None}
                for name, values in ap.items()
            },
            "health": run.last_health(),
        }

    def _known_training(self, config: str, seed: int) -> dict | None:
        training = self._known.get((config, seed))
        if training is not None:
            self._check_settings(config, training, "the report of known results")
        return training

    def ap(self, config: str, seed: int, dataset: str | None = None) -> dict[str, float] | None:
        """AP in percent of every subset of a data set, by default the first; None: not run."""
        training = self.training(config, seed)
        return None if training is None else training["ap"].get(dataset or self.datasets[0])

    def jobs(self) -> Iterator[tuple[Job, str]]:
        """The trainings that are not complete, seed by seed, and their configs."""
        for seed in self.seeds:
            for config in self.configs:
                if self.training(config, seed) is not None:
                    continue
                folder = self.run(config, seed).folder
                command = [sys.executable, str(self._train_net), "--engine", self.engine, "--resume"]
                command += ["--num-gpus", str(self._num_gpus), "--config-file", str(self._file(config))]
                command += [*self.opts[config], "SEED", str(seed), "OUTPUT_DIR", str(folder)]
                yield Job(f"{config} seed {seed}", command, folder), config

    def train(self) -> list[str]:
        """Run what is not complete; returns what went wrong."""
        jobs = list(self.jobs())
        total = len(self.configs) * len(self.seeds)
        print(f"engine {self.engine}: {total} trainings, {total - len(jobs)} of them complete in {self.folder}")
        config_of = {job.folder: config for job, config in jobs}
        for folder, config in config_of.items():
            write_json(folder / MARKER, self.settings(config))
        # One thread each: J processes with a pool of threads each would fight for the cores.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.scale in OVERRIDES else {}
        errors = []
        outcomes = run_jobs(
            [job for job, _ in jobs],
            side_by_side=self._side_by_side,
            working_directory=ROOT,
            environment=environment,
        )
        for outcome in outcomes:
            if outcome.error:
                errors.append(outcome.error)
                print(f"\n{outcome.error}", file=sys.stderr)
                continue
            settings = self.settings(config_of[outcome.job.folder])
            device = dict(zip(settings["opts"][::2], settings["opts"][1::2])).get("MODEL.DEVICE", "cuda")
            how = {"hardware": hardware(device), "torch": torch.__version__}
            write_json(outcome.job.folder / MARKER, {**settings, "seconds": round(outcome.seconds, 1), **how})
        return errors


def _read_known(file: Path) -> dict[tuple[str, int], dict]:
    """(config, seed) -> training of a ``report.json``."""
    trainings = read_json(file).get("trainings")
    if not isinstance(trainings, list) or not all(
        isinstance(training, dict) and isinstance(training.get("ap"), dict) and {"config", "seed"} <= training.keys()
        for training in trainings
    ):
        raise UserError(f'{file}: expected a report.json with "trainings", each with config, seed and ap, got none')
    return {(training["config"], training["seed"]): training for training in trainings}


def scale_opts(configs: Path, config: str, scale: str) -> list[str]:
    """The overrides KEY VALUE ... that turn a row's config into that of ``scale``."""
    if scale not in OVERRIDES:
        return []
    overrides = yaml.safe_load((configs / OVERRIDES[scale]).read_text())
    for key in ("_BASE_", "OUTPUT_DIR"):  # for those who train with the file itself
        overrides.pop(key, None)
    opts = [part for key, value in flatten_config(overrides) for part in (key, str(value))]
    cfg = load_config(str(configs / f"{config}.yaml"), ["MODEL.DEVICE", "cpu"])
    is_mining = SAMPLERS[cfg.MODEL.GROUP_SAMPLING.SAMPLER].needs_logits
    for keys, divisor in zip((_ANCHOR_COUNTS, _ROI_COUNTS), COUNT_DIVISORS[scale]):
        for key in keys:
            is_hardest = is_mining and key == "MODEL.RPN.BATCH_SIZE_PER_IMAGE"
            opts += [key, str(max(1, get_value(cfg, key) // (1 if is_hardest else divisor)))]
    return opts
