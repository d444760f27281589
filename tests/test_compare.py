"""logs/compare.py: what it reads in logs, its table, differences and curves."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

import compare
from programs import SCRIPT
from runs import read_log

RULE = "=" * 100
SOURCE = "#!/usr/bin/env python3\nprint(1)\niterations:{π}\n"
HEAD = f"{SOURCE}\n{RULE}\nRunning Python 3.11.7 (main)\nRunning MLX 0.31.0\n{RULE}\n"
CONFIGURATION = """\
run_id:a
mlx_version:0.31.0
train_loader:shards pattern=./data/fineweb_train_*.bin
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
WARNING: train_loader:subset dataset:fineweb10B train_shards:1/80 new epochs will arrive sooner than the full dataset
tokenizer_path:./data/tokenizers/fineweb_1024_bpe.model
model_params:17059912 vocab_size:1024 layers:9 dim:512 heads:8 kv_heads:4 seq_len:1024 tie_embeddings:True
iterations:20000 train_batch_tokens:524288 grad_accum_steps:8 microbatch_tokens:65536 microbatch_batch_size:64 \
val_batch_size:524288 warmup_steps:20 max_wallclock_seconds:600.000
mlx_max_microbatch_tokens:8192
optimizer:muon+adam muon_matrix_params:54 scalar_params:37 embed_lr:0.05 matrix_lr:0.04 scalar_lr:0.04 \
muon_momentum:0.95 muon_steps:5
compute_dtype:mlx.core.bfloat16 compile:True
"""
TRAINING = """\
warmup_step:1/20
step:1/20000 train_loss:6.9300 train_time:30000ms step_avg:30000.00ms tok_s:9000
step:2/20000 train_loss:6.5000 train_time:60000ms step_avg:30000.00ms tok_s:18000
step:3/20000 train_loss:6.0000 train_time:600000ms step_avg:200000.00ms tok_s:19000
"""
RESULT = """\
step:3/20000 val_loss:3.5000 val_bpb:2.1000 train_time:600000ms step_avg:200000.00ms
stopping_early: wallclock_cap train_time:600000ms step:3/20000
saved_model:logs/a_mlx_model.npz bytes:67000000
serialized_model_int8_zlib:15000000 bytes (payload:17000000 raw_pickle:17100000 payload_ratio:3.90x)
final_int8_zlib_roundtrip val_loss:3.5200 val_bpb:2.1120 eval_time:90000ms
final_int8_zlib_roundtrip_exact val_loss:3.52000000 val_bpb:2.11200000
"""
ORIGINAL = HEAD + CONFIGURATION + TRAINING + RESULT  # a log of the original script: no overrides, no total size
MARK = " val_tokens:1000/62021632"  # of a score of a part of the validation split


def scored(score: float, overrides: str = "", mark: str = "", stop: str = "wallclock_cap") -> str:
    """A log with this score and this project's additional lines."""
    text = ORIGINAL.replace("compute_dtype", f"overrides:{overrides}\nunknown:1 x:2\ncompute_dtype")
    text = text.replace("wallclock_cap", stop).replace("Running Python", "fork\nRunning Python")
    text = text.replace("2.11200000", f"{score:.8f}{mark}")
    return text.replace("2.1120 eval_time:90000ms", f"{score:.4f} eval_time:90000ms{mark}")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Takes the place of logs/. There is no terminal."""
    monkeypatch.setattr(compare, "LOGS", tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def logs(**texts: str) -> Path:
    """Write logs. Returns their folder."""
    for name, text in texts.items():
        (compare.LOGS / f"{name}.txt").write_text(text, encoding="utf-8")
    return compare.LOGS


def printed(capsys, *arguments: object) -> str:
    compare.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def rows(capsys, **texts: str) -> list[dict]:
    """The rows of the table, after these logs are written."""
    logs(**texts)
    return json.loads(printed(capsys, "--json"))


class TestReading:
    def test_a_log_of_the_original(self, capsys):
        (row,) = rows(capsys, a=ORIGINAL)
        assert (row["status"], row["steps"], row["stop"], row["seconds"]) == ("ranked", "3/20000", "wallclock_cap", 600)
        assert (row["tok/s"], row["before"], row["score"], row["change"]) == (18000, 2.1, 2.112, 0.012)
        assert row["bytes"] == 15_000_000 + len(SOURCE.encode()) == 16_000_000 - row["room"]

    def test_more_lines_and_fields(self, capsys):
        text = scored(2.2).replace("tok_s:18000", "x:1 tok_s:18000 y:1").replace(" train_time", " grad:1 train_time")
        (row,) = rows(capsys, a=text + "Total submission size int8+zlib: 16100000 bytes (100000 OVER the cap)\n")
        assert (row["seconds"], row["tok/s"], row["score"], row["room"]) == (600, 18000, 2.2, -100_000)
        assert "over the cap" in printed(capsys)

    def test_output_of_the_console_without_a_source(self, capsys):
        (row,) = rows(capsys, a=TRAINING.replace(" tok_s", " x") + RESULT)
        assert (row["status"], row["score"], row["bytes"], row["tok/s"]) == ("ranked", 2.112, None, None)

    def test_a_log_that_is_cut_off_anywhere(self):
        for end in range(ORIGINAL.index("mlx_max_microbatch_tokens"), len(ORIGINAL) + 1):
            run = read_log(logs(a=ORIGINAL[:end]) / "a.txt")
            assert run.status() == ("ranked" if "eval_time:90000ms\n" in ORIGINAL[:end] else "unfinished")

    def test_a_resumed_run_repeats_steps(self):
        path = logs(a=scored(2.2, stop="interrupted")) / "a.txt"
        step = "step:{}/20000 train_loss:6.1000 train_time:{}000ms step_avg:32500.00ms tok_s:18000\n".format
        expected = {step(4, 700): [6.93, 6.5, 6.0, 6.1], "resume:x step:2\n": [6.93, 6.5], step(2, 65): [6.93, 6.1]}
        for lines, losses in expected.items():
            path.write_text(path.read_text() + HEAD.replace("print(1)", "print(2)") + CONFIGURATION + lines)
            run = read_log(path)
            assert (run.status(), list(run.train_loss.values())) == ("unfinished", losses)
            assert (run.source, run.total_bytes) == (SOURCE.replace("print(1)", "print(2)"), None)
        assert (run.seconds, run.val_bpb) == ({1: 30, 2: 65}, {})

    def test_a_score_counts_more_than_a_later_quick_look(self, capsys):
        again = HEAD + CONFIGURATION + RESULT.partition("67000000\n")[2].replace(":15", ":14").replace("zlib", "x")
        look = re.sub("(final_.*)", f"\\1{MARK}", again.replace("2.112", "2.111"))
        logs(a=scored(2.2) + look, b=scored(1.9, mark=MARK) + again, c=scored(1.9, mark=MARK) + look)
        scores = [(row["run"], row["score"], row["status"]) for row in rows(capsys)]
        assert scores == [("b", 2.112, "ranked"), ("a", 2.2, "ranked"), ("c", 2.111, "quick look")]
        assert rows(capsys)[0]["bytes"] == 14_000_000 + len(SOURCE.encode())

    def test_files_that_are_not_logs_are_named_and_skipped(self, capsys):
        folder = logs(a=ORIGINAL, notes="buy milk", source_only=HEAD[:80])
        (folder / "binary.txt").write_bytes(bytes(range(256)))
        compare.main([])
        out, err = capsys.readouterr()
        assert re.findall(r"^\S+", out, re.M) == ["run", "a"]
        skipped = [str(folder / f"{name}.txt") for name in ("binary", "notes", "source_only")]
        assert re.findall(r"^skipped: (\S+): not the log of a run", err, re.M) == skipped


class TestTable:
    def test_ranked_scores_come_first_and_others_are_in_parentheses(self, capsys):
        unfinished = HEAD + CONFIGURATION + RESULT.splitlines(True)[0] + TRAINING
        logs(worse=scored(2.2), best=scored(2.1), quick=scored(1.1, mark=MARK), stopped=scored(1.2, stop="interrupted"))
        logs(killed=unfinished, failed=unfinished + "error: after step 3 train_loss is not finite\n")
        logs(ended=unfinished + "error: interrupted by SIGINT during warmup: no score\n")
        ranked = {"best": "ranked", "worse": "ranked"}
        others = {"ended": "interrupted", "failed": "failed", "killed": "unfinished", "quick": "quick look"}
        statuses = {row["run"]: row["status"] for row in rows(capsys)}
        assert list(statuses.items()) == [*ranked.items(), *others.items(), ("stopped", "interrupted")]
        lines = {line.split()[0]: line for line in printed(capsys).splitlines()}
        assert lines["best"].split()[1:6] == ["3/20000", "600", "18000", "2.1000", "2.1000"]
        assert lines["best"].endswith(" +0.0000 15,000,048 999,952  wallclock_cap")
        assert " (1.1000) " in lines["quick"] and lines["quick"].endswith("  quick look")

    def test_settings_that_differ(self, capsys):
        no_cap = scored(2.1, "RUN_ID=a OUT_DIR=x RESUME=auto MAX_WALLCLOCK_SECONDS=0.0").replace("600.000\n", "0.000\n")
        moved = scored(2.2, "RUN_ID=b TOKENIZER_PATH='my v1.0'").replace("tokenizers/fine", "my v1.0")
        shown = [row["settings"] for row in rows(capsys, a=no_cap, b=moved, c=scored(2.3))]
        assert shown == [{"MAX_WALLCLOCK_SECONDS": "0.0"}, {"TOKENIZER_PATH": "my v1.0"}, {}]
        assert "TOKENIZER_PATH='my v1.0'" in printed(capsys)

    def test_settings_of_logs_without_overrides(self, capsys):
        other = re.sub(r"(layers|dim|heads|seq_len|embed_lr|muon_steps):\S+", r"\1:7", ORIGINAL)
        names = "NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS TRAIN_SEQ_LEN TIED_EMBED_LR MUON_BACKEND_STEPS"
        assert rows(capsys, a=ORIGINAL, b=other)[1]["settings"] == dict.fromkeys(names.split(), "7")

    def test_all_logs_in_the_folder_and_those_moved_aside(self, capsys):
        folder = logs(a=scored(2.1))
        (folder / "a.txt.12").write_text(scored(2.2))
        (folder / "a.txt.bak").write_text(scored(2.3))
        assert re.findall(r"^\S+", printed(capsys), re.M) == ["run", "a", "a.txt.12"]

    def test_some_runs_by_name_or_path(self, capsys):
        path = logs(a=scored(2.1), b=scored(2.2), c=scored(2.3)) / "c.txt"
        path.with_name("b.txt.1").write_text(scored(2.4))
        assert re.findall(r"^\S+", printed(capsys, "a", path, "b.txt.1"), re.M) == ["run", "a", "c", "b.txt.1"]
        compare.main(["a", "nothing"])
        assert "nothing: No such file" in capsys.readouterr().err

    @pytest.mark.parametrize("width", [30, 60, 80, 120])
    def test_it_fits_the_terminal(self, monkeypatch, width, capsys):
        monkeypatch.setenv("COLUMNS", str(width))
        logs(a_run_with_a_long_name=scored(2.1, "BETA1=0.8 BETA2=0.9 DATA_PATH=/a-long/path"), b=scored(2.2))
        text = printed(capsys)
        assert max(map(len, text.splitlines())) <= width
        assert "2.1000" in text and ("952" in text) == (width > 30)  # figures are whole
        assert " ".join(text.split()).count("BETA1=0.8 BETA2=0.9 DATA_PATH=/a-long/path") == 1

    def test_csv_and_json_say_the_same(self, capsys):
        logs(a=scored(2.1, "SEED=7"), b=HEAD + CONFIGURATION)
        table = list(csv.DictReader(printed(capsys, "--csv").splitlines()))
        for row, flat in zip(json.loads(printed(capsys, "--json")), table, strict=True):
            row |= row.pop("settings")
            assert flat == {"SEED": ""} | {name: "" if value is None else str(value) for name, value in row.items()}


class TestDifferences:
    def test_scores_settings_versions_and_source(self, capsys):
        changed = scored(2.3, "SEED=7 NUM_LAYERS=10").replace("layers:9", "layers:10")
        logs(a=scored(2.1), b=changed.replace("print(1)", "print(2)").replace("MLX 0.31.0", "MLX 0.32.4"))
        lines = set(printed(capsys, "--diff", "a", "b").splitlines())
        assert lines >= {"score: 2.1000 -> 2.3000 (+0.2000)", "status: ranked -> ranked"}
        assert lines >= {"SEED: default -> 7", "NUM_LAYERS: 9 -> 10", "-Running MLX 0.31.0", "+Running MLX 0.32.4"}
        assert lines >= {"--- a: source", "+++ b: source", "-print(1)", "+print(2)", " iterations:{π}"}

    def test_identical_versions_and_sources_are_reported(self, capsys):
        logs(a=ORIGINAL, b=HEAD + CONFIGURATION)
        assert printed(capsys, "--diff", "a", "b").splitlines()[1:] == ["versions: identical", "source: identical"]

    def test_colors_are_for_terminals(self, monkeypatch, capsys):
        logs(a=scored(2.2), b=scored(2.1).replace("print(1)", "print(2)"))
        assert "\x1b" not in printed(capsys, "--diff", "a", "b")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert "\x1b[31m-print(1)\x1b[0m\n\x1b[32m+print(2)\x1b[0m\n" in printed(capsys, "--diff", "a", "b")

    def test_runs_that_are_missing_are_an_error(self):
        logs(a=scored(2.1))
        for arguments in (["nothing"], ["--diff", "a", "nothing"], ["--diff", "a", "a", "a"]):
            with pytest.raises(SystemExit, match="error: "):
                compare.main(arguments)


class TestCurves:
    def test_a_picture_is_written(self, tmp_path, capsys):
        logs(a=scored(2.1), b=HEAD + CONFIGURATION + RESULT.partition("\n")[2])
        printed(capsys, "--plot", tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_losses_and_scores_over_steps_and_over_time(self):
        first = "step:0/20000 val_loss:6.9000 val_bpb:4.1000 train_time:0ms step_avg:0.00ms\n"
        logs(a=scored(2.15).replace("warmup_step", first + "warmup_step"), b=HEAD + CONFIGURATION + TRAINING)
        figure = compare.draw(compare.read_logs(["a", "b"]))
        curves = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in figure.axes]
        losses, losses_in_time, scores, scores_in_time = curves
        assert losses == [([1, 2, 3], [6.93, 6.5, 6.0])] * 4  # points and a line, of a and of b
        assert losses_in_time == [([30, 60, 600], [6.93, 6.5, 6.0])] * 4
        assert scores == [([0, 3], [4.1, 2.1]), ([3], [2.15]), ([], [])]  # validation of a, its score, none of b
        assert scores_in_time == [([0, 600], [4.1, 2.1]), ([600], [2.15]), ([], [])]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (unfinished)"]
        assert [line.get_color() + line.get_marker() for line in figure.axes[0].lines] == ["C0o", "C0o", "C1s", "C1s"]

    def test_the_line_is_smooth(self):
        steps = "".join(f"step:{i}/99 train_loss:{5 + i % 2} train_time:{i}ms step_avg:1ms\n" for i in range(100))
        figure = compare.draw([read_log(logs(a=HEAD + CONFIGURATION + steps) / "a.txt")])
        points, line = (line.get_ydata() for line in figure.axes[0].lines)
        assert max(abs(loss - 5.5) for loss in points) == 0.5
        assert max(abs(loss - 5.5) for loss in line) < 0.1

    def test_without_matplotlib_the_error_says_how_to_get_it(self, monkeypatch, capsys):
        logs(a=scored(2.1))
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit, match="error: .*pip install matplotlib"):
            printed(capsys, "--plot", "curves.png")
        assert "2.1000" in printed(capsys)

    def test_a_file_that_cannot_be_written_is_named(self, tmp_path):
        logs(a=scored(2.1))
        for name in ("none/curves.png", "curves.xyz"):
            with pytest.raises(SystemExit, match=f"error: .*{name[-3:]}"):
                compare.main(["--plot", str(tmp_path / name)])


@pytest.mark.slow
class TestRealRuns:
    def test_a_run_that_was_moved_aside_by_a_quick_look(self, run, monkeypatch, capsys):
        done = run(val_loss_every=2)
        run(val_max_tokens=32, matrix_lr=0.01)
        monkeypatch.setattr(compare, "LOGS", done.folder)
        first, second = rows(capsys)
        assert (first["run"], first["steps"], first["status"]) == ("r.txt.1", "4/4", "ranked")
        assert f"val_bpb:{first['score']:.8f}" in done.lines("^final_.*_exact")[0]
        assert f"val_bpb:{first['before']:.4f}" in done.lines("^step:4/4 val_loss")[0]
        assert f"{first['bytes']} bytes ({first['room']} under" in done.lines("^Total submission size")[0]
        assert (second["status"], second["settings"]) == ("quick look", {"MATRIX_LR": "0.01", "VAL_MAX_TOKENS": "32"})

    def test_a_resumed_run(self, run):
        for iterations in (3, 5):
            done = run(iterations=iterations, checkpoint_every=1, resume="auto")
        (read,) = compare.read_logs([name := f"{done.folder}/r.txt"])
        assert (read.name, read.steps, list(read.train_loss), read.status()) == (name, "5/5", [1, 2, 3, 4, 5], "ranked")
        assert f"{read.score:.8f}" in done.lines("^final_.*_exact")[0]
        assert read.source == SCRIPT.read_text(encoding="utf-8")
