"""Checkpoints: what goes on from one repeats the run that nobody stopped, and what does not match is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest

import train_gpt_mlx as tg
from helpers import REPO, check_one_line_error, snapshot
from programs import ON_CPU, Outcome, command, environment

pytestmark = pytest.mark.slow

FOR_EVER = dict(iterations=10_000_000, max_wallclock_seconds=0, train_log_every=1)
CHECKPOINT, NPZ, ARTIFACT = "r_checkpoint.safetensors", "r_mlx_model.npz", "r_mlx_model.int8.ptz"

# A fork that draws random numbers in each step, as dropout does.
NOISY = f"""
import sys; sys.path.insert(0, {str(REPO)!r}); import train_gpt_mlx as tg
take_step = tg.take_step
def noisy(run, *args):
    take_step(run, *args)
    run.model.skip_weights = run.model.skip_weights + 0.1 * tg.mx.random.normal(run.model.skip_weights.shape)
tg.take_step = noisy
sys.exit(tg.command_line([]))
"""

# What a run that goes on may have other than before, and what it may not. Each setting is in one of the two.
MAY_CHANGE = """iterations=6 max_wallclock_seconds=50 warmup_steps=0 val_loss_every=3 val_max_tokens=160
    val_batch_size=512 train_log_every=2 checkpoint_every=2 mlx_eager_eval=0 logit_chunk_tokens=32 run_id=other"""
MAY_NOT_CHANGE = """seed=1 train_batch_tokens=96 grad_accum_steps=1 train_seq_len=8 mlx_max_microbatch_tokens=32
    warmdown_iters=3 num_layers=3 model_dim=32 num_heads=4 num_kv_heads=2 mlp_mult=3 tied_embed_init_std=0.01
    logit_softcap=20 rope_base=5000 qk_gain_init=1 beta1=0.8 beta2=0.9 adam_eps=1e-7 tied_embed_lr=0.1 matrix_lr=0.1
    scalar_lr=0.1 muon_momentum=0.9 muon_backend_steps=4 muon_momentum_warmup_start=0.8 muon_momentum_warmup_steps=10
    grad_clip_norm=1 compute_dtype=bfloat16 control_tensor_name_patterns=q_gain
    int8_keep_float_fp32_name_patterns=q_gain"""
MAY_CHANGE, MAY_NOT_CHANGE = (dict(pair.split("=") for pair in text.split()) for text in (MAY_CHANGE, MAY_NOT_CHANGE))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling would take most of the time, so only a test that asks for it does it."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Path:
    """The files of a run of 4 steps, made once."""
    folder = tmp_path_factory.mktemp("finished")
    values = environment(data, folder, checkpoint_every=4)
    subprocess.run(command(), cwd=folder, env=values, check=True, capture_output=True)
    return folder / "out"


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """The checkpoint in a copy of those files, in the folder where runs write theirs."""
    return shutil.copytree(finished, tmp_path / "out") / CHECKPOINT


def figures(done: Outcome) -> list[str]:
    """The log's lines of losses, scores and epochs, without times."""
    lines = done.lines(r"^step:|^final_|^WARNING: starting epoch|^stopping_early")
    return [re.sub(r" (train_time|step_avg|tok_s|eval_time):\S+", "", line) for line in lines]


def resumed_at(done: Outcome) -> int:
    return int(re.search(r"step:(\d+)$", done.lines("^resume:")[0])[1])


def assert_refused(done: Outcome, *parts: str) -> None:
    assert (done.code, done.out) == (2, [])
    check_one_line_error(done.err, "RESUME=", *parts)


