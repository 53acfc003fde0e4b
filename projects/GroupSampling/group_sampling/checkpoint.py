"""Checkpoints that either engine reads, written atomically.

Both engines have the same parameters under different names. A checkpoint of one engine, of the other, or a plain
torchvision ResNet is recognized by its names and converted while it is loaded, or by
``python -m group_sampling.checkpoint``.
"""

import argparse
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from .config import ConfigError, changed_keys
from .errors import add_debug_flag, exit_on_error
from .files import atomic_file, write_atomically

# torchvision's ImageNet weights (IMAGENET1K_V1: the recipe of the paper's time), named as `torchvision://resnet50`.
# The eight hex digits are the start of the file's SHA-256, which torch.hub verifies.
TORCHVISION_WEIGHTS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
TORCHVISION_PREFIX = "torchvision://"

# (Detectron2's name, torchvision's name); {s} stands for a number, {s-1} for that number minus one. Detectron2's ResNet
# is the backbone itself, or its "bottom_up" under an FPN.
_NAMES = (
    ("backbone.stem.conv1.norm.", "backbone.body.bn1."),
    ("backbone.stem.conv1.", "backbone.body.conv1."),
    ("backbone.res{s}.{b}.shortcut.norm.", "backbone.body.layer{s-1}.{b}.downsample.1."),
    ("backbone.res{s}.{b}.shortcut.", "backbone.body.layer{s-1}.{b}.downsample.0."),
    ("backbone.res{s}.{b}.conv{c}.norm.", "backbone.body.layer{s-1}.{b}.bn{c}."),
    ("backbone.res{s}.{b}.conv{c}.", "backbone.body.layer{s-1}.{b}.conv{c}."),
    ("backbone.fpn_lateral{s}.norm.", "backbone.fpn.inner_blocks.{s-2}.1."),
    ("backbone.fpn_output{s}.norm.", "backbone.fpn.layer_blocks.{s-2}.1."),
    ("backbone.fpn_lateral{s}.", "backbone.fpn.inner_blocks.{s-2}.0."),
    ("backbone.fpn_output{s}.", "backbone.fpn.layer_blocks.{s-2}.0."),
    ("proposal_generator.rpn_head.", "rpn.head."),
    ("roi_heads.box_head.fc1.", "roi_heads.box_head.fc6."),
    ("roi_heads.box_head.fc2.", "roi_heads.box_head.fc7."),
)
_FPN_NAMES = ("backbone.fpn", "backbone.bottom_up.")
_RESNET = re.compile(r"backbone\.(stem|res\d)\.")
_FIELD = re.compile(r"\{(\w)(?:-(\d))?\}")


def _rule(source: str, target: str) -> tuple[re.Pattern, Callable[[re.Match], str]]:
    """Compile one line of :data:`_NAMES` into a pattern for ``source`` and a function that writes ``target``."""
    pattern, position = "", 0
    shift_of = {}
    for field in _FIELD.finditer(source):
        pattern += re.escape(source[position : field.start()]) + rf"(?P<{field[1]}>\d+)"
        shift_of[field[1]] = int(field[2] or 0)
        position = field.end()
    pattern += re.escape(source[position:])

    def write(match: re.Match) -> str:
        def number(field: re.Match) -> str:
            return str(int(match[field[1]]) + shift_of[field[1]] - int(field[2] or 0))

        return _FIELD.sub(number, target)

    return re.compile(pattern), write


_TO_TORCHVISION = [_rule(d2, tv) for d2, tv in _NAMES]
_TO_DETECTRON2 = [_rule(tv, d2) for d2, tv in _NAMES]


