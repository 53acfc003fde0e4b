"""What a training run leaves in its output folder, with either engine."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError, flatten_config
from ..data.catalog import Catalog, Source
from ..detections import Detections
from ..engines.build import read_run_config
from ..errors import UserError
from ..evaluation.run import PROTOCOLS, TIMES_FILE
from ..files import read_json

_NEEDED_KEYS = {"SEED", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "DATASETS.TRAIN", "DATASETS.TEST"}


def parse_metrics(text: str) -> list[dict]:
    """The lines of a ``metrics.json``, or of its end; lines that are cut off or half written are left out."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            # A value that is no number is of no use to anyone who reads them.
            rows.append({key: value for key, value in row.items() if type(value) in (int, float)})
    return rows


@dataclass(frozen=True)
class Run:
    """The output folder of one training run.

    Attributes:
        name: what the report calls it.
        folder: its ``OUTPUT_DIR``: ``config.yaml``, ``metrics.json`` and ``inference/<data set>/`` are read.
    """

    name: str
    folder: Path

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config of the run, every key.

        Raises:
            ConfigError: the file holds something else.
            OSError: it is not there.
        """
        file = self.folder / "config.yaml"
        config = read_run_config(str(file))
        missing = sorted(_NEEDED_KEYS - dict(flatten_config(config)).keys())
        if missing:
            raise ConfigError(f"{file}: expected the config of a run, got one without {', '.join(missing)}")
        return config

    @property
    def engine(self) -> str:
        """The one that ran: only Detectron2's configs have a node GLOBAL."""
        return "detectron2" if "GLOBAL" in self.config else "torchvision"

    @property
    def datasets(self) -> list[str]:
        """The test sets that were evaluated."""
        names = self.config.get("DATASETS", {}).get("TEST", [])
        return [name for name in names if self._result_files(name)]

    def source(self, dataset: str) -> Source:
        """Images and annotations of a data set.

        Raises:
            UserError: it is none of the config's, or files are missing.
        """
        try:
            found = Catalog(self.config["DATASETS"])[dataset]
        except ValueError as error:
            raise UserError(str(error)) from None
        found.require()
        return found

    @functools.cached_property
    def _metrics(self) -> list[dict]:
        file = self.folder / "metrics.json"
        return parse_metrics(file.read_text(errors="replace")) if file.is_file() else []

    def metrics(self) -> list[dict]:
        """The lines of ``metrics.json``; none if the run has trained nothing."""
        return self._metrics

    @property
    def scalars(self) -> list[str]:
        """The names in :meth:`metrics`, sorted."""
        return sorted({name for row in self.metrics() for name in row})

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of one scalar."""
        rows = [(row["iteration"], row[key]) for row in self.metrics() if key in row]
        return [row[0] for row in rows], [row[1] for row in rows]

    def samples_per_scale(self) -> dict[str, tuple[float, float]]:
        """Anchor scale -> mean number of positives and negatives per image, over the whole run."""
        keys = {key.split("@")[1] for row in self.metrics() for key in row if key.startswith("rpn/num_pos@")}

        def mean(key: str) -> float:
            return float(np.mean(self.series(key)[1]))

        return {
            scale: (mean(f"rpn/num_pos@{scale}"), mean(f"rpn/num_neg@{scale}")) for scale in sorted(keys, key=float)
        }

    def health_scales(self) -> list[str]:
        """The anchor scales of which the log has the health; none for runs before version 0.2."""
        prefix = "health/logit_std@"
        found = {key.removeprefix(prefix) for row in self.metrics() for key in row if key.startswith(prefix)}
        return sorted(found, key=float)

    def last_health(self) -> dict[str, float]:
        """The last health line of the log, without "health/"; empty for runs before version 0.2."""
        for row in reversed(self.metrics()):
            health = {
                key.removeprefix("health/"): round(value, 4) for key, value in row.items() if key.startswith("health/")
            }
            if health:
                return health
        return {}

    def score_gaps(self, scale: str) -> tuple[list[int], list[float]]:
        """Iterations, and mean score of the positives of a scale less that of its negatives."""
        keys = [f"health/score_{kind}@{scale}" for kind in ("pos", "neg")]
        rows = [(row["iteration"], row[keys[0]] - row[keys[1]]) for row in self.metrics() if row.keys() >= {*keys}]
        return [row[0] for row in rows], [row[1] for row in rows]

    def results(self, dataset: str) -> dict:
        """What the evaluation wrote; ``"ap"`` has a number, or None, for every subset.

        Raises:
            UserError: the file is damaged.
        """
        file = self.folder / "inference" / dataset / "results.json"
        content = read_json(file)
        ap = content.get("ap")
        if not isinstance(ap, dict) or not all(type(value) in (int, float, type(None)) for value in ap.values()):
            raise UserError(f'{file}: expected the results of an evaluation, numbers by name as "ap", got {ap!r:.80}')
        return content

    def _result_files(self, dataset: str) -> list[Path]:
        """Of all protocols by which the data set was evaluated."""
        folder = self.folder / "inference" / dataset
        names = dict.fromkeys(protocol.results for protocol in PROTOCOLS.values())
        return [folder / name for name in names if (folder / name).is_file()]

    def figures(self, dataset: str) -> dict[str, float | None]:
        """What an evaluation found, in percent by name, of every protocol; None where it is not defined.

        Raises:
            UserError: a file is damaged.
        """
        found: dict[str, float | None] = {}
        for file in self._result_files(dataset):
            content = read_json(file)
            try:
                if content.get("protocol") == "COCO":
                    values = {f"COCO {name}": value for name, value in content["metrics"].items()}
                elif content.get("protocol") == "FDDB":
                    values = {
                        f"{kind} at {number} false positives, {name}": rate
                        for name, rates in content["results"].items()
                        for kind in ("discrete", "continuous")
                        for number, rate in rates[kind].items()
                    }
                else:
                    values = {name.capitalize(): ap for name, ap in self.results(dataset)["ap"].items()}
                found.update({name: None if value is None else 100 * value for name, value in values.items()})
            except (KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{file}: expected the results of an evaluation, got {content!r:.80}") from error
        return found

    def best_score(self, dataset: str) -> float:
        """The score from which on detections have the highest F1; 0.5 where nothing was detected."""
        for file in self._result_files(dataset):
            content = read_json(file)
            curves = content.get("results")
            first = next(iter(curves.values()), {}) if isinstance(curves, dict) else content
            best = first.get("by_score", {}).get("best_f1")
            if best:
                return float(best["score"])
        return 0.5

    def times(self, dataset: str) -> dict:
        """Seconds per image: "images", "median" and "slowest" by image id; {} where they were not taken."""
        file = self.folder / "inference" / dataset / TIMES_FILE
        return read_json(file) if file.is_file() else {}

    def predictions(self, source: Source) -> dict[str, Detections]:
        """Of a data set, by image id.

        Raises:
            UserError, ValueError: they are damaged, or not there.
        """
        read = PROTOCOLS[source.protocol].read_detections
        return read(str(self.folder / "inference" / source.name), source)
