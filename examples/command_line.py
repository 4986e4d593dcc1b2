"""Command lines of scripts: short usage, a help that begins with what matters, and what is missing told at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from treerpo_trl.checks.command_line import TreeRPOParser


class ScriptParser(TreeRPOParser):
    """
    A [`~trl.TrlParser`] whose help has sections, and which ends with usage where options are missing. Unknown options
    are told where they went.

    Args:
        dataclass_types: As upstream.
        usage (`str`): How the script is called; upstream's lists every option.
        description (`str`): What it does.
        sections (`dict[str, Iterable[str]]`): Title of a section of the help -> names of its options, in order. All
            others come last.
        needed (`dict[str, Sequence[str]]`): What has to be given, for people -> options of which one gives it.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        *,
        usage: str,
        description: str,
        sections: Mapping[str, Iterable[str]] | None = None,
        needed: Mapping[str, Sequence[str]],
    ):
        super().__init__(dataclass_types, usage=usage, description=description)
        self.sections = {title: list(names) for title, names in (sections or {}).items()}
        self.needed = needed

    def format_help(self) -> str:
        """The sections, then everything else."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        rest = {action.option_strings[0]: action for action in self._actions}
        sections = {}
        for title, names in self.sections.items():
            sections[title] = [action for name in names for action in rest.values() if action.dest == name]
            rest = {option: action for option, action in rest.items() if action.dest not in names}
        sections["other options" if sections else "options"] = list(rest.values())
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def parse_args_into_dataclasses(self, args: Sequence[str] | None = None, **options: Any) -> tuple[Any, ...]:
        """As upstream, if nothing is missing. Files given with `--config` have been read when this is called."""
        given, _ = self.parse_known_args(args)
        missing = [
            f"  {' or '.join(f'--{name}' for name in names)}: {what}"
            for what, names in self.needed.items()
            if not any(getattr(given, name) for name in names)
        ]
        if missing:
            self.error("\n".join(["these are missing:", *missing, "--help lists all options"]))
        return super().parse_args_into_dataclasses(args=args, **options)


def names_of(dataclass_type: type, own: bool = False) -> list[str]:
    """Names of a dataclass's options; its own are those that it adds or changes, in the order in which it does."""
    names = [field.name for field in fields(dataclass_type)]
    return [name for name in dataclass_type.__annotations__ if name in names] if own else names
