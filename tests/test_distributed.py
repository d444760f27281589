"""Runs of several processes: real jobs, started by MLX's launcher on loopback, held against runs of one process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import REPO, build_model, learnable_tokens, settings, write_shard
from runs import ON_CPU, SCRIPT, Outcome, Process, command, environment

MLX_VERSION = tuple(int(number) for number in re.findall("[0-9]+", mx.__version__)[:3])
LAUNCHER = Path(sys.executable).with_name("mlx.launch")
needs_launcher = pytest.mark.skipif(MLX_VERSION < (0, 32, 1), reason="several processes need MLX 0.32.1 or later")
CLOSE, CLOSE_AS_LOGGED = (1e-5, 3e-5) if ON_CPU else (1e-3, 1e-3)  # GPUs add in no fixed order; logs have 4 places
EIGHT = dict(grad_accum_steps=8, train_batch_tokens=384, val_batch_size=256, iterations=20, train_log_every=1)
SHORT = EIGHT | dict(iterations=4)
FOR_EVER = EIGHT | dict(iterations=10_000_000)

# A fork of the script, for what a test needs to see or to spoil: the ranks' own code goes in front of its last line.
FORK = f"import os, sys, time; sys.path.insert(0, {str(REPO)!r}); import train_gpt_mlx as base; import mlx.core as mx\n"
RANK = "rank = int(os.environ.get('MLX_RANK', '0'))\n"
LAST_LINE = "sys.exit(base.command_line(sys.argv[1:]))\n"
EXACT_LOSSES = """
inner = base.loss_and_grad_chunked
def outer(*args):
    loss, grads = inner(*args)
    if rank == 0:
        print(f"exact:{loss.item():.9f}", flush=True)
    return loss, grads
base.loss_and_grad_chunked = outer
"""


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(20_000 + os.getpid() * 37 % 10_000, 32_000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + i))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


class Job(Process):
    """A run of several processes that is under way. Launcher and ranks write to one pipe each, line by line."""

    def __init__(self, options: list, command: list, folder: Path, environment: dict[str, str]) -> None:
        # The launcher (MLX 0.32.4) never sleeps while a rank could take input, or when there is no more of it, and a
        # core is half of CI's machine. So it gets more than fits into the ranks' pipes, which they never read, and no
        # end of it.
        reader, self.input = os.pipe()
        arguments = [str(argument) for argument in [LAUNCHER, *options, "--", *command]]
        super().__init__(arguments, folder, environment, stdin=reader)
        os.close(reader)
        with contextlib.suppress(BrokenPipeError):  # it ended already
            os.write(self.input, bytes(100_000))

    def end(self) -> None:
        """Kill what still runs."""
        self.popen.kill()
        for path in self.folder.parent.glob("pid*"):
            subprocess.run(["kill", "-9", path.read_text().strip()], capture_output=True, check=False)
        self.popen.communicate()
        os.close(self.input)

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        return int((self.folder.parent / f"pid{number}").read_text())

    def kill_rank(self, number: int, by: int = signal.SIGKILL) -> None:
        os.kill(self.rank(number), by)

    def alive(self, size: int) -> list[int]:
        return [rank for rank in range(size) if Path(f"/proc/{self.rank(rank)}/cmdline").exists()]


@pytest.fixture
def job(data, tmp_path):
    """Start a job of so many processes. `fork` is code for a fork of the script, `prelude` shell code that each rank
    runs before it; both know the rank. What is still running at the end of the test is killed."""
    jobs: list[Job] = []

    def started(size: int, prelude: str = "", fork: str = "", **changes) -> Job:
        script = SCRIPT
        if fork:
            script = tmp_path / f"fork{len(jobs)}.py"
            script.write_text(FORK + RANK + fork + LAST_LINE)
        options = ["-n", size, "--starting-port", free_ports(size)]
        shell = ["bash", "-c", f'echo $$ >"{tmp_path}/pid$MLX_RANK"; {prelude}\nexec "$0" "$@"']
        started_by = [*shell, *command(script=(str(script),))]
        jobs.append(Job(options, started_by, tmp_path, environment(data, tmp_path, **changes)))
        return jobs[-1]

    yield started
    for each in jobs:
        each.end()


def exact(outcome: Outcome) -> list[float]:
    return [float(line.split(":")[1]) for line in outcome.lines("^exact:")]


def log_of(outcome: Outcome) -> list[str]:
    """Its lines, without figures and names of files."""
    changing = r"(loss|bpb):[0-9.]+|train_time.*|eval_time.*|step_avg.*|/\S+|world_size.*|int8.*"
    return [re.sub(changing, "", line) for line in outcome.out if not line.startswith("exact")]


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """That the job said these things, in no more than a line for each rank, and left nothing behind."""
    for part in parts:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.lines("step:")
    assert not outcome.folder.exists()


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Outcome:
    """The run of one process that the jobs are held against."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "alone.py").write_text(FORK + RANK + EXACT_LOSSES + LAST_LINE)
    done = subprocess.run(command(script=(str(folder / "alone.py"),)), cwd=folder, capture_output=True, text=True,
                          env=environment(data, folder, **EIGHT), check=True)  # fmt: skip
    return Outcome(done.returncode, done.stdout.splitlines(), done.stderr, folder / "out")


