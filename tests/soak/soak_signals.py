"""Signals: commands get Ctrl-C or SIGTERM at a random moment. Each says so in a line, ends with the shell's status, and leaves a whole store."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from soak_common import Outcome
from tiny import llama, tokenizer

from cachetune_store import ChunkStore

DOCUMENTS = 12
PATIENCE = 120.0
EARLIEST = 0.15
"""Share of a command's time before which no signal comes: Python is only starting then."""
SAID = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
COMMANDS: dict[str, list[str]] = {
    "ask": ["ask", "Which ship?", "--max-new-tokens", "200"],
    "tune": ["tune"],
    "calibrate": ["calibrate", "questions.txt", "--ratios", "0.2,0.5", "--bound", "100", "--tokens", "4"],
    "prune": ["prune", "--stale", "--codec", "int8"],
    "remove": ["remove", *(f"d{i}.txt" for i in range(DOCUMENTS))],
    "precompute": ["precompute", "more"],
    "verify": ["verify"],
}
WITHOUT_MODEL = ("remove", "verify")


def run(folder: Path, *, rounds: int, commands: list[str] | None = None, seed: int = 0) -> Outcome:
    """Each command gets each signal `rounds` times."""
    started = time.perf_counter()
    outcome, rng = Outcome("signals"), random.Random(seed)
    _prepare(folder)
    counts = dict.fromkeys(("ended by a signal", "done before"), 0)
    for name in commands or COMMANDS:
        _begin(folder)
        began = time.perf_counter()
        code, err = _run(folder, name)
        whole = time.perf_counter() - began
        outcome.expect(code == 0, f"{name} ended with {code}: {err[-500:]}")
        for number in SAID:
            for _ in range(rounds):
                _begin(folder)
                moment = rng.uniform(EARLIEST, 1.0)
                code, err = _run(folder, name, number, moment * whole)
                counts["done before" if code == 0 else "ended by a signal"] += 1
                where = f"{name}, {number.name} after {moment:.0%} of its time"
                outcome.problems += [f"{where}: {wrong}" for wrong in _wrong(folder, number, code, err)]
    outcome.figures |= {"commands": len(commands or COMMANDS), **counts}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _prepare(folder: Path) -> None:
    llama(max_positions=4096).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "questions.txt").write_text("Which ship?\nWhich keeper?\n")
    for place, first in (("docs", 0), ("more", DOCUMENTS)):
        (folder / place).mkdir()
        for i in range(first, first + DOCUMENTS):
            text = "".join(f"Keeper {i} saw ship {j} pass by.\n\n" for j in range(30))
            (folder / place / f"d{i}.txt").write_text(text)
    _run(folder, "precompute", documents="docs")
    shutil.move(folder / "kv", folder / "filled")


def _begin(folder: Path) -> None:
    shutil.rmtree(folder / "kv", ignore_errors=True)
    shutil.copytree(folder / "filled", folder / "kv")


def _run(
    folder: Path, name: str, number: signal.Signals | None = None, after: float = 0.0, *, documents: str = "more"
) -> tuple[int, str]:
    """Exit status and standard error of a command, which gets the signal after so many seconds."""
    files = {"more": folder / documents, "questions.txt": folder / "questions.txt"}
    words = [str(files.get(word, word)) for word in COMMANDS[name]]
    if name not in WITHOUT_MODEL:
        words += ["--model", str(folder / "model"), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cachetune_rag", *words, "--store", str(folder / "kv")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs have Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        if number is not None:
            time.sleep(after)
            process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return -signal.SIGKILL, f"it did not end within {PATIENCE:.0f} s"
    return process.returncode, err


def _wrong(folder: Path, number: signal.Signals, code: int, err: str) -> list[str]:
    """What is wrong with a command that got a signal, and with the store that it left."""
    found = []
    if code not in (0, 128 + number):
        found.append(f"ended with {code}: {err[-500:]}")
    elif code and SAID[number] not in err:
        found.append(f"doesn't say so: {err[-500:]}")
    if "Traceback" in err:
        found.append(f"a traceback: {err[-2000:]}")
    with ChunkStore(folder / "kv", host_budget=0) as store:
        report = store.verify()
        if not report.ok or (report.adopted, report.dropped, report.temp_files) != (0, 0, 0):
            found.append(f"verify has something to mend: {report}")
    left = [file.name for file in (folder / "kv" / "tmp").iterdir() if file.name != "gate.lock"]
    if left:
        found.append(f"left in tmp: {left}")
    return found
