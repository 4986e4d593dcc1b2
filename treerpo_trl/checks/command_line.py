"""The parser of the command line and of YAML files, which says where unknown options went."""

from __future__ import annotations

import re
from typing import Any

from trl import TrlParser

from .moved_options import explain_unknown


class TreeRPOParser(TrlParser):
    """TRL's parser; its errors about unknown options say where they went, or which option is meant."""

    def parse_args_and_config(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream.

        Raises:
            ValueError: An option is unknown.
        """
        try:
            return super().parse_args_and_config(*args, **kwargs)
        except ValueError as error:
            unknown = re.findall(r"'--([\w-]+)", str(error))  # upstream lists them as they were given
            known = {action.dest for action in self._actions}
            hints = explain_unknown([name.replace("-", "_") for name in unknown], known)
            if not hints:
                raise
            raise ValueError(f"{error} {hints}") from error
