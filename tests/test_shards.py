"""Shard files, the token stream over them, the loader, validation tokens and the manifest check."""

from __future__ import annotations

import json
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt_mlx as tg
from helpers import RECORDED, learnable_tokens, write_shard


def test_shard_round_trip_keeps_every_uint16(tmp_path):
    tokens = [0, 1, 255, 256, 32768, 65535]
    read = tg.load_data_shard(write_shard(tmp_path / "s.bin", tokens))
    assert read.dtype == np.int32
    assert read.shape == (6,)
    assert read.tolist() == tokens


def test_empty_shard_reads_as_no_tokens(tmp_path):
    assert tg.load_data_shard(str(write_shard(tmp_path / "s.bin", []))).shape == (0,)


@pytest.mark.parametrize(
    "change",
    [{"magic": 20240521}, {"version": 2}, {"count": 4}, {"count": 2}, {"count": -1}],
    ids=["magic", "version", "truncated", "over-long", "negative count"],
)
def test_wrong_shard_is_refused_by_name(tmp_path, change):
    path = write_shard(tmp_path / "broken.bin", [1, 2, 3], **change)
    with pytest.raises(ValueError, match="broken.bin"):
        tg.load_data_shard(path)


def test_short_header_and_odd_byte_are_refused(tmp_path):
    path = write_shard(tmp_path / "broken.bin", [1, 2, 3])
    whole = path.read_bytes()
    for data in (whole[:1023], whole[:8], b"", whole + b"\0", whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="broken.bin"):
            tg.load_data_shard(path)


def test_missing_shard(tmp_path):
    with pytest.raises(FileNotFoundError):
        tg.load_data_shard(tmp_path / "none.bin")


def recorded_stream(case, folder):
    for i, length in enumerate(case["shard_lengths"]):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", learnable_tokens(length, 997, case["salt"] + i))
    return str(folder / "fineweb_train_*.bin")


