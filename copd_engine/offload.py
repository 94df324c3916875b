"""Masters and AdamW's moments in host memory while their branch is not updated: the GPU holds those of one branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from copd_engine.master_weights import MasterWeights

#: torch rounds each piece of pinned memory up to a power of two, so tensors share pieces of such a size.
PIECE_BYTES = 1 << 28
ALIGNMENT = 64


class HostStates:
    """Keeps a branch's fp32 masters and optimizer state in host memory, pinned for a GPU, between updates.

    The tensors stay the same objects, and their numbers the same bits; what moves is their storage. Masters that are
    the model's own parameters stay where they are. State that appears on the device by other ways, as from a
    checkpoint, goes to the host with :meth:`to_host`.
    """

    def __init__(self, masters: MasterWeights, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._masters = masters
        self._optimizer = optimizer
        self._device = device
        self._homes: dict[tuple[str, str], torch.Tensor] = {}
        self._piece = torch.empty(0, dtype=torch.uint8)
        self.to_host()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, everything is on the device."""
        for _, tensor in self._tensors():
            # Kernels that follow on the stream wait for the copy.
            tensor.data = torch.empty_like(tensor, device=self._device).copy_(tensor.data, non_blocking=True)
        try:
            yield
        finally:
            self.to_host()

    def to_host(self) -> None:
        """Copy what is not in its place in host memory there, and free it on the device."""
        moved = []
        for key, tensor in self._tensors():
            if key not in self._homes:
                self._homes[key] = self._new_home(tensor)
            home = self._homes[key]
            if tensor.data_ptr() != home.data_ptr():
                moved.append((tensor, home.copy_(tensor.data, non_blocking=True)))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the host may read from now on
        for tensor, home in moved:
            tensor.data = home

    def forget_moments(self) -> None:
        """The optimizer has dropped them."""
        self._homes = {(name, field): home for (name, field), home in self._homes.items() if not field}

    def _tensors(self) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        copies = self._masters.copies
        for name, master in self._masters.tensors.items():
            if name in copies:
                yield (name, ""), master
            for field, value in self._optimizer.state.get(master, {}).items():
                yield (name, field), value

    def _new_home(self, tensor: torch.Tensor) -> torch.Tensor:
        num_bytes = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if num_bytes > len(self._piece):
            size = max(num_bytes, PIECE_BYTES)
            self._piece = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        place, self._piece = self._piece[: tensor.nbytes], self._piece[num_bytes:]
        return place.view(tensor.dtype).view(tensor.shape)
