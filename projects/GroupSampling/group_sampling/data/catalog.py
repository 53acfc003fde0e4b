"""Data sets by name.

Built in are ``wider_face_{train,val,test}``, ``synthetic_faces_{train,val}`` and ``fddb``; a configuration adds its
own. Relative paths are below ``$DETECTRON2_DATASETS``, or ``./datasets``, as Detectron2 has it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from . import coco, fddb, synthetic, wider_face
from .records import DataReport, ImageRecord

logger = logging.getLogger(__name__)

_FACE = ("face",)
_WIDER_FACE_URL = "http://shuoyang1213.me/WIDERFACE/"
_FDDB_URL = "http://vis-www.cs.umass.edu/fddb/"
_SYNTHETIC_OVERRIDE = """DATASETS.TRAIN '("synthetic_faces_train",)' DATASETS.TEST '("synthetic_faces_val",)'"""


class MissingDatasetError(FileNotFoundError):
    """Files of a data set are not there. The message says which, how to get them, and what to train on instead."""


def load_dataset(
    name: str,
    cfg_datasets: Mapping[str, Any] | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    report: DataReport | None = None,
) -> list[ImageRecord]:
    """Reads the annotations of a data set; opens no image.

    What had to be dropped or changed is logged, and counted in ``report``.

    Args:
        name: one of :func:`dataset_names`.
        cfg_datasets: the configuration's ``DATASETS`` node, of which these keys are read:

            - ``COCO_FORMAT``: list of [name, annotation_json, image_root];
            - ``WIDER_FORMAT``: list of [name, annotation_txt (or .txt.gz), image_root] and optionally a fourth entry,
              a file with one relative image path per line: only these images belong to the set then. This file is
              relative to the working directory, as it belongs to the configuration;
            - ``SYNTHETIC``: a mapping, see :class:`~group_sampling.data.synthetic.Settings`.
        root: folder of relative paths; None: ``$DETECTRON2_DATASETS``, else ``./datasets``.

    Raises:
        MissingDatasetError: files are missing.
        AnnotationError: an annotation file does not follow its format.
        ValueError: unknown name, or a declaration in ``cfg_datasets`` that makes no sense.
    """
    source = _find(name, cfg_datasets, root)
    _require_paths(name, source)
    report = report if report is not None else DataReport()
    records, _ = source.read(report)
    log = logger.warning if report.num_dropped or not records else logger.info
    log("data set %s: %s", name, report.summary())
    return records


def dataset_names(cfg_datasets: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The names that :func:`load_dataset` knows, built-in ones first."""
    return tuple(_catalog(cfg_datasets, None))


def class_names(
    name: str, cfg_datasets: Mapping[str, Any] | None = None, root: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """Names of a data set's classes: ("face",), or the categories of a COCO-format file in ascending id."""
    source = _find(name, cfg_datasets, root)
    if not isinstance(source, _CocoFormat):
        return _FACE
    _require_paths(name, source)
    return source.read(DataReport())[1]


def evaluation_protocol(name: str, cfg_datasets: Mapping[str, Any] | None = None) -> tuple[str, tuple[str, ...]]:
    """The protocol that a data set is evaluated by, "wider_face", "coco" or "fddb", and the set's files and folders."""
    source = _find(name, cfg_datasets, None)
    return {_CocoFormat: "coco", _Fddb: "fddb"}.get(type(source), "wider_face"), source.paths


def missing_paths(
    name: str, cfg_datasets: Mapping[str, Any] | None = None, root: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """The files and folders that :func:`load_dataset` would miss; empty when the set can be loaded."""
    return tuple(path for path in _find(name, cfg_datasets, root).paths if not os.path.exists(path))


def require_dataset(name: str, cfg_datasets: Mapping[str, Any] | None = None) -> None:
    """Raises what :func:`load_dataset` would raise for an unknown name or missing files; reads nothing."""
    _require_paths(name, _find(name, cfg_datasets, None))


class _Source(Protocol):
    """Where a data set comes from."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Files and folders that have to exist."""

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        """Returns (records, class names)."""


@dataclass(frozen=True)
class _WiderFormat:
    annotations: str
    image_root: str
    image_list: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.annotations, self.image_root, self.image_list) if path is not None)

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        keep = wider_face.read_paths(self.image_list) if self.image_list is not None else None
        return wider_face.read_annotations(self.annotations, self.image_root, keep=keep, report=report), _FACE


@dataclass(frozen=True)
class _WiderFileList:
    file_list: str
    image_root: str

    @property
    def paths(self) -> tuple[str, ...]:
        return self.file_list, self.image_root

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        return wider_face.read_file_list(self.file_list, self.image_root, report=report), _FACE


