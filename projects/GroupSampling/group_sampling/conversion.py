"""From the parameter names of one engine to the other's, and from those of torchvision's classifiers.

Both engines have the same parameters under different names.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

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
