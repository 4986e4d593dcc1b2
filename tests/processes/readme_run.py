"""What `test_readme.py` runs in a process whose Hub is a local one: Python blocks, in order, in one namespace.

`python readme_run.py FILE`, with the blocks as a JSON list of [line, code]. It prints each line when its block begins.
The blocks are for a machine with a GPU and with time. All that is done for one without is that by default `use_cpu` is
true, training ends after two steps at most, and completions after 64 tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

from treerpo_trl import TreeRPOConfig


MOST_STEPS = 2
MOST_TOKENS = 64
init = TreeRPOConfig.__init__


def init_for_cpu(self: TreeRPOConfig, *args: Any, max_steps: int = MOST_STEPS, **options: Any) -> None:
    """That of the configuration, with what a machine without a GPU and time needs."""
    if "max_completion_length" in options:
        options["max_completion_length"] = min(options["max_completion_length"], MOST_TOKENS)
    init(self, *args, **{"use_cpu": True, "max_steps": min(max_steps, MOST_STEPS), **options})


if __name__ == "__main__":
    TreeRPOConfig.__init__ = init_for_cpu
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in json.loads(Path(sys.argv[1]).read_text()):
        print(f"block of line {line}", flush=True)
        exec(compile("\n" * line + code, "README.md", "exec"), namespace)
    print("all blocks ran", flush=True)
