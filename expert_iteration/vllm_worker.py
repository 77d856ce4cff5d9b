"""What runs in vLLM's workers: loading weights that were packed in the training process, and the random state.

A worker is the engine's own process, or with tensor parallelism a process for each shard. `VLLMEngine` names
`WorkerExtension` to vLLM, which imports this module in each of them; importing it registers the weight transport.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.utils.torch_utils import set_random_seed

from expert_iteration.engine import OfferedWeights

BACKEND = "packed"
SHARED_MEMORY = Path("/dev/shm")


class WorkerExtension:
    """Methods that vLLM adds to its worker, for `collective_rpc`."""

    def seed_random(self, seed: int) -> None:
        """Set the random state that sampling draws from.

        Torch's generator on a CPU; on GPUs NumPy's, from which vLLM draws its requests' seeds. Seeds of single requests
        would be slower there, and are refused on a CPU.
        """
        set_random_seed(seed)

    def unlink_shared_memory(self) -> None:
        """Take the name from the memory that shards on a CPU share, once all of them have mapped it.

        vLLM never does, so its 8 MB would stay on the host for ever; without a name it goes with the last process.
        """
        for path in SHARED_MEMORY.glob(f"{os.environ.get('VLLM_DIST_IDENT', 'none')}-*"):
            path.unlink(missing_ok=True)  # another shard is at it too


@dataclass
class PackedInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: an update says it all."""


@dataclass
class PackedUpdateInfo(WeightTransferUpdateInfo):
    """The weights, or where a worker in another process finds them."""

    weights: OfferedWeights


class PackedWeightTransferEngine(WeightTransferEngine[PackedInitInfo, PackedUpdateInfo]):
    """Loads Hugging Face weights by name, layer by layer.

    vLLM packs linear layers for the CPU when it loads them, so `load_weights` on a running model fails; its layerwise
    reload restores the unpacked form first and packs again at the end.
    """

    init_info_cls = PackedInitInfo
    update_info_cls = PackedUpdateInfo

    def init_transfer_engine(self, init_info: PackedInitInfo) -> None:
        """No rendezvous is needed."""

    def start_weight_update(self) -> None:
        """Put the layers back into the form that checkpoints are loaded into."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: PackedUpdateInfo) -> None:
        """Load the tensors, which are mapped and not copied, into the model."""
        weights = update_info.weights.get()
        model: Any = self.model  # every vLLM model has load_weights, which torch's Module does not know
        parts = {name for name, _ in model.named_children()}
        tied = {entry.name for entry in weights.layout if entry.tied_to is not None}
        # Some models (Gemma 2) score with the embeddings themselves, and refuse a head that is tied to them.
        model.load_weights(
            (name, tensor) for name, tensor in weights if name not in tied or name.partition(".")[0] in parts
        )

    def finish_weight_update(self) -> None:
        """Pack the layers again."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, PackedWeightTransferEngine)
