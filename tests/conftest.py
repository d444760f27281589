"""Fixtures that several test files share."""

from __future__ import annotations

import io
import os

import mlx.core as mx
import pytest
import sentencepiece as spm

import train_gpt_mlx as tg

SETTING_NAMES = [setting.variable for owner in (tg.Hyperparameters, tg.ModuleSettings)
                 for setting in tg.settings_of(owner).values()]  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """A developer's own ITERATIONS must not change what the tests see; the compute dtype is float32 everywhere."""
    for name in [*SETTING_NAMES, "TRAIN_MAX_SEQ_LEN"]:
        if name != "MLX_PRELOAD_BLAS" and name in os.environ:
            monkeypatch.delenv(name)
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", mx.float32)


PAIRS = [(a, b) for a in ("cat", "dog", "fox", "owl") for b in ("tree", "house", "river", "stone")]
TEXT = "\n".join(
    f"the {a} {b} says that {a}s and {b}s met {n} times in 19{n:02d}; «naïve café» and 東京 are words too."
    for n, (a, b) in enumerate(PAIRS)
)


def train_tokenizer(**changes) -> bytes:
    """A serialized SentencePiece model of 320 pieces in the challenge's recipe."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, model_type="bpe", vocab_size=320,
        character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **changes,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_proto() -> bytes:
    return train_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_proto) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=tokenizer_proto)
