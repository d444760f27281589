"""The stages of a run, called one by one: what they hand to each other, what they log, and by which clock."""

from __future__ import annotations

import pickle
import re
import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import build_model, learnable_tokens, needs_compiler, settings, stir, write_shard


@pytest.fixture
def stages(tmp_path, tokenizer):
    """Make a Run with a tiny model, uncompiled, over 64 tokens' vocabulary; its log is a list."""

    def make(**changes) -> tg.Run:
        write_shard(tmp_path / "set/fineweb_train_000000.bin", learnable_tokens(2000, 64, 7))
        args = settings(data_path=str(tmp_path / "set"), out_dir=str(tmp_path), run_id="r", **changes)
        mx.random.seed(args.seed)
        model = build_model(args)
        tables = tg.build_sentencepiece_luts(tokenizer, 320)
        inputs = tg.Inputs("set", 1, None, learnable_tokens(8 * 11 + 1, 64, 9).astype(np.int32), tables)
        lines: list[str] = []
        loss_and_grad = nn.value_and_grad(model, model.loss)
        return tg.Run(args, inputs, model, tg.SplitOptimizers(model, args), model.loss, loss_and_grad, log=lines.append)

    return make


def lines(run: tg.Run) -> list[str]:
    return run.log.__self__


@pytest.fixture
def clock(monkeypatch):
    """Let each training step take the given milliseconds, by the clock that the script reads."""

    def set_to(durations: list[float]) -> None:
        ticks = iter(np.cumsum([0.0] + [d for ms in durations for d in (ms / 1000, 5.0)]))  # 5 s pass between steps
        monkeypatch.setattr(tg.time, "perf_counter", lambda: next(ticks))

    return set_to


def test_training_figures_by_a_known_clock(stages, clock):
    run = stages(iterations=3, train_batch_tokens=64)
    clock([100, 200, 600])
    tg.train(run)
    figures = [line.split("train_loss:")[1].split(" ", 1)[1] for line in lines(run) if "train_loss" in line]
    assert figures == [
        "train_time:100ms step_avg:100.00ms tok_s:640",
        "train_time:300ms step_avg:150.00ms tok_s:320",
        "train_time:900ms step_avg:300.00ms tok_s:107",
    ]
    assert re.search(r"^step:3/3 val_loss:\S+ val_bpb:\S+ train_time:900ms step_avg:300.00ms$", lines(run)[-1])


def test_schedule_and_optimizer_get_step_and_elapsed_time(stages, clock, monkeypatch):
    run = stages(iterations=4)
    asked, stepped = [], []
    run.args.lr_mul = lambda step, elapsed_ms: asked.append((step, round(elapsed_ms))) or 0.5 ** (step + 1)
    real = run.optimizers.step
    run.optimizers.step = lambda *a: stepped.append(a[2:]) or real(*a)
    clock([100, 200, 300, 400])
    tg.train(run)
    assert asked == [(0, 0), (1, 100), (2, 300), (3, 600)]
    assert stepped == [(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.0625)]


@pytest.mark.parametrize(("cap", "steps"), [(0.375, 2), (0.376, 3), (0.0, 4), (-1.0, 4), (9.0, 4)])
def test_cap_is_reached_to_the_millisecond(stages, clock, cap, steps):
    run = stages(iterations=4, max_wallclock_seconds=cap)
    durations = [125, 250, 500, 500]  # exact in binary, so that the cap can be hit exactly
    clock(durations)
    tg.train(run)
    assert len([line for line in lines(run) if "train_loss" in line]) == steps
    total = sum(durations[:steps])
    last = f"stopping_early: wallclock_cap train_time:{total}ms step:{steps}/4"
    assert lines(run)[-1] == last if steps < 4 else "stopping_early" not in "".join(lines(run))


