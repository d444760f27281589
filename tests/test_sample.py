"""logs/sample.py: the text that a model writes."""

import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import sample
import train_gpt_mlx as tg
from conftest import train_tokenizer
from helpers import REPO, check_one_line_error, stir
from programs import MODEL, SCRIPT, environment

SAMPLE = (str(REPO / "logs/sample.py"),)
UNSET = dict.fromkeys([*MODEL, "data_path", "tokenizer_path", "run_id", "out_dir", "compute_dtype"])
INT8, NPZ = "r_mlx_model.int8.ptz", "r_mlx_model.npz"


@pytest.fixture
def model(data, tmp_path, monkeypatch):
    """The path of a model of random weights, for which the environment has the settings."""
    monkeypatch.setattr(os, "environ", environment(data, tmp_path))
    built = tg.build_model(tg.Hyperparameters())
    stir(built)
    mx.savez(str(tmp_path / NPZ), **dict(tg.tree_flatten(built.state)))
    return tmp_path / NPZ


def text(capsys, model: Path, *arguments: str) -> str:
    """What the tool prints for this model."""
    assert sample.main([str(model), *arguments]) == 0
    return capsys.readouterr().out


def forced(monkeypatch, capsys, tokens: list[int]) -> tuple[list[list[int]], list[str]]:
    """Let the model write these tokens. Returns the contexts that it sees, and what is printed before each."""
    contexts, outputs = [], []

    def next_logits(script, model, context: list[int]) -> np.ndarray:
        outputs.append(capsys.readouterr().out)
        contexts.append(context)
        return np.where(np.arange(MODEL["vocab_size"]) == tokens[len(contexts) - 1], 1e6, 0.0)

    monkeypatch.setattr(sample, "next_logits", next_logits)
    return contexts, outputs


class TestText:
    def test_it_goes_on_from_the_prompt_the_same_for_a_seed(self, model, capsys):
        defaults = ("--temperature=0.8", "--top-k=0", "--seed=0")
        one, again, other = (text(capsys, model, "--prompt=the cat says", *o) for o in ((), defaults, ["--seed=2"]))
        assert one.startswith("the cat says") and len(one) > 100
        assert one == again != other

    def test_temperature_0_takes_the_likeliest_token(self, model, tokenizer, capsys):
        gpt = tg.build_model(tg.Hyperparameters())
        gpt.load_weights(str(model))
        tokens = [tokenizer.bos_id(), *tokenizer.encode("the dog")]
        for _ in range(4):  # the likeliest is the one with the least loss
            targets = (mx.array([[*tokens[1:], token]]) for token in range(tokenizer.vocab_size()))
            tokens.append(int(np.argmin([gpt.loss(mx.array([tokens]), target).item() for target in targets])))
        expected = re.sub("[\x00-\x1f\x7f]", "", tokenizer.decode(tokens).rstrip("\ufffd")) + "\n\n"
        for options in (["--temperature=0"], ["--temperature=1e-5"], ["--top-k=1", "--temperature=5"]):
            assert text(capsys, model, "--prompt=the dog", "--tokens=4", *options) == expected

    def test_several_texts(self, model, capsys):
        first, second, _ = text(capsys, model, "--prompt", "the cat", "--count", "2", "--top-k", "999").split("\n\n")
        assert first[:40] != second[:40] and first[:7] == second[:7] == "the cat"

    def test_a_text_starts_as_a_document_and_ends_with_it(self, model, tokenizer, monkeypatch, capsys):
        tokens = [*tokenizer.encode("the cat"), tokenizer.bos_id(), *tokenizer.encode("the dog")]
        contexts, outputs = forced(monkeypatch, capsys, tokens)
        assert text(capsys, model) == "\n\n"
        assert (contexts[0], "".join(outputs)) == ([tokenizer.bos_id()], "the cat")

    def test_number_of_tokens_and_length_of_the_context(self, model, tokenizer, monkeypatch, capsys):
        contexts, _ = forced(monkeypatch, capsys, tokenizer.encode("the cat says that " * 99))
        text(capsys, model)
        assert [len(context) for context in contexts] == [*range(1, 16)] + [16] * 185

    def test_it_is_printed_as_it_is_made_in_whole_characters(self, model, tokenizer, monkeypatch, capsys):
        a, b, c, *control = tokenizer.encode("日\x9b")  # bytes
        the, cat, escape = tokenizer.encode("the")[0], tokenizer.encode("cat")[0], tokenizer.piece_to_id("<0x1B>")
        _, outputs = forced(monkeypatch, capsys, [the, a, b, c, escape, *control, cat, a, tokenizer.eos_id()])
        rest = text(capsys, model, "--prompt", "dog")
        pieces = [tokenizer.id_to_piece(token).replace("▁", " ") for token in (the, cat)]
        assert [*outputs, rest] == ["dog", pieces[0], "", "", "日", "", "", "", pieces[1], "", "\n\n"]

    def test_a_model_of_another_script(self, model, tmp_path, capsys):
        source = SCRIPT.read_text(encoding="utf-8").replace("x = block(x, x0)", "x = block(x, x0) + x0")
        (tmp_path / "copy.py").write_text(source)
        assert text(capsys, model, "--script", str(tmp_path / "copy.py")) != text(capsys, model)


@pytest.mark.slow
class TestRuns:
    def test_settings_and_tokenizer_come_from_the_log(self, run):
        done = run(num_layers=3, compute_dtype="bfloat16")
        sampled = run(str(done.folder / INT8), "--prompt", "the é", script=SAMPLE, pythonioencoding="ascii", **UNSET)
        assert (sampled.code, sampled.err, sampled.out[0][:5]) == (0, "", "the ?")
        other = run(str(done.folder / INT8), script=SAMPLE, **UNSET | dict(num_layers=2))
        assert (other.code, "does not exist" in other.err) == (2, False)
        check_one_line_error(other.err, INT8, "not a model of these settings")


class TestErrors:
    def test_a_missing_model_or_log_and_a_negative_temperature(self, model, capsys, monkeypatch):
        monkeypatch.delenv("MODEL_DIM")
        for path, t, reason in [("x.npz", 1, "No such"), (model, -1, "at least 0"), (model, 1, "r.txt does not exist")]:
            assert sample.main([str(path), f"--temperature={t}"]) == 2
            check_one_line_error(capsys.readouterr().err, str(path), reason)

    def test_a_missing_or_damaged_tokenizer_or_another(self, model, capsys, monkeypatch):
        monkeypatch.setenv("TOKENIZER_PATH", str(path := model.with_name("t.model")))
        contents = {"330 pieces": train_tokenizer(vocab_size=330), "give a --prompt": train_tokenizer(bos_id=-1)}
        for reason, content in {"does not exist": b"", **contents, "parse ModelProto": b"x"}.items():
            if content:
                path.write_bytes(content)
            assert sample.main([str(model)]) == 2
            check_one_line_error(capsys.readouterr().err, str(model), reason)
