"""Markup that cannot forget to escape: every string put into an element is escaped unless it is `Html` already.

The page shows what a model wrote and what a user configured; one missed escape would let a completion run as a script.
So nothing in this package writes `<` into a page but through `tag`, and `Html` is made nowhere else than here.
"""

from __future__ import annotations

from html import escape
from typing import Any

VOID = frozenset({"meta", "path", "line", "rect", "circle", "polyline", "br"})  # written without children


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """`value` as markup: itself where it is `Html`, its parts in order where it is a list or tuple, else escaped."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, (list, tuple)):
        return Html("".join(text(part) for part in value))
    return Html(escape(str(value), quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. Attribute `class_` is `class`, `data_x` is `data-x`; None leaves one out."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(_plain(value), quote=True)}"')
    if name in VOID and not children:
        return Html(f"<{name}{''.join(written)}/>")
    return Html(f"<{name}{''.join(written)}>{text(children)}</{name}>")


def raw(content: str) -> Html:
    """The package's own style sheet and script, read from its files; never anything that came with a run."""
    return Html(content)


def _plain(value: Any) -> str:
    """Numbers in attributes to a tenth of a pixel: half the bytes of a page are coordinates."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
