"""Chunks, accumulated gradients and the averages over one step."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import RECORDED, build_model, learnable_tokens, needs_compiler, settings, stir, to_numpy, write_shard


@pytest.mark.parametrize(("arguments", "chunks"), RECORDED["token_chunks"], ids=str)
def test_recorded_token_chunks(arguments, chunks):
    assert tg.token_chunks(*arguments) == chunks


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 300))
def test_chunks_cover_the_whole_sequences(total, seq_len, most):
    if total < seq_len:
        with pytest.raises(ValueError, match=f"{total} tokens.*{seq_len}"):
            tg.token_chunks(total, seq_len, most)
        return
    chunks = tg.token_chunks(total, seq_len, most)
    assert sum(chunks) == total // seq_len * seq_len
    assert all(size % seq_len == 0 and 0 < size <= max(most, seq_len) for size in chunks)
    assert all(size == chunks[0] for size in chunks[:-1])


def test_accumulate_starts_adds_and_keeps_dtypes():
    tree = {"a": mx.array([1.0, 2.0]), "b": [{"c": mx.array([4.0]).astype(mx.bfloat16)}]}
    accum = tg.accumulate_flat_grads(None, tree, 0.5)
    assert {key: value.tolist() for key, value in accum.items()} == {"a": [0.5, 1.0], "b.0.c": [2.0]}
    accum = tg.accumulate_flat_grads(accum, tree, 0.25)
    assert {key: value.tolist() for key, value in accum.items()} == {"a": [0.75, 1.5], "b.0.c": [3.0]}
    assert accum["b.0.c"].dtype == mx.bfloat16
    partly = tg.accumulate_flat_grads({"a": mx.array([1.0, 1.0])}, tree, 0.5)
    assert {key: value.tolist() for key, value in partly.items()} == {"a": [1.5, 2.0], "b.0.c": [2.0]}
    own = {}
    assert tg.accumulate_flat_grads(own, tree, 0.5) is own
    assert own["a"].tolist() == [0.5, 1.0]
    accum = tg.accumulate_flat_grads({"b.0.c": mx.array([1.0]), "a": accum["a"]}, tree, 0.25)
    assert (accum["b.0.c"].dtype, accum["b.0.c"].item()) == (mx.float32, 2.0)  # a more exact accumulator stays one
    assert tree["a"].tolist() == [1.0, 2.0]


class RecordingLoss:
    """Stands in for compiled_loss_and_grad: loss and gradient are known functions of the batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, y):
        self.batches.append((x.tolist(), y.tolist()))
        return mx.mean(x.astype(mx.float32)), {"w": {"v": mx.mean(y.astype(mx.float32)).reshape(1)}}


def test_microbatch_is_averaged_by_tokens_over_unequal_chunks(tmp_path):
    write_shard(tmp_path / "s.bin", range(1000))
    args = settings(train_batch_tokens=50, grad_accum_steps=2, train_seq_len=4, mlx_max_microbatch_tokens=10)
    loader, loss = tg.TokenLoader(str(tmp_path / "s.bin")), RecordingLoss()
    value, grads = tg.loss_and_grad_chunked(args, loader, loss)  # 25 tokens: chunks of 8, 8 and 8
    assert [len(x) for x, _ in loss.batches] == [2, 2, 2]
    args.train_batch_tokens = 40  # 20 tokens: chunks of 8, 8 and 4
    loss.batches.clear()
    value, grads = tg.loss_and_grad_chunked(args, loader, loss)
    xs, ys = zip(*loss.batches, strict=True)
    assert [len(x) for x in xs] == [2, 2, 1]
    flat_x, flat_y = np.concatenate([np.ravel(x) for x in xs]), np.concatenate([np.ravel(y) for y in ys])
    assert value.item() == pytest.approx(flat_x.mean())
    assert grads["w"]["v"].tolist() == pytest.approx([flat_y.mean()])
    # Each chunk used up a token of its own beyond its inputs.
    assert xs[0][0][0] == 27
    assert xs[1][0][0] == xs[0][0][0] + 9
    assert loader.stream.pos == 27 + 9 + 9 + 5


