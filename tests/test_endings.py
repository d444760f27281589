"""How a run ends before its time: signals, a closed terminal, numbers that are not finite, a full disk, bad data."""

from __future__ import annotations

import errno
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import REPO, learnable_tokens, write_shard
from runs import ON_CPU, SCRIPT, Outcome, Process, command, environment

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Runs here are uncompiled where they do not ask for it: MLX's compiling takes a minute, the first time."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


FOR_EVER = dict(iterations=10_000_000, max_wallclock_seconds=0, train_log_every=1)
MANY_BATCHES = dict(val_batch_size=32)  # validation in 25 batches


def whole(outcome: Outcome) -> None:
    """Nothing is half-written, whatever the end."""
    assert not [name for name in outcome.files() if name.endswith(".tmp")]
    assert "Traceback" not in outcome.err
    for name in outcome.files():
        path = outcome.folder / name
        if name.endswith(".safetensors"):
            assert mx.load(str(path))["model.tok_emb.weight"].shape == (320, 16)
        elif name.endswith(".npz"):
            assert mx.load(str(path))["tok_emb.weight"].shape == (320, 16)
        elif name.endswith(".ptz"):
            tg.load_flat_state(path, dict(mx.load(str(path.with_name("r_mlx_model.npz")))))


@pytest.fixture
def long_validation(data, tmp_path) -> dict:
    """Settings with which validation takes a second or two: 750 batches of one sequence."""
    folder = tmp_path / "long/datasets/tiny"
    shutil.copytree(data / "datasets/tiny", folder)
    write_shard(folder / "fineweb_val_000000.bin", learnable_tokens(12_000, 320, 9))
    return dict(data_path=folder, val_batch_size=32)


