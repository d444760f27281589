"""Chunks, accumulated gradients and the averages over one step."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import train_gpt_mlx as tg
from helpers import RECORDED, build_model, learnable_tokens, settings, write_shard


@pytest.mark.parametrize(("arguments", "chunks"), RECORDED["token_chunks"], ids=str)
def test_recorded_token_chunks(arguments, chunks):
    assert tg.token_chunks(*arguments) == chunks


def test_chunks_without_room_for_a_sequence_are_refused():
    with pytest.raises(ValueError, match="7.*8"):
        tg.token_chunks(7, 8, 100)


def test_gradients_are_scaled_added_and_kept_in_their_dtype():
    tree = {"a": mx.array([1.0, 2.0]), "b": [{"c": mx.array([4.0], dtype=mx.bfloat16)}]}
    accum = tg.accumulate_flat_grads(None, tree, 0.5)
    assert {key: value.tolist() for key, value in accum.items()} == {"a": [0.5, 1.0], "b.0.c": [2.0]}
    accum = tg.accumulate_flat_grads(accum, tree, 0.25)
    assert {key: value.tolist() for key, value in accum.items()} == {"a": [0.75, 1.5], "b.0.c": [3.0]}
    assert (accum["a"].dtype, accum["b.0.c"].dtype) == (mx.float32, mx.bfloat16)


class KnownLoss:
    """A loss and a gradient that are the means of x and of y. Remembers every x."""

    def __init__(self):
        self.inputs = []

    def __call__(self, x, y):
        self.inputs.append(np.array(x))
        return mx.mean(x.astype(mx.float32)), {"w": {"v": mx.mean(y.astype(mx.float32))}}


@pytest.mark.parametrize("microbatches", [1, 3])
def test_loss_and_gradients_are_means_over_the_tokens_of_all_chunks(tmp_path, microbatches):
    write_shard(tmp_path / "s.bin", range(1000))
    args = settings(train_batch_tokens=46, grad_accum_steps=2, train_seq_len=4, mlx_max_microbatch_tokens=10)
    loader, loss_and_grad = tg.TokenLoader(str(tmp_path / "s.bin")), KnownLoss()
    loss, grads = tg.loss_and_grad_chunked(args, loader, loss_and_grad, microbatches)
    # Microbatches of 23 tokens are chunks of 8, 8 and 4. Each chunk uses up one more token.
    assert [x.ravel().tolist() for x in loss_and_grad.inputs] == [
        list(range(start, start + size))
        for start, size in [(0, 8), (9, 8), (18, 4), (23, 8), (32, 8), (41, 4), (46, 8), (55, 8), (64, 4)]
    ][: 3 * microbatches]
    assert loss.item() == pytest.approx(np.concatenate([x.ravel() for x in loss_and_grad.inputs]).mean())
    assert grads["w"]["v"].item() == pytest.approx(loss.item() + 1)


@pytest.mark.parametrize("eager", [True, False])
def test_only_eager_mode_waits_for_each_chunk(tmp_path, monkeypatch, eager):
    write_shard(tmp_path / "s.bin", range(100))
    args = settings(train_batch_tokens=24, grad_accum_steps=1, train_seq_len=4, mlx_max_microbatch_tokens=8)
    args.mlx_eager_eval, calls, real = eager, [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: calls.append(arrays) or real(*arrays))
    tg.loss_and_grad_chunked(args, tg.TokenLoader(str(tmp_path / "s.bin")), KnownLoss())
    assert (len(calls) >= 3) == eager


def test_a_step_takes_the_memory_of_one_chunk(tmp_path):
    write_shard(tmp_path / "s.bin", learnable_tokens(20_000, 64, 7))
    peaks = []
    for accum in (2, 8):
        args = settings(train_batch_tokens=1024 * accum, grad_accum_steps=accum, train_seq_len=64)
        args.mlx_max_microbatch_tokens = 512
        model, loader = build_model(args), tg.TokenLoader(str(tmp_path / "s.bin"))
        mx.eval(model.parameters())
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(tg.loss_and_grad_chunked(args, loader, nn.value_and_grad(model, model.loss), accum))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.3 * peaks[0]