def convert_names(state_dict: Mapping[str, Tensor], naming: str, *, has_fpn: bool | None = None) -> dict[str, Tensor]:
    """Rename the parameters of a detector or of a torchvision ResNet to one engine's names, and order its classes so.

    Args:
        state_dict: parameters named by Detectron2's engine, by torchvision's engine, or by a torchvision ResNet
            classifier (whose ``fc`` layer is left out). The values are not copied, except those of the box predictor,
            whose rows the engines order differently.
        naming: ``"detectron2"`` or ``"torchvision"``. Names that already fit, and unknown ones, stay as they are.
        has_fpn: Detectron2's names of a ResNet depend on it; None: if ``state_dict`` has parameters of an FPN.
    """
    if naming not in ("detectron2", "torchvision"):
        raise ValueError(f'convert_names: naming: expected "detectron2" or "torchvision", got {naming!r}')
    if "conv1.weight" in state_dict and "layer1.0.conv1.weight" in state_dict:
        state_dict = {f"backbone.body.{k}": v for k, v in state_dict.items() if not k.startswith("fc.")}
    if has_fpn is None:
        has_fpn = any(name.startswith(_FPN_NAMES) for name in state_dict)
    rules = _TO_DETECTRON2 if naming == "detectron2" else _TO_TORCHVISION
    converted = {}
    for name, value in state_dict.items():
        if naming == "detectron2" and name.endswith("._extra_state"):
            continue  # the torchvision engine's counts of training passes; Detectron2's trainer has its own
        name = name.replace("backbone.bottom_up.", "backbone.", 1)
        for pattern, write in rules:
            match = pattern.match(name)
            if match:
                name = write(match) + name[match.end() :]
                break
        if naming == "detectron2" and has_fpn and _RESNET.match(name):
            name = name.replace("backbone.", "backbone.bottom_up.", 1)
        converted[name] = value
    _reorder_box_predictor(converted, naming)
    return converted


def _reorder_box_predictor(state_dict: dict[str, Tensor], naming: str) -> None:
    """Bring the outputs of Fast R-CNN into one engine's order, in place; K classes.

    Detectron2 has the background last and boxes for the K classes, torchvision has it first, with a box. The number of
    boxes therefore tells the order. A class-agnostic regressor stays as it is.
    """
    prefix = "roi_heads.box_predictor."
    for kind in ("weight", "bias"):
        score_name, box_name = f"{prefix}cls_score.{kind}", f"{prefix}bbox_pred.{kind}"
        if not {score_name, box_name} <= state_dict.keys():
            continue
        scores, boxes = state_dict[score_name], state_dict[box_name]
        if naming == "torchvision" and len(boxes) == 4 * (len(scores) - 1):
            state_dict[score_name] = torch.cat([scores[-1:], scores[:-1]])
            state_dict[box_name] = torch.cat([torch.zeros_like(boxes[:4]), boxes])
        elif naming == "detectron2" and len(boxes) == 4 * len(scores):
            state_dict[score_name] = torch.cat([scores[1:], scores[:1]])
            state_dict[box_name] = boxes[4:]


# Parameters and statistics that a detector does not need.
_OPTIONAL = re.compile(r"num_batches_tracked$|_extra_state$|pixel_(mean|std)$|\.cell_anchors\.")


def convert_in_place(state_dict: dict[str, Tensor], naming: str, model: nn.Module) -> None:
    """:func:`convert_names` for ``model``, whose names are those of ``naming``."""
    has_fpn = any(name.startswith(_FPN_NAMES) for name in model.state_dict())
    converted = convert_names(state_dict, naming, has_fpn=has_fpn)
    state_dict.clear()
    state_dict.update(converted)


