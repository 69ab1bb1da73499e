"""krony as a launcher starts it, for test_distributed.py: `accelerate launch` this file.

PRETEND_GPUS: accelerate takes FSDP for accelerators only and quietly falls back to DDP on a CPU.
The sharding itself (torch's fully_shard over gloo) works there, so this says "several GPUs" where
it would say "several CPUs"; everything else is what runs on a cluster.

STOP_AFTER: a SIGTERM after so many steps.
"""

import os
import signal
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from krony.cli.app import main
from krony.healing.training import Watch

prepare, step_end = PartialState.__init__, Watch.on_step_end


def pretend(self: PartialState, *arguments: Any, **options: Any) -> None:
    prepare(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def stop(self: Watch, args: Any, state: Any, control: Any, **options: Any) -> None:
    # On one process only: the others must hear of it.
    if state.global_step == int(os.environ["STOP_AFTER"]) and state.is_world_process_zero:
        os.kill(os.getpid(), signal.SIGTERM)
    step_end(self, args, state, control, **options)


if __name__ == "__main__":
    if "PRETEND_GPUS" in os.environ:
        PartialState.__init__ = pretend  # type: ignore[method-assign]
    if "STOP_AFTER" in os.environ:
        Watch.on_step_end = stop  # type: ignore[method-assign]
    main()
