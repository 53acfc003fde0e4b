"""What a training run leaves in its output folder, with either engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..detections import Detections
from ..errors import UserError
from ..evaluation import read_predictions
from ..files import read_json


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
        folder: its ``OUTPUT_DIR``: ``metrics.json`` and ``inference/<data set>/`` are read.
    """

    name: str
    folder: Path

    def metrics(self) -> list[dict]:
        """The lines of ``metrics.json``."""
        return parse_metrics((self.folder / "metrics.json").read_text(errors="replace"))

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

    def predictions(self, dataset: str) -> dict[str, Detections]:
        """By image id; classes and anchor scales are unknown."""
        return dict(read_predictions(self.folder / "inference" / dataset / "predictions"))
