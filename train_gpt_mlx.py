#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx>=0.26.5; sys_platform == 'darwin'", "mlx[cpu]>=0.26.5; sys_platform == 'linux'",
#                 "numpy>=1.21.6", "sentencepiece>=0.1.99"]
# ///
"""Parameter Golf on Apple Silicon: train a small GPT, compress it, score what is left in bits per byte.

The challenge asks for the best language model that fits in 16,000,000 bytes, code and compressed weights together. This
is the baseline for people with a Mac; it also runs on Linux. Settings are environment variables: see `--help`. The file
reads in the order in which the data flows, in ten sections, and ends in main(). A *batch*, the tokens of one optimizer
step, is split into GRAD_ACCUM_STEPS *microbatches*, each computed in *chunks* of at most MLX_MAX_MICROBATCH_TOKENS
tokens, the most in memory at once. Shapes read (batch, seq, dim).
"""

import contextlib
import copy
import ctypes
import difflib
import glob
import io
import json
import math
import os
import pickle
import pickletools
import re
import select
import signal
import sys
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# MLX takes the first BLAS in the process's global scope. Where a Linux machine has OpenBLAS, put it there before MLX's
# import does so with the slow one inside its CPU wheel.
if sys.platform == "linux" and "mlx.core" not in sys.modules and os.environ.get("MLX_PRELOAD_BLAS") != "0":
    with contextlib.suppress(OSError):  # not installed: the run's log says so, and how to get it
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
HAS_OPENBLAS = hasattr(ctypes.CDLL(None), "openblas_get_config")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import sentencepiece as spm
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten


# 1. Settings --------------------------------------------------------------------------------------------------
# In: environment variables. Out: a Hyperparameters object with a plain attribute for each, and a few constants. A
# setting is declared once, with default, meaning and limits; parsing, errors and --help follow from that.
class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do."""
class MissingFileError(InputError, FileNotFoundError):
    """A file that a setting names is not there."""
class RunError(RuntimeError):
    """What ends a run that had begun. The message says what failed."""
def require(condition: bool, message: str, error: type[Exception] = InputError) -> None:
    """Raise the error unless the condition holds."""
    if not condition:
        raise error(message)

@dataclass
class Setting:
    """One environment variable, named after the class attribute in upper case; an instance keeps what it first read."""
    group: str
    default: Any  # of the setting's type; a bool is written 0 or 1; a callable makes the value
    meaning: str
    limits: str = ""  # of a number, which must be finite in any case: ">= 0 and < 1"
    fallback: str = ""  # an older variable, read when only that one is set
    shown: str = ""  # how --help writes a default that is computed
    def __set_name__(self, owner: type, name: str) -> None:
        self.variable = name.upper()
    def __get__(self, instance: object, owner: type) -> Any:
        return self.read() if instance is None else vars(instance).setdefault(self.variable.lower(), self.read())
    def read(self) -> Any:
        """The value from the environment, or the default. Raises InputError for text that is no such value."""
        variable = self.fallback if self.fallback in os.environ and self.variable not in os.environ else self.variable
        text, kind = os.environ.get(variable), type(self.default)
        if text is None:
            return self.default() if callable(self.default) else self.default
        try:
            return ("0", "1").index(text) == 1 if kind is bool else kind(text) if kind in (int, float) else text
        except ValueError:
            raise InputError(f"{variable}={text!r}: must be {self.allowed()}") from None
    def allowed(self) -> str:
        """What the value must be, in words."""
        kind = {bool: "0 or 1", int: "a whole number", float: "a finite number"}.get(type(self.default), "not empty")
        return f"{kind} {self.limits}".rstrip()
    def check(self, owner: Any) -> None:
        """Raise InputError if the owner's value, from wherever it came, is one that no run can use."""
        kind, value = type(self.default), getattr(owner, self.variable.lower())
        sound = isinstance(value, (str, os.PathLike)) and (value != "" or self.default == "")
        if kind in (bool, int, float):
            sound = isinstance(value, (int, np.integer) if kind is int else (int, float, np.number))
            sound = sound and abs(value) < {bool: 2, float: 3e38}.get(kind, 2**64 if "<" in self.limits else 2**31)
        for sign, end in re.findall(r"([<>]=?) (\S+)", self.limits):
            sound = sound and {"<": value < float(end), ">": value > float(end), ">=": value >= float(end)}[sign]
        require(sound, f"{self.variable}={value}: must be {self.allowed()}")
def settings_of(owner: type) -> dict[str, Setting]:
    """The settings that a class declares or inherits, by attribute name, in the order of declaration."""
    found = {name: value for base in reversed(owner.__mro__) for name, value in vars(base).items()}
    return {name: value for name, value in found.items() if isinstance(value, Setting)}

