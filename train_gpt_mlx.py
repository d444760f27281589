#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mlx>=0.26.5; sys_platform == 'darwin'",
#   "mlx[cpu]>=0.26.5; sys_platform == 'linux'",
#   "numpy>=1.21.6",
#   "sentencepiece>=0.1.99",
# ]
# ///
"""Parameter Golf on Apple Silicon: train a small GPT, compress it, score what is left in bits per byte.

The challenge asks for the best language model that fits in 16,000,000 bytes, code and compressed weights
together. This is the baseline for people with a Mac; it also runs on Linux. Every setting is an environment
variable (`--help` lists them), and the file reads in the order in which the data flows:

    1. Settings               environment -> Hyperparameters
    2. Shards and streams     train shards -> TokenStream -> TokenLoader -> (x, y)
    3. Bytes per token        tokenizer -> byte tables
    4. Model                  (x, y) -> GPT -> loss in nats
    5. Optimizers             gradients -> SplitOptimizers (Muon and Adam) -> GPT
    6. Batches within a step  TokenLoader -> loss_and_grad_chunked -> averaged gradients
    7. Evaluation             val shards, byte tables -> eval_val -> val_loss, val_bpb
    8. Compression            GPT -> int8 arrays -> GPT
    9. The run                all of it: set up, warm up, train, save, score

A *batch*, the tokens of one optimizer step, is split into GRAD_ACCUM_STEPS *microbatches*, each computed in
*chunks* of at most MLX_MAX_MICROBATCH_TOKENS tokens, the most in memory at once. Shapes read (batch, seq, dim).
"""

import contextlib
import ctypes
import glob
import inspect
import json
import math
import os
import pickle
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def preload_openblas() -> None:
    """Put OpenBLAS, where a Linux machine has it, in front of the slow reference BLAS inside MLX's CPU wheel.
    MLX binds its matrix products, when it is imported, to the first BLAS in the process's global scope. So this
    comes before that import, and does nothing after it. macOS has Accelerate. MLX_PRELOAD_BLAS=0 turns it off."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules and os.environ.get("MLX_PRELOAD_BLAS") != "0":
        with contextlib.suppress(OSError):  # not installed: the run's log says so, and how to get it
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

preload_openblas()

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import sentencepiece as spm
from mlx.utils import tree_flatten, tree_map, tree_unflatten

# 1. Settings --------------------------------------------------------------------------------------------------
# In: environment variables. Out: a Hyperparameters object with a plain attribute for each, and a few module
# constants. A setting is declared once, with its default and meaning; parsing, errors and --help follow from it.

class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do."""

class MissingFileError(InputError, FileNotFoundError):
    """A file that a setting names is not there."""

@dataclass
class Setting:
    """One environment variable, named after the class attribute it is assigned to, in upper case.
    `Hyperparameters.iterations` reads the environment there and then; an instance keeps what it first read."""
    group: str
    default: Any  # of the setting's type; a bool is written 0 or 1; a callable makes the value
    meaning: str
    fallback: str = ""  # an older variable, read when only that one is set
    choices: tuple[str, ...] = ()
    shown: str = ""  # how --help writes a default that is computed

    def __set_name__(self, owner: type, name: str) -> None:
        self.variable = name.upper()

    def __get__(self, instance: object, owner: type) -> Any:
        return self.read() if instance is None else vars(instance).setdefault(self.variable.lower(), self.read())

    def read(self) -> Any:
        """The value from the environment, or the default. Raises InputError for text that is no such value."""
        variable = self.fallback if self.fallback in os.environ and self.variable not in os.environ else self.variable
        text = os.environ.get(variable)
        if text is None:
            return self.default() if callable(self.default) else self.default
        if self.choices and text not in self.choices:
            raise InputError(f"{variable}={text!r}: must be one of {', '.join(self.choices)}")
        if isinstance(self.default, bool):
            if text not in ("0", "1"):
                raise InputError(f"{variable}={text!r}: must be 0 or 1")
            return text == "1"
        if isinstance(self.default, (int, float)):
            try:
                return type(self.default)(text)
            except ValueError:
                kind = "a whole number" if isinstance(self.default, int) else "a number"
                raise InputError(f"{variable}={text!r}: must be {kind}") from None
        return text

def settings_of(owner: type) -> dict[str, Setting]:
    """The settings that a class declares or inherits, by attribute name, in the order of declaration."""
    names = dict.fromkeys(name for base in reversed(owner.__mro__) for name in vars(base))
    found = {name: inspect.getattr_static(owner, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, Setting)}

