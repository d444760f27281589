#!/usr/bin/env python3
"""Compare runs by their logs: the ones you name, by path or run name, or every log in this folder.

  python logs/compare.py                     a table, best score first
  python logs/compare.py --diff sample wide  what differs: score, settings, versions, and the source of the script
  python logs/compare.py --plot curves.png   training loss and val_bpb, over steps and over training time

Scores in parentheses are not ranked: these runs did not finish, or were scored on part of the validation split.
"""

import argparse
import csv
import difflib
import json
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import Run, read_log

LOGS = Path(__file__).parent
SUBMISSION_CAP_BYTES = 16_000_000

FORMATS = {  # the columns of figures
    "seconds": ".0f",
    "tok/s": ".0f",
    "before": ".4f",
    "score": ".4f",
    "change": "+.4f",
    "bytes": ",",
    "room": ",",
}


def shown_settings(run: Run) -> dict[str, str]:
    """Those that differ from their defaults, or else all that are logged."""
    return run.settings if run.overrides is None else run.overrides


def differing_settings(runs: list[Run]) -> list[str]:
    """The names of the shown settings that differ between runs."""
    names = {name for run in runs for name in shown_settings(run)} - {"RUN_ID", "OUT_DIR", "RESUME"}
    logged = [run.settings | shown_settings(run) for run in runs]
    return sorted(name for name in names if len({settings.get(name) for settings in logged}) > 1)


def row(run: Run, differing: list[str]) -> dict[str, Any]:
    """A row of the table. None stands for what the log does not have."""
    figures = dict.fromkeys(FORMATS)
    if run.seconds:
        figures["seconds"] = max(run.seconds.values())
    if run.tok_s:
        figures["tok/s"] = statistics.median(run.tok_s.values())
    if run.val_bpb:
        figures["before"] = run.val_bpb[max(run.val_bpb)]
    figures["score"] = run.score
    if run.val_bpb and run.score is not None:
        figures["change"] = round(run.score - figures["before"], 4)
    if run.total_bytes is not None:
        figures["bytes"] = run.total_bytes
        figures["room"] = SUBMISSION_CAP_BYTES - run.total_bytes
    settings = shown_settings(run)
    shown = {name: settings[name] for name in differing if name in settings}
    return {"run": run.name, "status": run.status(), "steps": run.steps, "stop": run.stop, **figures, "settings": shown}


