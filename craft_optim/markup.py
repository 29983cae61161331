"""HTML of this package's pages: elements, tables, and a page around them that loads nothing.

Styles and scripts are in the page, pictures are data URIs, and it forbids itself everything else: a script runs only if
its hash is in the page's own policy, so that nothing in a name or a prompt can become one.
"""

import base64
import hashlib
import html
from collections.abc import Sequence

__all__ = ["Markup", "page", "table", "tag"]

_VOID = ("img", "input", "meta")


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Of the element.
        children: Text is escaped, `Markup` is not.
        attributes: An underscore at the end is dropped (`class_`), others become hyphens. None: without the attribute.

    Example:
        >>> tag("p", "a < b", tag("b", "!"), class_="quiet")
        '<p class="quiet">a &lt; b<b>!</b></p>'
    """
    inner = "".join(x if isinstance(x, Markup) else html.escape(x) for x in children)
    named = {
        key.rstrip("_").replace("_", "-"): html.escape(str(value))
        for key, value in attributes.items()
        if value is not None
    }
    words = "".join(f' {key}="{value}"' for key, value in named.items())
    return Markup(f"<{name}{words}>" if name in _VOID else f"<{name}{words}>{inner}</{name}>")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table in a box that scrolls sideways where it is too wide."""
    head = tag("tr", *(tag("th", column) for column in columns))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0)


def page(title: str, sections: Sequence[str], style: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole page, light or dark as the reader's system is.

    Args:
        title: Of the window.
        sections: What is on it.
        style: CSS beyond that of all pages.
        scripts: JavaScript to run when everything else is there; no text of users may be in it.
    """
    allowed = "".join(f" '{_hash(script)}'" for script in scripts)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'" + (
        f"; script-src{allowed}" if scripts else ""
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE + style)),
    ]
    body = [tag("main", *sections), *(tag("script", Markup(script)) for script in scripts)]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #60646c; --line: #e2e4e8; --page: #f6f7f9; --card: #fff;
  --accent: #2f6fde; --good: #1f8a4c; --bad: #c2571b; --wash: #eef3fc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --quiet: #9aa0a8; --line: #33373e; --page: #16181b;
  --card: #1e2125; --accent: #7aa7f5; --good: #55c481; --bad: #f0935a; --wash: #26303f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; } h3 { font-size: 15px; margin: 0; }
h4 { font-size: 12px; font-weight: 600; color: var(--quiet); margin: 12px 0 4px; }
.kind { margin: 0 0 4px; color: var(--quiet); letter-spacing: .06em; text-transform: uppercase; font-size: 12px; }
.quiet { color: var(--quiet); margin: 0 0 12px; }
.verdict { margin: 0 0 16px; padding: 12px 16px; border-left: 4px solid var(--bad); background: var(--card);
  border-radius: 4px; } .verdict.fits { border-color: var(--good); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 20px; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 12px; }
th, td { padding: 6px 16px 6px 0; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: 16px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
article > header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; margin-bottom: 10px; }
figure { margin: 0; min-width: 0; } figcaption { color: var(--quiet); font-size: 12px; overflow-wrap: anywhere; }
"""
