"""Pages and Markdown reports from the files in `templates/`: each is one file, without network and JavaScript.

Every value in a template is escaped: in `*.html` as HTML, in `*.md` as one line of Markdown. Names of folders, phrases and
captions therefore stay texts.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Collection, Sequence
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image


def render(template: str, **values: Any) -> str:
    """A page from `templates/`; a name that ends in ".md" gives Markdown, any other HTML."""
    pages = _MARKDOWN if template.endswith(".md") else _HTML
    return pages.get_template(template).render(values)


def escape_markdown(text: object) -> str:
    """`text` in a line of Markdown, a heading or a cell of a table as it is: no HTML, no marks, no line breaks."""
    line = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)


def code_markdown(text: object) -> str:
    """`text` as a code span, in which nothing acts; fenced by more backticks than it holds in a row."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def number(value: float | None, form: str = ".3f") -> str:
    """A dash for what is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}"


def interval(ends: Sequence[float] | None, form: str = ".3f") -> Markup:
    """`[0.431, 0.562]`, or nothing."""
    return Markup("" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]")


def table_markdown(
    head: Sequence[str], rows: Sequence[Sequence[object]], text: Collection[str] = ("note", "what it is")
) -> Markup:
    """A table whose cells are escaped; aligned right but for the first column and those whose heads are in `text`."""
    lines = [[_as_markdown(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, [Markup("---:" if place and name not in text else "---") for place, name in enumerate(head)])
    return Markup("\n".join("| " + " | ".join(line) + " |" for line in lines))


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """The image for the `src` of an HTML page. `kind`: "PNG" or "JPEG"; options: of Pillow's writer."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _as_markdown(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape_markdown(value))


_HTML, _MARKDOWN = (
    Environment(
        loader=PackageLoader("mmdit_lora.visual"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for finalize in (None, _as_markdown)
)
_MARKDOWN.globals["table"] = table_markdown
for _pages in (_HTML, _MARKDOWN):
    _pages.filters |= {
        "number": number,
        "interval": interval,
        "thousands": "{:,}".format,
        "words": lambda name: name.replace("_", " "),
        "code": lambda text: Markup(code_markdown(text)),
    }
