#!/usr/bin/env python3
"""Compare runs by their logs: those given as paths or by name, or else all in this folder.

  python logs/compare.py                     a table, best score first
  python logs/compare.py --diff sample wide  what differs: score, settings, versions, and the source of the script
  python logs/compare.py --plot curves.png   training loss and val_bpb, over steps and over training time

Scores in parentheses are not ranked: these runs did not finish, or were scored on a part of the validation split.
"""

import argparse
import csv
import difflib
import json
import re
import shutil
import signal
import statistics
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOGS = Path(__file__).parent
SUBMISSION_CAP_BYTES = 16_000_000

# --- Reading a log ---
# It is the script's source, the versions between two rules, and lines. A resumed run appends the same again. It may be
# cut off anywhere. Forks log other things as well: unknown lines are skipped, and known ones may have more fields.

VERSIONS = re.compile(r"\n={100}\n((?:.*\n)?.*Python (?s:.*?))\n={100}\n")
NUM = r"([\d.]+|nan|inf)"
STEP = re.compile(rf"step:(\d+)(/\d+) \w+_loss:{NUM}(?: val_bpb:{NUM})?.*? train_time:{NUM}ms(?:.* tok_s:{NUM})?")
CONFIGURATION = ("tokenizer_path:", "model_params:", "iterations:", "mlx_max_", "world_size:", "optimizer:", "compute_")
SETTINGS = {"layers": "NUM_LAYERS", "dim": "MODEL_DIM", "heads": "NUM_HEADS", "kv_heads": "NUM_KV_HEADS"}
SETTINGS |= {"seq_len": "TRAIN_SEQ_LEN", "embed_lr": "TIED_EMBED_LR", "muon_steps": "MUON_BACKEND_STEPS"}


@dataclass
class Run:
    """What a log says about its run."""

    name: str  # "night", or "night.txt.1" for a log that was moved aside
    source: str = ""
    versions: str = ""
    settings: dict[str, str] = field(default_factory=dict)  # {"MODEL_DIM": "512", ...}, those that every fork logs
    overrides: dict[str, str] | None = None  # those that differ from their defaults
    train: dict[int, tuple[float, float, float | None]] = field(default_factory=dict)  # step: (loss, ms, tokens/s)
    val: dict[int, tuple[float, float]] = field(default_factory=dict)  # step: (val_bpb, ms)
    steps: str = ""  # "20/20000"
    train_ms: float = 0.0
    stop: str = ""  # why it ended before ITERATIONS: "wallclock_cap", "interrupted", "failed"
    score: float | None = None  # val_bpb after compression
    is_quick: bool = False  # whether that is the score of a part of the validation split
    total_bytes: int | None = None

    def status(self) -> str:
        """Whether the score is ranked, or why not."""
        if self.stop in ("failed", "interrupted"):
            return self.stop
        if self.score is None:
            return "unfinished"
        return "quick look" if self.is_quick else "ranked"

    def shown_settings(self) -> dict[str, str]:
        """Those that differ from their defaults, or else all that are logged."""
        return self.settings if self.overrides is None else self.overrides


def read_log(path: Path) -> Run:
    """Raises OSError, or ValueError if the file is not the log of a run that has begun."""
    run = Run(path.name.removesuffix(".txt"))
    text = path.read_text(encoding="utf-8", errors="replace")
    source, *parts = VERSIONS.split(text)
    if not parts:
        read_lines(run, source)
    first_line = source.partition("\n")[0]
    for run.versions, part in zip(parts[::2], parts[1::2], strict=True):
        run.source = source
        lines, _, next_source = part.partition(f"\n{first_line}\n")
        read_lines(run, lines)
        source = f"{first_line}\n{next_source}"
    if "ITERATIONS" not in run.settings and not run.steps:
        raise ValueError("not the log of a run that has begun")
    models = re.findall(r"\nserialized_model_\w+:(\d+) bytes", text)
    totals = re.findall(r"\nTotal submission size \S+: (\d+) bytes", text)
    if totals:
        run.total_bytes = int(totals[-1])
    elif models and run.source:
        run.total_bytes = int(models[-1]) + len(run.source.encode())
    return run


