#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx>=0.32.4; sys_platform == 'darwin'",
#     "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#     "numpy>=2.0",
#     "sentencepiece>=0.2.2",
# ]
# ///
"""Parameter Golf on Apple Silicon: train a small GPT, compress it, and score the result in bits per byte.

The challenge asks for the best language model whose code and compressed weights fit in 16,000,000 bytes. This is the
baseline for Macs; it also runs on Linux. Settings are environment variables: see `--help`.

Sections 1 to 8 are the algorithm, in the order of the data. Sections 9 to 14 turn it into a run. A *batch*, the tokens
of one optimizer step, is split into GRAD_ACCUM_STEPS *microbatches*, and those into *chunks* of at most
MLX_MAX_MICROBATCH_TOKENS tokens, the most in memory at once. Shapes read (batch, seq, dim).
"""

import contextlib
import ctypes
import difflib
import functools
import glob
import inspect
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

# MLX uses the first BLAS in the process. The one in its Linux CPU wheel is slow, so load OpenBLAS first.
if sys.platform == "linux" and "mlx.core" not in sys.modules and os.environ.get("MLX_PRELOAD_BLAS") != "0":
    with contextlib.suppress(OSError):  # not installed
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

try:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    import numpy as np
    import sentencepiece as spm
    from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error.name} is not installed: run `pip install -r requirements.txt`", file=sys.stderr)
    sys.exit(2)


# --- 1. Settings ---
# To add a setting, write its line: type, default of that type, meaning. It is then read from the environment and listed
# by --help. If it only affects logging or evaluation, put it in RunSettings: a resumed run may change it. Numbers must
# be at least 0, unless LIMITS says otherwise.


class InputError(ValueError):
    """Unusable input. The message says what to do."""


class RunSettings:
    """Settings that a resumed run may change."""

    # files
    data_path: str = "./data/datasets/fineweb10B_sp1024"  # folder of fineweb_{train,val}_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"  # SentencePiece model the shards were encoded with
    run_id: str = ""  # names the run's log and files; if unset, a fresh uuid4
    out_dir: str = "logs"  # folder for logs, models and checkpoints
    resume: str = ""  # checkpoint to continue from; auto: this RUN_ID's, if any
    # length, validation, logging
    iterations: int = 20000  # maximum optimizer steps; 0 scores the untrained model
    max_wallclock_seconds: float = 600.0  # maximum seconds of training; 0: no cap
    warmup_steps: int = 20  # above 0: compile before the clock starts, and log that many lines
    val_loss_every: int = 0  # validate every N steps; 0: only at the end
    val_max_tokens: int = 0  # score only the first N tokens, for a quick look; 0: all
    val_batch_size: int = 524288  # tokens per validation batch, times GRAD_ACCUM_STEPS
    train_log_every: int = 200  # log every N steps after the first 10; 0: no train lines
    checkpoint_every: int = 0  # checkpoint every N steps and at the end; 0: only if interrupted
    # memory
    mlx_eager_eval: bool = True  # finish a chunk before the next: less memory
    logit_chunk_tokens: int = 0  # compute the logits of N tokens at a time; 0: of all


class Hyperparameters(RunSettings):
    """All settings, read from the environment when an instance is made. Raises InputError."""

    # batches and schedule
    seed: int = 1337  # seed of the initial weights
    train_batch_tokens: int = 524288  # tokens per optimizer step
    grad_accum_steps: int = 8  # microbatches per step
    train_seq_len: int = 1024  # tokens per sequence (or TRAIN_MAX_SEQ_LEN)
    mlx_max_microbatch_tokens: int = 8192  # maximum tokens in the model at once; fewer take less memory
    warmdown_iters: int = 1200  # final steps over which the learning rate falls to 0
    # model
    vocab_size: int = 1024  # vocabulary size; must equal the tokenizer's
    num_layers: int = 9  # transformer blocks
    model_dim: int = 512  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key/value heads, each shared by NUM_HEADS / NUM_KV_HEADS query heads
    mlp_mult: int = 2  # MLP width as a multiple of MODEL_DIM
    tie_embeddings: bool = True  # embed and predict with one matrix; 0: not implemented
    tied_embed_init_std: float = 0.005  # standard deviation of the initial embedding
    logit_softcap: float = 30.0  # logits stay within -CAP..CAP
    rope_base: float = 10000.0  # base of the rotary frequencies
    qk_gain_init: float = 1.5  # initial gain of each head's queries
    # optimizer
    beta1: float = 0.9  # Adam: decay of the first moment
    beta2: float = 0.95  # Adam: decay of the second moment
    adam_eps: float = 1e-8  # Adam: added to the denominator
    tied_embed_lr: float = 0.05  # learning rate of the embedding (Adam)
    matrix_lr: float = 0.04  # learning rate of the blocks' matrices (Muon)
    scalar_lr: float = 0.04  # learning rate of vectors and gains (Adam)
    muon_momentum: float = 0.95  # Muon: momentum after its warmup
    muon_backend_steps: int = 5  # Muon: Newton-Schulz iterations per update
    muon_momentum_warmup_start: float = 0.85  # Muon: momentum at step 0
    muon_momentum_warmup_steps: int = 500  # Muon: steps until MUON_MOMENTUM; 0: constant
    grad_clip_norm: float = 0.0  # scale gradients down to this global norm; 0: off

    train_files = property(lambda self: f"{self.data_path}/fineweb_train_*.bin")
    val_files = property(lambda self: f"{self.data_path}/fineweb_val_*.bin")
    microbatch_tokens = property(lambda self: self.train_batch_tokens // self.grad_accum_steps)

    def __init__(self) -> None:
        problems = []
        for name in settings_of(type(self)):
            try:
                setattr(self, name, read_setting(name, getattr(self, name)))
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("\n".join(problems + setting_problems(self)))
        self.run_id = self.run_id or str(uuid.uuid4())

    def lr_mul(self, step: int, elapsed_ms: float) -> float:
        """Learning-rate multiplier after `step` steps: 1, then linearly down to 0. Under a wallclock cap the warmdown
        takes the time of WARMDOWN_ITERS average steps, which may be the whole run."""
        if self.warmdown_iters <= 0:
            return 1.0
        if self.max_wallclock_seconds <= 0:
            if step >= self.iterations:  # never reached in a run
                return 1.0
            return min((self.iterations - step) / self.warmdown_iters, 1.0)
        ms_left = max(1000.0 * self.max_wallclock_seconds - elapsed_ms, 0.0)
        warmdown_ms = self.warmdown_iters * (elapsed_ms / max(step, 1))
        return ms_left / warmdown_ms if ms_left <= warmdown_ms else 1.0  # warmdown_ms is 0 before the first step


AT_LEAST_1 = """train_batch_tokens grad_accum_steps train_seq_len mlx_max_microbatch_tokens val_batch_size vocab_size
    num_layers model_dim num_heads num_kv_heads mlp_mult"""
ANY_SIGN = "max_wallclock_seconds warmdown_iters grad_clip_norm qk_gain_init"
LIMITS = {  # the least value, and the one to stay below; at least 0 for all others
    **dict.fromkeys(AT_LEAST_1.split(), (1, 2**64)),
    **dict.fromkeys(ANY_SIGN.split(), (-math.inf, math.inf)),
    **dict.fromkeys(["beta1", "beta2"], (0, 1)),
}

CONTROL_NAMES = "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"


class ModuleSettings:
    """Settings of module constants, read at import. Hyperparameters does not have them."""

    # module constants
    compute_dtype: str = "auto"  # bfloat16, float32, or auto: bfloat16 on a GPU, else float32
    mlx_preload_blas: str = "1"  # Linux: use OpenBLAS if it is installed
    control_tensor_name_patterns: str = CONTROL_NAMES  # block parameters that Adam trains, not Muon
    int8_keep_float_fp32_name_patterns: str = ""  # small tensors saved in float32; if unset, the same


def settings_of(owner: type) -> dict[str, Any]:
    """The settings that a class declares, {attribute name: default}."""
    return {name: getattr(owner, name) for name in get_type_hints(owner)}


def read_setting(name: str, default: Any) -> Any:
    """The environment's value, in the default's type, or the default."""
    variable = name.upper()
    if name == "train_seq_len" and variable not in os.environ:
        variable = "TRAIN_MAX_SEQ_LEN"
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        if isinstance(default, bool):
            return {"0": False, "1": True}[text]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = {bool: "0 or 1", int: "a whole number", float: "a number"}[type(default)]
        raise InputError(f"{variable}={text}: must be {kind}") from None


def backend() -> str:
    """Where MLX computes by default: "metal", "cuda" or "cpu"."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


MX_DTYPE_FROM_NAME = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# On a CPU, bfloat16 products are a slow loop of MLX's own, and float32 goes to the BLAS.
COMPUTE_DTYPE = mx.float32 if backend() == "cpu" else mx.bfloat16
if os.environ.get("COMPUTE_DTYPE") in ("float32", "bfloat16"):
    COMPUTE_DTYPE = MX_DTYPE_FROM_NAME[os.environ["COMPUTE_DTYPE"]]
control_names = read_setting("control_tensor_name_patterns", CONTROL_NAMES)
fp32_names = read_setting("int8_keep_float_fp32_name_patterns", control_names)
CONTROL_TENSOR_NAME_PATTERNS = tuple(filter(None, control_names.split(",")))  # "" would match every name
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS = tuple(filter(None, fp32_names.split(",")))


# --- 2. Shards and streams ---
# In: files of uint16 tokens. Out: an endless stream of batches (x, y), where y is x shifted by one token.

LogFn = Callable[[str], None]
HOW_TO_GET_DATA = "data/cached_challenge_fineweb.py fetches FineWeb, data/prepare.py makes a sample"


def map_data_shard(path: Path | str) -> np.ndarray:
    """A shard's tokens, (tokens,) uint16, read from the disk when used. Raises InputError if it is damaged."""
    header = np.fromfile(path, dtype="<i4", count=256)  # magic number, version, token count, zeros
    if len(header) < 256 or header[:2].tolist() != [20240520, 1]:
        raise InputError(f"{path}: not a shard of tokens")
    num_tokens = int(header[2])
    if os.path.getsize(path) != 1024 + 2 * num_tokens:
        raise InputError(f"{path}: damaged: its size does not fit {num_tokens} tokens: fetch it again")
    return np.memmap(path, "<u2", "r", offset=1024, shape=(num_tokens,)).view(np.ndarray)


def load_data_shard(path: Path | str) -> np.ndarray:
    """All tokens of a shard, (tokens,) int32. Raises InputError."""
    return map_data_shard(path).astype(np.int32)


def find_shards(pattern: str) -> list[str]:
    """The files that match a glob pattern, sorted. Raises FileNotFoundError."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}: correct DATA_PATH ({HOW_TO_GET_DATA})")
    return files


def check_tokens(tokens: np.ndarray, vocab_size: int, path: str, start: int = 0) -> None:
    """Raise InputError if there are no tokens, or for an id without an embedding: MLX would read garbage."""
    if len(tokens) == 0:
        raise InputError(f"{path}: has no tokens: remove it")
    if tokens.max() >= vocab_size:
        i = int(np.argmax(tokens >= vocab_size))
        raise InputError(f"{path}: token {start + i} is {tokens[i]}: not below VOCAB_SIZE={vocab_size}")


class TokenStream:
    """The tokens of all files of a pattern, in the order of their names, again and again. Next comes `tokens[pos]` of
    file `file_idx`. `epoch` counts from 1. Raises InputError for damaged files and for ids not below vocab_size."""

    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "", vocab_size: int = 65536):
        self.files = find_shards(pattern)
        self.log_fn, self.dataset_name, self.vocab_size = log_fn, dataset_name, vocab_size
        self.seek(file_idx=0, pos=0, epoch=1)

    def seek(self, file_idx: int, pos: int, epoch: int) -> None:
        """Continue at token `pos` of a file."""
        self.file_idx, self.pos, self.epoch = file_idx, pos, epoch
        self.tokens = map_data_shard(self.files[file_idx])

    def next_file(self) -> None:
        """Open the next file, or the first one in a new epoch."""
        if self.file_idx + 1 < len(self.files):
            self.seek(self.file_idx + 1, 0, self.epoch)
            return
        self.seek(0, 0, self.epoch + 1)
        if self.log_fn is not None:
            shards = f"dataset:{self.dataset_name} train_shards:{len(self.files)}"
            self.log_fn(f"WARNING: starting epoch:{self.epoch} {shards}")

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) int32."""
        parts = [np.empty(0, dtype=np.int32)]  # makes the result int32
        while n > 0:
            if self.pos >= len(self.tokens):
                self.next_file()
            part = self.tokens[self.pos : self.pos + n]
            check_tokens(part, self.vocab_size, self.files[self.file_idx], self.pos)
            parts.append(part)
            self.pos += len(part)
            n -= len(part)
        return np.concatenate(parts)


def inputs_and_targets(tokens: np.ndarray, seq_len: int) -> tuple[mx.array, mx.array]:
    """k * seq_len + 1 tokens as x and y, (k, seq_len) int32 each."""
    tokens = tokens.astype(np.int32)
    return mx.array(tokens[:-1].reshape(-1, seq_len)), mx.array(tokens[1:].reshape(-1, seq_len))


class TokenLoader:
    """Cuts a TokenStream, its attribute `stream`, into batches."""

    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "", vocab_size: int = 65536):
        self.stream = TokenStream(pattern, log_fn, dataset_name, vocab_size)

    def next_batch(self, batch_tokens: int, seq_len: int) -> tuple[mx.array, mx.array]:
        """x and y, (batch_tokens // seq_len, seq_len) int32 each. Takes one token more, so the last target is not the
        next batch's first input. Raises InputError if no sequence fits."""
        num_tokens = batch_tokens // seq_len * seq_len
        if num_tokens == 0:
            raise InputError(f"a batch of {batch_tokens} tokens has no room for a sequence of {seq_len}")
        return inputs_and_targets(self.stream.take(num_tokens + 1), seq_len)


