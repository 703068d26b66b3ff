"""Signals end a verb as Ctrl-C does: nothing that was staged is left in the user's directories."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hub.hub import Hub
from hub.unwinding import end_at_once, unwinding
from tests.hub.making import lora_tensors, write_adapter

# Whoever runs the tests may ignore signals (nohup, `&`), and what is ignored stays so in children.
HEEDS = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
# Says when bytes are about to be staged, and stays there.
STAYS = """
import sys, time
def stay(*arguments, **named):
    print("staging", flush=True)
    time.sleep(60)
import hub.pull, hub.bundle, hub.hub
hub.pull._write_files = hub.bundle.BundleWriter._write = hub.hub.Hub.push = stay
from hub.cli import main
main()
"""
STATED = ("--metrics", "f1=0.5")


def started(arguments: tuple[str, ...], *prefix: str) -> subprocess.Popen[str]:
    program = STAYS if prefix else HEEDS + STAYS
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "staging\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("verb", ["pull", "export", "push"])
def test_a_verb_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, verb: str, number: signal.Signals, status: int
) -> None:
    mine = tmp_path / "mine"
    adapter = write_adapter(mine / "adapter", tensors=lora_tensors())
    with Hub.open() as hub:
        hub.push(adapter, "x")
    arguments = {
        "pull": ("pull", "x", str(mine / "out")),
        "export": ("export", "x", str(mine / "x.bundle")),
        "push": ("push", str(adapter), "x", *STATED),
    }
    process = started(arguments[verb])
    assert any(entry.name.startswith(".") for entry in mine.iterdir())
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert [entry.name for entry in mine.iterdir()] == ["adapter"]


def test_a_signal_told_twice_does_not_cut_the_tidying_short() -> None:
    """As timeout(1) tells it: to the process, and to its group."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    tidied = False
    try:
        with pytest.raises(SystemExit) as ended, unwinding():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                tidied = True
        signal.raise_signal(signal.SIGTERM)  # nor what comes after the verb
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (ended.value.code, tidied) == (143, True)


def test_nohup_goes_on_being_obeyed(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors=lora_tensors())
    with Hub.open() as hub:
        hub.push(adapter, "x")
    process = started(("pull", "x", str(tmp_path / "out")), "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_outside_everything_is_as_it_was() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with unwinding():
        assert signal.getsignal(signal.SIGTERM) not in before
        own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_at_once(signal.SIGTERM, signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # somebody's own wish
        signal.signal(signal.SIGHUP, own)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_forked_child_ends_where_it_stands() -> None:
    """Data loaders' workers, say: their stack is their parent's, and so are the directories that it would tidy."""
    program = (
        "import os, signal, time\n"
        "from hub.unwinding import unwinding\n"
        "with unwinding():\n"
        "    reading, writing = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0: os.write(writing, b'.'); time.sleep(60)\n"
        "    os.read(reading, 1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert int(done.stdout) == signal.SIGTERM


def test_ctrl_c_while_the_command_is_being_imported() -> None:
    program = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from hub.console import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_what_stdout_does_not_take_is_said_in_one_line(tmp_path: Path) -> None:
    with Hub.open() as hub:
        hub.push(write_adapter(tmp_path / "adapter", tensors=lora_tensors()), "x")
    for arguments in (["list"], ["list", "--json"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", "from hub.cli import main; main()", *arguments],
                stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == "error: this machine refused: No space left on device (SYSTEM_REFUSED)\n"
