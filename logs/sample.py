#!/usr/bin/env python3
"""Print text that a model writes. Its file may be a stranger's .int8.ptz or .npz: nothing in it is run.

Settings and tokenizer come from the environment, or else from the run's log, RUN_ID.txt beside the model.

Each token takes a forward pass over all tokens before it, TRAIN_SEQ_LEN at most. On 2 Linux cores with OpenBLAS, 200
tokens take half a second with the README's sample model. With the default model they take 7 s, and 70 s after a prompt
of 600 tokens.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from score import SCRIPT, load_model, report, require


def load_tokenizer(script: Any, args: Any) -> Any:
    """Raises ValueError if it is missing or of another size, and RuntimeError if it is damaged."""
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
    """A token: the likeliest at temperature 0, else drawn from the top_k likeliest, or from all if top_k is 0."""
    if temperature == 0:
        return int(np.argmax(logits))
    if top_k > 0:
        least = np.sort(logits)[-top_k:][0]
        logits = np.where(logits >= least, logits, -np.inf)
    noise = rng.gumbel(size=logits.size)  # the largest of logits and this noise is a draw from their softmax
    return int(np.argmax(logits / temperature + noise))


def print_new(tokenizer: Any, tokens: list[int], num_printed: int) -> int:
    """Print the text of these tokens after `num_printed` characters. Returns how many have been printed by then."""
    text = tokenizer.decode(tokens).rstrip("\ufffd")  # a character whose bytes are not complete yet
    print(re.sub(r"[\x00-\x1f\x7f-\x9f]", "", text[num_printed:]), end="", flush=True)  # without control characters
    return len(text)


def write_texts(options: argparse.Namespace) -> None:
    """Print the prompt and what follows, as it is made, `count` times. A text also ends where a document would."""
    script, args, model = load_model(options.artifact, options.script)
    tokenizer = load_tokenizer(script, args)
    document_ends = (tokenizer.bos_id(), tokenizer.eos_id())
    prompt = [token for token in document_ends[:1] if token >= 0] + tokenizer.encode(options.prompt)
    require(len(prompt) > 0, "this tokenizer has no token to start with: give a --prompt")
    rng = np.random.default_rng(options.seed)
    for _ in range(options.count):
        tokens = list(prompt)
        num_printed = print_new(tokenizer, tokens, 0)
        for _ in range(options.tokens):
            logits = next_logits(script, model, tokens[-args.train_seq_len :])
            token = choose(logits, options.temperature, options.top_k, rng)
            if token in document_ends:
                break
            tokens.append(token)
            num_printed = print_new(tokenizer, tokens, num_printed)
        print("\n")


def main(arguments: list[str]) -> int:
    """Exit status: 0 for text, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="RUN_ID_mlx_model.int8.ptz or RUN_ID_mlx_model.npz")
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add, at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="another number, another text")
    parser.add_argument("--count", type=int, default=1, help="texts to write (1)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the fork that wrote it: this is code, and is run")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        write_texts(options)
        return 0
    except Exception as error:  # a damaged file can cause any
        return report(options.artifact, error)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
