"""How many bytes a token stands for, and the score in bits per byte."""

import math

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece as spm

import train_gpt_mlx as tg
from conftest import train_tokenizer
from helpers import RECORDED, learnable_tokens, settings

NOTHING = (0, False, True)  # base bytes, leading space, boundary


def entries(tables, i: int) -> tuple:
    return tuple(table[i].item() for table in tables)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("<s>", NOTHING),
        ("<unk>", NOTHING),
        ("<0x41>", (1, False, False)),
        ("at", (2, False, False)),
        ("東", (3, False, False)),
        ("▁and", (3, True, False)),
        ("▁", (0, True, False)),
    ],
)
def test_bytes_of_each_kind_of_piece(tokenizer, piece, expected):
    i = tokenizer.piece_to_id(piece)
    assert tokenizer.id_to_piece(i) == piece
    assert entries(tg.build_sentencepiece_luts(tokenizer, 320), i) == expected


def test_only_a_first_space_is_a_leading_one():
    tokenizer = spm.SentencePieceProcessor(model_proto=train_tokenizer(user_defined_symbols=["▁▁x", "x▁"]))
    tables = tg.build_sentencepiece_luts(tokenizer, 320)
    assert entries(tables, tokenizer.piece_to_id("▁▁x")) == (4, True, False)  # "▁" has three bytes
    assert entries(tables, tokenizer.piece_to_id("x▁")) == (4, False, False)


def test_unused_pieces_stand_for_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "is_unused", lambda i: i == 300)
    tables = tg.build_sentencepiece_luts(tokenizer, 320)
    assert entries(tables, 300) == NOTHING
    assert entries(tables, 301) != NOTHING


@pytest.mark.parametrize(("vocab_size", "length"), [(100, 320), (320, 320), (322, 322)])
def test_tables_reach_to_the_larger_vocabulary(tokenizer, vocab_size, length):
    tables = tg.build_sentencepiece_luts(tokenizer, vocab_size)
    assert [(table.dtype, len(table)) for table in tables] == [(np.int16, length), (bool, length), (bool, length)]
    assert all(entries(tables, i) == NOTHING for i in range(320, length))


@pytest.mark.parametrize("text", ["naïve café «owl»", "東京 stone 1987", "a\tb  c", "quartz 🦉 ωμέγα"])
def test_the_bytes_of_a_documents_tokens_are_those_of_its_text(tokenizer, text):
    base, space, boundary = tg.build_sentencepiece_luts(tokenizer, 320)
    ids = np.array([tokenizer.bos_id(), *tokenizer.encode(text)])
    before, target = ids[:-1], ids[1:]
    counted = base[target].sum() + (space[target] & ~boundary[before]).sum()
    assert counted == len(tokenizer.decode(ids.tolist()).encode())


@pytest.mark.parametrize("case", RECORDED["eval_val"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_score(case):
    args = settings(
        train_seq_len=case["seq"], val_batch_size=case["val_batch_size"], grad_accum_steps=case["grad_accum_steps"]
    )
    tokens = learnable_tokens(case["n"], 50, case["salt"]).astype(np.int32)
    tokens = tokens[: (len(tokens) - 1) // case["seq"] * case["seq"] + 1]
    ids, shapes, log = np.arange(64), [], []

    def loss(x, y):
        shapes.append(list(x.shape))
        return mx.mean(0.01 * x.astype(mx.float32) + 0.03 * y.astype(mx.float32))

    score = tg.eval_val(args, loss, tokens, (ids % 5).astype(np.int16), ids % 3 == 0, ids < 4, log_fn=log.append)
    assert score == pytest.approx((case["val_loss"], case["val_bpb"]), rel=1e-6)
    assert shapes == [case["batch_shape"]] * case["batches"]
    assert log == case["log"]


def test_a_short_last_batch_counts_by_its_tokens():
    args = settings(train_seq_len=2, val_batch_size=8, grad_accum_steps=2)  # two sequences a batch
    tokens = np.array([0, 9, 1, 9, 9, 2, 9, 3, 9, 9, 9], dtype=np.uint16)  # five sequences
    base = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 3], dtype=np.int16)
    space, boundary = np.arange(10) == 9, np.isin(np.arange(10), [0, 2])
    val_loss, val_bpb = tg.eval_val(args, lambda x, y: mx.mean(x + 0.1 * y), tokens, base, space, boundary)
    assert val_loss == pytest.approx(np.mean(tokens[:-1] + 0.1 * tokens[1:]))
    # Seven targets are 9: three bytes each, and a space except after the boundaries 0 and 2.
    assert val_bpb == pytest.approx(val_loss / math.log(2) * 10 / (7 * 3 + 5))


ONE_BYTE_EACH = np.ones(2, np.int16), np.zeros(2, bool), np.zeros(2, bool)


def test_the_byte_count_does_not_overflow():
    args = settings(train_seq_len=1000, val_batch_size=100_000, grad_accum_steps=1)
    tables = np.array([0, 30_000], np.int16), *ONE_BYTE_EACH[1:]
    _, val_bpb = tg.eval_val(args, lambda x, y: mx.array(1.0), np.ones(100_001, np.uint16), *tables)
    assert val_bpb == pytest.approx(1 / math.log(2) / 30_000)


@pytest.mark.parametrize(("batches", "logged"), [(1, []), (2, [1, 2]), (25, [1, 25]), (51, [1, 25, 50, 51])])
def test_progress_is_logged_for_the_first_every_25th_and_the_last_batch(batches, logged):
    log = []
    args = settings(train_seq_len=2, val_batch_size=2, grad_accum_steps=1)
    tokens = np.ones(2 * batches + 1, np.uint16)
    tg.eval_val(args, lambda x, y: mx.array(1.0), tokens, *ONE_BYTE_EACH, log_fn=log.append)
    assert log == [f"val_progress:{i}/{batches}" for i in logged]


def test_a_batch_without_room_for_a_sequence_is_refused():
    args = settings(train_seq_len=8, val_batch_size=15, grad_accum_steps=2)
    with pytest.raises(ValueError, match="VAL_BATCH_SIZE=15"):
        tg.eval_val(args, lambda x, y: mx.array(1.0), np.ones(17, np.uint16), *ONE_BYTE_EACH)