class Hyperparameters:
    """Every setting of a run, read from the environment when an instance is made; plain, assignable attributes.
    A subclass may add attributes, or replace a setting by a value of its own, which wins over the environment."""
    data_path = Setting("data", "./data/datasets/fineweb10B_sp1024", "folder of fineweb_train_*.bin, fineweb_val_*.bin")
    tokenizer_path = Setting("data", "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of those shards")
    run_id = Setting("data", lambda: str(uuid.uuid4()), "names the run's log and files", shown="<a fresh uuid4>")
    seed = Setting("data", 1337, "seed of the initial weights")
    out_dir = Setting("data", "logs", "folder for the log and the saved model")

    iterations = Setting("loop", 20_000, "most optimizer steps; 0 scores the untrained model")
    val_loss_every = Setting("loop", 0, "validate every so many steps; 0: only at the end")
    val_batch_size = Setting("loop", 524_288, "tokens of GRAD_ACCUM_STEPS validation batches together")
    train_log_every = Setting("loop", 200, "log every so many steps after the first 10; 0: no train lines")
    train_batch_tokens = Setting("loop", 524_288, "tokens per optimizer step")
    grad_accum_steps = Setting("loop", 8, "microbatches that a step's tokens are split into")
    train_seq_len = Setting("loop", 1024, "tokens per sequence", fallback="TRAIN_MAX_SEQ_LEN")
    warmup_steps = Setting("loop", 20, "steps to compile and allocate, before the clock starts; nothing is learned")
    warmdown_iters = Setting("loop", 1200, "last steps, over which the learning rate falls linearly to 0")
    max_wallclock_seconds = Setting("loop", 600.0, "most seconds of training; 0: no cap")

    mlx_max_microbatch_tokens = Setting("memory", 8192, "most tokens in the model at once; lower it on a small Mac")
    mlx_eager_eval = Setting("memory", True, "finish each chunk before the next begins: keeps memory at one chunk")
    logit_chunk_tokens = Setting("memory", 0, "make the logits of so many tokens at a time; 0: of all at once")

    vocab_size = Setting("model", 1024, "token ids; must equal the tokenizer's")
    num_layers = Setting("model", 9, "transformer blocks; the first half has skip connections to the second")
    model_dim = Setting("model", 512, "width of the residual stream")
    num_heads = Setting("model", 8, "query heads")
    num_kv_heads = Setting("model", 4, "key/value heads; NUM_HEADS / NUM_KV_HEADS query heads share one")
    mlp_mult = Setting("model", 2, "MLP width over MODEL_DIM")
    tie_embeddings = Setting("model", True, "embed and predict with one matrix; 0 is not implemented")
    tied_embed_init_std = Setting("model", 0.005, "standard deviation of the initial embedding")
    logit_softcap = Setting("model", 30.0, "logits are squashed smoothly into -CAP..CAP")
    rope_base = Setting("model", 10000.0, "base of the rotary position frequencies")
    qk_gain_init = Setting("model", 1.5, "initial gain of each head's queries")

    beta1 = Setting("optimizer", 0.9, "Adam: decay of the first moment")
    beta2 = Setting("optimizer", 0.95, "Adam: decay of the second moment")
    adam_eps = Setting("optimizer", 1e-8, "Adam: added to the denominator")
    tied_embed_lr = Setting("optimizer", 0.05, "learning rate of the embedding (Adam)")
    matrix_lr = Setting("optimizer", 0.04, "learning rate of the blocks' matrices (Muon)")
    scalar_lr = Setting("optimizer", 0.04, "learning rate of vectors, gains and skip weights (Adam)")
    muon_momentum = Setting("optimizer", 0.95, "Muon: momentum after its warmup")
    muon_backend_steps = Setting("optimizer", 5, "Muon: Newton-Schulz iterations per update")
    muon_momentum_warmup_start = Setting("optimizer", 0.85, "Muon: momentum at step 0")
    muon_momentum_warmup_steps = Setting("optimizer", 500, "Muon: steps from that to MUON_MOMENTUM; 0: constant")
    grad_clip_norm = Setting("optimizer", 0.0, "scale gradients down to this global norm; 0: off")

    def __init__(self) -> None:
        vars(self).update({name: setting.read() for name, setting in settings_of(type(self)).items()})

    @property
    def train_files(self) -> str:
        """Glob pattern of the training shards."""
        return f"{self.data_path}/fineweb_train_*.bin"

    @property
    def val_files(self) -> str:
        """Glob pattern of the validation shards."""
        return f"{self.data_path}/fineweb_val_*.bin"

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one of the GRAD_ACCUM_STEPS parts of a batch."""
        return self.train_batch_tokens // self.grad_accum_steps

    def lr_mul(self, step: int, elapsed_ms: float) -> float:
        """Learning-rate multiplier after `step` steps and elapsed_ms of training: 1, then linearly down to 0.
        With a wallclock cap the warmdown is WARMDOWN_ITERS steps, of the average length so far, before the cap.
        So where fewer steps than that fit, every step after the first is scaled down."""
        if self.warmdown_iters <= 0:
            return 1.0
        if self.max_wallclock_seconds <= 0:
            in_warmdown = max(self.iterations - self.warmdown_iters, 0) <= step < self.iterations
            return (self.iterations - step) / self.warmdown_iters if in_warmdown else 1.0
        warmdown_ms = self.warmdown_iters * (elapsed_ms / max(step, 1))
        remaining_ms = max(1000.0 * self.max_wallclock_seconds - elapsed_ms, 0.0)
        return remaining_ms / warmdown_ms if remaining_ms <= warmdown_ms else 1.0

class ModuleSettings:
    """The settings behind module constants: read at import, and no part of Hyperparameters."""
    compute_dtype = Setting(
        "platform", "auto", "of activations: auto (bfloat16 on a GPU, float32 on a CPU), bfloat16 or float32",
        choices=("auto", "bfloat16", "float32"))
    mlx_preload_blas = Setting("platform", True, "Linux: use OpenBLAS for products on the CPU where it is installed")

    control_tensor_name_patterns = Setting(
        "name lists",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights",
        "block parameters that Adam trains, not Muon: those with one of these in their name")
    int8_keep_float_fp32_name_patterns = Setting(
        "name lists", lambda: ModuleSettings.control_tensor_name_patterns, shown="<CONTROL_TENSOR_NAME_PATTERNS>",
        meaning="small tensors saved in float32, not float16: those with one of these in their name")

MX_DTYPE_FROM_NAME = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# auto: a GPU is fastest in bfloat16; on a CPU, MLX multiplies bfloat16 matrices in a slow loop of its own and float32
# ones in BLAS. A value that is no choice must not break an import, so it counts as auto here; a run refuses it.
COMPUTE_DTYPE = mx.bfloat16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32
if os.environ.get("COMPUTE_DTYPE") in ("bfloat16", "float32"):
    COMPUTE_DTYPE = MX_DTYPE_FROM_NAME[os.environ["COMPUTE_DTYPE"]]
# An empty part of a list is dropped, for "" is in every name.
CONTROL_TENSOR_NAME_PATTERNS = tuple(filter(None, ModuleSettings.control_tensor_name_patterns.split(",")))
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS = tuple(filter(None, ModuleSettings.int8_keep_float_fp32_name_patterns.split(",")))

def help_text() -> str:
    """What --help prints: every setting, grouped, from the declarations above."""
    group, text = "", "Train a small GPT, compress it to int8 + zlib and score it in bits per byte.\n\n"
    text += "Settings are environment variables:  ITERATIONS=100 SEED=7 python train_gpt_mlx.py\n"
    for setting in [*settings_of(Hyperparameters).values(), *settings_of(ModuleSettings).values()]:
        text += f"\n{setting.group}\n" if setting.group != group else ""
        group = setting.group
        default = int(setting.default) if isinstance(setting.default, bool) else setting.shown or setting.default
        older = f" (or {setting.fallback})" if setting.fallback else ""
        text += f"  {f'{setting.variable}={default}':<36}  {setting.meaning}{older}\n"
    return text.rstrip()


# 2. Shards and streams ----------------------------------------------------------------------------------------
# In: files of uint16 tokens. Out: an endless stream of (x, y) pairs in which y is x moved on by one token.

LogFn = Callable[[str], None]
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, then zeros
HOW_TO_GET_DATA = (
    "`python data/prepare.py` makes a sample data set; train on it with DATA_PATH=data/datasets/sample_sp1024 "
    "TOKENIZER_PATH=data/tokenizers/sample_1024_bpe.model (README.md says how to fetch FineWeb)")

def load_data_shard(path: Path | str) -> np.ndarray:
    """Read one shard, a header and then as many little-endian uint16 tokens as it says: (tokens,) int32.
    Raises InputError, naming the file, for anything that is not exactly that."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size < SHARD_HEADER_INTS:
        raise InputError(f"{path}: too short for a shard's header of {4 * SHARD_HEADER_INTS} bytes")
    magic, version, num_tokens = header[:3].tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(f"{path}: magic {magic}, version {version} is no shard: {SHARD_MAGIC}, {SHARD_VERSION} is")
    expected_bytes, actual_bytes = header.nbytes + 2 * num_tokens, os.path.getsize(path)
    if actual_bytes != expected_bytes:
        raise InputError(f"{path}: has {actual_bytes} bytes; with {num_tokens} tokens it must have {expected_bytes}")
    return np.fromfile(path, dtype="<u2", offset=header.nbytes).astype(np.int32)