def test_clock_stops_when_the_new_parameters_are_computed(stages, monkeypatch):
    run = stages(iterations=1)
    events, real_eval, real_clock = [], mx.eval, tg.time.perf_counter
    monkeypatch.setattr(mx, "eval", lambda *a: events.append(len(tree_flatten(list(a)))) or real_eval(*a))
    monkeypatch.setattr(tg.time, "perf_counter", lambda: events.append("clock") or real_clock())
    tg.train(run)
    stop = events.index("clock", events.index("clock") + 1)
    assert events[stop - 1] == 1 + len(tree_flatten(run.model.parameters()))  # the loss and all of them


@pytest.mark.parametrize(
    ("durations", "changes", "expected"),
    [
        ([100] * 9, dict(iterations=9, warmdown_iters=10), "lr_mul:0.6000 steps_that_fit:9 "),  # after the third step
        ([100] * 2, dict(iterations=2, warmdown_iters=10), "steps_that_fit:2 "),
        ([700] * 2, dict(iterations=9, warmdown_iters=10, max_wallclock_seconds=1.0), "steps_that_fit:1 "),
        ([3000], dict(iterations=9, warmdown_iters=10, max_wallclock_seconds=1.0), "steps_that_fit:1 "),
        ([100] * 9, dict(iterations=9, warmdown_iters=9), None),
    ],
)  # fmt: skip
def test_warmdown_line_comes_once_also_in_the_shortest_runs(stages, clock, durations, changes, expected):
    run = stages(**changes)
    clock(durations)
    tg.train(run)
    found = [line for line in lines(run) if line.startswith("warmdown:")]
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


@pytest.mark.parametrize(
    ("changes", "elapsed_ms", "line"),
    [
        # 100 ms a step: 100 steps would fit under the cap, but only 50 are asked for.
        (dict(max_wallclock_seconds=10.0, iterations=50, warmdown_iters=1000), 300.0,
         "warmdown:whole_run lr_mul:0.0970 steps_that_fit:50 warmdown_iters:1000 "
         "(after the first step the rate is never the full one; WARMDOWN_ITERS=100 would start at it)"),
        (dict(max_wallclock_seconds=10.0, iterations=500, warmdown_iters=101), 300.0, "steps_that_fit:100 "),
        (dict(max_wallclock_seconds=10.0, iterations=500, warmdown_iters=100), 300.0, None),
        (dict(max_wallclock_seconds=0.0, iterations=50, warmdown_iters=51), 300.0, "lr_mul:0.9216 steps_that_fit:50 "),
        (dict(max_wallclock_seconds=0.0, iterations=50, warmdown_iters=50), 300.0, None),
    ],
)  # fmt: skip
def test_warmdown_line(stages, changes, elapsed_ms, line):
    run = stages(**changes)
    tg.log_warmdown(run, 3, elapsed_ms)
    assert len(lines(run)) == (line is not None)
    assert line is None or line in lines(run)[0]


def test_warmup_uses_every_shape_and_leaves_no_trace(stages):
    run = stages(warmup_steps=2, train_batch_tokens=80, mlx_max_microbatch_tokens=24, iterations=1)
    trained, validated = [], []
    grad, loss = run.compiled_loss_and_grad, run.compiled_loss
    run.compiled_loss_and_grad = lambda x, y: trained.append(x.shape) or grad(x, y)
    run.compiled_loss = lambda x, y: validated.append(x.shape) or loss(x, y)
    stir(run.model)
    tg.train(run)  # so that the state is not all zeros
    trained.clear()
    validated.clear()
    before, state = dict(tree_flatten(tg.training_state(run))), mx.random.state[0].tolist()
    run.step = 0
    tg.warm_up(run)
    assert trained == [(3, 8), (2, 8)]
    assert validated == [(4, 8), (3, 8)]  # of 11 sequences: batches of 4, 4 and 3
    assert mx.random.state[0].tolist() == state
    after = dict(tree_flatten(tg.training_state(run)))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()


