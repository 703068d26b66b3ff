from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import SafetensorsMalformed
from hub.safetensors_file import mapped, read_header
from tests.hub.making import bf16, f16, lora_tensors, safetensors

SOUND = safetensors({**lora_tensors(), "b": bf16([[1.0, 2.0]]), "h": f16([3.0])}, metadata={"format": "pt"})


def test_a_sound_file_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors import deserialize

    (tmp_path / "x.safetensors").write_bytes(SOUND)
    with mapped(tmp_path / "x.safetensors") as tensors:
        ours = {name: (slot.dtype, slot.shape, bytes(tensors.bytes_of(name))) for name, slot in tensors.slots.items()}
    assert ours == {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(SOUND)}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 900), st.integers(0, 255), st.integers(0, len(SOUND)))
def test_whatever_we_accept_the_library_accepts_too(position: int, byte: int, length: int) -> None:
    """Damage in the header, and cuts: never a crash, and never more lenient than the format's own library."""
    from safetensors import deserialize

    for damaged in (SOUND[:position] + bytes([byte]) + SOUND[position + 1 :], SOUND[:length]):
        try:
            slots = read_header(memoryview(damaged), "x")
        except SafetensorsMalformed:
            continue
        assert {name: (t["dtype"], tuple(t["shape"])) for name, t in deserialize(damaged)} == {
            name: (slot.dtype, slot.shape) for name, slot in slots.items()
        }


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_file_without_room_for_its_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(SOUND[:length])
    with pytest.raises(SafetensorsMalformed, match="at least 8"), mapped(tmp_path / "x"):
        pass
