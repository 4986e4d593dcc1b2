"""What MkDocs does not do itself: links to files outside docs/, and the repository's address from pyproject.toml."""

import logging
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg")
logger = logging.getLogger("mkdocs.hooks.links")  # a warning here ends a strict build


def on_config(config: Any) -> Any:
    """The one place that names the repository is [project.urls]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.repo_url = project["urls"]["Repository"]
    config.site_url = project["urls"]["Documentation"]
    config.repo_name = project["name"]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Pictures that pages show and that stand elsewhere, such as those of results, are copied into the site."""
    for page in list(files.documentation_pages()):
        for path, _ in LINK.findall(page.content_string):
            if path.endswith(PICTURES) and not files.get_file_from_path(site_path(path)):
                source = (ROOT / "docs" / path).resolve()
                files.append(File.generated(config, site_path(path), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """`../path` becomes the address of that file in the repository, so that pages read well on GitHub and here."""

    def replace(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = (ROOT / "docs" / path).resolve()
        if not target.exists():
            logger.warning(f"{page.file.src_uri} links to {path}, which does not exist")
        elif anchor and anchor[1:] not in anchors(target):
            logger.warning(f"{page.file.src_uri} links to {path}{anchor}, and there is no such heading")
        if path.endswith(PICTURES):
            return f"]({site_path(path)})"
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT)}{anchor})"

    return LINK.sub(replace, markdown)


def site_path(path: str) -> str:
    """Where a picture from outside docs/ stands in the site."""
    return f"assets/{Path(path).name}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