@pytest.mark.slow
@needs_launcher
class TestSameAsOneProcess:
    @pytest.mark.parametrize("size", [2, 4])
    def test_losses_score_and_log(self, alone, job, size):
        done = job(size, fork=EXACT_LOSSES, **EIGHT).finish()
        assert (done.code, done.err) == (0, "")
        assert len(exact(alone)) == 20 + 1  # the first is the warmup's
        assert exact(done)[1:] == pytest.approx(exact(alone)[1:], rel=CLOSE)
        assert done.lines("world_size") == [f"world_size:{size}"]
        assert len(done.lines("WARNING: starting epoch:2")) == 1  # all walk the same stream, across files and epochs
        assert log_of(done) == log_of(alone)
        assert done.score() == pytest.approx(alone.score(), rel=CLOSE)
        assert done.files() == alone.files()  # of rank 0 alone
        assert done.log() == [line for line in done.out[1:] if not line.startswith("exact")]

    @pytest.mark.parametrize("size", [1, 8])
    def test_of_the_launcher_and_eight(self, job, alone, size):
        done = job(size, fork=EXACT_LOSSES, **SHORT).finish()
        assert (done.code, done.err) == (0, "")
        assert exact(done)[1:] == pytest.approx(exact(alone)[1:5], rel=CLOSE)
        assert done.lines("world_size") == [f"world_size:{size}"]

    @pytest.mark.parametrize(("size", "batch", "batches"), [(2, 256, 13), (4, 512, 7), (2, 3200, 1)])
    def test_validation(self, alone, job, size, batch, batches):
        artifact = alone.folder / "r_mlx_model.int8.ptz"
        done = job(size, **EIGHT | dict(eval_artifact=artifact, val_batch_size=batch)).finish()
        assert (done.code, done.err) == (0, "")
        assert done.score() == pytest.approx(alone.score(), rel=CLOSE / 10)
        bpb = [float(outcome.lines("_exact")[0].split("val_bpb:")[1]) for outcome in (done, alone)]
        assert bpb[0] == pytest.approx(bpb[1], rel=CLOSE / 10)
        logged = [f"val_progress:{i}/{batches}" for i in (1, batches) if batches > 1]
        assert done.lines("val_progress") == logged  # as one process does, whichever rank has the last batch

    def test_without_eager_evaluation_and_with_clipping(self, job, run):
        changes = SHORT | dict(mlx_eager_eval=0, grad_clip_norm=0.1, val_max_tokens=64, checkpoint_every=2)
        alone, done = run(**changes, run_id="alone"), job(2, **changes).finish()
        assert (done.code, done.err) == (0, "")
        assert done.losses() == pytest.approx(alone.losses(), rel=CLOSE_AS_LOGGED)  # they are logged to four places
        assert len(done.lines("^checkpoint:")) == 2
        assert done.lines("_exact .*val_tokens:64/400")


def ranks_of(args: tg.Hyperparameters, size: int, function) -> list:
    """What the function returns on each rank, when the ranks share nothing."""
    results = []
    for rank in range(size):
        world = tg.World()
        world.rank, world.size = rank, size
        world.mean = lambda loss, grads: (loss, grads)
        results.append(function(world))
    return results