class Hyperparameters:
    """Every setting of a run, read from the environment when an instance is made; plain, assignable attributes.
    A subclass may add attributes, or replace a setting by a value of its own, which wins over the environment."""
    data_path = Setting("data", "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path = Setting("data", "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of those shards")
    run_id = Setting("data", lambda: str(uuid.uuid4()), "names the run's log and files", shown="<a fresh uuid4>")
    seed = Setting("data", 1337, "seed of the initial weights", ">= 0 and < 18446744073709551616")
    out_dir = Setting("data", "logs", "folder for the log, the saved model and checkpoints")
    resume = Setting("data", "", "checkpoint to go on from; auto: this RUN_ID's, if there is one")
    eval_artifact = Setting("data", "", "score this .int8.ptz or .npz instead of training")
    iterations = Setting("loop", 20_000, "most optimizer steps; 0 scores the untrained model", ">= 0")
    val_loss_every = Setting("loop", 0, "validate every so many steps; 0: only at the end", ">= 0")
    val_max_tokens = Setting("loop", 0, "score only so many validation tokens, for a quick look; 0: all", ">= 0")
    val_batch_size = Setting("loop", 524_288, "tokens of GRAD_ACCUM_STEPS validation batches together", ">= 1")
    train_log_every = Setting("loop", 200, "log every so many steps after the first 10; 0: no train lines", ">= 0")
    train_batch_tokens = Setting("loop", 524_288, "tokens per optimizer step", ">= 1")
    grad_accum_steps = Setting("loop", 8, "microbatches that a step's tokens are split into", ">= 1")
    train_seq_len = Setting("loop", 1024, "tokens per sequence", ">= 1", fallback="TRAIN_MAX_SEQ_LEN")
    warmup_steps = Setting("loop", 20, "lines of the warmup, which compiles off the clock; 0: none", ">= 0")
    warmdown_iters = Setting("loop", 1200, "last steps, over which the learning rate falls linearly to 0")
    max_wallclock_seconds = Setting("loop", 600.0, "most seconds of training; 0: no cap", "< 1e9")
    checkpoint_every = Setting("loop", 0, "a checkpoint every so many steps and at the end; 0: if interrupted", ">= 0")
    mlx_max_microbatch_tokens = Setting("memory", 8192, "most tokens in the model at once; less: less memory", ">= 1")
    mlx_eager_eval = Setting("memory", True, "finish each chunk before the next begins: keeps memory at one chunk")
    logit_chunk_tokens = Setting("memory", 0, "make the logits of so many tokens at a time; 0: of all at once", ">= 0")
    vocab_size = Setting("model", 1024, "token ids; must equal the tokenizer's", ">= 1 and < 65537")
    num_layers = Setting("model", 9, "transformer blocks; the first half has skip connections to the second", ">= 1")
    model_dim = Setting("model", 512, "width of the residual stream", ">= 1")
    num_heads = Setting("model", 8, "query heads", ">= 1")
    num_kv_heads = Setting("model", 4, "key/value heads; NUM_HEADS / NUM_KV_HEADS query heads share one", ">= 1")
    mlp_mult = Setting("model", 2, "MLP width over MODEL_DIM", ">= 1")
    tie_embeddings = Setting("model", True, "embed and predict with one matrix; 0 is not implemented")
    tied_embed_init_std = Setting("model", 0.005, "standard deviation of the initial embedding", "> 0")
    logit_softcap = Setting("model", 30.0, "logits are squashed smoothly into -CAP..CAP", "> 0")
    rope_base = Setting("model", 10000.0, "base of the rotary position frequencies", "> 0")
    qk_gain_init = Setting("model", 1.5, "initial gain of each head's queries")
    beta1 = Setting("optimizer", 0.9, "Adam: decay of the first moment", ">= 0 and < 1")
    beta2 = Setting("optimizer", 0.95, "Adam: decay of the second moment", ">= 0 and < 1")
    adam_eps = Setting("optimizer", 1e-8, "Adam: added to the denominator", "> 0")
    tied_embed_lr = Setting("optimizer", 0.05, "learning rate of the embedding (Adam)", ">= 0")
    matrix_lr = Setting("optimizer", 0.04, "learning rate of the blocks' matrices (Muon)", ">= 0")
    scalar_lr = Setting("optimizer", 0.04, "learning rate of vectors, gains and skip weights (Adam)", ">= 0")
    muon_momentum = Setting("optimizer", 0.95, "Muon: momentum after its warmup", ">= 0 and < 1")
    muon_backend_steps = Setting("optimizer", 5, "Muon: Newton-Schulz iterations per update", ">= 0")
    muon_momentum_warmup_start = Setting("optimizer", 0.85, "Muon: momentum at step 0", ">= 0 and < 1")
    muon_momentum_warmup_steps = Setting("optimizer", 500, "Muon: steps until MUON_MOMENTUM; 0: constant", ">= 0")
    grad_clip_norm = Setting("optimizer", 0.0, "scale gradients down to this global norm; 0: off")
    def __init__(self) -> None:
        try:
            vars(self).update({name: setting.read() for name, setting in settings_of(type(self)).items()})
        except InputError:
            read_inputs(self)  # raises one that names all else that is wrong along with the unreadable text
    train_files = property(lambda self: f"{self.data_path}/fineweb_train_*.bin", doc="Glob pattern of training shards.")
    val_files = property(lambda self: f"{self.data_path}/fineweb_val_*.bin", doc="Glob pattern of those to score.")
    microbatch_tokens = property(lambda self: self.train_batch_tokens // self.grad_accum_steps, doc="Of a microbatch.")
    def lr_mul(self, step: int, elapsed_ms: float) -> float:
        """Learning-rate multiplier after `step` steps and elapsed_ms of training: 1, then linearly down to 0. With a
        cap the warmdown is WARMDOWN_ITERS steps of the mean length so far; where fewer fit, all but one are scaled."""
        if self.warmdown_iters <= 0:
            return 1.0
        if self.max_wallclock_seconds <= 0:
            return min((self.iterations - step) / self.warmdown_iters, 1.0) if step < self.iterations else 1.0
        warmdown_ms = self.warmdown_iters * (elapsed_ms / max(step, 1))
        remaining_ms = max(1000.0 * self.max_wallclock_seconds - elapsed_ms, 0.0)
        return remaining_ms / warmdown_ms if remaining_ms <= warmdown_ms else 1.0
class ModuleSettings:
    """The settings behind module constants: read at import, and no part of Hyperparameters."""
    compute_dtype = Setting("platform", "auto", "bfloat16, float32, or auto: bfloat16 on a GPU, else float32")
    mlx_preload_blas = Setting("platform", True, "Linux: use OpenBLAS for products on the CPU where it is installed")
    control_tensor_name_patterns = Setting("name lists", (
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"),
        "block parameters that Adam trains, not Muon: those with one of these in their name")
    int8_keep_float_fp32_name_patterns = Setting(
        "name lists", lambda: ModuleSettings.control_tensor_name_patterns, shown="<CONTROL_TENSOR_NAME_PATTERNS>",
        meaning="small tensors saved in float32, not float16: those with one of these in their name")
def backend() -> str:
    """Where MLX computes by default: "metal", "cuda" or "cpu"."""
    return "cpu" if mx.default_device() != mx.Device(mx.gpu) else "metal" if mx.metal.is_available() else "cuda"
MX_DTYPE_FROM_NAME = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# auto: a GPU is fastest in bfloat16, a CPU in float32, which goes to BLAS. A run refuses other words, no import does.
COMPUTE_DTYPE = {"bfloat16": mx.bfloat16, "float32": mx.float32}.get(
    ModuleSettings.compute_dtype, mx.float32 if backend() == "cpu" else mx.bfloat16)
# An empty part of a list is dropped, for "" is in every name.
CONTROL_TENSOR_NAME_PATTERNS = tuple(filter(None, ModuleSettings.control_tensor_name_patterns.split(",")))
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS = tuple(filter(None, ModuleSettings.int8_keep_float_fp32_name_patterns.split(",")))
def misspelt_settings(owner: type = Hyperparameters) -> list[str]:
    """A warning for each environment variable that is no setting, but has nine tenths of the letters of one."""
    settings = [*settings_of(owner).values(), *settings_of(ModuleSettings).values()]
    names = {name.replace("_", ""): name for s in settings for name in (s.variable, s.fallback) if name}
    near = {name: difflib.get_close_matches(name.upper().replace("_", ""), names, 1, 0.9) for name in os.environ}
    return [f"WARNING: {name} is set, but is no setting: was {names[found[0]]} meant?"
            for name, found in near.items() if found and name not in names.values()]
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
# In: files of uint16 tokens. Out: an endless stream of (x, y) pairs in which y is x shifted by one token.
LogFn = Callable[[str], Any]
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, then zeros
HOW_TO_GET_DATA = ("`.venv/bin/python data/cached_challenge_fineweb.py --train-shards 1` fetches some of FineWeb; or "
                   "`.venv/bin/python data/prepare.py` makes a sample, for DATA_PATH=data/datasets/sample_sp1024 "
                   "TOKENIZER_PATH=data/tokenizers/sample_1024_bpe.model")
def map_data_shard(path: Path | str, least: int = 0) -> np.ndarray:
    """The tokens of a shard, (tokens,) uint16, left on the disk until they are used: however large it is, opening it
    takes neither time nor memory (and while it is used it must not be rewritten). Raises InputError, naming the file,
    unless it is a header and then just as many little-endian uint16 tokens as that says, and at least `least`."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    require(header.size == SHARD_HEADER_INTS, f"{path}: shorter than a shard's header, {4 * SHARD_HEADER_INTS} bytes")
    magic, version, num_tokens = header[:3].tolist()
    require((magic, version) == (SHARD_MAGIC, SHARD_VERSION),
            f"{path}: magic {magic}, version {version} is no shard: {SHARD_MAGIC}, {SHARD_VERSION} is")
    size, expected = os.path.getsize(path), header.nbytes + 2 * num_tokens
    require(size == expected, f"{path}: has {size} bytes; with {num_tokens} tokens it must have {expected}")
    require(num_tokens >= least, f"{path}: has no tokens: fetch it again, or remove it")
    return np.memmap(path, "<u2", "r", header.nbytes, num_tokens).view(np.ndarray) if num_tokens else np.empty(0, "<u2")
def load_data_shard(path: Path | str) -> np.ndarray:
    """All tokens of a shard, (tokens,) int32. Raises InputError as map_data_shard does."""
    return map_data_shard(path).astype(np.int32)
def check_token_ids(tokens: np.ndarray, vocab_size: int, path: Path | str, start: int = 0) -> None:
    """Raise InputError for an id that has no embedding: MLX would look it up. `start`: the first token's position."""
    if tokens.size and tokens.max() >= vocab_size:
        position = int(np.argmax(tokens >= vocab_size))
        raise InputError(f"{path}: token {start + position} is {tokens[position]}, but VOCAB_SIZE={vocab_size}: "
                         "the shard is damaged, or was made with a larger tokenizer")
def find_shards(pattern: str) -> list[str]:
    """The files that match a glob pattern, sorted. Raises MissingFileError when there is none."""
    files = sorted(glob.glob(pattern))
    require(bool(files), f"no shards match {pattern}: set DATA_PATH, or make some: {HOW_TO_GET_DATA}", MissingFileError)
    return files
def check_shards(pattern: str, vocab_size: int) -> int:
    """A checksum of all shards' sizes and the first million tokens. InputError: no shard, an empty one, a wrong id."""
    files = find_shards(pattern)
    sizes, first = [len(map_data_shard(path, least=1)) for path in files], map_data_shard(files[0])[:1_000_000]
    check_token_ids(first, vocab_size, files[0])
    return zlib.crc32(f"{sizes}".encode(), zlib.crc32(first))

class TokenStream:
    """The tokens of all files of a pattern, in the order of their names, for ever. Attributes: `files`; `file_idx`,
    `tokens` and `pos`, the open file and its next token; `epoch`, from 1. A file is opened only when a token of it is
    wanted, and a new epoch logged. Raises InputError for no shard, an empty one, and ids not below vocab_size."""
    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "", vocab_size: int = 65_536):
        self.files = find_shards(pattern)
        self.log_fn, self.dataset_name, self.vocab_size = log_fn, dataset_name, vocab_size
        self.seek(file_idx=0, pos=0, epoch=1)
    def seek(self, file_idx: int, pos: int, epoch: int) -> None:
        """Open a file, and go on from its token `pos`."""
        self.file_idx, self.pos, self.epoch = file_idx, pos, epoch
        self.tokens = map_data_shard(self.files[file_idx], least=1)  # empty files would be searched for ever
    def take(self, n: int, read: bool = True) -> np.ndarray:
        """The next n tokens, (n,) int32, from as many files as it takes; or none, and only move on, without `read`."""
        parts = [np.empty(0, np.int32)]  # which makes the result int32
        while n > 0:
            if self.pos >= len(self.tokens):
                file_idx = (self.file_idx + 1) % len(self.files)
                if file_idx == 0 and self.log_fn is not None:
                    dataset = f"dataset:{self.dataset_name} train_shards:{len(self.files)}"
                    self.log_fn(f"WARNING: starting epoch:{self.epoch + 1} {dataset}")
                self.seek(file_idx, 0, self.epoch + (file_idx == 0))
            part = self.tokens[self.pos : self.pos + n]
            if read:
                check_token_ids(part, self.vocab_size, self.files[self.file_idx], self.pos)
                parts.append(part)
            self.pos += len(part)
            n -= len(part)
        return np.concatenate(parts)
class TokenLoader:
    """Cuts a TokenStream, its attribute `stream`, into batches for the model."""
    def __init__(self, pattern: str, log_fn: LogFn | None = None, dataset_name: str = "", vocab_size: int = 65_536):
        self.stream = TokenStream(pattern, log_fn, dataset_name, vocab_size)
    def next_batch(self, batch_tokens: int, seq_len: int) -> tuple[mx.array, mx.array]:
        """Inputs and targets, (batch_tokens // seq_len, seq_len) int32 each. InputError when that is no sequence.
        The stream gives one token more, the last target, so that batches do not overlap."""
        num_tokens = batch_tokens // seq_len * seq_len
        require(num_tokens > 0, f"a batch of {batch_tokens} tokens has no room for a sequence of {seq_len}")
        tokens = self.stream.take(num_tokens + 1)
        return mx.array(tokens[:-1].reshape(-1, seq_len)), mx.array(tokens[1:].reshape(-1, seq_len))
def load_validation_tokens(pattern: str, seq_len: int) -> np.ndarray:
    """All validation shards as one array, (k * seq_len + 1,) uint16, with k as large as it can be; a single one is
    mapped. Raises MissingFileError when no file matches, InputError when k is 0 or a file is empty or no shard."""
    shards = [map_data_shard(path, least=1) for path in find_shards(pattern)]
    tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
    num_seqs = (len(tokens) - 1) // seq_len
    require(num_seqs > 0, f"{pattern}: {len(tokens)} tokens are too few for a sequence of TRAIN_SEQ_LEN={seq_len}")
    return tokens[: num_seqs * seq_len + 1]

def validate_dataset_tokenizer_pair(data_path: str, tokenizer_path: str) -> tuple[str, int, int | None]:
    """Check the data set against the manifest.json two folders above it, where there is one that lists it.
    Returns (name of the data set, training shards present, training shards expected or None). Raises InputError for a
    tokenizer of another file name, more shards than the manifest counts, or a manifest that lacks what is needed."""
    dataset_dir = Path(os.path.abspath(data_path))
    name, present = dataset_dir.name, len(list(dataset_dir.glob("fineweb_train_*.bin")))
    manifest_path = dataset_dir.parent.parent / "manifest.json"
    def get(of: Any, key: str, kind: type, default: Any = None) -> Any:
        value = of.get(key, default) if isinstance(of, dict) else None
        require(isinstance(value, kind), f"{manifest_path}: mend or move it: no {kind.__name__} {key!r} in {of!s:.60}")
        return value
    try:
        manifest = json.loads(manifest_path.read_text("utf-8")) if manifest_path.is_file() else {"datasets": []}
    except ValueError as error:
        raise InputError(f"{manifest_path}: not valid JSON ({error})") from None
    entry = next((entry for entry in get(manifest, "datasets", list) if get(entry, "name", str) == name), None)
    if entry is None:
        return name, present, None
    made_by = get(entry, "tokenizer_name", str, default="")
    expected = get(get(entry, "stats", dict), "files_train", int) if "stats" in entry or not made_by else None
    listed = {get(item, "name", str): item for item in get(manifest, "tokenizers", list, default=[])}.get(made_by, {})
    made_with = Path(str(listed.get("model_path") or listed.get("path") or "")).name
    require(made_with in ("", Path(tokenizer_path).name),
            f"TOKENIZER_PATH={tokenizer_path}: {manifest_path} says that {name} was made with {made_with}")
    require(expected is None or present <= expected,
            f"DATA_PATH={data_path}: {present} training shards, but {manifest_path} counts {expected}")
    return name, present, expected

# 3. Bytes per token -------------------------------------------------------------------------------------------
# In: the tokenizer. Out: tables of the bytes of text that a token stands for, so that scores compare across tokenizers.
def load_tokenizer(path: str, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model in a .model file. Raises InputError for anything else, or one of another size."""
    require(str(path).endswith(".model"), f"TOKENIZER_PATH={path}: must be a SentencePiece model, ending in .model")
    require(Path(path).is_file(), f"TOKENIZER_PATH={path}: no such file: {HOW_TO_GET_DATA}", MissingFileError)
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except RuntimeError:
        raise InputError(f"TOKENIZER_PATH={path}: is not a SentencePiece model: {HOW_TO_GET_DATA}") from None
    has = tokenizer.vocab_size()
    require(has == vocab_size, f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has {has} pieces")
    return tokenizer
def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[np.ndarray, ...]:
    """Tables (max(tokenizer's size, vocab_size),): base bytes int16, has leading space bool, is boundary bool.
    The piece "\u2581the" has 3 base bytes and a leading space. That space is a byte of text unless the token before
    is a boundary, that is, stands for no text itself: begin of document, padding, ids beyond the tokenizer."""
    size = max(sp.vocab_size(), vocab_size)
    base_bytes, has_leading_space, is_boundary = np.zeros(size, np.int16), np.zeros(size, bool), np.ones(size, bool)
    for token_id in range(sp.vocab_size()):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        piece = sp.id_to_piece(token_id)
        has_leading_space[token_id] = piece.startswith("\u2581")
        base_bytes[token_id] = 1 if sp.is_byte(token_id) else len(piece.removeprefix("\u2581").encode())  # "<0x0A>": 1
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
def split_heads(dim: int, num_heads: int, num_kv_heads: int) -> int:
    """Width of one head. Raises InputError for dimensions that do not divide."""
    require(dim % num_heads == 0, f"MODEL_DIM={dim} must be a multiple of NUM_HEADS={num_heads}")
    require(num_heads % num_kv_heads == 0, f"NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}")
    require(dim // num_heads % 2 == 0, f"MODEL_DIM={dim} / NUM_HEADS={num_heads} must be even: RoPE turns pairs")
    return dim // num_heads
@mx.custom_function
def exp_below(x: mx.array, top: mx.array) -> mx.array:
    """e**(x - top), no gradient for top. On Linux CPUs exp takes 25 ns an element, power 9, its own gradient more."""
    return mx.power(mx.array(math.e, dtype=x.dtype), x - top)
exp_below.vjp(lambda primals, cotangent, output: (cotangent * output, mx.zeros_like(primals[1])))
def softmax_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal") for a Linux CPU, where the products
    take less time than the rest. So the softmax's sums divide the results, which are fewer than the weights."""
    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    q = (q * scale).reshape(batch, kv_heads, -1, head_dim)  # heads that share keys are rows of one product
    scores = (q @ k.swapaxes(-1, -2)).reshape(batch, heads, rows, keys).astype(mx.float32)
    scores = mx.where(mx.arange(keys - rows, keys)[:, None] >= mx.arange(keys), scores, -mx.inf)
    weights = exp_below(scores, mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True)))
    y = (weights.astype(v.dtype).reshape(batch, kv_heads, -1, keys) @ v).reshape(batch, heads, rows, head_dim)
    return (y / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
QUERY_BLOCK = 128  # 64 and 256 are as fast, or slower by up to a twentieth, at 1,024 tokens on 2 Linux cores
def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, training: bool) -> mx.array:
    """Attention of each query to the keys up to its own: (batch, heads, seq, head_dim); fewer heads in k and v.
    By its source, MLX's stores no scores at usual widths for 16-bit floats on CUDA and, without gradients, on Metal.
    Otherwise queries come in blocks, each with the keys it may see: none is made to be masked (1.4 times as fast)."""
    attend, where = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask="causal"), backend()
    if (where == "cuda" and q.dtype != mx.float32) or (where == "metal" and not training):
        return attend(q, k, v)
    if where == "cpu" and sys.platform == "linux":
        attend = partial(softmax_attention, scale=scale)
    ends = range(QUERY_BLOCK, q.shape[2] + QUERY_BLOCK, QUERY_BLOCK)  # the last may be beyond seq
    return mx.concatenate(
        [attend(q[:, :, end - QUERY_BLOCK : end], k[:, :, :end], v[:, :, :end]) for end in ends], axis=2)

class CausalSelfAttention(nn.Module):
    """Causal attention; grouped key/value heads (arXiv:2305.13245), rotary positions (arXiv:2104.09864). Queries and
    keys are normalised, so that scores cannot grow with the weights (arXiv:2010.04245); q_gain sharpens each head."""
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = split_heads(dim, num_heads, num_kv_heads)
        kv_dim = num_kv_heads * self.head_dim
        self.c_q, self.c_k = CastedLinear(dim, dim), CastedLinear(dim, kv_dim)
        self.c_v, self.proj = CastedLinear(dim, kv_dim), CastedLinear(dim, dim)
        self.q_gain = mx.full((num_heads,), qk_gain_init, dtype=mx.float32)
        self.rope = nn.RoPE(self.head_dim, traditional=False, base=rope_base)
        self.scale = self.head_dim**-0.5
    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        batch, seq, dim = x.shape
        q, k, v = (project(x).reshape(batch, seq, -1, self.head_dim).swapaxes(1, 2)  # (batch, heads, seq, head_dim)
                   for project in (self.c_q, self.c_k, self.c_v))
        q, k = (self.rope(rms_norm(y).astype(COMPUTE_DTYPE)) for y in (q, k))
        q = q * self.q_gain.astype(q.dtype)[None, :, None, None]
        y = causal_attention(q, k, v, self.scale, self.training)
        return self.proj(y.swapaxes(1, 2).reshape(batch, seq, dim))
@mx.custom_function
def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0)**2 (arXiv:2109.08668). Its gradient needs x alone; MLX's own also keeps relu(x): 5% more memory."""
    return mx.square(nn.relu(x))
relu_squared.vjp(lambda x, cotangent, output: 2 * nn.relu(x) * cotangent)
class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""
    def __init__(self, dim: int, mlp_mult: int) -> None:
        super().__init__()
        self.fc, self.proj = CastedLinear(dim, dim * mlp_mult), CastedLinear(dim * mlp_mult, dim)
    def __call__(self, x: mx.array) -> mx.array:
        """(batch, seq, dim) -> (batch, seq, dim)"""
        return self.proj(relu_squared(self.fc(x)))
class Block(nn.Module):
    """One transformer block: mix in the embedding, then attention, then the MLP, each with a learned scale.
    `resid_mix` (2, dim) lets every block look again at x0, the normalised embedding; it begins as "x alone"."""
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float,
                 qk_gain_init: float) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNormNoWeight(), RMSNormNoWeight()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale, self.mlp_scale = mx.ones((dim,)), mx.ones((dim,))
        self.resid_mix = mx.stack([mx.ones((dim,)), mx.zeros((dim,))])
    def __call__(self, x: mx.array, x0: mx.array) -> mx.array:
        """x and x0 are (batch, seq, dim); so is the result."""
        mix = self.resid_mix.astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.astype(x.dtype) * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.astype(x.dtype) * self.mlp(self.mlp_norm(x))