class TestGoingOn:
    def test_after_kills_at_any_moment_repeats_the_run_that_nobody_killed(self, start, run):
        settings = dict(iterations=40, max_wallclock_seconds=0, warmdown_iters=20, val_loss_every=5, train_log_every=1)
        settings |= dict(train_batch_tokens=1024, mlx_max_microbatch_tokens=512)
        expected = run(**settings, run_id="whole")
        assert len(expected.lines("^WARNING: starting epoch")) == 6
        rng, seen, step = random.Random(3), set(), -1
        for _ in range(10):
            process = start(**settings, checkpoint_every=1, resume="auto")
            process.wait_for("^checkpoint:", count=rng.randint(1, 2))
            time.sleep(rng.random() * 0.03)  # anywhere in the next step or in its checkpoint
            process.send(signal.SIGKILL)
            done = process.finish()
            seen |= set(figures(done))
            assert resumed_at(done) > step
            step = resumed_at(done)
        last = run(**settings, checkpoint_every=1, resume="auto")
        assert (last.code, last.err) == (0, "")
        if ON_CPU:
            assert seen | set(figures(last)) == set(figures(expected))
            assert last.score() == expected.score()

    @pytest.mark.parametrize(
        "changes",
        [dict(mlx_disable_compile=None), dict(compute_dtype="bfloat16"), dict(script=("-c", NOISY))],
        ids=["compiled", "bfloat16", "fork that draws random numbers"],
    )
    def test_a_finished_run_with_more_iterations_goes_on_from_its_last_step(self, run, changes):
        changes = changes | dict(val_loss_every=5, train_log_every=1)
        expected = run(**changes, iterations=14, run_id="whole")
        first = run(**changes, iterations=7, checkpoint_every=5)
        assert [re.search(r"step:(\d+)", line)[1] for line in first.lines("^checkpoint:")] == ["5", "7"]
        done = run(**changes, iterations=14, resume="auto")
        assert resumed_at(done) == 7
        if ON_CPU:
            assert figures(done) == figures(expected)[-len(figures(done)) :]
        assert len(done.losses()) == 7

    def test_so_does_one_that_was_interrupted_and_resumed(self, start, run):
        """Without CHECKPOINT_EVERY, too: its file must not stay behind at the interruption."""
        process = start(**FOR_EVER)
        process.wait_for("^step:2/")
        process.send(signal.SIGINT)
        step = len(process.finish().losses())
        for more in (2, 4):
            done = run(**FOR_EVER | dict(iterations=step + more), resume="auto")
            assert (resumed_at(done), len(done.losses())) == (step + more - 2, 2)

    def test_complete_run_is_only_scored(self, run):
        settings = dict(iterations=10_000_000, max_wallclock_seconds=0.2, checkpoint_every=1000)
        first, again = run(**settings), run(**settings, resume="auto")
        assert (again.code, again.losses()) == (0, [])
        assert figures(again) == figures(first)[-4:]
        assert "wallclock_cap" in figures(again)[1]

    def test_from_a_path_under_another_name_leaves_that_runs_files(self, run, checkpoint):
        before = snapshot(checkpoint.parent)
        done = run(resume=checkpoint, iterations=6, run_id="second")
        assert done.code == 0
        assert done.lines(f"^resume:{checkpoint} step:4")
        assert snapshot(checkpoint.parent).items() > before.items()

    def test_log_and_checkpoint_go_on_and_earlier_results_are_moved_aside(self, run, checkpoint):
        before = snapshot(checkpoint.parent)
        done = run(resume="auto", iterations=6, checkpoint_every=6)
        after = snapshot(done.folder)
        assert sorted(after) == ["r.txt", CHECKPOINT, ARTIFACT, f"{ARTIFACT}.1", NPZ, f"{NPZ}.1"]
        assert (after[f"{ARTIFACT}.1"], after[f"{NPZ}.1"]) == (before[ARTIFACT], before[NPZ])
        assert after["r.txt"].startswith(before["r.txt"])
        assert done.log() == done.out[1:]
        run()  # afresh
        afresh = snapshot(done.folder)
        assert {f"{name}.2" for name in before} < afresh.keys()
        assert set(afresh.values()) > set(after.values())