def texts(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row, and a note: why the run ended early or is not ranked, and its settings."""
    cells = {"run": row["run"], "steps": row["steps"]}
    for column, form in FORMATS.items():
        cells[column] = "" if row[column] is None else format(row[column], form)
    notes = [row["stop"]]
    if row["status"] != "ranked":
        notes = [row["status"]]
        if cells["score"]:
            cells["score"] = f"({cells['score']})"
    if row["room"] is not None and row["room"] < 0:
        notes.append("over the cap")
    notes.append(" ".join(f"{name}={shlex.quote(value)}" for name, value in row["settings"].items()))
    return cells | {"note": ", ".join(filter(None, notes))}


def line_length(sizes: dict[str, int]) -> int:
    """The length of a line with columns of these sizes."""
    return sum(sizes.values()) + len(sizes) - 1


def table(rows: list[dict[str, Any]], width: int) -> Iterator[str]:
    """Lines of at most `width` characters, from about 25 up. Notes that do not fit beside the rows go below them."""
    heading = {column: column for column in ("run", "steps", *FORMATS)}
    lines = [heading | {"note": ""}, *map(texts, rows)]
    sizes = {column: max(len(line[column]) for line in lines) for column in heading}
    excess = max(line_length(sizes) - width, 0)
    sizes["run"] = max(sizes["run"] - excess, min(sizes["run"], 8))  # shorten names, to 8 characters at least
    for column in ("seconds", "tok/s", "before", "change", "bytes", "room"):
        if line_length(sizes) > width:
            del sizes[column]
    is_wide = line_length(sizes) + 2 + max(len(line["note"]) for line in lines) <= width
    for line in lines:
        name = line["run"]
        if len(name) > sizes["run"]:
            name = "…" + name[1 - sizes["run"] :]
        cells = [name.ljust(sizes["run"])]
        cells += [line[column].rjust(size) for column, size in sizes.items() if column != "run"]
        if is_wide:
            cells.append(f" {line['note']}")
        yield " ".join(cells).rstrip()
        if not is_wide:
            indent = {"initial_indent": "  ", "subsequent_indent": "  "}
            yield from textwrap.wrap(line["note"], width, break_on_hyphens=False, **indent)


def differences(a: Run, b: Run) -> Iterator[str]:
    """What differs between two runs, then the changes of versions and source as unified diffs."""
    if a.score is not None and b.score is not None:
        yield f"score: {a.score:.4f} -> {b.score:.4f} ({b.score - a.score:+.4f})"
    yield f"status: {a.status()} -> {b.status()}"
    for name in differing_settings([a, b]):
        values = []
        for run in (a, b):
            unlogged = "not logged" if run.overrides is None else "default"
            values.append((run.settings | shown_settings(run)).get(name, unlogged))
        yield f"{name}: {values[0]} -> {values[1]}"
    for part in ("versions", "source"):
        before, after = getattr(a, part).splitlines(), getattr(b, part).splitlines()
        changes = list(difflib.unified_diff(before, after, f"{a.name}: {part}", f"{b.name}: {part}", lineterm=""))
        yield from changes or [f"{part}: identical"]


def draw(runs: list[Run]) -> Any:
    """A matplotlib figure of curves, with a color and a marker for each run. Markers with a black edge are scores."""
    from matplotlib.figure import Figure  # here, because only --plot needs it

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, run in enumerate(runs):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X<>h"[number % 11]}
        label = run.name if run.status() == "ranked" else f"{run.name} ({run.status()})"
        losses = list(run.train_loss.values())
        reach = len(losses) // 20
        smooth = [statistics.fmean(losses[max(i - reach, 0) : i + reach + 1]) for i in range(len(losses))]
        for column in (0, 1):  # over steps, over seconds
            x = run.seconds if column == 1 else {step: step for step in run.seconds}
            loss_x = [x[step] for step in run.train_loss]
            val_x = [x[step] for step in run.val_bpb]
            loss_axes, val_axes = axes[:, column]
            loss_axes.plot(loss_x, losses, linestyle="", markersize=3, alpha=0.4, **style)
            loss_axes.plot(loss_x, smooth, markersize=6, markevery=0.15, **style)  # a marker tells runs apart in print
            val_axes.plot(val_x, list(run.val_bpb.values()), markersize=4, label=label, **style)
            if run.score is not None and val_x:
                val_axes.plot(val_x[-1], run.score, markersize=10, markeredgecolor="black", **style)
    axes[0, 0].set(ylabel="training loss (nats per token)")
    axes[1, 0].set(xlabel="steps", ylabel="val_bpb (bits per byte)")
    axes[1, 1].set(xlabel="training time (seconds)")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def find_log(name: str) -> Path:
    """The log at this path, or this folder's log of the run with this name."""
    candidates = [Path(name), LOGS / f"{name}.txt", LOGS / name]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_logs(names: list[str]) -> list[Run]:
    """The runs of these logs. Other files are reported and skipped."""
    runs = []
    for name in names:
        try:
            path = find_log(name)
            is_here = path.parent.resolve() == LOGS.resolve()
            runs.append(read_log(path, path.name.removesuffix(".txt") if is_here else name))
        except (OSError, ValueError) as error:
            print(f"skipped: {name}: {getattr(error, 'strerror', error)}", file=sys.stderr)
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
        columns = [name for name in rows[0] if name != "settings"] + differing
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
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
    output.add_argument("--diff", action="store_true", help="print what differs between two runs")
    output.add_argument("--plot", metavar="FILE", help="write curves to a .png, .svg or .pdf file")
    options = parser.parse_args(arguments)
    runs = read_logs(options.logs or sorted(map(str, [*LOGS.glob("*.txt"), *LOGS.glob("*.txt.[0-9]*")])))
    if not runs:
        sys.exit("error: no logs to compare")
    if options.diff and len(runs) != 2:
        sys.exit("error: --diff needs two logs")
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
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    main(sys.argv[1:])
