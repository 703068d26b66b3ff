"""A weights file read without copying: as safetensors reads it, and damage is refused, never read past."""

from __future__ import annotations

import json
import random
import struct
import warnings

import pytest
import torch
from safetensors.torch import load, save

from server.adapters.weights_file import tensors_in
from server.errors import AdapterUnservable


def test_as_safetensors_reads_it() -> None:
    tensors = {
        f"t{i}": (torch.randn(random.randrange(1, 9), random.randrange(0, 7)) * 5).to(dtype)
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64] * 3)
    }
    tensors["scalar"] = torch.tensor(3.5)
    data = save(tensors, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = tensors_in(data)
    expected = load(data)
    assert read.keys() == expected.keys()
    for key, tensor in expected.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


def file(header: object, data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def slot(**changes: object) -> dict[str, object]:
    return {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def test_values_that_lie_between_words() -> None:
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    for shift in range(4):
        read = tensors_in(file(slot(data_offsets=[shift, 16 + shift]), b"\1" * shift + numbers))["t"]
        assert read.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xff",
        file([1, 2]),
        file({"t": 3}),
        file({"t": {"dtype": "F32"}}),
        file(slot(more=1)),
        file(slot(data_offsets=[0, 12])),
        file(slot(data_offsets=[-16, 0])),
        file(slot(data_offsets=[16, 0])),
        file(slot(data_offsets=[56, 72])),
        file(slot(data_offsets=["a", "b"])),
        file(slot(shape=[-2, -2])),
        file(slot(shape=[2.0, 2])),
        file(slot(shape=[1 << 62, 1 << 62])),
        file(slot(shape=[2, None])),
        file(slot(dtype="I8", shape=[16])),
        file(slot(dtype=["F32"])),
        file(slot(data_offsets=[])),
    ],
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterUnservable):
        tensors_in(data)


def test_any_cut_and_any_changed_byte_of_the_header() -> None:
    sound = save({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(5)})
    for _ in range(500):
        spoiled = bytearray(sound[: random.randrange(len(sound))] if random.random() < 0.3 else sound)
        for _ in range(random.randrange(3)):
            if spoiled:
                spoiled[random.randrange(min(len(spoiled), 160))] = random.randrange(256)
        try:
            read = tensors_in(bytes(spoiled))
        except AdapterUnservable:
            continue
        assert sum(tensor.numel() * tensor.itemsize for tensor in read.values()) <= 2 * len(spoiled)
