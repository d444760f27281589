#!/usr/bin/env python3
"""Print text that a saved model (.int8.ptz or .npz) generates. No code in the file is run, even a stranger's.

Settings and tokenizer come from the environment, or else from the run's log, RUN_ID.txt beside the model.

Each token takes a forward pass over at most the last TRAIN_SEQ_LEN tokens. On 2 Linux cores with OpenBLAS, 200 tokens
take half a second with the README's sample model. With the default model they take 7 s, and 70 s after a prompt of 600
tokens.
"""

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from score import SCRIPT, load_model, report, require


def load_tokenizer(script: Any, args: Any) -> Any:
    """Raises ValueError if it is missing or has another vocabulary size, and RuntimeError if it is damaged."""
    path = args.tokenizer_path
    require(Path(path).is_file(), f"TOKENIZER_PATH={path} does not exist: set it to the model's tokenizer")
    tokenizer = script.spm.SentencePieceProcessor(model_file=path)
    size = tokenizer.vocab_size()
    require(size == args.vocab_size, f"TOKENIZER_PATH={path} has {size} pieces, but VOCAB_SIZE={args.vocab_size}")
    return tokenizer


def next_logits(script: Any, model: Any, tokens: list[int]) -> np.ndarray:
    """Logits of the token that comes next, (vocab_size,) float32, as GPT.loss computes them."""
    hidden = model(script.mx.array([tokens]))[0, -1]
    logits = model.softcap(hidden @ model.tok_emb.weight.astype(hidden.dtype).T)
    return np.array(logits.astype(script.mx.float32))


def choose(logits: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """A token drawn from softmax(logits / temperature). If top_k is above 0, only from the top_k most likely ones."""
    if temperature == 0:
        return int(np.argmax(logits))
    if top_k > 0:
        least = np.sort(logits)[-top_k:][0]
        logits = np.where(logits >= least, logits, -np.inf)
    weights = np.exp((logits - logits.max()).astype(float) / temperature)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def print_new(tokenizer: Any, tokens: list[int], num_printed: int) -> int:
    """Print the text of these tokens after `num_printed` characters. Returns how many are printed now."""
    text = tokenizer.decode(tokens).rstrip("\ufffd")  # an incomplete UTF-8 character
    new = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text[num_printed:])  # without control characters
    print(new, end="", flush=True)
    return len(text)


def write_texts(options: argparse.Namespace) -> None:
    """Print the prompt and each token as it is drawn, `count` times. A text stops early where a document ends."""
    require(options.temperature >= 0, f"--temperature {options.temperature}: must be at least 0")
    script, args, model = load_model(options.artifact, options.script)
    tokenizer = load_tokenizer(script, args)
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()  # -1 if there is none
    prompt = tokenizer.encode(options.prompt)
    if bos >= 0:
        prompt.insert(0, bos)  # as in training
    require(len(prompt) > 0, "this tokenizer has no token to start with: give a --prompt")
    rng = np.random.default_rng(options.seed)
    for _ in range(options.count):
        tokens = list(prompt)
        num_printed = print_new(tokenizer, tokens, 0)
        for _ in range(options.tokens):
            logits = next_logits(script, model, tokens[-args.train_seq_len :])
            token = choose(logits, options.temperature, options.top_k, rng)
            if token in (bos, eos):
                break
            tokens.append(token)
            num_printed = print_new(tokenizer, tokens, num_printed)
        print("\n")


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="RUN_ID_mlx_model.int8.ptz or RUN_ID_mlx_model.npz")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the most likely token (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the K most likely tokens only (default: 0, all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--count", type=int, default=1, help="number of texts (default: 1)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the fork that wrote it; its code is run")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        write_texts(options)
        return 0
    except Exception as error:  # a damaged file can cause any error
        return report(options.artifact, error)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