def find_shards(pattern: str) -> list[str]:
    """The files that match a glob pattern, sorted. Raises MissingFileError when there is none."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise MissingFileError(f"no shards match {pattern}: {HOW_TO_GET_DATA}")
    return files

class TokenStream:
    """The tokens of all files of a pattern, in the order of their names, for ever.
    Attributes: `files`; `file_idx`, `tokens` and `pos`, the open file and its next token; `epoch`, from 1. A file
    is opened only when a token of it is asked for. Opening the first one again logs that an epoch starts."""
    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "") -> None:
        self.files = find_shards(pattern)
        self.log_fn, self.dataset_name = log_fn, dataset_name
        self.epoch, self.file_idx, self.pos = 1, 0, 0
        self.tokens = load_data_shard(self.files[0])

    def next_file(self) -> None:
        """Open the next file, or the first one again."""
        self.file_idx = (self.file_idx + 1) % len(self.files)
        if self.file_idx == 0:
            self.epoch += 1
            if self.log_fn is not None:
                dataset = f"dataset:{self.dataset_name} train_shards:{len(self.files)}"
                self.log_fn(f"WARNING: starting epoch:{self.epoch} {dataset}")
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) int32, from as many files as it takes."""
        parts = [np.empty(0, np.int32)]
        while n > 0:
            if self.pos >= len(self.tokens):
                self.next_file()
            part = self.tokens[self.pos : self.pos + n]
            self.pos += len(part)
            n -= len(part)
            parts.append(part)
        return np.concatenate(parts)

class TokenLoader:
    """Cuts a TokenStream, its attribute `stream`, into batches for the model."""
    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "") -> None:
        self.stream = TokenStream(pattern, log_fn, dataset_name)

    def next_batch(self, batch_tokens: int, seq_len: int) -> tuple[mx.array, mx.array]:
        """Inputs and targets, (batch_tokens // seq_len, seq_len) int32 each. InputError when that is no sequence.
        The stream gives one token more, the last target, so that batches do not overlap."""
        num_tokens = batch_tokens // seq_len * seq_len
        if num_tokens <= 0:
            raise InputError(f"a batch of {batch_tokens} tokens has no room for a sequence of {seq_len}")
        tokens = self.stream.take(num_tokens + 1)
        return mx.array(tokens[:-1].reshape(-1, seq_len)), mx.array(tokens[1:].reshape(-1, seq_len))

def load_validation_tokens(pattern: str, seq_len: int) -> np.ndarray:
    """All validation shards as one array, (k * seq_len + 1,) int32, with k as large as it can be.
    Raises MissingFileError when no file matches, InputError when k is 0."""
    tokens = np.concatenate([load_data_shard(path) for path in find_shards(pattern)])
    num_seqs = (len(tokens) - 1) // seq_len
    if num_seqs <= 0:
        raise InputError(f"{pattern}: {len(tokens)} tokens are too few for a sequence of TRAIN_SEQ_LEN={seq_len}")
    return tokens[: num_seqs * seq_len + 1]

def validate_dataset_tokenizer_pair(data_path: str, tokenizer_path: str) -> tuple[str, int, int | None]:
    """Check the data set against the manifest.json two folders above it, where there is one that lists it.
    Returns (name of the data set, training shards present, training shards expected or None). Raises InputError
    when it was made with a tokenizer of another file name, or has more shards than the manifest counts."""
    dataset_dir = Path(os.path.abspath(data_path))
    name, present = dataset_dir.name, len(list(dataset_dir.glob("fineweb_train_*.bin")))
    manifest_path = dataset_dir.parent.parent / "manifest.json"
    if not manifest_path.is_file():
        return name, present, None
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{manifest_path}: not valid JSON ({error})") from None
    entry = next((entry for entry in manifest.get("datasets", []) if entry.get("name") == name), {})
    listed = (item for item in manifest.get("tokenizers", []) if item.get("name") == entry.get("tokenizer_name"))
    tokenizer = next(listed, {}) if entry else {}
    made_with = Path(tokenizer.get("model_path") or tokenizer.get("path") or "").name
    if made_with and made_with != Path(tokenizer_path).name:
        raise InputError(f"TOKENIZER_PATH={tokenizer_path}: {manifest_path} says that {name} was made with {made_with}")
    expected = entry.get("stats", {}).get("files_train")
    if expected is not None and present > int(expected):
        raise InputError(f"DATA_PATH={data_path}: {present} training shards, but {manifest_path} counts {expected}")
    return name, present, None if expected is None else int(expected)


# 3. Bytes per token -------------------------------------------------------------------------------------------
# In: the tokenizer. Out: tables, indexed by token id, that say how many bytes of text a token stands for. Unlike
# the loss per token, bits per byte compare across tokenizers.

ByteTables = tuple[np.ndarray, np.ndarray, np.ndarray]

def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int) -> ByteTables:
    """Tables (max(tokenizer's size, vocab_size),): base bytes int16, has leading space bool, is boundary bool.
    The piece "\u2581the" has 3 base bytes and a leading space. That space is a byte of text unless the token before
    is a boundary, that is, stands for no text itself: begin of document, padding, ids beyond the tokenizer."""
    size = max(sp.vocab_size(), vocab_size)
    base_bytes = np.zeros(size, dtype=np.int16)
    has_leading_space = np.zeros(size, dtype=np.bool_)
    is_boundary = np.ones(size, dtype=np.bool_)
    for token_id in range(sp.vocab_size()):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        piece = sp.id_to_piece(token_id)
        has_leading_space[token_id] = piece.startswith("\u2581")
        text = piece.removeprefix("\u2581")
        base_bytes[token_id] = 1 if sp.is_byte(token_id) else len(text.encode("utf-8"))  # a byte is spelled <0x0A>
    return base_bytes, has_leading_space, is_boundary


# 4. Model -----------------------------------------------------------------------------------------------------
# In: token ids (batch, seq). Out: hidden states (batch, seq, dim), and from them the loss in nats. Activations and
# the embedding are in COMPUTE_DTYPE; other weights are float32 and are cast to it where they are used.

def rms_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight (arXiv:1910.07467), in x's dtype."""
    # mx.fast.rms_norm is float32 inside: close, but bfloat16 runs would no longer repeat the baseline's digits.
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps)

class RMSNormNoWeight(nn.Module):
    """rms_norm as a module without parameters."""
    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x)

class CastedLinear(nn.Module):
    """x @ weight.T with a float32 weight (out_dim, in_dim), cast to x's dtype for the product; no bias."""
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Linear(in_dim, out_dim, bias=False).weight.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T

class CausalSelfAttention(nn.Module):
    """Causal attention with grouped key/value heads (arXiv:2305.13245) and rotary positions (arXiv:2104.09864).
    Queries and keys are normalised, so that scores cannot grow with the weights (arXiv:2010.04245); q_gain learns
    how sharp each head is instead. Raises InputError for dimensions that do not divide."""
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"MODEL_DIM={dim} must be a multiple of NUM_HEADS={num_heads}")
        if num_heads % num_kv_heads:
            raise InputError(f"NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        if self.head_dim % 2:
            raise InputError(f"MODEL_DIM / NUM_HEADS = {self.head_dim} must be even: rotary positions turn pairs")
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.q_gain = mx.full((num_heads,), qk_gain_init, dtype=mx.float32)
        self.rope = nn.RoPE(self.head_dim, traditional=False, base=rope_base)
        self.scale = self.head_dim**-0.5

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        batch, seq, dim = x.shape

        def heads(y: mx.array, count: int) -> mx.array:  # -> (batch, count, seq, head_dim)
            return y.reshape(batch, seq, count, self.head_dim).transpose(0, 2, 1, 3)

        q, k = heads(self.c_q(x), self.num_heads), heads(self.c_k(x), self.num_kv_heads)
        v = heads(self.c_v(x), self.num_kv_heads)
        q = self.rope(rms_norm(q).astype(COMPUTE_DTYPE))
        k = self.rope(rms_norm(k).astype(COMPUTE_DTYPE))
        q = q * self.q_gain.astype(q.dtype)[None, :, None, None]
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask="causal")
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, seq, dim))

