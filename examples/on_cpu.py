"""Runs a script with several processes on CPUs, under any engine, to try out what is meant for many GPUs.

accelerate leaves every process by itself where it finds no accelerator, and reserves FSDP for those. This connects the
processes over gloo, lets FSDP through, and runs the script as it is:

    accelerate launch --config_file accelerate_configs/fsdp2_cpu.yaml examples/on_cpu.py SCRIPT [ARGUMENTS]
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


_init = PartialState.__init__
# Torch may hang or abort while DDP over gloo is freed last of all, so processes keep their group and leave at once.
_groups: list[Any] = []


def _init_on_cpu(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    _init(self, cpu=True, **kwargs)
    if torch.distributed.is_initialized():
        _groups.append(torch.distributed.group.WORLD)
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if uses_fsdp and self.distributed_type == DistributedType.MULTI_CPU:
        # Once gloo and the device are set, nothing but this name keeps accelerate from FSDP.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    PartialState.__init__ = _init_on_cpu
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the script had been launched itself
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
