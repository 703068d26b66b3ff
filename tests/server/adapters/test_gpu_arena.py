"""Adapters for a GPU: pinned in chunks, moved to their rows in one launch a chunk, known when they have arrived."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from server.adapters.arena import Arena, Rows, row_bytes
from server.adapters.gpu_arena import GpuArena
from server.adapters.pinned import PinnedWeights, pin
from server.adapters.residency import Residency, Tier
from server.adapters.weights import AdapterFiles, LoraWeights, SiteWeights
from server.kernels.gpu.aside import SideStream, in_line

SHAPES = {"q": (48, 96), "k": (17, 96), "up": (130, 40)}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def weights(rng: random.Random, digest: str = "d") -> LoraWeights:
    """Some of the sites, of ranks 1 to 11."""
    sites = {}
    for site, (out, width) in SHAPES.items():
        if rng.random() < 0.7:
            rank = rng.randint(1, 11)
            sites[site] = SiteWeights(torch.randn(rank, width), torch.randn(rank, out))
    rank = max((pair.a.shape[0] for pair in sites.values()), default=1)
    return LoraWeights(digest, rank, sites, ())


@pytest.mark.parametrize("chunk_bytes", [1, 6000, 1 << 20])
def test_rows_hold_what_a_plain_arena_holds(chunk_bytes: int) -> None:
    rng = random.Random()
    plain = Arena(SHAPES, 64, torch.float32, "cpu")
    ours = GpuArena(SHAPES, 64, torch.float32, "cpu", in_line)
    for arena in (plain, ours):
        for matrix in (*arena.a.values(), *arena.b.values()):
            matrix.fill_(float("nan"))  # rows of others, and what an adapter leaves behind
    for start in (0, 16, 32, 16):
        given = weights(rng)
        pinned = pin(given, page_locked=False, chunk_bytes=chunk_bytes)
        rows = Rows(start, start + 16)
        plain.write(rows, given)
        ours.write(rows, pinned)
    for site in SHAPES:
        torch.testing.assert_close(ours.a[site], plain.a[site], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ours.b[site], plain.b[site], rtol=0, atol=0, equal_nan=True)


def test_pinned_weights_are_views_of_few_chunks() -> None:
    given = weights(random.Random())
    pinned = pin(given, page_locked=False, chunk_bytes=1 << 20)
    assert isinstance(pinned, PinnedWeights)
    assert len(pinned.chunks) == bool(given.sites)
    assert (pinned.bytes, pinned.rank, pinned.digest) == (given.bytes, given.rank, given.digest)
    for site, pair in given.sites.items():
        assert torch.equal(pinned.sites[site].a, pair.a)
        assert torch.equal(pinned.sites[site].b, pair.b)
        shared = pinned.sites[site].a.untyped_storage().data_ptr()
        assert shared == pinned.chunks[0].image.untyped_storage().data_ptr()


def test_nobody_hears_of_an_adapter_before_the_device_has_it() -> None:
    """The copy is asynchronous: until its event is done, the ticket is not ready and the adapter not resident."""
    events: list[str] = []
    residency: Residency

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        yield
        events.append("done" if not any(s.tier is Tier.DEVICE for s in residency.list()) else "known too early")

    arena = GpuArena(SHAPES, 64, torch.float32, "cpu", aside)
    given = weights(random.Random(), "x")
    residency = Residency(
        arena,
        fetch=lambda digest: AdapterFiles(digest, b"", b"", None, None),
        parse=lambda files: pin(given, page_locked=False),
        host_bytes=1 << 20,
        wake=lambda: None,
        loaded=lambda tier, seconds: events.append(tier),
    )
    try:
        residency.load("x", "t/x@1")
        residency.check_integrity()
    finally:
        residency.close()
    assert events == ["host", "done", "device"]


@pytest.mark.gpu
def test_beside_the_steps_on_a_gpu() -> None:
    rng = random.Random()
    arena = GpuArena(SHAPES, 64, torch.bfloat16, "cuda", SideStream("cuda"))
    given = weights(rng)
    half = {site: SiteWeights(p.a.bfloat16(), p.b.bfloat16()) for site, p in given.sites.items()}
    with arena.aside():
        arena.write(Rows(0, 16), pin(LoraWeights("d", given.rank, half, ()), page_locked=True))
    for site, pair in half.items():
        assert torch.equal(arena.a[site][: pair.a.shape[0]].cpu(), pair.a)
    assert arena.row_bytes == row_bytes(SHAPES, torch.bfloat16)