class MLP(nn.Module):
    """Two matrices with a squared ReLU between them (arXiv:2109.08668)."""
    def __init__(self, dim: int, mlp_mult: int) -> None:
        super().__init__()
        self.fc = CastedLinear(dim, dim * mlp_mult)
        self.proj = CastedLinear(dim * mlp_mult, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        return self.proj(mx.square(nn.relu(self.fc(x))))

class Block(nn.Module):
    """One transformer block: mix in the embedding, then attention, then the MLP, each with a learned scale.
    `resid_mix` (2, dim) lets every block look again at x0, the normalised embedding; it begins as "x alone"."""
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float,
                 qk_gain_init: float) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNormNoWeight(), RMSNormNoWeight()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = mx.ones((dim,), dtype=mx.float32)
        self.mlp_scale = mx.ones((dim,), dtype=mx.float32)
        self.resid_mix = mx.stack([mx.ones((dim,)), mx.zeros((dim,))])

    def __call__(self, x: mx.array, x0: mx.array) -> mx.array:
        """x and x0 are (batch, seq, dim); so is the result."""
        mix = self.resid_mix.astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.astype(x.dtype) * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.astype(x.dtype) * self.mlp(self.mlp_norm(x))

class GPT(nn.Module):
    """The language model: calling it gives hidden states, `loss` the training objective.
    The first num_layers // 2 blocks, the encoder, push their outputs on a stack; each later block first adds what it
    pops, while there is any, times a learned vector (U-Net, arXiv:1505.04597). The embedding also predicts the next
    token (arXiv:1608.05859). Matrices that write to the residual stream begin at zero, so the untrained model is its
    bare embedding, and its loss is close to log(vocab_size)."""
    def __init__(self, vocab_size: int, num_layers: int, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int,
                 logit_chunk_tokens: int, logit_softcap: float, rope_base: float, tied_embed_init_std: float,
                 qk_gain_init: float) -> None:
        super().__init__()
        if logit_softcap <= 0.0:
            raise InputError(f"LOGIT_SOFTCAP={logit_softcap} must be above 0")
        self.logit_chunk_tokens, self.logit_softcap = logit_chunk_tokens, logit_softcap
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        # The order of the random draws is part of the baseline: one seed, one model, bit for bit. That is why
        # nn.Embedding draws here what is drawn again at the end.
        self.tok_emb = nn.Embedding(vocab_size, dim)
        block_args = (dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
        self.blocks = [Block(*block_args) for _ in range(num_layers)]
        self.skip_weights = mx.ones((self.num_skip_weights, dim), dtype=mx.float32)
        self.final_norm = RMSNormNoWeight()
        for block in self.blocks:
            block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
            block.mlp.proj.weight = mx.zeros_like(block.mlp.proj.weight)
        embedding = mx.random.normal(self.tok_emb.weight.shape, dtype=mx.float32) * tied_embed_init_std
        self.tok_emb.weight = embedding.astype(COMPUTE_DTYPE)

    def __call__(self, input_ids: mx.array) -> mx.array:
        """Token ids (batch, seq) -> normalised hidden states (batch, seq, dim) in COMPUTE_DTYPE."""
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
        """Squash logits smoothly into (-cap, cap), so that no token becomes certain (arXiv:2408.00118)."""
        return self.logit_softcap * mx.tanh(logits / self.logit_softcap)

    def loss(self, input_ids: mx.array, target_ids: mx.array) -> mx.array:
        """Mean cross-entropy in nats, a float32 scalar, for ids (batch, seq) and the ids that follow them.
        The logits (tokens, vocab_size) are the largest array of all; logit_chunk_tokens > 0 makes them in parts."""
        x = self(input_ids)
        x, targets = x.reshape(-1, x.shape[-1]), target_ids.reshape(-1)
        num_tokens = targets.size
        chunk = self.logit_chunk_tokens if self.logit_chunk_tokens > 0 else num_tokens
        total = mx.array(0.0, dtype=mx.float32)
        for start in range(0, num_tokens, chunk):
            logits = self.softcap(x[start : start + chunk] @ self.tok_emb.weight.astype(x.dtype).T)
            losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets[start : start + chunk])
            total = total + losses.sum()
        return total / num_tokens


# 5. Optimizers ------------------------------------------------------------------------------------------------
# In: parameters and their gradients. Out: new parameters. Muon for the matrices of the blocks, Adam for the
# embedding and all that is a vector. Parameters travel in flat dicts: {"blocks.0.mlp.fc.weight": array, ...}.

FlatParams = dict[str, mx.array]

def zeropower_newtonschulz5(g: mx.array, steps: int, eps: float = 1e-7) -> mx.array:
    """About the semi-orthogonal matrix nearest to g (rows, cols): every singular value is moved close to 1.
    Newton-Schulz iteration by a quintic whose coefficients trade accuracy for a steep start, in float32; returns
    g's dtype (Keller Jordan, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.astype(mx.float32)
    x = x / (mx.linalg.norm(x) + eps)
    transposed = x.shape[0] > x.shape[1]  # x @ x.T is smallest with the short side first
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if transposed else x).astype(g.dtype)

class Muon:
    """Momentum with orthogonalised updates, so that all directions of a matrix learn at one rate."""
    def __init__(self, keys: list[str], params: FlatParams, args: Hyperparameters) -> None:
        self.keys, self.args = keys, args
        self.buffers = {key: mx.zeros_like(params[key]) for key in keys}

    def step(self, params: FlatParams, grads: FlatParams, step: int, lr_mul: float) -> FlatParams:
        """New values of this optimizer's keys; `step` counts from 0."""
        args = self.args
        warm = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1.0 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        updated = {}
        for key in self.keys:
            param, grad = params[key], grads[key]
            self.buffers[key] = momentum * self.buffers[key] + grad
            update = zeropower_newtonschulz5(grad + momentum * self.buffers[key], args.muon_backend_steps)  # Nesterov
            # All singular values being 1, a tall matrix's update is small beside its many rows: make up for that.
            shape_scale = math.sqrt(max(1.0, param.shape[0] / param.shape[1]))
            updated[key] = param - args.matrix_lr * lr_mul * shape_scale * update.astype(param.dtype)
        return updated

