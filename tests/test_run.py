"""Whole runs of the script as a user starts them: the log, the files, the score, and what ends a run."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import zlib

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

import train_gpt_mlx as tg
from helpers import REPO, build_model, settings
from runs import MODEL, ON_CPU, SCRIPT, Outcome

pytestmark = pytest.mark.slow

NUMBER = r"\d+\.\d{4}"
TIMES = r"train_time:\d+ms step_avg:\d+\.\d\dms"


def test_every_log_line_in_its_order_and_every_file(run, data):
    done = run(iterations=12, train_log_every=4, val_loss_every=5, warmup_steps=2)
    assert (done.code, done.err) == (0, "")
    train = [rf"step:{s}/12 train_loss:{NUMBER} {TIMES} tok_s:\d+" for s in range(1, 13)]
    val = {s: ["val_progress:1/4", "val_progress:4/4", rf"step:{s}/12 val_loss:{NUMBER} val_bpb:{NUMBER} {TIMES}"]
           for s in (0, 5, 10, 12)}  # fmt: skip
    blas = [r"cpu_blas:(openblas|accelerate|reference .*)"] if ON_CPU else []
    # Parameters: a 320 x 16 embedding; per block 256 + 128 + 128 + 256 + 512 + 512 in matrices and 2 + 64 in vectors.
    expected = [
        rf"{re.escape(str(done.folder))}/r\.txt",
        "run_id:r",
        f"mlx_version:{mx.__version__}",
        rf"train_loader:shards pattern={data}/datasets/tiny/fineweb_train_\*\.bin",
        rf"val_loader:shards pattern={data}/datasets/tiny/fineweb_val_\*\.bin tokens:400",
        "train_loader:dataset:tiny train_shards:2",
        f"tokenizer_path:{data}/tokenizers/tiny.model",
        f"model_params:{320 * 16 + 2 * (1792 + 66) + 16} vocab_size:320 layers:2 dim:16 heads:2 kv_heads:1 seq_len:16 "
        "tie_embeddings:True",
        "iterations:12 train_batch_tokens:128 grad_accum_steps:2 microbatch_tokens:64 microbatch_batch_size:4 "
        r"val_batch_size:256 warmup_steps:2 max_wallclock_seconds:600\.000",
        "mlx_max_microbatch_tokens:48", "world_size:1",
        r"optimizer:muon\+adam muon_matrix_params:12 scalar_params:9 embed_lr:0\.05 matrix_lr:0\.04 scalar_lr:0\.04 "
        r"muon_momentum:0\.95 muon_steps:5",
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data}/tokenizers/tiny.model",
        r"compute_dtype:mlx\.core\.float32 compile:True",
        r"dtypes tok_emb:mlx\.core\.float32 linear_weight:mlx\.core\.float32 skip_weights:mlx\.core\.float32",
        *blas,
        "warmup: two chunks, an optimizer step and a validation batch of each size, off the clock",
        "warmup_step:1/2",
        "warmup_step:2/2",
        *val[0], *train[:5], *val[5], *train[5:10], *val[10], train[11], *val[12],
        rf"saved_model:{done.folder}/r_mlx_model\.npz bytes:\d+",
        r"serialized_model_int8_zlib:\d+ bytes \(payload:\d+ raw_pickle:\d+ payload_ratio:\d+\.\d\dx\)",
        rf"Code size: {SCRIPT.stat().st_size} bytes",
        r"Total submission size int8\+zlib: \d+ bytes \(under the cap of 16000000 bytes\)",
        "val_progress:1/4", "val_progress:4/4",
        rf"final_int8_zlib_roundtrip val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
        r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    ]  # fmt: skip
    for line, pattern in zip(done.out, expected, strict=False):
        assert re.fullmatch(pattern, line)
    assert len(done.out) == len(expected)
    assert done.files() == ["r.txt", "r_mlx_model.int8.ptz", "r_mlx_model.npz"]
    head, rest = (done.folder / "r.txt").read_text(encoding="utf-8").split("\n" + "=" * 100 + "\n", 1)
    assert head.rstrip("\n") == SCRIPT.read_text(encoding="utf-8").rstrip("\n")
    versions, rest = rest.split("\n" + "=" * 100 + "\n", 1)
    assert sys.version.split()[0] in versions
    assert mx.__version__ in versions
    assert rest.splitlines() == done.out[1:]  # the console has the log's path instead of its head
    assert done.losses()[0] > 5.5  # log(320) = 5.77
    assert done.losses()[-1] < done.losses()[0] - 0.5


def test_files_hold_what_the_log_says(run, data, tokenizer):
    done = run(iterations=6)
    npz, ptz = done.folder / "r_mlx_model.npz", done.folder / "r_mlx_model.int8.ptz"
    assert done.lines(f"bytes:{npz.stat().st_size}$")
    weights = mx.load(str(npz))
    args = settings(**MODEL)
    model = build_model(args)
    names = {key for key, _ in tg.tree_flatten(model.parameters())}
    assert weights.keys() == names

    raw = zlib.decompress(ptz.read_bytes())
    _, stats = tg.quantize_state_dict_int8(dict(weights))
    assert pickle.loads(raw)["__quant_format__"] == "int8_clean_per_row_v1"
    ratio = stats["baseline_tensor_bytes"] / stats["int8_payload_bytes"]
    assert done.lines(
        rf"serialized_model_int8_zlib:{ptz.stat().st_size} bytes "
        rf"\(payload:{stats['int8_payload_bytes']} raw_pickle:{len(raw)} payload_ratio:{ratio:.2f}x\)"
    )
    total = ptz.stat().st_size + SCRIPT.stat().st_size
    assert done.lines(rf"Total submission size int8\+zlib: {total} bytes")

    # Both figures are repeated from the files alone.
    tokens = tg.load_validation_tokens(str(data / "datasets/tiny/fineweb_val_*.bin"), 16)
    tables = tg.build_sentencepiece_luts(tokenizer, 320)
    for state, line, digits in ((weights, "step:6/6 val_loss", 4),
                                (tg.dequantize_state_dict_int8(pickle.loads(raw)), "roundtrip_exact", 8)):  # fmt: skip
        model.update(tree_unflatten(list(state.items())))
        val_loss, val_bpb = tg.eval_val(args, model.loss, tokens, *tables)
        found = re.search(r"val_loss:(\S+) val_bpb:(\S+)", done.lines(line)[0])
        assert [float(f) for f in found.groups()] == pytest.approx([val_loss, val_bpb], abs=10**-digits, rel=1e-5)


def test_one_seed_gives_one_run_and_another_seed_another(run):
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    assert len(first.losses()) == 4
    assert first.same_as(again)
    assert first.losses() != other.losses()


def test_files_of_an_earlier_run_are_moved_aside(run):
    assert not run(iterations=0).lines("moved_aside")
    second = run(iterations=1)
    folder = second.folder
    names = ["r.txt", "r_mlx_model.npz", "r_mlx_model.int8.ptz"]
    assert [line.split(" (")[0] for line in second.lines("moved_aside")] == [
        f"moved_aside:{folder}/{name} to:{folder}/{name}.1" for name in names]  # fmt: skip
    assert "iterations:0 " in (folder / "r.txt.1").read_text()
    assert "iterations:1 " in (folder / "r.txt").read_text()
    kept = (folder / "r_mlx_model.npz.1").read_bytes()
    (folder / "r_mlx_model.npz").unlink()  # a run that died before it saved
    third = run(iterations=2)
    assert len(third.lines("moved_aside")) == 2
    assert (folder / "r.txt.2").exists()
    assert not (folder / "r_mlx_model.npz.2").exists()
    assert (folder / "r_mlx_model.npz.1").read_bytes() == kept


def test_no_iterations_scores_the_untrained_model(run):
    done = run(iterations=0)
    assert done.code == 0
    assert done.losses() == []
    assert done.lines("^warmup_step:1/1")
    assert done.lines(rf"^step:0/0 val_loss:5\.7\d+ val_bpb:{NUMBER} train_time:0ms step_avg:0\.00ms$")
    assert 5.7 < done.score() < 5.9
    assert not done.lines("stopping_early")


def test_wallclock_cap_stops_after_the_step_that_reaches_it(run):
    done = run(iterations=100_000, max_wallclock_seconds=0.3, train_log_every=1)
    assert done.code == 0
    stop = done.lines("stopping_early")
    found = re.fullmatch(r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000", stop[0])
    train_ms, step = int(found[1]), int(found[2])
    assert train_ms >= 300
    times = [int(re.search(r"train_time:(\d+)ms", line)[1]) for line in done.lines("train_loss")]
    assert len(times) == step
    assert times[-1] == train_ms
    assert all(ms <= 300 for ms in times[:-1])
    position = done.out.index(stop[0])
    assert re.match(f"step:{step}/100000 val_loss", done.out[position - 1])
    assert done.out[position + 1].startswith("saved_model:")
    assert done.lines("^final_int8_zlib_roundtrip_exact")


def test_validation_is_off_the_clock(run):
    done = run(iterations=4, val_loss_every=1)
    trained = [int(re.search(r"train_time:(\d+)ms", line)[1]) for line in done.lines("train_loss")]
    validated = [int(re.search(r"train_time:(\d+)ms", line)[1]) for line in done.lines(r"^step:\d.*val_loss")]
    assert validated == [0, *trained]


def test_last_step_is_validated_once(run):
    done = run(iterations=4, val_loss_every=2)
    assert [line.split()[0] for line in done.lines(r"^step:.*val_loss")] == ["step:0/4", "step:2/4", "step:4/4"]
    assert not run(iterations=1).lines("step:0/1 val_loss")


def test_warmup_changes_nothing_and_logs_every_tenth_of_many(run):
    without, some, many = run(warmup_steps=0), run(warmup_steps=3), run(warmup_steps=21)
    assert without.same_as(some)
    assert without.same_as(many)
    assert without.lines("warmup_step:") == []
    assert some.lines("warmup_step:") == [f"warmup_step:{i}/3" for i in (1, 2, 3)]
    assert many.lines("warmup_step:") == [f"warmup_step:{i}/21" for i in (10, 20, 21)]


def test_epochs_are_announced_for_training_but_not_for_warmup(run):
    quiet = run(iterations=1, warmup_steps=60)  # warmup alone goes through the data once
    assert not quiet.lines("WARNING")
    done = run(iterations=50, train_log_every=0, warmup_steps=0)
    assert done.lines("WARNING") == ["WARNING: starting epoch:2 dataset:tiny train_shards:2"]
    assert done.losses() == []


def test_the_long_warmdown_is_announced_with_the_numbers(run):
    done = run(iterations=12, warmdown_iters=48, max_wallclock_seconds=0)
    assert len(done.lines("^warmdown:")) == 1
    assert done.lines(r"^warmdown:whole_run lr_mul:0\.1875 steps_that_fit:12 warmdown_iters:48 .*WARMDOWN_ITERS=12 ")
    assert not run(iterations=12, warmdown_iters=12, max_wallclock_seconds=0).lines("^warmdown:")
    capped = run(iterations=500, warmdown_iters=100_000, max_wallclock_seconds=2.0)
    found = re.search(r"lr_mul:(\S+) steps_that_fit:(\d+) warmdown_iters:100000 .*WARMDOWN_ITERS=(\d+) ",
                      capped.lines("^warmdown:")[0])  # fmt: skip
    third = re.search(r"train_time:(\d+)ms", capped.lines("^step:3/500")[0])
    step_ms = int(third[1]) / 3
    assert int(found[3]) == pytest.approx(2000 / step_ms, rel=0.05, abs=1)
    assert int(found[2]) == min(int(found[3]), 500)
    assert float(found[1]) == pytest.approx((2000 - 3 * step_ms) / (100_000 * step_ms), abs=1e-4)


def test_settings_reach_the_training(run):
    plain = run()
    for changes in ({"grad_clip_norm": 0.01}, {"matrix_lr": 0.0}, {"scalar_lr": 0.0}, {"tied_embed_lr": 0.0},
                    {"warmdown_iters": 8, "max_wallclock_seconds": 0},
                    {"muon_momentum_warmup_start": 0.0}):  # fmt: skip
        changed = run(**changes)
        assert changed.losses()[0] == pytest.approx(plain.losses()[0], abs=2e-4)  # of the untrained model
        assert changed.losses()[-1] != plain.losses()[-1], changes
    for changes in ({"logit_chunk_tokens": 10}, {"mlx_eager_eval": 0}):
        assert run(**changes).losses() == pytest.approx(plain.losses(), abs=2e-4)


def test_bfloat16_run(run):
    # Uncompiled: on a CPU, MLX compiles for a minute, once, what it runs in bfloat16.
    done = run(compute_dtype="bfloat16", iterations=3, mlx_disable_compile=1)
    assert done.code == 0
    assert done.lines(r"compute_dtype:mlx\.core\.bfloat16 compile:True")
    (dtypes,) = done.lines("^dtypes ")
    assert [field.split(".")[-1] for field in dtypes.split()[1:]] == ["bfloat16", "float32", "float32"]
    exact = run(iterations=3)
    assert done.losses() == pytest.approx(exact.losses(), rel=2e-2)


def test_manifest_counts_are_logged(run, data):
    manifest = data / "manifest.json"
    try:
        for expected, line in ((2, "train_loader:dataset:tiny train_shards:2/2"),
                               (5, "WARNING: train_loader:subset dataset:tiny train_shards:2/5 "
                                   "new epochs will arrive sooner than the full dataset")):  # fmt: skip
            manifest.write_text(f'{{"datasets": [{{"name": "tiny", "stats": {{"files_train": {expected}}}}}]}}')
            assert line in run(iterations=0).out
        manifest.write_text('{"datasets": [{"name": "tiny", "stats": {"files_train": 1}}]}')
        done = run()
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "2 training shards" in done.err
        manifest.write_text(
            '{"datasets": [{"name": "tiny", "tokenizer_name": "t"}], '
            '"tokenizers": [{"name": "t", "path": "other.model"}]}'
        )
        assert "made with other.model" in run().err
    finally:
        manifest.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": "ten"}, "ITERATIONS='ten': must be a whole number"),
        ({"compute_dtype": "fp16"}, "COMPUTE_DTYPE='fp16': must be auto, bfloat16 or float32"),
        ({"tie_embeddings": 0}, "TIE_EMBEDDINGS=0"),
        ({"data_path": "nowhere"}, "DATA_PATH=nowhere: no such folder.*`.venv/bin/python data/prepare.py`"),
        ({"tokenizer_path": "tiny.vocab"}, "TOKENIZER_PATH=tiny.vocab.*\\.model"),
        ({"tokenizer_path": "none.model"}, "TOKENIZER_PATH=none.model.*`.venv/bin/python data/prepare.py`"),
        ({"vocab_size": 1024}, "VOCAB_SIZE=1024.*320"),
        ({"train_batch_tokens": 30}, "TRAIN_BATCH_TOKENS=30 over GRAD_ACCUM_STEPS=2 is 15 tokens.*TRAIN_SEQ_LEN=16"),
        ({"val_batch_size": 30}, "VAL_BATCH_SIZE=30"),
        ({"model_dim": 15}, "MODEL_DIM=15"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_user_can_mend_is_told_in_one_line(run, changes, message):
    done = run(**changes)
    assert done.code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", done.err)
    assert not done.folder.exists()  # nothing was written


def test_command_line(run):
    for argument in ("--help", "-h"):
        done = run(argument)
        assert (done.code, done.err) == (0, "")
        assert "\n".join(done.out) == tg.help_text()
    for argument in ("--iterations", "x", "ITERATIONS=5"):
        done = run(argument)
        assert done.code == 2
        assert re.fullmatch(f"error: {argument}: settings are environment variables.*--help\n", done.err)
        assert not done.folder.exists()


def importing(before: str) -> tuple[str, ...]:
    """A command that runs main() from another program, after the statements in `before`."""
    after = f"import sys; sys.path.insert(0, {str(REPO)!r})\nimport train_gpt_mlx; train_gpt_mlx.main()"
    return ("-c", f"{before}\n{after}")


def openblas_is_installed() -> bool:
    code = "import ctypes; ctypes.CDLL('libopenblas.so.0')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not ON_CPU, reason="only MLX's Linux CPU build chooses between two BLAS")
class TestBlas:
    GLOBAL = "import ctypes; ctypes.CDLL('libopenblas.so.0', mode=ctypes.RTLD_GLOBAL)"

    def blas(self, done: Outcome) -> str:
        (line,) = done.lines("^cpu_blas:")
        return line.removeprefix("cpu_blas:")

    def test_reference_comes_with_a_hint(self, run):
        for changes in ({"mlx_preload_blas": 0}, {"script": importing("import mlx.core")}):
            blas = self.blas(run(iterations=0, **changes))
            assert re.fullmatch("reference .*apt-get install libopenblas0-pthread.*", blas)

    @pytest.mark.skipif(not openblas_is_installed(), reason="OpenBLAS is not installed on this machine")
    def test_openblas_is_told_truthfully(self, run):
        for changes in ({"mlx_preload_blas": 1}, {"script": importing("import numpy"), "mlx_preload_blas": 1},
                        {"script": importing(f"{self.GLOBAL}\nimport mlx.core"), "mlx_preload_blas": 0}):  # fmt: skip
            assert self.blas(run(iterations=0, **changes)) == "openblas"


def test_main_can_be_called_by_another_program_with_arguments_of_its_own(run):
    done = run("--their-own-flag", script=importing(""), iterations=1)
    assert (done.code, done.err) == (0, "")
    assert done.lines("^final_int8_zlib_roundtrip_exact")


def test_compiled_functions_see_new_weights():
    """Other people's scripts compile model.loss themselves, with the model's state as input and output."""
    args = settings(**MODEL)
    model = build_model(args)
    compiled = mx.compile(lambda x, y: model.loss(x, y), inputs=model.state, outputs=model.state)
    ids = mx.array(np.arange(32).reshape(2, 16))
    before = compiled(ids, ids).item()
    model.tok_emb.weight = model.tok_emb.weight * 40
    assert compiled(ids, ids).item() == pytest.approx(model.loss(ids, ids).item(), rel=1e-5)
    assert abs(compiled(ids, ids).item() - before) > 0.1


@pytest.mark.slow
def test_fork_that_replaces_a_setting_by_a_value_of_its_own(run):
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt_mlx as base
class Mine(base.Hyperparameters):
    run_id = "mine"
base.Hyperparameters = Mine
base.main()
"""
    done = run(script=("-c", code), iterations=1)
    assert (done.code, done.err) == (0, "")
    assert "mine_mlx_model.npz" in done.files()
