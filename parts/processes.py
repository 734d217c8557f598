"""The processes of a run: how they come together, and how all of them stop after the same step."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator


def launched_processes() -> int:
    """How many processes the launcher promised; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the first of the launcher's processes, or the only one; known before they come together."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(mini_batch_size: int, gradient_accumulation_steps: int) -> Accelerator:
    """Join the processes of `accelerate launch`. The batch sizes given here win over those of the launch file.

    Raises:
        RuntimeError: fewer or more processes came together than were launched.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The launcher's value, where it has one, would silently win over the argument.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(gradient_accumulation_steps)
    # On a CPU, ranks find each other only with a named backend, and need `cpu` as well, except for DeepSpeed, which it would drop.
    no_gpu = not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerator = Accelerator(
        cpu=no_gpu and not deepspeed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if no_gpu and "WORLD_SIZE" in os.environ else [],
    )
    if accelerator.num_processes != launched_processes():
        raise RuntimeError(f"{accelerator.num_processes} processes came together, expected {launched_processes()} as launched")
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = mini_batch_size
        config["gradient_accumulation_steps"] = gradient_accumulation_steps  # a DeepSpeed file's own, or 1 where it has none, would win
    return accelerator


def leave_processes(accelerator: Accelerator) -> None:
    """Close the trackers and part, once every process is here."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # A worker thread of gloo takes Python's lock to drop the tensors of the last barrier. The main thread, which holds that lock
        # while it waits for the worker to end, would wait for ever: so the worker gets time before anything is torn down.
        time.sleep(1)
    accelerator.end_training()


class StopRequest:
    """Ctrl-C or SIGTERM: the first asks for a stop after the current step, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt(number)
        self.asked = True
        print("\nstopping after this step; once more stops at once", file=sys.stderr)

    def agreed(self) -> bool:
        """Whether any process was asked. All processes must call this, and all get the same answer."""
        from accelerate.utils import gather_object

        return any(gather_object([self.asked]))


def launch_facts() -> dict[str, str | bool]:
    """What `accelerate launch` chose, which a checkpoint's state and numbers depend on."""
    return {
        "deepspeed": os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }
