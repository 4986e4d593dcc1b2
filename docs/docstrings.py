"""Docstrings in TRL's style to Markdown: sections become lists, and names in brackets become links."""

import re

import griffe


LISTS = ("Args", "Attributes", "Parameters", "Raises")
SECTIONS = (*LISTS, "Example", "Returns")
ITEM = re.compile(r"([\w*, ]+?)(?: \((.*?)\))?:(.*)")  # names (type): what is said of them
# Names that have a place in docs/api.md.
OWN = {
    "TreeRPOConfig": "treerpo_trl.TreeRPOConfig",
    "TreeRPOTrainer": "treerpo_trl.TreeRPOTrainer",
    "Tree": "treerpo_trl.Tree",
    "Node": "treerpo_trl.Node",
    "Segment": "treerpo_trl.tree.Segment",
    "ScoredTree": "treerpo_trl.credit.ScoredTree",
}
FOREIGN = {
    "trl.GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig",
    "trl.GRPOTrainer": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOTrainer",
    "transformers.TrainerCallback": "https://huggingface.co/docs/transformers/main_classes/callback",
}


def link(match: re.Match[str]) -> str:
    """[`~package.Name`] as a link to where Name is described, or as code where that is in no page."""
    path = match[1].removeprefix("~")
    name = path.rsplit(".", 1)[-1]
    if path in FOREIGN:
        return f"[`{name}`]({FOREIGN[path]})"
    return f"[`{name}`][{OWN[name]}]" if name in OWN else f"`{name}`"


def as_markdown(text: str) -> str:
    """A docstring whose sections are Markdown: what is listed in one becomes a list.

    Args:
        text: The docstring, without its indentation.
    """
    lines: list[str] = []
    section = names = ""
    for line in text.splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            section = line[:-1]
            lines += [f"**{section}**"] + [""] * (section not in LISTS)
        elif line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section not in LISTS or not line or line.startswith(8 * " "):
            lines.append(line[4:] if section else line)
        elif item := ITEM.fullmatch(names + line.strip()):
            shown = ", ".join(f"`{name.strip()}`" for name in item[1].split(","))
            lines += ["", f"- {shown}{f' ({item[2]})' if item[2] else ''}:{item[3]}"]  # or a list above would take it
            names = ""
        else:  # names that go on in the next line, or what is said of the last one
            names = f"{names}{line.strip()} " if line.endswith(",") else ""
            lines += [] if names else [line]
    return re.sub(r"\[`([^`\]]+)`\](?![\[(])", link, "\n".join(lines))


class TrlDocstrings(griffe.Extension):
    """Applies `as_markdown` to every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
