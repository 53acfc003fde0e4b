"""docs/design.md: the table from concept to file names every file of the package, and no other."""

import re
from pathlib import Path

import group_sampling

PACKAGE = Path(group_sampling.__file__).parent


def named_files(document: str) -> list[str]:
    """The paths in the second column of the table under "Where things are"."""
    section = document.split("## Where things are\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [path for row in rows for path in re.findall(r"`([\w/.]+)`", row[2])]


def test_every_file_is_named_once_and_exists(repository):
    document = (repository / "projects/GroupSampling/docs/design.md").read_text()
    files = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.stat().st_size]
    assert sorted(named_files(document)) == sorted(files)


def test_files_of_the_package_are_short(repository):
    sources = [*PACKAGE.rglob("*.py"), *(repository / "projects/GroupSampling/tools").glob("*.py")]
    sources += [*(repository / "projects/GroupSampling/benchmarks").glob("*.py"), *(repository / "csrc").rglob("*.*")]
    lengths = {str(path.relative_to(repository)): len(path.read_text().splitlines()) for path in sources}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
