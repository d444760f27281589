#!/usr/bin/env python3
"""How fast data/prepare.py encodes, against SentencePiece's own batch encoder on the same cores.

    .venv/bin/python tests/bench_data.py --docs-jsonl FILE --tokenizer MODEL

The encoder alone has all documents in memory and leaves its tokens there. prepare.py is a whole process: it starts,
reads, parses, encodes and writes. They take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import prepare

TOOL = Path(prepare.__file__)


def encoder_alone(tokenizer: spm.SentencePieceProcessor, documents: list[str]) -> float:
    """Seconds."""
    start = time.perf_counter()
    tokenizer.encode_as_numpy(documents)
    return time.perf_counter() - start


def whole_tool(docs: Path, tokenizer: Path) -> float:
    """Seconds, from the start of the process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "data" / TOOL.name
        copy.parent.mkdir()
        copy.write_bytes(TOOL.read_bytes())
        start = time.perf_counter()
        command = [sys.executable, copy, "--docs-jsonl", docs.resolve(), "--tokenizer", tokenizer.resolve()]
        environment = {**os.environ, "PYTHONPATH": str(TOOL.parent.parent)}  # for train_gpt_mlx.py
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs-jsonl", type=Path, required=True, help="some 100 MB of documents")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--repeats", type=int, default=5, help="how often everything is measured (default %(default)s)")
    options = parser.parse_args()
    documents = [json.loads(line)["text"] for line in options.docs_jsonl.open(encoding="utf-8") if line.strip()]
    megabytes = sum(len(text.encode("utf-8")) for text in documents) / 1e6
    tokenizer = spm.SentencePieceProcessor(model_file=str(options.tokenizer))
    print(f"{len(documents)} documents, {megabytes:.0f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    ratios = []
    for _ in range(options.repeats):
        alone = encoder_alone(tokenizer, documents)
        tool = whole_tool(options.docs_jsonl, options.tokenizer)
        ratios.append(alone / tool)
        print(f"MB/s: the encoder alone {megabytes / alone:.1f}, prepare.py {megabytes / tool:.1f}", flush=True)
    median = statistics.median(ratios)
    print(f"prepare.py is {median:.2f} times as fast as the encoder alone ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