def load_validation_tokens(pattern: str, seq_len: int) -> np.ndarray:
    """The tokens of all validation shards, (k * seq_len + 1,) uint16, with the largest k. Raises InputError for damaged
    shards and if k is 0, FileNotFoundError if there are none."""
    shards = [map_data_shard(path) for path in find_shards(pattern)]
    tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)  # a single one stays on the disk
    num_seqs = (len(tokens) - 1) // seq_len
    if num_seqs < 1:
        raise InputError(f"{pattern}: {len(tokens)} tokens are too few for a sequence of TRAIN_SEQ_LEN={seq_len}")
    return tokens[: num_seqs * seq_len + 1]


def validate_dataset_tokenizer_pair(data_path: str, tokenizer_path: str) -> tuple[str, int, int | None]:
    """(data set's name, training shards present, training shards expected or None), by the manifest.json two folders
    above it. Raises InputError if that is damaged, or lists another tokenizer or fewer shards."""
    folder = Path(os.path.abspath(data_path))
    present = len(list(folder.glob("fineweb_train_*.bin")))
    path = folder.parent.parent / "manifest.json"
    if not path.is_file():
        return folder.name, present, None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        dataset = {entry["name"]: entry for entry in manifest["datasets"]}.get(folder.name, {})
        tokenizers = {entry["name"]: entry for entry in manifest.get("tokenizers", [])}
        tokenizer = tokenizers.get(dataset.get("tokenizer_name"), {})
        tokenizer_file = Path(tokenizer.get("model_path") or tokenizer.get("path") or tokenizer_path).name
        expected = dataset.get("stats", {}).get("files_train")
        has_too_many = expected is not None and present > expected
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}): correct it, or move it away") from None
    if tokenizer_file != Path(tokenizer_path).name:
        raise InputError(f"TOKENIZER_PATH={tokenizer_path}: {path} lists {tokenizer_file} for this data")
    if has_too_many:
        raise InputError(f"DATA_PATH={data_path}: has {present} training shards, but {path} lists {expected}")
    return folder.name, present, expected


# --- 3. Bytes per token ---
# In: the tokenizer. Out: the bytes of text that each token stands for, so that scores compare across tokenizers.


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[np.ndarray, ...]:
    """Tables (max(tokenizer's size, vocab_size),): base bytes int16, has leading space bool, is boundary bool.
    "\u2581the" has 3 base bytes and a leading space. The space is one more byte, unless the token before is a boundary.
    Boundaries are tokens without text, such as beginning of document."""
    size = max(sp.vocab_size(), vocab_size)
    base_bytes = np.zeros(size, dtype=np.int16)
    has_leading_space, is_boundary = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    for token_id in range(sp.vocab_size()):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        piece = sp.id_to_piece(token_id)
        is_boundary[token_id] = False
        has_leading_space[token_id] = piece.startswith("\u2581")
        base_bytes[token_id] = len(piece.removeprefix("\u2581").encode())
        if sp.is_byte(token_id):  # a piece such as "<0x0A>"
            base_bytes[token_id] = 1
    return base_bytes, has_leading_space, is_boundary


# --- 4. Model ---
# In: token ids (batch, seq). Out: hidden states (batch, seq, dim), and the loss in nats. Activations and the embedding
# are in COMPUTE_DTYPE. Other weights are float32, and cast where they are used.


def rms_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype (arXiv:1910.07467, without a weight)."""
    # Not mx.fast.rms_norm, which computes in float32: bfloat16 runs would not repeat the baseline's digits.
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNormNoWeight(nn.Module):
    """rms_norm as a module without parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x)


