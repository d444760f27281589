"""The stages of a run, called one by one: the clock, the schedule, warmup, saving and scoring."""

import pickle
import time
import zlib

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import settings, stir
from programs import MODEL


@pytest.fixture
def make_run(data, tmp_path):
    """Make a Run of the tiny model on the tiny data; its log is the list `lines`."""

    def make(**changes) -> tg.Run:
        paths = dict(data_path=f"{data}/datasets/tiny", tokenizer_path=f"{data}/tokenizers/tiny.model")
        run = tg.Run(settings(**{**MODEL, **paths, "out_dir": str(tmp_path), "run_id": "r", **changes}))
        run.lines = []
        run.log = lambda line, console=True: run.lines.append(line)
        return run

    return make


@pytest.fixture
def set_clock(monkeypatch):
    """Let each step of a run take the given milliseconds, and each batch of a validation 5 seconds."""

    def set_clock(run: tg.Run, durations: list[float]) -> None:
        now, steps = [0.0], iter(durations)
        step, loss = run.optimizers.step, run.compiled_loss

        def slow_step(*arguments) -> None:
            now[0] += next(steps) / 1000.0
            step(*arguments)

        def slow_loss(x: mx.array, y: mx.array) -> mx.array:
            now[0] += 5.0
            return loss(x, y)

        monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
        run.optimizers.step, run.compiled_loss = slow_step, slow_loss

    return set_clock


def test_the_figures_of_the_clock(make_run, set_clock):
    run = make_run(iterations=3, val_loss_every=1)
    set_clock(run, [100, 200, 600])
    tg.train(run)
    times = [line[line.index("train_time") :] for line in run.lines if line.startswith("step:")]
    assert times[0] == "train_time:0ms step_avg:0.00ms"
    assert times[1] == "train_time:100ms step_avg:100.00ms tok_s:1280 lr_mul:1.0000"
    assert times[5] == "train_time:900ms step_avg:300.00ms tok_s:213 lr_mul:1.0000"
    assert times[6] == "train_time:900ms step_avg:300.00ms"


def test_the_clock_stops_when_a_step_is_computed(make_run):
    run = make_run(iterations=3, warmup_steps=1, mlx_eager_eval=False, model_dim=256, num_layers=1)
    tg.warm_up(run)
    started = time.perf_counter()
    tg.train(run)
    assert run.train_ms > 500.0 * (time.perf_counter() - started)  # half of the time, at least


def test_the_multiplier_of_a_step_is_taken_at_its_start_and_used_for_it(make_run, set_clock):
    run = make_run(iterations=3)
    asked, used, step = [], [], run.optimizers.step
    run.args.lr_mul = lambda step, elapsed_ms: asked.append((step, round(elapsed_ms))) or 0.5 ** (step + 1)
    run.optimizers.step = lambda *arguments: used.append(arguments[2:]) or step(*arguments)
    set_clock(run, [100, 200, 300])
    tg.train(run)
    assert asked == [(0, 0), (1, 100), (2, 300)]
    assert used == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert [line.split()[-1] for line in run.lines[:3]] == ["lr_mul:0.5000", "lr_mul:0.2500", "lr_mul:0.1250"]


@pytest.mark.parametrize(("cap", "steps"), [(0.375, 2), (0.376, 3), (9.0, 4), (0.0, 4), (-1.0, 4)])
def test_the_cap_is_reached_to_the_millisecond(make_run, set_clock, cap, steps):
    run = make_run(iterations=4, max_wallclock_seconds=cap)
    durations = [125, 250, 500, 500]  # exact in binary
    set_clock(run, durations)
    tg.train(run)
    assert sum("train_loss" in line for line in run.lines) == steps
    stop = f"stopping_early: wallclock_cap train_time:{sum(durations[:steps])}ms step:{steps}/4"
    assert (run.lines[-1] == stop) == (steps < 4)
    assert run.lines[-2 if steps < 4 else -1].startswith(f"step:{steps}/4 val_loss:")


def test_warmup_meets_every_shape_that_follows_and_leaves_no_trace(make_run):
    run = make_run(iterations=2, warmup_steps=1)
    stir(run.model)
    shapes, loss, loss_and_grad = set(), run.compiled_loss, run.compiled_loss_and_grad
    run.compiled_loss = lambda x, y: shapes.add(("validation", x.shape)) or loss(x, y)
    run.compiled_loss_and_grad = lambda x, y: shapes.add(("training", x.shape)) or loss_and_grad(x, y)
    before = {name: mx.array(array) for name, array in tree_flatten(tg.training_state(run))}
    tg.warm_up(run)
    after, warmed = dict(tree_flatten(tg.training_state(run))), shapes.copy()
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    shapes.clear()
    tg.train(run)
    assert warmed == shapes == {("training", (n, 16)) for n in (1, 3)} | {("validation", (n, 16)) for n in (1, 8)}


def test_the_manifests_count_of_shards_is_logged(make_run):
    run = make_run()
    for expected in (2, 5):
        run.dataset = ("tiny", 2, expected)
        tg.log_configuration(run)
    complete, subset = (line for line in run.lines if "train_shards" in line)
    warning = "WARNING: train_loader:subset dataset:tiny train_shards:2/5"
    assert complete == "train_loader:dataset:tiny train_shards:2/2"
    assert subset == f"{warning} new epochs will arrive sooner than the full dataset"


@pytest.mark.parametrize(("backend", "limits"), [("metal", [123]), ("cuda", []), ("cpu", [])])
def test_on_macs_memory_is_wired(make_run, monkeypatch, backend, limits):
    raised = []
    monkeypatch.setattr(tg, "backend", lambda: backend)
    monkeypatch.setattr(mx, "set_wired_limit", raised.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 123})
    make_run()
    assert raised == limits


@pytest.fixture
def saved_run(make_run) -> tg.Run:
    run = make_run(model_dim=256, num_layers=1)
    stir(run.model)
    tg.save(run)
    return run


def test_the_compressed_model_is_a_pickle_deflated_at_level_9(saved_run):
    content = saved_run.artifact_path.read_bytes()
    assert content == zlib.compress(zlib.decompress(content), 9)
    assert zlib.decompress(content)[1] == pickle.HIGHEST_PROTOCOL


@pytest.mark.parametrize(("room", "verdict"), [(5, "5 under"), (0, "0 under"), (-7, "7 OVER")])
def test_a_submission_is_held_against_the_cap(saved_run, monkeypatch, room, verdict):
    total = saved_run.artifact_path.stat().st_size + tg.CODE_PATH.stat().st_size
    monkeypatch.setattr(tg, "SUBMISSION_CAP_BYTES", total + room)
    tg.save(saved_run)
    size = f"{total} bytes ({verdict} the cap of {total + room} bytes)"
    assert saved_run.lines[-1] == f"Total submission size int8+zlib: {size}"


def test_a_validation_that_is_not_finite_ends_the_run(make_run):
    run = make_run()
    run.compiled_loss = lambda x, y: mx.array(float("nan"))
    with pytest.raises(tg.RunError, match="after step 0 val_loss is not finite"):
        tg.validate(run)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_model_that_overflows_in_float16_is_not_saved(make_run, tmp_path):
    run = make_run()
    run.model.tok_emb.weight = run.model.tok_emb.weight + 1e5
    with pytest.raises(tg.RunError, match=r"after step 0 tok_emb\.weight is not finite"):
        tg.save(run)
    assert list(tmp_path.iterdir()) == []
