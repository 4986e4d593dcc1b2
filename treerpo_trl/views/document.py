"""Self-contained HTML documents: templates filled in, styles and scripts inlined, and nothing else allowed to run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any


# A 16 x 16 picture of a tree, so that no browser asks a server for one.
ICON = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAgMAAABinRfyAAAADFBMVEUAAACIiIjgeyovf9ZwjDk4AAAAAXRSTlMAQObYZgAAAB9J"
    "REFUeNpjYACBUCBAJ8Bg1Yr//9EJKPizCpNgYAAAxhUZKauX6agAAAAASUVORK5CYII="
)
SLOT = re.compile(r"\{\{(\w+)\}\}")


def render_document(template: str, styles: Sequence[str], scripts: Sequence[str], slots: Mapping[str, str]) -> str:
    """One HTML file that needs no other.

    A content security policy lets only the styles and scripts of this package run, by their hashes, lets the page
    reach nothing, and keeps scripts from making markup out of text.

    Args:
        template: Name of the file among the assets that holds the body; `{{name}}` stands for what fills it.
        styles, scripts: Names of files among the assets, put together in this order. `theme.js` comes by itself.
        slots: HTML for each further slot of the body and of `head.html` (`name` and `title`), escaped where it comes
            from data.
    """
    style = "".join(map(read_asset, styles))
    theme = read_asset("theme.js")
    script = '"use strict";\n(() => {\n' + "".join(map(read_asset, scripts)) + "})();\n" if scripts else ""
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(theme)}" + (f" {_hash(script)}" if script else ""),
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    filled = {"policy": policy, "icon": ICON, "style": style, "theme": theme, "script": script, **slots}
    # In one pass, so that what fills a slot is never searched for slots.
    return SLOT.sub(lambda match: filled[match[1]], read_asset("head.html") + read_asset(template))


def read_asset(name: str) -> str:
    """A file of the package's assets."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    r"""JSON that may stand in a script element: no text in it can end the element or open a comment.

    >>> script_json("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
