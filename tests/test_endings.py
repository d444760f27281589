"""How a run ends before its time: after a signal, with its terminal gone, with bad numbers, a full disk or bad data."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import train_gpt_mlx as tg
from helpers import REPO, check_one_line_error, learnable_tokens, write_shard
from programs import SCRIPT, Outcome, Process, command, environment

pytestmark = pytest.mark.slow

FOR_EVER = dict(iterations=10_000_000, max_wallclock_seconds=0, train_log_every=1)
MODEL_FILES = ["r_mlx_model.int8.ptz", "r_mlx_model.npz"]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling would take most of the time, and changes nothing here."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy of the data set, to be changed."""
    return shutil.copytree(data / "datasets/tiny", tmp_path / "own/datasets/tiny")


@pytest.fixture
def long_validation(own_data) -> dict:
    """Settings with which a validation takes seconds: batches of one sequence."""
    write_shard(own_data / "fineweb_val_000000.bin", learnable_tokens(30_001, 320, 9))
    return dict(data_path=own_data, val_batch_size=32)


def read_message(process: Process) -> str:
    """What the first signal prints on stderr, as soon as it is there."""
    return b"".join(process.popen.stderr.readline() for _ in range(2)).decode()


def fork(code: str) -> tuple[str, str]:
    """A script in which this code changes the original, tg."""
    start = f"import os, sys; sys.path.insert(0, {str(REPO)!r}); import train_gpt_mlx as tg\n"
    return "-c", f"{start}{code}\nsys.exit(tg.command_line([]))"


def assert_whole(done: Outcome) -> None:
    """Each file can be read, and there is no part of one."""
    assert "Traceback" not in done.err
    for path in done.folder.iterdir():
        assert not path.name.endswith(".tmp")
        if path.suffix in (".npz", ".safetensors"):
            mx.eval(mx.load(str(path)))
        elif path.suffix == ".ptz":
            tg.pickle.loads(tg.zlib.decompress(path.read_bytes()))


