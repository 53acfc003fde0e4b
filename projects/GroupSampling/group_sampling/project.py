"""Where the project's configs, tools and training script are: around the package in a checkout, else inside it."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IS_CHECKOUT = not (_PACKAGE / "tools").is_dir()  # setup.py puts them there

TOOLS = _PACKAGE.parent / "tools" if _IS_CHECKOUT else _PACKAGE / "tools"
CONFIGS = TOOLS.with_name("configs")
ROOT = _PACKAGE.parents[2] if _IS_CHECKOUT else Path.cwd()  # relative paths of the tools' own runs start here
TRAIN_NET = (ROOT if _IS_CHECKOUT else TOOLS) / "train_net.py"


def find_config(name: str) -> str:
    """The path of a config: ``name`` itself if there is such a file or it is empty, else the project's of this name.

    Args:
        name: a path, or one below the project's configs, such as "table5/grouped_fast_rcnn.yaml".
    """
    own = CONFIGS / name
    return str(own) if name and not Path(name).is_file() and own.is_file() else name