def test_each_rank_reads_its_microbatches_alone_and_all_end_at_one_place(tmp_path, monkeypatch):
    write_shard(tmp_path / "fineweb_train_0.bin", learnable_tokens(150, 64, 7))
    args = settings(data_path=str(tmp_path), train_batch_tokens=128, grad_accum_steps=4, mlx_max_microbatch_tokens=24)
    model, pattern = build_model(args), args.train_files
    read: list[int] = []
    monkeypatch.setattr(tg, "check_token_ids", lambda tokens, *_: read.append(len(tokens)))

    def step(world: tg.World):
        read.clear()
        loader = tg.TokenLoader(pattern)
        loss_and_grad = tg.nn.value_and_grad(model, model.loss)
        loss, grads = tg.loss_and_grad_chunked(args, loader, loss_and_grad, 4, world)
        return loss.item(), dict(tree_flatten(grads)), (loader.stream.pos, loader.stream.epoch), sum(read)

    (alone,) = ranks_of(args, 1, step)
    for size in (2, 4):
        ranks = ranks_of(args, size, step)
        assert {place for _, _, place, _ in ranks} == {alone[2]}
        assert [tokens for *_, tokens in ranks] == [alone[3] // size] * size  # 34 tokens a microbatch: 25 and 9
        assert np.mean([loss for loss, *_ in ranks]) == pytest.approx(alone[0], rel=1e-6)
        for key, grad in alone[1].items():
            mean = sum(grads[key] for _, grads, *_ in ranks) / size
            assert np.array(mean) == pytest.approx(np.array(grad), rel=1e-4, abs=1e-6)


def test_comparison_of_parameters_sees_a_last_bit_and_takes_any_shape():
    class Model(tg.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scalar, self.half = mx.array(1.0), mx.ones((3, 2), dtype=mx.bfloat16)

    def crc_of(model: Model) -> int:
        world, seen = tg.World(), []
        world.size, world.gather = 2, lambda crc: seen.append(crc) or [crc, crc]
        world.require_same(model, step=3)
        return seen[0]

    models = [Model() for _ in range(4)]
    models[2].scalar = mx.array(np.nextafter(np.float32(1.0), np.float32(2.0)))
    models[3].half[2, 1] = 1.0078125
    assert [crc_of(model) == crc_of(models[0]) for model in models] == [True, True, False, False]


def test_watch_counts_what_hangs_up_during_the_run_while_it_is_waited_for(monkeypatch):
    """What happens does so in the watch's own seconds, which take no time."""
    ready, ended, seconds, codes = threading.Event(), threading.Event(), [], []
    pairs = [socket.socketpair() for _ in range(3)]
    happens = {
        1: lambda: [end.close() for end in pairs[2]] + [setattr(world, "waiting", True)],  # sockets of its own
        51: lambda: [pairs[1][1].close(), setattr(world, "waiting", False)],
        101: lambda: setattr(world, "waiting", True),
    }

    def sleep(duration: float) -> None:
        ready.wait()
        seconds.append(duration)
        happens.get(len(seconds), lambda: None)()
        if len(seconds) > 200:
            sys.exit()  # the thread alone

    monkeypatch.setattr(tg.time, "sleep", sleep)
    monkeypatch.setattr(tg.os, "_exit", lambda code: codes.append(code) or ended.set())
    with contextlib.ExitStack() as stack:
        for each in (each for pair in pairs for each in pair):
            stack.enter_context(each)
        pairs[0][1].close()  # as MLX leaves a connection that did not come about
        world = tg.World(rank=1, size=2)
        ready.set()
        assert ended.wait(30)
    assert codes == [1]
    assert seconds == [1.0] * 110  # ten after the last event, itself among them


@pytest.mark.slow
@needs_launcher
class TestRefusedAtTheStart:
    def test_microbatches_that_cannot_be_shared(self, job):
        done = job(4, **SHORT | dict(grad_accum_steps=6, train_batch_tokens=768)).finish()
        assert_refused(done, "error: GRAD_ACCUM_STEPS=6: must be divisible by the world size", "4 processes")

    def test_all_that_differs_is_named(self, job, data, tmp_path):
        other = tmp_path / "other/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", other)
        write_shard(other / "fineweb_val_000000.bin", learnable_tokens(409, 320, 10))
        (tmp_path / "script.py").write_text(SCRIPT.read_text() + "# another\n")
        prelude = f"""if [ $MLX_RANK = 1 ]; then
            export SEED=7 ITERATIONS=5 RUN_ID=other DATA_PATH={other}; set -- {tmp_path}/script.py; fi"""
        done = job(2, prelude, **SHORT).finish()
        assert_refused(
            done, "all processes of a run must agree", "SEED is 1337 on rank 0 and 7 on rank 1",
            "ITERATIONS is 4 on rank 0 and 5 on rank 1", "DATA_PATH is data with checksum",
        )  # fmt: skip
        assert re.search(r"script.py is one with checksum|train_gpt_mlx.py is one with checksum", done.err)
        assert "RUN_ID" not in done.err

    def test_what_is_missing_on_one(self, job):
        done = job(2, "if [ $MLX_RANK = 1 ]; then export DATA_PATH=/none; fi", **SHORT).finish()
        assert_refused(done, "error: rank 1: DATA_PATH=/none: no such folder")

    def test_older_mlx(self, monkeypatch):
        class Group:
            rank, size = (lambda self: 1), (lambda self: 2)

        monkeypatch.setattr(tg.mx.distributed, "init", Group)
        monkeypatch.setattr(tg.mx, "__version__", "0.32.0")
        with pytest.raises(tg.InputError, match=r"MLX 0\.32\.0 is too old"):
            tg.World.join()

    def test_processes_that_do_not_connect(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("MLX_RANK", "0")
        (tmp_path / "hosts.json").write_text("no JSON")
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
        done = run()
        assert done.code == 2
        assert done.err.startswith("error: the processes cannot connect: ")
        assert done.err.count("\n") == 1


@pytest.mark.slow
@needs_launcher
class TestFromRankZero:
    def test_name_checkpoint_and_artifact(self, job, alone):
        """The others have neither the files nor the name."""
        prelude = "if [ $MLX_RANK = 1 ]; then mkdir -p elsewhere; cd elsewhere; fi"
        begun = job(2, prelude, **EIGHT | dict(iterations=14, checkpoint_every=7), out_dir="out", run_id=None).finish()
        (name,) = [line.split(":")[1] for line in begun.lines("^run_id:")]
        checkpoint = f"out/{name}_checkpoint.safetensors"
        done = job(2, prelude, **EIGHT, out_dir="out", resume=checkpoint, run_id=None).finish()
        assert (done.code, done.err) == (0, "")
        assert done.lines("^run_id:") == [f"run_id:{name}"]
        assert done.losses() == pytest.approx(alone.losses()[14:], rel=CLOSE_AS_LOGGED)
        assert done.score() == pytest.approx(alone.score(), rel=CLOSE)
        again = job(2, prelude, **EIGHT, out_dir="out", eval_artifact=f"out/{name}_mlx_model.int8.ptz").finish()
        assert again.score() == done.score()
        assert not (done.folder.parent / "elsewhere/out").exists()

    def test_clock(self, job):
        """The other's runs a thousand times as fast; all end in one step nonetheless."""
        fast = """
if rank == 1:
    clock = time.perf_counter
    time.perf_counter = lambda: 1000 * clock()
"""
        changes = FOR_EVER | dict(max_wallclock_seconds=1.0, warmdown_iters=50)
        done = job(2, fork=fast, **changes).finish(60)
        assert (done.code, done.err) == (0, "")
        (stop,) = done.lines("^stopping_early: wallclock_cap")
        assert 1000 <= int(re.search(r"train_time:(\d+)ms", stop)[1]) < 100_000  # and by the slower clock
        assert done.lines("_exact")


@pytest.mark.slow
@needs_launcher
class TestEndings:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_one_signal_ends_all_in_good_order(self, job, rank):
        process = job(2, **FOR_EVER)
        process.wait_for("^step:5/")
        process.kill_rank(rank, signal.SIGTERM)
        done = process.finish(60)
        assert (done.code, done.err) == (0, "")
        (stop,) = done.lines("^stopping_early: interrupted")
        assert len(done.lines(f"^checkpoint:.* step:{re.search(r'step:([0-9]+)', stop)[1]}/")) == 1
        assert done.lines("_exact")

    @pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 2), (2, 0)])
    def test_death_of_one_ends_all(self, job, run, alone, size, rank):
        process = job(size, **FOR_EVER | dict(checkpoint_every=2))
        process.wait_for("^step:3/")
        died = time.monotonic()
        process.kill_rank(rank)
        done = process.finish(60)
        assert time.monotonic() - died < 20
        assert process.alive(size) == []
        assert re.search(r"error: (rank \d: )?another process of the run is gone", done.err)
        assert "Traceback" not in done.err
        assert not done.lines("final_int8|val_loss")
        (path,) = done.folder.glob("*_checkpoint.safetensors")
        step = int(mx.load(str(path), return_metadata=True)[1]["about"].split('"step": ')[1].split(",")[0])
        assert step >= 3 if rank else step >= 2  # rank 0 writes one of the last whole step
        resumed = run(**EIGHT, resume="auto")  # in a world of another size
        assert resumed.losses() == pytest.approx(alone.losses()[step:], rel=CLOSE_AS_LOGGED)
        assert resumed.score() == pytest.approx(alone.score(), rel=CLOSE)

    def test_mlx_that_waits_for_ever_for_a_rank_that_died(self, job):
        stuck = """
inner = base.World.wait
def wait(self, *arrays):
    inner(self, *arrays)
    if rank == 0 and os.path.exists("dead"):
        self.waiting = True
        while True:
            time.sleep(1)
base.World.wait = wait
"""
        process = job(2, fork=stuck, **FOR_EVER)
        process.wait_for("^step:3/")
        (process.folder.parent / "dead").touch()
        time.sleep(0.5)
        process.kill_rank(1)
        done = process.finish(30)
        assert "error: rank 0: another process of the run is gone" in done.err
        assert process.alive(2) == []

    @pytest.mark.parametrize(("size", "drifter", "at", "found"), [(4, 0, 2, 4), (2, 1, 0, 0)])
    def test_ranks_that_drift_are_named(self, job, size, drifter, at, found):
        """At the next validation, and in the warmup if they do so from the first step."""
        drift = f"""
inner = base.SplitOptimizers.step
def step(self, model, grads, step, lr_mul):
    inner(self, model, grads, step, lr_mul)
    if rank == {drifter} and step == {at}:
        model.skip_weights = model.skip_weights + 1e-7
base.SplitOptimizers.step = step
"""
        done = job(size, fork=drift, **EIGHT | dict(val_loss_every=2)).finish(60)
        assert f"rank {drifter} drifted: after step {found} " in done.err
        assert len(done.lines("val_loss")) == at  # of steps 0 and 2, or none
        assert "Traceback" not in done.err
        assert not done.lines("final_int8")

    def test_loss_that_is_not_finite(self, job):
        done = job(2, **EIGHT | dict(matrix_lr=1e30, scalar_lr=1e30, tied_embed_lr=1e30)).finish(60)
        assert re.search(r"error: step:\d+/20 train_loss:nan is not finite", done.err)
        assert done.files() == ["r.txt"]

    def test_damaged_data_that_one_meets(self, job, data, tmp_path):
        """Only its rank converts it; nothing that was learned is lost."""
        folder = tmp_path / "damaged/datasets/tiny"
        shutil.copytree(data / "datasets/tiny", folder)
        tokens = tg.load_data_shard(folder / "fineweb_train_000001.bin")
        tokens[129] = 65_000  # position 1,129 of the stream, with 49 tokens a microbatch: number 7 of step 3
        write_shard(folder / "fineweb_train_000001.bin", tokens)
        done = job(2, data_path=folder, **EIGHT).finish(60)
        assert "error: rank 1: " in done.err
        assert "token 129 is 65000" in done.err
        assert "Traceback" not in done.err
        assert done.lines("^checkpoint:.* step:2/20")


