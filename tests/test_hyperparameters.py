"""Settings from the environment, their defaults and errors, --help, and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid

import mlx.core as mx
import pytest

import train_gpt_mlx as tg
from helpers import RECORDED, REPO

CONTROL = "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"
DEFAULTS = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024", "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "SEED": 1337, "OUT_DIR": "logs", "ITERATIONS": 20000, "VAL_LOSS_EVERY": 0, "VAL_BATCH_SIZE": 524288,
    "TRAIN_LOG_EVERY": 200, "TRAIN_BATCH_TOKENS": 524288, "GRAD_ACCUM_STEPS": 8, "TRAIN_SEQ_LEN": 1024,
    "WARMUP_STEPS": 20, "WARMDOWN_ITERS": 1200, "MAX_WALLCLOCK_SECONDS": 600.0, "MLX_MAX_MICROBATCH_TOKENS": 8192,
    "MLX_EAGER_EVAL": True, "LOGIT_CHUNK_TOKENS": 0, "VOCAB_SIZE": 1024, "NUM_LAYERS": 9, "MODEL_DIM": 512,
    "NUM_HEADS": 8, "NUM_KV_HEADS": 4, "MLP_MULT": 2, "TIE_EMBEDDINGS": True, "TIED_EMBED_INIT_STD": 0.005,
    "LOGIT_SOFTCAP": 30.0, "ROPE_BASE": 10000.0, "QK_GAIN_INIT": 1.5, "BETA1": 0.9, "BETA2": 0.95, "ADAM_EPS": 1e-8,
    "TIED_EMBED_LR": 0.05, "MATRIX_LR": 0.04, "SCALAR_LR": 0.04, "MUON_MOMENTUM": 0.95, "MUON_BACKEND_STEPS": 5,
    "MUON_MOMENTUM_WARMUP_START": 0.85, "MUON_MOMENTUM_WARMUP_STEPS": 500, "GRAD_CLIP_NORM": 0.0,
    "RESUME": "", "EVAL_ARTIFACT": "", "CHECKPOINT_EVERY": 0, "VAL_MAX_TOKENS": 0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_default(name, default):
    value = getattr(tg.Hyperparameters(), name.lower())
    assert value == default
    assert type(value) is type(default)


def test_no_setting_beyond_the_known_ones():
    assert {setting.variable for setting in tg.settings_of(tg.Hyperparameters).values()} == {*DEFAULTS, "RUN_ID"}


def test_run_id_is_a_fresh_uuid4_each_time():
    first, second = tg.Hyperparameters().run_id, tg.Hyperparameters().run_id
    assert uuid.UUID(first).version == 4
    assert first != second


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("ITERATIONS", "7", 7), ("MATRIX_LR", "1e-3", 0.001), ("MLX_EAGER_EVAL", "0", False),
     ("TIE_EMBEDDINGS", "1", True), ("RUN_ID", "mine", "mine"), ("MAX_WALLCLOCK_SECONDS", "5", 5.0),
     ("ROPE_BASE", "500", 500.0)],
)  # fmt: skip
def test_environment_is_read_when_constructed(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)
    read = getattr(tg.Hyperparameters(), name.lower())
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"), [("ITERATIONS", "many"), ("ITERATIONS", "1.5"), ("MATRIX_LR", "x"), ("MLX_EAGER_EVAL", "yes"),
                       ("TIE_EMBEDDINGS", "2"), ("SEED", "")],
)  # fmt: skip
def test_text_of_the_wrong_kind_names_the_variable(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}={text!r}: must be"):
        tg.Hyperparameters()


def test_older_name_of_the_sequence_length_counts_only_when_alone(monkeypatch):
    monkeypatch.setenv("TRAIN_MAX_SEQ_LEN", "256")
    assert tg.Hyperparameters().train_seq_len == 256
    monkeypatch.setenv("TRAIN_SEQ_LEN", "128")
    assert tg.Hyperparameters().train_seq_len == 128


def test_attributes_are_plain_and_derived_ones_follow():
    args = tg.Hyperparameters()
    args.data_path, args.train_batch_tokens, args.grad_accum_steps = "/d", 1000, 3
    assert args.train_files == "/d/fineweb_train_*.bin"
    assert args.val_files == "/d/fineweb_val_*.bin"
    assert args.microbatch_tokens == 333
    assert vars(args)["grad_accum_steps"] == 3
    assert tg.Hyperparameters().grad_accum_steps == 8


def test_a_subclass_may_add_attributes_and_replace_settings(monkeypatch):
    class Mine(tg.Hyperparameters):
        num_layers = 11
        my_rate = 0.5
        my_setting = tg.Setting("mine", 3, "a setting of a fork")

    monkeypatch.setenv("NUM_LAYERS", "2")
    monkeypatch.setenv("MY_SETTING", "4")
    mine = Mine()
    assert (mine.num_layers, mine.my_rate, mine.my_setting, mine.model_dim) == (11, 0.5, 4, 512)
    assert tg.Hyperparameters().num_layers == 2
    names = list(tg.settings_of(Mine))
    assert (names[0], names[-1]) == ("data_path", "my_setting")


@pytest.mark.parametrize("row", RECORDED["lr_mul"], ids=str)
def test_recorded_learning_rate_multiplier(row):
    args = tg.Hyperparameters()
    args.iterations, args.warmdown_iters, args.max_wallclock_seconds, step, elapsed_ms, expected = row
    assert args.lr_mul(step, elapsed_ms) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_learning_rate_reaches_zero_at_the_cap_and_stays_there():
    args = tg.Hyperparameters()
    args.warmdown_iters, args.max_wallclock_seconds = 10, 1.0
    assert [args.lr_mul(10, ms) for ms in (499.0, 600.0, 1000.0, 1500.0)] == pytest.approx([1.0, 2 / 3, 0.0, 0.0])


def test_help_lists_every_setting_with_its_default_and_meaning():
    lines = tg.help_text().splitlines()
    for name, default in {**DEFAULTS, "RUN_ID": "<a fresh uuid4>", "COMPUTE_DTYPE": "auto", "MLX_PRELOAD_BLAS": 1,
                          "CONTROL_TENSOR_NAME_PATTERNS": CONTROL}.items():  # fmt: skip
        default = int(default) if isinstance(default, bool) else default
        found = [line for line in lines if line.startswith(f"  {name}={default} ")]
        assert len(found) == 1, name
        assert len(found[0].split(f"{name}={default}")[1].strip()) > 8, f"{name} has no meaning"
    (older,) = [line for line in lines if line.endswith("(or TRAIN_MAX_SEQ_LEN)")]
    assert older.startswith("  TRAIN_SEQ_LEN=1024 ")
    assert [line for line in lines if line and not line.startswith(" ")][2:] == [
        "data", "loop", "memory", "model", "optimizer", "platform", "name lists"]  # fmt: skip


def test_a_subclass_with_a_constructor_of_its_own_reads_each_setting_once(monkeypatch):
    @dataclasses.dataclass
    class Mine(tg.Hyperparameters):
        width: int = 3

    mine = Mine(width=4)
    assert (mine.width, mine.iterations) == (4, 20000)
    assert mine.run_id == mine.run_id
    monkeypatch.setenv("ITERATIONS", "9")
    assert mine.iterations == 20000


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that runs `code` in the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env={**os.environ, **environment}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"COMPUTE_DTYPE": "bfloat16"}, "mlx.core.bfloat16"), ({"COMPUTE_DTYPE": "float32"}, "mlx.core.float32"),
     ({"COMPUTE_DTYPE": "auto"}, None), ({}, None)],
)  # fmt: skip
def test_compute_dtype_comes_from_the_environment_at_import(environment, expected):
    if expected is None:
        expected = str(mx.bfloat16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32)
    assert python("import train_gpt_mlx as t; print(t.COMPUTE_DTYPE)", **environment) == expected


def test_name_lists_come_from_the_environment_at_import():
    both = "import train_gpt_mlx as t; print(t.CONTROL_TENSOR_NAME_PATTERNS, t.INT8_KEEP_FLOAT_FP32_NAME_PATTERNS)"
    assert python(both) == f"{tuple(CONTROL.split(','))} {tuple(CONTROL.split(','))}"
    assert python(both, CONTROL_TENSOR_NAME_PATTERNS="a,,b,") == "('a', 'b') ('a', 'b')"
    lists = {"CONTROL_TENSOR_NAME_PATTERNS": "a", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": ""}
    assert python(both, **lists) == "('a',) ()"


def test_import_prints_nothing_creates_nothing_and_is_quick(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(REPO)!r}); t = time.perf_counter(); import train_gpt_mlx; "
    code += "print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 2.0  # a second line of output would fail here
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_script_loads_by_path_without_being_registered():
    code = "import importlib.util as u; s = u.spec_from_file_location('forked', 'train_gpt_mlx.py'); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.Hyperparameters().iterations)"
    assert python(code) == "20000"


NAMES = """COMPUTE_DTYPE Hyperparameters CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS
INT8_KEEP_FLOAT_MAX_NUMEL INT8_KEEP_FLOAT_STORE_DTYPE INT8_PER_ROW_SCALE_DTYPE INT8_CLIP_PERCENTILE INT8_CLIP_Q
MX_DTYPE_FROM_NAME token_chunks accumulate_flat_grads rms_norm zeropower_newtonschulz5 load_data_shard TokenStream
TokenLoader CastedLinear RMSNormNoWeight CausalSelfAttention MLP Block GPT Muon SplitOptimizers keep_float_array
quantize_float_array quantize_state_dict_int8 dequantize_state_dict_int8 build_sentencepiece_luts
validate_dataset_tokenizer_pair load_validation_tokens loss_and_grad_chunked eval_val clip_grad_tree main"""


@pytest.mark.parametrize("name", NAMES.split())
def test_name_that_other_scripts_import(name):
    assert hasattr(tg, name)
