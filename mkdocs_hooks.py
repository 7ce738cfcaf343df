"""What `make docs` does to pages in two languages: on GitHub files beside each other, on the site two trees."""

import posixpath
import re
from pathlib import Path
from typing import Any

from pymdownx import slugs

LANGUAGE = ".zh-CN"
_HEADING = re.compile(r"^##+ (.+)$", re.M)
_slug = slugs.slugify(case="lower")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads a page's link to its twin over to the other tree, and gives a Chinese page the English one's anchors."""
    source = Path(page.file.abs_src_path)
    name = source.name.replace(f"{LANGUAGE}.md", ".md")
    if LANGUAGE not in source.name:
        return markdown.replace(f"]({source.stem}{LANGUAGE}.md)", f"]({_over(page, LANGUAGE[1:])})")
    english = [_anchor(title) for title in _HEADING.findall(_prose(source.with_name(name).read_text("utf-8")))]
    titles = iter(_HEADING.findall(_prose(markdown)))
    for anchor, title in zip(english, titles, strict=True):
        if anchor != _anchor(title):
            heading = re.compile(f"^(##+ {re.escape(title)})$", re.M)
            markdown = heading.sub(f'<div id="{anchor}"></div>\n\n\\1', markdown, count=1)
    return markdown.replace(f"]({name})", f"]({_over(page, '')})")


def _over(page: Any, tree: str) -> str:
    """The URL of `page` in the other tree, seen from it."""
    here = posixpath.join("/", page.file.url)
    return posixpath.relpath(posixpath.join("/", tree, here.removeprefix(f"/{LANGUAGE[1:]}").lstrip("/")), here) + "/"


def _prose(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)


def _anchor(title: str) -> str:
    return str(_slug(title.replace("`", ""), "-"))