@needs_compiler
@pytest.mark.parametrize("most", [24, 40, 64, 1000])  # tokens in a chunk; a microbatch has 40
def test_warmup_leaves_nothing_to_trace(stages, monkeypatch, most):
    """Training and validation after it meet compiled functions only: no line of the model's is run again."""
    run = stages(warmup_steps=1, train_batch_tokens=80, mlx_max_microbatch_tokens=most, iterations=2,
                 grad_clip_norm=1.0)  # fmt: skip
    real = tg.set_up(run.args, run.inputs)
    run.model, run.optimizers = real.model, real.optimizers
    run.compiled_loss, run.compiled_loss_and_grad = real.compiled_loss, real.compiled_loss_and_grad
    tg.warm_up(run)
    traced = []
    for cls, name in ((tg.GPT, "__call__"), (tg.Muon, "step")):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *a, f=original, n=name: traced.append(n) or f(*a))
    tg.train(run)
    assert "val_loss" in lines(run)[-1]
    assert traced == []
    run.compiled_loss(mx.zeros((7, 8), dtype=mx.int32), mx.zeros((7, 8), dtype=mx.int32))  # of no size that was met
    assert traced == ["__call__"]


@pytest.mark.parametrize(("steps", "logged"), [(20, list(range(1, 21))), (21, [10, 20, 21]), (0, [])])
def test_warmup_lines(stages, steps, logged):
    run = stages(warmup_steps=steps)
    tg.warm_up(run)
    first = "warmup: two chunks, an optimizer step and a validation batch of each size, off the clock"
    assert lines(run) == [first] * (steps > 0) + [f"warmup_step:{i}/{steps}" for i in logged]


@pytest.mark.parametrize("where", ["metal", "cuda", "cpu"])
@pytest.mark.parametrize("older", [False, True])
def test_wired_limit_is_raised_on_metal_only(stages, monkeypatch, where, older):
    limits = []
    info = {"max_recommended_working_set_size": 123}
    monkeypatch.setattr(tg, "backend", lambda: where)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(mx.metal, "device_info", lambda: info if older else {}, raising=False)
    if older:
        monkeypatch.delattr(mx, "device_info", raising=False)
    else:
        monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)
    run = stages()
    tg.set_up(run.args, run.inputs)
    assert limits == ([123] if where == "metal" else [])


def test_only_the_loss_alone_is_computed_without_a_thought_of_gradients(stages, monkeypatch):
    run = stages()
    real, modes = tg.causal_attention, []
    monkeypatch.setattr(tg, "causal_attention", lambda *a: modes.append(a[-1]) or real(*a))
    run = tg.set_up(run.args, run.inputs)
    x = mx.zeros((1, 8), dtype=mx.int32)
    mx.eval(run.compiled_loss(x, x), run.compiled_loss_and_grad(x, x))
    assert modes == [False] * 3 + [True] * 3


def test_configuration_names_each_setting_by_its_own_value(stages):
    run = stages(matrix_lr=0.031, scalar_lr=0.021, tied_embed_lr=0.051, muon_momentum=0.91, muon_backend_steps=4,
                 warmup_steps=6, val_batch_size=72, iterations=5, max_wallclock_seconds=12.5)  # fmt: skip
    tg.log_configuration(run)
    text = "\n".join(lines(run))
    assert ("optimizer:muon+adam muon_matrix_params:18 scalar_params:13 embed_lr:0.051 matrix_lr:0.031 scalar_lr:0.021 "
            "muon_momentum:0.91 muon_steps:4") in text  # fmt: skip
    assert "vocab_size:64 layers:3 dim:16 heads:4 kv_heads:2 seq_len:8 tie_embeddings:True" in text
    assert ("iterations:5 train_batch_tokens:64 grad_accum_steps:2 microbatch_tokens:32 microbatch_batch_size:4 "
            "val_batch_size:72 warmup_steps:6 max_wallclock_seconds:12.500") in text  # fmt: skip


