"""`expert_iteration.packed_weights`: what is packed comes out again, without copies of the model on the way."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expert_iteration.packed_weights import ObjectStoreWeights, PackedWeights, in_memory_file

SHARED = torch.arange(12.0).view(3, 4)
WEIGHTS = {
    "embed": SHARED,
    "bias": torch.tensor([0.1, -2.5, 7.0]),
    "scalar": torch.tensor(1.5),
    "head": SHARED,
    "counts": torch.arange(5),
}


def pack(weights=WEIGHTS, dtype=torch.float32):
    packed = PackedWeights.allocate(weights.items(), dtype)
    packed.pack(weights.items())
    return packed


def assert_equal(packed, weights):
    assert [name for name, _ in packed] == list(weights)
    for name, tensor in packed:
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_comes_out_in_the_dtype_of_the_wire(dtype):
    expected = {name: value.to(dtype) if value.is_floating_point() else value for name, value in WEIGHTS.items()}
    packed = pack(dtype=dtype)
    assert_equal(packed, expected)
    assert [tensor.dtype for _, tensor in packed] == [dtype] * 4 + [torch.int64]
    assert packed.names == WEIGHTS.keys()


def test_the_buffer_is_reused_from_pack_to_pack():
    packed = pack()
    address, views = packed.buffer.data_ptr(), dict(packed)
    embed = SHARED + 1
    changed = WEIGHTS | {"embed": embed, "head": embed, "bias": torch.zeros(3)}
    packed.pack(changed.items())
    assert packed.buffer.data_ptr() == address
    assert_equal(views.items(), changed)


def test_tied_tensors_lie_in_the_buffer_once():
    tensors = dict(pack())
    assert tensors["head"].data_ptr() == tensors["embed"].data_ptr()
    untied = WEIGHTS | {"head": SHARED.clone()}
    assert pack(untied).num_bytes == pack().num_bytes + 64


def test_temporary_tensors_at_one_address_are_not_taken_for_tied():
    def merged():
        for number in range(20):
            tensor = torch.full((1000,), float(number))
            yield f"layer-{number}", tensor
            del tensor  # the allocator gives its memory to the next

    packed = PackedWeights.allocate(merged(), torch.float32)
    packed.pack(merged())
    assert [tensor[0].item() for _, tensor in packed] == list(range(20))


def test_parts_of_one_storage_are_not_taken_for_tied():
    whole = torch.arange(6.0)
    weights = {"all": whole, "first": whole[:3], "last": whole[3:], "again": whole[3:]}
    packed = pack(weights)
    assert_equal(packed, weights)
    assert [entry.tied_to for entry in packed.layout] == [None, None, None, "last"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({name: WEIGHTS[name] for name in WEIGHTS if name != "bias"}, r"bias \[3\] was expected, scalar \[\] came"),
        (
            {name: WEIGHTS[name] for name in WEIGHTS if name != "counts"},
            r"counts \[5\] was expected, nothing more came",
        ),
        (WEIGHTS | {"more": SHARED}, r"nothing more was expected, more \[3, 4\], tied to embed, came"),
        (WEIGHTS | {"bias": torch.zeros(4)}, r"bias \[3\] was expected, bias \[4\] came"),
        (WEIGHTS | {"head": SHARED.clone()}, r"head \[3, 4\], tied to embed, was expected, head \[3, 4\] came"),
    ],
)
def test_weights_that_are_not_those_of_the_first_push_are_refused(changed, message):
    with pytest.raises(RuntimeError, match=message):
        pack().pack(changed.items())


def test_packing_allocates_no_memory():
    class Storages(TorchDispatchMode):
        """Notes the memory of everything that is computed."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            seen.add(output.untyped_storage().data_ptr())
            return output

    seen: set[int] = set()
    packed = pack(dtype=torch.bfloat16)
    with Storages():
        packed.pack(WEIGHTS.items())
    assert seen == {packed.buffer.untyped_storage().data_ptr()}


# --- to other processes ---

READ_FILE = """
import pickle, sys
weights = pickle.load(sys.stdin.buffer).get()
pickle.dump({name: tensor.clone() for name, tensor in weights}, sys.stdout.buffer)
"""


def test_another_process_maps_the_file_which_is_gone_afterwards():
    packed = pack()
    with in_memory_file(packed) as file:
        assert os.path.exists(file.path)
        output = subprocess.run(
            [sys.executable, "-c", READ_FILE], input=pickle.dumps(file), stdout=subprocess.PIPE, check=True
        )
    assert_equal(pickle.loads(output.stdout).items(), WEIGHTS)
    assert not os.path.exists(file.path)


def test_the_file_is_gone_also_where_loading_failed():
    with pytest.raises(ZeroDivisionError), in_memory_file(pack()) as file:
        raise ZeroDivisionError
    assert not os.path.exists(file.path)


def read_in_actor():
    import ray

    class Reader:
        def read(self, weights):
            """Whether two reads see the same memory, which is read-only, and what is in it."""
            first, second = ray.get(weights.reference), ray.get(weights.reference)
            packed = weights.get()
            same = first.ctypes.data == second.ctypes.data == packed.buffer.data_ptr()
            return same, first.flags.writeable, {name: tensor.clone() for name, tensor in packed}

    return ray.remote(num_cpus=0)(Reader).remote()


def test_the_object_store_hands_over_the_memory_itself(ray_session, recwarn):
    import ray

    weights = WEIGHTS | {"large": torch.rand(100_000)}  # small objects travel by another way
    actor = read_in_actor()
    packed = pack(weights)
    offered = ObjectStoreWeights.put(packed)
    packed.buffer.zero_()  # the next push may be packed while the engine has not taken this one yet
    same, writeable, read = ray.get(actor.read.remote(offered))
    assert same
    assert not writeable
    assert_equal(read.items(), weights)
    assert_equal(offered.get(), weights)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
    ray.kill(actor)