class TestSignal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
    def test_first_in_training_ends_it_with_checkpoint_and_score(self, start, number):
        process = start(**FOR_EVER)
        process.wait_for("^step:7/")
        process.send(number)
        done = process.finish()
        assert (done.code, done.err) == (0, "")
        whole(done)
        (stop,) = done.lines("^stopping_early: interrupted ")
        found = re.fullmatch(r"stopping_early: interrupted train_time:(\d+)ms step:(\d+)/10000000", stop)
        last = done.lines("train_loss")[-1]
        assert last.startswith(f"step:{found[2]}/")  # the step under way was finished, and no other begun
        assert f"train_time:{found[1]}ms" in last
        order = [rf"^checkpoint:\S+ step:{found[2]}/", rf"^step:{found[2]}/.* val_loss", "^stopping_early",
                 "^saved_model", "^serialized", "^final_int8_zlib_roundtrip_exact"]  # fmt: skip
        positions = [done.out.index(done.lines(pattern)[0]) for pattern in order]
        assert positions == sorted(positions)
        assert len(done.lines(f"^interrupted:{number.name} ")) == 1
        assert done.files() == ["r.txt", "r_checkpoint.safetensors", "r_mlx_model.int8.ptz", "r_mlx_model.npz"]
        signalled = done.lines("^interrupted:")  # written by a thread of its own
        assert [line for line in done.log() if line not in signalled] == [
            line for line in done.out[1:] if line not in signalled]  # fmt: skip

    def test_first_in_warmup_ends_the_run_with_nothing(self, start):
        size = 2**16  # in one chunk, so that the warmup takes seconds
        process = start(**FOR_EVER, train_batch_tokens=size, grad_accum_steps=1, mlx_max_microbatch_tokens=size)
        process.wait_for("^warmup:")
        process.send(signal.SIGTERM)
        done = process.finish()
        assert (done.code, done.err) == (130, "error: interrupted by SIGTERM during warmup: no score; saved: nothing\n")
        assert done.files() == ["r.txt"]
        assert done.err.rstrip() in done.log()
        assert not done.lines("^step:")

    def test_first_in_a_validation_on_the_way_saves_what_was_trained(self, start, long_validation):
        process = start(**FOR_EVER, **long_validation, val_loss_every=3)
        process.wait_for("^val_progress:1/", count=2)
        process.send(signal.SIGINT)
        done = process.finish()
        checkpoint = done.folder / "r_checkpoint.safetensors"
        message = f"error: interrupted by SIGINT during validation: no score; saved: {checkpoint}\n"
        assert (done.code, done.err) == (130, message)
        assert done.lines(r"^checkpoint:\S+ step:3/")
        assert done.files() == ["r.txt", "r_checkpoint.safetensors"]
        whole(done)

    def test_first_in_the_final_scoring_tells_what_is_saved(self, start, long_validation):
        process = start(**long_validation, iterations=3)
        process.wait_for("^Total submission size")
        process.send(signal.SIGINT)
        done = process.finish()
        saved = [done.folder / name for name in ("r_mlx_model.npz", "r_mlx_model.int8.ptz")]
        assert done.code == 130
        assert done.err == ("error: interrupted by SIGINT during final scoring: no score; "
                            f"saved: {saved[0]}, {saved[1]}\n")  # fmt: skip
        whole(done)

    @pytest.mark.skipif(not ON_CPU, reason="a GPU is through with that step in less than a second")
    def test_second_leaves_within_a_second_while_mlx_computes(self, start):
        # One evaluation of this step is 0.8 TFLOP: many seconds, for all of it is one lazy graph.
        process = start(**FOR_EVER, warmup_steps=0, train_batch_tokens=10_000, mlx_max_microbatch_tokens=10_000,
                        grad_accum_steps=1, model_dim=512, num_layers=4, mlx_eager_eval=0)  # fmt: skip
        process.wait_for("^dtypes ")
        busy = cpu_seconds(process.popen.pid)
        while cpu_seconds(process.popen.pid) < busy + 1.0:  # it is well into the computation
            time.sleep(0.01)
        process.send(signal.SIGINT)
        process.wait_for("^interrupted:SIGINT ")
        assert process.popen.poll() is None
        began = time.perf_counter()
        process.send(signal.SIGTERM)
        done = process.finish()
        assert time.perf_counter() - began < 1.0
        assert (done.code, done.err) == (130, "")
        assert done.files() == ["r.txt"]

    def test_second_during_the_scoring_leaves_whole_files(self, start):
        process = start(**FOR_EVER, **MANY_BATCHES)
        process.wait_for("^step:5/")
        process.send(signal.SIGINT)
        process.wait_for("^val_progress:1/")
        process.send(signal.SIGINT)
        done = process.finish()
        assert done.code in (0, 130)  # 0: it was faster
        whole(done)

    def test_a_second_hangup_is_not_the_second_signal(self, start):
        process = start(**FOR_EVER)
        process.wait_for("^step:5/")
        process.send(signal.SIGHUP)
        process.wait_for("^interrupted:SIGHUP ")
        process.send(signal.SIGHUP)  # a terminal that closes sends several
        done = process.finish()
        assert done.code == 0
        assert done.lines("^final_int8_zlib_roundtrip_exact")

    def test_what_is_ignored_stays_ignored(self, start):
        process = start(**{**FOR_EVER, "iterations": 30},
                        options=dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)))  # fmt: skip
        process.wait_for("^step:2/")
        process.send(signal.SIGHUP)  # as nohup has it
        done = process.finish()
        assert done.code == 0
        assert len(done.losses()) == 30
        assert not done.lines("interrupted")

    def test_at_random_moments(self, start):
        rng = random.Random(5)
        ends = set()
        for _ in range(6):
            process = start(iterations=12, warmup_steps=2, val_loss_every=4, checkpoint_every=2, train_log_every=1)
            process.wait_for("", count=rng.randint(1, 45))
            for _ in range(rng.randint(1, 2)):
                process.send(rng.choice([signal.SIGINT, signal.SIGTERM]))
            done = process.finish()
            assert done.code in (0, 130)
            assert (done.code == 0) == bool(done.lines("^final_int8_zlib_roundtrip_exact"))
            whole(done)
            ends.add(done.code)
            shutil.rmtree(done.folder)
        assert ends == {0, 130}

    def test_compiler_that_the_signal_ends_too(self, start, tmp_path):
        if not shutil.which("g++") or sys.platform != "linux":
            pytest.skip("MLX compiles with g++ on Linux only")
        # Ctrl-C goes to all processes of the terminal, so also to the compiler that MLX started in a fresh folder.
        process = start(**FOR_EVER, tmpdir=tmp_path, mlx_disable_compile=None, options=dict(start_new_session=True))
        process.wait_for("^warmup:")
        while not any(b"cc1plus" in line for line in command_lines(process.popen.pid)) and process.popen.poll() is None:
            time.sleep(0.005)
        os.killpg(process.popen.pid, signal.SIGINT)
        done = process.finish()
        assert done.code == 130
        assert re.fullmatch("error: interrupted by SIGINT during .*: no score; saved: nothing\n", done.err)

    def test_handlers_are_put_back_and_another_thread_may_run_it(self, data, tmp_path):
        code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(REPO)!r})
