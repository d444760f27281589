"""Whole runs of the script as a user starts them: the log, the files and the score."""

import contextlib
import ctypes.util
import fcntl
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import zlib

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten

import train_gpt_mlx as tg
from helpers import REPO, build_model, settings
from programs import MODEL, ON_CPU, SCRIPT

pytestmark = pytest.mark.slow

# In these lines, ? stands for a whole number, # for a digit, and … for anything.
CONFIGURATION = """\
{out}/r.txt
run_id:r
mlx_version:{mlx}
train_loader:shards pattern={data}/datasets/tiny/fineweb_train_*.bin
val_loader:shards pattern={data}/datasets/tiny/fineweb_val_*.bin tokens:400
train_loader:dataset:tiny train_shards:2
tokenizer_path:{data}/tokenizers/tiny.model
model_params:10710 vocab_size:320 layers:3 dim:16 heads:2 kv_heads:1 seq_len:16 tie_embeddings:True
iterations:12 train_batch_tokens:128 grad_accum_steps:2 microbatch_tokens:64 microbatch_batch_size:4 \
val_batch_size:256 warmup_steps:2 max_wallclock_seconds:600.000
mlx_max_microbatch_tokens:48
world_size:1
optimizer:muon+adam muon_matrix_params:18 scalar_params:13 embed_lr:0.05 matrix_lr:0.04 scalar_lr:0.03 \
muon_momentum:0.95 muon_steps:5
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data}/tokenizers/tiny.model
compute_dtype:mlx.core.float32 compile:True
dtypes tok_emb:mlx.core.float32 linear_weight:mlx.core.float32 skip_weights:mlx.core.float32
overrides:…
warmup_step:1/2
warmup_step:2/2
"""
TRAIN = "step:{}/12 train_loss:?.#### train_time:?ms step_avg:?.##ms tok_s:? lr_mul:#.####\n"
PROGRESS = "val_progress:1/4\nval_progress:4/4\n"
VAL = PROGRESS + "step:{}/12 val_loss:?.#### val_bpb:?.#### train_time:?ms step_avg:?.##ms\n"
SIZE = "? bytes (? under the cap of 16000000 bytes)"
RESULT = f"""\
saved_model:{{out}}/r_mlx_model.npz bytes:?
serialized_model_int8_zlib:? bytes (payload:? raw_pickle:? payload_ratio:?.##x)
int8_tensors:0 float_tensors:32
WARNING: nothing is quantized: no tensor has over 65536 elements
Code size: {SCRIPT.stat().st_size} bytes
Total submission size int8+zlib: {SIZE}
{PROGRESS}\
final_int8_zlib_roundtrip val_loss:?.#### val_bpb:?.#### eval_time:?ms
final_int8_zlib_roundtrip_exact val_loss:?.######## val_bpb:?.########
finished: ?.#### bits per byte, {SIZE}, ?.# minutes, log: {{out}}/r.txt
"""


def test_every_log_line_in_its_order(run, data):
    done = run(iterations=12, num_layers=3, scalar_lr=0.03, train_log_every=4, val_loss_every=5, warmup_steps=2)
    assert (done.code, done.err) == (0, "")
    steps = [TRAIN.format(step) for step in range(1, 11)]  # then every fourth
    loop = [VAL.format(0), *steps[:5], VAL.format(5), *steps[5:], VAL.format(10), TRAIN.format(12), VAL.format(12)]
    expected = (CONFIGURATION + "".join(loop) + RESULT).format(data=data, out=done.folder, mlx=mx.__version__)
    lines = [line for line in done.out if not line.startswith("cpu_blas:")]  # which only Linux has
    for line, form in zip(lines, expected.splitlines(), strict=True):
        pattern = re.escape(form).replace(r"\#", r"\d").replace(r"\?", r"\d+").replace("…", ".*")
        assert re.fullmatch(pattern, line)
    val_loss, val_bpb = (float(number) for number in re.findall(r"val_\w+:(\S+)", lines[-2]))
    assert f" val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} " in lines[-3]
    assert lines[-1].startswith(f"finished: {val_bpb:.4f} ")
    assert done.losses()[-1] < done.losses()[0] - 0.5


def test_the_log_file_has_the_source_the_versions_and_what_the_console_shows(run):
    done = run(out_dir="new/folder")
    log = (done.folder.parent / done.out[0]).read_text(encoding="utf-8")
    source, versions, lines = log.split("\n" + "=" * 100 + "\n")
    assert source.rstrip("\n") == SCRIPT.read_text(encoding="utf-8").rstrip("\n")
    assert versions == f"Python {sys.version}\nMLX {mx.__version__}"
    assert lines.splitlines() == done.out[1:]


def test_the_log_file_is_written_while_the_run_goes_on(start):
    process = start(iterations=10_000)
    process.wait_for("^step:5/")
    assert "\nstep:5/" in (process.folder / "r.txt").read_text(encoding="utf-8")