class TestSignal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
    def test_in_training_ends_it_after_the_step_with_checkpoint_validation_and_score(self, start, number):
        process = start(**FOR_EVER)
        process.wait_for("^step:7/")
        process.send(number)
        assert number.name in read_message(process)
        done = process.finish()
        assert (done.code, done.err) == (0, "")
        step = len(done.losses())
        stages = [rf"step:{step}/.* train_loss", rf"checkpoint:.* step:{step}/", rf"step:{step}/.* val_loss"]
        stages += [rf"stopping_early: interrupted train_time:\d+ms step:{step}/", "saved_model", "final_.*_exact "]
        lines = [line for pattern in stages for line in done.lines(f"^{pattern}")]
        assert [line for line in done.out if line in lines] == lines
        assert len(lines) == len(stages)
        assert done.files() == ["r.txt", "r_checkpoint.safetensors", *MODEL_FILES]
        assert done.log() == done.out[1:]
        assert_whole(done)

    @pytest.mark.parametrize(
        ("number", "changes", "line", "files"),
        [
            (signal.SIGHUP, dict(train_batch_tokens=2**16, mlx_max_microbatch_tokens=2**15), "^dtypes", []),
            (signal.SIGINT, dict(val_loss_every=3), "^step:3/", ["r_checkpoint.safetensors"]),
            (signal.SIGTERM, dict(iterations=3), "^Total submission size", MODEL_FILES),
        ],
        ids=["warmup", "validation", "scoring"],
    )
    def test_elsewhere_ends_the_run_and_loses_no_step(self, start, long_validation, number, changes, line, files):
        """What the scoring has rounded is no checkpoint: the trained weights are on the disk already."""
        process = start(**FOR_EVER | long_validation | changes)
        process.wait_for(line)
        if "val_loss_every" in changes:
            process.wait_for("^val_progress:")
        process.send(number)
        done = process.finish()
        assert done.code == 130
        check_one_line_error(done.err, number.name, "no score")
        assert any(re.match(f"error: .*{number.name}", line) for line in done.log())
        assert done.files() == ["r.txt", *files]
        assert_whole(done)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
    def test_another_ends_the_process_at_once(self, start, long_validation, number):
        process = start(**FOR_EVER, **long_validation)
        process.wait_for("^step:3/")
        process.send(signal.SIGINT)
        read_message(process)
        process.send(number)
        done = process.finish()
        assert (done.code, done.err) == (-number, "")
        assert not done.lines("^final")

    def test_hangups_that_follow_do_not(self, start):
        process = start(**FOR_EVER)
        process.wait_for("^step:3/")
        process.send(signal.SIGHUP)
        read_message(process)
        process.send(signal.SIGHUP)
        done = process.finish()
        assert (done.code, done.err) == (0, "")
        assert done.lines("^final_int8_zlib_roundtrip_exact")

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "in a script's background"])
    def test_ignored_one_stays_so(self, start, number):
        ignoring = dict(preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
        process = start(iterations=30, train_log_every=1, options=ignoring)
        process.wait_for("^step:2/")
        process.send(number)
        done = process.finish()
        assert (done.code, done.err, len(done.losses())) == (0, "", 30)

    def test_that_also_ends_the_compiler_is_an_interruption_all_the_same(self, start, tmp_path):
        """Ctrl-C goes to all processes of a terminal; this compiler stands for one that is at work then."""
        if tg.backend() != "cpu" or sys.platform != "linux":
            pytest.skip("MLX runs a compiler on Linux CPUs only")
        compiler = tmp_path / "bin/g++"
        compiler.parent.mkdir()
        compiler.write_text("#!/bin/sh\n[ $1 = --version ] || kill -INT 0\n")
        compiler.chmod(0o755)
        changes = dict(mlx_disable_compile=None, tmpdir=tmp_path, path=f"{compiler.parent}:{os.environ['PATH']}")
        process = start(**FOR_EVER, **changes, options=dict(start_new_session=True))
        done = process.finish()
        assert done.code == 130
        check_one_line_error(done.err, "SIGINT", "no score")

    def test_handlers_are_put_back_and_another_thread_may_run_main(self, run):
        twice = """
import signal, threading
numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
before = [signal.getsignal(number) for number in numbers]
tg.main()
assert before == [signal.getsignal(number) for number in numbers]
thread = threading.Thread(target=tg.main)
thread.start()
thread.join()
sys.stdout.flush()
os._exit(0)  # MLX aborts at the exit of a process in which a thread that is over used it
"""
        done = run(script=fork(twice), iterations=0)
        assert (done.code, done.err) == (0, "")
        assert len(done.lines("^final_int8_zlib_roundtrip_exact")) == 2


class TestTerminal:
    def test_closed_one_is_a_hangup(self, data, tmp_path):
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(tmp_path)
            os.execve(sys.executable, command(), environment(data, tmp_path, **FOR_EVER))
        shown = b""
        while b"step:5/" not in shown:
            shown += os.read(terminal, 1000)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        log = (tmp_path / "out/r.txt").read_text()
        assert re.search("\nstopping_early: interrupted .*\n(.*\n)*final_int8_zlib_roundtrip_exact ", log)

    def test_reader_that_goes_away_does_not_end_the_run(self, start):
        process = start(iterations=30, train_log_every=1)
        process.wait_for("^step:2/")
        process.popen.stdout.close()
        assert (process.popen.stderr.read(), process.popen.wait()) == (b"", 0)
        log = (process.folder / "r.txt").read_text()
        assert re.search("\nstep:30/30 train_loss.*\n(.*\n)*final_int8_zlib_roundtrip_exact ", log)


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            (dict(matrix_lr=1e19, scalar_lr=1e19), "train_loss"),
            (dict(adam_eps=0.0, iterations=1), "val_loss"),  # Adam divides by 0
            (dict(adam_eps=0.0, iterations=1, checkpoint_every=1), r"model\.\S+"),
            (dict(tied_embed_lr=1e6, iterations=1), r"tok_emb\.weight"),  # in the compressed model's float16
        ],
        ids=["loss", "weights", "weights in a checkpoint", "compressed weights"],
    )
    def test_end_the_run_and_nothing_of_it_is_saved(self, run, changes, what):
        done = run(**changes)
        assert done.code == 1
        found = re.search(f"error: after step (\\d+) {what} is not finite; last losses: (.*)\n$", done.err)
        losses = [f"{loss:.4f}" for loss in done.losses()]
        assert found[2] == ", ".join(losses)
        assert int(found[1]) == len(losses) + (what == "train_loss")
        assert done.log()[-1] == done.err.splitlines()[-1]
        assert done.files() == ["r.txt"]

    @pytest.mark.parametrize(
        ("after", "where", "changes"),
        [
            ("validate", "run.model['skip_weights']", {}),
            ("take_step", "run.optimizers.adam_scalar.state['skip_weights']['v']", dict(checkpoint_every=1)),
        ],
        ids=["weights", "optimizer"],
    )
    def test_nor_is_what_no_loss_has_shown(self, run, after, where, changes):
        spoiling = f"""
function = tg.{after}
def spoiling(run, *args):
    function(run, *args)
    {where} = {where} / 0
tg.{after} = spoiling
"""
        done = run(script=fork(spoiling), **changes)
        assert done.code == 1
        check_one_line_error(done.err, "is not finite")
        assert done.files() == ["r.txt"]