@dataclass(frozen=True)
class _Fddb:
    folds: str
    image_root: str

    @property
    def paths(self) -> tuple[str, ...]:
        return self.folds, self.image_root

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        return fddb.read_records(self.folds, self.image_root, report=report), _FACE


@dataclass(frozen=True)
class _CocoFormat:
    annotations: str
    image_root: str

    @property
    def paths(self) -> tuple[str, ...]:
        return self.annotations, self.image_root

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        return coco.read_annotations(self.annotations, self.image_root, report=report)


@dataclass(frozen=True)
class _Synthetic:
    split: str
    settings: synthetic.Settings
    paths: tuple[str, ...] = ()

    def read(self, report: DataReport) -> tuple[list[ImageRecord], tuple[str, ...]]:
        return synthetic.records(self.split, self.settings, report=report), _FACE


def _catalog(cfg_datasets: Mapping[str, Any] | None, root: str | os.PathLike[str] | None) -> dict[str, _Source]:
    config = cfg_datasets if cfg_datasets is not None else {}
    base = os.path.expanduser(root if root is not None else os.environ.get("DETECTRON2_DATASETS", "datasets"))

    def below(*parts: str) -> str:
        return os.path.join(base, *parts)  # an absolute part takes the place of the base

    wider = below("WIDER_FACE")
    split = os.path.join(wider, "wider_face_split")
    settings = synthetic.Settings.from_mapping(config.get("SYNTHETIC", {}))
    catalog: dict[str, _Source] = {}
    for part in ("train", "val"):
        annotations = os.path.join(split, f"wider_face_{part}_bbx_gt.txt")
        catalog[f"wider_face_{part}"] = _WiderFormat(annotations, os.path.join(wider, f"WIDER_{part}", "images"))
    test_list = os.path.join(split, "wider_face_test_filelist.txt")
    catalog["wider_face_test"] = _WiderFileList(test_list, os.path.join(wider, "WIDER_test", "images"))
    for part in ("train", "val"):
        catalog[f"synthetic_faces_{part}"] = _Synthetic(part, settings)
    catalog["fddb"] = _Fddb(below("fddb", "FDDB-folds"), below("fddb", "originalPics"))

    formats = (
        ("COCO_FORMAT", _CocoFormat, "[name, annotation_json, image_root]", (3,)),
        ("WIDER_FORMAT", _WiderFormat, "[name, annotation_txt, image_root] or a fourth entry image_list", (3, 4)),
    )
    for key, source, expectation, lengths in formats:
        for index, entry in enumerate(config.get(key, ())):
            place = f"DATASETS.{key}[{index}]"
            is_list = isinstance(entry, list | tuple) and all(isinstance(part, str) and part for part in entry)
            if not is_list or len(entry) not in lengths:
                raise ValueError(f"{place}: expected {expectation}, all of them strings, found {entry!r}")
            name, *paths = entry
            if name in catalog:
                raise ValueError(f"{place}: expected a name that is not taken yet, found {name!r}")
            annotations, image_root, *image_list = map(os.path.expanduser, paths)
            catalog[name] = source(below(annotations), below(image_root), *image_list)
    return catalog


def _find(name: str, cfg_datasets: Mapping[str, Any] | None, root: str | os.PathLike[str] | None) -> _Source:
    catalog = _catalog(cfg_datasets, root)
    if name not in catalog:
        close = difflib.get_close_matches(name, catalog, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"data set: expected one of {', '.join(catalog)}, found {name!r}{hint}")
    return catalog[name]


def _require_paths(name: str, source: _Source) -> None:
    missing = [path for path in source.paths if not os.path.exists(path)]
    if not missing:
        return
    lines = [f"data set {name!r} is not there. Expected, but not found:"]
    lines += [f"  {os.path.abspath(path)}" for path in missing]
    if name.startswith("wider_face_"):
        lines.append(f"WIDER FACE is published at {_WIDER_FACE_URL}: get the images of the split and the face")
        lines.append("annotations, and unpack both into one folder WIDER_FACE, so that the paths above exist.")
    if name == "fddb":
        lines.append(f"FDDB is published at {_FDDB_URL}: unpack FDDB-folds.tgz into the folder fddb, and")
        lines.append("originalPics.tar.gz into fddb/originalPics, so that fddb/originalPics/2002 exists.")
    lines.append("Relative paths are below $DETECTRON2_DATASETS (if that is not set: ./datasets).")
    lines.append(f"To use the built-in synthetic faces instead, add:\n  {_SYNTHETIC_OVERRIDE}")
    raise MissingDatasetError("\n".join(lines))
