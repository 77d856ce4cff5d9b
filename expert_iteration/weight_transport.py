"""The worker's side of our weight transport: vLLM loads a state dict from a file in shared memory.

Importing this module registers the transport with vLLM, so only processes that run an engine import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file says it all."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Where the state dict lies (written with `torch.save`)."""

    path: str


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads Hugging Face weights by name, layer by layer.

    vLLM packs linear layers for the CPU when it loads them, so `load_weights` on a running model fails; its layerwise
    reload restores the unpacked form first and packs again at the end.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """No rendezvous is needed."""

    def start_weight_update(self) -> None:
        """Put the layers back into the form that checkpoints are loaded into."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load the file's tensors (mapped, not copied) into the model."""
        weights = torch.load(update_info.path, map_location="cpu", mmap=True, weights_only=True)
        model: Any = self.model  # every vLLM model has load_weights, which torch's Module does not know
        model.load_weights(weights.items())

    def finish_weight_update(self) -> None:
        """Pack the layers again."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
