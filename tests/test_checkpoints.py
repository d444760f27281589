"""Checkpoints and what goes on from them, scoring without training, and the quick look at a part of validation."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from conftest import train_tokenizer
from helpers import build_model, settings, write_shard
from runs import ON_CPU, Outcome, Process, command, environment

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Runs here are uncompiled where they do not ask for it: MLX's compiling takes a minute, the first time."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


RUN = dict(iterations=14, train_log_every=1, max_wallclock_seconds=0, warmdown_iters=6, val_loss_every=5)


def figures(done: Outcome) -> list[str]:
    """The log's lines of losses and scores, without the times, in their order."""
    lines = done.lines(r"^step:|^final_|^WARNING: starting epoch|^stopping_early")
    return [re.sub(r" (train_time|step_avg|tok_s|eval_time):\S+", "", line) for line in lines]


def figures_from(step: int, lines: list[str]) -> list[str]:
    """Those that come after so many steps; a validation before the next step is one of them."""
    first = next(i for i, line in enumerate(lines) if re.match(rf"step:{step}/\S+ val|step:{step + 1}/", line))
    return lines[first:]


class TestResume:
    @pytest.mark.parametrize(
        ("changes", "epochs"),
        [(dict(mlx_disable_compile=None), 0), (dict(compute_dtype="bfloat16"), 0),
         (dict(train_batch_tokens=1024, mlx_max_microbatch_tokens=512), 2)], ids=str)  # fmt: skip
    def test_later_figures_are_those_of_the_uninterrupted_run(self, run, start, changes, epochs):
        settings = dict(RUN, **changes)
        expected = figures(run(**settings, run_id="whole"))
        assert len(expected) == 14 + 4 + 2 + epochs  # steps; validations at 0, 5, 10 and 14; the score
        for number, every in ((1, 1), (2, 6)):
            process = start(**settings, checkpoint_every=every)
            process.wait_for("^checkpoint:", count=number)
            process.kill()
            done = run(**settings, checkpoint_every=every, resume="auto")
            assert (done.code, done.err) == (0, "")
            (line,) = done.lines("^resume:auto step:")
            step = int(line.rsplit(":", 1)[1])
            assert step >= number * every
            if ON_CPU:
                assert figures(done) == figures_from(step, expected)
            for path in done.folder.glob("r*"):
                path.unlink()

    def test_from_a_path_under_another_name_or_none(self, run):
        first = run(**RUN, checkpoint_every=10, run_id="first")
        path = first.folder / "first_checkpoint.safetensors"
        assert [re.search(r"step:(\d+)", line)[1] for line in first.lines("^checkpoint:")] == ["10", "14"]
        other = run(**{**RUN, "iterations": 16}, resume=path, run_id="second")
        assert other.code == 0
        assert other.lines("^run_id:second")
        assert other.lines(f"^resume:{path} step:14")
        assert "step:15/16 train_loss" in "\n".join(other.out)
        assert path.exists()
        names = set(other.files())
        same = run(**{**RUN, "iterations": 15}, resume=path, run_id=None)  # takes up the name it was written under
        assert same.lines("^run_id:first")
        assert set(same.files()) - names == {"first_mlx_model.npz.1", "first_mlx_model.int8.ptz.1"}

    def test_auto_starts_afresh_when_there_is_none(self, run):
        done = run(iterations=1, resume="auto")
        assert done.code == 0
        assert done.lines("^resume:auto no checkpoint: starting afresh")
        assert "step:1/1 train_loss" in "\n".join(done.out)

    def test_complete_run_goes_straight_to_scoring(self, run):
        first = run(iterations=5, checkpoint_every=3)
        again = run(iterations=5, checkpoint_every=3, resume="auto")
        assert again.losses() == []
        assert not again.lines("^warmup|^checkpoint:")
        assert figures(again) == figures(first)[5:]
        capped = run(iterations=10_000, max_wallclock_seconds=0.3, checkpoint_every=10_000, run_id="c")
        step = re.search(r"step:(\d+)/", capped.lines("^stopping_early")[0])[1]
        again = run(iterations=10_000, max_wallclock_seconds=0.3, checkpoint_every=10_000, run_id="c", resume="auto")
        assert again.losses() == []
        assert again.lines(rf"^stopping_early: wallclock_cap train_time:\d+ms step:{step}/")
        assert again.score() == capped.score()

    @pytest.mark.parametrize("out_dir", ["out", "./out/../out"])  # relative, as by default
    def test_log_goes_on_and_earlier_results_are_moved_aside(self, run, out_dir):
        run = functools.partial(run, out_dir=out_dir)
        first = run(iterations=3, checkpoint_every=3)
        before = (first.folder / "r.txt").read_text()
        with (first.folder / "r.txt").open("a") as file:
            file.write("half a li")  # of a run that was killed
        done = run(iterations=5, checkpoint_every=3, resume="auto")
        after = (first.folder / "r.txt").read_text()
        assert after.startswith(before + "half a li\n")
        assert after.count("# 10. The run -----") == 1  # the source is there once
        assert after[len(before) + len("half a li\n") :].splitlines() == done.out[1:]
        assert {"r_mlx_model.npz", "r_mlx_model.npz.1", "r_mlx_model.int8.ptz.1"} <= set(done.files())
        afresh = run(iterations=1, checkpoint_every=1)
        assert "r_checkpoint.safetensors.2" in afresh.files()

    def test_training_time_and_position_go_on(self, run):
        first = run(iterations=4, checkpoint_every=4)
        second = run(iterations=6, checkpoint_every=4, resume="auto")
        last = int(re.search(r"train_time:(\d+)ms", first.lines("^step:4/4 train")[0])[1])
        then = int(re.search(r"train_time:(\d+)ms", second.lines("^step:5/6 train")[0])[1])
        assert last <= then < last + 1000

    @pytest.mark.parametrize(
        "changes",
        [{"matrix_lr": 0.05}, {"seed": 1}, {"train_batch_tokens": 96}, {"warmdown_iters": 3}, {"beta2": 0.9},
         {"mlx_max_microbatch_tokens": 32}, {"model_dim": 32}, {"num_layers": 3}, {"scalar_lr": 0.1},
         {"grad_clip_norm": 1.0}, {"logit_softcap": 20.0}, {"muon_momentum": 0.9}, {"train_seq_len": 8}],
        ids=lambda changes: "-".join(changes))  # fmt: skip
    def test_settings_that_change_the_result_are_refused_by_name(self, resumed, changes):
        with pytest.raises(tg.InputError) as caught:
            resumed(**changes)
        (name,) = changes
        message = rf"RESUME=\S+: cannot go on from there: .*{name.upper()} was .* and is .*"
        assert re.fullmatch(message, str(caught.value))

    def test_every_other_setting_counts(self, resumed):
        free = {"data_path", "tokenizer_path", "run_id", "out_dir", "resume", "eval_artifact", "iterations",
                "warmup_steps", "max_wallclock_seconds", "checkpoint_every", "val_loss_every", "val_max_tokens",
                "train_log_every", "val_batch_size", "logit_chunk_tokens", "mlx_eager_eval"}  # fmt: skip
        counted = set(tg.settings_behind(resumed()))
        names = {name.upper() for name in tg.settings_of(tg.Hyperparameters).keys() - free}
        assert counted == names | {"DATA_PATH", "TOKENIZER_PATH", "COMPUTE_DTYPE", "CONTROL_TENSOR_NAME_PATTERNS",
                                   "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"}  # fmt: skip

    def test_so_do_those_of_a_fork(self, resumed):
        class Mine(tg.Hyperparameters):
            num_layers = 3
            my_setting = tg.Setting("mine", 5, "a setting of a fork")

        run = resumed()
        run.args = Mine()
        found = tg.settings_behind(run)
        assert (found["NUM_LAYERS"], found["MY_SETTING"]) == ("3", "5")

    def test_setting_that_is_gone(self, checkpoint, resumed):
        path = checkpoint / "r_checkpoint.safetensors"
        arrays, metadata = mx.load(str(path), return_metadata=True)
        about = json.loads(metadata["about"])
        about["settings"]["MY_SETTING"] = "3"
        mx.save_safetensors(str(path), arrays, {**metadata, "about": json.dumps(about)})
        with pytest.raises(tg.InputError, match="MY_SETTING was 3 and is None"):
            resumed()

    def test_another_tokenizer_of_the_same_size(self, resumed, tmp_path):
        other = tmp_path / "other.model"
        other.write_bytes(train_tokenizer(user_defined_symbols=["zz"]))
        with pytest.raises(tg.InputError, match="TOKENIZER_PATH was .* and is"):
            resumed(tokenizer_path=other)

    @pytest.mark.parametrize("name", ["CONTROL_TENSOR_NAME_PATTERNS", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"])
    def test_so_are_name_lists(self, resumed, monkeypatch, name):
        monkeypatch.setattr(tg, name, ("q_gain",))
        with pytest.raises(tg.InputError, match=f"{name} was .* and is"):
            resumed()

    def test_state_is_that_of_the_file(self, resumed, checkpoint):
        run = resumed()
        arrays = mx.load(str(checkpoint / "r_checkpoint.safetensors"))
        state = dict(tree_flatten(tg.training_state(run)))
        assert state.keys() == arrays.keys()
        assert all(mx.array_equal(state[name], arrays[name]) for name in arrays)
        assert all(state[name].dtype == arrays[name].dtype for name in arrays)
        assert (run.step, run.checkpointed_step, run.position) == (4, 4, (0, 528, 1))
        mx.random.seed(0)
        resumed()
        assert mx.random.state[0].tolist() == arrays["random"].tolist()

    def test_every_difference_is_named(self, checkpoint, run):
        done = run(out_dir=checkpoint, resume="auto", matrix_lr=0.05, seed=1, compute_dtype="bfloat16")
        for part in ("SEED was 1337 and is 1", "MATRIX_LR was 0.04 and is 0.05",
                     "COMPUTE_DTYPE was mlx.core.float32 and is mlx.core.bfloat16"):  # fmt: skip
            assert part in done.err

    def test_other_data_or_tokenizer_is_refused_and_moved_data_is_not(self, checkpoint, run, data, tmp_path):
        moved = tmp_path / "moved"
        shutil.copytree(data, moved)
        paths = dict(data_path=moved / "datasets/tiny", tokenizer_path=moved / "tokenizers/tiny.model")
        assert run(out_dir=checkpoint, resume="auto", **paths).code == 0
        shutil.copy(moved / "datasets/tiny/fineweb_train_000000.bin", moved / "datasets/tiny/fineweb_train_000002.bin")
        assert "DATA_PATH was data with checksum" in run(out_dir=checkpoint, resume="auto", **paths).err
        (moved / "datasets/tiny/fineweb_train_000002.bin").unlink()
        first = moved / "datasets/tiny/fineweb_train_000000.bin"
        right = first.read_bytes()
        write_shard(first, np.roll(tg.load_data_shard(first), 1))
        assert "DATA_PATH was data with checksum" in run(out_dir=checkpoint, resume="auto", **paths).err
        first.write_bytes(right)
        val = moved / "datasets/tiny/fineweb_val_000000.bin"
        val.write_bytes(val.read_bytes()[:-2] + b"\7\0")
        assert "DATA_PATH was" in run(out_dir=checkpoint, resume="auto", **paths).err

    def test_settings_that_do_not_are_let_through(self, checkpoint, run):
        done = run(out_dir=checkpoint, resume="auto", iterations=6, max_wallclock_seconds=50, train_log_every=2,
                   val_loss_every=3, checkpoint_every=2, warmup_steps=0, val_max_tokens=160)  # fmt: skip
        assert done.code == 0
        assert len(done.losses()) == 2

    @pytest.mark.parametrize(
        "damage", ["cut", "longer", "empty", "foreign", "other format", "npz", "no about", "shapes"]
    )
    def test_damaged_or_foreign_file_is_refused_in_one_line(self, checkpoint, resumed, damage):
        path = checkpoint / "r_checkpoint.safetensors"
        whole = path.read_bytes()
        arrays, metadata = mx.load(str(path), return_metadata=True)
        if damage == "cut":
            path.write_bytes(whole[:-1])
        elif damage == "longer":
            path.write_bytes(whole + b"\0" * 4)
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "foreign":
            path.write_bytes(b"hello" * 100)
        elif damage == "other format":
            mx.save_safetensors(str(path), arrays, {**metadata, "format": "pt"})
        elif damage == "npz":
            shutil.copy(checkpoint / "r_mlx_model.npz", path)
        elif damage == "no about":
            mx.save_safetensors(str(path), arrays, {"format": metadata["format"]})
        elif damage == "shapes":
            arrays["model.skip_weights"] = mx.ones((7, 7))
            mx.save_safetensors(str(path), arrays, metadata)
        with pytest.raises(tg.InputError) as caught:
            resumed()
        assert re.fullmatch(f"RESUME={path}: cannot go on from there: .*", str(caught.value))

    @pytest.mark.parametrize(
        "change",
        [{"run_id": "../evil"}, {"run_id": "/tmp/evil"}, {"run_id": 7}, {"run_id": ""}, {"step": "x"}, {"step": -5},
         {"step": 0}, {"step": None}, {"train_ms": "x"}, {"train_ms": -1.0}, {"train_ms": float("nan")},
         {"position": [99, 0, 1]}, {"position": [0, -50, 1]}, {"position": [0, 0, 0]}, {"position": [0, 1]},
         {"position": None}, {"settings": None}, {"settings": {}}],
        ids=str)  # fmt: skip
    def test_impossible_contents_are_refused(self, checkpoint, resumed, monkeypatch, change):
        path = checkpoint / "r_checkpoint.safetensors"
        arrays, metadata = mx.load(str(path), return_metadata=True)
        about = {**json.loads(metadata["about"]), **change}
        mx.save_safetensors(str(path), arrays, {**metadata, "about": json.dumps(about)})
        with pytest.raises(tg.InputError, match=f"RESUME={path}: cannot go on from there: ") as caught:
            resumed(run_id=None, resume=path)
        assert "\n" not in str(caught.value)

    def test_refused_one_leaves_everything_as_it_was(self, checkpoint, run):
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        done = run(out_dir=checkpoint, resume="auto", iterations=9, seed=2)
        assert (done.code, done.out) == (2, [])
        assert re.fullmatch(r"error: RESUME=\S+: cannot go on from there: .*SEED was 1337 and is 2\n", done.err)
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    def test_is_no_pickle_and_says_what_it_is(self, checkpoint):
        arrays, metadata = mx.load(str(checkpoint / "r_checkpoint.safetensors"), return_metadata=True)
        assert metadata["format"] == "parameter_golf_mlx_checkpoint_v1"
        about = json.loads(metadata["about"])
        assert (about["run_id"], about["step"], about["position"]) == ("r", 4, [0, 4 * 2 * (48 + 1 + 16 + 1), 1])
        assert about["train_ms"] > 0
        assert about["settings"]["MATRIX_LR"] == "0.04"
        assert "ITERATIONS" not in about["settings"]
        assert (arrays["random"].shape, arrays["random"].dtype) == ((2,), mx.uint32)
        names = {"model.tok_emb.weight", "muon.blocks.0.attn.c_q.weight", "adam_embed.tok_emb.weight.m",
                 "adam_scalar.blocks.1.attn.q_gain.v", "adam_scalar.step"}  # fmt: skip
        assert names <= arrays.keys()


@pytest.fixture(scope="session")
def four_steps(tmp_path_factory, data):
    """A finished run of 4 steps with its checkpoint, made once."""
    folder = tmp_path_factory.mktemp("four")
    subprocess.run(command(), cwd=folder, env=environment(data, folder, checkpoint_every=4), check=True,
                   capture_output=True)  # fmt: skip
    return folder / "out"


@pytest.fixture
def checkpoint(four_steps, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(four_steps, tmp_path / "four")


@pytest.fixture
def resumed(checkpoint, data, tmp_path, monkeypatch):
    """Set up a run as in a process of its own, with some settings changed, and resume that checkpoint."""

    def set_up(**changes) -> tg.Run:
        changes = {"out_dir": checkpoint, "resume": "auto", **changes}
        for name, value in environment(data, tmp_path, **changes).items():
            monkeypatch.setenv(name, value)
        args = tg.Hyperparameters()
        run = tg.set_up(args, tg.read_inputs(args))
        tg.resume(run)
        return run

    return set_up


def test_lines_printed_ahead_of_their_reader_are_not_lost(tmp_path):
    process = Process([sys.executable, "-c", "print('a\\nb\\nc\\nd')"], tmp_path, dict(os.environ))
    process.wait_for("^b")
    process.kill()
    assert process.finish().out == ["a", "b", "c", "d"]


def test_kill_at_any_moment_of_a_chain_of_fifty_loses_nothing(start, run):
    """Kill -9 during checkpoints, go on, kill again: each checkpoint is whole, none goes back, no loss differs."""
    chain = dict(iterations=200, train_log_every=1, checkpoint_every=1, warmup_steps=0, max_wallclock_seconds=0,
                 warmdown_iters=50)  # fmt: skip
    whole = run(**chain, run_id="whole")
    expected = {line.split("/")[0]: line.split(" ")[1] for line in whole.lines("train_loss")}
    rng, path, at, seen = random.Random(3), whole.folder / "r_checkpoint.safetensors", 0, {}
    for number in range(50):
        process = start(**chain, resume="auto")
        process.wait_for("^checkpoint:", count=rng.randint(1, 2))
        time.sleep(rng.random() * 0.004)  # anywhere in the next step or in its checkpoint
        process.kill()
        done = process.finish()
        for line in done.lines("train_loss"):
            seen[line.split("/")[0]] = line.split(" ")[1]
        _, metadata = mx.load(str(path), return_metadata=True)
        step = json.loads(metadata["about"])["step"]
        assert step > at, number
        at = step
    last = run(**chain, resume="auto")
    for line in last.lines("train_loss"):
        seen[line.split("/")[0]] = line.split(" ")[1]
    assert not [name for name in last.files() if name.endswith(".tmp")]
    if ON_CPU:
        assert seen == expected
        assert last.score() == whole.score()
    assert at < 200


def test_file_takes_its_name_only_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    path, events = tmp_path / "a.npz", []
    path.write_bytes(b"old")
    real_sync, real_replace = tg.os.fsync, type(path).replace
    monkeypatch.setattr(tg.os, "fsync", lambda fd: events.append(("sync", path.read_bytes(), os.fstat(fd).st_size))
                        or real_sync(fd))  # fmt: skip
    monkeypatch.setattr(type(path), "replace", lambda a, b: events.append(("replace", a.read_bytes()))
                        or real_replace(a, b))  # fmt: skip
    with tg.complete_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir() if p != path] == [".a.npz.tmp"]
    assert events == [("sync", b"old", 3), ("replace", b"new")]
    assert path.read_bytes() == b"new"
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()):
        with pytest.raises((tg.RunError, KeyboardInterrupt, ValueError)), tg.complete_file(path) as file:
            file.write(b"half")
            raise error
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.npz", b"new")]


class TestScoringOnly:
    def test_figures_are_those_of_the_run(self, run, four_steps, tmp_path):
        log = (four_steps / "r.txt").read_text().splitlines()
        (exact,) = [line for line in log if line.startswith("final_int8_zlib_roundtrip_exact")]
        (last,) = [line for line in log if line.startswith("step:4/4 val_loss")]
        before = {path.name: path.stat().st_mtime_ns for path in four_steps.iterdir()}
        done = run(eval_artifact=four_steps / "r_mlx_model.int8.ptz")
        assert (done.code, done.err) == (0, "")
        assert done.out[-1] == exact
        assert re.fullmatch(r"final_int8_zlib_roundtrip val_loss:\S+ val_bpb:\S+ eval_time:\d+ms", done.out[-2])
        assert done.files() == ["r.txt"]
        assert not done.lines("^warmup|^step:|^saved_model")
        npz = run(eval_artifact=four_steps / "r_mlx_model.npz", run_id="n")
        assert [line.split(" ")[0] for line in npz.out[-2:]] == ["final_npz", "final_npz_exact"]
        assert npz.out[-2].split(" ")[1:3] == last.split(" ")[1:3]
        assert not npz.lines("^final_int8")
        assert {path.name: path.stat().st_mtime_ns for path in four_steps.iterdir()} == before

    def test_under_the_runs_own_name_only_the_log_grows(self, run, checkpoint):
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        done = run(eval_artifact=checkpoint / "r_mlx_model.int8.ptz", out_dir=checkpoint)
        assert done.code == 0
        after = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        assert after.pop("r.txt").startswith(before.pop("r.txt"))
        assert after == before

    def test_needs_no_training_data(self, run, four_steps, data, tmp_path):
        folder = tmp_path / "data/datasets/tiny"
        folder.mkdir(parents=True)
        shutil.copy(data / "datasets/tiny/fineweb_val_000000.bin", folder)
        done = run(eval_artifact=four_steps / "r_mlx_model.int8.ptz", data_path=folder)
        assert done.code == 0
        assert done.out[-1] in (four_steps / "r.txt").read_text()

    def test_bfloat16_model_is_scored_in_float32(self, run, tmp_path):
        made = run(compute_dtype="bfloat16", iterations=1)
        assert made.lines("tok_emb:mlx.core.bfloat16")
        done = run(eval_artifact=made.folder / "r_mlx_model.int8.ptz", run_id="b")
        assert done.code == 0
        assert done.score() == pytest.approx(made.score(), rel=1e-2)

    def test_weights_that_are_not_finite_have_no_score(self, run, four_steps, tmp_path):
        weights = dict(mx.load(str(four_steps / "r_mlx_model.npz")))
        weights["skip_weights"] = weights["skip_weights"] * float("nan")
        mx.savez(str(tmp_path / "nan.npz"), **weights)
        done = run(eval_artifact=tmp_path / "nan.npz")
        assert (done.code, done.err) == (1, "error: after step 0 val_loss:nan is not finite\n")

    def test_file_of_another_model_or_none(self, run, four_steps, tmp_path):
        done = run(eval_artifact=four_steps / "r_mlx_model.int8.ptz", num_layers=3)
        assert done.code == 2
        assert re.fullmatch(r"error: \S+/r_mlx_model.int8.ptz: is no model that can be scored: .* more\n", done.err)
        (tmp_path / "x.ptz").write_text("hello")
        assert run(eval_artifact=tmp_path / "x.ptz").code == 2
        assert done.files() == ["r.txt", "r.txt.1"] or done.files() == ["r.txt"]


class TestQuickLook:
    def test_marks_every_figure(self, run):
        done = run(iterations=2, val_loss_every=1, val_max_tokens=199)
        assert done.code == 0
        assert done.lines("^val_loader:shards pattern=.* tokens:400$")
        lines = done.lines(r"^step:\d+/2 val_loss|^final_int8")
        assert len(lines) == 5
        assert all(line.endswith(" val_tokens:192/400") for line in lines)
        for line in done.lines(r"^step:\d+/2 val_loss|^final_int8_zlib_roundtrip "):
            before = done.out[: done.out.index(line)]
            warning = "WARNING: VAL_MAX_TOKENS=199: what follows is not the full score val_tokens:192/400"
            assert warning in before[-4:]

    def test_scores_the_first_tokens(self, run, data, tmp_path):
        quick = run(iterations=0, val_max_tokens=64)
        folder = tmp_path / "data/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", folder)
        path = folder / "fineweb_val_000000.bin"
        write_shard(path, tg.load_data_shard(path)[:65])
        short = run(iterations=0, data_path=folder, run_id="short")
        assert quick.score() == short.score()
        assert not short.lines("val_tokens:")

    def test_all_of_it_is_no_quick_look(self, run):
        done = run(iterations=0, val_max_tokens=400)
        assert not done.lines("val_tokens:|VAL_MAX_TOKENS")
        assert run(iterations=0, val_max_tokens=10**9, run_id="b").score() == done.score()


def test_optimizer_state_is_there_before_the_first_step_and_survives_a_round_trip(tmp_path):
    args = settings()
    model = build_model(args)
    run = tg.Run(args, None, model, tg.SplitOptimizers(model, args), None, None)
    names = {name for name, _ in tree_flatten(tg.training_state(run))}
    grads = tg.tree_map(lambda p: mx.ones_like(p) * 0.1, model.parameters())
    run.optimizers.step(model, grads, 0, 1.0)
    assert {name for name, _ in tree_flatten(tg.training_state(run))} == names
    assert len(names) == len(set(names))
    assert np.array(run.optimizers.adam_embed.state["tok_emb.weight"]["m"]).any()
