"""The README as PyPI shows it: paths of the repository's files become addresses, which PyPI needs for pictures too."""

import re
from pathlib import Path


try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ModuleNotFoundError:  # where nothing is built, as in tests
    MetadataHookInterface = object


def with_addresses(text: str, repository: str) -> str:
    """Every relative link of a Markdown text as an address below `repository`, and every picture as its raw file."""

    def replace(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/main/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", replace, text)


class ReadmeHook(MetadataHookInterface):
    """Sets the package's long description."""

    def update(self, metadata: dict) -> None:
        """Called by hatchling with the table [project]."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_addresses(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
