"""Weights from the trainer's accelerator to the engines': over NCCL, or through CUDA IPC where they share one.

Sender and receiver must meet, and an engine may be in the middle of a generation. So a push copies the weights into one
buffer in host memory and returns; a thread for each engine waits until that is between two generations, and then sends
the buffer through vLLM's weight transfer. Each engine has a connection of its own: a busy one keeps no other waiting.

The buffer is in host memory because a second copy of the model on the trainer's accelerator is what a full one has no
room for. It costs one pass over the bus each way, the second one while training goes on. There is one buffer: before it
is overwritten, the weights that still wait are withdrawn from the engines and those being sent are awaited. The newest
push thus supersedes one that waits.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from expert_iteration.config import Config, InferenceBackend
from expert_iteration.devices import DeviceAllocation
from expert_iteration.engine_client import HEALTH_GROUP, TRANSFER_GROUP, EngineClient, EnginePool
from expert_iteration.packed_weights import PackedTensor, PackedWeights
from expert_iteration.receiving_engine import SentByTrainer
from expert_iteration.remote import ProcessDiedError
from expert_iteration.weight_transport import SentWeights, WeightPass

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo

# Tensors travel in parts of about this size, of which both accelerators hold one or two (over NCCL four) for a moment.
PART_BYTES = 256 * 2**20
ASK_SECONDS = 0.5
SENDING = "sending weights"  # names the threads
ANSWER_SECONDS = 5.0  # beyond the limit, for the engine to say who was late


class Way(StrEnum):
    """How weights get from the trainer to the engines."""

    nccl = "nccl"
    """Between accelerators, also of different hosts."""
    ipc = "ipc"
    """Within the accelerator that both use."""
    object_store = "object_store"
    """Through host memory and Ray's object store."""


def choose_way(cfg: Config, allocation: DeviceAllocation) -> Way:
    """The way for a placement.

    Through the object store go the weights of engines on a CPU, of Hugging Face's generation, which has no other, and
    adapters alone, which are so few that no other way is worth its connections; and nothing, where none are trained.
    """
    engines, trainers = allocation["inference_model_devices"], allocation["train_model_devices"]
    is_vllm = cfg.inference_model.backend is InferenceBackend.vllm
    if not engines or not trainers or not is_vllm or cfg.weight_update.lora_only:
        return Way.object_store
    return Way.nccl if set(engines).isdisjoint(trainers) else Way.ipc


class Sender(Protocol):
    """vLLM's trainer side of a transfer (`TrainerWeightTransferEngine`)."""

    def send_weights(self) -> None:
        """Send everything that its source has."""
        ...


class PackedSource:
    """Packed weights as vLLM's trainer side takes them (`WeightSource`): metadata, and any number of passes.

    Tied weights are sent once, as vLLM's own source does: on accelerators it holds them once, and some models (Gemma 2)
    have no head that could be loaded.
    """

    def __init__(self, weights: PackedWeights, device: torch.device | str) -> None:
        self.weights = weights
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor, in the order of the passes."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(entry.name, entry.dtype, tuple(entry.shape)) for entry in self._entries()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        sent = {entry.name for entry in self._entries()}
        for name, tensor in self.weights:
            if name in sent:
                yield name, tensor.to(self._device, non_blocking=True)

    def _entries(self) -> list[PackedTensor]:
        return [entry for entry in self.weights.layout if entry.tied_to is None]


