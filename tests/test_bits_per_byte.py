"""How many bytes a token stands for, and the score in bits per byte."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece as spm

import train_gpt_mlx as tg
from conftest import train_tokenizer
from helpers import RECORDED, learnable_tokens, settings

TEXTS = ["the cat and the tree", "naïve café «owl»", "東京 stone 1987", "a\tb  c", "zebra quartz 🦉 ωμέγα"]


@pytest.fixture(scope="module")
def tables(tokenizer):
    return tg.build_sentencepiece_luts(tokenizer, 320)


def test_table_types_and_length(tokenizer):
    for vocab_size, length in ((320, 320), (100, 320), (330, 330)):
        base, space, boundary = tg.build_sentencepiece_luts(tokenizer, vocab_size)
        assert [table.dtype for table in (base, space, boundary)] == [np.int16, np.bool_, np.bool_]
        assert len(base) == len(space) == len(boundary) == length
        assert isinstance(base, np.ndarray)
    assert base[320:].tolist() == [0] * 10
    assert space[320:].tolist() == [False] * 10
    assert boundary[320:].tolist() == [True] * 10


def test_each_kind_of_piece(tokenizer, tables):
    base, space, boundary = tables
    seen = set()
    for i in range(320):
        piece = tokenizer.id_to_piece(i)
        if i <= 3:
            kind, expected = "special", (0, False, True)
        elif piece.startswith("<0x") and len(piece) == 6:
            kind, expected = "byte", (1, False, False)
        elif piece.startswith("▁"):
            kind, expected = "spaced", (len(piece[1:].encode()), True, False)
        else:
            kind, expected = "plain", (len(piece.encode()), False, False)
        assert (base[i], space[i], boundary[i]) == expected, piece
        seen.add(kind)
    assert seen == {"special", "byte", "spaced", "plain"}
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert any(len(tokenizer.id_to_piece(i).lstrip("▁").encode()) > len(tokenizer.id_to_piece(i).lstrip("▁"))
               for i in range(4, 320)), "no non-Latin piece was tested"  # fmt: skip


class WithUnused:
    """A tokenizer some of whose pieces are unused, as after limiting it to a vocabulary."""

    def __init__(self, tokenizer, unused):
        self.tokenizer, self.unused = tokenizer, unused

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def is_unused(self, piece):
        return piece in self.unused


def test_unused_pieces_stand_for_nothing(tokenizer, tables):
    unused = [10, 300, 301, 319]
    used = [i for i in range(320) if i not in unused]
    changed = tg.build_sentencepiece_luts(WithUnused(tokenizer, unused), 320)
    for table, before, value in zip(changed, tables, (0, False, True), strict=True):
        assert set(table[unused].tolist()) == {value}
        assert table[used].tolist() == before[used].tolist()


def test_only_the_first_of_two_spaces_is_a_leading_space():
    sp = spm.SentencePieceProcessor(model_proto=train_tokenizer(user_defined_symbols=["▁▁x"]))
    base, space, boundary = tg.build_sentencepiece_luts(sp, sp.vocab_size())
    piece = sp.piece_to_id("▁▁x")
    assert (base[piece], space[piece], boundary[piece]) == (4, True, False)  # "▁" has three bytes


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_document_are_those_of_its_text(tokenizer, tables, text):
    base, space, boundary = tables
    ids = np.array([tokenizer.bos_id(), *tokenizer.encode(text)])
    previous, target = ids[:-1], ids[1:]
    counted = base[target].sum() + (space[target] & ~boundary[previous]).sum()
    assert counted == len(tokenizer.decode(ids.tolist()).encode())


def recorded_tables():
    ids = np.arange(64)
    return (ids % 5).astype(np.int16), ids % 3 == 0, ids < 4


@pytest.mark.parametrize("case", RECORDED["eval_val"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_score(case):
    calls, log = [], []
    args = settings(train_seq_len=case["seq"], val_batch_size=case["val_batch_size"],
                    grad_accum_steps=case["grad_accum_steps"])  # fmt: skip
    tokens = learnable_tokens(case["n"], 50, case["salt"]).astype(np.int32)
    tokens = tokens[: (len(tokens) - 1) // case["seq"] * case["seq"] + 1]

    def loss(x, y):
        calls.append(list(x.shape))
        return mx.mean(0.01 * x.astype(mx.float32) + 0.03 * y.astype(mx.float32))

    result = tg.eval_val(args, loss, tokens, *recorded_tables(), log_fn=log.append)
    assert result == pytest.approx((case["val_loss"], case["val_bpb"]), rel=1e-6)
    assert calls == [case["batch_shape"]] * case["batches"]
    assert log == case["log"]


def test_short_last_batch_is_weighted_by_its_tokens():
    args = settings(train_seq_len=2, val_batch_size=8, grad_accum_steps=2)  # 2 sequences a batch
    tokens = np.array([0, 9, 1, 9, 9, 2, 9, 3, 9, 9, 9], dtype=np.uint16)  # 5 sequences: batches of 2, 2 and 1
    losses = iter([1.0, 2.0, 4.0])
    xs, ys = [], []

    def loss(x, y):
        assert x.dtype == y.dtype == mx.int32
        xs.extend(x.tolist())
        ys.extend(y.tolist())
        return mx.array(next(losses))

    base = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 3], dtype=np.int16)
    space = np.array([False] * 9 + [True])
    boundary = np.array([True, False, True] + [False] * 7)
    val_loss, val_bpb = tg.eval_val(args, loss, tokens, base, space, boundary)
    assert xs == [[0, 9], [1, 9], [9, 2], [9, 3], [9, 9]]
    assert ys == [[9, 1], [9, 9], [2, 9], [3, 9], [9, 9]]
    assert val_loss == pytest.approx((1.0 * 4 + 2.0 * 4 + 4.0 * 2) / 10)
    # Seven targets are 9: three bytes each, and a space but after the boundaries 0 and 2.
    assert val_bpb == pytest.approx(val_loss / math.log(2) * 10 / (7 * 3 + 5))


def test_many_tokens_do_not_overflow_the_byte_count():
    args = settings(train_seq_len=1000, val_batch_size=100_000, grad_accum_steps=1)
    tokens = np.ones(100_001, dtype=np.int32)
    tables = np.array([0, 30_000], np.int16), np.array([False, False]), np.array([True, False])
    _, val_bpb = tg.eval_val(args, lambda x, y: mx.array(1.0), tokens, *tables)
    assert val_bpb == pytest.approx(1 / math.log(2) / 30_000)


@pytest.mark.parametrize(
    ("batches", "logged"), [(1, []), (2, [1, 2]), (24, [1, 24]), (25, [1, 25]), (51, [1, 25, 50, 51])]
)
def test_progress_lines(batches, logged):
    log = []
    args = settings(train_seq_len=2, val_batch_size=2, grad_accum_steps=1)
    tokens = np.full(2 * batches + 1, 1)
    tables = np.ones(2, np.int16), np.zeros(2, bool), np.zeros(2, bool)
    tg.eval_val(args, lambda x, y: mx.array(1.0), tokens, *tables, log_fn=log.append)
    assert log == [f"val_progress:{i}/{batches}" for i in logged]


def test_batch_without_room_for_a_sequence():
    args = settings(train_seq_len=8, val_batch_size=15, grad_accum_steps=2)
    with pytest.raises(ValueError, match=r"VAL_BATCH_SIZE=15.*GRAD_ACCUM_STEPS=2.*TRAIN_SEQ_LEN=8"):
        tg.eval_val(args, lambda x, y: mx.array(1.0), np.ones(17), *recorded_tables())


def test_uniform_guessing_scores_log2_of_the_vocabulary_per_token():
    args = settings(train_seq_len=4, val_batch_size=8, grad_accum_steps=1)
    tokens = learnable_tokens(41, 64, 1)
    tables = np.full(64, 2, np.int16), np.zeros(64, bool), np.zeros(64, bool)
    _, val_bpb = tg.eval_val(args, lambda x, y: mx.array(math.log(64.0)), tokens, *tables)
    assert val_bpb == pytest.approx(6.0 / 2.0)
