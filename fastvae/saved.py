"""Python numbers that a module saves with its parameters."""

from typing import Any, ClassVar

import torch
from torch import nn


class SavedNumbers(nn.Module):
    """A module some of whose attributes are Python numbers that its state dict holds, as 0-dim tensors.

    A buffer would be rounded where the module is cast, would make a GPU wait where its value is looked at, and could
    not be set in a forward pass under `torch.func`.
    """

    saved_numbers: ClassVar[dict[str, torch.dtype]] = {}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self.saved_numbers.items():
            if name not in self._parameters:
                destination[prefix + name] = torch.tensor(getattr(self, name), dtype=dtype, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *found: Any) -> None:
        missing = found[0]
        for name in self.saved_numbers:
            if name not in self._parameters:
                saved = state_dict.pop(prefix + name, None)  # from a copy, or it would be unexpected
                if saved is None:
                    missing.append(prefix + name)
                elif not saved.is_meta:
                    setattr(self, name, saved.item())
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *found)