def test_artifact_is_deflated_at_level_9_and_held_against_the_cap(stages, monkeypatch):
    run = stages()
    path = tg.save(run)
    data = path.read_bytes()
    obj, _ = tg.quantize_state_dict_int8(dict(tree_flatten(run.model.state)))
    raw = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    assert data == zlib.compress(raw, 9)
    total = len(data) + tg.CODE_PATH.stat().st_size
    for cap, verdict in ((total, "under"), (total - 1, "OVER")):
        monkeypatch.setattr(tg, "SUBMISSION_CAP_BYTES", cap)
        tg.save(run)
        assert lines(run)[-1] == f"Total submission size int8+zlib: {total} bytes ({verdict} the cap of {cap} bytes)"


@pytest.mark.parametrize("vocab_size", [64, 4200])  # 4200 x 16: an int8 embedding
def test_score_is_that_of_the_file_not_of_the_model_in_memory(stages, vocab_size):
    run = stages(vocab_size=vocab_size)
    stir(run.model, seed=1)
    path = tg.save(run)
    expected = tg.validate(run)[0]
    stir(run.model, seed=2)
    other = tg.validate(run)[0]
    tg.score(run, path)
    found = float(re.search(r"roundtrip_exact val_loss:(\S+)", lines(run)[-1])[1])
    assert found == pytest.approx(expected, rel=1e-2)
    assert abs(found - other) > 0.05
    rounded = tg.dequantize_state_dict_int8(tg.quantize_state_dict_int8(dict(tree_flatten(run.model.state)))[0])
    for name, value in tree_flatten(run.model.parameters()):  # what was rounded once stays as it is
        assert mx.allclose(value, rounded[name], rtol=1e-2, atol=5e-3), name


def test_signal_is_answered_between_two_batches_and_before_the_first_step(stages):
    run = stages()
    run.signal = "SIGINT"
    for stage, call in (("validation", tg.validate), ("warmup", tg.train), ("warmup", tg.warm_up)):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted by SIGINT during {stage}: no score"):
            call(run)
    assert "train_loss" not in "".join(lines(run))
    run.answered = True
    assert tg.validate(run)[0] > 0


def test_loss_of_validation_that_is_not_finite(stages):
    run = stages()
    run.compiled_loss = lambda x, y: mx.array(float("nan"))
    with pytest.raises(tg.RunError, match="after step 0 val_loss:nan is not finite"):
        tg.validate(run)


def test_checkpoint_is_written_once_for_a_step_and_only_of_finite_numbers(stages, tmp_path):
    run = stages()
    path = tmp_path / "r_checkpoint.safetensors"
    tg.write_checkpoint(run)
    assert not path.exists()  # nothing was trained
    run.step = 3
    tg.write_checkpoint(run)
    assert (run.checkpointed_step, run.saved) == (3, (path,))
    path.unlink()
    tg.write_checkpoint(run)
    assert not path.exists()
    run.step = 4
    run.optimizers.muon.buffers["blocks.0.mlp.fc.weight"] *= float("inf")
    with pytest.raises(tg.RunError, match=r"after step 4 these are not finite, and are not saved: muon\.blocks\.0"):
        tg.write_checkpoint(run)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_value_beyond_float16_is_not_saved(stages, tmp_path):
    run = stages()
    run.model.tok_emb.weight = run.model.tok_emb.weight + 1e5
    with pytest.raises(tg.RunError, match=r"after step 0 these are not finite, and are not saved: tok_emb\.weight"):
        tg.save(run)
    assert not list(tmp_path.glob("r_mlx*"))


