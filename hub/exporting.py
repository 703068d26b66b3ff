"""Writes versions of any hub into a bundle (see `hub.bundle`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hub.arrivals import AliasArrival, Arrival
from hub.bundle import BundleWriter, Packed
from hub.errors import AdapterNotFound, HubUnavailable
from hub.facade import HubFacade
from hub.progress import Progress
from hub.refs import AdapterRef
from hub.versions import Version

_WILD = frozenset("*?[")


def export_bundle(
    hub: HubFacade, refs: Sequence[str], target: Path, progress: Progress | None = None
) -> tuple[list[Version], list[AliasArrival], int]:
    """Write the versions that `refs` name into the new file `target`: the versions, their aliases, its bytes.

    A reference may be a shell pattern over names, which stands for every version of those adapters. An alias goes along
    where all versions that it holds do. Raises AdapterNotFound for a pattern that nothing matches, TargetNotEmpty,
    HubUnavailable, BlobCorrupt and what `Hub.resolve` raises.
    """
    versions = _named(hub, refs)
    arrivals = [
        Arrival(version.number, version.manifest, hub.signatures(version.digest)) for version in versions
    ]  # fmt: skip
    aliases = _aliases(hub, versions)
    writer = BundleWriter(arrivals, aliases)
    writer.write(target, _unpacked(hub, versions, arrivals, target), progress)
    return versions, aliases, writer.length


def _named(hub: HubFacade, refs: Sequence[str]) -> list[Version]:
    found: dict[str, Version] = {}
    for ref in refs:
        if _WILD & set(ref):
            matching = hub.versions(ref)
            if not matching:
                raise AdapterNotFound(f"there is no adapter like {ref[:80]!a} in this hub")
        else:
            matching = [hub.resolve(ref)]
        found.update({version.digest: version for version in matching})
    return sorted(found.values(), key=lambda version: (version.full_name, version.number))


def _aliases(hub: HubFacade, versions: Sequence[Version]) -> list[AliasArrival]:
    """The aliases that hold these versions and no others."""
    there = {(version.full_name, version.number) for version in versions}
    return [
        AliasArrival(name, alias, tuple((target.version, target.weight) for target in state.targets))
        for name in sorted({version.full_name for version in versions})
        for alias, state in sorted(hub.aliases(name).items())
        if all((name, target.version) in there for target in state.targets)
    ]


def _unpacked(
    hub: HubFacade, versions: Sequence[Version], arrivals: Sequence[Arrival], target: Path
) -> Iterator[Packed]:
    """Each version's files, pulled and so checked, beside the target: where that fits, this does."""
    for version, arrival in zip(versions, arrivals, strict=True):
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.absolute().parent) as scratch:
            directory = Path(scratch) / "files"
            try:
                hub.pull(replace(AdapterRef.parse(version.full_name), selector=version.digest), directory)
            except HubUnavailable as error:
                raise HubUnavailable(str(error).replace(str(directory), str(target.absolute()))) from error
            yield Packed(arrival, directory)
