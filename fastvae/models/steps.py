"""The training step that schedules follow: counted by the training loop, and read by forward."""

from typing import Any

import torch
from torch import Tensor, nn

from .._warnings import warn
from ..ops.checks import check_count
from ..ops.modes import has_values
from .schedules import Scheduled

PATIENCE = 100  # forward passes in training that a schedule may stand still for before the warning


class CountsSteps(nn.Module):
    """A module that counts training steps in the buffer `step`. A forward pass does not count: gradient checkpointing
    runs it twice in a step, and a loop that accumulates gradients several times."""

    step: Tensor
    _standing = 0  # calls in training with a schedule, but without a given step

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    def advance(self) -> None:
        """Count a training step: move the objective's schedules on by one.

        Call it once after each `optimizer.step()`, however many calls of the module the step consisted of. Without
        schedules it is not needed.

        Example:
            >>> vae(x).loss.backward()
            >>> optimizer.step()
            >>> vae.advance()
        """
        self.step.add_(1)

    def _step(self, given: int | Tensor | None, device: torch.device, objective: Any) -> Tensor:
        """The training step that the schedules are at, 0-dim."""
        if given is None:
            self._watch(objective)
            return self.step
        if not isinstance(given, Tensor):
            return torch.full((), check_count("step", given), dtype=torch.int64, device=device)
        if given.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"step: expected an integer, or a tensor of int64 or int32, got {given.dtype}")
        if given.ndim:
            raise ValueError(f"step: expected a 0-dim tensor, got shape {tuple(given.shape)}")
        return given

    def _watch(self, objective: Any) -> None:
        """Warn, once, about a loop that does not call `advance`. Only eager training is counted, in Python."""
        if not self.training or not has_values(self.step) or self._standing >= PATIENCE:
            return
        schedules = objective.schedules() if isinstance(objective, Scheduled) else []
        self._standing += bool(schedules)
        if self._standing == PATIENCE and int(self.step) == 0:
            warn(
                f"step: still 0 after {PATIENCE} calls in training, so that the objective's schedule of"
                f" {' and '.join(schedules)} stands still; call vae.advance() after each optimizer.step(), or"
                " give vae(x, step=...)"
            )