import train_gpt_mlx
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
signal.signal(signal.SIGUSR1, lambda *_: None)  # another program's own business
real = train_gpt_mlx.warm_up
train_gpt_mlx.warm_up = lambda run: (os.kill(os.getpid(), signal.SIGUSR1), real(run))
train_gpt_mlx.main()
deadline = time.monotonic() + 20
while threading.active_count() > 1:
    assert time.monotonic() < deadline, "the watcher goes on"
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
assert signal.set_wakeup_fd(-1) == -1
thread = threading.Thread(target=train_gpt_mlx.main)
thread.start()
thread.join()
sys.stdout.flush()
os._exit(0)  # MLX 0.32 aborts at the exit of a process in which a thread that is over used it
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                              env=environment(data, tmp_path, iterations=0))  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("final_int8_zlib_roundtrip_exact") == 2
        assert "interrupted" not in done.stdout

    def test_none_after_the_run_hides_why_it_ended(self, run):
        """A launcher sends one to all ranks when one has gone, which they themselves may just be about to report."""
        code = f"""
import os, runpy, signal
set_wakeup_fd = signal.set_wakeup_fd
def ending(fd, **options):
    if fd == -1:
        os.close = lambda _: os.kill(os.getpid(), signal.SIGTERM)  # the last that the run does
    return set_wakeup_fd(fd, **options)
signal.set_wakeup_fd = ending
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
        done = run(script=("-c", code), matrix_lr=1e30, scalar_lr=1e30, tied_embed_lr=1e30)
        assert done.code == 1
        assert "not finite" in done.err

    def test_second_is_heard_when_the_console_is_held_up(self, start):
        process = start(**FOR_EVER, options=dict(pipesize=4096))
        process.wait_for("^step:3/")
        busy = cpu_seconds(process.popen.pid)
        while (now := cpu_seconds(process.popen.pid)) != busy:  # until the pipe is full, and its writer waits
            busy = now
            time.sleep(0.2)
        process.send(signal.SIGINT)
        process.send(signal.SIGTERM)
        assert process.popen.wait(timeout=20) == 130

    def test_second_removes_what_is_half_written(self, data, tmp_path):
        code = f"""
import os, sys, time
sys.path.insert(0, {str(REPO)!r})
import train_gpt_mlx
os.fsync = lambda fd: (print("syncing", flush=True), time.sleep(100))
train_gpt_mlx.main()
"""
        neighbour = tmp_path / "out/.r[1]_b_checkpoint.safetensors.tmp"
        neighbour.parent.mkdir()
        neighbour.write_text("of another run")
        process = Process([sys.executable, "-c", code], tmp_path, environment(data, tmp_path, **{
            **FOR_EVER, "run_id": "r[1]", "checkpoint_every": 2}))  # fmt: skip
        process.wait_for("^syncing")
        assert ".r[1]_checkpoint.safetensors.tmp" in os.listdir(neighbour.parent)
        process.send(signal.SIGINT)
        process.wait_for("^interrupted")
        process.send(signal.SIGINT)
        assert process.finish().code == 130
        assert sorted(os.listdir(neighbour.parent)) == [neighbour.name, "r[1].txt"]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    done = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True)
    if sys.platform == "linux":  # to the tick
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    minutes, seconds = re.search(r"(\d+):([\d.]+)", done.stdout).groups()
    return 60 * int(minutes) + float(seconds)


def command_lines(session: int) -> list[bytes]:
    """The command lines of a session's processes."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == session:
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            pass
    return found


