"""For mkdocs: the README as the first page, and files that pages link to as pages of their own."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".sh": "bash", ".sbatch": "bash"}


def place_of(file: str) -> str | None:
    """Where a file of the repository is in the site, by its path from the root."""
    if file == "README.md":
        return "index.md"
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return f"files/{file}" if file.endswith(".md") else f"files/{file}.md"


def links_of(file: str, text: str) -> dict[str, str]:
    """The links of a page to files of the repository, and these files by their paths."""
    found = {}
    for link, _ in LINK.findall(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link))
        if (ROOT / target).exists():
            found[link] = target
    return found


def rewritten(file: str, text: str) -> str:
    """A page with its links as they are in the site."""
    here, found = posixpath.dirname(str(place_of(file))), links_of(file, text)

    def new(match: re.Match[str]) -> str:
        target = found.get(match[1])
        if target is None:
            return match[0]
        return f"]({posixpath.relpath(str(place_of(target)), here or '.')}{match[2] or ''})"

    return LINK.sub(new, text)


def page_of(file: str) -> str:
    """A file that is no page of the docs, as one."""
    if (ROOT / file).is_dir():
        names = sorted(entry.name for entry in (ROOT / file).iterdir())
        return "\n".join([f"# {file}\n", *(f"- {name}" for name in names)]) + "\n"
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".md"):
        return rewritten(file, text)
    return f"# {file}\n\n````{LANGUAGES.get(Path(file).suffix, 'text')}\n{text}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, and what pages link to, and what that links to."""
    waiting = ["README.md", *(f"docs/{f.src_uri}" for f in files if f.src_uri.endswith(".md"))]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        if not file.startswith("docs/"):
            files.append(File.generated(config, str(place_of(file)), content=page_of(file)))
        if file.endswith(".md"):
            linked = links_of(file, (ROOT / file).read_text(encoding="utf-8")).values()
            waiting += [target for target in dict.fromkeys(linked) if target not in seen]
            seen.update(linked)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points a page's links at the pages of the site."""
    generated = page.file.generated_by is not None
    return markdown if generated else rewritten(f"docs/{page.file.src_uri}", markdown)