class RemoteEngine:
    """An engine as vLLM's trainer side calls it (`VLLMWeightSyncClient`).

    vLLM's own client for Ray calls an actor's default group, where a transfer would queue behind the generation.

    Args:
        engine: of a `Receiving` engine.
        timeout: seconds that each call may take.
    """

    def __init__(self, engine: EngineClient, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Meet for the first time."""
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """First step."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Second step, once for each part."""
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Last step; the engine knows the version from its offer."""
        self._call("finish_weight_update")

    def _call(self, step: str, *args: Any) -> None:
        from ray.exceptions import GetTimeoutError

        try:
            self._engine.get(self._engine.call("transfer", step, *args, group=TRANSFER_GROUP), self._timeout)
        except GetTimeoutError as error:
            activity = self._engine.activity() or f"{self._engine.name} is idle"
            raise TimeoutError(
                f"The engine did not answer {step} within weight_update.timeout={self._timeout:g} s: {activity}."
            ) from error


Connect = Callable[[RemoteEngine, PackedSource], Sender]


class GpuTransport:
    """Sends weights to each engine when it is ready for them.

    Args:
        engines: the client of `Receiving` engines.
        connect: `connect_nccl` with the number of workers given, or `connect_ipc`.
        dtype: the engines'; floating-point weights are cast to it.
        timeout: seconds that each call to an engine may take.
        device: the trainer's.
    """

    def __init__(
        self, engines: EnginePool, connect: Connect, dtype: torch.dtype, *, timeout: float, device: str = "cuda"
    ) -> None:
        self.dtype = dtype
        self._engines = engines
        self._connect = connect
        self._timeout = timeout
        self._device = device
        self._packed: PackedWeights | None = None
        self._senders: list[Sender] = []
        self._version = 0
        self._wire = threading.Lock()  # one transfer at a time: they would only share the bus
        # Its own, because on the stream of the training steps a transfer would wait for them, and they for the engine.
        self._stream = torch.cuda.Stream() if torch.device(device).type == "cuda" else None

    def connect(self, weights: WeightPass) -> None:
        """Make the buffer and meet the engines, which must have loaded their model.

        To be called before anything is generated: an engine meets only between two generations.
        """
        self._packed = PackedWeights.allocate(weights(), self.dtype)
        source = PackedSource(self._packed, self._device)
        self._senders = [
            self._connect(RemoteEngine(engine, self._timeout), source) for engine in self._engines.replicas
        ]

    def send(self, weights: WeightPass, version: int, probe: list[list[int]] | None, timeout: float) -> SentWeights:
        """See `WeightTransport.send`."""
        if self._packed is None:
            self.connect(weights)
        assert self._packed is not None
        self._engines.withdraw_weights(self._version, timeout)
        self._packed.pack(weights())
        self._version = version
        for engine, sender in zip(self._engines.replicas, self._senders, strict=True):
            # Daemons: one that waits for an engine must not keep the process.
            threading.Thread(
                target=self._deliver, args=(engine, sender, version), name=f"{SENDING} {version}", daemon=True
            ).start()
        reports = self._engines.offer(SentByTrainer(timeout), version, probe, timeout + ANSWER_SECONDS)
        return SentWeights(reports, self._packed.names, sum(entry.num_bytes for entry in self._packed.layout))

    @property
    def last_sent(self) -> PackedWeights | None:
        """See `WeightTransport.last_sent`."""
        return self._packed

    def _deliver(self, engine: EngineClient, sender: Sender, version: int) -> None:
        """Send a version to one engine once that is ready; an error is handed to the engine, which cannot go on."""
        while (ready := self._is_ready(engine, version)) is None:
            pass
        if not ready:
            return
        try:
            with self._wire, torch.cuda.stream(self._stream):
                sender.send_weights()
        except Exception as error:
            traceback.print_exc()
            engine.get(engine.call("transfer", "transfer_failed", repr(error), group=HEALTH_GROUP))

    def _is_ready(self, engine: EngineClient, version: int) -> bool | None:
        """See `Meeting.await_ready`, asked in short turns: an actor with an open call does not exit when it should."""
        call = engine.call("transfer", "await_ready", version, ASK_SECONDS, group=TRANSFER_GROUP)
        try:
            return engine.get(call)
        except ProcessDiedError:
            return False  # whoever else waits for the engine says so


def connect_nccl(num_workers: int) -> Connect:
    """Engines of `num_workers` accelerators, which each join a group of their own with the trainer."""

    def connect(engine: RemoteEngine, source: PackedSource) -> Sender:
        import ray
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        address = ray.util.get_node_ip_address()
        info = NCCLTrainerInitInfo(
            address, get_open_port(), num_workers + 1, packed_buffer_size_bytes=PART_BYTES, rank=0
        )
        return _trainer_side(info, engine, source)

    return connect


def connect_ipc(engine: RemoteEngine, source: PackedSource) -> Sender:
    """An engine on the trainer's own accelerator."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    # vLLM refuses a tensor that is larger than a part.
    largest = max(entry.num_bytes for entry in source.weights.layout)
    info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(PART_BYTES, largest), rank=0)
    return _trainer_side(info, engine, source)


def _trainer_side(info: TrainerInitInfo, engine: RemoteEngine, source: PackedSource) -> Sender:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(info, client=engine, source=cast(Any, source))