class CastedLinear(nn.Module):
    """x @ weight.T, with a float32 weight (out_dim, in_dim) cast to x's dtype."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Linear(in_dim, out_dim, bias=False).weight

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


def softmax_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention for Linux CPUs, where MLX has no fused kernel. q holds the last num_queries positions of k."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    q = (q * scale).reshape(batch, num_kv_heads, -1, head_dim)  # query heads that share keys are rows of one product
    scores = (q @ k.swapaxes(-1, -2)).reshape(batch, num_heads, num_queries, num_keys).astype(mx.float32)
    is_visible = mx.arange(num_keys - num_queries, num_keys)[:, None] >= mx.arange(num_keys)
    scores = mx.where(is_visible, scores, -mx.inf)
    largest = mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True))
    weights = mx.power(mx.array(math.e), scores - largest)  # mx.exp takes three times as long on Linux
    y = weights.astype(v.dtype).reshape(batch, num_kv_heads, -1, num_keys) @ v
    y = y.reshape(batch, num_heads, num_queries, head_dim) / weights.sum(axis=-1, keepdims=True)
    return y.astype(v.dtype)


QUERY_BLOCK = 128  # 64 and 256 are up to 5% slower at 1,024 tokens on 2 Linux cores


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, (batch, heads, seq, head_dim), with fewer heads in k and v. Queries come in blocks, each with
    the keys it can see. That halves the scores, which MLX stores except on CUDA in 16 bits: 1.4 times as fast."""
    attend = functools.partial(mx.fast.scaled_dot_product_attention, scale=scale, mask="causal")
    if backend() == "cuda" and q.dtype != mx.float32:
        return attend(q, k, v)
    if backend() == "cpu" and sys.platform == "linux":
        attend = functools.partial(softmax_attention, scale=scale)
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        end = start + QUERY_BLOCK  # may be beyond the sequence
        blocks.append(attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
    return mx.concatenate(blocks, axis=2)


class CausalSelfAttention(nn.Module):
    """Causal attention with grouped key/value heads (arXiv:2305.13245) and rotary positions (arXiv:2104.09864).
    Queries and keys are normalized, so scores cannot grow with the weights (arXiv:2010.04245)."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise InputError(f"MODEL_DIM={dim} must be a multiple of NUM_HEADS={num_heads}")
        if num_heads % num_kv_heads != 0:
            raise InputError(f"NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}")
        if dim // num_heads % 2 != 0:
            raise InputError(f"MODEL_DIM={dim} / NUM_HEADS={num_heads} must be even, because RoPE rotates pairs")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, num_kv_heads * self.head_dim)
        self.c_v = CastedLinear(dim, num_kv_heads * self.head_dim)
        self.proj = CastedLinear(dim, dim)
        self.q_gain = mx.full((num_heads,), qk_gain_init, dtype=mx.float32)
        self.rope = nn.RoPE(self.head_dim, traditional=False, base=rope_base)

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        batch, seq, dim = x.shape
        q = self.c_q(x).reshape(batch, seq, self.num_heads, self.head_dim).swapaxes(1, 2)
        k = self.c_k(x).reshape(batch, seq, self.num_kv_heads, self.head_dim).swapaxes(1, 2)
        v = self.c_v(x).reshape(batch, seq, self.num_kv_heads, self.head_dim).swapaxes(1, 2)
        q = self.rope(rms_norm(q).astype(COMPUTE_DTYPE))
        k = self.rope(rms_norm(k).astype(COMPUTE_DTYPE))
        q = q * self.q_gain.astype(q.dtype)[:, None, None]
        y = causal_attention(q, k, v, self.head_dim**-0.5)
        return self.proj(y.swapaxes(1, 2).reshape(batch, seq, dim))


@mx.custom_function
def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0)^2 (arXiv:2109.08668). Its gradient needs x alone. MLX's own also keeps relu(x): 4% more memory."""
    return mx.square(nn.relu(x))


relu_squared.vjp(lambda x, cotangent, output: 2 * nn.relu(x) * cotangent)


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, dim: int, mlp_mult: int) -> None:
        super().__init__()
        self.fc = CastedLinear(dim, dim * mlp_mult)
        self.proj = CastedLinear(dim * mlp_mult, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        return self.proj(relu_squared(self.fc(x)))


class Block(nn.Module):
    """A transformer block: attention, then the MLP, each with a learned scale. resid_mix (2, dim) weights the input and
    x0, the normalized embedding, which initially has weight 0."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain_init: float
    ) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNormNoWeight(), RMSNormNoWeight()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale, self.mlp_scale = mx.ones((dim,)), mx.ones((dim,))
        self.resid_mix = mx.stack([mx.ones((dim,)), mx.zeros((dim,))])

    def __call__(self, x: mx.array, x0: mx.array) -> mx.array:
        """x, x0 and the result are (batch, seq, dim)."""
        mix = self.resid_mix.astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.astype(x.dtype) * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.astype(x.dtype) * self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The language model. The first half of the blocks, the encoder, push their outputs on a stack. Each later block
    first adds the output it pops, times a learned vector (U-Net, arXiv:1505.04597). The embedding also predicts the
    next token (arXiv:1608.05859). Raises InputError."""

    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: int,
        logit_chunk_tokens: int,
        logit_softcap: float,
        rope_base: float,
        tied_embed_init_std: float,
        qk_gain_init: float,
    ) -> None:
        super().__init__()
        if logit_softcap <= 0.0:
            raise InputError(f"LOGIT_SOFTCAP={logit_softcap}: must be above 0")
        self.logit_chunk_tokens, self.logit_softcap = logit_chunk_tokens, logit_softcap
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        # One seed gives one model, bit for bit. So the order of drawing is fixed, and discarded draws must stay too.
        self.tok_emb = nn.Embedding(vocab_size, dim)
        block_args = (dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
        self.blocks = [Block(*block_args) for _ in range(num_layers)]
        self.skip_weights = mx.ones((self.num_skip_weights, dim))
        self.final_norm = RMSNormNoWeight()
        for block in self.blocks:  # at first a block adds nothing to the residual stream
            block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
            block.mlp.proj.weight = mx.zeros_like(block.mlp.proj.weight)
        self.tok_emb.weight = (mx.random.normal((vocab_size, dim)) * tied_embed_init_std).astype(COMPUTE_DTYPE)

    def __call__(self, input_ids: mx.array) -> mx.array:
        """Token ids (batch, seq) -> hidden states (batch, seq, dim) in COMPUTE_DTYPE."""
        x = x0 = rms_norm(self.tok_emb(input_ids).astype(COMPUTE_DTYPE))
        skips = []
        for block in self.blocks[: self.num_encoder_layers]:
            x = block(x, x0)
            skips.append(x)
        for i, block in enumerate(self.blocks[self.num_encoder_layers :]):
            if skips:
                x = x + self.skip_weights[i].astype(x.dtype) * skips.pop()
            x = block(x, x0)
        return self.final_norm(x)

    def softcap(self, logits: mx.array) -> mx.array:
        """Squash logits smoothly into (-cap, cap) (arXiv:2408.00118)."""
        return self.logit_softcap * mx.tanh(logits / self.logit_softcap)

    def loss(self, input_ids: mx.array, target_ids: mx.array) -> mx.array:
        """Mean cross-entropy in nats, a float32 scalar, for ids (batch, seq). The logits (tokens, vocab_size) are the
        largest array. logit_chunk_tokens > 0 computes them in parts."""
        targets = target_ids.reshape(-1)
        x = self(input_ids).reshape(targets.size, -1)
        chunk = self.logit_chunk_tokens if self.logit_chunk_tokens > 0 else targets.size
        total = mx.array(0.0)
        for start in range(0, targets.size, chunk):
            logits = self.softcap(x[start : start + chunk] @ self.tok_emb.weight.astype(x.dtype).T)
            losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets[start : start + chunk])
            total = total + losses.sum()
        return total / targets.size


def build_model(args: Hyperparameters) -> GPT:
    """The seeded model."""
    mx.random.seed(args.seed)
    sizes = (args.vocab_size, args.num_layers, args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult)
    logits = (args.logit_chunk_tokens, args.logit_softcap)
    return GPT(*sizes, *logits, args.rope_base, args.tied_embed_init_std, args.qk_gain_init)


# --- 5. Optimizers ---
# In: parameters and gradients, as flat dicts {"blocks.0.mlp.fc.weight": array, ...}. Out: new parameters. Muon trains
# the matrices of the blocks, Adam the embedding and all vectors.

FlatParams = dict[str, mx.array]