class TestTerminal:
    def test_closed_one_counts_as_a_first_signal(self, data, tmp_path):
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(tmp_path)
            os.execve(sys.executable, command(), environment(data, tmp_path, **FOR_EVER))
        shown = b""
        while b"step:5/" not in shown:
            shown += os.read(terminal, 1000)
        os.close(terminal)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        log = (tmp_path / "out/r.txt").read_text().splitlines()
        assert any(line.startswith("interrupted:SIGHUP ") for line in log)
        assert log[-1].startswith("final_int8_zlib_roundtrip_exact ")

    def test_reader_that_goes_away_does_not_end_the_run(self, start):
        process = start(iterations=30, train_log_every=1)
        process.wait_for("^step:2/")
        process.popen.stdout.close()
        err = process.popen.stderr.read()
        assert (process.popen.wait(), err) == (0, b"")
        log = (process.folder / "r.txt").read_text().splitlines()
        assert any(line.startswith("step:30/30 train_loss") for line in log)
        assert log[-1].startswith("final_int8_zlib_roundtrip_exact ")

    def test_names_that_are_no_text_are_logged(self, run, data, tmp_path):
        folder = os.fsencode(tmp_path) + b"/d\xff"
        shutil.copytree(data, os.fsdecode(folder))
        done = run(iterations=0, data_path=os.fsdecode(folder + b"/datasets/tiny"))
        assert (done.code, done.err) == (0, "")
        assert done.lines(r"train_loader:shards pattern=.*d\\udcff/datasets")


class TestNumbers:
    def test_loss_that_is_not_finite_stops_the_run_at_its_step(self, run):
        done = run(iterations=500, tied_embed_lr=1e30, matrix_lr=1e30, train_log_every=1, checkpoint_every=100,
                   max_wallclock_seconds=0, warmdown_iters=1000)  # fmt: skip
        assert done.code == 1
        found = re.fullmatch(r"error: step:(\d+)/500 train_loss:(nan|inf) is not finite; lr_mul:(0\.\d+); the last "
                             r"finite losses: ([\d., ]+); what came after step 0 is not saved\n",
                             done.err)  # fmt: skip
        step = int(found[1])
        assert [f"{loss:.4f}" for loss in done.losses()][-5:] == found[4].split(", ")
        assert len(done.losses()) == step - 1
        assert float(found[3]) == pytest.approx((500 - step + 1) / 1000, abs=1e-4)
        assert done.log()[-1] == done.err.rstrip()
        assert not [name for name in done.files() if name in ("r_mlx_model.npz", "r_mlx_model.int8.ptz")]

    def test_weights_that_are_not_finite_are_neither_saved_nor_a_checkpoint(self, run):
        # The rate is far too high for one step: the loss before it is finite, the weights after it are not.
        overflow = dict(tied_embed_lr=2.9e38, matrix_lr=2.9e38, scalar_lr=2.9e38, iterations=1, warmdown_iters=0)
        for changes, stage in (({"checkpoint_every": 1}, "these are not finite, and are"), ({}, "not finite")):
            done = run(**overflow, **changes)
            assert done.code == 1
            assert re.search(f"^error: after step 1 .*{stage}", done.err)
            assert [name for name in done.files() if "txt" not in name] == []