def refuse_partial_weights(
    weights: Mapping[str, Tensor], model: nn.Module, *, file: str = "checkpoint", prefix: str = ""
) -> None:
    """Refuse weights that do not fit a model in eval mode entirely: it would detect with random ones.

    A model in training mode may start from some of its weights, those of a backbone for example.

    Args:
        prefix: of the names of the model's weights in ``weights``.

    Raises:
        ConfigError: naming the first weights that are missing, have another shape, or are unknown.
    """
    if model.training:
        return
    expected = {f"{prefix}{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if name.startswith(prefix)}
    differences = {
        "missing": expected.keys() - found.keys(),
        "of another shape": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
        "unknown": found.keys() - expected.keys(),
    }
    wrong = {what: sorted(name for name in names if not _OPTIONAL.search(name)) for what, names in differences.items()}
    counts = [f"{len(names)} are {what} ({names[0]}, ...)" for what, names in wrong.items() if names]
    if counts:
        raise ConfigError(
            f"{file}: expected the weights of this model, got others: of {len(expected)}, {'; '.join(counts)}. "
            "Evaluate with the config of their training; --allow-partial-weights of train_net.py, or a model in "
            "training mode, loads those that fit"
        )


def resolve_weights(path: str) -> str:
    """Turn ``MODEL.WEIGHTS`` into a local file; ``torchvision://resnet50`` is downloaded (and checked) by torch.hub.

    Raises:
        ConfigError: unknown name after ``torchvision://``, the file does not exist, or the download failed.
    """
    if path.startswith(TORCHVISION_PREFIX):
        name = path[len(TORCHVISION_PREFIX) :]
        if name not in TORCHVISION_WEIGHTS:
            raise ConfigError(
                f"MODEL.WEIGHTS is {path!r}: expected {TORCHVISION_PREFIX} followed by one of "
                f"{sorted(TORCHVISION_WEIGHTS)}"
            )
        url = TORCHVISION_WEIGHTS[name]
        local = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(local), hash_prefix=url[:-4].rsplit("-", 1)[1])
            except (OSError, RuntimeError) as error:
                raise ConfigError(
                    f"MODEL.WEIGHTS is {path!r}, but {url} could not be downloaded ({error}). Set MODEL.WEIGHTS to a "
                    f'local copy of that file (or put it at {local}), or to "" to train from scratch.'
                ) from error
        return str(local)
    if "://" not in path and not os.path.isfile(path):
        raise ConfigError(
            f'MODEL.WEIGHTS is {path!r}: no such file. Set it to a checkpoint, to "{TORCHVISION_PREFIX}resnet50", '
            'or to "" to train from scratch.'
        )
    return path


class Description(NamedTuple):
    """What a checkpoint says of itself."""

    config: str = ""  # YAML of the training's config, see config.dump_config; "": the file has none
    class_names: tuple[str, ...] = ()  # by class index


UNDERSTOOD_FORMATS = (
    "Understood are checkpoints of this project, of Detectron2 and of torchvision, written by torch.save: a dict of "
    'tensors by parameter name, alone or under "model" or "state_dict", with or without the prefix "module."'
)


def read_checkpoint(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """Read a file without running code from it.

    Args:
        mmap: do not read the weights before they are used; the file must stay as it is until then.

    Returns:
        "model", the tensors by parameter name, and what else the file holds.

    Raises:
        ValueError: a pickle, damaged, or of a format that is not understood.
    """
    if os.fspath(path).endswith((".pkl", ".pyth")):
        raise ValueError(f"{path}: pickled weights can run code and are not loaded; convert them to a .pth file")
    is_zip = zipfile.is_zipfile(path)  # files of torch before 1.6 are not
    mmap = mmap and is_zip
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(
            f"{path}: not a checkpoint that torch.load(weights_only=True) reads. {UNDERSTOOD_FORMATS}. ({error})"
        ) from error
    if is_zip and not mmap:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path}: the file is damaged: the checksum of {damaged} is wrong")
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise ValueError(f"{path}: expected a dict of parameters, got {kind}. {UNDERSTOOD_FORMATS}")
    key = next((key for key in ("model", "state_dict") if isinstance(checkpoint.get(key), Mapping)), None)
    weights = checkpoint if key is None else checkpoint[key]
    rest = {} if key is None else {name: value for name, value in checkpoint.items() if name != key}
    if not any(isinstance(value, Tensor) for value in weights.values()):
        keys = list(weights)[:5]
        raise ValueError(f"{path}: expected tensors by parameter name, got the keys {keys}. {UNDERSTOOD_FORMATS}")
    weights = dict(weights)
    if all(name.startswith("module.") for name in weights):  # of DistributedDataParallel or DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {**rest, "model": weights}


def read_description(path: str | os.PathLike) -> Description:
    """What a checkpoint says of itself; empty for files of other projects and of older versions.

    Raises:
        ConfigError, ValueError: as :func:`resolve_weights` and :func:`read_checkpoint`.
    """
    checkpoint = read_checkpoint(resolve_weights(os.fspath(path)), mmap=True)
    return Description(checkpoint.get("config", ""), tuple(checkpoint.get("class_names", ())))


