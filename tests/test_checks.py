"""What is found wrong before a run begins: settings, names and paths, data and tokenizer, and misspelt variables."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt_mlx as tg
from helpers import learnable_tokens, write_shard
from runs import MODEL

SETTINGS = {setting.variable: setting for setting in tg.settings_of(tg.Hyperparameters).values()}
NUMBERS = {name: type(setting.default) for name, setting in SETTINGS.items()
           if type(setting.default) in (int, float, bool)}  # fmt: skip
# Zero or less means "off" for these; the schedule and the clipping say so.
ANY_SIGN = {"WARMDOWN_ITERS", "MAX_WALLCLOCK_SECONDS", "GRAD_CLIP_NORM", "QK_GAIN_INIT"}
NOT_ZERO = {"TRAIN_BATCH_TOKENS", "VAL_BATCH_SIZE", "GRAD_ACCUM_STEPS", "TRAIN_SEQ_LEN", "MLX_MAX_MICROBATCH_TOKENS",
            "VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "TIED_EMBED_INIT_STD",
            "LOGIT_SOFTCAP", "ROPE_BASE", "ADAM_EPS"}  # fmt: skip
BELOW_ONE = {"BETA1", "BETA2", "MUON_MOMENTUM", "MUON_MOMENTUM_WARMUP_START"}


def wrong_texts(name: str) -> list[str]:
    texts = ["", "x", "1 2", "nan", "inf", "-inf", "1e999", "None", "٣x", "9" * 40]  # the last is none for MLX
    if NUMBERS[name] is bool:
        return [*texts, "2", "-1", "yes", "true", "0.0", "01"]
    texts += ["1.5", "1e3"] if NUMBERS[name] is int else []
    texts += [] if name in ANY_SIGN else ["-1", "-7"]
    texts += ["0"] if name in NOT_ZERO else []
    texts += ["1", "1.5"] if name in BELOW_ONE else []
    return texts + {"VOCAB_SIZE": ["65537", "1000000"], "SEED": [str(2**64)]}.get(name, [])


@pytest.fixture
def checked(data, tmp_path, monkeypatch):
    """Check the settings of a tiny run as a run does at its start, with some variables changed."""
    tiny = {**MODEL, "data_path": data / "datasets/tiny", "tokenizer_path": data / "tokenizers/tiny.model",
            "out_dir": tmp_path / "out", "run_id": "r"}  # fmt: skip

    def check(changes: dict | None = None) -> list[str]:
        """The messages, one for each thing that is wrong."""
        with monkeypatch.context() as patch:
            for name, value in {**tiny, **(changes or {})}.items():
                patch.setenv(name.upper(), str(value))
            try:
                tg.read_inputs(tg.Hyperparameters())
            except (tg.InputError, NotImplementedError) as error:
                return str(error).splitlines()
            finally:
                assert list(tmp_path.iterdir()) == []  # nothing is written, right or wrong
        return []

    return check


def test_a_right_one_passes(checked):
    assert checked() == []


@pytest.mark.parametrize("name", NUMBERS)
def test_each_wrong_number_is_named_with_its_value_and_what_is_allowed(checked, name):
    for text in wrong_texts(name):
        messages = checked({name: text})
        found = [line for line in messages if line.startswith(f"{name}=")]
        assert any(re.match(rf"{name}='?{re.escape(text)}", line) or float(text) for line in found), (text, messages)
        assert any("must be" in line for line in found), messages


@pytest.mark.parametrize(
    ("name", "texts"),
    [("WARMDOWN_ITERS", ["0", "-1"]), ("MAX_WALLCLOCK_SECONDS", ["0", "-1", "0.5"]), ("GRAD_CLIP_NORM", ["-1"]),
     ("SEED", ["0", str(2**64 - 1)]), ("ITERATIONS", ["0"]), ("BETA1", ["0", "0.999"]), ("MATRIX_LR", ["0", "1"]),
     ("MUON_BACKEND_STEPS", ["0"]), ("VAL_MAX_TOKENS", ["16"]),
     ("LOGIT_CHUNK_TOKENS", ["0"]), ("QK_GAIN_INIT", ["-1", "0"])],
)  # fmt: skip
def test_values_at_the_edge_are_let_through(checked, name, texts):
    assert [checked({name: text}) for text in texts] == [[] for _ in texts]


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_all_wrong_numbers_are_told_at_once(checked, draw):
    names = draw.draw(st.lists(st.sampled_from(sorted(NUMBERS)), unique=True, min_size=2, max_size=8))
    messages = checked({name: draw.draw(st.sampled_from(wrong_texts(name)), name) for name in names})
    for name in names:
        assert any(line.startswith(f"{name}=") for line in messages), (name, messages)


def test_wrong_ones_of_every_kind_are_told_at_once_and_the_way_to_get_data_only_once(checked, tmp_path):
    messages = checked({"iterations": "ten", "beta1": 1.5, "num_heads": 3, "run_id": "a/b", "tie_embeddings": 0,
                        "data_path": tmp_path / "none", "tokenizer_path": tmp_path / "none.model",
                        "out_dir": "/dev/null/x", "resume": "none.safetensors", "val_batch_size": 16})  # fmt: skip
    starts = ["ITERATIONS='ten': must be a whole number >= 0", "BETA1=1.5: must be a finite number >= 0 and < 1",
              "RUN_ID='a/b'", "RESUME=none.safetensors: no such file", "OUT_DIR=/dev/null/x: cannot be written",
              f"DATA_PATH={tmp_path}/none: no such folder", "TIE_EMBEDDINGS=0", "MODEL_DIM=16 must be a multiple of",
              "VAL_BATCH_SIZE=16 over GRAD_ACCUM_STEPS=2 is 8", f"TOKENIZER_PATH={tmp_path}/none.model"]  # fmt: skip
    assert len(messages) == len(starts), messages
    for start, message in zip(starts, messages, strict=True):
        assert message.startswith(start)
    assert "\n".join(messages).count("python data/prepare.py") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 15}, "MODEL_DIM=15 must be a multiple of NUM_HEADS=2"),
        ({"num_heads": 4, "num_kv_heads": 3}, "NUM_HEADS=4 must be a multiple of NUM_KV_HEADS=3"),
        ({"model_dim": 6}, "MODEL_DIM=6 / NUM_HEADS=2 must be even"),
        ({"train_batch_tokens": 31}, "TRAIN_BATCH_TOKENS=31 over GRAD_ACCUM_STEPS=2 is 15 tokens: must be at least "
                                     "TRAIN_SEQ_LEN=16"),
        ({"val_batch_size": 31}, "VAL_BATCH_SIZE=31 over GRAD_ACCUM_STEPS=2 is 15 tokens"),
        ({"val_max_tokens": 15}, "VAL_MAX_TOKENS=15: must be 0 or at least TRAIN_SEQ_LEN"),
        ({"compute_dtype": ""}, "COMPUTE_DTYPE='': must be auto, bfloat16 or float32"),
        ({"mlx_preload_blas": "no"}, "MLX_PRELOAD_BLAS='no': must be 0 or 1"),
        ({"data_path": ""}, "DATA_PATH=: must be not empty"),
        ({"out_dir": ""}, "OUT_DIR=: must be not empty"),
        ({"resume": "a", "eval_artifact": "b"}, "RESUME trains and EVAL_ARTIFACT does not"),
        ({"eval_artifact": "none.npz"}, "EVAL_ARTIFACT=none.npz: no such file"),
        ({"eval_artifact": "/tmp"}, "EVAL_ARTIFACT=/tmp: no such file"),
        ({"resume": "/tmp"}, "RESUME=/tmp: no such file"),
        ({"vocab_size": 319}, "VOCAB_SIZE=319, but TOKENIZER_PATH="),
        ({"tokenizer_path": "x.vocab"}, "TOKENIZER_PATH=x.vocab: must be a SentencePiece model, ending in .model"),
    ],
    ids=str,
)  # fmt: skip
def test_combinations_and_paths(checked, changes, message):
    messages = checked(changes)
    assert any(line.startswith(message) for line in messages), messages


@pytest.mark.parametrize("run_id", ["", "a/b", "..", ".", "/abs", "x" * 201, "é" * 101, "a\nb", "tab\t", "\udcff"])
def test_run_id_that_would_not_be_a_file_name(checked, run_id):
    assert [line for line in checked({"run_id": run_id}) if line.startswith("RUN_ID=")]


@pytest.mark.parametrize("run_id", ["x" * 200, "é" * 100, "a b", "a..b", "-x", "run:1", "[x]*?"])
def test_run_id_that_is_one(checked, run_id):
    assert checked({"run_id": run_id}) == []


def test_resume_auto_needs_a_run_id(checked, monkeypatch):
    assert checked({"resume": "auto"}) == []
    real = os.environ.__contains__
    monkeypatch.setattr(os.environ.__class__, "__contains__", lambda self, name: name != "RUN_ID" and real(name))
    assert checked({"resume": "auto"}) == ["RESUME=auto: set RUN_ID, to say whose checkpoint is meant"]


def test_out_dir_must_be_one_that_can_be_written(checked, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("out")
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to(folder / "nowhere")
    for path in (folder / "file", folder / "file/sub", folder / "dangling", folder / "dangling/sub"):
        (message,) = checked({"out_dir": path})
        assert message.startswith(f"OUT_DIR={path}: cannot be written to")
    assert checked({"out_dir": folder / "new/and/deeper"}) == []
    for lacking in (os.W_OK, os.X_OK):  # taking permissions away would not stop the superuser
        monkeypatch.setattr(os, "access", lambda path, mode, lacking=lacking: not mode & lacking)
        (message,) = checked({"out_dir": folder})
        assert message.startswith(f"OUT_DIR={folder}: cannot be written to")


def test_out_dir_that_fails_only_when_it_is_made(run):
    done = run(out_dir="/proc/nothing/here")
    assert (done.code, done.out) == (2, [])
    assert re.fullmatch("error: OUT_DIR=/proc/nothing/here: .*\n", done.err)


def test_tokenizer_that_is_none(checked, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tokenizer")
    whole = (data / "tokenizers/tiny.model").read_bytes()
    for number, content in enumerate((b"", b"hello", whole[:-7], whole[50:], b"\xff" * 1000)):
        path = folder / f"{number}.model"
        path.write_bytes(content)
        (message,) = checked({"tokenizer_path": path})
        assert message.startswith(f"TOKENIZER_PATH={path}: is not a SentencePiece model") or "pieces" in message


def test_settings_assigned_in_code_are_checked_at_the_start_of_a_run(checked, data):
    args = tg.Hyperparameters()
    args.num_heads, args.beta1, args.iterations, args.run_id = 0, float("nan"), 2.5, None
    args.mlx_eager_eval = 2
    args.matrix_lr, args.mlp_mult = np.float32(0.1), np.int64(2)  # these are numbers, too
    with pytest.raises(tg.InputError) as caught:
        tg.read_inputs(args)
    names = [line.split("=")[0] for line in str(caught.value).splitlines()]
    assert names[:5] == ["RUN_ID", "ITERATIONS", "MLX_EAGER_EVAL", "NUM_HEADS", "BETA1"]
    assert not {"MATRIX_LR", "MLP_MULT"} & set(names)


def test_a_check_that_fails_by_itself_is_not_hidden(checked, monkeypatch):
    monkeypatch.setattr(tg, "check_shards", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="failed"):
        checked()


def test_a_subclass_is_checked_by_the_rules_of_what_it_replaces(data):
    class Mine(tg.Hyperparameters):
        num_layers = 0
        my_setting = tg.Setting("mine", 3, "a setting of a fork", ">= 2")

    args = Mine()
    args.my_setting = 1
    with pytest.raises(tg.InputError, match=r"(?s)NUM_LAYERS=0: must be.*MY_SETTING=1: must be a whole number >= 2"):
        tg.read_inputs(args)


MISSPELT = {
    "TRAIN_BATCH_TOKEN": "TRAIN_BATCH_TOKENS", "ITERATION": "ITERATIONS", "WARMUPSTEPS": "WARMUP_STEPS",
    "VALLOSSEVERY": "VAL_LOSS_EVERY", "MAX_WALL_CLOCK_SECONDS": "MAX_WALLCLOCK_SECONDS", "num_layers": "NUM_LAYERS",
    "NUM_LAYER": "NUM_LAYERS", "NUM_HEAD": "NUM_HEADS", "CHECKPOINTEVERY": "CHECKPOINT_EVERY", "RUNID": "RUN_ID",
    "CHECKPOINT_EVRY": "CHECKPOINT_EVERY", "VAL_MAX_TOKEN": "VAL_MAX_TOKENS", "EVAL_ARTEFACT": "EVAL_ARTIFACT",
    "RESUMES": "RESUME", "COMPUTE_DTYPES": "COMPUTE_DTYPE", "MLX_PRELOAD_BLASS": "MLX_PRELOAD_BLAS",
    "TRAIN_MAX_SEQLEN": "TRAIN_MAX_SEQ_LEN", "DATAPATH": "DATA_PATH", "TOKENISER_PATH": "TOKENIZER_PATH",
}  # fmt: skip
ORDINARY = """
PATH HOME USER SHELL LANG LC_ALL TERM PWD OLDPWD SHLVL _ LOGNAME MAIL EDITOR PAGER DISPLAY TMPDIR TZ HOSTNAME
SSH_AUTH_SOCK SSH_CONNECTION XDG_RUNTIME_DIR XPC_FLAGS XPC_SERVICE_NAME COLORTERM __CF_USER_TEXT_ENCODING COMMAND_MODE
TERM_PROGRAM TERM_PROGRAM_VERSION TERM_SESSION_ID VIRTUAL_ENV PYTHONPATH PYTHONUNBUFFERED CONDA_PREFIX CONDA_SHLVL
HOMEBREW_PREFIX HF_HOME HF_TOKEN HF_ENDPOINT WANDB_API_KEY WANDB_DIR OMP_NUM_THREADS MKL_NUM_THREADS NUM_THREADS
OPENBLAS_NUM_THREADS VECLIB_MAXIMUM_THREADS CUDA_VISIBLE_DEVICES CI GITHUB_RUN_ID GITHUB_SHA RUNNER_TEMP MODEL_DIR
MODEL_PATH MODEL_NAME DATA_DIR DATA_ROOT LOG_DIR LOG_LEVEL OUTPUT_DIR CACHE_DIR BATCH_SIZE NUM_WORKERS LEARNING_RATE
LR EPOCHS STEPS DEBUG VERBOSE SPEED SEEDS MLX_DISABLE_COMPILE MLX_METAL_FAST_SYNCH MLX_MAX_OPS_PER_BUFFER MLX_RANK
MLX_HOSTFILE MATCHED_FINEWEB_REPO_ID WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT
"""


@pytest.mark.parametrize(("name", "meant"), MISSPELT.items())
def test_misspelt_variable(monkeypatch, name, meant):
    monkeypatch.setenv(name, "1")
    assert tg.misspelt_settings() == [f"WARNING: {name} is set, but is no setting: was {meant} meant?"]


def test_ordinary_and_right_variables_are_not_taken_for_misspelt(monkeypatch):
    names = [*ORDINARY.split(), *SETTINGS, "TRAIN_MAX_SEQ_LEN", "COMPUTE_DTYPE"]
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "1"))
    assert tg.misspelt_settings() == []


def test_a_forks_settings_are_known(monkeypatch):
    class Mine(tg.Hyperparameters):
        iteration = tg.Setting("mine", 3, "a setting of a fork")

    monkeypatch.setenv("ITERATION", "1")
    assert tg.misspelt_settings(Mine) == []


@pytest.mark.slow
def test_misspelt_variable_is_told_in_the_log_and_with_an_error(run):
    warning = "WARNING: ITERATION is set, but is no setting: was ITERATIONS meant?"
    done = run(iteration=3, iterations=0, mlx_disable_compile=1)
    assert done.code == 0
    assert warning in done.out
    assert warning in done.log()
    assert run(iteration=3, iterations="x").err.splitlines()[1:] == [warning]


class TestData:
    """What is wrong with shards is found before the run where that is cheap, and when they are opened otherwise."""

    @pytest.fixture
    def broken(self, data, tmp_path_factory):
        """A copy of the data; returns its folder of shards."""
        root = tmp_path_factory.mktemp("broken")
        for kind, number, count in (("train", 0, 1000), ("train", 1, 5000), ("val", 0, 409)):
            write_shard(root / f"datasets/tiny/fineweb_{kind}_{number:06d}.bin", learnable_tokens(count, 320, 7))
        return root / "datasets/tiny"

    @pytest.mark.parametrize("name", ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"magic": 7}, "magic 7"), ({"version": 2}, "version 2"), ({"count": 10}, "must have 1044"),
         ({"count": 3}, "must have 1030"), ({"tokens": []}, "has no tokens")], ids=str)  # fmt: skip
    def test_broken_shard(self, checked, broken, name, changes, message):
        write_shard(broken / name, **{"tokens": [1, 2, 3, 4], **changes})
        messages = checked({"data_path": broken})
        assert messages[0].startswith(f"{broken / name}: ")
        assert message in messages[0]

    @pytest.mark.parametrize(("name", "position"), [("fineweb_train_000000.bin", 127), ("fineweb_val_000000.bin", 408)])
    def test_token_id_without_an_embedding(self, checked, broken, name, position):
        path = broken / name
        tokens = tg.load_data_shard(path)
        tokens[position] = 319
        write_shard(path, tokens)
        assert checked({"data_path": broken}) == []
        tokens[position] = 320
        write_shard(path, tokens)
        (message,) = checked({"data_path": broken})
        assert message.startswith(f"{path}: token {position} is 320, but VOCAB_SIZE=320")

    def test_no_shards(self, checked, broken):
        for kind in ("train", "val"):
            for path in broken.glob(f"fineweb_{kind}_*"):
                path.unlink()
            messages = checked({"data_path": broken})
            assert any(f"no shards match {broken}/fineweb_{kind}_*.bin" in line for line in messages)
        assert any(f"no shards match {broken}/fineweb_train_*.bin" in line for line in messages)  # both are told of

    def test_file_that_cannot_be_read(self, checked, broken):
        (broken / "fineweb_train_000002.bin").mkdir()
        assert checked({"data_path": broken}) == [f"{broken}/fineweb_train_000002.bin: Is a directory"]

    def test_without_text_there_is_no_score(self, broken):
        args = tg.Hyperparameters()
        args.train_seq_len, args.val_batch_size, args.grad_accum_steps = 2, 2, 1
        empty = np.zeros(4, np.int16), np.zeros(4, bool), np.ones(4, bool)
        with pytest.raises(ValueError, match="the 2 validation tokens stand for no bytes of text"):
            tg.eval_val(args, lambda x, y: tg.mx.array(1.0), np.array([1, 2, 3]), *empty)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "null", "3", '"x"', "{}", '{"datasets": null}', '{"datasets": {}}', '{"datasets": [3]}',
         '{"datasets": [{}]}', '{"datasets": [{"name": 3}]}', '{"datasets": [{"name": "tiny"}]}',
         '{"datasets": [{"name": "tiny", "stats": {}}]}', '{"datasets": [{"name": "tiny", "stats": null}]}',
         '{"datasets": [{"name": "tiny", "stats": {"files_train": "2"}}]}',
         '{"datasets": [{"name": "tiny", "tokenizer_name": 3}]}', "\xff\xfe",
         '{"datasets": [{"name": "tiny", "tokenizer_name": "t"}], "tokenizers": 3}',
         '{"datasets": [{"name": "tiny", "tokenizer_name": "t"}], "tokenizers": [{}]}'],
    )  # fmt: skip
    def test_manifest_that_cannot_be_used(self, checked, broken, content):
        path = broken.parent.parent / "manifest.json"
        path.write_bytes(content.encode("latin-1"))
        (message,) = checked({"data_path": broken})
        assert message.startswith(f"{path}: ")

    @pytest.mark.parametrize(
        "entry", [{"tokenizer_name": "t"}, {"stats": {"files_train": 2}}, {"tokenizer_name": "t", "x": 1}], ids=str
    )
    def test_manifest_with_as_little_as_needed(self, checked, broken, entry):
        content = {"datasets": [{"name": "tiny", **entry}, {"name": "other"}], "tokenizers": [{"name": "t"}]}
        (broken.parent.parent / "manifest.json").write_text(json.dumps(content))
        assert checked({"data_path": broken}) == []


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_shards_are_refused_by_name_and_never_misread(tmp_path_factory, draw):
    path = tmp_path_factory.mktemp("shard", numbered=True) / "s.bin"
    whole = write_shard(path, range(50)).read_bytes()
    kind = draw.draw(st.sampled_from(["cut", "longer", "flip"]))
    if kind == "cut":
        damaged = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    elif kind == "longer":
        damaged = whole + draw.draw(st.binary(min_size=1, max_size=40))
    else:
        position = draw.draw(st.integers(0, 11))  # magic, version, count
        damaged = whole[:position] + bytes([whole[position] ^ draw.draw(st.integers(1, 255))]) + whole[position + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(tg.InputError, match=re.escape(str(path))):
        tg.load_data_shard(path)


class TestStream:
    """A stream finds what is wrong when it opens a file or takes a slice, and says where."""

    def stream(self, folder: Path, *shards, **options) -> tg.TokenStream:
        for number, tokens in enumerate(shards):
            write_shard(folder / f"s_{number}.bin", tokens)
        return tg.TokenStream(str(folder / "s_*.bin"), **options)

    def test_empty_shard_is_refused_where_it_is_met(self, tmp_path):
        with pytest.raises(ValueError, match=r"s_0\.bin: has no tokens"):
            self.stream(tmp_path, [], [])
        stream = self.stream(tmp_path, [1, 2], [])
        assert stream.take(2).tolist() == [1, 2]
        with pytest.raises(ValueError, match=r"s_1\.bin: has no tokens"):
            stream.take(1)

    def test_broken_shard_is_refused_at_the_switch(self, tmp_path):
        stream = self.stream(tmp_path, [1, 2], [3, 4])
        write_shard(tmp_path / "s_1.bin", [3, 4], count=9)
        with pytest.raises(ValueError, match=r"s_1\.bin"):
            stream.take(3)

    def test_id_is_refused_in_the_slice_that_has_it_with_file_position_and_id(self, tmp_path):
        stream = self.stream(tmp_path, [1, 2, 3, 4], [5, 6, 9, 7], vocab_size=9)
        assert stream.take(6).tolist() == [1, 2, 3, 4, 5, 6]
        with pytest.raises(ValueError, match=r"s_1\.bin: token 2 is 9, but VOCAB_SIZE=9"):
            stream.take(1)
        assert self.stream(tmp_path, [1, 2, 3, 4], [5, 6, 9, 7]).take(8).tolist()[6] == 9  # nobody asked

    def test_loader_passes_the_vocabulary_on(self, tmp_path):
        write_shard(tmp_path / "s.bin", range(40))
        loader = tg.TokenLoader(str(tmp_path / "s.bin"), vocab_size=33)
        loader.next_batch(16, 8)
        with pytest.raises(ValueError, match="token 33 is 33"):
            loader.next_batch(16, 8)

    def test_seek_goes_on_from_a_position(self, tmp_path):
        stream = self.stream(tmp_path, [1, 2, 3], [4, 5])
        stream.take(9)
        position = stream.file_idx, stream.pos, stream.epoch
        expected = stream.take(7).tolist()
        other = tg.TokenStream(str(tmp_path / "s_*.bin"))
        other.seek(*position)
        assert other.take(7).tolist() == expected
        assert (other.file_idx, other.pos, other.epoch) == (stream.file_idx, stream.pos, stream.epoch)