class TestMatching:
    def test_every_setting_is_known_to_count_or_not(self):
        where = {"data_path", "tokenizer_path", "out_dir", "resume"}
        assert tg.settings_of(tg.RunSettings).keys() == MAY_CHANGE.keys() | where
        only_so = {"vocab_size", "tie_embeddings"}  # no other value would run
        module = {name for name in tg.settings_of(tg.ModuleSettings) if name != "mlx_preload_blas"}
        counting = tg.settings_of(tg.Hyperparameters).keys() - tg.settings_of(tg.RunSettings).keys()
        assert counting | module == MAY_NOT_CHANGE.keys() | only_so

    def test_settings_that_change_the_result_are_named_and_nothing_is_touched(self, run, checkpoint):
        before = snapshot(checkpoint.parent)
        done = run(resume="auto", **MAY_NOT_CHANGE)
        assert_refused(done, "MODEL_DIM was 16, is 32", "MATRIX_LR was 0.04, is 0.1")
        changed = re.findall(r"([A-Z0-9_]+) was [^;]+, is [^;]+", done.err)
        assert sorted(changed) == sorted(name.upper() for name in MAY_NOT_CHANGE)
        assert snapshot(checkpoint.parent) == before

    def test_all_others_may_change(self, run, checkpoint):
        expected = run(iterations=6, run_id="whole")
        done = run(resume=checkpoint, **MAY_CHANGE)
        assert (done.code, done.err) == (0, "")
        assert done.losses() == pytest.approx(expected.losses()[4:], rel=1e-4)

    def test_data_may_move_but_not_change(self, run, checkpoint, data, tmp_path):
        moved = shutil.copytree(data, tmp_path / "moved")
        train, val = sorted(moved.glob("datasets/tiny/*_000000.bin"))
        tokenizer, another = moved / "tokenizers/tiny.model", train.with_name("fineweb_train_000002.bin")
        shard, proto = train.read_bytes(), tokenizer.read_bytes()
        settings = dict(data_path=train.parent, tokenizer_path=tokenizer, resume=checkpoint, run_id="moved")
        assert run(**settings).code == 0
        without_space = re.sub("\u2581(?=[a-z])".encode(), b"abc", proto, count=1)
        for path, content in (
            (train, shard[:1024] + shard[1026:] + shard[1024:1026]),
            (another, shard),
            (val, val.read_bytes()[:-2] + b"\7\0"),
            (tokenizer, without_space),
        ):
            before = path.read_bytes() if path.exists() else None
            path.write_bytes(content)
            assert_refused(run(**settings), "data and tokenizer was ")
            path.unlink() if before is None else path.write_bytes(before)

    @pytest.mark.parametrize(
        "damage", ["gone", "empty", "cut", "no metadata", "bad metadata", "foreign", "other model"]
    )
    def test_damaged_or_foreign_checkpoint(self, run, checkpoint, damage):
        arrays, metadata = mx.load(str(checkpoint), return_metadata=True)
        before, cut = snapshot(checkpoint.parent), checkpoint.read_bytes()[:-1]
        if damage == "gone":
            checkpoint.unlink()
        elif damage == "no metadata":
            mx.save_safetensors(str(checkpoint), arrays)
        elif damage == "bad metadata":
            mx.save_safetensors(str(checkpoint), arrays, {name: text[:-9] for name, text in metadata.items()})
        elif damage == "other model":
            arrays["model.skip_weights"] = mx.ones((7, 7))
            mx.save_safetensors(str(checkpoint), arrays, metadata)
        else:
            checkpoint.write_bytes({"empty": b"", "cut": cut, "foreign": before[NPZ]}[damage])
        before = snapshot(checkpoint.parent)
        done = run(resume=checkpoint)
        assert (done.code, done.out) == (2, [])
        check_one_line_error(done.err, str(checkpoint))
        assert snapshot(checkpoint.parent) == before


def test_checkpoint_is_arrays_and_text_and_no_pickle(checkpoint):
    arrays, metadata = mx.load(str(checkpoint), format="safetensors", return_metadata=True)
    assert {"model.tok_emb.weight", "muon.blocks.0.mlp.fc.weight", "adam_embed.tok_emb.weight.m"} < arrays.keys()
    assert [json.loads(text)["step"] for text in metadata.values() if text.startswith("{")] == [4]