def saved_config(config_file: str, weights: str, *, needed_by: str) -> str:
    """The config in the file ``weights``, or "" where ``config_file`` is given.

    Args:
        needed_by: how the user names the weights, for the message.

    Raises:
        ConfigError: there is neither.
    """
    if config_file:
        return ""
    if not weights:
        raise ConfigError(f"expected --config-file FILE, or a checkpoint that carries its config as {needed_by}")
    config = read_description(weights).config
    if not config:
        raise ConfigError(
            f"{weights}: the file does not carry the config of its training, as those of this project do since they "
            "describe themselves; give the config with --config-file FILE"
        )
    return config


class CheckpointMixin(Checkpointer):
    """Mixed into fvcore's ``Checkpointer`` or a subclass of it; the class that does so sets ``naming``.

    Saving is atomic. Loading runs no code from the file (``weights_only``), accepts the names of either engine, and
    refuses a file of which no parameter fits the model, or, if the model is in eval mode, not all of them. A training
    can only be resumed by the engine that wrote it.
    """

    naming: str
    description = Description()  # set by the training

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``; an interrupted save leaves the previous checkpoint as it was."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "engine": self.naming}
        if self.description.config:
            data.update(config=self.description.config, class_names=list(self.description.class_names))
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_file(path, durable=True) as file:
            torch.save(data, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, last_filename_basename.encode())

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().load(resolve_weights(path) if path else path, *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        resumes = resume and self.has_checkpoint()
        if resume and not resumes and self.checkpointables:
            self._refuse_to_start_again()
        extra = super().resume_or_load(path, resume=resume)
        # Weights convert between the engines, the state of an optimizer does not.
        if resumes and self.checkpointables and extra.get("engine", self.naming) != self.naming:
            raise ConfigError(
                f"--resume: {self.get_checkpoint_file()} was written by the {extra['engine']} engine; resume with "
                f"--engine {extra['engine']}, or start a new run from it with MODEL.WEIGHTS and another OUTPUT_DIR"
            )
        if resumes and self.checkpointables:
            for key, before, now in changed_keys(extra.get("config", ""), self.description.config):
                self.logger.warning(f"--resume: {key} was {before}, and is {now} from here on")
        return extra

    def _refuse_to_start_again(self) -> None:
        found = sorted(name for name in os.listdir(self.save_dir) if name.endswith(".pth"))
        if found:
            raise ConfigError(
                f"--resume: {self.save_dir} has checkpoints, the last is {found[-1]}, but no file last_checkpoint. It "
                "names the one to continue from: write it again, or start a new run in another OUTPUT_DIR"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        model = checkpoint["model"]
        convert_in_place(model, self.naming, self.model)
        expected = self.model.state_dict()
        if not model.keys() & expected.keys():
            missing = [name for name in expected if not _OPTIONAL.search(name)]
            raise ValueError(
                f"{filename}: none of its {len(model)} parameters (the first is {next(iter(model), None)!r}) belongs "
                f"to this model, which lacks all of its {len(missing)} ({', '.join(missing[:3])}, ...). "
                f"{UNDERSTOOD_FORMATS}"
            )
        refuse_partial_weights(model, self.model, file=filename)
        for name in model.keys() & expected.keys():
            if not model[name].isfinite().all():
                raise ValueError(f"{filename}: expected finite weights, got NaN or infinity in {name}")
        return checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Write a copy of a checkpoint's weights with the names and layout of one engine."""
    parser = argparse.ArgumentParser(prog="python -m group_sampling.checkpoint", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="checkpoint of either engine, or a torchvision ResNet")
    parser.add_argument("target", metavar="TARGET", help="file to write; optimizer state is not copied")
    parser.add_argument("--engine", choices=("detectron2", "torchvision"), required=True)
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    with exit_on_error("group_sampling.checkpoint", args):
        checkpoint = read_checkpoint(args.source)
        converted = {"model": convert_names(checkpoint["model"], args.engine), "engine": args.engine}
        converted.update({key: checkpoint[key] for key in Description._fields if key in checkpoint})
        with atomic_file(args.target) as file:
            torch.save(converted, file)


if __name__ == "__main__":
    main()