def read_lines(run: Run, lines: str) -> None:
    """The lines below the versions."""
    for line in lines.splitlines():
        if match := STEP.match(line):
            read_step(run, *match.groups())
        elif line.startswith(CONFIGURATION):
            for name, value in re.findall(r"(\w+):([^\s{]+?)(?:\.0+)?(?!\S)", line):
                run.settings[SETTINGS.get(name, name.upper())] = value
        elif line.startswith("overrides:"):
            run.overrides = dict(re.findall(r"(\w+)=('[^']*'|\S+?)(?:\.0+)?(?!\S)", line))
        elif line.startswith("stopping_early: "):
            run.stop = line.split(" ")[1]
        elif line.startswith("error: "):
            run.stop = "interrupted" if line.startswith("error: interrupted") else "failed"
        elif match := re.match(r"final_\w*roundtrip\w* .*val_bpb:(\d+\.\d{4,})", line):
            is_quick = " val_tokens:" in line
            if run.score is None or run.is_quick or not is_quick:
                run.score, run.is_quick = float(match[1]), is_quick


def read_step(run: Run, step: str, of: str, loss: str, val_bpb: str | None, ms: str, tok_s: str | None) -> None:
    """A line of training, or of validation on the way."""
    number, run.steps, run.train_ms = int(step), step + of, float(ms)
    run.stop, run.score = "", None  # of an earlier session
    if val_bpb is not None:
        run.val[number] = (float(val_bpb), run.train_ms)
        return
    if number in run.train:  # a resumed run repeats steps
        run.train = {step: point for step, point in run.train.items() if step < number}
        run.val = {step: point for step, point in run.val.items() if step < number}
    run.train[number] = (float(loss), run.train_ms, tok_s and float(tok_s))


# --- What is printed and drawn ---

FORMATS = {
    "seconds": ".0f",
    "tok/s": ".0f",
    "before": ".4f",
    "score": ".4f",
    "change": "+.4f",
    "bytes": ",",
    "room": ",",
}


def differing_settings(runs: list[Run]) -> list[str]:
    """The names of settings that are not the same in all runs, of those that are shown."""
    names = {name for run in runs for name in run.shown_settings()} - {"RUN_ID", "OUT_DIR", "RESUME"}
    logged = [run.settings | run.shown_settings() for run in runs]
    return sorted(name for name in names if len({settings.get(name) for settings in logged}) > 1)


def row(run: Run, differing: list[str]) -> dict[str, Any]:
    """A row of the table. What the log does not say is None."""
    speeds = [tok_s for _, _, tok_s in run.train.values() if tok_s is not None]
    before = run.val[max(run.val)][0] if run.val else None
    settings = run.shown_settings()
    return {
        "run": run.name,
        "status": run.status(),
        "steps": run.steps,
        "stop": run.stop,
        "seconds": run.train_ms / 1000,
        "tok/s": statistics.median(speeds) if speeds else None,
        "before": before,
        "score": run.score,
        "change": None if run.score is None or before is None else round(run.score - before, 4),
        "bytes": run.total_bytes,
        "room": None if run.total_bytes is None else SUBMISSION_CAP_BYTES - run.total_bytes,
        "settings": {name: settings[name] for name in differing if name in settings},
    }


def cells(row: dict[str, Any]) -> list[str]:
    """The texts of a row. The last says why the run ended, or is not ranked, and the settings."""
    texts = [row["run"], row["steps"]]
    for column, form in FORMATS.items():
        text = "" if row[column] is None else format(row[column], form)
        if column == "score" and text and row["status"] != "ranked":
            text = f"({text})"
        texts.append(text)
    reason = row["stop"] if row["status"] == "ranked" else row["status"]
    settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
    return [*texts, ", ".join(filter(None, [reason, settings]))]


