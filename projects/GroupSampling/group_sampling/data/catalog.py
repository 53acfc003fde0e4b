"""Data sets by name.

Built in are ``wider_face_{train,val,test}``, ``synthetic_faces_{train,val}`` and ``fddb``; a configuration adds its
own. Relative paths are below ``$DETECTRON2_DATASETS``, or ``./datasets``, as Detectron2 has it.
"""

import difflib
import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import SYNTHETIC_DEFAULTS
from ..errors import UserError
from . import coco, fddb, synthetic, wider_face
from .records import DataReport, ImageRecord
from .synthetic_scene import Settings

logger = logging.getLogger(__name__)

_WIDER_FACE_URL = "http://shuoyang1213.me/WIDERFACE/"
_FDDB_URL = "http://vis-www.cs.umass.edu/fddb/"
_SYNTHETIC_OVERRIDE = """DATASETS.TRAIN '("synthetic_faces_train",)' DATASETS.TEST '("synthetic_faces_val",)'"""


class MissingDatasetError(UserError, FileNotFoundError):
    """Files of a data set are missing. The message says which, where to get them, and what to use instead."""


class Source(ABC):
    """One data set. Its annotations are parsed once, when they are first asked for; no image is opened.

    Attributes:
        name: in the catalog.
        protocol: how detections on it are evaluated, "wider_face", "coco" or "fddb".
        paths: its files and folders, annotations first; none for procedural images.
        apply_exif: boxes are of the upright pictures; else of the pixels as they are stored.
    """

    protocol = "wider_face"

    def __init__(self, name: str, *paths: str) -> None:
        self.name = name
        self.paths = paths
        self.apply_exif = True

    @property
    def missing_paths(self) -> tuple[str, ...]:
        """Those of :attr:`paths` that do not exist."""
        return tuple(path for path in self.paths if not os.path.exists(path))

    def require(self) -> None:
        """Check that all files are there, without reading one.

        Raises:
            MissingDatasetError: a file or folder is missing.
        """
        if self.missing_paths:
            raise MissingDatasetError(_explain_missing(self.name, self.missing_paths))

    @property
    def records(self) -> list[ImageRecord]:
        """The images and their annotations.

        Raises:
            MissingDatasetError: a file or folder is missing.
            AnnotationError: an annotation file does not follow its format.
        """
        return self._parsed.records

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name, in the order of the class indices. For COCO's format raises as :attr:`records`."""
        return {1: "face"}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of :attr:`categories`: ("face",), or those of a COCO-format file in ascending id."""
        return tuple(self.categories.values())

    @property
    def report(self) -> DataReport:
        """What the parser dropped or changed. Raises as :attr:`records`."""
        return self._parsed.report

    @functools.cached_property
    def _parsed(self) -> "_Parsed":
        self.require()
        report = DataReport()
        records, categories = self._read(report)
        if not self.apply_exif:
            records = [replace(record, is_raw=True) for record in records]
        parsed = _Parsed(records, categories, report)
        is_odd = report.num_dropped or report.hints() or not parsed.records
        log = logger.warning if is_odd else logger.info
        log("data set %s: %s", self.name, report.summary())
        return parsed

    @abstractmethod
    def _read(self, report: DataReport) -> tuple[list[ImageRecord], dict[int, str]]:
        """Parse; return records and categories, and add to ``report``."""


class _Parsed(NamedTuple):
    records: list[ImageRecord]
    categories: dict[int, str]
    report: DataReport


class _WiderFormat(Source):
    def _read(self, report):
        annotations, image_root, *image_list = self.paths
        keep = wider_face.read_paths(*image_list) if image_list else None
        records = wider_face.read_annotations(annotations, image_root, keep=keep, report=report)
        return records, self.categories


class _WiderFileList(Source):
    def _read(self, report):
        return wider_face.read_file_list(*self.paths, report=report), self.categories


class _Fddb(Source):
    protocol = "fddb"

    def _read(self, report):
        return fddb.read_records(*self.paths, report=report), self.categories


class _CocoFormat(Source):
    protocol = "coco"

    @property
    def categories(self) -> dict[int, str]:
        return self._parsed.categories

    def _read(self, report):
        return coco.read_annotations(*self.paths, report=report)


class _Synthetic(Source):
    def __init__(self, split: str, settings: Settings) -> None:
        super().__init__(f"synthetic_faces_{split}")
        self._split, self._settings = split, settings

    def _read(self, report):
        return synthetic.records(self._split, self._settings, report=report), self.categories


class Catalog:
    """The data sets that a configuration can name: ``catalog["wider_face_val"]`` is a :class:`Source`.

    Build it once and pass it on: each source keeps what it has parsed.

    Args:
        cfg_datasets: the configuration's ``DATASETS`` node, of which these keys are read; None: the built-in sets.

            - ``COCO_FORMAT``: list of [name, annotation_json, image_root];
            - ``WIDER_FORMAT``: list of [name, annotation_txt (or .txt.gz), image_root] and optionally a fourth entry,
              a file with one relative image path per line: only these images belong to the set then. This file is
              relative to the working directory, as it belongs to the configuration;
            - ``APPLY_EXIF``: see :class:`Source`;
            - ``SYNTHETIC``: a mapping, see :class:`~group_sampling.data.synthetic_scene.Settings`.
        root: folder of relative paths; None: ``$DETECTRON2_DATASETS``, else ``./datasets``.

    Raises:
        ValueError: a declaration in ``cfg_datasets`` that makes no sense.
    """

    def __init__(
        self, cfg_datasets: Mapping[str, Any] | None = None, root: str | os.PathLike[str] | None = None
    ) -> None:
        config = cfg_datasets if cfg_datasets is not None else {}
        self._root = os.path.expanduser(root if root is not None else os.environ.get("DETECTRON2_DATASETS", "datasets"))
        self._sources: dict[str, Source] = {}
        self._add_builtin(Settings.from_mapping({**SYNTHETIC_DEFAULTS, **config.get("SYNTHETIC", {})}))
        self._add_declared(config)
        for source in self._sources.values():
            source.apply_exif = bool(config.get("APPLY_EXIF", True))

    @property
    def names(self) -> tuple[str, ...]:
        """Built-in data sets first, then the declared ones."""
        return tuple(self._sources)

    def __getitem__(self, name: str) -> Source:
        """
        Raises:
            ValueError: unknown name.
        """
        if name not in self._sources:
            close = difflib.get_close_matches(name, self._sources, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"data set: expected one of {', '.join(self._sources)}, got {name!r}{hint}. "
                "A data set of your own is one line in DATASETS.COCO_FORMAT or DATASETS.WIDER_FORMAT, for example "
                f'DATASETS.COCO_FORMAT \'[["{name}", "annotations.json", "images"]]\''
            )
        return self._sources[name]

    def _add(self, source: Source) -> None:
        self._sources[source.name] = source

    def _add_builtin(self, settings: Settings) -> None:
        wider, split = self._below("WIDER_FACE"), self._below("WIDER_FACE", "wider_face_split")
        for part in ("train", "val"):
            annotations = os.path.join(split, f"wider_face_{part}_bbx_gt.txt")
            self._add(_WiderFormat(f"wider_face_{part}", annotations, os.path.join(wider, f"WIDER_{part}", "images")))
        test_list = os.path.join(split, "wider_face_test_filelist.txt")
        self._add(_WiderFileList("wider_face_test", test_list, os.path.join(wider, "WIDER_test", "images")))
        for part in ("train", "val"):
            self._add(_Synthetic(part, settings))
        self._add(_Fddb("fddb", self._below("fddb", "FDDB-folds"), self._below("fddb", "originalPics")))

    def _add_declared(self, config: Mapping[str, Any]) -> None:
        formats = (
            ("COCO_FORMAT", _CocoFormat, "[name, annotation_json, image_root]", (3,)),
            ("WIDER_FORMAT", _WiderFormat, "[name, annotation_txt, image_root] or a fourth entry image_list", (3, 4)),
        )
        for key, source, expectation, lengths in formats:
            for index, entry in enumerate(config.get(key, ())):
                place = f"DATASETS.{key}[{index}]"
                is_list = isinstance(entry, list | tuple) and all(isinstance(part, str) and part for part in entry)
                if not is_list or len(entry) not in lengths:
                    raise ValueError(f"{place}: expected {expectation}, all of them strings, got {entry!r}")
                name, *paths = entry
                if name in self._sources:
                    raise ValueError(f"{place}: expected a name that is not taken yet, got {name!r}")
                annotations, image_root, *image_list = map(os.path.expanduser, paths)
                self._add(source(name, self._below(annotations), self._below(image_root), *image_list))

    def _below(self, *parts: str) -> str:
        return os.path.join(self._root, *parts)  # an absolute part takes the place of the root


def _explain_missing(name: str, missing: Sequence[str]) -> str:
    lines = [f"data set {name!r}: expected these files and folders, which do not exist:"]
    lines += [f"  {os.path.abspath(path)}" for path in missing]
    if name.startswith("wider_face_"):
        lines.append(f"WIDER FACE is published at {_WIDER_FACE_URL}: get the images of the split and the face")
        lines.append("annotations, and unpack both into one folder WIDER_FACE, so that the paths above exist.")
    if name == "fddb":
        lines.append(f"FDDB is published at {_FDDB_URL}: unpack FDDB-folds.tgz into the folder fddb, and")
        lines.append("originalPics.tar.gz into fddb/originalPics, so that fddb/originalPics/2002 exists.")
    lines.append("Relative paths are below $DETECTRON2_DATASETS (if that is not set: ./datasets).")
    lines.append(f"To use the built-in synthetic faces instead, add:\n  {_SYNTHETIC_OVERRIDE}")
    return "\n".join(lines)
