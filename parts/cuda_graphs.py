"""A pass over one new token of each row as a CUDA graph: one launch in place of a thousand, for which a GPU would wait.

    fixed = FixedPass(read, cache, mask, positions)      # shapes and places in memory that stay
    logits = fixed(tokens)                               # the first time kernel by kernel, then as a graph

A graph repeats kernels with the numbers that Python gave them. So nothing that Python knows may change from token to token: what was
read is in tensors, and a layer that is asked how much it holds refuses (`fix` of the cache's layers).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import nn

from parts.rows import say_once

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

DEVICES = ("cuda",)  # whose passes are captured
ROOM = 256  # tokens that are read before the keys and values move to a larger place: another capture takes as long as 15 tokens
FEW_ROWS = 16  # that stay together until the last has ended
ALIGNED = 64  # tokens that a place is a multiple of: attention's kernels copy other masks

_not_graphed: WeakSet[nn.Module] = WeakSet()  # models that showed that they cannot be


def can_be_graphed(base: PreTrainedModel, device: torch.device) -> bool:
    """Whether to try: on a GPU, with attention that takes a mask as it is given."""
    return device.type in DEVICES and base.config._attn_implementation == "sdpa" and base not in _not_graphed


def leave_out(base: PreTrainedModel, error: Exception) -> None:
    """Have `base` read kernel by kernel from now on, and say why once."""
    _not_graphed.add(base)
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    say_once(f"{base.config.name_or_path or type(base).__name__}: tokens are sampled without CUDA graphs, more slowly ({why})")


def capture(step: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """`step`, which has run once on this GPU, as a graph. Its result lies where the last call's lay.

    Raises:
        RuntimeError: it waits for the GPU, or does something else that a graph cannot.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        warnings.filterwarnings("error", "The CUDA Graph is empty")  # as on another GPU's stream: a replay would do nothing
        # Other threads may go on with what only a capture of all threads would forbid. A failure leaves PyTorch on the graph's own stream,
        # whence the stream above; PyTorch's own choice is one stream of the first GPU that captured.
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                result = step()
        except UserWarning as warning:
            raise RuntimeError(str(warning)) from None

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


class FixedPass:
    """The pass over one more token of each row, for as long as there is room for tokens.

    Args:
        read: logits [rows, vocabulary] of what follows, from ids, positions [rows, 1] both, and a mask [rows, 1, 1, room]. It should not
            lead back to this pass: the cache of a batch would stay until Python looks for circles.
        cache: of layers that can be fixed. Columns of it in which no row has a token are left out.
        mask: [rows, tokens read].
        positions: [rows, 1] of the next tokens.
    """

    def __init__(self, read: Callable[..., torch.Tensor], cache: Cache, mask: torch.Tensor, positions: torch.Tensor) -> None:
        unused = int(mask.any(dim=0).int().argmax())
        self.width = mask.shape[1] - unused
        self.room = -(-(self.width + ROOM) // ALIGNED) * ALIGNED
        self.mask = nn.functional.pad(mask[:, unused:].bool(), (0, self.room - self.width))
        self.positions = positions.clone()
        self._read = read
        self._tokens = torch.zeros_like(positions)
        self._column = torch.tensor([self.width], device=mask.device)
        self._has_run = False
        self._replay: Callable[[], torch.Tensor] | None = None
        for layer in cache.layers:
            layer.fix(unused, self.room, self._column)

    @property
    def is_full(self) -> bool:
        return self.width == self.room

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of what follows `tokens`, [rows]; the next call overwrites them.

        Raises:
            RuntimeError: the pass cannot be captured. Nothing was read.
        """
        self._tokens.copy_(tokens[:, None])
        if self._has_run:
            self._replay = self._replay or capture(self._step, self.mask.device)
            logits = self._replay()
        else:
            logits = self._step()  # a capture needs kernels that are loaded
            self._has_run = True
        self.width += 1
        return logits

    def _step(self) -> torch.Tensor:
        self.mask.index_fill_(1, self._column, True)
        logits = self._read(self._tokens, self.positions, self.mask[:, None, None])
        self.positions += 1
        self._column += 1
        return logits