class GPT(nn.Module):
    """The language model: calling it gives hidden states, `loss` the training objective. The first num_layers // 2
    blocks, the encoder, push their outputs on a stack; each later one first adds what it pops, if anything, times a
    learned vector (U-Net, arXiv:1505.04597). The embedding also predicts the next token (arXiv:1608.05859). Matrices
    that write to the residual stream begin at zero: untrained, the loss is the embedding's, about log(vocab_size)."""
    def __init__(self, vocab_size: int, num_layers: int, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int,
                 logit_chunk_tokens: int, logit_softcap: float, rope_base: float, tied_embed_init_std: float,
                 qk_gain_init: float) -> None:
        super().__init__()
        require(logit_softcap > 0.0, f"LOGIT_SOFTCAP={logit_softcap} must be above 0")
        self.logit_chunk_tokens, self.logit_softcap = logit_chunk_tokens, logit_softcap
        self.num_encoder_layers, self.num_decoder_layers = num_layers // 2, num_layers - num_layers // 2
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        # One seed gives one model, bit for bit: hence nn.Embedding's draw, which is replaced at the end.
        self.tok_emb = nn.Embedding(vocab_size, dim)
        block_args = (dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
        self.blocks = [Block(*block_args) for _ in range(num_layers)]
        self.skip_weights = mx.ones((self.num_skip_weights, dim), dtype=mx.float32)
        self.final_norm = RMSNormNoWeight()
        for block in self.blocks:
            block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
            block.mlp.proj.weight = mx.zeros_like(block.mlp.proj.weight)
        self.tok_emb.weight = (mx.random.normal((vocab_size, dim)) * tied_embed_init_std).astype(COMPUTE_DTYPE)
    def __call__(self, input_ids: mx.array) -> mx.array:
        """Token ids (batch, seq) -> normalised hidden states (batch, seq, dim) in COMPUTE_DTYPE."""
        x = x0 = rms_norm(self.tok_emb(input_ids).astype(COMPUTE_DTYPE))
        skips = []
        for block in self.blocks[: self.num_encoder_layers]:
            skips.append(x := block(x, x0))
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
        num_tokens, total = targets.size, mx.array(0.0)
        chunk = self.logit_chunk_tokens if self.logit_chunk_tokens > 0 else num_tokens
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
    """About the semi-orthogonal matrix nearest to g, (rows, cols) or a stack of them, (matrices, rows, cols): every
    singular value is moved close to 1. Newton-Schulz iteration by a quintic whose coefficients trade accuracy for a
    steep start, in float32; returns g's dtype (Keller Jordan, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.astype(mx.float32)
    x = x / (mx.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    transposed = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-2, -1) if transposed else x  # x @ x.T is smallest with the short side first
    for _ in range(steps):
        gram = x @ x.swapaxes(-2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.swapaxes(-2, -1) if transposed else x).astype(g.dtype)
class Muon:
    """Momentum with orthogonalised updates, so that all directions of a matrix learn at one rate."""
    def __init__(self, keys: list[str], params: FlatParams, args: Hyperparameters) -> None:
        self.keys, self.args = keys, args
        self.buffers = {key: mx.zeros_like(params[key]) for key in keys}
    def step(self, params: FlatParams, grads: FlatParams, step: int | mx.array, lr_mul: float | mx.array) -> FlatParams:
        """New values of this optimizer's keys; `step` counts from 0."""
        args, nesterov, alike, updated = self.args, {}, {}, {}
        warm = mx.minimum(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        momentum = mx.array((1.0 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum)
        for key in self.keys:
            grad, decay = grads[key], momentum.astype(grads[key].dtype)
            self.buffers[key] = decay * self.buffers[key] + grad
            nesterov[key] = grad + decay * self.buffers[key]
            # It takes a stack of matrices to fill a GPU, but only one a CPU, where stacking costs a tenth of the time.
            alike.setdefault(key if backend() == "cpu" else params[key].shape, []).append(key)
        for keys in alike.values():
            stack = mx.stack([nesterov[key] for key in keys])
            updates = zeropower_newtonschulz5(stack, args.muon_backend_steps)
            # All singular values being 1, a tall matrix's update is small beside its many rows: make up for that.
            rate = args.matrix_lr * lr_mul * math.sqrt(max(1.0, stack.shape[1] / stack.shape[2]))
            for param, key, update in zip([params[key] for key in keys], keys, updates, strict=True):
                updated[key] = param - (rate * update.astype(param.dtype)).astype(param.dtype)
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
        require(not unowned, f"no optimizer trains {', '.join(unowned)}: give each a place in SplitOptimizers")
        self.muon = Muon(self.matrix_keys, params, args)
        adam = partial(optim.Adam, betas=[args.beta1, args.beta2], eps=args.adam_eps, bias_correction=True)
        self.adam_embed, self.adam_scalar = adam(args.tied_embed_lr), adam(args.scalar_lr)
        self.adam_embed.init({self.embed_key: params[self.embed_key]})
        self.adam_scalar.init({key: params[key] for key in self.scalar_keys})
    @cached_property
    def compiled_update(self) -> Callable[..., FlatParams]:
        """update, compiled at the first step; from then on the dicts of state may change, but not be replaced."""
        state = [self.muon.buffers, self.adam_embed.state, self.adam_scalar.state]
        return mx.compile(self.update, inputs=state, outputs=state)
    def update(self, params: FlatParams, grads: FlatParams, step: mx.array, lr_mul: mx.array, _: Any = 0) -> FlatParams:
        """New values of all parameters. Traced, so no Python `if` or `min` on step and lr_mul, which are arrays; traced
        anew when the last argument changes, which is the text of all settings."""
        updated = self.muon.step(params, grads, step, lr_mul)
        for adam, learning_rate, keys in ((self.adam_embed, self.args.tied_embed_lr, [self.embed_key]),
                                          (self.adam_scalar, self.args.scalar_lr, self.scalar_keys)):
            adam.learning_rate = learning_rate * lr_mul
            updated |= adam.apply_gradients({key: grads[key] for key in keys}, {key: params[key] for key in keys})
        return updated
    def step(self, model: GPT, grads_tree: dict, step: int, lr_mul: float) -> None:
        """Update the model; `step` counts from 0. MLX is lazy: the work is done when the parameters are evaluated."""
        params, grads = dict(tree_flatten(model.parameters())), dict(tree_flatten(grads_tree))
        updated = self.compiled_update(params, grads, mx.array(step), mx.array(lr_mul), str(vars(self.args)))
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

# 6. Several processes -----------------------------------------------------------------------------------------
# In: what one process has. Out: what all have. MLX's launcher starts several, the ranks, on one machine or more, which
# share the batches. One process is a world of one, for which all this does nothing: skip it, and each `world` below.
class World:
    """The processes of a run, of which this is number `rank` of `size`. All must call its methods in the same order."""
    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.waiting = rank, size, False
        self.stream = mx.new_stream(mx.cpu) if size > 1 and backend() == "cpu" else None  # to send while computing
        if size > 1:
            threading.Thread(target=self.watch, daemon=True).start()
    @classmethod
    def join(cls) -> "World":
        """The world that MLX's launcher made. Raises InputError if its processes cannot connect or MLX is too old."""
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            hosts = Path(os.environ.get("MLX_HOSTFILE", ""))
            require(hosts.is_file() and not hosts.read_text().strip(), f"the processes cannot connect: {error}")
            return cls()  # `mlx.launch -n 1` lists none, and MLX takes that for a mistake
        recent = [int(number) for number in re.findall("[0-9]+", mx.__version__)[:3]] >= [0, 32, 1]
        require(group.size() == 1 or recent, f"MLX {mx.__version__} is too old for several processes: 0.32.1 is needed")
        return cls(group.rank(), group.size())
    def wait(self, *arrays: Any) -> None:
        """Evaluate what other ranks have a part in; RuntimeError if one is gone, which np.array() would not raise."""
        self.waiting = True
        mx.eval(*arrays)
        self.waiting = False
    def watch(self) -> None:
        """End a process that has waited ten seconds for a neighbour that is gone: MLX mostly raises, but not always."""
        connections = select.poll()
        for fd in filter(lambda fd: Path(f"/dev/fd/{fd}").is_socket(), range(3, 256)):
            connections.register(fd, select.POLLHUP | getattr(select, "POLLRDHUP", 0))  # which is Linux's name for it
        before = {fd for fd, _ in connections.poll(0)}  # MLX leaves open its attempts to connect that failed
        seconds = 0
        while seconds < 10:
            time.sleep(1.0)
            gone = {fd for fd, event in connections.poll(0) if event != select.POLLNVAL} - before
            seconds = seconds + 1 if gone and self.waiting else 0
        tell(f"error: rank {self.rank}: another process of the run is gone, so it ends here, too", sys.stderr)
        os._exit(1)
    def gather(self, value: Any) -> list[Any]:
        """The values that the ranks gave, in their order: anything that is at most 64 KiB of JSON."""
        if self.size == 1:
            return [value]
        row = mx.array(np.frombuffer(json.dumps(value).encode().ljust(65_536), np.uint8))
        self.wait(rows := mx.distributed.all_gather(row, stream=self.stream))
        return [json.loads(bytes(row)) for row in np.array(rows).reshape(self.size, -1)]
    def from_first(self, read: Callable[[], bytes]) -> bytes:
        """What `read` returns on rank 0, which alone calls it."""
        content = read() if self.rank == 0 else b""
        if self.size > 1:
            own = mx.array(np.frombuffer(content.ljust(self.gather(len(content))[0], b"\0"), np.uint8))
            self.wait(shared := mx.distributed.all_sum(own, stream=self.stream))
            content = bytes(np.array(shared))
        return content
    def mean(self, loss: mx.array, grads: FlatParams) -> tuple[mx.array, FlatParams]:
        """Mean loss and gradients over the ranks, in few large float32 messages; the last layers, ready first, lead."""
        if self.size == 1:
            return loss, grads
        keys = list(reversed(grads))
        with mx.stream(mx.cpu):  # macOS may end work on the GPU that waits for seconds, as for a slower rank
            loss, *means = nn.average_gradients([loss, *(grads[key].astype(mx.float32) for key in keys)],
                                                communication_stream=self.stream)
        self.wait(means, loss)
        return loss, {key: mean.astype(grads[key].dtype) for key, mean in zip(keys, means, strict=True)}
    def require_same(self, model: GPT, step: int) -> None:
        """Raise RunError, naming the ranks that drifted, unless the parameters are the same bits on all."""
        params = tree_flatten(model.parameters()) if self.size > 1 else []
        crcs = self.gather(zlib.crc32(b"".join(np.array(param.astype(mx.float32)).tobytes() for _, param in params)))
        drifted = ", ".join(f"rank {rank}" for rank, crc in enumerate(crcs) if crc != max(crcs, key=crcs.count))
        require(not drifted, f"{drifted} drifted: after step {step} its parameters are not the others'", RunError)
ALONE = World()

# 7. Batches within a step -------------------------------------------------------------------------------------
# In: the loader. Out: mean loss and gradients of an optimizer step; one chunk's activations are in memory at a time.
Loss = Callable[[mx.array, mx.array], mx.array]
LossAndGrad = Callable[[mx.array, mx.array], tuple[mx.array, dict]]
def token_chunks(total_tokens: int, seq_len: int, max_chunk_tokens: int) -> list[int]:
    """Sizes in tokens of the chunks that total_tokens is computed in; what fills no sequence is left out.
    Each is whole sequences, at most max_chunk_tokens, but at least one. Raises InputError when there is none."""
    total_seqs, chunk_seqs = total_tokens // seq_len, max(max_chunk_tokens // seq_len, 1)
    require(total_seqs > 0, f"a microbatch of {total_tokens} tokens has no sequence of TRAIN_SEQ_LEN={seq_len}")
    return [min(chunk_seqs, total_seqs - done) * seq_len for done in range(0, total_seqs, chunk_seqs)]
@mx.compile
def add_scaled(accum: FlatParams, grads: FlatParams, scale: mx.array) -> FlatParams:
    """accum + scale * grads, in one pass, and in accum's own memory if nothing else needs that."""
    return {key: (total + grads[key] * scale).astype(total.dtype) for key, total in accum.items()}
def accumulate_flat_grads(accum: FlatParams | None, grads_tree: dict, scale: float) -> FlatParams:
    """accum + scale * grads, in accum itself, a flat dict; None starts one."""
    accum, grads = {} if accum is None else accum, dict(tree_flatten(grads_tree))
    begun = {key: accum[key] for key in grads if key in accum}
    accum |= {key: grad * scale for key, grad in grads.items() if key not in begun}
    accum |= add_scaled(begun, grads, mx.array(scale)) if begun else {}
    return accum
def loss_and_grad_chunked(args: Hyperparameters, train_loader: TokenLoader, compiled_loss_and_grad: LossAndGrad,
                          microbatches: int = 1, world: World = ALONE) -> tuple[mx.array, dict]:
    """Mean loss (scalar, nats) and gradients (a tree) of the loader's next microbatches; others' are skipped."""
    sizes = token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    loss, accum, own_last = mx.array(0.0), None, len(sizes) * (microbatches - world.size + world.rank + 1) - 1
    for i, size in enumerate(sizes * microbatches):
        if i // len(sizes) % world.size != world.rank:
            train_loader.stream.take(size + 1, read=False)
            continue
        chunk_loss, grads = compiled_loss_and_grad(*train_loader.next_batch(size, args.train_seq_len))
        share, previous = size / sum(sizes) / (microbatches // world.size), loss
        loss, accum = loss + chunk_loss.astype(mx.float32) * share, accumulate_flat_grads(accum, grads, share)
        del chunk_loss, grads  # or else their memory would be held on to
        if args.mlx_eager_eval:  # or else the lazy graph would hold every chunk's activations
            mx.eval(previous)  # a chunk is prepared while the last one runs, and begins when that has ended
            mx.async_eval(*[loss, accum] if i < own_last or world.size == 1 else [])  # that one with the messages
    loss, accum = world.mean(loss, accum)
    return loss, tree_unflatten(list(accum.items()))

# 8. Evaluation ------------------------------------------------------------------------------------------------
# In: a loss function and the validation tokens. Out: val_loss, nats per token, and the score: val_bpb, bits per byte.
def microbatch_seqs(variable: str, tokens: int, args: Hyperparameters) -> int:
    """Whole sequences in one of GRAD_ACCUM_STEPS parts of `variable` tokens. Raises InputError when there is none."""
    part, steps, seq_len = tokens // args.grad_accum_steps, args.grad_accum_steps, args.train_seq_len
    require(part >= seq_len, f"{variable}={tokens} over GRAD_ACCUM_STEPS={steps} is {part} tokens: "
                             f"must be at least TRAIN_SEQ_LEN={seq_len}")
    return part // seq_len

def eval_val(args: Hyperparameters, compiled_loss: Loss, val_tokens: np.ndarray, base_bytes_lut: np.ndarray,
             has_leading_space_lut: np.ndarray, is_boundary_token_lut: np.ndarray,
             log_fn: LogFn | None = None, world: World = ALONE) -> tuple[float, float]:
    """Score all of val_tokens, (k * seq_len + 1,): (val_loss in nats per token, val_bpb in bits per byte).
    compiled_loss(x, y) is the mean loss of a batch (seqs, seq_len); the tables are of section 3; ranks take turns.
    Raises InputError when a batch has no room for one sequence, or the tokens stand for no text."""
    seq_len, batch_seqs = args.train_seq_len, microbatch_seqs("VAL_BATCH_SIZE", args.val_batch_size, args)
    total_seqs = (len(val_tokens) - 1) // seq_len
    num_batches = math.ceil(total_seqs / batch_seqs)
    loss_sum, num_bytes, num_tokens = 0.0, 0, total_seqs * seq_len
    for i in range(world.rank, num_batches, world.size):
        first, last = i * batch_seqs, min((i + 1) * batch_seqs, total_seqs)
        tokens = val_tokens[first * seq_len : last * seq_len + 1].astype(np.int32)
        previous, target = tokens[:-1], tokens[1:]
        loss = compiled_loss(mx.array(previous.reshape(-1, seq_len)), mx.array(target.reshape(-1, seq_len)))
        mx.async_eval(loss)  # and count its bytes meanwhile
        spaces = has_leading_space_lut[target] & ~is_boundary_token_lut[previous]
        num_bytes += int(base_bytes_lut[target].sum(dtype=np.int64)) + int(spaces.sum())
        loss_sum += float(loss) * target.size  # float() waits, so that one batch at a time is in memory
        for done in range(i + 1, min(i + world.size, num_batches) + 1):
            if log_fn is not None and num_batches > 1 and (done in (1, num_batches) or done % 25 == 0):
                log_fn(f"val_progress:{done}/{num_batches}")
    loss_sum, num_bytes = map(sum, zip(*world.gather((loss_sum, num_bytes)), strict=True))
    require(num_bytes > 0, f"the {num_tokens} validation tokens stand for no bytes of text, so there is no score")
    val_loss = loss_sum / num_tokens
    return val_loss, val_loss / math.log(2.0) * (num_tokens / num_bytes)

# 9. Compression -----------------------------------------------------------------------------------------------
# In: the model's flat state. Out: NumPy arrays, int8 where they are large, in a format shared with others, and back.
QUANT_FORMAT = "int8_clean_per_row_v1"
INT8_KEEP_FLOAT_MAX_NUMEL = 65_536  # tensors of at most so many elements stay floating
INT8_KEEP_FLOAT_STORE_DTYPE = np.float16
INT8_PER_ROW_SCALE_DTYPE = np.float16
INT8_CLIP_PERCENTILE = 99.99984  # of the magnitudes: a few outliers must not coarsen all the others
INT8_CLIP_Q = INT8_CLIP_PERCENTILE / 100.0
def keep_float_array(name: str, arr: mx.array, passthrough_orig_dtypes: dict[str, str]) -> np.ndarray:
    """A small floating array as it is stored: a control tensor float32, others float16, with their dtype noted."""
    if any(pattern in name for pattern in INT8_KEEP_FLOAT_FP32_NAME_PATTERNS):
        return np.array(arr.astype(mx.float32))
    if arr.dtype in (mx.float32, mx.bfloat16):
        passthrough_orig_dtypes[name] = str(arr.dtype).removeprefix("mlx.core.")
        return np.array(arr.astype(mx.float32)).astype(INT8_KEEP_FLOAT_STORE_DTYPE)
    return np.array(arr)
def quantize_float_array(arr: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """(int8 array, scale): whole multiples of a float16 scale per row, (rows,), of a matrix, else of one float32, ().
    The rows' floor of 1/127, coarse for small weights, and rounding by the scale in float32 are part of the format."""
    w = np.array(arr.astype(mx.float32))  # NumPy has no bfloat16
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
    return np.clip(np.round(np.clip(w, -clip, clip) / scale), -127, 127).astype(np.int8), stored
def quantize_state_dict_int8(flat_state: FlatParams) -> tuple[dict[str, Any], dict[str, int]]:
    """(object of NumPy arrays to pickle, statistics): large floating tensors in int8, the rest passed through.
    Small tensors cost few bytes and suffer most, so they stay floating; what is no float is kept as it is."""
    obj: dict[str, Any] = {"__quant_format__": QUANT_FORMAT}
    obj |= {part: {} for part in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")}
    nonfloat = [name for name, arr in flat_state.items() if not mx.issubdtype(arr.dtype, mx.floating)]
    for name, arr in flat_state.items():
        if name in nonfloat:
            obj["passthrough"][name] = np.array(arr)
        elif arr.size <= INT8_KEEP_FLOAT_MAX_NUMEL:
            obj["passthrough"][name] = keep_float_array(name, arr, obj["passthrough_orig_dtypes"])
        else:
            obj["quantized"][name], obj["scales"][name] = quantize_float_array(arr)
            obj["dtypes"][name] = str(arr.dtype).removeprefix("mlx.core.")
            if arr.ndim == 2:
                obj["qmeta"][name] = {"scheme": "per_row", "axis": 0}
    stats = {"param_count": sum(arr.size for arr in flat_state.values()), "num_tensors": len(flat_state),
             "num_float_tensors": len(obj["quantized"]), "num_nonfloat_tensors": len(nonfloat),
             "baseline_tensor_bytes": sum(arr.nbytes for arr in flat_state.values()), "int8_payload_bytes": sum(
                 arr.nbytes for part in ("quantized", "scales", "passthrough") for arr in obj[part].values())}
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

def unpickle(data: bytes) -> Any:
    """The object in a pickle of plain containers and NumPy arrays; InputError, by name, for anything else. A pickle
    calls what it names, so a stranger's could run their code, and NumPy's own way back trusts the file with sizes and
    flags. Here a name leads to a note of the call, and from the notes arrays are made."""
    class Note(list):  # the name, its arguments, and then the state that the result is given
        __setstate__ = list.append
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            known = r"numpy\.(dtype|ndarray|_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer))"
            require(re.fullmatch(known, f"{module}.{name}") is not None,  # core was NumPy 1's, _core is NumPy 2's
                    f"it would run {module}.{name}: only NumPy arrays and plain containers are let in")
            return lambda *arguments: Note([name, *arguments])
    made: dict[int, Any] = {}  # by id, so that what a file has many times over is made once
    def plain(node: Any) -> Any:
        if isinstance(node, dict) and id(node) not in made:
            made[id(node)] = {key: plain(value) for key, value in node.items()}
        if not isinstance(node, Note):
            return made.get(id(node), node)
        if node[0] == "_reconstruct":  # (ndarray, (0,), b"b"), with the state (1, shape, dtype, is_fortran, bytes)
            _, shape, dtype, order, buffer = node[-1]
        else:  # scalar(dtype, buffer) or _frombuffer(buffer, dtype, shape, order)
            buffer, dtype, shape, order = (*node[:0:-1], (), "C") if node[0] == "scalar" else node[1:]
        code = dtype[-1][1] + dtype[1]  # dtype("f4", False, True), with the state (3, "<", ...)
        require(re.fullmatch("[<>|]([iu][1248]|f[248]|b1)", code) is not None, f"it has an array of dtype {code!r}")
        return np.frombuffer(buffer, code).reshape(shape, order="F" if order in (True, "F") else "C")
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):  # runs nothing, and finds what is cut off
        require(count < 1_000_000 and (not opcode.name.endswith("PUT") or argument <= count), "it is a pickle bomb")
    return plain(Unpickler(io.BytesIO(data)).load())
def check_arrays(found: dict[str, Any], expected: FlatParams) -> None:
    """Raise InputError unless both have the same names and shapes, and the one has floats where the other has."""
    there, wanted = ({name: re.sub("b?float(16|32)", "floating", f"{array.dtype} {tuple(array.shape)}")
                      for name, array in arrays.items()} for arrays in (found, expected))
    wrong = [f"{name} is {there.get(name, 'absent')} and must be {wanted.get(name, 'absent')}"
             for name in wanted | there if there.get(name) != wanted.get(name)]
    require(not wrong, "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if wrong[3:] else ""))

def load_flat_state(path: Path, params: FlatParams, world: World = ALONE) -> FlatParams:
    """The weights in a .npz or .int8.ptz file, whoever made it, for a model with these parameters; in the file's own
    dtypes. Rank 0 reads it. Raises InputError, naming the file, if it is damaged, foreign, or of another model."""
    limit = 65_536 + sum(8 * param.size + 1024 for param in params.values())  # bytes; even float64 would fit
    too_large = f"it holds more than {limit} bytes, and no model of these settings does"
    try:
        content = world.from_first(lambda: path.open("rb").read(limit + 1))
        require(len(content) <= limit, too_large)
        if path.suffix == ".npz":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                require(sum(entry.file_size for entry in archive.infolist()) <= limit, too_large)
                require(archive.testzip() is None, "it is damaged")
            state = mx.load(io.BytesIO(content), format="npz")
        else:
            decompressor = zlib.decompressobj()
            raw = decompressor.decompress(content, limit + 1)
            require(len(raw) <= limit, too_large)
            require(decompressor.eof, "it is cut off")
            obj = unpickle(raw)
            require(obj.get("__quant_format__") == QUANT_FORMAT, f"its format tag is not {QUANT_FORMAT!r}")
            arrays = [*obj["quantized"].values(), *obj["passthrough"].values()]
            require(sum(array.size for array in arrays) <= limit, too_large)  # the same one may be there many times
            for name, q in obj["quantized"].items():
                require(q.dtype == np.int8 and obj["scales"][name].shape in ((), q.shape[:1]),
                        f"{name} is not an int8 array with a scale for each row or one for all")
            state = dequantize_state_dict_int8(obj)
        check_arrays(state, params)
        mx.eval(state)  # MLX reads when it needs to
        return state
    except (() if world.waiting else Exception) as error:  # noqa: B030 (whatever a damaged file makes of its readers)
        reason = str(error) if isinstance(error, InputError) else getattr(error, "strerror", None) or repr(error)
        raise InputError(f"{path}: is no model that can be scored: {ascii(reason)[1:-1]:.2000}") from None

# 10. The run --------------------------------------------------------------------------------------------------
# In: the settings. Out: a log, the weights (.npz), the compressed model (.int8.ptz), its score. It alone writes files.
CODE_PATH = Path(__file__)
SUFFIXES = ".txt", "_checkpoint.safetensors", "_mlx_model.npz", "_mlx_model.int8.ptz"  # of a run's files
LOG_SUFFIX, CHECKPOINT_SUFFIX, NPZ_SUFFIX, ARTIFACT_SUFFIX = SUFFIXES
CHECKPOINT_FORMAT = "parameter_golf_mlx_checkpoint_v1"
SUBMISSION_CAP_BYTES = 16_000_000  # for this file and the compressed model together
# What may differ when a run is resumed. Data and tokenizer may have moved: their checksums are compared.
RESUMABLE = {"data_path", "tokenizer_path", "run_id", "out_dir", "resume", "eval_artifact", "iterations",
             "warmup_steps", "max_wallclock_seconds", "checkpoint_every", "val_loss_every", "val_max_tokens",
             "train_log_every", "val_batch_size", "logit_chunk_tokens", "mlx_eager_eval"}  # last three: other digits
@dataclass
class Inputs:
    """What a run reads before it starts."""
    dataset_name: str
    train_shards: int
    expected_train_shards: int | None
    val_tokens: np.ndarray  # (k * seq_len + 1,) uint16, those to be scored
    byte_tables: tuple[np.ndarray, ...]
    num_val_tokens: int = 0  # that VAL_MAX_TOKENS chose from
    data_checksum: int = 0
@dataclass
class Run:
    """What the stages of a run share, and how far it has come."""
    args: Hyperparameters
    inputs: Inputs
    model: GPT
    optimizers: SplitOptimizers
    compiled_loss: Loss
    compiled_loss_and_grad: LossAndGrad
    world: World = ALONE
    log: LogFn = lambda line, console=True: None  # which rank 0 alone replaces
    step: int = 0
    train_ms: float = 0.0
    position: tuple[int, int, int] = (0, 0, 1)  # of the loader: file, offset, epoch
    checkpointed_step: int = 0
    saved: tuple[Path, ...] = ()  # what there is of this run, but for the log
    signal: str = ""  # the first that came
    answered: bool = False  # training ended for it, and a score is being made
    def path(self, suffix: str) -> Path:
        """A file of this run."""
        return Path(self.args.out_dir, self.args.run_id + suffix)
    def is_trained(self) -> bool:
        """Whether ITERATIONS or the wallclock cap is reached."""
        return self.step >= self.args.iterations or 0.0 < 1000.0 * self.args.max_wallclock_seconds <= self.train_ms
    def safe_point(self, stage: str) -> None:
        """Raise KeyboardInterrupt if a signal has come that training did not end for."""
        message = f"interrupted by {self.signal} during {stage}: no score; saved: "  # main() says what
        require(not self.signal or self.answered, message, KeyboardInterrupt)
def path_problems(args: Hyperparameters, world: World = ALONE) -> Iterator[str]:
    """What is wrong with names and paths."""
    run_id, out_dir = args.run_id, Path(os.path.abspath(args.out_dir))
    if "/" in run_id or run_id in ("", ".", "..") or not run_id.isprintable() or len(run_id.encode()) > 200:
        yield f"RUN_ID={run_id!r:.250}: must be printable, without a slash, and of at most 200 bytes"
    if args.resume == "auto" and "RUN_ID" not in os.environ:
        yield "RESUME=auto: set RUN_ID, to say whose checkpoint is meant"
    if args.resume and args.eval_artifact:
        yield "RESUME trains and EVAL_ARTIFACT does not: set only one of them"
    for variable, path in (("RESUME", args.resume), ("EVAL_ARTIFACT", args.eval_artifact)):
        if world.rank == 0 and path not in ("", "auto") and not Path(path).is_file():
            yield f"{variable}={path}: no such file"
    there = next(path for path in (out_dir, *out_dir.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"OUT_DIR={args.out_dir}: cannot be written to: {there} is not a folder, or is read-only"
    if not Path(args.data_path).is_dir():
        yield f"DATA_PATH={args.data_path}: no such folder: {HOW_TO_GET_DATA}"

def read_inputs(args: Hyperparameters, world: World = ALONE) -> Inputs:
    """Check settings, data and tokenizer, and read what validation needs; nothing is written yet. Raises InputError
    (NotImplementedError for untied embeddings), with a line for each thing that is wrong."""
    errors: dict[str, Exception] = {}
    def examine(check: Callable, *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except (InputError, NotImplementedError) as error:
            errors[str(error)] = error
        except OSError as error:
            errors[str(error)] = InputError(f"{error.filename}: {error.strerror}")
        except Exception:
            require(bool(errors), f"{check} failed", RuntimeError)  # unless a value told of already made it fail
    for setting in (settings_of(Hyperparameters) | settings_of(type(args))).values():
        examine(setting.check, args)
    examine(lambda: require(ModuleSettings.compute_dtype in ("auto", "bfloat16", "float32"),
                            f"COMPUTE_DTYPE={ModuleSettings.compute_dtype!r}: must be auto, bfloat16 or float32"))
    examine(lambda: ModuleSettings.mlx_preload_blas)
    examine(lambda: errors.update((message, InputError(message)) for message in path_problems(args, world)))
    examine(lambda: require(args.grad_accum_steps % world.size == 0, f"GRAD_ACCUM_STEPS={args.grad_accum_steps}: must "
                            f"be divisible by the world size, for the {world.size} processes share its microbatches"))
    examine(lambda: require(args.tie_embeddings, "TIE_EMBEDDINGS=0: is not implemented", NotImplementedError))
    examine(lambda: split_heads(args.model_dim, args.num_heads, args.num_kv_heads))
    examine(lambda: microbatch_seqs("TRAIN_BATCH_TOKENS", args.train_batch_tokens, args))
    examine(lambda: microbatch_seqs("VAL_BATCH_SIZE", args.val_batch_size, args))
    examine(lambda: require(not 0 < args.val_max_tokens < args.train_seq_len,
                            f"VAL_MAX_TOKENS={args.val_max_tokens}: must be 0 or at least TRAIN_SEQ_LEN"))
    tokenizer = examine(lambda: load_tokenizer(args.tokenizer_path, args.vocab_size))
    if Path(str(args.data_path)).is_dir():
        dataset = examine(validate_dataset_tokenizer_pair, args.data_path, args.tokenizer_path)
        val_tokens = examine(lambda: load_validation_tokens(args.val_files, args.train_seq_len))
        checksums = [examine(lambda p=p: check_shards(p, args.vocab_size)) for p in (args.val_files, args.train_files)
                     if p == args.val_files or not args.eval_artifact]
    text = "\n".join(errors).replace(HOW_TO_GET_DATA, "see below", "".join(errors).count(HOW_TO_GET_DATA) - 1)
    if errors:
        raise next(iter(errors.values())) if len(errors) == 1 else InputError(text)
    scored = args.val_max_tokens // args.train_seq_len * args.train_seq_len + 1 if args.val_max_tokens else None
    return Inputs(*dataset, val_tokens[:scored], build_sentencepiece_luts(tokenizer, args.vocab_size),
                  len(val_tokens) - 1, zlib.crc32(f"{checksums}".encode()))
def tell(line: str, stream: Any) -> None:
    """Print to a console that may be gone: a closed terminal must not end a run."""
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding) + "\n", end="", file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):  # from now on into the void, also what Python itself flushes when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

def open_log(args: Hyperparameters, kept: tuple[str, ...] = ()) -> LogFn:
    """Open the log, print its path, and write the script's source and versions to it: each result has its code.
    Files that an earlier run left under this RUN_ID, but for those to be kept, are moved aside, all to one number."""
    paths = [Path(args.out_dir, args.run_id + suffix) for suffix in SUFFIXES]
    taken = [path for path, suffix in zip(paths, SUFFIXES, strict=True) if path.exists() and suffix not in kept]
    number = next(n for n in range(1, 1_000_000) if not any(Path(f"{path}.{n}").exists() for path in paths))
    versions = f"Python {sys.version}\nMLX {mx.__version__}"
    head = "\n".join([CODE_PATH.read_text(encoding="utf-8"), "=" * 100, versions, "=" * 100, ""]).encode()
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path in taken:
            path.rename(f"{path}.{number}")
        before = paths[0].read_bytes() if paths[0].exists() else b""  # a killed run may have left its last line open
        file = paths[0].open("ab", buffering=0)  # a line is on its way to the disk at once, or fails at once
        start = b"\n" * (before[-1:] not in b"\n") + head * (head not in before)
        require(file.write(start) == len(start), f"OUT_DIR={args.out_dir}: there is no room for {paths[0]}")
    except OSError as error:
        raise InputError(f"OUT_DIR={args.out_dir}: {error.filename or paths[0]}: {error.strerror}") from None
    def log(line: str, console: bool = True) -> None:
        if console:
            tell(line, sys.stdout)
        try:
            file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:  # no reason to lose the run
            tell(f"WARNING: {paths[0]}: {error.strerror}: a line is missing there", sys.stderr)
    tell(str(paths[0]), sys.stdout)
    for path in taken:
        log(f"moved_aside:{path} to:{path}.{number} (of an earlier run with this RUN_ID)")
    return log
@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes its name when all of it is on the disk: `path` is always the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}; what was there before still is") from None
    finally:
        temporary.unlink(missing_ok=True)

@contextlib.contextmanager
def signals_watched(run: Run) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP sets run.signal, for an end in good order; the next ends the process. What is
    ignored (nohup) stays so. Python's own handlers wait for MLX; a thread that reads the C handler's pipe does not."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    def watch() -> None:
        while byte := os.read(reader, 1):
            name = signal.Signals(byte[0]).name
            if byte[0] in numbers and not run.signal:
                run.signal = name  # and tell so in a thread of its own, which a stopped terminal may hold up
                line = f"interrupted:{name} the run ends at the next safe point; once more, and it ends at once"
                threading.Thread(target=run.log, args=(line,), daemon=True).start()
            elif name in ("SIGINT", "SIGTERM"):  # a terminal that closes may send several SIGHUP
                for path in map(run.path, SUFFIXES if run.world.rank == 0 else ()):
                    with contextlib.suppress(OSError):
                        path.with_name(f".{path.name}.tmp").unlink()
                os._exit(130)
        os.close(reader)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = [signal.signal(number, lambda *_: None) for number in numbers]
    for number in numbers:
        signal.siginterrupt(number, False)  # system calls of MLX and its compiler go on
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in zip(numbers, handlers, strict=True):
            if __name__ != "__main__" or number != signal.SIGTERM:  # a launcher may send that to a script that ends now
                signal.signal(number, handler)
        os.close(writer)  # which ends the watcher
def set_up(args: Hyperparameters, inputs: Inputs, world: World = ALONE) -> Run:
    """Seed, then build the model, its optimizers and the two compiled functions. The log is still the console."""
    if backend() == "metal":  # so that macOS leaves the arrays in memory; MLX's own trainers do this, too
        of_device = mx if hasattr(mx, "device_info") else mx.metal  # where older MLX has it
        mx.set_wired_limit(of_device.device_info()["max_recommended_working_set_size"])
    mx.random.seed(args.seed)
    model = GPT(
        args.vocab_size, args.num_layers, args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult,
        args.logit_chunk_tokens, args.logit_softcap, args.rope_base, args.tied_embed_init_std, args.qk_gain_init)
    def loss_alone(input_ids: mx.array, target_ids: mx.array) -> mx.array:  # says that no gradient is wanted
        loss = model.eval().loss(input_ids, target_ids)
        model.train()
        return loss
    # A compiled function takes the arrays it closes over for constants unless it is told that they are inputs.
    captured = {"inputs": model.state, "outputs": model.state}
    loss, loss_and_grad = (mx.compile(f, **captured) for f in (loss_alone, nn.value_and_grad(model, model.loss)))
    log = Run.log if world.rank > 0 else lambda line, console=True: console and tell(line, sys.stdout)
    return Run(args, inputs, model, SplitOptimizers(model, args), loss, loss_and_grad, world, log)
def require_finite(arrays: FlatParams, step: int) -> None:
    """Raise RunError for weights or optimizer state that nothing good can come of any more."""
    names = [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]
    require(not names, f"after step {step} these are not finite, and are not saved: {', '.join(names)}", RunError)
def training_state(run: Run) -> dict[str, Any]:
    """The tree of all arrays that the rest of the training depends on."""
    return {"model": run.model.state, "muon": run.optimizers.muon.buffers, "random": mx.random.state[0],
            "adam_embed": run.optimizers.adam_embed.state, "adam_scalar": run.optimizers.adam_scalar.state}
def set_training_state(run: Run, state: dict[str, Any]) -> None:
    """Put these arrays in place of the run's, inside the dicts that the compiled functions hold."""
    run.model.update(state["model"])
    for optimizer in ("muon", "adam_embed", "adam_scalar"):
        training_state(run)[optimizer].update(state[optimizer])
    mx.random.seed(int.from_bytes(np.array(state["random"]).astype(">u4").tobytes(), "big"))  # a seed's halves
def settings_behind(run: Run, without: set[str] = RESUMABLE) -> dict[str, str]:
    """The settings by name, but for those of `without`: by default, what the result depends on."""
    args, inputs, settings = run.args, run.inputs, settings_of(Hyperparameters) | settings_of(type(run.args))
    values = {setting.variable: getattr(args, name) for name, setting in settings.items() if name not in without}
    values |= {"COMPUTE_DTYPE": COMPUTE_DTYPE, "CONTROL_TENSOR_NAME_PATTERNS": CONTROL_TENSOR_NAME_PATTERNS,
               "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": INT8_KEEP_FLOAT_FP32_NAME_PATTERNS,
               "DATA_PATH": f"data with checksum {inputs.data_checksum}",
               "TOKENIZER_PATH": f"one with checksum {zlib.crc32(b''.join(t.tobytes() for t in inputs.byte_tables))}"}
    return {name: str(value) for name, value in values.items()}
def require_agreement(run: Run) -> None:
    """Raise InputError, naming what differs, unless all ranks are to do the same. RUN_ID comes from rank 0."""
    facts = {"MLX": mx.__version__, CODE_PATH.name: f"one with checksum {zlib.crc32(CODE_PATH.read_bytes())}"}
    ranks = run.world.gather(facts | settings_behind(run, without=set()))
    run.args.run_id = ranks[0].pop("RUN_ID", run.args.run_id)
    wrong = [f"{name} is {value} on rank 0 and {facts.get(name)} on rank {rank}" for rank, facts in enumerate(ranks)
             for name, value in ranks[0].items() if facts.get(name) != value]
    require(not wrong, f"all processes of a run must agree: {'; '.join(wrong)}")
def write_checkpoint(run: Run) -> None:
    """Write what it takes to go on from here as if nothing had happened, unless it is there. Raises RunError."""
    if run.step == run.checkpointed_step:
        return
    path, arrays = run.path(CHECKPOINT_SUFFIX), dict(tree_flatten(training_state(run)))
    require_finite(arrays, run.step)
    about = {"run_id": run.args.run_id, "step": run.step, "train_ms": run.train_ms, "position": run.position,
             "settings": settings_behind(run), "mlx_version": mx.__version__}
    if run.world.rank == 0:
        with complete_file(path) as file:
            mx.save_safetensors(file, arrays, {"format": CHECKPOINT_FORMAT, "about": json.dumps(about)})
        run.log(f"checkpoint:{path} step:{run.step}/{run.args.iterations} bytes:{path.stat().st_size}")
    run.checkpointed_step, run.saved = run.step, (path,)

def resume(run: Run) -> None:
    """Put the run where this checkpoint left it. Raises InputError if it is damaged, or of settings that matter."""
    path = run.path(CHECKPOINT_SUFFIX) if run.args.resume == "auto" else Path(run.args.resume)
    if not run.args.resume or not run.world.gather(run.args.resume != "auto" or path.exists())[0]:
        return
    try:
        content = run.world.from_first(path.read_bytes)
        arrays, metadata = mx.load(io.BytesIO(content), format="safetensors", return_metadata=True)
        require(metadata.get("format") == CHECKPOINT_FORMAT, f"its format tag is not {CHECKPOINT_FORMAT!r}")
        whole = 8 + int.from_bytes(content[:8], "little") + sum(array.nbytes for array in arrays.values())
        require(len(content) == whole, f"it has {len(content)} bytes and must have {whole}")  # older MLX does not ask
        about, now = json.loads(metadata["about"]), settings_behind(run)
        then = about["settings"]
        changes = [f"{name} was {then.get(name)} and is {now.get(name)}"
                   for name in now | then if then.get(name) != now.get(name)]
        require(not changes, f"the result would be another: {'; '.join(changes)}")
        check_arrays(arrays, dict(tree_flatten(training_state(run))))
        mx.eval(arrays)
        set_training_state(run, tree_map_with_path(lambda name, _: arrays[name], training_state(run)))
        run.step = run.checkpointed_step = int(about["step"])
        run.train_ms, run.position, run.saved = float(about["train_ms"]), tuple(about["position"]), (path.resolve(),)
        file_idx, pos, epoch = run.position
        possible = run.step > 0 <= run.train_ms < math.inf and min(file_idx, pos, epoch - 1) >= 0
        require(possible and file_idx < run.inputs.train_shards, "its place in the run is impossible")
        run.args.run_id = run.args.run_id if "RUN_ID" in os.environ else about["run_id"]
        require(not list(path_problems(run.args, run.world)), f"RUN_ID={about['run_id']!r} cannot be one")
    except (() if run.world.waiting else Exception) as error:  # noqa: B030 (whatever a damaged file makes of its readers)
        reason = str(error) if isinstance(error, InputError) else getattr(error, "strerror", None) or repr(error)
        raise InputError(f"RESUME={path}: cannot go on from there: {ascii(reason)[1:-1]}") from None

def log_configuration(run: Run) -> None:
    """Log what is about to run. Other people's scripts parse these lines: fields may be added, not changed."""
    args, inputs, optimizers, params = run.args, run.inputs, run.optimizers, dict(tree_flatten(run.model.parameters()))
    present, expected = inputs.train_shards, inputs.expected_train_shards
    shards = f"dataset:{inputs.dataset_name} train_shards:{present}" + ("" if expected is None else f"/{expected}")
    loader = f"train_loader:{shards}"
    if expected is not None and present < expected:
        loader = f"WARNING: train_loader:subset {shards} new epochs will arrive sooner than the full dataset"
    lines = f"""\
run_id:{args.run_id}
mlx_version:{mx.__version__}
train_loader:shards pattern={args.train_files}
val_loader:shards pattern={args.val_files} tokens:{inputs.num_val_tokens}
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
world_size:{run.world.size}
optimizer:muon+adam muon_matrix_params:{len(optimizers.matrix_keys)} scalar_params:{len(optimizers.scalar_keys)} \
embed_lr:{args.tied_embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} \
muon_momentum:{args.muon_momentum} muon_steps:{args.muon_backend_steps}
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}
compute_dtype:{COMPUTE_DTYPE} compile:True
dtypes tok_emb:{params["tok_emb.weight"].dtype} \
linear_weight:{params["blocks.0.attn.c_q.weight"].dtype} skip_weights:{params["skip_weights"].dtype}"""
    if sys.platform == "linux" and backend() == "cpu":
        hint = "reference (slow: `apt-get install libopenblas0-pthread`, and import this script before mlx)"
        lines += f"\ncpu_blas:{'openblas' if HAS_OPENBLAS else hint}"
    if args.resume:
        lines = f"resume:{args.resume} {f'step:{run.step}' if run.saved else 'no checkpoint: starting afresh'}\n{lines}"
    for line in [*misspelt_settings(type(args)), *lines.split("\n")]:
        run.log(line)
def validate(run: Run, stage: str = "validation") -> tuple[float, float, str]:
    """(val_loss, val_bpb, mark) of the model as it is; the mark ends the lines of what is not the full score."""
    tokens, total, mark = run.inputs.val_tokens, run.inputs.num_val_tokens, ""
    check_token_ids(tokens, run.args.vocab_size, run.args.val_files)  # so far it was the first million
    if len(tokens) - 1 < total:
        mark = f" val_tokens:{len(tokens) - 1}/{total}"
        run.log(f"WARNING: VAL_MAX_TOKENS={run.args.val_max_tokens}: what follows is not the full score{mark}")
    run.world.require_same(run.model, run.step)
    val_loss, val_bpb = eval_val(run.args, lambda x, y: run.safe_point(stage) or run.compiled_loss(x, y), tokens,
                                 *run.inputs.byte_tables, run.log, *([run.world] if run.world.size > 1 else []))
    require(math.isfinite(val_loss), f"after step {run.step} val_loss:{val_loss} is not finite", RunError)
    return val_loss, val_bpb, mark

def warm_up(run: Run) -> None:
    """Make MLX compile and allocate what training and validation will use, and learn nothing from it. One batch of each
    size does; WARMUP_STEPS only says whether, and is logged. The loader is a throwaway one, the state is put back."""
    args, steps, primer = run.args, run.args.warmup_steps, copy.copy(run.args)
    if steps <= 0 or (run.step > 0 and run.is_trained()):
        return
    run.log("warmup: two chunks, an optimizer step and a validation batch of each size, off the clock")
    run.safe_point("warmup")
    before = tree_map(lambda array: array, training_state(run))
    sizes = token_chunks(args.microbatch_tokens, args.train_seq_len, args.mlx_max_microbatch_tokens)
    vars(primer).update(train_batch_tokens=sizes[0] + sizes[-1], grad_accum_steps=1, mlx_max_microbatch_tokens=sizes[0])
    loader = TokenLoader(args.train_files, vocab_size=args.vocab_size)
    _, grads = loss_and_grad_chunked(primer, loader, run.compiled_loss_and_grad, run.world.size, run.world)
    run.optimizers.step(run.model, clip_grad_tree(grads, args.grad_clip_norm), step=0, lr_mul=1.0)
    mx.eval(training_state(run))
    run.world.require_same(run.model, step=0)  # or else the first validation would find it, hours later
    set_training_state(run, before)
    # Validation has batches of two sizes, the full one and the last: so many sequences give one of each.
    total_seqs = (len(run.inputs.val_tokens) - 1) // args.train_seq_len
    batch_seqs = microbatch_seqs("VAL_BATCH_SIZE", args.val_batch_size, args)
    run.safe_point("warmup")
    tokens = run.inputs.val_tokens[: (batch_seqs + total_seqs % batch_seqs) * args.train_seq_len + 1]
    check_token_ids(tokens, args.vocab_size, args.val_files)
    eval_val(args, run.compiled_loss, tokens, *run.inputs.byte_tables)
    for step in (s for s in range(1, steps + 1) if steps <= 20 or s % 10 == 0 or s == steps):
        run.log(f"warmup_step:{step}/{steps}")

def train(run: Run) -> None:
    """Train until ITERATIONS, the wallclock cap, a signal or a loss that is not finite; only steps are on the clock."""
    args, log = run.args, run.log
    run.safe_point("warmup")
    loader = TokenLoader(args.train_files, log, run.inputs.dataset_name, args.vocab_size)
    loader.stream.seek(*run.position)
    losses: list[str] = []  # the last ones
    while True:
        ranks = run.world.gather((run.train_ms, run.signal))  # all go by rank 0's clock, and end when one is to end
        run.train_ms, run.answered = ranks[0][0], any(name for _, name in ranks)
        finished, at_step = run.answered or run.is_trained(), f"step:{run.step}/{args.iterations}"
        try:
            if run.answered or (args.checkpoint_every > 0 and (finished or run.step % args.checkpoint_every == 0)):
                write_checkpoint(run)
        except RunError as error:
            require(run.answered, str(error), RunError)
            log(f"WARNING: {error}")  # there may still be room for the model, which is smaller
        if finished or (args.val_loss_every > 0 and run.step % args.val_loss_every == 0):
            val_loss, val_bpb, mark = validate(run)
            log(f"{at_step} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{run.train_ms:.0f}ms step_avg:{run.train_ms / max(run.step, 1):.2f}ms{mark}")
        if finished:
            break
        lr_mul = args.lr_mul(run.step, run.train_ms)
        started = time.perf_counter()
        loss, grads = loss_and_grad_chunked(args, loader, run.compiled_loss_and_grad, args.grad_accum_steps, run.world)
        run.optimizers.step(run.model, clip_grad_tree(grads, args.grad_clip_norm), run.step, lr_mul)
        del grads  # or else the next step would find their memory taken
        mx.eval(loss, run.model.parameters())
        step_ms = 1000.0 * (time.perf_counter() - started)
        run.step, run.train_ms = run.step + 1, run.train_ms + step_ms
        run.position = (loader.stream.file_idx, loader.stream.pos, loader.stream.epoch)
        loss, at_step, so_far = loss.item(), f"step:{run.step}/{args.iterations}", ", ".join(losses) or "none"
        require(math.isfinite(loss), f"{at_step} train_loss:{loss} is not finite; lr_mul:{lr_mul:.4f}; the last finite "
                f"losses: {so_far}; what came after step {run.checkpointed_step} is not saved", RunError)
        losses = [*losses[-4:], f"{loss:.4f}"]
        if args.train_log_every > 0 and (run.step <= 10 or run.step % args.train_log_every == 0):
            log(f"{at_step} train_loss:{loss:.4f} train_time:{run.train_ms:.0f}ms "
                f"step_avg:{run.train_ms / run.step:.2f}ms tok_s:{args.train_batch_tokens / (step_ms / 1000.0):.0f}")
        if run.step == min(3, args.iterations) or (run.is_trained() and run.step < 3):  # their length is known by now
            log_warmdown(run, run.step, run.train_ms)
    if run.step < args.iterations:
        reason = "interrupted" if run.answered else "wallclock_cap"
        log(f"stopping_early: {reason} train_time:{run.train_ms:.0f}ms {at_step}")
def log_warmdown(run: Run, step: int, train_ms: float) -> None:
    """Tell when the whole run lies inside the warmdown, so that the full learning rate is used once at the most."""
    args, cap_ms = run.args, 1000.0 * run.args.max_wallclock_seconds  # the last step that fits ends it
    scheduled = max(int(cap_ms / (train_ms / step)), 1) if cap_ms > 0 else args.iterations
    if scheduled < args.warmdown_iters:
        run.log(f"warmdown:whole_run lr_mul:{args.lr_mul(step, train_ms):.4f} "
                f"steps_that_fit:{min(scheduled, args.iterations)} warmdown_iters:{args.warmdown_iters} "
                f"(after the first step the rate is never the full one; WARMDOWN_ITERS={scheduled} would start at it)")

def save(run: Run) -> Path:
    """Write the weights as they are (.npz) and compressed (.int8.ptz); returns the latter's path. Raises RunError."""
    log, flat_state = run.log, dict(tree_flatten(run.model.state))
    npz_path, artifact_path = run.path(NPZ_SUFFIX), run.path(ARTIFACT_SUFFIX)
    require_finite(flat_state, run.step)
    if run.world.rank > 0:
        return artifact_path
    quant_obj, stats = quantize_state_dict_int8(flat_state)
    require_finite(dequantize_state_dict_int8(quant_obj), run.step)  # float16 ends at 65504
    npz = io.BytesIO()
    mx.savez(npz, **flat_state)
    raw = pickle.dumps(quant_obj, protocol=pickle.HIGHEST_PROTOCOL)
    for path, content in ((npz_path, npz.getbuffer()), (artifact_path, zlib.compress(raw, level=9))):
        with complete_file(path) as file:
            file.write(content)
        run.saved += (path,)
    run.checkpointed_step = run.step  # for these files have it all, and the weights in memory will be rounded
    log(f"saved_model:{npz_path} bytes:{npz_path.stat().st_size}")
    artifact_bytes, code_bytes = artifact_path.stat().st_size, CODE_PATH.stat().st_size
    payload, total_bytes = stats["int8_payload_bytes"], code_bytes + artifact_bytes
    log(f"serialized_model_int8_zlib:{artifact_bytes} bytes (payload:{payload} raw_pickle:{len(raw)} "
        f"payload_ratio:{stats['baseline_tensor_bytes'] / max(payload, 1):.2f}x)")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size int8+zlib: {total_bytes} bytes "
        f"({'under' if total_bytes <= SUBMISSION_CAP_BYTES else 'OVER'} the cap of {SUBMISSION_CAP_BYTES} bytes)")
    return artifact_path
def score(run: Run, path: Path) -> None:
    """Read a saved model back into the model and validate it. Of the compressed one that is the run's score."""
    state = load_flat_state(path, dict(tree_flatten(run.model.state)), run.world)
    run.model.update(tree_unflatten(list(state.items())))
    started = time.perf_counter()
    val_loss, val_bpb, mark = validate(run, "final scoring")
    eval_ms = 1000.0 * (time.perf_counter() - started)
    name = "final_npz" if path.suffix == ".npz" else "final_int8_zlib_roundtrip"
    run.log(f"{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_ms:.0f}ms{mark}")
    run.log(f"{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{mark}")

def main() -> None:
    """One run, as the environment says. Raises InputError or NotImplementedError for what is wrong before a step is
    done, RunError for what fails after, ConnectionError for lost processes, KeyboardInterrupt without a score."""
    world, args, began = World.join(), Hyperparameters(), False
    run = set_up(args, read_inputs(args, world), world)
    with signals_watched(run) if threading.current_thread() is threading.main_thread() else contextlib.nullcontext():
        try:
            require_agreement(run)
            resume(run)
            goes_on = (LOG_SUFFIX, CHECKPOINT_SUFFIX) if run.path(CHECKPOINT_SUFFIX).resolve() in run.saved else ()
            if world.rank == 0:  # not before: a run that cannot start leaves nothing behind
                run.log = open_log(args, SUFFIXES if args.eval_artifact else goes_on)
            began = True
            log_configuration(run)
            if args.eval_artifact:
                score(run, Path(args.eval_artifact))
            else:
                warm_up(run)
                train(run)
                score(run, save(run))
        except BaseException as error:
            waited, world.waiting = world.waiting, False
            if type(error) is RuntimeError and waited and run.signal != "SIGINT":  # a terminal sends that to all ranks
                error = ConnectionError(f"another process of the run is gone, so it ends here, too ({error})")
            elif type(error) is RuntimeError and run.signal:  # Ctrl-C also ended the compiler that MLX calls on a CPU
                error = KeyboardInterrupt(f"interrupted by {run.signal} during a computation: no score; saved: ")
            if isinstance(error, (KeyboardInterrupt, InputError, OSError)):  # the model is as the last step left it
                write_checkpoint(run)
            if isinstance(error, KeyboardInterrupt):
                error.args = (f"{error}{', '.join(map(str, run.saved)) or 'nothing'}",)
            run.log(f"error: {error}", console=False)
            if began and run.step > 0 and isinstance(error, (InputError, OSError)):  # of a shard opened during the run
                raise RunError(str(error)) from error
            raise error
def command_line(arguments: list[str]) -> int:
    """The exit status: 0 a score or --help, 2 wrong before training, 1 failed later, 130 interrupted, no score."""
    if arguments in (["--help"], ["-h"]):
        print(help_text())
        return 0
    try:
        require(not arguments, f"{' '.join(arguments)}: settings are environment variables, as SEED=7; see --help")
        main()
        return 0
    except (InputError, NotImplementedError, RunError, ConnectionError, KeyboardInterrupt) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 2 - isinstance(error, (RunError, ConnectionError))
        rank = f"rank {os.environ['MLX_RANK']}: " if os.environ.get("MLX_RANK", "0") != "0" else ""
        lines = [f"error: {rank}{line}" for line in (str(error) or "interrupted before anything was done").splitlines()]
        for line in lines + (misspelt_settings() if status == 2 else []):
            tell(line, sys.stderr)
        return status
if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
