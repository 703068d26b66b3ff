"""`hub serve --base REF`: a whole model of the hub answers as transformers has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest
import torch

from hub.hub import Hub
from server.client import Client
from tests.conftest import write_byte_tokenizer, write_tiny_llama


@pytest.mark.timeout(120)
def test_a_model_of_the_hub_is_served_by_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A cache of its own for models, and what was compiled before.
    compiled = platformdirs.user_cache_path("loraplex") / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "loraplex").mkdir(parents=True)
    if compiled.is_dir():
        (tmp_path / "cache" / "loraplex" / "native").symlink_to(compiled)
    versions = []
    with Hub.open(str(tmp_path / "hub")) as hub:
        for seed in (21, 22):
            directory = tmp_path / f"model-{seed}"
            write_tiny_llama(directory, seed=seed)
            write_byte_tokenizer(directory)
            versions.append(hub.push(directory, "team/whole:prod").version)
        hub.tag("team/whole@1", "prod")
    command = [sys.executable, "-c", "from hub.cli import main; main()", "serve", "--base", "team/whole:prod"]
    command += ["--quantize", "none", "--dtype", "float32", "--listen", "127.0.0.1:0", "--metrics-port", "-1"]
    command += ["--hub", str(tmp_path / "hub"), "--kv-memory", "32MiB", "--adapter-memory", "2MiB", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as served:
        try:
            assert served.stdout is not None
            line = served.stdout.readline()
            assert line.startswith("ready "), served.stderr and served.stderr.read()
            facts = dict(pair.split("=", 1) for pair in line.split()[1:])
            assert facts["base"] == "team--whole@1"
            with Client(facts["grpc"]) as client:
                answer = client.generate("The quick brown fox", max_new_tokens=12, ignore_eos=True)
        finally:
            served.kill()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model-21", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "model-21")("The quick brown fox", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(answer.token_ids) == wanted
