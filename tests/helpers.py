"""Inputs that need no random generator, so that every machine makes the same ones, and small builders."""

import inspect
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

import train_gpt_mlx as tg

REPO = Path(__file__).resolve().parent.parent
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text(encoding="utf-8"))
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
WORDS = GREEK.split()


def learnable_tokens(count: int, vocab: int, salt: int) -> np.ndarray:
    """`count` ids below `vocab`; three in four follow from the one before, so that a model can learn them: a linear
    congruential generator draws; draw % 4 != 0 continues the chain 31 t + 7, else the draw itself is the token."""
    tokens, state, token = [], salt, 1
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        draw = state // 2**16
        token = (31 * token + 7) % vocab if draw % 4 != 0 else draw % vocab
        tokens.append(token)
    return np.array(tokens, dtype=np.int64)


def wave(shape: tuple[int, ...], a: float, b: float) -> np.ndarray:
    """float32 sine of sum over axes d of index_d * (a + d * b)."""
    phase = sum(index * (a + axis * b) for axis, index in enumerate(np.indices(shape)))
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
    tiny = dict(vocab_size=64, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_mult=2, train_seq_len=8)
    tiny |= dict(train_batch_tokens=64, grad_accum_steps=2, val_batch_size=64, mlx_max_microbatch_tokens=16)
    tiny |= dict(iterations=10, max_wallclock_seconds=0.0, warmdown_iters=0)
    for name, value in {**tiny, **values}.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def build_model(args: tg.Hyperparameters) -> tg.GPT:
    """The seeded model that a run with these settings would start from."""
    mx.random.seed(args.seed)
    names = inspect.signature(tg.GPT).parameters
    return tg.GPT(**{name: getattr(args, "model_dim" if name == "dim" else name) for name in names})


def stir(model: tg.GPT, seed: int = 0) -> None:
    """Give every parameter an arbitrary value: at its initial ones half of the model multiplies by 0 or 1."""
    rng = np.random.default_rng(seed)

    def stirred(p: mx.array) -> mx.array:
        return mx.array(p.astype(mx.float32) + 0.3 * rng.standard_normal(p.shape)).astype(p.dtype)

    model.update(tg.tree_map(stirred, model.parameters()))


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


def check_one_line_error(err: str, *parts: str) -> None:
    """That a program's errors are one line, with those parts in it."""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err
