"""Copies beside the computation: on a stream of their own where the device has streams, in order elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """The stream on which layers are brought near.

    Args:
        device: of the near side. On the CPU everything is done at once, and there is nothing to wait for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._side: Any = None if device.type == "cpu" else torch.Stream(device)

    @contextmanager
    def after(self, event: Any, buffer: torch.Tensor) -> Iterator[None]:
        """What is copied to ``buffer`` inside is copied on the side, once ``event`` has happened."""
        if self._side is None:
            yield
            return
        if event is not None:
            self._side.wait_event(event)
        if buffer.nbytes:
            buffer.record_stream(self._side)  # nobody else gets the memory while a copy is on its way
        with self._side:
            yield

    def mark_side(self) -> Any:
        """An event: all that has been begun on the side until now is done."""
        return None if self._side is None else self._side.record_event()

    def mark(self) -> Any:
        """An event: all that has been begun on the current stream until now is done."""
        return None if self._side is None else self.current.record_event()

    def wait(self, event: Any) -> None:
        """What comes on the current stream waits for an event."""
        if event is not None:
            self.current.wait_event(event)

    def finish(self) -> None:
        """Wait, on the host, until the device has done everything."""
        if self._side is not None:
            torch.accelerator.synchronize(self._device)

    @property
    def current(self) -> Any:
        """The stream that kernels are launched on."""
        return torch.accelerator.current_stream(self._device)
