"""The training step that schedules follow: counted by the training loop, and read by forward."""

from typing import Any

import torch
from torch import Tensor, nn

from .._warnings import warn
from ..ops.checks import check_count
from ..ops.declare import has_values
from .schedules import Scheduled

PATIENCE = 100  # forward passes in training that a schedule may stand still for


class CountsSteps(nn.Module):
    """A module with a count of training steps, the buffer `step`, that no forward pass moves: one may be run twice for
    a step, by gradient checkpointing, or be one of several, where gradients are accumulated."""

    step: Tensor
    _standing = 0  # calls in training that found a schedule at a step that was not given

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    def advance(self) -> None:
        """Count a training step: move the objective's schedules on by one.

        Its place in the training loop is after `optimizer.step()`, once for each of these, however many calls of the
        module the step was made of. Without schedules it is not needed.

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
        """A warning, once, of a loop that does not call `advance`. Eager training alone is counted, in Python."""
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
