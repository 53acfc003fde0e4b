"""Names convert both ways, saving is atomic, loading runs no code."""

import os
import pickle
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torchvision.models import resnet18, resnet50

from group_sampling.checkpoint import (
    CheckpointError,
    Description,
    convert_names,
    main,
    read_checkpoint,
    read_description,
    resolve_weights,
    saved_config,
)
from group_sampling.checkpointer import CheckpointMixin
from group_sampling.config import ConfigError

PAIRS = {  # Detectron2's name: torchvision's name
    "backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.weight",
    "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
    "backbone.bottom_up.res2.0.conv1.weight": "backbone.body.layer1.0.conv1.weight",
    "backbone.bottom_up.res4.22.conv3.norm.bias": "backbone.body.layer3.22.bn3.bias",
    "backbone.bottom_up.res5.0.shortcut.weight": "backbone.body.layer4.0.downsample.0.weight",
    "backbone.bottom_up.res5.0.shortcut.norm.weight": "backbone.body.layer4.0.downsample.1.weight",
    "backbone.fpn_lateral5.bias": "backbone.fpn.inner_blocks.3.0.bias",
    "backbone.fpn_lateral3.norm.weight": "backbone.fpn.inner_blocks.1.1.weight",
    "backbone.fpn_output2.weight": "backbone.fpn.layer_blocks.0.0.weight",
    "proposal_generator.rpn_head.cls_logits.weight": "rpn.head.cls_logits.weight",
    "something.else": "something.else",
}


def test_names_convert_both_ways():
    assert list(convert_names(dict.fromkeys(PAIRS, 0), "torchvision")) == list(PAIRS.values())
    assert list(convert_names(dict.fromkeys(PAIRS.values(), 0), "detectron2")) == list(PAIRS)
    assert list(convert_names(dict.fromkeys(PAIRS, 0), "detectron2")) == list(PAIRS)


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_torchvision_classifier(make):
    names = make().state_dict()
    converted = convert_names(names, "torchvision")
    assert set(converted) == {f"backbone.body.{name}" for name in names if not name.startswith("fc.")}
    back = convert_names(convert_names(names, "detectron2"), "torchvision")
    assert set(back) == set(converted)


class _Checkpointer(CheckpointMixin, Checkpointer):
    naming = "torchvision"


