"""The source distribution and what is installed from it, used elsewhere; setup.py: tests/ops/test_op_builds.py."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import torch

from group_sampling.__main__ import COMMANDS, main
from group_sampling.config import ConfigError
from group_sampling.engines.tv.config import load_config
from group_sampling.project import CONFIGS, find_config

# An editable install of this repository finds modules that the installed package under test lacks.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import torch, group_sampling
from group_sampling.experiments.claims import paper_values
from group_sampling.ops import extension_status, match_anchors
assert paper_values()["table1"]["fpn"]["all"] == 82.1
box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
assert match_anchors(box, box).labels.tolist() == [1]
status = extension_status()
print(group_sampling.__file__, status.loaded, status.cuda, status.reason, sep="|")
"""


def run(*command, **options):
    """Without what this process was told about builds; fails with the output."""
    switches = ("PYTHONPATH", "GS_BUILD_EXT", "FORCE_CUDA", "GS_SANITIZE", "DEBUG")
    clean = {key: value for key, value in os.environ.items() if key not in switches}
    environment = {**clean, **options.pop("env", {})}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory):
    """Built from a copy, so that nothing is left in the repository; what is no part of it is no part of the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "results", "docs", "benchmarks")
    for name in ("csrc", "projects"):
        shutil.copytree(repository / name, folder / "copy" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "train_net.py"):
        shutil.copy(repository / name, folder / "copy")
    setup = "import setuptools.build_meta as backend; backend.build_sdist('..')"
    run(sys.executable, "-c", setup, cwd=folder / "copy", env={"GS_BUILD_EXT": "0"})
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture
def sources(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / sdist.name.removesuffix(".tar.gz")


def install(sources, **environment):
    """Install into a folder of its own; returns what was printed and the folder."""
    site = sources.parent / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--verbose")
    return run(*pip, "--target", site, sources, env=environment), site


def use(site, tmp_path):
    """Import the package from ``site`` in another folder; returns (file, loaded, cuda, reason)."""
    return (
        run(sys.executable, "-W", "ignore", "-c", USE, cwd=tmp_path, env={"PYTHONPATH": str(site)}).strip().split("|")
    )


@pytest.fixture
def no_compiler(tmp_path):
    """Environment in which neither $CXX nor g++ can be found."""
    return {"CXX": "no-such-compiler", "PATH": str(tmp_path)}


@pytest.mark.slow
def test_without_a_compiler_the_reference_runs(sources, no_compiler, tmp_path):
    printed, site = install(sources, **no_compiler)
    assert "installing pure Python" in printed
    file, loaded, _, reason = use(site, tmp_path)
    assert file.startswith(str(site)) and loaded == "False" and "not built" in reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_the_extension(sources, tmp_path):
    _, site = install(sources, FORCE_CUDA="0", GS_BUILD_EXT="1")
    _, loaded, cuda, reason = use(site, tmp_path)
    assert (loaded, cuda) == ("True", "False") and "without CUDA" in reason


def test_every_command_is_a_tool(repository, capsys, monkeypatch):
    """Of a checkout; the installed ones are run below."""
    tools = set((repository / "projects/GroupSampling/tools").glob("*.py"))
    assert {script for script, _ in COMMANDS.values()} == {*tools, repository / "train_net.py"}
    monkeypatch.setattr(sys, "argv", ["group-sampling"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"\n  {name} " in printed for name in COMMANDS) and "Find faces in images" in printed
    for name in ("convert", "evaluate-wider"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0 and COMMANDS[name][0].name in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "table5/grouped_fast_rcnn.yaml"
    assert load_config(name, ["MODEL.DEVICE", "cpu"]).MODEL.GROUP_SAMPLING.ROI_SAMPLER == "group"
    assert find_config(name) == str(CONFIGS / name) and find_config("") == "" and find_config("a.yaml") == "a.yaml"
    (tmp_path / "table5").mkdir()
    (tmp_path / name).write_text("{}")
    assert find_config(name) == name  # what is here comes first
    with pytest.raises(ConfigError, match="table5: no such file, here or among the project's configs"):
        load_config("table5")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_and_exports_outside_the_repository(repository, sdist, tmp_path):
    """`python -m build` makes the wheel from the sdist; it goes into an environment that has only our requirements."""
    pytest.importorskip("build")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    sources = tmp_path / sdist.name.removesuffix(".tar.gz")
    no_compiler = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "GS_BUILD_EXT": ""}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", sources, env=no_compiler)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and list((tmp_path / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("group_sampling/") for name in archive.namelist()}
    project = repository / "projects/GroupSampling"
    for folder, pattern in (("configs", "**/*.yaml"), ("tools", "*.py"), ("group_sampling", "**/*.py")):
        expected = {path.relative_to(project).as_posix() for path in (project / folder).glob(pattern)}
        assert {name.removeprefix("group_sampling/") for name in expected} <= names

    # torch and the others are those of this environment; a .pth file does not pass on its editable installs.
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    purelib = run(venv / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    with open(f"{purelib}/requirements.pth", "w") as file:
        file.write(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--no-index", "--no-deps")
    run(*pip, "--ignore-installed", wheel)
    command, work = venv / "bin/group-sampling", tmp_path / "work"
    work.mkdir()
    assert "reproduce" in run(command, cwd=work)
    small = ["MODEL.DEVICE", "cpu", "DATASETS.SYNTHETIC.NUM_TRAIN", "4", "DATASETS.SYNTHETIC.NUM_VAL", "2"]
    small += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "INPUT.CROP.SIZE", "[96, 96]"]
    config = "quick/demo_fpn_finest_sampling.yaml"
    run(command, "train", "--engine", "torchvision", "--config-file", config, "OUTPUT_DIR", "run", *small, cwd=work)
    assert "Not compared" not in (work / "run/report.html").read_text(), "the wheel's configs were not found"
    weights = work / "run/model_final.pth"
    content = torch.load(weights, weights_only=True)
    assert content["iteration"] == 1 and "DETECTIONS_PER_IMAGE" in content["config"]
    printed = run(command, "export", "--weights", weights, "--format", "torchscript", "--output", "face.pt", cwd=work)
    assert "compared with the detector" in printed and (work / "face.pt").exists()
    assert not (work / "output").exists()
