"""How fast the script is, of what the machine could do, and against an earlier revision of it.

    .venv/bin/python tests/bench.py                       # the default model, sequences of 1,024 tokens
    .venv/bin/python tests/bench.py --against HEAD~1      # the same for both, in turn, and the ratios
    .venv/bin/python tests/bench.py --growth              # cost as sequences, layers, batch and validation grow
    .venv/bin/python tests/bench.py --processes 2         # whole steps of 1 and 2 processes, one BLAS thread each
    NUM_LAYERS=2 MODEL_DIM=128 TRAIN_SEQ_LEN=256 .venv/bin/python tests/bench.py --seqs 8

Settings are the script's environment variables, but for the batch: training is --chunks chunks of --seqs sequences,
without the optimizer's step, which has a line of its own. Every figure is the median of --repeats. A script runs in a
process of its own and does one thing at a time, when told to; two scripts are told in turn, so that a machine that
slows down slows both down. Data are the sample's (`data/prepare.py`). Only names that the script has always had are
used, so that any revision can be measured. --growth starts from sequences of 512 tokens if TRAIN_SEQ_LEN is not set.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SAMPLE = {
    "DATA_PATH": str(REPO / "data/datasets/sample_sp1024"),
    "TOKENIZER_PATH": str(REPO / "data/tokenizers/sample_1024_bpe.model"),
}


# In a process of its own: one script, told by lines on stdin what to measure next -----------------------------------


def work(script: str, seqs: int, chunks: int, val_seqs: int) -> None:
    """Answer each line of stdin, the name of a measurement, by a line of JSON."""
    spec = importlib.util.spec_from_file_location("train_gpt_mlx", script)
    tg = sys.modules["train_gpt_mlx"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tg)
    import mlx.core as mx  # after the script, which decides on the BLAS
    import mlx.nn as nn
    import sentencepiece as spm
    from mlx.utils import tree_flatten, tree_map

    args = tg.Hyperparameters()
    args.grad_accum_steps, args.mlx_max_microbatch_tokens = 1, seqs * args.train_seq_len
    args.train_batch_tokens = chunks * args.mlx_max_microbatch_tokens
    args.val_batch_size = args.mlx_max_microbatch_tokens  # validation batches are as large as chunks
    mx.random.seed(args.seed)
    model = tg.GPT(args.vocab_size, args.num_layers, args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult,
                   args.logit_chunk_tokens, args.logit_softcap, args.rope_base, args.tied_embed_init_std,
                   args.qk_gain_init)  # fmt: skip
    optimizers = tg.SplitOptimizers(model, args)

    def loss_alone(x: mx.array, y: mx.array) -> mx.array:
        value = model.eval().loss(x, y)
        model.train()
        return value

    loss = mx.compile(loss_alone, inputs=model.state, outputs=model.state)
    loss_and_grad = mx.compile(nn.value_and_grad(model, model.loss), inputs=model.state, outputs=model.state)
    loader = tg.TokenLoader(args.train_files)
    tokens = tg.load_validation_tokens(args.val_files, args.train_seq_len)[: val_seqs * args.train_seq_len + 1]
    tables = tg.build_sentencepiece_luts(spm.SentencePieceProcessor(model_file=args.tokenizer_path), args.vocab_size)
    params = dict(tree_flatten(model.parameters()))
    per_token = 6 * sum(p.size for p in params.values()) + 12 * args.num_layers * args.model_dim * args.train_seq_len
    grads = tree_map(lambda p: mx.random.normal(p.shape).astype(p.dtype), model.parameters())
    optimizers.step(model, grads, step=0, lr_mul=0.0)  # which leaves the model as it is, and makes the buffers
    mx.eval(grads, model.state, optimizers.muon.buffers, optimizers.adam_embed.state, optimizers.adam_scalar.state)

    def train() -> float:
        mx.eval(tg.loss_and_grad_chunked(args, loader, loss_and_grad))
        return args.train_batch_tokens

    def optimize() -> float:
        for _ in range(3):
            optimizers.step(model, grads, step=1, lr_mul=0.0)
            mx.eval(model.parameters())
        return 3.0

    def validate() -> float:
        tg.eval_val(args, loss, tokens, *tables)
        return len(tokens) - 1

    def multiply() -> float:
        x = mx.full((1536, 1536), 1 / 1536)
        for _ in range(20):
            x = x @ x
        mx.eval(x)
        return 20 * 2 * 1536**3

    def copy() -> float:
        x = mx.zeros((16 * 1024 * 1024,))
        for i in range(20):
            x = x + float(i)
        mx.eval(x)
        return 20 * 2 * x.nbytes

    measurements = {"train": train, "optimize": optimize, "validate": validate, "multiply": multiply, "copy": copy}
    about = {"compute_dtype": str(tg.COMPUTE_DTYPE), "device": str(mx.default_device()), "flops_per_token": per_token}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        do = measurements[line.strip()]
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        amount = do()
        mx.synchronize()
        seconds = time.perf_counter() - started
        print(json.dumps({"rate": amount / seconds, "peak_mb": mx.get_peak_memory() / 1e6}), flush=True)


# In the process that was started: it tells the others in turn, and prints ---------------------------------------------


class Worker:
    """A process that measures one script."""

    def __init__(self, script: Path, options: argparse.Namespace, **settings: object) -> None:
        numbers = map(str, (options.seqs, options.chunks, options.val_seqs))
        environment = {**SAMPLE, **os.environ, **{name: str(value) for name, value in settings.items()}}
        self.process = subprocess.Popen([sys.executable, __file__, "--work", str(script), *numbers], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        self.about = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a measurement failed; its error is above")
        return json.loads(line)

    def measure(self, what: str) -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def in_turn(workers: list[Worker], what: str, repeats: int) -> list[dict]:
    """For each worker the medians of `what`, after one time that does not count (it compiles). `low` and `high` are the
    lowest and the highest ratio of the first worker's rate to this one's, over the times that they took turns."""
    found: list[list[dict]] = [[] for _ in workers]
    for repeat in range(repeats + 1):
        for i in range(len(workers))[:: 1 if repeat % 2 else -1]:
            found[i].append(workers[i].measure(what))
    medians = [{key: statistics.median(one[key] for one in some[1:]) for key in some[0]} for some in found]
    for some, median in zip(found, medians, strict=True):
        ratios = [first["rate"] / one["rate"] for first, one in zip(found[0][1:], some[1:], strict=True)]
        median.update(low=min(ratios), high=max(ratios))
    return medians


def start_up(script: Path, seqs: int) -> float:
    """Seconds from starting a run, with the default warmup and 8 accumulation steps, to the end of its first training
    step."""
    seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"TRAIN_BATCH_TOKENS": 8 * seqs * seq_len, "VAL_BATCH_SIZE": 8 * seqs * seq_len, "ITERATIONS": 1,
                    "MLX_MAX_MICROBATCH_TOKENS": seqs * seq_len, "OUT_DIR": folder}  # fmt: skip
        environment = {**SAMPLE, **os.environ, **{name: str(value) for name, value in settings.items()}}
        started = time.perf_counter()
        run = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if line.startswith("step:1/"):
                seconds = time.perf_counter() - started
                run.kill()
                run.wait()
                return seconds
    sys.exit(f"{script} did not come to its first step")


def compare(scripts: list[Path], options: argparse.Namespace) -> None:
    """Print the table of all figures, of one script or of two with their ratios."""
    workers = [Worker(script, options) for script in scripts]
    results = {what: in_turn(workers, what, options.repeats)
               for what in ("multiply", "copy", "train", "validate", "optimize")}  # fmt: skip
    flops = workers[0].about["flops_per_token"]  # of attention to all keys, though half of them are masked
    peak = statistics.median(one["rate"] for one in results["multiply"])
    for worker in workers:
        worker.end()
    print(f"{workers[0].about['device']}, {workers[0].about['compute_dtype']}, {flops / 1e6:.0f} MFLOP a token; "
          f"float32 products {peak / 1e9:.0f} GFLOP/s, elementwise "
          f"{statistics.median(one['rate'] for one in results['copy']) / 1e9:.1f} GB/s")  # fmt: skip
    train, val = ([one["rate"] for one in results[what]] for what in ("train", "validate"))
    rows = [
        ("training, tokens/s", train, True, "{:.0f}"),
        ("  of the peak", [rate * flops / peak for rate in train], True, "{:.3f}"),
        ("  peak memory, MB", [one["peak_mb"] for one in results["train"]], False, "{:.0f}"),
        ("validation, tokens/s", val, True, "{:.0f}"),
        ("  of the peak", [rate * flops / 3 / peak for rate in val], True, "{:.3f}"),
        ("  peak memory, MB", [one["peak_mb"] for one in results["validate"]], False, "{:.0f}"),
        ("optimizer step, ms", [1000 / one["rate"] for one in results["optimize"]], False, "{:.1f}"),
    ]
    if options.start_up:
        times = [[start_up(script, options.seqs) for script in scripts] for _ in range(options.start_up)]
        medians = [statistics.median(some) for some in zip(*times, strict=True)]
        rows.append(("start to step 1, s", medians, False, "{:.1f}"))
    heads = ["this", options.against, "times as good", "in each turn"] if len(scripts) > 1 else ["this"]
    timed = {"training, tokens/s": "train", "validation, tokens/s": "validate", "optimizer step, ms": "optimize"}
    print(f"{'':<24}" + "".join(f"{head:>14}" for head in heads))
    for name, values, more_is_better, form in rows:
        cells = [form.format(value) for value in values]
        if len(values) > 1:
            cells.append(f"{values[0] / values[1] if more_is_better else values[1] / values[0]:.2f}")
        if len(values) > 1 and name in timed:
            cells.append("{low:.2f} to {high:.2f}".format(**results[timed[name]][1]))
        print(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells))


def scaling(script: Path, processes: int, options: argparse.Namespace) -> None:
    """Print tokens a second of whole training steps, of one process and of several, in turn, and the ratios. A step has
    8 microbatches of --seqs sequences; each process has one thread for its products."""
    seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    settings = {"GRAD_ACCUM_STEPS": 8, "TRAIN_BATCH_TOKENS": 8 * options.seqs * seq_len, "WARMUP_STEPS": 1,
                "MLX_MAX_MICROBATCH_TOKENS": options.seqs * seq_len, "ITERATIONS": 3, "MAX_WALLCLOCK_SECONDS": 0,
                "VAL_BATCH_SIZE": 8 * seq_len, "VAL_MAX_TOKENS": seq_len, "OPENBLAS_NUM_THREADS": 1}  # fmt: skip

    def rate(count: int) -> float:
        """The ranks are started as the launcher does, but without it: it takes a processor for itself."""
        with tempfile.TemporaryDirectory() as folder:
            hosts = Path(folder, "hosts.json")
            hosts.write_text(json.dumps([[f"127.0.0.1:{32_400 + rank}"] for rank in range(count)]))
            environment = {**SAMPLE, **os.environ, **{k: str(v) for k, v in settings.items()}, "OUT_DIR": folder}
            environment |= {"MLX_HOSTFILE": str(hosts)} if count > 1 else {}
            ranks = [subprocess.Popen([sys.executable, script], env=environment | {"MLX_RANK": str(rank)}, text=True,
                                      stdout=subprocess.PIPE) for rank in range(count)]  # fmt: skip
            out, *_ = [rank.communicate()[0] for rank in ranks]
        rates = [line.split("tok_s:")[1] for line in out.splitlines() if "tok_s:" in line]
        return statistics.median(map(float, rates))

    pairs = [(rate(1), rate(processes)) for _ in range(options.repeats)]
    ratios = [many / one for one, many in pairs]
    one, many = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"1 process {one:.0f} tok/s, {processes} processes {many:.0f} tok/s, {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def growth(script: Path, options: argparse.Namespace) -> None:
    """Print, as Markdown, microseconds a token and peak memory for 1, 2 and 4 times as much of everything."""
    seq_len, layers = (int(os.environ.get(name, value)) for name, value in (("TRAIN_SEQ_LEN", 512), ("NUM_LAYERS", 9)))

    def cell(what: str, **changes: int) -> str:
        given = argparse.Namespace(**{**vars(options), **{k: v for k, v in changes.items() if k in vars(options)}})
        settings = {"TRAIN_SEQ_LEN": seq_len} | {k: v for k, v in changes.items() if k.isupper()}
        worker = Worker(script, given, **settings)
        (found,) = in_turn([worker], what, options.repeats)
        worker.end()
        return f"{1e6 / found['rate']:.0f} µs, {found['peak_mb']:.0f} MB"

    print("| what grows | 1× | 2× | 4× |\n|---|---|---|---|")
    for name, what, change in (
        ("sequences, of {} tokens", "train", lambda n: {"TRAIN_SEQ_LEN": n * seq_len}),
        ("layers, {}", "train", lambda n: {"NUM_LAYERS": n * layers}),
        ("batch, {} chunks", "train", lambda n: {"chunks": n * options.chunks}),
        ("chunk, {} sequences", "train", lambda n: {"seqs": n * options.seqs}),
        ("validation, {} sequences", "validate", lambda n: {"val_seqs": n * options.val_seqs}),
    ):
        cells = [cell(what, **change(n)) for n in (1, 2, 4)]
        print(f"| {name.format(next(iter(change(1).values())))} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2], *map(int, sys.argv[3:6]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a git revision to measure in turn with the script as it is")
    parser.add_argument("--seqs", type=int, default=1, help="sequences in a chunk (default 1)")
    parser.add_argument("--chunks", type=int, default=2, help="chunks in a training step (default 2)")
    parser.add_argument("--val-seqs", type=int, default=4, help="sequences to validate (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="how often everything is measured (default 5)")
    parser.add_argument("--start-up", type=int, default=3, metavar="N",
                        help="how often to measure the start of a run (default 3; against a version that warms up with "
                        "whole batches this takes by far the longest: 0 leaves it out)")  # fmt: skip
    parser.add_argument("--growth", action="store_true", help="only the table of cost as work grows")
    parser.add_argument("--processes", type=int, metavar="N", help="only how N processes compare with one")
    options = parser.parse_args()
    if not Path(SAMPLE["TOKENIZER_PATH"]).exists():
        sys.exit(f"{SAMPLE['TOKENIZER_PATH']} is not there: make the sample first, python data/prepare.py")
    script = REPO / "train_gpt_mlx.py"
    if options.growth:
        return growth(script, options)
    if options.processes:
        return scaling(script, options.processes, options)
    with tempfile.TemporaryDirectory() as folder:
        scripts = [script]
        if options.against:
            other = Path(folder, "train_gpt_mlx.py")
            show = ["git", "show", f"{options.against}:train_gpt_mlx.py"]
            other.write_bytes(subprocess.run(show, cwd=REPO, check=True, stdout=subprocess.PIPE).stdout)
            scripts.append(other)
        compare(scripts, options)


if __name__ == "__main__":
    main()
