"""What `test_readme.py` runs in a process whose Hub is a local one: Python blocks, in order, in one namespace.

`python readme_run.py FILE`, with the blocks as a JSON list of [line, code]. It prints each line when its block begins.
The blocks are for a machine with a GPU and with time. All that is done for one without is that by default `use_cpu` is
true, and training ends after two steps.
"""

import json
import sys
from functools import partialmethod
from pathlib import Path

from treerpo_trl import TreeRPOConfig


if __name__ == "__main__":
    TreeRPOConfig.__init__ = partialmethod(TreeRPOConfig.__init__, use_cpu=True, max_steps=2)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in json.loads(Path(sys.argv[1]).read_text()):
        print(f"block of line {line}", flush=True)
        exec(compile("\n" * line + code, "README.md", "exec"), namespace)
    print("all blocks ran", flush=True)
