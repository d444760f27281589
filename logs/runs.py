"""Read the log of a run of train_gpt_mlx.py or a fork.

A log holds the script's source, the versions between two rules, and log lines. Resuming appends all three again. Forks
may log other lines and more fields. A log may be cut off anywhere.
"""

import contextlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

VERSIONS = re.compile(r"\n={100}\n((?:.*\n)?.*Python (?s:.*?))\n={100}\n")
NUM = r"([\d.]+)"
STEP = re.compile(rf"step:((\d+)/\d+) \w+_loss:{NUM}(?: val_bpb:{NUM})?.*? train_time:{NUM}ms(?:.* tok_s:{NUM})?")
CONFIGURATION = ("tokenizer_path:", "model_params:", "iterations:", "mlx_max_", "world_size:", "optimizer:", "compute_")
SETTINGS = {"layers": "NUM_LAYERS", "dim": "MODEL_DIM", "heads": "NUM_HEADS", "kv_heads": "NUM_KV_HEADS"}
SETTINGS |= {"seq_len": "TRAIN_SEQ_LEN", "embed_lr": "TIED_EMBED_LR", "muon_steps": "MUON_BACKEND_STEPS"}


@dataclass
class Run:
    """What a log says about its run."""

    name: str
    source: str = ""  # of the script
    versions: str = ""  # of Python and MLX
    settings: dict[str, str] = field(default_factory=dict)  # {"MODEL_DIM": "512", ...}, those that every fork logs
    overrides: dict[str, str] | None = None  # those that differ from their defaults, if they are logged
    steps: str = ""  # "20/20000"
    train_loss: dict[int, float] = field(default_factory=dict)  # {step: nats per token}
    val_bpb: dict[int, float] = field(default_factory=dict)  # {step: bits per byte before compression}
    seconds: dict[int, float] = field(default_factory=dict)  # {step: training time so far}
    tok_s: dict[int, float] = field(default_factory=dict)  # {step: tokens per second}
    stop: str = ""  # why it ended before ITERATIONS: "wallclock_cap", "interrupted", "failed"
    score: float | None = None  # bits per byte after compression
    is_quick: bool = False  # whether only part of the validation split was scored
    total_bytes: int | None = None  # script and compressed model

    def status(self) -> str:
        """Whether the score is ranked, or why not."""
        if self.stop in ("failed", "interrupted"):
            return self.stop
        if self.score is None:
            return "unfinished"
        return "quick look" if self.is_quick else "ranked"

    def go_back(self, step: int) -> None:
        """Forget the steps after this one."""
        for points in (self.train_loss, self.val_bpb, self.seconds, self.tok_s):
            for later in [number for number in points if number > step]:
                del points[later]
        self.stop, self.score, self.total_bytes = "", None, None


def read_log(path: Path, name: str = "") -> Run:
    """Raises OSError, or ValueError if the file is not the log of a run that has begun."""
    run = Run(name)
    text = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]  # without a line that was cut off
    source, *parts = VERSIONS.split(text)
    if not parts:
        read_lines(run, source)
    start = source[:20]
    for versions, part in zip(parts[::2], parts[1::2], strict=True):
        lines, found, rest = part.partition(start)
        run.versions, run.source = versions, source
        source = found + rest or source  # of the next session
        read_lines(run, lines)
    if "ITERATIONS" not in run.settings and not run.steps:
        raise ValueError("not the log of a run that has begun")
    return run


def read_lines(run: Run, lines: str) -> None:
    """Read what a session logged."""
    for line in lines.splitlines():
        if match := STEP.match(line):
            read_step(run, *match.groups())
        elif line.startswith(CONFIGURATION):
            for name, value in re.findall(r"(\w+):([^\s{]+)", line):
                run.settings[SETTINGS.get(name, name.upper())] = value
        elif line.startswith("overrides:"):
            with contextlib.suppress(ValueError):  # a line of the script's source
                run.overrides = dict(word.split("=", 1) for word in shlex.split(line.removeprefix("overrides:")))
        else:
            read_result(run, line)


def read_step(run: Run, steps: str, step: str, loss: str, val_bpb: str | None, ms: str, tok_s: str | None) -> None:
    """Read a line of training or validation."""
    number = int(step)
    if val_bpb is None and number in run.train_loss:
        run.go_back(number - 1)
    run.steps, run.seconds[number] = steps, float(ms) / 1000
    run.stop, run.score, run.total_bytes = "", None, None  # from an earlier session
    if val_bpb is not None:
        run.val_bpb[number] = float(val_bpb)
        return
    run.train_loss[number] = float(loss)
    if tok_s is not None:
        run.tok_s[number] = float(tok_s)


def read_result(run: Run, line: str) -> None:
    """Read any other line: of resuming, ending, saving or scoring."""
    if match := re.match(r"resume:.* step:(\d+)", line):
        run.go_back(int(match[1]))
    elif match := re.match(r"stopping_early: (\w+)", line):
        run.stop = match[1]
    elif line.startswith("error: "):
        run.stop = "interrupted" if line.startswith("error: interrupted") else "failed"
    elif (match := re.match(r"serialized_model_\w+:(\d+) bytes", line)) and run.source:
        run.total_bytes = int(match[1]) + len(run.source.encode())
    elif match := re.match(r"Total submission size \S+: (\d+) bytes", line):
        run.total_bytes = int(match[1])
    elif match := re.match(rf"final_\w*roundtrip\w* .*val_bpb:{NUM}", line):
        is_quick = " val_tokens:" in line
        if run.score is None or run.is_quick or not is_quick:  # a model can be scored again without training
            run.score, run.is_quick = float(match[1]), is_quick