@pytest.mark.parametrize("eager", [True, False])
def test_chunks_microbatches_and_eager_mode_do_not_change_the_average(tmp_path, eager):
    """However a step is cut up, it is the mean over its tokens (here the same sequence again and again)."""
    sequence = learnable_tokens(9, 64, 3).tolist()
    write_shard(tmp_path / "s.bin", sequence)
    results = []
    for accum, most in ((1, 1000), (2, 8), (4, 16), (1, 24)):
        args = settings(train_batch_tokens=64, grad_accum_steps=accum, mlx_max_microbatch_tokens=most,
                        mlx_eager_eval=eager)  # fmt: skip
        model = build_model(args)
        stir(model)
        loader = tg.TokenLoader(str(tmp_path / "s.bin"))
        loader.next_batch = lambda n, seq_len, s=sequence: (
            mx.array([s[:-1]] * (n // seq_len)), mx.array([s[1:]] * (n // seq_len))
        )  # fmt: skip
        loss, grads = tg.loss_and_grad_chunked(args, loader, nn.value_and_grad(model, model.loss), accum)
        results.append([loss.item(), *[to_numpy(g) for _, g in tree_flatten(grads)]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_step_averages_microbatches(tmp_path):
    write_shard(tmp_path / "s.bin", range(1000))
    args = settings(train_batch_tokens=60, grad_accum_steps=3, train_seq_len=4, mlx_max_microbatch_tokens=8)
    loss = RecordingLoss()
    value, grads = tg.loss_and_grad_chunked(args, tg.TokenLoader(str(tmp_path / "s.bin")), loss, args.grad_accum_steps)
    assert [len(x) for x, _ in loss.batches] == [2, 2, 1] * 3
    sizes = [np.size(x) for x, _ in loss.batches]
    assert value.item() == pytest.approx(np.average([np.mean(x) for x, _ in loss.batches], weights=sizes))
    assert grads["w"]["v"].item() == pytest.approx(np.average([np.mean(y) for _, y in loss.batches], weights=sizes))


@needs_compiler
def test_accumulator_keeps_the_memory_it_has():
    """Gradients are added where the first ones are: there is no further copy, not even a scaled one."""
    size = 4 * 1024 * 1024

    def further_memory() -> int:
        first, second = ({"w": mx.full((size // 4,), value)} for value in (1.0, 2.0))
        accum = tg.accumulate_flat_grads(None, first, 1.0)
        mx.eval(first, second, accum)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(tg.accumulate_flat_grads(accum, second, 0.5))
        assert accum["w"][0].item() == 2.0
        return mx.get_peak_memory() - before

    assert min(further_memory() for _ in range(5)) < size  # MLX's thread may hold on to an array for a moment longer


@pytest.mark.parametrize("eager", [False, True])
def test_in_eager_mode_a_chunk_begins_when_the_last_one_has_ended(tmp_path, monkeypatch, eager):
    """...but its batch is fetched, and its graph built, before that wait."""
    write_shard(tmp_path / "s.bin", range(1000))
    events, wait, issue, loss = [], mx.eval, mx.async_eval, RecordingLoss()
    monkeypatch.setattr(mx, "eval", lambda *a: events.append("wait") or wait(*a))
    monkeypatch.setattr(mx, "async_eval", lambda *a: events.append("issue") or issue(*a))
    args = settings(train_batch_tokens=24, grad_accum_steps=1, train_seq_len=4, mlx_max_microbatch_tokens=8,
                    mlx_eager_eval=eager)  # fmt: skip
    loader = tg.TokenLoader(str(tmp_path / "s.bin"))
    tg.loss_and_grad_chunked(args, loader, lambda x, y: events.append("build") or loss(x, y), 2)
    assert events == (["build", "wait", "issue"] * 6 if eager else ["build"] * 6)


def test_memory_is_that_of_one_chunk(tmp_path):
    """The most that is in use at once does not grow with the number of chunks; uncompiled, on the CPU too."""
    write_shard(tmp_path / "s.bin", learnable_tokens(20_000, 64, 7))
    peaks = []
    for accum in (2, 8):
        args = settings(train_batch_tokens=1024 * accum, grad_accum_steps=accum, train_seq_len=64,
                        mlx_max_microbatch_tokens=1024)  # fmt: skip
        model = build_model(args)
        loader, f = tg.TokenLoader(str(tmp_path / "s.bin")), nn.value_and_grad(model, model.loss)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(tg.loss_and_grad_chunked(args, loader, f, accum))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.3 * peaks[0]


def test_microbatch_without_room_for_a_sequence(tmp_path):
    write_shard(tmp_path / "s.bin", range(100))
    args = settings(train_batch_tokens=15, grad_accum_steps=2, train_seq_len=8)
    with pytest.raises(ValueError, match="7 tokens.*sequence of TRAIN_SEQ_LEN=8"):
        tg.loss_and_grad_chunked(args, tg.TokenLoader(str(tmp_path / "s.bin")), RecordingLoss())
