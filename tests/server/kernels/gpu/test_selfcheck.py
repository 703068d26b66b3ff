"""What an engine asks its kernels when it starts on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.kernels.gpu import cuda, door, selfcheck

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_right_kernels_are_found_right(dtype: torch.dtype, device: str) -> None:
    found = selfcheck.findings(device, dtype, selfcheck.TINY)
    assert [finding.kernel for finding in found] == list(selfcheck.CHECKS)
    assert all(finding.right for finding in found), "; ".join(map(str, found))


def test_a_card_on_which_kernels_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, dtype: torch.dtype, sizes: selfcheck.Sizes) -> float:
        raise RuntimeError("an illegal address")

    checks = {
        "right": lambda device, dtype, sizes: 0.0,
        "off": lambda device, dtype, sizes: 0.02,
        "unwritten": lambda device, dtype, sizes: float("nan"),
        "broken": broken,
    }
    monkeypatch.setattr(selfcheck, "CHECKS", checks)
    with pytest.raises(door.Unsuitable) as refused:
        door._check("cpu", torch.float32)
    assert str(refused.value) == (
        "kernels of ours are wrong on this card: off is off by 0.02 where 0.0001 is allowed; "
        "unwritten is off by nan where 0.0001 is allowed; broken failed: RuntimeError: an illegal address"
    )


def test_tritons_kernels_take_the_place_of_wrong_ones_in_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "_present", lambda: True)
    monkeypatch.setattr(cuda._Refused, "by_anyone", False)  # and as it was, afterwards
    checks = {"nf4": lambda device, dtype, sizes: 0.5 if cuda.available() else 0.0}
    monkeypatch.setattr(selfcheck, "CHECKS", checks)
    door._check("cpu", torch.float32)
    assert not cuda.available()
    assert "the slower ones in Triton serve: nf4 is off by 0.5" in caplog.text