class TestFullDisk:
    """A size limit for files stands for a full disk where there is no right to mount one."""

    def limited(self, size: int) -> dict:
        return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    def snapshot(self, done: Outcome) -> dict[str, bytes]:
        return {name: (done.folder / name).read_bytes() for name in done.files() if name != "r.txt"}

    def test_checkpoint_that_does_not_fit_leaves_the_last_one(self, run):
        first = run(model_dim=64, iterations=2, checkpoint_every=1)
        before = self.snapshot(first)
        limit = len(before["r_mlx_model.npz"]) + 50_000  # the log has room, and the model, but not the checkpoint
        assert SCRIPT.stat().st_size + 20_000 < limit < len(before["r_checkpoint.safetensors"])
        done = run(model_dim=64, iterations=4, checkpoint_every=1, resume="auto", options=self.limited(limit))
        path = done.folder / "r_checkpoint.safetensors"
        assert done.code == 1
        assert done.err == f"error: {path}: cannot be written: File too large; what was there before still is\n"
        assert done.log()[-1] == done.err.rstrip()
        assert path.read_bytes() == before[path.name]
        assert not done.lines("^final")
        whole_names = {"r_checkpoint.safetensors", "r_mlx_model.npz.1", "r_mlx_model.int8.ptz.1"}
        assert set(self.snapshot(done)) == whole_names
        again = run(model_dim=64, iterations=4, checkpoint_every=1, resume="auto")
        assert again.code == 0
        assert again.same_as_from(3, run(model_dim=64, iterations=4, run_id="other"))

    def test_checkpoint_that_does_not_fit_does_not_cost_an_interrupted_run_its_score(self, start):
        process = start(model_dim=64, **FOR_EVER, options=self.limited(400_000))  # the model has 320 kB
        process.wait_for("^step:5/")
        process.send(signal.SIGINT)
        done = process.finish()
        assert done.code == 0
        assert done.lines(r"^WARNING: \S+_checkpoint.safetensors: cannot be written: File too large")
        assert done.lines("^final_int8_zlib_roundtrip_exact")
        assert done.files() == ["r.txt", "r_mlx_model.int8.ptz", "r_mlx_model.npz"]

    def test_model_that_does_not_fit(self, run):
        done = run(model_dim=64, iterations=1, options=self.limited(SCRIPT.stat().st_size + 8_000))
        assert done.code == 1
        assert re.fullmatch(r"error: \S+/r_mlx_model.npz: cannot be written: File too large; .*\n", done.err)
        assert done.files() == ["r.txt"]

    def test_log_that_does_not_fit_before_the_run(self, run):
        done = run(iterations=1, options=self.limited(5_000))
        assert done.code == 2
        assert re.fullmatch(r"error: OUT_DIR=\S+: there is no room for \S+/r.txt\n", done.err)

    def test_log_that_fills_up_does_not_end_the_run(self, run):
        done = run(iterations=60, train_log_every=1, options=self.limited(SCRIPT.stat().st_size + 5_000))
        assert done.code == 0
        assert len(done.losses()) == 60
        assert done.lines("^final_int8_zlib_roundtrip_exact")
        assert re.match(r"WARNING: \S+/r.txt: File too large: a line is missing there\n", done.err)

    def test_disk_that_is_full(self, run, tmp_path):
        disk = tmp_path / "out"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=288k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small disk cannot be mounted here")
        try:
            first = run(iterations=2, run_id="a")
            assert first.code == 0
            before = {name: (disk / name).read_bytes() for name in first.files()}
            done = run(iterations=2, checkpoint_every=1, run_id="b")
            assert done.code in (1, 2)
            assert "No space left on device" in done.err
            assert "Traceback" not in done.err
            assert {name: (disk / name).read_bytes() for name in before} == before
            assert not [name for name in done.files() if name.endswith(".tmp")]
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class TestDataInTheRun:
    def test_what_only_shows_when_a_shard_is_opened_or_a_slice_is_taken(self, start, data, tmp_path):
        folder = tmp_path / "data/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", folder)
        process = start(**FOR_EVER, data_path=folder, warmup_steps=0)
        process.wait_for("^step:1/")  # 128 of the first shard's 1000 tokens
        write_shard(folder / "fineweb_train_000001.bin", learnable_tokens(50, 320, 7), count=99)
        done = process.finish()
        assert done.code == 1
        path = folder / "fineweb_train_000001.bin"
        assert done.err == f"error: {path}: has 1124 bytes; with 99 tokens it must have 1222\n"
        assert done.log()[-1] == done.err.rstrip()
        assert done.files() == ["r.txt", "r_checkpoint.safetensors"]

    def test_bad_id_later_in_a_shard_costs_no_step_before_it(self, run, data, tmp_path):
        folder = tmp_path / "data/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", folder)
        path = folder / "fineweb_train_000001.bin"  # after the first shard's 1000 tokens; a step takes 132
        tokens = tg.load_data_shard(path)
        right, tokens[300] = int(tokens[300]), 333
        write_shard(path, tokens)
        settings = dict(data_path=folder, iterations=12, train_log_every=1, warmup_steps=0)
        done = run(**settings)
        assert done.code == 1
        assert done.err.startswith(f"error: {path}: token 300 is 333, but VOCAB_SIZE=320: ")
        assert len(done.losses()) == 9
        assert done.files() == ["r.txt", "r_checkpoint.safetensors"]
        tokens[300] = right
        write_shard(path, tokens)
        again = run(**settings, resume="auto")
        assert again.code == 0
        assert again.same_as_from(10, run(**settings, run_id="whole"))

    def test_shard_that_disappears(self, start, data, tmp_path):
        folder = tmp_path / "data/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", folder)
        process = start(**FOR_EVER, data_path=folder, warmup_steps=0)
        process.wait_for("^step:1/")
        (folder / "fineweb_train_000001.bin").unlink()
        done = process.finish()
        assert done.code == 1
        assert "fineweb_train_000001.bin" in done.err
        assert "Traceback" not in done.err