def test_files_hold_what_the_log_says_and_repeat_its_figures(run, data, tokenizer):
    wide = dict(model_dim=256, num_layers=1)  # so that matrices are quantized
    done = run(**wide)
    assert done.files() == ["r.txt", "r_mlx_model.int8.ptz", "r_mlx_model.npz"]
    npz, ptz = done.folder / "r_mlx_model.npz", done.folder / "r_mlx_model.int8.ptz"
    assert done.lines("^saved_model:") == [f"saved_model:{npz} bytes:{npz.stat().st_size}"]
    weights, raw = mx.load(str(npz)), zlib.decompress(ptz.read_bytes())
    _, stats = tg.quantize_state_dict_int8(dict(weights))
    payload, ratio = stats["int8_payload_bytes"], stats["baseline_tensor_bytes"] / stats["int8_payload_bytes"]
    sizes = f"payload:{payload} raw_pickle:{len(raw)} payload_ratio:{ratio:.2f}x"
    assert f"serialized_model_int8_zlib:{ptz.stat().st_size} bytes ({sizes})" in done.out
    assert "int8_tensors:3 float_tensors:9" in done.out
    assert not done.lines("WARNING")
    args = settings(**{**MODEL, **wide})
    tokens = tg.load_validation_tokens(str(data / "datasets/tiny/fineweb_val_*.bin"), 16)
    model, tables = build_model(args), tg.build_sentencepiece_luts(tokenizer, 320)
    scored = tg.dequantize_state_dict_int8(pickle.loads(raw))
    for state, line, digits in ((weights, "^step:4/4 val_loss", 4), (scored, "roundtrip_exact", 6)):
        assert state.keys() == {name for name, _ in tg.tree_flatten(model.parameters())}
        model.update(tree_unflatten(list(state.items())))
        logged = [float(number) for number in re.findall(r"val_\w+:(\S+)", done.lines(line)[0])]
        assert logged == pytest.approx(tg.eval_val(args, model.loss, tokens, *tables), abs=10**-digits)


def test_one_seed_gives_one_run_and_another_seed_another(run):
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    assert first.same_as(again)
    assert first.losses() != other.losses()


def test_the_overrides_line_starts_the_same_run_again(run, tmp_path):
    first = run(run_id="it's $me", seed=3, mlx_eager_eval=0)
    (overrides,) = first.lines("^overrides:")
    command = f"OPENBLAS_NUM_THREADS=1 {overrides.removeprefix('overrides:')} '{sys.executable}' '{SCRIPT}'"
    again = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{first.folder}/it's $me_mlx_model.npz" in again.stdout
    assert first.lines("^final_int8_zlib_roundtrip_exact")[0] in again.stdout


def test_files_of_earlier_runs_are_moved_aside_under_one_number(run):
    run(iterations=0)
    second = run(iterations=1)
    (second.folder / "r_mlx_model.npz").unlink()
    third = run(iterations=2)
    moved = {"r.txt": 2, "r_mlx_model.int8.ptz": 2, "r_mlx_model.npz": 1}
    assert third.files() == [name + end for name, times in moved.items() for end in ("", ".1", ".2")[: times + 1]]
    logs = [(third.folder / name).read_text(encoding="utf-8") for name in ("r.txt.1", "r.txt.2", "r.txt")]
    assert [re.findall(r"^iterations:(\d)", log, flags=re.M) for log in logs] == [["0"], ["1"], ["2"]]


def test_no_iterations_score_the_untrained_model(run):
    done = run(iterations=0)
    assert (done.code, done.losses()) == (0, [])
    assert done.lines("^step:0/0 val_loss:5.7.* train_time:0ms step_avg:0.00ms$")  # log(320) = 5.77


@pytest.mark.parametrize(("every", "steps"), [(0, [4]), (2, [0, 2, 4]), (3, [0, 3, 4])])
def test_validation_comes_before_the_steps_that_it_divides_and_once_at_the_end(run, every, steps):
    lines = run(val_loss_every=every).lines("^step:.* val_loss")
    assert [line.split("/")[0] for line in lines] == [f"step:{step}" for step in steps]


@pytest.mark.parametrize(("steps", "logged"), [(20, range(1, 21)), (21, [10, 20, 21])])
def test_warmup_is_logged_and_changes_nothing(run, steps, logged):
    without, done = run(warmup_steps=0), run(warmup_steps=steps)
    assert not without.lines("^warmup")
    assert done.lines("^warmup") == [f"warmup_step:{step}/{steps}" for step in logged]
    assert done.same_as(without)


def test_epochs_are_announced(run):
    done = run(iterations=50, train_log_every=0, model_dim=256, num_layers=1)
    assert done.lines("WARNING") == ["WARNING: starting epoch:2 dataset:tiny train_shards:2"]
    assert done.losses() == []


def test_gradients_are_clipped(run):
    plain, clipped = run().losses(), run(grad_clip_norm=0.01).losses()
    assert plain[0] == clipped[0] and plain[1:] != clipped[1:]


