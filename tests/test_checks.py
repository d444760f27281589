"""What is wrong before a run is told in a line each, before anything is written; and the exit statuses."""

import os
import re

import pytest

import train_gpt_mlx as tg
from helpers import learnable_tokens, write_shard
from programs import environment

NUMBERS = {name.upper() for name, default in tg.settings_of(tg.Hyperparameters).items() if not isinstance(default, str)}
ANY_SIGN = {"MAX_WALLCLOCK_SECONDS", "WARMDOWN_ITERS", "GRAD_CLIP_NORM", "QK_GAIN_INIT"}
SIZES = {"TRAIN_BATCH_TOKENS", "GRAD_ACCUM_STEPS", "TRAIN_SEQ_LEN", "MLX_MAX_MICROBATCH_TOKENS", "VAL_BATCH_SIZE"}
SIZES |= {"VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT"}


@pytest.fixture
def errors(data, tmp_path, monkeypatch, capsys):
    """Start a tiny run with changed settings, which must be refused and leave nothing behind; returns its errors."""

    def start(**changes) -> list[str]:
        variables = environment(data, tmp_path, **changes)
        for name in variables.keys() - os.environ.keys() | {name.upper() for name in changes}:
            monkeypatch.setenv(name, variables[name])
        monkeypatch.chdir(tmp_path)
        status, (out, err) = tg.command_line([]), capsys.readouterr()
        assert (status, out) == (2, "")
        assert not (tmp_path / "out").exists()
        assert all(line.startswith("error: ") for line in err.splitlines())
        return [line.removeprefix("error: ") for line in err.splitlines()]

    return start


WRONG = f"""\
ITERATIONS=ten: must be a whole number
TIE_EMBEDDINGS=yes: must be 0 or 1
SEED={2**64}: must be below
MATRIX_LR=nan: must be at least 0
BETA1=1.0: must be below 1
LOGIT_SOFTCAP=0.0: must be above 0
COMPUTE_DTYPE=fp16: must be auto, bfloat16 or float32
MLX_PRELOAD_BLAS=yes: must be 0 or 1"""


@pytest.mark.parametrize("message", WRONG.splitlines())
def test_a_wrong_setting_is_told_with_its_value_and_what_is_allowed(errors, message):
    name, value = message.split(":")[0].lower().split("=")
    (line,) = errors(**{name: value})
    assert line.startswith(message)


@pytest.mark.parametrize(("value", "wrong"), [("x", NUMBERS), ("-1", NUMBERS - ANY_SIGN), ("0", SIZES)])
def test_all_wrong_settings_are_told_together_and_no_others(errors, value, wrong):
    lines = errors(**dict.fromkeys((name.lower() for name in NUMBERS), value), compute_dtype="fp16")
    assert sorted(line.split("=")[0] for line in lines) == sorted([*wrong, "COMPUTE_DTYPE"])


IMPOSSIBLE = """\
TIE_EMBEDDINGS=0: not implemented
MODEL_DIM=15 must be a multiple of NUM_HEADS=2
MODEL_DIM=6 / NUM_HEADS=2 must be even
NUM_HEADS=8 must be a multiple of NUM_KV_HEADS=3
TRAIN_BATCH_TOKENS=31: must be at least GRAD_ACCUM_STEPS * TRAIN_SEQ_LEN = 32
VAL_BATCH_SIZE=31: must be at least GRAD_ACCUM_STEPS * TRAIN_SEQ_LEN = 32"""


@pytest.mark.parametrize("message", IMPOSSIBLE.splitlines())
def test_an_impossible_combination_is_told(errors, message):
    (line,) = errors(**{name.lower(): value for name, value in re.findall(r"(\w+)=(\d+)", message)})
    assert line.startswith(message)


def test_all_impossible_combinations_are_told_together(errors):
    assert len(errors(train_batch_tokens=31, val_batch_size=31, model_dim=15)) == 3


def test_settings_of_a_fork_are_checked_too(errors, monkeypatch):
    class Mine(tg.Hyperparameters):
        beta1 = 1.0
        my_width: int = -2

    monkeypatch.setattr(tg, "Hyperparameters", Mine)
    assert [line.split(":")[0] for line in errors()] == ["BETA1=1.0", "MY_WIDTH=-2"]


MISSPELT = "ITERATION=ITERATIONS RUNID=RUN_ID WARMUPSTEPS=WARMUP_STEPS num_layers=NUM_LAYERS DATAPATH=DATA_PATH"


@pytest.mark.parametrize("pair", MISSPELT.split())
def test_a_misspelt_variable_is_told_with_the_setting_that_is_meant(errors, monkeypatch, pair):
    name, meant = pair.split("=")
    monkeypatch.setenv(name, "5")
    assert errors() == [f"{name} is not a setting: did you mean {meant}? Rename it, or unset it"]