def zeropower_newtonschulz5(g: mx.array, steps: int, eps: float = 1e-7) -> mx.array:
    """g, (rows, cols), with its singular values moved close to 1 (https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.astype(mx.float32)
    x = x / (mx.linalg.norm(x) + eps)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x  # x @ x.T is smallest with the short side first
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.T if is_tall else x
    return x.astype(g.dtype)


class Muon:
    """Momentum with orthogonalized updates: all directions of a matrix learn at one rate."""

    def __init__(self, keys: list[str], params: FlatParams, args: Hyperparameters) -> None:
        self.keys, self.args = keys, args
        self.buffers = {key: mx.zeros_like(params[key]) for key in keys}

    def step(self, params: FlatParams, grads: FlatParams, step: int, lr_mul: float) -> FlatParams:
        """New values of this optimizer's parameters. `step` counts from 0."""
        args, updated = self.args, {}
        warmed = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1.0 - warmed) * args.muon_momentum_warmup_start + warmed * args.muon_momentum
        for key in self.keys:
            param, grad = params[key], grads[key]
            self.buffers[key] = momentum * self.buffers[key] + grad
            update = zeropower_newtonschulz5(grad + momentum * self.buffers[key], args.muon_backend_steps)
            # All singular values are 1, so a tall matrix's update is small beside its many rows: make up for that.
            rate = args.matrix_lr * lr_mul * math.sqrt(max(1.0, param.shape[0] / param.shape[1]))
            updated[key] = param - rate * update.astype(param.dtype)
        return updated