def test_names_on_a_console_that_has_only_ascii(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "dé")
    done = run(iterations=0, data_path=tmp_path / "dé/datasets/tiny", pythonioencoding="ascii")
    assert (done.code, done.err) == (0, "")
    assert done.lines(r"train_loader:shards pattern=.*/d\\xe9/datasets")
    assert "/dé/datasets" in (done.folder / "r.txt").read_text(encoding="utf-8").rsplit("=" * 100, 1)[1]


def test_compiler_that_the_signal_ends_in_a_validation_costs_no_step(data, tmp_path):
    """As when Ctrl-C comes while MLX compiles for the first validation; the failure is MLX's own RuntimeError."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
import train_gpt_mlx as tg

def validate(run):
    os.kill(os.getpid(), signal.SIGINT)
    while not run.signal:
        time.sleep(0.001)
    raise RuntimeError("Could not load C++ shared library")

tg.validate = validate
sys.exit(tg.command_line([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=environment(data, tmp_path))  # fmt: skip
    path = tmp_path / "out/r_checkpoint.safetensors"
    assert done.returncode == 130
    assert done.stderr == f"error: interrupted by SIGINT during a computation: no score; saved: {path}\n"
    assert path.exists()


def test_console_that_is_gone_is_written_to_no_more(capsys):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "gone")

        def flush(self):
            raise OSError(errno.EIO, "gone")

        def fileno(self):
            raise OSError(errno.EBADF, "none")

    tg.tell("a line", Gone())
    tg.tell("another \udcff", sys.stdout)
    assert capsys.readouterr().out == "another \\udcff\n"


def test_quantized_values_that_overflow_are_not_saved(tmp_path):
    arrays = {"a": mx.array([1.0, 2.0]), "b": mx.array([1.0, np.inf]), "n": mx.array([1], dtype=mx.int32)}
    with pytest.raises(tg.RunError, match="after step 7 these are not finite, and are not saved: b"):
        tg.require_finite(arrays, 7)
    tg.require_finite({"a": arrays["a"], "n": arrays["n"]}, 7)
    assert dict(tree_flatten(arrays)).keys() == arrays.keys()
