"""By contract with OpenSSF model-signing: its own tool takes our signature for a pulled directory, and refuses others.

Runs where a `model_signing` command is (`pip install model-signing pyopenssl` somewhere, its bin on the PATH). It is no
dependency, see docs/decisions/0023.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hub.hub import Hub
from hub.refs import AdapterRef
from hub.signing import keys
from hub.signing.pushing import push_signed
from tests.hub.making import write_adapter

MODEL_SIGNING = shutil.which("model_signing")


def verified(directory: Path, signature: Path, key: Path) -> bool:
    assert MODEL_SIGNING is not None
    command = [MODEL_SIGNING, "verify", "key", str(directory), "--signature", str(signature), "--public_key", str(key)]
    return subprocess.run(command, capture_output=True, timeout=50).returncode == 0


@pytest.mark.skipif(MODEL_SIGNING is None, reason="there is no model_signing command (pip install model-signing)")
def test_model_signing_takes_a_pulled_directory_for_what_was_signed(tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada")
    keys.generate(tmp_path / "eve")
    source = write_adapter(tmp_path / "source")
    (source / "README.md").write_text("# card")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = push_signed(hub, source, AdapterRef.parse("team/x"), ada)[0].version
        hub.pull("team/x", tmp_path / "out")
        (tmp_path / "x.sig").write_bytes(hub.signatures(version.digest)[0])
    assert verified(tmp_path / "out", tmp_path / "x.sig", tmp_path / "ada.pub")
    assert not verified(tmp_path / "out", tmp_path / "x.sig", tmp_path / "eve.pub")
    (tmp_path / "out" / "README.md").write_text("# other card")
    assert not verified(tmp_path / "out", tmp_path / "x.sig", tmp_path / "ada.pub")