class SplitOptimizers:
    """Muon for `matrix_keys`; Adam for `embed_key` and, at another rate, for `scalar_keys`.
    Raises InputError for a parameter that none of them owns: it would stay untrained, and nobody would notice."""
    def __init__(self, model: GPT, args: Hyperparameters) -> None:
        self.args = args
        params = dict(tree_flatten(model.parameters()))
        blocks = {key: param for key, param in params.items() if key.startswith("blocks.")}
        control = {key for key in blocks if any(pattern in key for pattern in CONTROL_TENSOR_NAME_PATTERNS)}
        self.embed_key = "tok_emb.weight"
        self.matrix_keys = [key for key, param in blocks.items() if param.ndim == 2 and key not in control]
        self.scalar_keys = ["skip_weights"] if "skip_weights" in params else []
        self.scalar_keys += [key for key, param in blocks.items() if param.ndim < 2 or key in control]
        unowned = sorted(params.keys() - {self.embed_key, *self.matrix_keys, *self.scalar_keys})
        if unowned:
            raise InputError(f"no optimizer trains {', '.join(unowned)}: give each a place in SplitOptimizers")
        self.muon = Muon(self.matrix_keys, params, args)
        self.adam_embed, self.adam_scalar = (
            optim.Adam(learning_rate, betas=[args.beta1, args.beta2], eps=args.adam_eps, bias_correction=True)
            for learning_rate in (args.tied_embed_lr, args.scalar_lr)
        )

    def step(self, model: GPT, grads_tree: dict, step: int, lr_mul: float) -> None:
        """Update the model; `step` counts from 0. MLX is lazy: the work is done when the parameters are evaluated."""
        params, grads = dict(tree_flatten(model.parameters())), dict(tree_flatten(grads_tree))
        updated = self.muon.step(params, grads, step, lr_mul)
        for adam, learning_rate, keys in (
            (self.adam_embed, self.args.tied_embed_lr, [self.embed_key]),
            (self.adam_scalar, self.args.scalar_lr, self.scalar_keys),
        ):
            adam.learning_rate = learning_rate * lr_mul
            updated |= adam.apply_gradients({key: grads[key] for key in keys}, {key: params[key] for key in keys})
        model.update(tree_unflatten(list(updated.items())))

def clip_grad_tree(grads_tree: dict, max_norm: float) -> dict:
    """Scale all gradients so that their global norm is at most max_norm (not at all if that is 0 or less).
    Leaves keep their dtypes. The squares are summed in NumPy, because MLX has no float64 on GPUs."""
    if max_norm <= 0:
        return grads_tree
    leaves = [np.array(grad.astype(mx.float32)) for _, grad in tree_flatten(grads_tree)]
    norm = math.sqrt(sum(np.sum(np.square(leaf), dtype=np.float64) for leaf in leaves))
    scale = max_norm / (norm + 1e-12)
    return tree_map(lambda grad: (grad * scale).astype(grad.dtype), grads_tree) if norm > max_norm else grads_tree


# 6. Batches within a step -------------------------------------------------------------------------------------
# In: the loader. Out: loss and gradients of one optimizer step, averaged over its microbatches and their chunks,
# weighted by tokens. However large the batch, only one chunk's activations are in memory at a time.

Loss = Callable[[mx.array, mx.array], mx.array]
LossAndGrad = Callable[[mx.array, mx.array], tuple[mx.array, dict]]

def token_chunks(total_tokens: int, seq_len: int, max_chunk_tokens: int) -> list[int]:
    """Sizes in tokens of the chunks that total_tokens is computed in; what fills no sequence is left out.
    Each is whole sequences, at most max_chunk_tokens, but at least one. Raises InputError when there is none."""
    total_seqs, chunk_seqs = total_tokens // seq_len, max(max_chunk_tokens // seq_len, 1)
    if total_seqs <= 0:
        raise InputError(f"a microbatch (TRAIN_BATCH_TOKENS / GRAD_ACCUM_STEPS) of {total_tokens} tokens has no room "
                         f"for a sequence of TRAIN_SEQ_LEN={seq_len}")
    return [min(chunk_seqs, total_seqs - done) * seq_len for done in range(0, total_seqs, chunk_seqs)]

def accumulate_flat_grads(accum: FlatParams | None, grads_tree: dict, scale: float) -> FlatParams:
    """accum + scale * grads, in accum itself, a flat dict; None starts one."""
    accum = {} if accum is None else accum
    for key, grad in tree_flatten(grads_tree):
        accum[key] = accum[key] + grad * scale if key in accum else grad * scale
    return accum

def weighted_mean(parts: Iterable[tuple[float, mx.array, dict]], eager: bool) -> tuple[mx.array, dict]:
    """Sums of share * loss and share * gradients over (share, loss, gradients), as (scalar, tree)."""
    loss, accum = mx.array(0.0, dtype=mx.float32), None
    for share, part_loss, part_grads in parts:
        loss = loss + part_loss.astype(mx.float32) * share
        accum = accumulate_flat_grads(accum, part_grads, share)
        if eager:
            mx.eval(loss, accum)  # or else the lazy graph keeps every part's activations until the end
    return loss, tree_unflatten(list(accum.items()))

def loss_and_grad_chunked(args: Hyperparameters, train_loader: TokenLoader,
                          compiled_loss_and_grad: LossAndGrad) -> tuple[mx.array, dict]:
    """Mean loss (scalar, nats) and mean gradients (a tree) of the loader's next microbatch."""
    sizes = token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    batches = ((size / sum(sizes), train_loader.next_batch(size, args.train_seq_len)) for size in sizes)
    return weighted_mean(((share, *compiled_loss_and_grad(x, y)) for share, (x, y) in batches), args.mlx_eager_eval)

def loss_and_grad_step(args: Hyperparameters, train_loader: TokenLoader,
                       compiled_loss_and_grad: LossAndGrad) -> tuple[mx.array, dict]:
    """Mean loss (scalar, nats) and mean, clipped gradients (a tree) of the loader's next whole batch."""
    microbatches = ((1.0 / args.grad_accum_steps, *loss_and_grad_chunked(args, train_loader, compiled_loss_and_grad))
                    for _ in range(args.grad_accum_steps))
    loss, grads = weighted_mean(microbatches, args.mlx_eager_eval)
    return loss, clip_grad_tree(grads, args.grad_clip_norm)


# 7. Evaluation ------------------------------------------------------------------------------------------------
# In: a loss function and the validation tokens. Out: val_loss, nats per token, and val_bpb, bits per byte of
# text: training lowers the one, the challenge is scored by the other.

def val_batch_seqs(args: Hyperparameters) -> int:
    """Sequences in one validation batch. Raises InputError when there is none."""
    batch_tokens = args.val_batch_size // args.grad_accum_steps
    if batch_tokens < args.train_seq_len:
        raise InputError(f"VAL_BATCH_SIZE={args.val_batch_size} over GRAD_ACCUM_STEPS={args.grad_accum_steps} is "
                         f"{batch_tokens} tokens: must be at least TRAIN_SEQ_LEN={args.train_seq_len}")
    return batch_tokens // args.train_seq_len

