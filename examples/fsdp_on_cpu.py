"""Runs a script with FSDP2 on CPUs, to try it out where there is no GPU.

accelerate reserves FSDP for accelerators and would run DDP, silently. This lets it through, and runs the script:

    accelerate launch --config_file accelerate_configs/fsdp2_cpu.yaml examples/fsdp_on_cpu.py SCRIPT [ARGUMENTS]
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


_init = PartialState.__init__


def _init_as_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    """Once gloo and the device are set, call the processes those of accelerators; from there on, nothing differs."""
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    PartialState.__init__ = _init_as_accelerators
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the script had been launched itself
    runpy.run_path(sys.argv[0], run_name="__main__")
