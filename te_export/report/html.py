"""report.html: report.md's figures and a heat map of the routing, as one page for a browser.

Self-contained: no script, and nothing that is fetched. No paths, and no times but latency that was asked for: the same
bundle gives the same page.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from te_export.options import FailedVariant, TaskPruning
from te_export.report.heat_colours import HEAT_STEPS
from te_export.report.html_page import make_page
from te_export.rewrite.log import RewriteLog
from te_runtime.manifest import Manifest

__all__ = ["HTML_REPORT_NAME", "render_html", "visible"]

HTML_REPORT_NAME = "report.html"
_LONGEST = 2000


def render_html(
    manifest: Manifest,
    notes: Sequence[str],
    rewrites: RewriteLog,
    pruning: Sequence[TaskPruning] = (),
    *,
    left_out: Sequence[FailedVariant] = (),
) -> str:
    """The whole report as one HTML page. Every name, value and note is escaped, whatever it holds.

    Args:
        left_out: the variants that were asked for and are not in the bundle.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else visible(str(value))

    environment = Environment(
        autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("te_export").joinpath("report", "report.html.jinja").read_text(encoding="utf-8")
    page = make_page(manifest, notes, rewrites, pruning, left_out=left_out)
    return environment.from_string(source).render(page=page, heat_steps=HEAT_STEPS)


def visible(text: str) -> str:
    r"""`text` in which nothing is hidden: what cannot be printed, such as characters of control or such as turn the
    direction of writing, stands as its escape (`\x1b`, `\u202e`), and what is very long is cut.
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return " " if char == "\n" else char.encode("unicode_escape").decode("ascii")
