"""Dependencies point one way, and the core runs where neither Detectron2 nor torchvision's models can be imported."""

import ast
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import group_sampling

PACKAGE = Path(group_sampling.__file__).parent

# Lowest first. A module imports from its own layer or a lower one; docs/design.md says what each part is.
LAYERS = (
    {"version", "errors", "files", "timing", "distributed", "detections", "stop", "project"},
    {"boxes", "anchors", "scales", "ops", "config", "config_checks"},
    {"losses", "head", "samplers", "criterion", "roi_sampling", "inference", "monitor"},
    {"data"},
    {"pyramid", "evaluation", "checkpoint", "checkpointer", "env", "faces"},
    {"engines"},
    {"detector"},
    {"experiments"},
    {"__main__"},
)


def find_modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; of a folder that of its ``__init__.py``."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def find_imports(name: str, modules: dict[str, Path]) -> list[tuple[str, bool]]:
    """The package's modules that a module imports, anywhere in its source, and whether that is in a function."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            for target in targets(child):
                found.append((target, in_function))
            visit(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = modules[name].name == "__init__.py"
                package = ("group_sampling." + name).rstrip(".").split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *base.split(".")]).rstrip(".")
            # "from .data import records" imports the module, "from .boxes import paired_iou" a name of one.
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [full if full.removeprefix("group_sampling.") in modules else base for full in names]
        else:
            return []
        inside = [full for full in names if full == "group_sampling" or full.startswith("group_sampling.")]
        return [full.removeprefix("group_sampling").removeprefix(".") for full in inside]

    visit(ast.parse(modules[name].read_text()), False)
    return [(target, lazy) for target, lazy in found if target in modules]  # not the compiled extension


def layer_of(name: str) -> int | None:
    return next((index for index, parts in enumerate(LAYERS) if name.split(".")[0] in parts), None)


def find_violations(package: Path) -> list[str]:
    modules = find_modules(package)
    violations, edges = [], {}
    for name in modules:
        imports = find_imports(name, modules)
        edges[name] = {target for target, _ in imports if target} - {name}
        violations += [f"{name or 'group_sampling'} imports {t} in a function" for t, lazy in imports if lazy]
        if not name:  # the package itself
            continue
        if layer_of(name) is None:
            violations.append(f"{name} is in no layer")
            continue
        for target in sorted(edges[name]):
            if layer_of(target) is not None and layer_of(target) > layer_of(name):
                violations.append(f"{name} imports {target} of a higher layer")
    return violations + find_circles(edges)


def find_circles(edges: dict[str, set[str]]) -> list[str]:
    """Depth first; a folder stands for its ``__init__.py``, which runs before any module in it is imported."""
    finished, circles = set(), []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle = path[path.index(name) :]
            first = circle.index(min(circle))
            circle = circle[first:] + circle[:first]
            circles.append("circle: " + " -> ".join([*circle, circle[0]]))
        elif name not in finished:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
                folder = target.rpartition(".")[0]
                while folder and not name.startswith(f"{folder}.") and name != folder:
                    visit(folder, [*path, name])
                    folder = folder.rpartition(".")[0]
            finished.add(name)

    for name in edges:
        visit(name, [])
    return circles


def test_dependencies_point_one_way():
    assert find_violations(PACKAGE) == []


@pytest.mark.parametrize(
    "file, line, expected",
    [
        ("boxes.py", "from .engines.build import AnchorLayout", "boxes imports engines.build of a higher layer"),
        ("boxes.py", "import group_sampling.evaluation", "boxes imports evaluation of a higher layer"),
        ("data/records.py", "from .. import pyramid", "data.records imports pyramid of a higher layer"),
        ("data/records.py", "from . import catalog", "circle: data.c"),
        ("boxes.py", "def f():\n    from . import files", "boxes imports files in a function"),
        ("boxes.py", "def f():\n    import group_sampling.files", "boxes imports files in a function"),
        ("misc.py", "", "misc is in no layer"),
    ],
)
def test_planted_edges_are_found(tmp_path, file, line, expected):
    package = tmp_path / "group_sampling"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with open(package / file, "a") as source:
        source.write(f"\n{line}\n")
    assert any(violation.startswith(expected) for violation in find_violations(package))  # of which there is none


def test_imports_are_those_of_the_interpreter():
    """What is read from the source of one module is what importing it loads."""
    modules = find_modules(PACKAGE)
    closure, waiting = set(), ["checkpointer"]
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += [target for target, _ in find_imports(name, modules) if target]
    script = (
        "import sys, group_sampling.checkpointer; print(*[n for n in sys.modules if n.startswith('group_sampling.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    names = [name for name in done.stdout.split() if name.startswith("group_sampling.")]
    loaded = {name.removeprefix("group_sampling.") for name in names}
    assert closure <= loaded and loaded - closure <= {"version"}


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
