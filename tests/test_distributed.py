"""Runs of several processes: real jobs, started by MLX's launcher on loopback, held against the run of one process."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPO, learnable_tokens, write_shard
from programs import ON_CPU, SCRIPT, Outcome, Process, command, environment

pytestmark = pytest.mark.slow

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
CLOSE = 1e-5 if ON_CPU else 1e-3  # GPUs add in no fixed order
EIGHT = dict(grad_accum_steps=8, train_batch_tokens=384, val_batch_size=256, iterations=20, train_log_every=1)
FOR_EVER = EIGHT | dict(iterations=10_000_000)


def fork(code: str) -> tuple[str, str]:
    """A script in which this code changes the original, tg."""
    start = f"import os, signal, sys, time; sys.path.insert(0, {str(REPO)!r}); import train_gpt_mlx as tg\n"
    return "-c", f"{start}{code}\nsys.exit(tg.command_line([]))"


EXACT = fork("""
take_step = tg.take_step
def logging(run, *args):
    take_step(run, *args)
    run.log(f"exact:{run.losses[-1]:.9f}")
tg.take_step = logging
""")
FAST_CLOCK = fork("""
clock = time.perf_counter
if os.environ["MLX_RANK"] == "1":
    time.perf_counter = lambda: 1000 * clock()
""")
DIES = fork("""
if os.environ["MLX_RANK"] == "1":
    tg.validate = lambda run: os.kill(os.getpid(), signal.SIGKILL)
