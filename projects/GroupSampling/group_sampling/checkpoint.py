"""Files of weights that either engine reads.

Both engines have the same parameters under different names. A checkpoint of one engine, of the other, or a plain
torchvision classifier is recognized by its names and converted while it is loaded, or by
``python -m group_sampling.checkpoint``.
"""

import argparse
import difflib
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import ConfigError
from .errors import UserError, add_debug_flag, exit_on_error
from .files import atomic_file, open_regular

# `torchvision://resnet50` are torchvision's ImageNet weights IMAGENET1K_V1: the recipe of the paper's time.
TORCHVISION_PREFIX = "torchvision://"

# (Detectron2's name, torchvision's name); {s} stands for a number, {s-1} for that number minus one. Detectron2's ResNet
# is the backbone itself, or its "bottom_up" under an FPN. "extractor" is another network of torchvision, whose names
# below are torchvision's on both engines.
_NAMES = (
    ("backbone.extractor.", "backbone.body.extractor."),
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
_BOTTOM_UP = re.compile(r"backbone\.(stem|res\d|extractor)\.")
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
        if naming == "detectron2" and has_fpn and _BOTTOM_UP.match(name):
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


def is_optional(name: str) -> bool:
    """Whether a detector does without this entry of its state."""
    return bool(_OPTIONAL.search(name))


def convert_in_place(state_dict: dict[str, Tensor], naming: str, model: nn.Module) -> None:
    """:func:`convert_names` for ``model``, whose names are those of ``naming``."""
    expected = model.state_dict()
    weights = _below_extractor(state_dict, expected)
    has_fpn = any(name.startswith(_FPN_NAMES) for name in expected)
    converted = convert_names(weights, naming, has_fpn=has_fpn)
    state_dict.clear()
    state_dict.update(converted)


def _below_extractor(state_dict: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a torchvision classifier under the names that a model with its ``extractor`` has for them."""
    body = next((name.partition("extractor.")[0] for name in expected if "extractor." in name), None)
    if body is None or any(name.startswith("backbone.") for name in state_dict):
        return state_dict
    # The files of torchvision's DenseNets are older than the names of their layers.
    names = {name: re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name) for name in state_dict}
    classifier = {f"{body}extractor.{names[name]}": value for name, value in state_dict.items()}
    found = {name: value for name, value in classifier.items() if name in expected}
    return found or state_dict


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
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items() if name.startswith(prefix)}
    differences = {
        "missing": expected.keys() - found.keys(),
        "of another shape": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
        "unknown": found.keys() - expected.keys(),
    }
    wrong = {what: sorted(name for name in names if not is_optional(name)) for what, names in differences.items()}
    counts = [f"{len(names)} are {what} ({names[0]}, ...)" for what, names in wrong.items() if names]
    if counts:
        raise ConfigError(
            f"{file}: expected the weights of this model, got others: of {len(expected)}, {'; '.join(counts)}. "
            "Evaluate with the config of their training; --allow-partial-weights of train_net.py, or a model in "
            "training mode, loads those that fit"
        )


def _weights_url(path: str, name: str) -> str:
    """Where torchvision has the weights of a classifier; their hash is part of the address."""
    import torchvision.models  # as late as this: only the engines' models need it otherwise

    names = torchvision.models.list_models(module=torchvision.models)
    weights = torchvision.models.get_model_weights(name).__members__ if name in names else {}
    if "IMAGENET1K_V1" not in weights:
        close = difflib.get_close_matches(name, names) or ["resnet50"]
        raise ConfigError(
            f"MODEL.WEIGHTS is {path!r}: expected {TORCHVISION_PREFIX} followed by a classifier of torchvision.models "
            f"that has weights IMAGENET1K_V1, such as {' or '.join(close)}"
        )
    return weights["IMAGENET1K_V1"].url


def resolve_weights(path: str) -> str:
    """Turn ``MODEL.WEIGHTS`` into a local file; ``torchvision://resnet50`` is downloaded (and checked) by torch.hub.

    Raises:
        ConfigError: unknown name after ``torchvision://``, the file does not exist, or the download failed.
    """
    if path.startswith(TORCHVISION_PREFIX):
        name = path[len(TORCHVISION_PREFIX) :]
        url = _weights_url(path, name)
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


class CheckpointError(UserError, ValueError):
    """A file of weights cannot be used; the message names it."""


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
        CheckpointError: a pickle, damaged, or of a format that is not understood.
    """
    if os.fspath(path).endswith((".pkl", ".pyth")):
        raise CheckpointError(
            f"{path}: pickled weights can run code and are not loaded. Where you trust the file, convert it: python -c "
            f"\"import pickle, torch; w = pickle.load(open('{path}', 'rb'), encoding='latin1'); "
            f"torch.save({{k: torch.as_tensor(v) for k, v in w.get('model', w).items()}}, 'weights.pth')\""
        )
    with open_regular(path):  # torch would wait for a FIFO
        pass
    is_zip = zipfile.is_zipfile(path)  # files of torch before 1.6 are not
    mmap = mmap and is_zip
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a checkpoint that torch.load(weights_only=True) reads. {UNDERSTOOD_FORMATS}. ({error})"
        ) from error
    if is_zip and not mmap:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: the file is damaged: the checksum of {damaged} is wrong")
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise CheckpointError(f"{path}: expected a dict of parameters, got {kind}. {UNDERSTOOD_FORMATS}")
    key = next((key for key in ("model", "state_dict") if isinstance(checkpoint.get(key), Mapping)), None)
    weights = checkpoint if key is None else checkpoint[key]
    rest = {} if key is None else {name: value for name, value in checkpoint.items() if name != key}
    names_are_text = all(isinstance(name, str) for name in (*weights, *rest))
    if not names_are_text or not any(isinstance(value, Tensor) for value in weights.values()):
        keys = list(weights)[:5]
        raise CheckpointError(f"{path}: expected tensors by parameter name, got the keys {keys}. {UNDERSTOOD_FORMATS}")
    config, names = rest.get("config", ""), rest.get("class_names", [])
    if not isinstance(config, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f'{path}: expected text as its "config" and a list of texts as its "class_names", got '
            f"{type(config).__name__} and {names!r:.80}"
        )
    weights = dict(weights)
    if all(name.startswith("module.") for name in weights):  # of DistributedDataParallel or DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {**rest, "model": weights}


def read_description(path: str | os.PathLike) -> Description:
    """What a checkpoint says of itself; empty for files of other projects and of older versions.

    Raises:
        ConfigError, CheckpointError: as :func:`resolve_weights` and :func:`read_checkpoint`.
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
