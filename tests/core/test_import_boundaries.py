"""The core runs where neither Detectron2 nor torchvision's models can be imported."""

import pkgutil
import subprocess
import sys

import group_sampling


def test_core_imports_without_detectron2_and_torchvision_models():
    modules = [
        module.name
        for module in pkgutil.walk_packages(group_sampling.__path__, "group_sampling.")
        if not module.name.startswith(("group_sampling.engines.d2", "group_sampling.engines.tv"))
        and not module.name.endswith("._C")
    ]
    assert "group_sampling.criterion" in modules and "group_sampling.evaluation.wider_face.ap" in modules
    script = f"""
import importlib, sys
import torchvision.ops
loaded = {{name for name in sys.modules if name.startswith("torchvision.models")}}
for name in loaded:
    sys.modules[name] = None
sys.modules["detectron2"] = None
sys.modules["torchvision.models"] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