""")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling would take most of the time, and changes nothing here."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(20_000 + os.getpid() * 37 % 10_000, 32_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


class Job(Process):
    """A run of several processes that is under way. Launcher and ranks write to one pipe each, line by line."""

    def __init__(self, size: int, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        # The launcher spins while it could pass input to a rank, or when there is no more of it. So it gets more than
        # fits into the ranks' pipes, which they never read, and no end of it.
        reader, self.input = os.pipe()
        options = ["-n", str(size), "--starting-port", str(free_ports(size))]
        super().__init__([str(LAUNCHER), *options, "--", *command], folder, environment, stdin=reader)
        os.close(reader)
        with contextlib.suppress(BrokenPipeError):  # it ended already
            os.write(self.input, bytes(100_000))
        self.size = size

    def kill_rank(self, number: int, by: int = signal.SIGKILL) -> None:
        os.kill(int((self.folder.parent / f"pid{number}").read_text()), by)

    def end(self) -> None:
        """Kill what still runs."""
        self.popen.kill()
        for number in range(self.size):
            with contextlib.suppress(OSError):
                self.kill_rank(number)
        self.popen.communicate()
        os.close(self.input)


@pytest.fixture
def job(data, tmp_path):
    """Start a job of so many processes; what is still running at the end of the test is killed. `prelude` is shell
    code that each rank runs first."""
    jobs: list[Job] = []

    def started(size: int, prelude: str = "", script: tuple[str, ...] = (), **changes) -> Job:
        shell = f'echo $$ >"{tmp_path}/pid$MLX_RANK"; {prelude}\nexec "$0" "$@"'
        ranks = ["bash", "-c", shell, *command(script=script)]
        jobs.append(Job(size, ranks, tmp_path, environment(data, tmp_path, **changes)))
        return jobs[-1]

    yield started
    for each in jobs:
        each.end()


def on_rank_1(code: str) -> str:
    return f"if [ $MLX_RANK = 1 ]; then {code}; fi"


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Outcome:
    """The run of one process that the jobs are held against."""
    folder = tmp_path_factory.mktemp("alone")
    values = environment(data, folder, **EIGHT, mlx_disable_compile=1)
    options = dict(cwd=folder, env=values, check=True, capture_output=True, text=True)
    done = subprocess.run(command(script=EXACT), **options)
    return Outcome(done.returncode, done.stdout.splitlines(), done.stderr, folder / "out")


def exact(done: Outcome) -> list[float]:
    return [float(line.split(":")[1]) for line in done.lines("^exact:")]


def without_figures(done: Outcome) -> list[str]:
    """The log without figures, paths and sizes."""
    changing = r"(loss|bpb|exact):[0-9.]+|(train_time|eval_time|step_avg).*|/\S+|world_size.*|int8.*|[0-9.]+ bytes.*"
    return [re.sub(changing, "", line) for line in done.log() if not re.match("overrides|finished|serialized", line)]


class TestSameAsOneProcess:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_losses_score_log_and_files(self, alone, job, size):
        done = job(size, script=EXACT, **EIGHT).finish()
        assert (done.code, done.err) == (0, "")
        assert len(exact(done)) == 20
        assert exact(done) == pytest.approx(exact(alone), rel=CLOSE)
        assert done.score() == pytest.approx(alone.score(), rel=CLOSE)
        assert done.lines("world_size") == [f"world_size:{size}"]
        assert without_figures(done) == without_figures(alone)
        assert done.log() == done.out[1:]
        assert done.files() == alone.files()

    @pytest.mark.parametrize(("size", "batch"), [(2, 256), (4, 512), (2, 3200)], ids=["13", "7", "1 batch"])
    def test_validation(self, job, run, size, batch):
        settings = EIGHT | dict(iterations=0, val_batch_size=batch)
        expected, done = run(**settings, run_id="alone"), job(size, **settings).finish()
        for name in ("val_loss", "val_bpb"):
            figures = [float(re.search(rf"{name}:(\S+)", each.lines("_exact ")[0])[1]) for each in (done, expected)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-6)
        assert done.lines("^val_progress") == expected.lines("^val_progress")

    @pytest.mark.parametrize("changes", [dict(grad_clip_norm=0.1), dict(mlx_eager_eval=0)], ids=str)
    def test_clipping_and_lazy_evaluation(self, job, run, changes):
        settings = EIGHT | dict(iterations=6) | changes
        expected, done = run(**settings, run_id="alone"), job(2, **settings).finish()
        assert (done.code, done.err) == (0, "")
        assert done.losses() == pytest.approx(expected.losses(), abs=1.1e-4)  # logged to four places
        assert done.score() == pytest.approx(expected.score(), rel=CLOSE)

    def test_going_on_from_rank_0_s_checkpoint_with_another_number(self, job, alone):
        """The others work in a folder of their own, where nothing is read or written."""
        elsewhere = "if [ $MLX_RANK != 0 ]; then mkdir -p elsewhere/out; cd elsewhere; fi"
        job(4, elsewhere, **EIGHT | dict(iterations=14, checkpoint_every=7), out_dir="out").finish()
        done = job(2, elsewhere, **EIGHT, out_dir="out", resume="auto", script=EXACT).finish()
        assert (done.code, done.err) == (0, "")
        assert exact(done) == pytest.approx(exact(alone)[14:], rel=CLOSE)
        assert done.score() == pytest.approx(alone.score(), rel=CLOSE)
        assert not list((done.folder.parent / "elsewhere/out").iterdir())


class TestRefused:
    def refused(self, done: Outcome, *parts: str) -> None:
        for part in parts:
            assert part in done.err
        assert "Traceback" not in done.err
        assert not done.out
        assert not done.folder.exists()

    def test_microbatches_that_cannot_be_shared(self, job):
        done = job(4, **EIGHT | dict(grad_accum_steps=6)).finish()
        self.refused(done, "error: GRAD_ACCUM_STEPS=6: must be a multiple of 4 processes")

    @pytest.mark.parametrize("what", ["settings", "script", "data"])
    def test_rank_with_other(self, job, data, tmp_path, what):
        other = shutil.copytree(data / "datasets/tiny", tmp_path / "other/datasets/tiny")
        write_shard(other / "fineweb_val_000000.bin", learnable_tokens(409, 320, 10))
        script = tmp_path / "train_gpt_mlx.py"
        script.write_text(SCRIPT.read_text(encoding="utf-8") + "# another\n")
        code = {"settings": "export SEED=7", "script": f"set -- {script}", "data": f"export DATA_PATH={other}"}
        self.refused(job(2, on_rank_1(code[what]), **EIGHT).finish(), f"error: rank 1 has other {what} than rank 0")

    def test_rank_without_data(self, job):
        self.refused(job(2, on_rank_1("export DATA_PATH=/none"), **EIGHT).finish(), "no shards match /none/")


class TestEndings:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_one_signal_ends_all_in_good_order(self, job, rank):
        process = job(2, **FOR_EVER)
        process.wait_for("^step:5/")
        process.kill_rank(rank, signal.SIGTERM)
        done = process.finish(60)
        assert (done.code, "error" in done.err) == (0, False)
        step = len(done.losses())
        assert done.lines(f"^checkpoint:.* step:{step}/")
        assert done.lines(f"^stopping_early: interrupted .* step:{step}/")
        assert done.lines("_exact ")

    def test_rank_0_s_clock_ends_all(self, job):
        changes = FOR_EVER | dict(max_wallclock_seconds=1.0, warmdown_iters=50)
        done = job(2, script=FAST_CLOCK, **changes).finish(60)
        assert (done.code, done.err) == (0, "")
        (stop,) = done.lines("^stopping_early: wallclock_cap")
        assert 1000 <= int(re.search(r"train_time:(\d+)ms", stop)[1]) < 100_000

    @pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 2)])
    def test_death_of_one_ends_all(self, job, alone, run, size, rank):
        process = job(size, **FOR_EVER | dict(checkpoint_every=2))
        process.wait_for("^step:3/")
        process.kill_rank(rank)
        done = process.finish(60)
        for number in range(size):
            with pytest.raises(ProcessLookupError):
                process.kill_rank(number, 0)
        assert "Traceback" not in done.err
        assert not done.lines("val_loss|^final")
        again = run(**EIGHT, resume="auto")  # from the last step, or from what rank 0 had written before
        step = int(re.search(r"step:(\d+)", again.lines("^resume:")[0])[1])
        assert step >= len(done.losses()) - 2
        assert again.losses() == pytest.approx(alone.losses()[step:], abs=1.1e-4)
        assert again.score() == pytest.approx(alone.score(), rel=CLOSE)

    def test_figures_of_the_dead_are_not_made_up(self, job):
        """How far rank 0 gets before the launcher ends it too is a matter of luck."""
        done = job(2, script=DIES, **EIGHT).finish(60)
        assert "Traceback" not in done.err
        assert not done.lines("val_loss|^final")
        assert not {"r_mlx_model.npz", "r_mlx_model.int8.ptz"} & set(done.files())

    def test_loss_that_is_not_finite(self, job):
        done = job(2, **EIGHT | dict(matrix_lr=1e19, scalar_lr=1e19)).finish(60)
        assert done.err.count("error: after step 2 train_loss is not finite") == 2
        assert done.files() == ["r.txt"]

    def test_damaged_data_that_one_rank_meets(self, job, data, tmp_path):
        other = shutil.copytree(data / "datasets/tiny", tmp_path / "other/datasets/tiny")
        process = job(2, on_rank_1(f"export DATA_PATH={other}"), **FOR_EVER)
        process.wait_for("^step:1/")
        (other / "fineweb_train_000001.bin").unlink()
        done = process.finish(60)
        assert re.search(f"error: .*{other}/fineweb_train_000001.bin", done.err)
        assert "Traceback" not in done.err
        assert done.lines(f"^checkpoint:.* step:{len(done.losses())}/")
        assert not done.lines("^final")