ORDINARY = """LR EPOCHS STEPS SEEDS BATCH_SIZE NUM_WORKERS NUM_THREADS MODEL_DIR MODEL_NAME DATA_DIR DATA_ROOT LOG_DIR
OUTPUT_DIR OPENBLAS_NUM_THREADS MLX_DISABLE_COMPILE MLX_HOSTFILE WORLD_SIZE PATH HOME GITHUB_RUN_ID WANDB_DIR"""


@pytest.mark.parametrize("name", ORDINARY.split())
def test_other_variables_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "0.1")
    assert tg.setting_problems(tg.Hyperparameters()) == []


def test_a_variable_that_a_fork_knows_is_left_alone(monkeypatch):
    class Mine(tg.Hyperparameters):
        iteration = 3

    monkeypatch.setenv("ITERATION", "5")
    assert tg.setting_problems(Mine()) == []


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("DATA_PATH=none", ["none/fineweb_val_*.bin", "DATA_PATH", "data/prepare.py"]),
        ("TOKENIZER_PATH=none.model", ["TOKENIZER_PATH=none.model: no such file", "data/prepare.py"]),
        ("TOKENIZER_PATH=tiny.vocab", ["TOKENIZER_PATH=tiny.vocab: must be", ".model"]),
        ("VOCAB_SIZE=319", ["VOCAB_SIZE=319", "TOKENIZER_PATH=", "tiny.model", "320"]),
        ("RESUME=none.safetensors", ["none.safetensors"]),
        ("OUT_DIR=/dev/null/x", ["/dev/null"]),
    ],
)
def test_a_path_that_does_not_fit_is_told(errors, setting, parts):
    name, value = setting.split("=")
    (line,) = errors(**{name.lower(): value})
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("size", [0, 7, 1000, -7])
def test_a_damaged_tokenizer_is_told(errors, tmp_path, tokenizer_proto, size):
    path = tmp_path / "damaged.model"
    path.write_bytes(tokenizer_proto[:size])
    (line,) = errors(tokenizer_path=path)
    assert f"TOKENIZER_PATH={path}" in line


SHARDS = {"fineweb_train_000000.bin": 1000, "fineweb_train_000001.bin": 5000, "fineweb_val_000000.bin": 409}


@pytest.fixture
def shards(tmp_path):
    """A folder with a copy of the data's shards, and room for a manifest above it."""
    for name, count in SHARDS.items():
        write_shard(tmp_path / "datasets/tiny" / name, learnable_tokens(count, 320, 7))
    return tmp_path / "datasets/tiny"


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize(("ids", "count", "message"), [([5], 2, "damaged"), ([], 0, "has no"), ([320], 1, "token 0")])
def test_a_shard_that_cannot_be_used_is_told(errors, shards, name, ids, count, message):
    write_shard(shards / name, ids, count=count)
    (line,) = errors(data_path=shards)
    assert line.startswith(f"{shards / name}: {message}")


def test_every_validation_token_is_checked(errors, shards):
    path = write_shard(shards / "fineweb_val_000001.bin", [1] * 200_000 + [320])
    (line,) = errors(data_path=shards)
    assert line.startswith(f"{path}: token 200000 is 320")


MANIFESTS = """\
other.vocab: {"datasets": [{"name": "tiny", "tokenizer_name": 1}], "tokenizers": [{"name": 1, "path": "other.vocab"}]}
2 training shards: {"datasets": [{"name": "tiny", "stats": {"files_train": 1}}]}
damaged: {"datasets": [{"name": "tiny", "stats": {"files_train": "2"}}]}
damaged: {"datasets": [{"name": "tiny", "tokenizer_name": ["t"]}]}
damaged: []
damaged: \xff"""


@pytest.mark.parametrize("case", MANIFESTS.splitlines())
def test_a_manifest_that_does_not_fit_is_told(errors, shards, case):
    message, manifest = case.split(": ", 1)
    path = shards.parent.parent / "manifest.json"
    path.write_bytes(manifest.encode("latin-1"))
    (line,) = errors(data_path=shards)
    assert str(path) in line
    assert message in line


STATUSES = {
    tg.InputError: 2,
    OSError: 2,
    NotImplementedError: 2,
    RuntimeError: 2,
    tg.RunError: 1,
    KeyboardInterrupt: 130,
}


@pytest.mark.parametrize(("error", "status"), STATUSES.items())
def test_the_exit_status_says_what_happened(monkeypatch, capsys, error, status):
    monkeypatch.setattr(tg, "main", lambda: (_ for _ in ()).throw(error("one\ntwo")))
    assert tg.command_line([]) == status
    assert capsys.readouterr().err == "error: one\nerror: two\n"