def test_save_and_load(tmp_path):
    model = nn.Linear(3, 2)
    _Checkpointer(model, str(tmp_path)).save("model_0001", iteration=7)
    other = nn.Linear(3, 2)
    extra = _Checkpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert torch.equal(model.weight, other.weight) and extra["iteration"] == 7
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0001.pth"]


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpointer = _Checkpointer(nn.Linear(3, 2), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def fail(data, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]


class _Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.pyth"])
def test_hostile_checkpoints_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        if name.endswith(".pth"):
            torch.save({"model": _Payload()}, file)
        else:
            pickle.dump({"model": _Payload()}, file)
    with pytest.raises(ValueError, match=name):
        _Checkpointer(nn.Linear(1, 1)).load(name)
    assert not os.path.exists("executed")


def test_foreign_checkpoint_is_refused(tmp_path):
    path = str(tmp_path / "other.pth")
    torch.save({"encoder.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"other\.pth: none of its 1 parameters .*encoder\.weight"):
        _Checkpointer(nn.Linear(1, 1)).load(path)


def test_missing_weights_name_the_key(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is 'nowhere\.pth'"):
        resolve_weights("nowhere.pth")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS.*resnet50"):
        resolve_weights("torchvision://resnet7")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS.*no route to host.*local copy"):
        resolve_weights("torchvision://resnet50")


def test_downloaded_weights_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert resolve_weights("torchvision://resnet18") == str(file)


class _OtherEngine(CheckpointMixin, Checkpointer):
    naming = "detectron2"


def test_a_training_resumes_with_the_engine_that_wrote_it(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    _Checkpointer(nn.Linear(3, 2), str(tmp_path), optimizer=optimizer).save("model")
    with pytest.raises(ConfigError, match=r"--resume: .*model\.pth was written by the torchvision engine"):
        _OtherEngine(nn.Linear(3, 2), str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)
    _OtherEngine(nn.Linear(3, 2), str(tmp_path)).resume_or_load("", resume=True)  # to evaluate, weights are enough


def test_formats_of_others_are_understood(tmp_path):
    expected = nn.Linear(3, 2)
    weights = expected.state_dict()
    parallel = {f"module.{name}": value for name, value in weights.items()}
    for checkpoint in (weights, parallel, {"state_dict": parallel, "epoch": 3}, {"model": parallel}):
        torch.save(checkpoint, tmp_path / "model.pth")
        model = nn.Linear(3, 2)
        _Checkpointer(model).load(str(tmp_path / "model.pth"))
        assert torch.equal(model.weight, expected.weight) and torch.equal(model.bias, expected.bias)


@pytest.mark.parametrize(
    "content, expected",
    [
        ([torch.zeros(2)], "expected a dict of parameters, got list"),
        ({"epoch": 3}, r"expected tensors by parameter name, got the keys \['epoch'\]"),
        ({"encoder.weight": torch.zeros(2)}, r"lacks all of its 2 \(weight, bias, ...\)"),
    ],
)
def test_other_contents_are_refused_with_what_is_understood(tmp_path, content, expected):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf'{expected}.*"state_dict".*"module\."'):
        _Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "other.pth"))


def test_checkpoints_describe_themselves_and_keep_it_when_converted(tmp_path):
    checkpointer = _Checkpointer(nn.Linear(3, 2), str(tmp_path))
    checkpointer.save("plain")
    assert read_description(tmp_path / "plain.pth") == Description()
    with pytest.raises(ConfigError, match=r"plain\.pth: the file does not carry the config.*--config-file"):
        saved_config("", str(tmp_path / "plain.pth"), needed_by="--weights")
    assert saved_config("some.yaml", str(tmp_path / "plain.pth"), needed_by="--weights") == ""
    with pytest.raises(ConfigError, match="expected --config-file FILE, or a checkpoint .* as --weights"):
        saved_config("", "", needed_by="--weights")

    checkpointer.description = Description("SEED: 3\n", ("face", "head"))
    checkpointer.save("described")
    main([str(tmp_path / "described.pth"), str(tmp_path / "converted.pth"), "--engine", "detectron2"])
    for name in ("described", "converted"):
        assert read_description(tmp_path / f"{name}.pth") == checkpointer.description
    assert saved_config("", str(tmp_path / "converted.pth"), needed_by="--weights") == "SEED: 3\n"


# -- what to resume from ----------------------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def resume(folder):
    model = nn.Linear(3, 2)
    return _Checkpointer(model, str(folder), optimizer=sgd(model)).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda saved: saved.pop("iteration"),
            r"expected the state of a training, got no 'iteration'; start a new run",
        ),
        (lambda saved: saved.pop("optimizer"), r"expected the state of a training, got no 'optimizer'"),
        (lambda saved: saved.update(iteration="7"), r"expected the state of a training, got the iteration '7'"),
        (lambda saved: saved.update(optimizer="x"), r"the state of its training cannot be used: AttributeError"),
        (lambda saved: saved.update(optimizer={}), r"the state of its training cannot be used: KeyError"),
        (
            lambda saved: saved.update(optimizer={"state": {}, "param_groups": []}),
            r"the state of its training cannot be used: ValueError: loaded state dict has a different number",
        ),
        (
            lambda saved: saved.update(config=3),
            r'expected text as its "config" and a list of texts as its "class_names"',
        ),
        (lambda saved: saved.update(class_names=3), r'and a list of texts as its "class_names", got str and 3'),
        (lambda saved: saved.update({5: 3}), r"expected tensors by parameter name, got the keys \['weight', 'bias'\]"),
        (lambda saved: saved.update(model={"weight": None, "bias": torch.zeros(2)}), r"expected weight to be a tensor"),
        (lambda saved: saved.update(model="x"), r"expected tensors by parameter name, got the keys \['model'"),
    ],
)
def test_the_state_of_a_training_is_whole(tmp_path, change, message):
    """None of these may be answered with a traceback, or by starting over in silence."""
    model = nn.Linear(3, 2)
    _Checkpointer(model, str(tmp_path), optimizer=sgd(model)).save("model_0001", iteration=7)
    assert resume(tmp_path)["iteration"] == 7
    saved = torch.load(tmp_path / "model_0001.pth")
    change(saved)
    torch.save(saved, tmp_path / "model_0001.pth")
    with pytest.raises(CheckpointError, match=rf"model_0001\.pth: .*{message}"):
        resume(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"nowhere.pth", b"../model_0001.pth", b"x" * 9000, None])
def test_last_checkpoint_names_a_file_beside_it(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    model = nn.Linear(3, 2)
    _Checkpointer(model, str(tmp_path), optimizer=sgd(model)).save("model_0001", iteration=7)
    if content is None:
        (folder / "last_checkpoint").mkdir()
    else:
        (folder / "last_checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError, match="^--resume: .*last_checkpoint: expected the name of a checkpoint"):
        resume(folder)


def test_the_nearest_name_of_other_weights(tmp_path):
    torch.save({"state_dict": {"net.layer.weights": torch.zeros(2)}}, tmp_path / "other.pth")
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    message = (
        r"other\.pth: none of its 1 parameters \(the first is .net\.layer\.weights., nearest to .layer\.weight.\) "
        r"belongs to this model, which lacks all of its 4 \(layer\.weight, layer\.bias, head\.weight, \.\.\.\)\. "
        "Understood are"
    )
    with pytest.raises(CheckpointError, match=message):
        _Checkpointer(model).load(str(tmp_path / "other.pth"))


def test_a_pickle_says_how_to_convert_it(tmp_path):
    """The command in the message works."""
    values = {"weight": np.full((2, 3), 0.5, dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({"model": values, "__author__": "x"}))
    with pytest.raises(CheckpointError) as error:
        _Checkpointer(nn.Linear(3, 2)).load(str(tmp_path / "R.pkl"))
    command = str(error.value).partition("convert it: python -c ")[2]
    subprocess.run([sys.executable, "-c", shlex.split(command)[0]], check=True, cwd=tmp_path, timeout=120)
    model = nn.Linear(3, 2)
    _Checkpointer(model).load(str(tmp_path / "weights.pth"))
    assert model.weight.eq(0.5).all()


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
        read_checkpoint(tmp_path / "a.pth")