def eval_val(args: Hyperparameters, compiled_loss: Loss, val_tokens: np.ndarray, base_bytes_lut: np.ndarray,
             has_leading_space_lut: np.ndarray, is_boundary_token_lut: np.ndarray,
             log_fn: LogFn | None = None) -> tuple[float, float]:
    """Score all of val_tokens, (k * seq_len + 1,): (val_loss in nats per token, val_bpb in bits per byte).
    compiled_loss(x, y) is the mean loss of a batch (seqs, seq_len); the tables are those of section 3. Raises
    InputError when a batch has no room for one sequence."""
    seq_len, batch_seqs = args.train_seq_len, val_batch_seqs(args)
    total_seqs = (len(val_tokens) - 1) // seq_len
    num_batches = math.ceil(total_seqs / batch_seqs)
    loss_sum, num_bytes, num_tokens = 0.0, 0, total_seqs * seq_len
    for i in range(1, num_batches + 1):
        first, last = (i - 1) * batch_seqs, min(i * batch_seqs, total_seqs)
        tokens = val_tokens[first * seq_len : last * seq_len + 1].astype(np.int32)
        previous, target = tokens[:-1], tokens[1:]
        loss = compiled_loss(mx.array(previous.reshape(-1, seq_len)), mx.array(target.reshape(-1, seq_len)))
        loss_sum += float(loss) * target.size  # float() waits, so that one batch at a time is in memory
        spaces = has_leading_space_lut[target] & ~is_boundary_token_lut[previous]
        num_bytes += int(base_bytes_lut[target].sum(dtype=np.int64)) + int(spaces.sum())
        if log_fn is not None and num_batches > 1 and (i in (1, num_batches) or i % 25 == 0):
            log_fn(f"val_progress:{i}/{num_batches}")
    val_loss = loss_sum / num_tokens
    return val_loss, val_loss / math.log(2.0) * (num_tokens / num_bytes)


# 8. Compression -----------------------------------------------------------------------------------------------
# In: the model's state, a flat dict. Out: an object of NumPy arrays, int8 where they are large and float16 or
# float32 elsewhere, and the way back. The format, int8_clean_per_row_v1, is shared with other implementations.

INT8_KEEP_FLOAT_MAX_NUMEL = 65_536  # tensors of at most so many elements stay floating
INT8_KEEP_FLOAT_STORE_DTYPE = np.float16
INT8_PER_ROW_SCALE_DTYPE = np.float16
INT8_CLIP_PERCENTILE = 99.99984  # of the magnitudes: a few outliers must not coarsen all the others
INT8_CLIP_Q = INT8_CLIP_PERCENTILE / 100.0

def float32_numpy(arr: mx.array) -> np.ndarray:
    """The array in NumPy, which has no bfloat16, as float32."""
    return np.array(arr.astype(mx.float32))

def keep_float_array(name: str, arr: mx.array, passthrough_orig_dtypes: dict[str, str]) -> np.ndarray:
    """How a small floating array is stored: control tensors float32, others float16.
    Adds to passthrough_orig_dtypes the dtype that a float16 copy is to be restored to."""
    if any(pattern in name for pattern in INT8_KEEP_FLOAT_FP32_NAME_PATTERNS):
        return float32_numpy(arr)
    if arr.dtype in (mx.float32, mx.bfloat16):
        passthrough_orig_dtypes[name] = str(arr.dtype).removeprefix("mlx.core.")
        return float32_numpy(arr).astype(INT8_KEEP_FLOAT_STORE_DTYPE)
    return np.array(arr)