@pytest.fixture
def hosts(tmp_path):
    """Two hosts, h0 and h1, at 10.77.0.1 and 10.77.0.2: network namespaces that reach each other only. What is on the
    PATH as ssh runs a command in one of them, with none of this process's environment."""
    names = [f"h{i}-{os.getpid()}" for i in (0, 1)]
    ip = shutil.which("ip")
    if not ip or os.geteuid() != 0 or subprocess.run([ip, "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces need Linux, root and the ip command")
    try:
        subprocess.run([ip, "netns", "add", names[1]], check=True)
        ends = ["veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1]]
        subprocess.run([ip, "link", "add", *ends], check=True)
        for i, name in enumerate(names):
            subprocess.run([ip, "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"veth{i}"], check=True)
            subprocess.run([ip, "-n", name, "link", "set", f"veth{i}", "up"], check=True)
            subprocess.run([ip, "-n", name, "link", "set", "lo", "up"], check=True)
        ssh = tmp_path / "bin/ssh"
        ssh.parent.mkdir()
        ssh.write_text(f"""#!/bin/bash
while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
exec env -i PATH="$PATH" MLX_DISABLE_COMPILE=1 {ip} netns exec "$1" bash -c "$2"
""")
        ssh.chmod(0o755)
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@needs_launcher
def test_two_hosts(hosts, data, run, tmp_path, monkeypatch):
    """As the README has it: a hostfile, and each setting given to the launcher, for ssh passes none on."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    alone = run(run_id="alone", **SHORT)
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([{"ssh": name, "ips": [f"10.77.0.{i + 1}"]} for i, name in enumerate(hosts)]))
    here = environment(data, tmp_path, **SHORT)
    ours = {name: value for name, value in here.items() if os.environ.get(name) != value}
    options = ["--hostfile", hostfile, *(f"--env={name}={value}" for name, value in ours.items())]
    process = Job(options, command(), tmp_path, os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    try:
        done = process.finish(60)
    finally:
        process.end()
    assert done.lines("world_size") == ["world_size:2"]
    assert done.losses() == pytest.approx(alone.losses(), rel=CLOSE_AS_LOGGED)
    assert done.score() == pytest.approx(alone.score(), rel=CLOSE)
