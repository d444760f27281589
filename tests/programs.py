"""Whole runs of the script: how the tests start one, and what a finished one left behind."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from helpers import REPO

SCRIPT = REPO / "train_gpt_mlx.py"
MODEL = dict(vocab_size=320, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, train_seq_len=16)
MODEL |= dict(train_batch_tokens=128, grad_accum_steps=2, val_batch_size=256, mlx_max_microbatch_tokens=48)
ON_CPU = mx.default_device() == mx.Device(mx.cpu)


@dataclass
class Outcome:
    """What a finished run left behind."""

    code: int
    out: list[str]
    err: str
    folder: Path

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.out if re.search(pattern, line)]

    def losses(self) -> list[float]:
        return [float(re.search(r"train_loss:(\S+)", line)[1]) for line in self.lines("train_loss")]

    def score(self) -> float:
        return float(re.search(r"val_loss:(\S+)", self.lines("^final_int8_zlib_roundtrip_exact")[0])[1])

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def log(self) -> list[str]:
        """The log file's lines after the last copy of the source and the versions."""
        text = (self.folder / "r.txt").read_text(encoding="utf-8")
        return text.rsplit("=" * 100 + "\n", 1)[1].splitlines()

    def same_as_from(self, step: int, other: "Outcome") -> bool:
        """Whether this run, resumed, repeats the other's losses from a step on, and its score."""
        own, others = ([line.split(" train_time")[0] for line in run.lines("train_loss")] for run in (self, other))
        return own == others[step - 1 :] and self.score() == other.score()

    def same_as(self, other: "Outcome") -> bool:
        """Whether both runs computed the same: to the last digit on a CPU; a GPU adds up in no fixed order."""
        figures, others = [*self.losses(), self.score()], [*other.losses(), other.score()]
        return figures == others if ON_CPU else figures == pytest.approx(others, rel=1e-3)


class Process:
    """A run that is under way, read line by line."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], **options) -> None:
        self.out: list[str] = []
        self.folder = folder / "out"
        # Unbuffered, for what readline() would read ahead into a buffer of its own is lost to communicate().
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        self.popen = subprocess.Popen(command, cwd=folder, env=environment, **(pipes | options))

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Read on until so many further lines match."""
        while count and (line := self.popen.stdout.readline().decode()):
            self.out.append(line.rstrip("\n"))
            count -= bool(re.search(pattern, line))
        assert not count, f"{pattern} did not come:\n" + "\n".join(self.out) + self.popen.stderr.read().decode()

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.finish()

    def finish(self, timeout: float = 120) -> Outcome:
        rest, err = self.popen.communicate(timeout=timeout)
        return Outcome(self.popen.returncode, self.out + rest.decode().splitlines(), err.decode(), self.folder)


def environment(data: Path, folder: Path, **changes) -> dict[str, str]:
    """The environment of a run of the tiny model on the tiny data; a change to None leaves a variable unset."""
    # One thread for products: OpenBLAS's others wait by spinning, and there is a test or a rank for each core already.
    values = dict(data_path=data / "datasets/tiny", tokenizer_path=data / "tokenizers/tiny.model")
    values |= dict(run_id="r", out_dir=folder / "out", iterations=4, warmup_steps=1, warmdown_iters=0)
    values |= dict(compute_dtype="float32", openblas_num_threads=1) | MODEL | changes
    outside = {name: value for name, value in os.environ.items() if name.lower() not in values}
    return {**outside, **{name.upper(): str(value) for name, value in values.items() if value is not None}}


def command(*arguments: str, script: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *(script or (str(SCRIPT),)), *arguments]
