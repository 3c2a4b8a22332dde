"""Buffers of a torch module, such as running means: the same on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mpidl.world import World


class Buffers:
    """Gives all ranks one rank's buffers. Collective when called."""

    def __init__(self, module: Any, world: World) -> None:
        self._module, self._world = module, world
        self._memory: Any = None  # bytes, with a place for each buffer

    def broadcast(self, root: int) -> None:
        """Replace all buffers by rank `root`'s. Collective."""
        buffers = list(self._module.buffers())
        if not buffers or self._world.size == 1:
            return
        by_dtype: dict[Any, list[Any]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            for same in by_dtype.values():
                packed = torch.cat([b.reshape(-1) for b in same]).cpu()
                with self._world.mark.enter("broadcast of buffers"):
                    self._world.comm.Bcast(packed.view(torch.uint8).numpy(), root)
                if self._world.rank == root:
                    continue
                parts = packed.split([b.numel() for b in same])
                for buffer, part in zip(same, parts, strict=True):
                    buffer.data.copy_(part.view(buffer.shape))  # unseen by graphs that go on