def table(rows: list[dict[str, Any]], width: int) -> Iterator[str]:
    """Lines of at most `width` characters. What does not fit beside a row comes below it."""
    texts = [["run", "steps", *FORMATS, ""], *map(cells, rows)]
    sizes = [max(map(len, column)) for column in zip(*texts, strict=True)][:-1]
    sizes[0] = min(sizes[0], max(8, width - sum(sizes[1:]) - len(sizes[1:])))
    while sum(sizes) + len(sizes) - 1 > width:
        sizes.pop()  # leaves the last column out
    fits = sum(sizes) + len(sizes) + 1 + max(len(row[-1]) for row in texts) <= width
    for name, *figures, note in texts:
        line = " ".join([name[: sizes[0]].ljust(sizes[0]), *map(str.rjust, figures, sizes[1:])])
        yield f"{line}  {note}".rstrip() if fits else line
        if not fits:
            yield from textwrap.wrap(note, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def differences(a: Run, b: Run) -> Iterator[str]:
    """What is not the same in two runs; versions and sources as unified diffs."""
    if a.score is not None and b.score is not None:
        yield f"score: {a.score:.4f} -> {b.score:.4f} ({b.score - a.score:+.4f})"
    for name in differing_settings([a, b]):
        before, after = ((run.settings | run.shown_settings()).get(name, "not logged") for run in (a, b))
        yield f"{name}: {before} -> {after}"
    for part in ("versions", "source"):
        old, new = getattr(a, part).splitlines(), getattr(b, part).splitlines()
        lines = list(difflib.unified_diff(old, new, f"{a.name}: {part}", f"{b.name}: {part}", lineterm=""))
        yield from lines or [f"{part}: the same"]


def draw(runs: list[Run]) -> Any:
    """A matplotlib figure of curves, a color and marker for each run. A large marker is the score after compression."""
    from matplotlib.figure import Figure  # nothing else needs it

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, run in enumerate(runs):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X<>"[number % 10]}
        losses = [loss for loss, *_ in run.train.values()]
        reach = len(losses) // 20
        smooth = [statistics.fmean(losses[max(i - reach, 0) : i + reach + 1]) for i in range(len(losses))]
        val_bpbs = [val_bpb for val_bpb, _ in run.val.values()]
        train_seconds, val_seconds = ([ms / 1000 for _, ms, *_ in points.values()] for points in (run.train, run.val))
        for column, train_x, val_x in ((0, list(run.train), list(run.val)), (1, train_seconds, val_seconds)):
            top, bottom = axes[:, column]
            top.plot(train_x, losses, linestyle="", markersize=3, alpha=0.4, **style)
            top.plot(train_x, smooth, color=style["color"])
            bottom.plot(val_x, val_bpbs, markersize=4, label=run.name, **style)
            if run.score is not None and val_x:
                bottom.plot(val_x[-1], run.score, markersize=10, markeredgecolor="black", **style)
    axes[0, 0].set(ylabel="training loss (nats per token)")
    axes[1, 0].set(xlabel="steps", ylabel="val_bpb (bits per byte)")
    axes[1, 1].set(xlabel="training time (seconds)")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def find_log(name: str) -> Path:
    """The log at this path, or the one in this folder of the run that the table calls so."""
    candidates = [Path(name), LOGS / f"{name}.txt", LOGS / name]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_logs(paths: list[Path]) -> list[Run]:
    """The runs of these logs. Other files are named and skipped."""
    runs = []
    for path in paths:
        try:
            runs.append(read_log(path))
        except (OSError, ValueError) as error:
            print(f"skipped: {path}: {getattr(error, 'strerror', error)}", file=sys.stderr)
    return runs


def show(runs: list[Run], options: argparse.Namespace) -> None:
    """Print or draw what was asked for."""
    differing = differing_settings(runs)
    rows = [row(run, differing) for run in runs]
    if options.plot:
        draw(runs).savefig(options.plot)
    elif options.json:
        print(json.dumps(rows, indent=2))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, [*list(rows[0])[:-1], *differing], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | row["settings"] for row in rows)
    elif options.diff:
        for line in differences(*runs):
            color = {"-": 31, "+": 32, "@": 36}.get(line[:1])
            print(f"\x1b[{color}m{line}\x1b[0m" if color and sys.stdout.isatty() else line)
    else:
        print(*table(rows, shutil.get_terminal_size((1000, 0)).columns), sep="\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="path of a log, or name of a run")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", action="store_true", help="print the table as CSV")
    output.add_argument("--json", action="store_true", help="print the table as JSON")
    output.add_argument("--diff", nargs=2, metavar="LOG", help="print what differs between two runs")
    output.add_argument("--plot", metavar="FILE", help="draw curves into a .png, .svg or .pdf file")
    options = parser.parse_args(arguments)
    names = options.diff or options.logs
    runs = read_logs([*map(find_log, names)] or sorted([*LOGS.glob("*.txt"), *LOGS.glob("*.txt.[0-9]*")]))
    if not runs or (options.diff and len(runs) < 2):
        sys.exit("error: no logs to compare")
    if not options.diff:
        runs.sort(key=lambda run: (run.status() != "ranked", run.score or 0.0, run.name))
    try:
        show(runs, options)
    except ModuleNotFoundError as error:
        sys.exit(f"error: --plot needs {error.name}: run `pip install {error.name}`")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main(sys.argv[1:])