def quantize_float_array(arr: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Round to whole multiples of a scale: (int8 array, scale).
    A matrix (rows, cols) has a float16 scale per row, (rows,); any other shape one float32 scale, (). The rows'
    floor of 1/127 is coarse for small weights; it is part of the format, as is rounding by the float32 scale."""
    w = float32_numpy(arr)
    per_row = w.ndim == 2
    axis = 1 if per_row else None
    clip = np.quantile(np.abs(w), INT8_CLIP_Q, axis=axis) if w.size else np.zeros(w.shape[:1] if per_row else ())
    clip = np.asarray(clip, dtype=np.float32)  # NumPy 1 interpolates to float64, with other results below
    if per_row:
        clip = clip[:, None]
        scale = np.maximum(clip / np.float32(127.0), np.float32(1.0 / 127.0))
        stored = scale[:, 0].astype(INT8_PER_ROW_SCALE_DTYPE)
    else:
        stored = scale = np.asarray(clip / np.float32(127.0) if clip > 0 else 1.0, dtype=np.float32)
    q = np.clip(np.round(np.clip(w, -clip, clip) / scale), -127, 127).astype(np.int8)
    return q, stored

def quantize_state_dict_int8(flat_state: FlatParams) -> tuple[dict[str, Any], dict[str, int]]:
    """(object of NumPy arrays to pickle, statistics): large floating tensors in int8, the rest passed through.
    Small tensors cost few bytes and suffer most, so they stay floating; what is no float is kept as it is."""
    obj: dict[str, Any] = {"__quant_format__": "int8_clean_per_row_v1"}
    obj |= {part: {} for part in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")}
    num_nonfloat = 0
    for name, arr in flat_state.items():
        if not mx.issubdtype(arr.dtype, mx.floating):
            obj["passthrough"][name] = np.array(arr)
            num_nonfloat += 1
        elif arr.size <= INT8_KEEP_FLOAT_MAX_NUMEL:
            obj["passthrough"][name] = keep_float_array(name, arr, obj["passthrough_orig_dtypes"])
        else:
            obj["quantized"][name], obj["scales"][name] = quantize_float_array(arr)
            obj["dtypes"][name] = str(arr.dtype).removeprefix("mlx.core.")
            if arr.ndim == 2:
                obj["qmeta"][name] = {"scheme": "per_row", "axis": 0}
    payload = [arr for part in ("quantized", "scales", "passthrough") for arr in obj[part].values()]
    stats = {
        "param_count": sum(arr.size for arr in flat_state.values()), "num_tensors": len(flat_state),
        "num_float_tensors": len(obj["quantized"]), "num_nonfloat_tensors": num_nonfloat,
        "baseline_tensor_bytes": sum(arr.nbytes for arr in flat_state.values()),
        "int8_payload_bytes": sum(arr.nbytes for arr in payload),
    }
    optional = ("qmeta", "passthrough_orig_dtypes")  # the format leaves these out when they are empty
    return {key: value for key, value in obj.items() if value or key not in optional}, stats

def dequantize_state_dict_int8(quant_obj: dict[str, Any]) -> FlatParams:
    """The flat state that an object of quantize_state_dict_int8 stands for, in the original dtypes."""
    state, original_dtypes = {}, quant_obj.get("passthrough_orig_dtypes", {})
    for name, q in quant_obj["quantized"].items():
        scale = np.asarray(quant_obj["scales"][name], dtype=np.float32)
        scale = scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))
        state[name] = mx.array(q.astype(np.float32) * scale).astype(MX_DTYPE_FROM_NAME[quant_obj["dtypes"][name]])
    for name, stored in quant_obj["passthrough"].items():
        arr = mx.array(stored)
        state[name] = arr.astype(MX_DTYPE_FROM_NAME[original_dtypes[name]]) if name in original_dtypes else arr
    return state


# 9. The run ---------------------------------------------------------------------------------------------------
# In: the settings. Out: a log, the weights (.npz), the compressed model (.int8.ptz) and its score. Only this section
# writes files, and it alone knows all the others.

CODE_PATH = Path(__file__)
NPZ_SUFFIX, ARTIFACT_SUFFIX = "_mlx_model.npz", "_mlx_model.int8.ptz"
SUBMISSION_CAP_BYTES = 16_000_000  # for this file and the compressed model together

@dataclass
class Inputs:
    """What a run reads before it starts."""
    dataset_name: str
    train_shards: int
    expected_train_shards: int | None
    val_tokens: np.ndarray  # (k * seq_len + 1,) int32
    byte_tables: ByteTables

@dataclass
class Run:
    """What the stages of a run share."""
    args: Hyperparameters
    inputs: Inputs
    log: LogFn
    model: GPT
    optimizers: SplitOptimizers
    compiled_loss: Loss
    compiled_loss_and_grad: LossAndGrad

def read_inputs(args: Hyperparameters) -> Inputs:
    """Check the settings against data and tokenizer, and read what validation needs; nothing is written yet.
    Raises InputError (MissingFileError for a file that is not there), or NotImplementedError for untied embeddings."""
    for setting in settings_of(ModuleSettings).values():
        setting.read()  # importing let a bad value pass
    path = args.tokenizer_path
    if not args.tie_embeddings:
        raise NotImplementedError("TIE_EMBEDDINGS=0: only tied embeddings are implemented")
    if not path.endswith(".model"):
        raise InputError(f"TOKENIZER_PATH={path}: must be a SentencePiece model, a file ending in .model")
    # These raise here what would otherwise end the run later.
    token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    val_batch_seqs(args)
    find_shards(args.train_files)
    val_tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    if not Path(path).is_file():
        raise MissingFileError(f"TOKENIZER_PATH={path}: no such file: {HOW_TO_GET_DATA}")
    tokenizer = spm.SentencePieceProcessor(model_file=path)
    if tokenizer.vocab_size() != args.vocab_size:
        raise InputError(f"VOCAB_SIZE={args.vocab_size}, but TOKENIZER_PATH={path} has {tokenizer.vocab_size()} pieces")
    dataset = validate_dataset_tokenizer_pair(args.data_path, path)
    return Inputs(*dataset, val_tokens, build_sentencepiece_luts(tokenizer, args.vocab_size))

def open_log(args: Hyperparameters) -> LogFn:
    """Open the log, print its path, and write the script's source and versions to it: each result has its code.
    Files that an earlier run left under this RUN_ID are moved aside first, all to the same number."""
    paths = [Path(args.out_dir, args.run_id + suffix) for suffix in (".txt", NPZ_SUFFIX, ARTIFACT_SUFFIX)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    taken, number = [path for path in paths if path.exists()], 1
    while any(Path(f"{path}.{number}").exists() for path in paths):
        number += 1
    for path in taken:
        path.rename(f"{path}.{number}")
    log_file = paths[0].open("w", encoding="utf-8")

    def log(line: str) -> None:
        print(line, flush=True)
        print(line, file=log_file, flush=True)

    print(paths[0], flush=True)
    versions = f"Python {sys.version}\nMLX {mx.__version__}"
    print(CODE_PATH.read_text(encoding="utf-8"), "=" * 100, versions, "=" * 100, sep="\n", file=log_file, flush=True)
    for path in taken:
        log(f"moved_aside:{path} to:{path}.{number} (of an earlier run with this RUN_ID)")
    return log

def set_up(args: Hyperparameters, inputs: Inputs, log: LogFn) -> Run:
    """Seed, then build the model, its optimizers and the two compiled functions."""
    mx.random.seed(args.seed)
    model = GPT(
        args.vocab_size, args.num_layers, args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult,
        args.logit_chunk_tokens, args.logit_softcap, args.rope_base, args.tied_embed_init_std, args.qk_gain_init)
    # A compiled function takes the arrays it closes over for constants unless it is told that they are inputs.
    captured = {"inputs": model.state, "outputs": model.state}
    loss, loss_and_grad = (mx.compile(f, **captured) for f in (model.loss, nn.value_and_grad(model, model.loss)))
    return Run(args, inputs, log, model, SplitOptimizers(model, args), loss, loss_and_grad)

def cpu_blas() -> str:
    """The BLAS that MLX's products on the CPU go to: "openblas", "reference", the library's file name or "unknown".
    On Linux MLX is bound to the library in the process's global scope that had the symbol when MLX was loaded,
    else to the one it brings along. So ask the dynamic linker who has it, and whether that came before MLX."""
    if sys.platform != "linux":
        return "accelerate"
    linker, loaded = ctypes.CDLL(None), []
    visitor_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t, ctypes.c_void_p)
    # dl_phdr_info begins with an address and the path; Dl_info, below, with the path.
    linker.dl_iterate_phdr(visitor_type(lambda info, size, data: loaded.append(info[1].decode()) or 0), None)

    def provider(library: ctypes.CDLL) -> str:
        symbol, info = getattr(library, "cblas_sgemm", None), (ctypes.c_char_p * 4)()
        return info[0].decode() if symbol and linker.dladdr(symbol, info) else ""

    mlx_path = next((path for path in loaded if "libmlx" in path), None)
    if mlx_path is None:
        return "unknown"
    path = provider(linker)
    if not path or path not in loaded[: loaded.index(mlx_path)]:
        path = provider(ctypes.CDLL(mlx_path))
    name = Path(path).resolve().name
    return "openblas" if "openblas" in name else "reference" if name.startswith("libblas") else name

def fields(**values: Any) -> str:
    """`name:value name:value`, as the log has it."""
    return " ".join(f"{name}:{value}" for name, value in values.items())

def log_configuration(run: Run) -> None:
    """Log what is about to run. Other people's scripts parse these lines: fields may be added, not changed."""
    args, inputs, log = run.args, run.inputs, run.log
    params = dict(tree_flatten(run.model.parameters()))
    log(fields(run_id=args.run_id))
    log(fields(mlx_version=mx.__version__))
    log(f"train_loader:shards pattern={args.train_files}")
    log(f"val_loader:shards pattern={args.val_files} tokens:{len(inputs.val_tokens) - 1}")
    present, expected = inputs.train_shards, inputs.expected_train_shards
    shards = f"dataset:{inputs.dataset_name} train_shards:{present}" + ("" if expected is None else f"/{expected}")
    if expected is not None and present < expected:
        log(f"WARNING: train_loader:subset {shards} new epochs will arrive sooner than the full dataset")
    else:
        log(f"train_loader:{shards}")
    log(fields(tokenizer_path=args.tokenizer_path))
    log(fields(
        model_params=sum(param.size for param in params.values()), vocab_size=args.vocab_size, layers=args.num_layers,
        dim=args.model_dim, heads=args.num_heads, kv_heads=args.num_kv_heads, seq_len=args.train_seq_len,
        tie_embeddings=args.tie_embeddings))
    log(fields(
        iterations=args.iterations, train_batch_tokens=args.train_batch_tokens, grad_accum_steps=args.grad_accum_steps,
        microbatch_tokens=args.microbatch_tokens, microbatch_batch_size=args.microbatch_tokens // args.train_seq_len,
        val_batch_size=args.val_batch_size, warmup_steps=args.warmup_steps,
        max_wallclock_seconds=f"{args.max_wallclock_seconds:.3f}"))
    log(fields(mlx_max_microbatch_tokens=args.mlx_max_microbatch_tokens))
    log("optimizer:muon+adam " + fields(
        muon_matrix_params=len(run.optimizers.matrix_keys), scalar_params=len(run.optimizers.scalar_keys),
        embed_lr=args.tied_embed_lr, matrix_lr=args.matrix_lr, scalar_lr=args.scalar_lr,
        muon_momentum=args.muon_momentum, muon_steps=args.muon_backend_steps))
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log(fields(compute_dtype=COMPUTE_DTYPE, compile=True))
    log("dtypes " + fields(
        tok_emb=params["tok_emb.weight"].dtype, linear_weight=run.model.blocks[0].attn.c_q.weight.dtype,
        skip_weights=params["skip_weights"].dtype))
    if mx.default_device() == mx.Device(mx.cpu):
        hint = " (slow: `apt-get install libopenblas0-pthread`, and import this script before mlx, for fast products)"
        log(f"cpu_blas:{(blas := cpu_blas())}" + (hint if blas == "reference" else ""))

def validate(run: Run) -> tuple[float, float]:
    """(val_loss, val_bpb) of the model as it is now."""
    return eval_val(run.args, run.compiled_loss, run.inputs.val_tokens, *run.inputs.byte_tables, log_fn=run.log)

def warm_up(run: Run) -> None:
    """Make MLX compile and allocate what training and validation will use, and learn nothing from it.
    Loader and optimizers are throwaway ones; the model and the random state are put back as they were."""
    args, log = run.args, run.log
    if args.warmup_steps <= 0:
        return
    log(f"warmup:{args.warmup_steps} steps of {args.train_batch_tokens} tokens, off the clock")
    parameters, (high, low) = run.model.parameters(), mx.random.state[0].tolist()
    loader = TokenLoader(args.train_files)
    for step in range(1, args.warmup_steps + 1):
        _, grads = loss_and_grad_step(args, loader, run.compiled_loss_and_grad)
        mx.eval(grads)
        if args.warmup_steps <= 20 or step % 10 == 0 or step == args.warmup_steps:
            log(f"warmup_step:{step}/{args.warmup_steps}")
    SplitOptimizers(run.model, args).step(run.model, grads, step=0, lr_mul=1.0)
    mx.eval(run.model.parameters())
    run.model.update(parameters)
    # Validation has batches of two shapes, the full one and the last: so many sequences give one of each.
    total_seqs, batch_seqs = (len(run.inputs.val_tokens) - 1) // args.train_seq_len, val_batch_seqs(args)
    primer_seqs = min(total_seqs, batch_seqs + total_seqs % batch_seqs)
    primer = run.inputs.val_tokens[: primer_seqs * args.train_seq_len + 1]
    eval_val(args, run.compiled_loss, primer, *run.inputs.byte_tables)
    mx.random.seed(high << 32 | low)  # a seed's two halves are MLX's random state

def train(run: Run) -> None:
    """Train until ITERATIONS or the wallclock cap, whichever is first; validation is off the clock."""
    args, log = run.args, run.log
    loader = TokenLoader(args.train_files, log, run.inputs.dataset_name)
    step, train_ms, capped = 0, 0.0, False
    while True:
        finished = capped or step >= args.iterations
        if finished or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            val_loss, val_bpb = validate(run)
            log(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms")
        if finished:
            break
        lr_mul = args.lr_mul(step, train_ms)
        started = time.perf_counter()
        train_loss, grads = loss_and_grad_step(args, loader, run.compiled_loss_and_grad)
        run.optimizers.step(run.model, grads, step, lr_mul)
        mx.eval(train_loss, run.model.parameters())
        step_ms = 1000.0 * (time.perf_counter() - started)
        step, train_ms = step + 1, train_ms + step_ms
        capped = 0.0 < 1000.0 * args.max_wallclock_seconds <= train_ms
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{train_ms:.0f}ms "
                f"step_avg:{train_ms / step:.2f}ms tok_s:{args.train_batch_tokens / (step_ms / 1000.0):.0f}")
        if step == min(3, args.iterations) or (capped and step < 3):  # by then the steps' length is known
            log_warmdown(run, step, train_ms)
    if step < args.iterations:
        log(f"stopping_early: wallclock_cap train_time:{train_ms:.0f}ms step:{step}/{args.iterations}")

def log_warmdown(run: Run, step: int, train_ms: float) -> None:
    """Tell when the whole run lies inside the warmdown, so that the full learning rate is used once at the most."""
    args, cap_ms = run.args, 1000.0 * run.args.max_wallclock_seconds
    # As lr_mul sees it: with a cap, the schedule ends with the last step that fits under it.
    scheduled = max(int(cap_ms / (train_ms / step)), 1) if cap_ms > 0 else args.iterations
    if scheduled < args.warmdown_iters:
        fit = fields(steps_that_fit=min(scheduled, args.iterations), warmdown_iters=args.warmdown_iters)
        run.log(f"warmdown:whole_run lr_mul:{args.lr_mul(step, train_ms):.4f} {fit} "
                f"(after the first step the rate is never the full one; WARMDOWN_ITERS={scheduled} would start at it)")

def save(run: Run) -> Path:
    """Write the weights as they are (.npz) and compressed (.int8.ptz); returns the latter's path."""
    log, flat_state = run.log, dict(tree_flatten(run.model.state))
    npz_path, artifact_path = (Path(run.args.out_dir, run.args.run_id + end) for end in (NPZ_SUFFIX, ARTIFACT_SUFFIX))
    mx.savez(str(npz_path), **flat_state)
    log(f"saved_model:{npz_path} bytes:{npz_path.stat().st_size}")
    quant_obj, stats = quantize_state_dict_int8(flat_state)
    raw = pickle.dumps(quant_obj, protocol=pickle.HIGHEST_PROTOCOL)
    artifact_path.write_bytes(zlib.compress(raw, level=9))
    artifact_bytes, code_bytes = artifact_path.stat().st_size, CODE_PATH.stat().st_size
    payload, total_bytes = stats["int8_payload_bytes"], code_bytes + artifact_bytes
    log(f"serialized_model_int8_zlib:{artifact_bytes} bytes (payload:{payload} raw_pickle:{len(raw)} "
        f"payload_ratio:{stats['baseline_tensor_bytes'] / max(payload, 1):.2f}x)")
    verdict = "under" if total_bytes <= SUBMISSION_CAP_BYTES else "OVER"
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size int8+zlib: {total_bytes} bytes ({verdict} the cap of {SUBMISSION_CAP_BYTES} bytes)")
    return artifact_path

def score(run: Run, artifact_path: Path) -> None:
    """Read the compressed model back into the model and validate it: that is the run's score."""
    quant_obj = pickle.loads(zlib.decompress(artifact_path.read_bytes()))
    run.model.update(tree_unflatten(list(dequantize_state_dict_int8(quant_obj).items())))
    started = time.perf_counter()
    val_loss, val_bpb = validate(run)
    eval_ms = 1000.0 * (time.perf_counter() - started)
    run.log(f"final_int8_zlib_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_ms:.0f}ms")
    run.log(f"final_int8_zlib_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

def main() -> None:
    """One run, as the environment says. Raises InputError or NotImplementedError for what the user can mend."""
    args = Hyperparameters()
    inputs = read_inputs(args)  # before the log is opened: a run that cannot start leaves nothing behind
    run = set_up(args, inputs, open_log(args))
    log_configuration(run)
    warm_up(run)
    train(run)
    artifact_path = save(run)
    score(run, artifact_path)

def command_line(arguments: list[str]) -> int:
    """The script's exit status: 0 for a score or for --help, 2 for what the user can mend, told in one line."""
    if arguments in (["--help"], ["-h"]):
        print(help_text())
        return 0
    try:
        if arguments:
            raise InputError(f"{arguments[0]}: settings are environment variables, as in ITERATIONS=100; see --help")
        main()
    except (InputError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