@pytest.mark.parametrize("case", RECORDED["loader"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_takes(tmp_path, case):
    log = []
    stream = tg.TokenStream(recorded_stream(case, tmp_path), log.append, "ds")
    for request, expected in zip(case["requests"], case["takes_first3_fileidx_pos_epoch"], strict=True):
        tokens = stream.take(request)
        assert tokens.dtype == np.int32
        assert len(tokens) == request
        assert [*tokens[:3].tolist(), stream.file_idx, stream.pos, stream.epoch] == expected
    assert log == case["log"]


@pytest.mark.parametrize("case", RECORDED["loader"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_batches(tmp_path, case):
    loader = tg.TokenLoader(recorded_stream(case, tmp_path))
    batches = []
    for request in case["requests"]:
        if request >= case["seq_len"]:
            x, y = loader.next_batch(request, case["seq_len"])
            assert x.dtype == y.dtype == mx.int32
            assert x.shape == y.shape
            batches.append([list(x.shape), x.sum().item(), y.sum().item(), y[-1, -1].item()])
    assert batches == case["batches_shape_sumx_sumy_lasty"]


def test_stream_starts_with_a_clean_record_and_opens_files_in_name_order(tmp_path):
    write_shard(tmp_path / "b_1.bin", [30, 31])
    write_shard(tmp_path / "b_0.bin", [10, 11, 12])
    stream = tg.TokenStream(str(tmp_path / "b_*.bin"))
    assert [f.rsplit("/", 1)[1] for f in stream.files] == ["b_0.bin", "b_1.bin"]
    assert (stream.file_idx, stream.pos, stream.epoch) == (0, 0, 1)
    assert isinstance(stream.tokens, np.ndarray)
    assert stream.tokens[1:3].tolist() == [11, 12]


def test_a_file_is_opened_only_when_its_first_token_is_asked_for(tmp_path):
    log = []
    write_shard(tmp_path / "one.bin", [5, 6, 7])
    stream = tg.TokenStream(str(tmp_path / "one.bin"), log.append, "d")
    assert stream.take(3).tolist() == [5, 6, 7]
    assert (stream.pos, stream.epoch, log) == (3, 1, [])
    assert stream.take(0).tolist() == []
    assert stream.epoch == 1
    assert stream.take(1).tolist() == [5]
    assert (stream.pos, stream.epoch) == (1, 2)
    assert log == ["WARNING: starting epoch:2 dataset:d train_shards:1"]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    requests=st.lists(st.integers(0, 25), min_size=1, max_size=6),
)
def test_takes_are_consecutive_pieces_of_the_repeated_text(tmp_path_factory, lengths, requests):
    folder = tmp_path_factory.mktemp("stream")
    text = np.arange(sum(lengths))
    for i, part in enumerate(np.split(text, np.cumsum(lengths)[:-1])):
        write_shard(folder / f"s_{i}.bin", part)
    stream = tg.TokenStream(str(folder / "s_*.bin"))
    taken = np.concatenate([stream.take(n) for n in requests])
    assert taken.tolist() == [i % len(text) for i in range(sum(requests))]
    assert stream.epoch == 1 + max(sum(requests) - 1, 0) // len(text)


def test_no_file_names_the_pattern_and_how_to_get_data(tmp_path):
    for make in (tg.TokenStream, tg.TokenLoader, lambda pattern: tg.load_validation_tokens(pattern, 4)):
        with pytest.raises(FileNotFoundError, match=r"nothing_\*\.bin.*data/prepare.py"):
            make(str(tmp_path / "nothing_*.bin"))


def test_batches_do_not_overlap_and_targets_follow_inputs(tmp_path):
    write_shard(tmp_path / "s.bin", range(100))
    loader = tg.TokenLoader(str(tmp_path / "s.bin"))
    x, y = loader.next_batch(11, 4)  # 2 whole sequences
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert loader.stream.pos == 9
    x, y = loader.next_batch(4, 4)
    assert (x.tolist(), y.tolist()) == ([[9, 10, 11, 12]], [[10, 11, 12, 13]])


def test_batch_without_room_for_a_sequence(tmp_path):
    loader = tg.TokenLoader(str(write_shard(tmp_path / "s.bin", range(9))))
    with pytest.raises(ValueError, match="sequence"):
        loader.next_batch(7, 8)
    assert loader.stream.pos == 0


@pytest.mark.parametrize(("count", "kept"), [(9, 9), (16, 9), (17, 17), (24, 17)])
def test_validation_tokens_are_cut_to_whole_sequences(tmp_path, count, kept):
    write_shard(tmp_path / "v_0.bin", range(4))
    write_shard(tmp_path / "v_1.bin", range(4, count))
    tokens = tg.load_validation_tokens(str(tmp_path / "v_*.bin"), 8)
    assert isinstance(tokens, np.ndarray)
    assert tokens.tolist() == list(range(kept))


def test_too_few_validation_tokens(tmp_path):
    write_shard(tmp_path / "v.bin", range(8))
    with pytest.raises(ValueError, match="TRAIN_SEQ_LEN=8"):
        tg.load_validation_tokens(str(tmp_path / "v.bin"), 8)


class TestManifest:
    """validate_dataset_tokenizer_pair looks at data/manifest.json beside data/datasets/NAME."""

    @pytest.fixture
    def dataset(self, tmp_path):
        for i in range(3):
            write_shard(tmp_path / f"data/datasets/set_a/fineweb_train_{i:06d}.bin", [1])
        write_shard(tmp_path / "data/datasets/set_a/fineweb_val_000000.bin", [1])
        return tmp_path / "data/datasets/set_a"

    def manifest(self, dataset, entry=None, tokenizer=None, **changes):
        entry = {"name": "set_a", "tokenizer_name": "tok", "stats": {"files_train": 5, "files_val": 1}, **(entry or {})}
        tokenizer = {"name": "tok", "model_path": "tokenizers/right.model", **(tokenizer or {})}
        content = {"tokenizers": [{"name": "other"}, tokenizer], "datasets": [{"name": "set_b"}, entry], **changes}
        (dataset.parent.parent / "manifest.json").write_text(json.dumps(content))

    def check(self, dataset, tokenizer="somewhere/right.model"):
        return tg.validate_dataset_tokenizer_pair(str(dataset), tokenizer)

    def test_without_a_manifest(self, dataset):
        assert self.check(dataset, "any.model") == ("set_a", 3, None)

    def test_without_an_entry(self, dataset):
        self.manifest(dataset, entry={"name": "set_c"})
        assert self.check(dataset, "any.model") == ("set_a", 3, None)

    def test_expected_count(self, dataset):
        self.manifest(dataset)
        assert self.check(dataset) == ("set_a", 3, 5)
        self.manifest(dataset, entry={"stats": {"files_train": 3}})
        assert self.check(dataset) == ("set_a", 3, 3)

    def test_data_path_may_be_relative_or_a_link(self, dataset, tmp_path, monkeypatch):
        self.manifest(dataset)
        monkeypatch.chdir(dataset)
        assert tg.validate_dataset_tokenizer_pair(".", "right.model") == ("set_a", 3, 5)
        elsewhere = tmp_path / "disk/big"
        elsewhere.parent.mkdir()
        dataset.rename(elsewhere)
        dataset.symlink_to(elsewhere)  # the data set is known by the name it is linked under
        assert self.check(dataset) == ("set_a", 3, 5)

    def test_more_shards_than_expected(self, dataset):
        self.manifest(dataset, entry={"stats": {"files_train": 2}})
        with pytest.raises(ValueError, match="3 training shards"):
            self.check(dataset)

    def test_wrong_tokenizer(self, dataset):
        self.manifest(dataset)
        with pytest.raises(ValueError, match=r"wrong\.model.*right\.model"):
            self.check(dataset, "tokenizers/wrong.model")

    def test_model_path_goes_before_path(self, dataset):
        self.manifest(dataset, tokenizer={"path": "x/wrong.model"})
        assert self.check(dataset)[2] == 5
        self.manifest(dataset, tokenizer={"model_path": None, "path": "x/right.model"})
        assert self.check(dataset)[2] == 5
        with pytest.raises(ValueError, match="right.model"):
            self.check(dataset, "wrong.model")

    def test_unlisted_tokenizer_means_no_check(self, dataset):
        self.manifest(dataset, entry={"tokenizer_name": "gone"})
        assert self.check(dataset, "wrong.model") == ("set_a", 3, 5)

    def test_manifest_that_is_no_json(self, dataset):
        (dataset.parent.parent / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match=r"manifest\.json"):
            self.check(dataset)


def test_a_shard_is_neither_read_nor_copied_when_it_is_opened(tmp_path):
    """A sparse file of 4 GB opens as fast as a small one, and a batch costs what it holds."""
    count = 2_000_000_000
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, [], count=count)
    with path.open("r+b") as file:
        file.truncate(1024 + 2 * count)
    tracemalloc.start()
    stream, tokens = tg.TokenStream(str(path)), tg.load_validation_tokens(str(path), 1024)
    stream.seek(0, count - 3, 1)
    assert stream.take(4).tolist() == [0, 0, 0, 0]
    assert (stream.pos, stream.epoch) == (1, 2)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000
    assert (stream.tokens.dtype, type(stream.tokens), tokens.dtype) == (np.uint16, np.ndarray, np.uint16)
    assert len(stream.tokens) == count
    assert len(tokens) == (count - 1) // 1024 * 1024 + 1


def test_several_validation_files_are_joined(tmp_path):
    write_shard(tmp_path / "v_0.bin", [1, 2, 3])
    write_shard(tmp_path / "v_1.bin", [4, 65535, 6, 7])
    tokens = tg.load_validation_tokens(str(tmp_path / "v_*.bin"), 2)
    assert (tokens.tolist(), tokens.dtype) == ([1, 2, 3, 4, 65535, 6, 7], np.uint16)