class SplitOptimizers:
    """Muon for `matrix_keys`, Adam for `embed_key` and `scalar_keys`. Raises InputError for any other parameter."""

    def __init__(self, model: GPT, args: Hyperparameters) -> None:
        self.args = args
        self.embed_key = "tok_emb.weight"
        self.matrix_keys, self.scalar_keys = [], []
        params = dict(tree_flatten(model.parameters()))
        for key, param in params.items():
            is_in_block = key.startswith("blocks.")
            is_control = any(pattern in key for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if is_in_block and param.ndim == 2 and not is_control:
                self.matrix_keys.append(key)
            elif key == "skip_weights" or (is_in_block and (param.ndim < 2 or is_control)):
                self.scalar_keys.append(key)
            elif key != self.embed_key:
                raise InputError(f"no optimizer trains {key}: give it a place in SplitOptimizers")
        self.muon = Muon(self.matrix_keys, params, args)
        adam = functools.partial(optim.Adam, betas=[args.beta1, args.beta2], eps=args.adam_eps, bias_correction=True)
        self.adam_embed, self.adam_scalar = adam(args.tied_embed_lr), adam(args.scalar_lr)
        self.adam_embed.init({self.embed_key: params[self.embed_key]})
        self.adam_scalar.init({key: params[key] for key in self.scalar_keys})

    def update(self, params: FlatParams, grads: FlatParams, step: int, lr_mul: float) -> FlatParams:
        """New values of all parameters. `step` counts from 0."""
        updated = self.muon.step(params, grads, step, lr_mul)
        for adam, learning_rate, keys in (
            (self.adam_embed, self.args.tied_embed_lr, [self.embed_key]),
            (self.adam_scalar, self.args.scalar_lr, self.scalar_keys),
        ):
            adam.learning_rate = learning_rate * lr_mul
            updated |= adam.apply_gradients({key: grads[key] for key in keys}, {key: params[key] for key in keys})
        return updated

    def step(self, model: GPT, grads_tree: dict, step: int, lr_mul: float) -> None:
        """Update the model. MLX is lazy: the work is done when its parameters are evaluated."""
        updated = self.update(dict(tree_flatten(model.parameters())), dict(tree_flatten(grads_tree)), step, lr_mul)
        model.update(tree_unflatten(list(updated.items())))


def clip_grad_tree(grads_tree: dict, max_norm: float) -> dict:
    """Scale gradients down to a global norm of max_norm, if that is above 0. Summed in float64, which GPUs lack."""
    if max_norm <= 0:
        return grads_tree
    leaves = [np.array(grad.astype(mx.float32)) for _, grad in tree_flatten(grads_tree)]
    norm = math.sqrt(sum(np.sum(np.square(leaf), dtype=np.float64) for leaf in leaves))
    scale = min(max_norm / (norm + 1e-12), 1.0)
    return tree_map(lambda grad: (grad * scale).astype(grad.dtype), grads_tree)


# --- 6. One step ---
# In: the loader. Out: mean loss and gradients of an optimizer step, one chunk at a time. Several processes (section 9)
# share the microbatches. A chunk is prepared while the one before it runs.

Loss = Callable[[mx.array, mx.array], mx.array]
LossAndGrad = Callable[[mx.array, mx.array], tuple[mx.array, dict]]


def token_chunks(total_tokens: int, seq_len: int, max_chunk_tokens: int) -> list[int]:
    """Sizes in tokens of chunks of whole sequences: at most max_chunk_tokens, but at least one sequence. The last may
    be smaller. Raises InputError if no sequence fits."""
    total_seqs, chunk_seqs = total_tokens // seq_len, max(max_chunk_tokens // seq_len, 1)
    if total_seqs == 0:
        raise InputError(f"a microbatch of {total_tokens} tokens has no room for TRAIN_SEQ_LEN={seq_len}")
    return [min(chunk_seqs, total_seqs - done) * seq_len for done in range(0, total_seqs, chunk_seqs)]


def accumulate_flat_grads(accum: FlatParams | None, grads_tree: dict, scale: float) -> FlatParams:
    """Add scale * grads to accum, a flat dict, and return it. None starts a new one."""
    accum = {} if accum is None else accum
    for key, grad in tree_flatten(grads_tree):
        accum[key] = accum[key] + grad * scale if key in accum else grad * scale
    return accum


def loss_and_grad_chunked(
    args: Hyperparameters, train_loader: TokenLoader, compiled_loss_and_grad: LossAndGrad, microbatches: int = 1
) -> tuple[mx.array, dict]:
    """Mean loss (scalar, nats) and mean gradients (a tree) of the loader's next microbatches."""
    sizes = token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    loss, accum = mx.array(0.0), None
    for microbatch in range(microbatches):
        if not is_mine(microbatch):
            train_loader.stream.take(sum(sizes) + len(sizes))  # as much as its chunks use up
            continue
        for size in sizes:
            chunk_loss, grads = compiled_loss_and_grad(*train_loader.next_batch(size, args.train_seq_len))
            share = size / sum(sizes) / (microbatches // world().size())
            accum = accumulate_flat_grads(accum, grads, share)
            previous = loss
            loss = loss + chunk_loss.astype(mx.float32) * share
            del chunk_loss, grads  # frees memory
            if args.mlx_eager_eval:  # else the lazy graph holds every chunk's activations
                mx.eval(previous)
                mx.async_eval(loss, accum)
    return average_over_ranks(loss, tree_unflatten(list(accum.items())))


# --- 7. Evaluation ---
# In: a loss function and the validation tokens. Out: val_loss, nats per token, and the score: val_bpb, bits per byte.
# For a sliding window, change validation_batches, which the warmup also uses, and the loss, a mean over all positions.


def read_validation(args: Hyperparameters) -> tuple[np.ndarray, int, tuple[np.ndarray, ...]]:
    """(tokens to score, how many there are without VAL_MAX_TOKENS, byte tables). Raises InputError."""
    path = args.tokenizer_path
    if not path.endswith(".model"):
        raise InputError(f"TOKENIZER_PATH={path}: must be a SentencePiece model, ending in .model")
    if not Path(path).is_file():
        raise FileNotFoundError(f"TOKENIZER_PATH={path}: no such file ({HOW_TO_GET_DATA})")
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except RuntimeError:
        raise InputError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({HOW_TO_GET_DATA})") from None
    if tokenizer.vocab_size() != args.vocab_size:
        raise InputError(f"VOCAB_SIZE={args.vocab_size}, but TOKENIZER_PATH={path} has {tokenizer.vocab_size()} pieces")
    for shard in find_shards(args.val_files):
        check_tokens(map_data_shard(shard), args.vocab_size, shard)
    tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    num_scored = len(tokens) - 1
    if 0 < args.val_max_tokens < num_scored:
        num_scored = max(args.val_max_tokens // args.train_seq_len, 1) * args.train_seq_len
    return tokens[: num_scored + 1], len(tokens) - 1, build_sentencepiece_luts(tokenizer, args.vocab_size)


def validation_batches(args: Hyperparameters, val_tokens: np.ndarray) -> list[np.ndarray]:
    """val_tokens, (k * seq_len + 1,), in batches of whole sequences and the token after them. The last may be smaller.
    Raises InputError if no sequence fits."""
    size = args.val_batch_size // args.grad_accum_steps // args.train_seq_len * args.train_seq_len
    if size == 0:
        raise InputError(f"VAL_BATCH_SIZE={args.val_batch_size}: no room for a sequence in a batch: raise it")
    return [val_tokens[start : start + size + 1] for start in range(0, len(val_tokens) - 1, size)]


def eval_val(
    args: Hyperparameters,
    compiled_loss: Loss,
    val_tokens: np.ndarray,
    base_bytes_lut: np.ndarray,
    has_leading_space_lut: np.ndarray,
    is_boundary_token_lut: np.ndarray,
    log_fn: LogFn | None = None,
) -> tuple[float, float]:
    """Score val_tokens, (k * seq_len + 1,): (val_loss in nats per token, val_bpb in bits per byte).
    compiled_loss(x, y) is the mean loss of a batch (seqs, seq_len)."""
    batches = validation_batches(args, val_tokens)
    loss_sum, num_tokens, num_bytes = 0.0, 0, 0
    for i, tokens in enumerate(batches):
        if is_mine(i):
            loss = compiled_loss(*inputs_and_targets(tokens, args.train_seq_len))
            mx.async_eval(loss)  # and count bytes meanwhile
            before, targets = tokens[:-1], tokens[1:]
            spaces = has_leading_space_lut[targets] & ~is_boundary_token_lut[before]
            num_bytes += int(base_bytes_lut[targets].sum(dtype=np.int64) + spaces.sum())
            num_tokens += targets.size
            loss_sum += loss.item() * targets.size  # item() waits, so that one batch at a time is in memory
        if log_fn is not None and len(batches) > 1 and (i in (0, len(batches) - 1) or (i + 1) % 25 == 0):
            log_fn(f"val_progress:{i + 1}/{len(batches)}")
    loss_sum, num_tokens, num_bytes = gather(loss_sum, num_tokens, num_bytes).sum(axis=0).tolist()
    val_loss = loss_sum / num_tokens
    return val_loss, val_loss / math.log(2.0) * (num_tokens / num_bytes)


# --- 8. Compression ---
# In: the model's flat state. Out: NumPy arrays, int8 if they are large, in a format shared with others, and back.

INT8_MAX = np.float32(127.0)
INT8_ROW_SCALE_FLOOR = np.float32(
    1.0 / 127.0
)  # part of the format; coarse for small weights, so fewer levels need a lower one
INT8_KEEP_FLOAT_MAX_NUMEL = 65536  # smaller tensors stay floating: they cost few bytes and suffer most
INT8_KEEP_FLOAT_STORE_DTYPE = np.float16
INT8_PER_ROW_SCALE_DTYPE = np.float16
INT8_CLIP_PERCENTILE = 99.99984  # of the magnitudes, so that a few outliers do not coarsen the rest
INT8_CLIP_Q = INT8_CLIP_PERCENTILE / 100.0


def keep_float_array(name: str, arr: mx.array, passthrough_orig_dtypes: dict[str, str]) -> np.ndarray:
    """A small floating array as it is stored: control tensors in float32, others in float16, with their dtype noted."""
    if any(pattern in name for pattern in INT8_KEEP_FLOAT_FP32_NAME_PATTERNS):
        return np.array(arr.astype(mx.float32))
    if arr.dtype in (mx.float32, mx.bfloat16):
        passthrough_orig_dtypes[name] = str(arr.dtype).removeprefix("mlx.core.")
        return np.array(arr.astype(mx.float32)).astype(INT8_KEEP_FLOAT_STORE_DTYPE)
    return np.array(arr)


def quantize_float_array(arr: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """(int8 array, scale): a scale per row, (rows,) float16, for a matrix, else one, () float32."""
    weights = np.array(arr.astype(mx.float32))  # NumPy has no bfloat16
    is_matrix = weights.ndim == 2
    clip = np.zeros((len(weights), 1) if is_matrix else ())
    if weights.size > 0:
        clip = np.quantile(np.abs(weights), INT8_CLIP_Q, axis=1 if is_matrix else None, keepdims=is_matrix)
    clip = clip.astype(np.float32)
    if is_matrix:
        scale = np.maximum(clip / INT8_MAX, INT8_ROW_SCALE_FLOOR)
        stored = scale[:, 0].astype(INT8_PER_ROW_SCALE_DTYPE)
    else:
        scale = stored = np.array(clip / INT8_MAX if clip > 0 else 1.0, dtype=np.float32)
    q = np.round(np.clip(weights, -clip, clip) / scale)
    return np.clip(q, -INT8_MAX, INT8_MAX).astype(np.int8), stored


def quantize_state_dict_int8(flat_state: FlatParams) -> tuple[dict[str, Any], dict[str, int]]:
    """(object to pickle, statistics): large floating tensors in int8, the others passed through."""
    obj: dict[str, Any] = {"__quant_format__": "int8_clean_per_row_v1"}
    for part in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes"):
        obj[part] = {}
    num_nonfloat_tensors = 0
    for name, arr in flat_state.items():
        if not mx.issubdtype(arr.dtype, mx.floating):
            obj["passthrough"][name] = np.array(arr)
            num_nonfloat_tensors += 1
        elif arr.size <= INT8_KEEP_FLOAT_MAX_NUMEL:
            obj["passthrough"][name] = keep_float_array(name, arr, obj["passthrough_orig_dtypes"])
        else:
            obj["quantized"][name], obj["scales"][name] = quantize_float_array(arr)
            obj["dtypes"][name] = str(arr.dtype).removeprefix("mlx.core.")
            if arr.ndim == 2:
                obj["qmeta"][name] = {"scheme": "per_row", "axis": 0}
    stored = [*obj["quantized"].values(), *obj["scales"].values(), *obj["passthrough"].values()]
    stats = {
        "param_count": sum(arr.size for arr in flat_state.values()),
        "num_tensors": len(flat_state),
        "num_float_tensors": len(obj["quantized"]),
        "num_nonfloat_tensors": num_nonfloat_tensors,
        "baseline_tensor_bytes": sum(arr.nbytes for arr in flat_state.values()),
        "int8_payload_bytes": sum(arr.nbytes for arr in stored),
    }
    for optional in ("qmeta", "passthrough_orig_dtypes"):
        if not obj[optional]:
            del obj[optional]
    return obj, stats


def dequantize_state_dict_int8(quant_obj: dict[str, Any]) -> FlatParams:
    """The flat state, in the original dtypes, that quantize_state_dict_int8 made the object from."""
    state = {name: mx.array(stored) for name, stored in quant_obj["passthrough"].items()}
    for name, q in quant_obj["quantized"].items():
        scale = np.asarray(quant_obj["scales"][name], dtype=np.float32)
        state[name] = mx.array(q * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim)))
    for name, dtype in {**quant_obj["dtypes"], **quant_obj.get("passthrough_orig_dtypes", {})}.items():
        state[name] = state[name].astype(MX_DTYPE_FROM_NAME[dtype])
    return state


# --- 9. Several processes ---
# MLX's launcher starts several, the ranks, which share microbatches and validation batches. With one, these are no-ops.


@functools.cache
def world() -> mx.distributed.Group:
    """The processes of this run. Raises RuntimeError if they cannot connect."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is not None and Path(hosts).read_text().strip() == "":  # `mlx.launch -n 1`; MLX cannot read it
        del os.environ["MLX_HOSTFILE"]
    return mx.distributed.init()


def is_mine(index: int) -> bool:
    """Whether this rank computes the microbatch or batch with this number."""
    return index % world().size() == world().rank()


def gather(*numbers: float) -> np.ndarray:
    """The numbers of all ranks, (ranks, numbers) float64, sent as bytes because MLX has no float64 on GPUs."""
    ranks = mx.distributed.all_gather(mx.array(np.array([numbers], np.float64).view(np.uint8)), stream=mx.cpu)
    mx.eval(ranks)  # raises RuntimeError if a rank is gone; np.array() alone does not
    return np.array(ranks).view(np.float64)


def average_over_ranks(loss: mx.array, grads: dict) -> tuple[mx.array, dict]:
    """Mean loss and gradients of all ranks, averaged in float32."""
    if world().size() == 1:
        return loss, grads
    mx.eval(loss, grads)
    with mx.stream(mx.cpu):  # macOS may kill GPU work that waits for seconds, as for a slower rank
        own = tree_map(lambda array: array.astype(mx.float32), [loss, grads])
        loss, means = nn.average_gradients(own, communication_stream=mx.cpu)
        mx.eval(loss, means)
    return loss, tree_map(lambda mean, grad: mean.astype(grad.dtype), means, grads)


def from_rank_0(path: Path) -> bytes:
    """The content of a file that only rank 0 needs to have."""
    content = path.read_bytes() if world().rank() == 0 else b""
    padded = content.ljust(int(gather(len(content))[0, 0]), b"\0")
    shared = mx.distributed.all_sum(mx.array(np.frombuffer(padded, np.uint8)), stream=mx.cpu)
    mx.eval(shared)
    return bytes(np.array(shared))


# --- 10. Checks of the settings ---


def setting_problems(args: Hyperparameters) -> list[str]:
    """A line for each invalid setting, and for each variable whose name is almost a setting's."""
    problems = []
    for name in settings_of(type(args)):
        value = getattr(args, name)
        least, limit = LIMITS.get(name, (0, 2**64))
        if not isinstance(value, str) and not least <= value < limit:
            allowed = f"below {limit}" if value >= limit else f"at least {least}"
            problems.append(f"{name.upper()}={value}: must be {allowed}")
    dtype = read_setting("compute_dtype", "auto")
    if dtype not in ("auto", "bfloat16", "float32"):
        problems.append(f"COMPUTE_DTYPE={dtype}: must be auto, bfloat16 or float32")
    preload = read_setting("mlx_preload_blas", "1")
    if preload not in ("0", "1"):
        problems.append(f"MLX_PRELOAD_BLAS={preload}: must be 0 or 1")
    known = [name.upper() for name in (*dir(args), *settings_of(ModuleSettings), "train_max_seq_len")]
    for variable in sorted(os.environ.keys() - set(known)):
        for near in difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.905):
            problems.append(f"{variable} is not a setting: did you mean {near}? Rename it, or unset it")
    return problems


def check_settings(args: Hyperparameters) -> None:
    """Raise InputError with a line for each wrong setting or, if there is none, each impossible combination."""
    problems = setting_problems(args)
    if problems:
        raise InputError("\n".join(problems))
    if not args.tie_embeddings:
        raise NotImplementedError("TIE_EMBEDDINGS=0: not implemented")
    least = args.grad_accum_steps * args.train_seq_len
    for name in ("train_batch_tokens", "val_batch_size"):
        value = getattr(args, name)
        if value < least:
            problems.append(f"{name.upper()}={value}: must be at least GRAD_ACCUM_STEPS * TRAIN_SEQ_LEN = {least}")
    if args.grad_accum_steps % world().size() != 0:
        problems.append(f"GRAD_ACCUM_STEPS={args.grad_accum_steps}: must be a multiple of {world().size()} processes")
    try:
        CausalSelfAttention(args.model_dim, args.num_heads, args.num_kv_heads, args.rope_base, args.qk_gain_init)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


# --- 11. State, log and files of a run ---

CODE_PATH = Path(__file__)


class RunError(Exception):
    """Ends a run that is under way. The message says what failed."""


class Run:
    """What the stages of a run share: data, model, files, and how far it has come. Raises InputError or OSError."""

    def __init__(self, args: Hyperparameters) -> None:
        self.args = args
        self.started = time.perf_counter()
        self.val_tokens, self.num_val_tokens, self.byte_tables = read_validation(args)
        num_scored, self.mark = len(self.val_tokens) - 1, ""  # the mark ends the lines of a score of fewer tokens
        if num_scored < self.num_val_tokens:
            self.mark = f" val_tokens:{num_scored}/{self.num_val_tokens}"
        self.dataset = validate_dataset_tokenizer_pair(args.data_path, args.tokenizer_path)
        self.data_checksum = zlib.crc32(np.stack(self.byte_tables))
        for path in find_shards(args.train_files) + find_shards(args.val_files):
            tokens = map_data_shard(path)
            check_tokens(tokens[:100_000], args.vocab_size, path)  # later ones are checked when they are used
            self.data_checksum = zlib.crc32(tokens[:100_000], self.data_checksum + len(tokens))
        if backend() == "metal":  # keeps the arrays resident
            mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
        self.model = build_model(args)
        self.optimizers = SplitOptimizers(self.model, args)
        # A compiled function takes arrays that it closes over for constants, unless they are declared as inputs.
        capture = functools.partial(mx.compile, inputs=self.model.state, outputs=self.model.state)
        self.compiled_loss = capture(self.model.loss)
        self.compiled_loss_and_grad = capture(nn.value_and_grad(self.model, self.model.loss))
        self.log_path = Path(args.out_dir, f"{args.run_id}.txt")
        self.checkpoint_path = Path(args.out_dir, f"{args.run_id}_checkpoint.safetensors")
        self.npz_path = Path(args.out_dir, f"{args.run_id}_mlx_model.npz")
        self.artifact_path = Path(args.out_dir, f"{args.run_id}_mlx_model.int8.ptz")
        self.log_file = None
        self.step = 0
        self.saved_step = 0  # the last one checkpointed or saved
        self.train_ms = self.step_started = 0.0
        self.position = (0, 0, 1)  # of the token stream: file_idx, pos, epoch
        self.losses: list[float] = []
        self.submission = ""  # size of script and model
        self.stage = "warmup"  # then training, validation, saving, scoring, ending
        self.signal = ""  # the signal that asked the run to end
        self.is_stopping = False  # whether a signal ended training

    def log(self, line: str, console: bool = True) -> None:
        """Log a line, on rank 0. Neither a full disk nor a closed terminal ends a run."""
        if self.log_file is None:
            return
        self.status("")
        with contextlib.suppress(OSError):
            print(line, file=self.log_file, flush=True)
        if console:
            with contextlib.suppress(OSError):
                print(line, flush=True)

    def status(self, text: str) -> None:
        """Rewrite the last line of the terminal, if stderr is one."""
        if self.log_file is not None and sys.stderr.isatty():
            with contextlib.suppress(OSError):
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
                print(f"\r\x1b[K{text[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def require_finite(self, arrays: FlatParams) -> None:
        """Raise RunError if a number is not finite, before it is logged or saved."""
        for name, array in arrays.items():
            if not mx.isfinite(array).all().item():
                last = ", ".join(f"{loss:.4f}" for loss in self.losses[-5:])
                raise RunError(f"after step {self.step} {name} is not finite; last losses: {last}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes its name only when all of it is on the disk. Raises RunError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def open_log(run: Run) -> None:
    """Open the log, which starts with the script's source: each result has its code. Earlier files of this RUN_ID are
    moved aside. Raises OSError."""
    paths = [run.npz_path, run.artifact_path]
    if run.args.resume != "auto" or run.step == 0:  # else the log and the checkpoint are continued
        paths += [run.log_path, run.checkpoint_path]
    earlier = [path for path in paths if path.exists()]
    number = 1
    while any(Path(f"{path}.{number}").exists() for path in earlier):
        number += 1
    run.log_path.parent.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.rename(f"{path}.{number}")
    run.log_file = run.log_path.open("a", encoding="utf-8")
    rule = "=" * 100
    head = [CODE_PATH.read_text(encoding="utf-8"), rule, f"Python {sys.version}", f"MLX {mx.__version__}", rule]
    print(*head, sep="\n", file=run.log_file, flush=True)
    print(run.log_path, flush=True)


def require_same_on_all_ranks(run: Run) -> None:
    """Raise InputError if a rank has other settings, another script or other data than rank 0."""
    may_differ = ("run_id", "out_dir", "data_path", "tokenizer_path")
    settings = {name: value for name, value in vars(run.args).items() if name not in may_differ}
    settings_checksum = zlib.crc32(f"{settings} {COMPUTE_DTYPE} {mx.__version__}".encode())
    ranks = gather(settings_checksum, zlib.crc32(CODE_PATH.read_bytes()), run.data_checksum)
    for column, what in enumerate(("settings", "script", "data")):
        for rank in np.flatnonzero(ranks[:, column] != ranks[0, column]):
            raise InputError(f"rank {rank} has other {what} than rank 0: all processes of a run need the same")


# --- 12. Checkpoints ---


def training_state(run: Run) -> dict[str, Any]:
    """The tree of all arrays that the rest of the training depends on."""
    adams = {"adam_embed": run.optimizers.adam_embed.state, "adam_scalar": run.optimizers.adam_scalar.state}
    return {"model": run.model.state, "muon": run.optimizers.muon.buffers, **adams, "random": mx.random.state[0]}


def set_training_state(run: Run, arrays: FlatParams) -> None:
    """Put these arrays, by their names in the tree, into the dicts that the compiled functions hold."""
    state = tree_map_with_path(lambda name, _: arrays[name], training_state(run))
    run.model.update(state["model"])
    for optimizer in ("muon", "adam_embed", "adam_scalar"):
        training_state(run)[optimizer].update(state[optimizer])
    high, low = state["random"].tolist()
    mx.random.seed(high << 32 | low)


def result_settings(run: Run) -> dict[str, str]:
    """What the result depends on, by the variable's name."""
    names = settings_of(type(run.args)).keys() - settings_of(RunSettings).keys()
    values = {name.upper(): getattr(run.args, name) for name in names}
    values["COMPUTE_DTYPE"] = COMPUTE_DTYPE
    values["CONTROL_TENSOR_NAME_PATTERNS"] = CONTROL_TENSOR_NAME_PATTERNS
    values["INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"] = INT8_KEEP_FLOAT_FP32_NAME_PATTERNS
    values["checksum of data and tokenizer"] = run.data_checksum
    return {name: str(value) for name, value in values.items()}


def write_checkpoint(run: Run) -> None:
    """Write what it takes to continue exactly. A full disk is only a warning: the model may still fit."""
    if run.step == run.saved_step:
        return
    run.saved_step = run.step
    arrays = dict(tree_flatten(training_state(run)))
    run.require_finite(arrays)
    if world().rank() > 0:
        return
    about = {"step": run.step, "train_ms": run.train_ms, "position": run.position, "settings": result_settings(run)}
    try:
        with whole_file(run.checkpoint_path) as file:
            mx.save_safetensors(file, arrays, {"parameter_golf": json.dumps(about)})
        run.log(f"checkpoint:{run.checkpoint_path} step:{run.step}/{run.args.iterations}")
    except RunError as error:
        run.log(f"WARNING: no checkpoint of step {run.step}: {error}")


def resume(run: Run) -> None:
    """Continue from the checkpoint that RESUME names. Raises InputError if it is damaged or does not match."""
    path = Path(run.args.resume)
    if run.args.resume == "auto":
        path = run.checkpoint_path
        if gather(path.exists())[0, 0] == 0:
            return  # rank 0 has none: start from the beginning
    content = from_rank_0(path)
    try:
        data_start = 8 + int.from_bytes(content[:8], "little")  # safetensors: a size, JSON of that size, data
        header = json.loads(content[8:data_start])
        about = json.loads(header.pop("__metadata__")["parameter_golf"])
        if len(content) != data_start + max(entry["data_offsets"][1] for entry in header.values()):
            raise ValueError("its length is wrong")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"RESUME={path}: no checkpoint, or damaged ({error}): choose another, or unset it") from None
    then, now = about["settings"], result_settings(run)
    changes = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if now[name] != then.get(name)]
    shapes = {name: list(array.shape) for name, array in tree_flatten(training_state(run))}
    if not changes and shapes != {name: entry["shape"] for name, entry in header.items()}:
        changes = ["the script's model has other parameters"]
    if changes:
        raise InputError(f"RESUME={path}: checkpoint does not match: {'; '.join(changes)}")
    set_training_state(run, mx.load(io.BytesIO(content), format="safetensors"))
    run.step = run.saved_step = about["step"]
    run.train_ms, run.position = about["train_ms"], about["position"]


# --- 13. Interruption ---


@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP ends training after the step under way, and any other stage with a
    KeyboardInterrupt. Another SIGINT or SIGTERM ends the process at once. What nohup ignores stays ignored."""
    before = {}

    def stop(number: int, frame: Any) -> None:
        run.signal = signal.Signals(number).name
        for other in before:  # a closing terminal may send SIGHUP several times
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        if run.stage not in ("training", "ending"):
            raise KeyboardInterrupt(f"interrupted by {run.signal} during {run.stage}: no score")
        text = f"\n{run.signal}: training ends after this step, is saved and scored. Send it again to stop at once.\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # not print(), which could be under way

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_kept(run: Run) -> Iterator[None]:
    """Log the error that ends the run early, and write a checkpoint. Raises RunError or KeyboardInterrupt."""
    try:
        yield
    except (RunError, KeyboardInterrupt, InputError, OSError, RuntimeError) as error:  # the last one is MLX's
        run.stage = "ending"  # so that a signal does not interrupt the checkpoint
        run.log(f"error: {error}", console=False)
        if not isinstance(error, RunError):
            write_checkpoint(run)
        if isinstance(error, (RunError, KeyboardInterrupt)):
            raise
        if run.signal != "":  # Ctrl-C may also end the compiler that MLX runs, a RuntimeError
            raise KeyboardInterrupt(f"interrupted by {run.signal}: no score") from None
        raise RunError(str(error)) from None


# --- 14. The run ---
# In: the settings. Out: a log, the weights (.npz), the compressed model (.int8.ptz), and its score.

SUBMISSION_CAP_BYTES = 16_000_000  # for this file and the compressed model together
DEFAULTS = settings_of(Hyperparameters) | settings_of(ModuleSettings)  # a fork's subclass may have others


def overrides(args: Hyperparameters) -> str:
    """The settings that differ from their defaults, quoted for a shell. A generated RUN_ID is not one."""
    words = []
    for name, default in (settings_of(type(args)) | DEFAULTS).items():
        value = getattr(args, name, read_setting(name, default))
        if value != default and (name != "run_id" or os.environ.get("RUN_ID")):
            text = str(int(value) if isinstance(value, bool) else value)
            words.append(f"{name.upper()}={shlex.quote(text)}")
    return " ".join(words)


def log_configuration(run: Run) -> None:
    """Log what will run. Other people's scripts parse these lines: add fields, but change none."""
    args, params = run.args, dict(tree_flatten(run.model.parameters()))
    name, present, expected = run.dataset
    shards = f"dataset:{name} train_shards:{present}"
    if expected is not None:
        shards += f"/{expected}"
    loader = f"train_loader:{shards}"
    if expected is not None and present < expected:
        loader = f"WARNING: train_loader:subset {shards} new epochs will arrive sooner than the full dataset"
    text = f"""\
run_id:{args.run_id}
mlx_version:{mx.__version__}
train_loader:shards pattern={args.train_files}
val_loader:shards pattern={args.val_files} tokens:{run.num_val_tokens}
{loader}
tokenizer_path:{args.tokenizer_path}
model_params:{sum(param.size for param in params.values())} vocab_size:{args.vocab_size} layers:{args.num_layers} \
dim:{args.model_dim} heads:{args.num_heads} kv_heads:{args.num_kv_heads} seq_len:{args.train_seq_len} \
tie_embeddings:{args.tie_embeddings}
iterations:{args.iterations} train_batch_tokens:{args.train_batch_tokens} grad_accum_steps:{args.grad_accum_steps} \
microbatch_tokens:{args.microbatch_tokens} microbatch_batch_size:{args.microbatch_tokens // args.train_seq_len} \
val_batch_size:{args.val_batch_size} warmup_steps:{args.warmup_steps} \
max_wallclock_seconds:{args.max_wallclock_seconds:.3f}
mlx_max_microbatch_tokens:{args.mlx_max_microbatch_tokens}
world_size:{world().size()}
optimizer:muon+adam muon_matrix_params:{len(run.optimizers.matrix_keys)} \
scalar_params:{len(run.optimizers.scalar_keys)} embed_lr:{args.tied_embed_lr} matrix_lr:{args.matrix_lr} \
scalar_lr:{args.scalar_lr} muon_momentum:{args.muon_momentum} muon_steps:{args.muon_backend_steps}
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}
compute_dtype:{COMPUTE_DTYPE} compile:True
dtypes tok_emb:{params["tok_emb.weight"].dtype} linear_weight:{params["blocks.0.attn.c_q.weight"].dtype} \
skip_weights:{params["skip_weights"].dtype}
overrides:{overrides(args)}"""
    if args.resume:
        text += f"\nresume:{args.resume} step:{run.step}"
    if sys.platform == "linux" and backend() == "cpu":
        has_openblas = hasattr(ctypes.CDLL(None), "openblas_get_config")
        slow = "reference (slow: `apt-get install libopenblas0-pthread`, and import this script before mlx)"
        text += f"\ncpu_blas:{'openblas' if has_openblas else slow}"
    for line in text.splitlines():
        run.log(line)


def watched(run: Run, function: Callable, total_tokens: int) -> Callable:
    """`function`, with a status line before each call."""
    started, tokens = time.perf_counter(), 0

    def call(x: mx.array, *rest: mx.array) -> Any:
        nonlocal tokens
        now, done = time.perf_counter(), tokens / total_tokens
        if run.stage == "training" and run.args.max_wallclock_seconds > 0:
            done = max(done, (run.train_ms / 1000.0 + now - run.step_started) / run.args.max_wallclock_seconds)
        text = f"{run.stage} {done:.1%}"
        if tokens > 0 and now > started:
            left = int((now - started) * (1.0 - done) / done)
            text += f"  {left // 60}:{left % 60:02d} left  {tokens / (now - started):.0f} tok/s"
        if run.losses:
            text += f"  loss {np.mean(run.losses[-20:]):.4f}"
        run.status(text)
        tokens += x.size * world().size()
        return function(x, *rest)

    return call


def warm_up(run: Run) -> None:
    """Make MLX compile and allocate what training and validation will use. Two chunks and a validation batch of each
    size are enough. WARMUP_STEPS only says whether, and how many lines are logged."""
    args, params, accum = run.args, dict(tree_flatten(run.model.parameters())), None
    if args.warmup_steps == 0:
        return
    sizes = token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    loader = TokenLoader(args.train_files, vocab_size=args.vocab_size)  # a throwaway copy, as are the optimizers
    loss_and_grad = watched(run, run.compiled_loss_and_grad, sizes[0] + sizes[-1])
    for size in (sizes[0], sizes[-1]):
        loss, grads = loss_and_grad(*loader.next_batch(size, args.train_seq_len))
        accum = accumulate_flat_grads(accum, grads, 0.5)
        mx.eval(loss, accum)
    mx.eval(SplitOptimizers(run.model, args).update(params, accum, step=0, lr_mul=1.0))
    batch_of_size = {len(tokens): tokens for tokens in validation_batches(args, run.val_tokens)}
    loss_alone = watched(run, run.compiled_loss, sum(batch_of_size))
    for tokens in batch_of_size.values():
        mx.eval(loss_alone(*inputs_and_targets(tokens, args.train_seq_len)))
    for step in range(1, args.warmup_steps + 1):
        if args.warmup_steps <= 20 or step % 10 == 0 or step == args.warmup_steps:
            run.log(f"warmup_step:{step}/{args.warmup_steps}")


def is_over(run: Run) -> bool:
    """Whether training ends before the next step. All ranks use rank 0's clock, and all stop if any is asked to."""
    ranks = gather(run.train_ms, run.signal != "")
    run.train_ms, run.is_stopping = float(ranks[0, 0]), bool(ranks[:, 1].any())
    is_capped = 0.0 < 1000.0 * run.args.max_wallclock_seconds <= run.train_ms
    return run.is_stopping or is_capped or run.step >= run.args.iterations


def train(run: Run) -> None:
    """Train until ITERATIONS, the wallclock cap or a signal. Only steps are on the clock."""
    args = run.args
    run.stage = "training"
    loader = TokenLoader(args.train_files, run.log, run.dataset[0], args.vocab_size)
    loader.stream.seek(*run.position)
    tokens_left = (args.iterations - run.step) * args.train_batch_tokens
    loss_and_grad = watched(run, run.compiled_loss_and_grad, tokens_left)
    while not is_over(run):
        if args.checkpoint_every > 0 and run.step % args.checkpoint_every == 0:
            write_checkpoint(run)
        if args.val_loss_every > 0 and run.step % args.val_loss_every == 0:
            validate(run)
            run.stage = "training"
        take_step(run, loader, loss_and_grad)
    if args.checkpoint_every > 0 or run.is_stopping or run.checkpoint_path.exists():
        write_checkpoint(run)  # now, because scoring rounds the weights
    validate(run)
    if run.step < args.iterations:
        reason = "interrupted" if run.is_stopping else "wallclock_cap"
        run.log(f"stopping_early: {reason} train_time:{run.train_ms:.0f}ms step:{run.step}/{args.iterations}")


def take_step(run: Run, loader: TokenLoader, loss_and_grad: LossAndGrad) -> None:
    """Do one optimizer step, on the clock, and log it. Raises RunError if its loss is not finite."""
    args, stream = run.args, loader.stream
    lr_mul = args.lr_mul(run.step, run.train_ms)
    run.step_started = time.perf_counter()
    loss, grads = loss_and_grad_chunked(args, loader, loss_and_grad, args.grad_accum_steps)
    run.optimizers.step(run.model, clip_grad_tree(grads, args.grad_clip_norm), run.step, lr_mul)
    del grads  # frees memory
    run.step += 1  # not after eval(): if that fails, the checkpoint has the new weights
    run.position = (stream.file_idx, stream.pos, stream.epoch)
    mx.eval(loss, run.model.parameters())
    seconds = time.perf_counter() - run.step_started
    run.train_ms += 1000.0 * seconds
    run.require_finite({"train_loss": loss})
    run.losses.append(loss.item())
    if args.train_log_every > 0 and (run.step <= 10 or run.step % args.train_log_every == 0):
        times = f"train_time:{run.train_ms:.0f}ms step_avg:{run.train_ms / run.step:.2f}ms"
        speed = f"tok_s:{args.train_batch_tokens / seconds:.0f}"
        run.log(f"step:{run.step}/{args.iterations} train_loss:{loss.item():.4f} {times} {speed} lr_mul:{lr_mul:.4f}")


def evaluate(run: Run, stage: str) -> tuple[float, float]:
    """(val_loss, val_bpb) of the model as it is."""
    run.stage = stage
    loss_alone = watched(run, run.compiled_loss, len(run.val_tokens) - 1)
    val_loss, val_bpb = eval_val(run.args, loss_alone, run.val_tokens, *run.byte_tables, run.log)
    run.require_finite({"val_loss": mx.array(val_loss)})
    return val_loss, val_bpb


def validate(run: Run) -> None:
    """Validate during or after training, off the clock."""
    val_loss, val_bpb = evaluate(run, "validation")
    times = f"train_time:{run.train_ms:.0f}ms step_avg:{run.train_ms / max(run.step, 1):.2f}ms"
    run.log(f"step:{run.step}/{run.args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} {times}{run.mark}")


def save(run: Run) -> None:
    """Write the weights as they are (.npz) and compressed (.int8.ptz)."""
    run.stage = "saving"
    flat_state = dict(tree_flatten(run.model.state))
    run.require_finite(flat_state)
    quant_obj, stats = quantize_state_dict_int8(flat_state)
    run.require_finite(dequantize_state_dict_int8(quant_obj))  # float16 overflows above 65504
    run.saved_step = run.step
    if world().rank() > 0:
        return
    content = io.BytesIO()  # on a full disk MLX's zip file would add a traceback to the error
    mx.savez(content, **flat_state)
    with whole_file(run.npz_path) as file:
        file.write(content.getbuffer())
    run.log(f"saved_model:{run.npz_path} bytes:{run.npz_path.stat().st_size}")
    raw = pickle.dumps(quant_obj, protocol=pickle.HIGHEST_PROTOCOL)
    with whole_file(run.artifact_path) as file:
        file.write(zlib.compress(raw, level=9))
    model_bytes, code_bytes = run.artifact_path.stat().st_size, CODE_PATH.stat().st_size
    payload, quantized = stats["int8_payload_bytes"], stats["num_float_tensors"]
    sizes = f"payload:{payload} raw_pickle:{len(raw)} payload_ratio:{stats['baseline_tensor_bytes'] / payload:.2f}x"
    run.log(f"serialized_model_int8_zlib:{model_bytes} bytes ({sizes})")
    run.log(f"int8_tensors:{quantized} float_tensors:{stats['num_tensors'] - quantized}")
    if quantized == 0:
        run.log(f"WARNING: nothing is quantized: no tensor has over {INT8_KEEP_FLOAT_MAX_NUMEL} elements")
    room = SUBMISSION_CAP_BYTES - code_bytes - model_bytes
    cap = f"{abs(room)} {'under' if room >= 0 else 'OVER'} the cap of {SUBMISSION_CAP_BYTES} bytes"
    run.submission = f"{code_bytes + model_bytes} bytes ({cap})"
    run.log(f"Code size: {code_bytes} bytes")
    run.log(f"Total submission size int8+zlib: {run.submission}")


def score(run: Run) -> None:
    """Read the compressed model back from its file and validate it: that is the run's score."""
    quant_obj = pickle.loads(zlib.decompress(from_rank_0(run.artifact_path)))
    run.model.update(tree_unflatten(list(dequantize_state_dict_int8(quant_obj).items())))
    started, name = time.perf_counter(), "final_int8_zlib_roundtrip"
    val_loss, val_bpb = evaluate(run, "scoring")
    now = time.perf_counter()
    run.log(f"{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000 * (now - started):.0f}ms{run.mark}")
    run.log(f"{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{run.mark}")
    minutes = f"{(now - run.started) / 60:.1f} minutes"
    run.log(f"finished: {val_bpb:.4f} bits per byte{run.mark}, {run.submission}, {minutes}, log: {run.log_path}")


def main() -> None:
    """One run. Raises InputError, OSError or NotImplementedError before it starts, then RunError, KeyboardInterrupt."""
    args = Hyperparameters()
    check_settings(args)
    run = Run(args)
    require_same_on_all_ranks(run)
    if args.resume:
        resume(run)
    if world().rank() == 0:
        open_log(run)  # not before: a run that cannot start leaves nothing behind
    with stop_signals(run), progress_kept(run):
        log_configuration(run)
        warm_up(run)
        train(run)
        save(run)
        score(run)


def help_text() -> str:
    """Every setting with its default and meaning, from the declarations above."""
    lines = ["Settings are environment variables:  ITERATIONS=100 SEED=7 python train_gpt_mlx.py"]
    for owner in (RunSettings, Hyperparameters, ModuleSettings):
        for line in inspect.getsource(owner).splitlines():
            setting = re.fullmatch(r"    (\w+): \w+ = .+  # (.+)", line)
            if setting:
                default = getattr(owner, setting[1])
                shown = f"{setting[1].upper()}={int(default) if isinstance(default, bool) else default}"
                lines.append(f"  {shown:<36}  {setting[2]}")
            elif line.startswith("    # "):
                lines.append("\n" + line.removeprefix("    # "))
    return "\n".join(lines)


def command_line(arguments: list[str]) -> int:
    """Exit status: 0 for a score or --help, 2 before training, 1 failed later, 130 interrupted without a score."""
    try:
        if arguments in (["--help"], ["-h"]):
            print(help_text())
        elif arguments:
            raise InputError(f"{' '.join(arguments)}: settings are environment variables, as in SEED=7; see --help")
        else:
            main()
        return 0
    except (InputError, OSError, NotImplementedError, RuntimeError, RunError, KeyboardInterrupt) as error:
        for line in (str(error) or "interrupted").splitlines():
            print(f"error: {line}", file=sys.stderr)
        return {RunError: 1, KeyboardInterrupt: 130}.get(type(error), 2)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
