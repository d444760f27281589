"""Settings: their defaults, the environment, the learning-rate schedule; and the names that other scripts import."""

import os
import subprocess
import sys
import uuid

import mlx.core as mx
import pytest

import train_gpt_mlx as tg
from helpers import RECORDED, REPO

CONTROL = "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"
DEFAULTS = """
DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model RUN_ID= SEED=1337
OUT_DIR=logs RESUME= ITERATIONS=20000 VAL_LOSS_EVERY=0 VAL_BATCH_SIZE=524288 VAL_MAX_TOKENS=0 TRAIN_LOG_EVERY=200
CHECKPOINT_EVERY=0 TRAIN_BATCH_TOKENS=524288 GRAD_ACCUM_STEPS=8 TRAIN_SEQ_LEN=1024 WARMUP_STEPS=20 WARMDOWN_ITERS=1200
MAX_WALLCLOCK_SECONDS=600.0 MLX_MAX_MICROBATCH_TOKENS=8192 MLX_EAGER_EVAL=True LOGIT_CHUNK_TOKENS=0
VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 TIE_EMBEDDINGS=True
TIED_EMBED_INIT_STD=0.005 LOGIT_SOFTCAP=30.0 ROPE_BASE=10000.0 QK_GAIN_INIT=1.5
BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-08 TIED_EMBED_LR=0.05 MATRIX_LR=0.04 SCALAR_LR=0.04 MUON_MOMENTUM=0.95
MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 GRAD_CLIP_NORM=0.0
"""
NAMES = """
COMPUTE_DTYPE Hyperparameters CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS
INT8_KEEP_FLOAT_MAX_NUMEL INT8_KEEP_FLOAT_STORE_DTYPE INT8_PER_ROW_SCALE_DTYPE INT8_CLIP_PERCENTILE INT8_CLIP_Q
MX_DTYPE_FROM_NAME token_chunks accumulate_flat_grads rms_norm zeropower_newtonschulz5 load_data_shard TokenStream
TokenLoader CastedLinear RMSNormNoWeight CausalSelfAttention MLP Block GPT Muon SplitOptimizers keep_float_array
quantize_float_array quantize_state_dict_int8 dequantize_state_dict_int8 build_sentencepiece_luts
validate_dataset_tokenizer_pair load_validation_tokens loss_and_grad_chunked eval_val clip_grad_tree main
"""


def test_settings_and_their_defaults():
    args = tg.Hyperparameters()
    args.run_id = ""
    found = {f"{name.upper()}={getattr(args, name)}" for name in tg.settings_of(tg.Hyperparameters)}
    assert found == set(DEFAULTS.split())


def test_help_has_a_line_for_every_setting_and_its_default():
    lines = [line.split()[0] for line in tg.help_text().splitlines() if line.startswith("  ")]
    for name, default in (tg.settings_of(tg.Hyperparameters) | tg.settings_of(tg.ModuleSettings)).items():
        shown = int(default) if isinstance(default, bool) else default
        assert lines.count(f"{name.upper()}={shown}") == 1, name


def test_each_run_gets_a_fresh_uuid4_as_its_name():
    first, second = tg.Hyperparameters().run_id, tg.Hyperparameters().run_id
    assert uuid.UUID(first).version == 4
    assert first != second


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("ITERATIONS", "7", 7), ("MATRIX_LR", "1e-3", 0.001), ("MLX_EAGER_EVAL", "0", False), ("RUN_ID", "mine", "mine")],
)
def test_the_environment_is_read_at_construction(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)
    read = getattr(tg.Hyperparameters(), name.lower())
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("setting", ["ITERATIONS=1.5", "SEED=", "MATRIX_LR=x", "MLX_EAGER_EVAL=yes"])
def test_text_of_the_wrong_type_is_refused_by_name_and_value(monkeypatch, setting):
    name, text = setting.split("=")
    monkeypatch.setenv(name, text)
    with pytest.raises(tg.InputError, match=f"{name}.*{text}"):
        tg.Hyperparameters()


def test_the_older_name_of_the_sequence_length_counts_only_alone(monkeypatch):
    monkeypatch.setenv("TRAIN_MAX_SEQ_LEN", "256")
    assert tg.Hyperparameters().train_seq_len == 256
    monkeypatch.setenv("TRAIN_SEQ_LEN", "128")
    assert tg.Hyperparameters().train_seq_len == 128


def test_derived_attributes_follow_assignments():
    args = tg.Hyperparameters()
    args.data_path, args.train_batch_tokens, args.grad_accum_steps = "/d", 1000, 3
    assert (args.train_files, args.val_files) == ("/d/fineweb_train_*.bin", "/d/fineweb_val_*.bin")
    assert args.microbatch_tokens == 333


def test_a_subclass_may_change_defaults_and_add_settings(monkeypatch):
    class Mine(tg.Hyperparameters):
        num_layers = 11
        model_dim = 64
        my_constant = 0.5
        my_setting: int = 3

    monkeypatch.setenv("NUM_LAYERS", "2")
    monkeypatch.setenv("MY_SETTING", "4")
    mine = Mine()
    assert (mine.num_layers, mine.model_dim, mine.my_constant, mine.my_setting, mine.seed) == (2, 64, 0.5, 4, 1337)


@pytest.mark.parametrize("row", RECORDED["lr_mul"], ids=str)
def test_recorded_learning_rate_multiplier(row):
    args = tg.Hyperparameters()
    args.iterations, args.warmdown_iters, args.max_wallclock_seconds, step, elapsed_ms, expected = row
    assert args.lr_mul(step, elapsed_ms) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def python(code: str, folder=REPO, **environment: str) -> str:
    """What a fresh interpreter prints that runs `code` in a folder."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}); {code}"]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["auto", "bfloat16", "float32"])
def test_the_compute_dtype_is_read_at_import(name):
    auto = mx.float32 if tg.backend() == "cpu" else mx.bfloat16
    expected = auto if name == "auto" else getattr(mx, name)
    assert python("import train_gpt_mlx as t; print(t.COMPUTE_DTYPE)", COMPUTE_DTYPE=name) == str(expected)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [CONTROL.split(","), CONTROL.split(",")]),
        ({"CONTROL_TENSOR_NAME_PATTERNS": "a,,b,"}, [["a", "b"], ["a", "b"]]),
        ({"INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": ""}, [CONTROL.split(","), []]),
    ],
    ids=str,
)
def test_the_name_lists_are_read_at_import(environment, expected):
    lists = "[list(t.CONTROL_TENSOR_NAME_PATTERNS), list(t.INT8_KEEP_FLOAT_FP32_NAME_PATTERNS)]"
    assert python(f"import train_gpt_mlx as t; print({lists})", **environment) == str(expected)


def test_importing_prints_nothing_creates_nothing_and_is_quick(tmp_path):
    code = "import time; start = time.perf_counter(); import train_gpt_mlx; print(time.perf_counter() - start)"
    assert float(python(code, tmp_path)) < 2.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES.split())
def test_other_scripts_can_import(name):
    assert hasattr(tg, name)
