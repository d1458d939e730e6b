"""The frame of every page that is written: one file, no network, no JavaScript; light and dark by the reader's own setting.

And how texts of others (names of folders, phrases, captions) get into Markdown, where HTML would act as it does in a page.
"""

from __future__ import annotations

import re
from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#667085;--line:#e2e5ea;--bar:#3b6fd4;
--red:#c62b45;--amber:#a86400;--green:#1d7f4e}
@media (prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1b2029;--ink:#e8ebf0;--soft:#98a2b3;--line:#2d3440;
--bar:#6f9df2;--red:#ff7a8e;--amber:#f0b04a;--green:#58c98d}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 80px}h1{margin:0;font-size:28px;overflow-wrap:anywhere}
h2{margin:40px 0 12px;font-size:20px}h3{margin:0 0 8px;font-size:17px;display:flex;flex-wrap:wrap;gap:10px;align-items:center}
.kind{margin:0;color:var(--soft);text-transform:uppercase;letter-spacing:.08em;font-size:12px}
.verdict{font-weight:600;margin:8px 0 20px}.bad{color:var(--red)}.mild{color:var(--amber)}.good{color:var(--green)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.figures div,section,.charts figure,table{background:var(--card);border:1px solid var(--line);border-radius:10px}
.figures div{padding:12px 16px}.figures b{display:block;font-size:24px}.figures span,.of,small{color:var(--soft)}
.notes{color:var(--soft);padding-left:20px;margin:16px 0}
table{border-spacing:0;width:100%;margin-top:20px;padding:8px 0}td{padding:5px 16px}td:first-child{width:1%}
.number{text-align:right;font-variant-numeric:tabular-nums;width:1%}a{color:inherit}
.badge{font-size:12px;font-weight:600;padding:1px 9px;border-radius:99px;border:1px solid;white-space:nowrap}
.badge.error{color:var(--red)}.badge.warning{color:var(--amber)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:12px}figure{margin:0}
.charts figure{padding:14px 16px}.charts figcaption{font-weight:600;margin-bottom:10px}svg{width:100%;display:block}
svg rect{fill:var(--bar)}svg .frame{fill:none;stroke:var(--line)}svg line{stroke:var(--line)}
svg text{fill:var(--soft);font-size:10px}
section{padding:18px 20px;margin:14px 0}section p{margin:8px 0}h3 .of{font-weight:400;font-size:14px;margin-left:auto}
.share{height:5px;border-radius:3px;background:var(--line);overflow:hidden}.share i{display:block;height:100%;background:var(--bar)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:14px;margin-top:14px}
.gallery img{width:100%;border-radius:6px;display:block;background:var(--line)}
.gallery figcaption{font-size:13px;margin-top:6px;overflow-wrap:anywhere}small{display:block}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:12px}
.wide table{border:0;margin:0;font-size:12.5px;white-space:nowrap}.wide th,.wide td{padding:4px 9px;text-align:right;width:auto}
.wide th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--line);position:sticky;top:0;background:var(--card)}
.wide td{font-variant-numeric:tabular-nums}.wide th:first-child,.wide td:first-child{text-align:left;width:auto;padding-left:14px}
.charts.one{grid-template-columns:1fr;margin-top:12px}
.none{height:80px;display:grid;place-items:center;border:1px dashed var(--line);border-radius:6px;color:var(--soft)}
"""


def document(body: str, *, kind: str, title: str, verdict: str = "", state: str = "", style: str = "") -> str:
    """A whole page.

    Args:
        body: HTML below the heading.
        kind: what the page is, e.g. "data check", above the title.
        title: plain text; it is escaped.
        verdict: one line of HTML below the title; state: "good", "mild" or "bad", its colour; "" = that of the text.
        style: more CSS, of this kind of page.
    """
    line = f'<p class="verdict {state}">{verdict}</p>' if verdict else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(kind)}: {escape(title)}</title><style>{STYLE}{style}</style></head><body><main>"
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>{line}</header>'
        f"{body}</main></body></html>\n"
    )


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