def test_a_run_in_bfloat16(run):
    done = run(compute_dtype="bfloat16", mlx_disable_compile=1)  # for on a CPU it compiles for a minute
    assert "compute_dtype:mlx.core.bfloat16 compile:True" in done.out
    assert done.lines("^dtypes tok_emb:mlx.core.bfloat16 linear_weight:mlx.core.float32 skip_weights:mlx.core.float32$")
    assert done.losses() == pytest.approx(run().losses(), rel=2e-2)


def test_a_quick_look_marks_every_figure(run):
    done = run(val_max_tokens=100, val_loss_every=2)
    assert [line.split()[-1] for line in done.lines("val_bpb:[0-9]")] == ["val_tokens:96/400"] * 5
    assert re.match(r"finished: \S+ bits per byte val_tokens:96/400, ", done.out[-1])
    assert done.lines("^val_loader:.* tokens:400$")
    assert not run(val_max_tokens=400).lines("val_tokens:")


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_printed_whatever_the_settings_are(run, argument):
    done = run(argument, seed="none")
    assert (done.code, "\n".join(done.out), done.err) == (0, tg.help_text(), "")


@pytest.mark.parametrize("argument", ["--iterations=5", "x", "ITERATIONS=5"])
def test_other_arguments_are_an_error(run, argument):
    done = run(argument)
    assert (done.code, done.out) == (2, [])
    assert re.fullmatch(f"error: {argument}: settings are environment variables.*--help\n", done.err)


def test_a_missing_package_is_told_with_the_command_that_installs_it(run):
    done = run(script=("-S", str(SCRIPT)))  # no packages but Python's own
    assert (done.code, done.out) == (2, [])
    assert done.err == "error: mlx is not installed: run `pip install -r requirements.txt`\n"


def fork(code: str, before: str = "") -> tuple[str, ...]:
    return ("-c", f"{before}\nimport sys; sys.path.insert(0, {str(REPO)!r})\nimport train_gpt_mlx as base\n{code}")


def test_a_fork_calls_main_with_settings_and_arguments_of_its_own(run):
    code = """
class Mine(base.Hyperparameters):
    model_dim = 32
    my_width: int = 3
    def __init__(self): super().__init__(); self.mlp_mult = self.my_width
base.Hyperparameters = Mine
base.main()"""
    done = run("--a-flag-of-its-own", script=fork(code), model_dim=None, my_width=4, run_id=None)
    assert (done.code, done.err) == (0, "")
    assert done.lines("^model_params:.* dim:32 ")
    (overrides,) = done.lines("^overrides:")
    assert {"MODEL_DIM=32", "MLP_MULT=4", "MY_WIDTH=4", "COMPUTE_DTYPE=float32"} <= set(overrides.split())
    assert "RUN_ID=" not in overrides  # it was generated


def at_terminal(run, columns: int, **changes) -> tuple:
    """A run whose errors go to a terminal, and the texts that its last line had there."""
    terminal, its_side = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while piece := os.read(terminal, 1024):
                shown.extend(piece)

    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    reader = threading.Thread(target=read)
    reader.start()
    done = run(options=dict(capture_output=False, stdout=subprocess.PIPE, stderr=its_side), **changes)
    os.close(its_side)
    reader.join()
    os.close(terminal)
    return done, shown.decode().split("\r\x1b[K")


def test_the_last_line_of_a_terminal_says_how_far_the_run_is(run):
    done, texts = at_terminal(run, 30, iterations=1)
    for stage in ("warmup", "training", "validation", "scoring"):
        assert any(re.match(rf"{stage} \d+\.\d% ", text) for text in texts), stage
    assert any(re.match(r"training \d+\.\d%  \d+:\d\d left", text) for text in texts)
    assert max(map(len, texts)) == 29  # the terminal does not wrap it
    assert texts[-1] == ""
    assert "\x1b" not in "".join(done.out) + (done.folder / "r.txt").read_text(encoding="utf-8").split("=" * 100)[-1]


def test_an_error_has_a_line_of_its_own_on_a_terminal(run):
    done, texts = at_terminal(run, 200, rope_base=0)
    assert done.code == 1
    assert texts[-1].startswith("error: after step 1 train_loss is not finite")


@pytest.mark.skipif(sys.platform != "linux" or not ON_CPU, reason="only MLX's Linux CPU build chooses between two BLAS")
@pytest.mark.parametrize(("before", "preload"), [("", 1), ("import numpy", 1), ("", 0), ("import mlx.core", 1)])
def test_the_log_says_which_blas_computes(run, before, preload):
    done = run(script=fork("base.main()", before), iterations=0, mlx_preload_blas=preload)
    is_openblas = ctypes.util.find_library("openblas") is not None and preload and "mlx" not in before
    expected = "cpu_blas:openblas" if is_openblas else "cpu_blas:reference .*apt-get install libopenblas0-pthread.*"
    assert re.fullmatch(expected, *done.lines("^cpu_blas:"))
