"""An HTML page of tables and pictures that opens from disk, without scripts, and fits a phone."""

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..files import write_atomically

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere; }
h2 { margin-top: 2em; } img { max-width: 100%; } figure { margin: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ccc; vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: break-word; }
.text td, .text th { text-align: left; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 1em; }
.gallery img { width: 100%; max-width: 240px; } figcaption { font-size: 13px; line-height: 1.3; }
@media (max-width: 600px) { body { margin: 1em auto; } th, td { padding: .3em; font-size: 14px; } }
"""


class Strong(str):
    """Text in bold."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: plain text.
        body: HTML, of the functions below.
    """

    title: str
    body: str


def paragraph(text: str) -> str:
    return f"<p>{_inline(text)}</p>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    """Cells are plain text, or :class:`Strong`.

    Args:
        is_text: cells are read from the left rather than compared.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    kind = ' class="text"' if is_text else ""
    lines = line(head, "th") + "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table{kind}>\n{lines}</table></div>\n'


def picture(file: str, text: str) -> str:
    """A picture that opens in its own size.

    Args:
        file: relative to the page.
        text: what it shows.
    """
    address = html.escape(quote(file))
    return f'<a href="{address}"><img src="{address}" alt="{html.escape(text)}"></a>\n'


def gallery(pictures: Iterable[tuple[str, str]]) -> str:
    """Thumbnails: file, relative to the page, and caption of each."""
    figures = (
        f"<figure>{picture(file, caption)}<figcaption>{_inline(caption)}</figcaption></figure>\n"
        for file, caption in pictures
    )
    return f'<div class="gallery">\n{"".join(figures)}</div>\n'


def relative(file: str | os.PathLike, folder: str | os.PathLike) -> str:
    """The path of ``file`` for a page in ``folder``."""
    return Path(os.path.relpath(file, folder)).as_posix()


def write_page(path: Path, title: str, notes: Sequence[str], sections: Iterable[Section]) -> None:
    """Write the page, atomically.

    Args:
        notes: paragraphs under the title, plain text.
    """
    parts = "".join(f"<h2>{_inline(section.title)}</h2>\n{section.body}" for section in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{"".join(map(paragraph, notes))}{parts}</body>
</html>
"""
    write_atomically(path, page.encode())


def _inline(text: str) -> str:
    return f"<b>{html.escape(text)}</b>" if isinstance(text, Strong) else html.escape(text)
