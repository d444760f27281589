"""Inputs that need no random generator, so that every machine makes the same ones, and small builders."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import train_gpt_mlx as tg

REPO = Path(__file__).resolve().parent.parent
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text(encoding="utf-8"))

needs_compiler = pytest.mark.skipif(
    sys.platform == "linux" and tg.backend() == "cpu" and not shutil.which("g++"),
    reason="MLX compiles nothing on a Linux CPU without g++",
)

WORDS = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "omicron", "pi", "rho", "sigma", "tau",
]  # fmt: skip


def learnable_tokens(count: int, vocab: int, salt: int) -> np.ndarray:
    """`count` ids below `vocab`; three in four follow from the one before, so that a model can learn them.

    A linear congruential generator (modulus 2^31) draws: (draw % 4 != 0) continues the chain 31 t + 7 from the
    last token, which begins at 1; otherwise the draw itself is the token.
    """
    tokens, state, token = [], salt, 1
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        draw = state // 2**16
        token = (31 * token + 7) % vocab if draw % 4 != 0 else draw % vocab
        tokens.append(token)
    return np.array(tokens, dtype=np.int64)


def wave(shape: tuple[int, ...], a: float, b: float) -> np.ndarray:
    """float32 sine of sum over axes d of index_d * (a + d * b)."""
    phase = np.zeros(shape)
    for axis, size in enumerate(shape):
        phase += (np.arange(size) * (a + axis * b)).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return np.sin(phase).astype(np.float32)


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard file, written byte by byte from the format's description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [int(token) for token in tokens]
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    data = b"".join(value.to_bytes(4, "little", signed=True) for value in header)
    path.write_bytes(data + b"".join(token.to_bytes(2, "little") for token in tokens))
    return path


def settings(**values) -> tg.Hyperparameters:
    """Hyperparameters of a tiny model, with `values` assigned on top."""
    args = tg.Hyperparameters()
    tiny = dict(
        vocab_size=64, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_mult=2, train_seq_len=8,
        train_batch_tokens=64, grad_accum_steps=2, val_batch_size=64, mlx_max_microbatch_tokens=16, iterations=10,
        max_wallclock_seconds=0.0, warmdown_iters=0,
    )  # fmt: skip
    for name, value in {**tiny, **values}.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def build_model(args: tg.Hyperparameters) -> tg.GPT:
    """The seeded model that a run with these settings would start from."""
    mx.random.seed(args.seed)
    return tg.GPT(
        vocab_size=args.vocab_size, num_layers=args.num_layers, dim=args.model_dim, num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads, mlp_mult=args.mlp_mult, logit_chunk_tokens=args.logit_chunk_tokens,
        logit_softcap=args.logit_softcap, rope_base=args.rope_base, tied_embed_init_std=args.tied_embed_init_std,
        qk_gain_init=args.qk_gain_init,
    )  # fmt: skip


def stir(model: tg.GPT, seed: int = 0) -> None:
    """Give every parameter an arbitrary value: at its initial ones half of the model multiplies by 0 or 1."""
    rng = np.random.default_rng(seed)
    tree = tg.tree_map(
        lambda p: mx.array(p.astype(mx.float32) + 0.3 * rng.standard_normal(p.shape)).astype(p.dtype),
        model.parameters(),
    )
    model.update(tree)


def to_numpy(array: mx.array) -> np.ndarray:
    """float64 copy of an MLX array of any floating dtype."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def tokens_of(root: Path, kind: str, name: str = "mytext_sp300") -> np.ndarray:
    """All tokens of a data set in a data folder."""
    files = sorted((root / "datasets" / name).glob(f"fineweb_{kind}_*.bin"))
    return np.concatenate([tg.load_data_shard(path) for path in files])


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file in a folder, by its name in it."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def one_line_error(capsys, *parts: str) -> None:
    """That a tool has printed nothing but a line of error with those parts in it to stderr."""
    check_one_line_error(capsys.readouterr().err, *parts)


def check_one_line_error(err: str, *parts: str) -> None:
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