def test_message_has_the_last_five_losses_and_the_multiplier(stages):
    run, count = stages(iterations=20, train_log_every=0, grad_accum_steps=1, mlx_max_microbatch_tokens=64), [0]
    real = run.compiled_loss_and_grad

    def loss_and_grad(x, y):
        count[0] += 1
        return mx.array(float("inf") if count[0] == 9 else float(count[0])), real(x, y)[1]

    run.compiled_loss_and_grad = loss_and_grad
    run.checkpointed_step = 6
    with pytest.raises(tg.RunError) as caught:
        tg.train(run)
    assert str(caught.value) == (
        "step:9/20 train_loss:inf is not finite; lr_mul:1.0000; the last finite losses: "
        "4.0000, 5.0000, 6.0000, 7.0000, 8.0000; what came after step 6 is not saved")  # fmt: skip


def test_log_is_on_disk_at_once_and_folders_are_made(tmp_path, capsys):
    args = settings(out_dir=str(tmp_path / "a/b"), run_id="x")
    log = tg.open_log(args)
    log("a line")
    assert (tmp_path / "a/b/x.txt").read_text(encoding="utf-8").endswith("=" * 100 + "\na line\n")
    assert capsys.readouterr().out == f"{tmp_path}/a/b/x.txt\na line\n"


def test_moving_aside_takes_a_number_that_is_free_for_all(tmp_path):
    args = settings(out_dir=str(tmp_path), run_id="x")
    for name in ("x.txt", "x.txt.1", "x_mlx_model.npz.2", "x_mlx_model.int8.ptz"):
        (tmp_path / name).write_text(name)
    tg.open_log(args)
    assert (tmp_path / "x.txt.3").read_text() == "x.txt"
    assert (tmp_path / "x_mlx_model.int8.ptz.3").read_text() == "x_mlx_model.int8.ptz"
    assert (tmp_path / "x.txt.1").read_text() == "x.txt.1"
    assert not (tmp_path / "x_mlx_model.npz.3").exists()


def test_an_id_without_an_embedding_is_found_before_it_is_scored(stages):
    """Before the run only the first million are looked at."""
    run = stages()
    run.inputs.val_tokens[70] = 64
    with pytest.raises(tg.InputError, match=r"fineweb_val_\*\.bin: token 70 is 64, but VOCAB_SIZE=64"):
        tg.validate(run)
    run.inputs.val_tokens[70] = 63
    assert tg.validate(run)[0] > 0


def test_warmup_looks_up_no_id_without_an_embedding(stages, tmp_path):
    """Not even in shards after the first, of which nothing was checked before the run."""
    run = stages(warmup_steps=1)
    run.inputs.val_tokens[20] = 64
    with pytest.raises(tg.InputError, match=r"fineweb_val_\*\.bin: token 20 is 64"):
        tg.warm_up(run)
    write_shard(tmp_path / "set/fineweb_train_000000.bin", [1, 2, 3])
    write_shard(tmp_path / "set/fineweb_train_000001.bin", [1, 64, 3] * 50)
    with pytest.raises(tg.InputError, match=r"fineweb_train_000001\.bin: token 1 is 64"):
        tg.warm_up(run)


def test_ranks_take_the_first_ones_name_and_nothing_else_that_differs(stages):
    run = stages()
    run.world = tg.World()
    run.world.gather = lambda facts: [facts | {"RUN_ID": "first"}, facts]
    tg.require_agreement(run)
    assert run.args.run_id == "first"
    run.world.gather = lambda facts: [facts, facts | {"MATRIX_LR": "0.5"}]
    with pytest.raises(tg.InputError, match=r": MATRIX_LR is 0\.04 on rank 0 and 0\.5 on rank 1$"):
        tg.require_agreement(run)


def test_rank_that_is_lost_while_a_file_is_shared_is_no_damaged_file(stages):
    run = stages(resume="r_checkpoint.safetensors")

    def lost(_):
        run.world.waiting = True
        raise RuntimeError("connection to a peer was lost")

    run.world = tg.World()
    run.world.from_first = lost
    for read in (lambda: tg.resume(run), lambda: tg.load_flat_state(run.path(".npz"), {}, run.world)):
        with pytest.raises(RuntimeError, match="peer was lost"):
            read()