class TestFullDisk:
    """A limit on the size of each file stands for it."""

    def limited(self, size: int) -> dict:
        return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    def test_checkpoint_that_does_not_fit_leaves_the_last_one_and_costs_no_score(self, run):
        settings = dict(model_dim=64, checkpoint_every=1)
        first = run(**settings, iterations=2)
        path = first.folder / "r_checkpoint.safetensors"
        before, room = path.read_bytes(), (first.folder / "r_mlx_model.npz").stat().st_size + 20_000
        assert SCRIPT.stat().st_size * 2 + 20_000 < room < len(before)
        done = run(**settings, iterations=4, resume="auto", options=self.limited(room))
        assert (done.code, done.err) == (0, "")
        assert len(done.lines(f"^WARNING: .*{path}: cannot be written")) == 2
        assert done.lines("^final_int8_zlib_roundtrip_exact")
        assert path.read_bytes() == before
        assert_whole(done)

    def test_model_that_does_not_fit(self, run):
        done = run(model_dim=64, iterations=1, options=self.limited(SCRIPT.stat().st_size + 8_000))
        assert done.code == 1
        check_one_line_error(done.err, "r_mlx_model.npz: cannot be written")
        assert done.files() == ["r.txt"]

    def test_log_that_fills_up_does_not_end_the_run(self, run):
        done = run(iterations=60, train_log_every=1, options=self.limited(SCRIPT.stat().st_size + 4_000))
        assert (done.code, done.err, len(done.losses())) == (0, "", 60)
        assert done.lines("^final_int8_zlib_roundtrip_exact")
        assert not any("step:60/" in line for line in done.log())


@pytest.mark.parametrize("how", ["No such file", "damaged", "token 300 is 333: not below VOCAB_SIZE=320"])
def test_data_damaged_during_the_run_costs_no_step(start, run, own_data, how):
    """The second shard is opened in the eighth step, and again in later epochs."""
    path, other = own_data / "fineweb_train_000001.bin", own_data / "other"
    whole, tokens = path.read_bytes(), tg.load_data_shard(path)
    tokens[300] = 333
    other.write_bytes(whole[:-1]) if how == "damaged" else write_shard(other, tokens)
    settings = FOR_EVER | dict(data_path=own_data, warmup_steps=0)
    process = start(**settings)
    process.wait_for("^step:1/")
    path.unlink() if how == "No such file" else other.replace(path)
    done = process.finish()
    assert done.code == 1
    check_one_line_error(done.err, str(path), how)
    assert done.err.rstrip() in done.log()
    step = len(done.losses())
    assert done.lines(f"^checkpoint:.* step:{step}/")
    assert done.files() == ["r.txt", "r_checkpoint.safetensors"]
    path.write_bytes(whole)
    settings["iterations"] = step + 2
    assert run(**settings, resume="auto").same_as_from(step + 1, run(**settings, run_id="whole"))


def test_computation_that_fails_in_the_run_costs_no_step(run):
    """As for want of memory: MLX is lazy, so that it shows when the new weights are asked for."""
    failing = """
evaluate, calls = tg.mx.eval, []
def failing(*arrays):
    calls.append(arrays)
    if sum(len(each) == 2 and "blocks" in each[1] for each in calls) == 3:
        tg.mx.eval = evaluate
        raise RuntimeError("out of memory")
    evaluate(*arrays)
tg.mx.eval = failing
"""
    done = run(script=fork(failing))
    assert (done.code, done.err) == (1, "error: out of memory\n")
    again = run(resume="auto")
    assert again.losses() == run(run_id="whole").losses()[-len(again.losses()) :]
