"""Shard files, the token stream over them, batches, validation tokens and the manifest."""

import json
import os
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

import train_gpt_mlx as tg
from helpers import RECORDED, learnable_tokens, write_shard


@pytest.mark.parametrize("tokens", [[], [0, 1, 255, 256, 32768, 65535]], ids=str)
def test_a_shard_keeps_every_uint16(tmp_path, tokens):
    read = tg.load_data_shard(str(write_shard(tmp_path / "s.bin", tokens)))
    assert (read.tolist(), read.dtype) == (tokens, np.int32)


@pytest.mark.parametrize("header", [{"magic": 20240521}, {"version": 2}, {"count": 2}, {"count": 4}, {"count": -1}])
def test_a_shard_with_a_wrong_header_is_refused_by_name(tmp_path, header):
    path = write_shard(tmp_path / "broken.bin", [1, 2, 3], **header)
    with pytest.raises(ValueError, match="broken.bin"):
        tg.load_data_shard(path)


@pytest.mark.parametrize("size", [0, 8, 1023, 1029])
def test_a_shard_that_is_cut_short_is_refused_by_name(tmp_path, size):
    path = write_shard(tmp_path / "broken.bin", [1, 2, 3])
    os.truncate(path, size)
    with pytest.raises(ValueError, match="broken.bin"):
        tg.load_data_shard(path)


def test_ids_beyond_the_vocabulary_are_refused_with_file_and_position():
    tg.check_tokens(np.array([9, 63]), 64, "some.bin", start=5)
    with pytest.raises(ValueError, match="some.bin.* 6 .*64"):
        tg.check_tokens(np.array([9, 64]), 64, "some.bin", start=5)


def recorded_shards(case: dict, folder) -> str:
    for i, length in enumerate(case["shard_lengths"]):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", learnable_tokens(length, 997, case["salt"] + i))
    return str(folder / "fineweb_train_*.bin")


@pytest.mark.parametrize("case", RECORDED["loader"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_takes(tmp_path, case):
    log = []
    stream = tg.TokenStream(recorded_shards(case, tmp_path), log.append, "ds")
    for request, expected in zip(case["requests"], case["takes_first3_fileidx_pos_epoch"], strict=True):
        tokens = stream.take(request)
        assert (len(tokens), tokens.dtype) == (request, np.int32)
        assert [*tokens[:3].tolist(), stream.file_idx, stream.pos, stream.epoch] == expected
    assert log == case["log"]


@pytest.mark.parametrize("case", RECORDED["loader"], ids=lambda case: f"salt{case['salt']}")
def test_recorded_batches(tmp_path, case):
    loader = tg.TokenLoader(recorded_shards(case, tmp_path))
    batches = []
    for request in case["requests"]:
        if request >= case["seq_len"]:
            x, y = loader.next_batch(request, case["seq_len"])
            batches.append([list(x.shape), x.sum().item(), y.sum().item(), y[-1, -1].item()])
    assert batches == case["batches_shape_sumx_sumy_lasty"]


def test_a_stream_repeats_its_files_in_the_order_of_their_names(tmp_path):
    write_shard(tmp_path / "b_1.bin", [7])
    write_shard(tmp_path / "b_0.bin", [5, 6])
    log = []
    stream = tg.TokenStream(str(tmp_path / "b_*.bin"), log.append, "d")
    assert stream.files == [str(tmp_path / "b_0.bin"), str(tmp_path / "b_1.bin")]
    assert (stream.file_idx, stream.pos, stream.epoch, stream.tokens.tolist()) == (0, 0, 1, [5, 6])
    assert stream.take(3).tolist() == [5, 6, 7]
    assert (stream.file_idx, stream.pos, stream.epoch, log) == (1, 1, 1, [])  # nothing is opened before it is needed
    assert stream.take(1).tolist() == [5]
    assert (stream.file_idx, stream.pos, stream.epoch) == (0, 1, 2)
    assert log == ["WARNING: starting epoch:2 dataset:d train_shards:2"]
    assert (stream.take(8).tolist(), stream.epoch) == ([6, 7, 5, 6, 7, 5, 6, 7], 4)


@pytest.mark.parametrize("read", [tg.TokenStream, tg.TokenLoader, lambda files: tg.load_validation_tokens(files, 4)])
def test_a_pattern_without_files_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"nothing_\*\.bin"):
        read(str(tmp_path / "nothing_*.bin"))


def test_an_empty_shard_in_a_stream_is_refused_by_name(tmp_path):
    write_shard(tmp_path / "0.bin", [1])
    write_shard(tmp_path / "1.bin", [])
    with pytest.raises(ValueError, match="1.bin"):
        tg.TokenStream(str(tmp_path / "*.bin")).take(2)


def test_batches_do_not_overlap_and_targets_follow_their_inputs(tmp_path):
    loader = tg.TokenLoader(str(write_shard(tmp_path / "s.bin", range(100))))
    x, y = loader.next_batch(11, 4)  # room for two sequences
    assert x.dtype == y.dtype == mx.int32
    assert (x.tolist(), y.tolist()) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    x, y = loader.next_batch(4, 4)
    assert (x.tolist(), y.tolist()) == ([[9, 10, 11, 12]], [[10, 11, 12, 13]])


def test_a_batch_without_room_for_a_sequence_is_refused(tmp_path):
    loader = tg.TokenLoader(str(write_shard(tmp_path / "s.bin", range(9))))
    with pytest.raises(ValueError, match="7.*8"):
        loader.next_batch(7, 8)


@pytest.mark.parametrize(("count", "kept"), [(9, 9), (16, 9), (17, 17), (24, 17)])
def test_validation_files_are_joined_and_cut_to_whole_sequences(tmp_path, count, kept):
    write_shard(tmp_path / "v_0.bin", range(4))
    write_shard(tmp_path / "v_1.bin", range(4, count))
    assert tg.load_validation_tokens(str(tmp_path / "v_*.bin"), 8).tolist() == list(range(kept))


def test_too_few_validation_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="v.bin"):
        tg.load_validation_tokens(str(write_shard(tmp_path / "v.bin", range(8))), 8)


def test_opening_a_shard_reads_none_of_it(tmp_path):
    count = 2_000_000_000
    path = write_shard(tmp_path / "large.bin", [], count=count)
    os.truncate(path, 1024 + 2 * count)  # a sparse file
    tracemalloc.start()
    stream, tokens = tg.TokenStream(str(path)), tg.load_validation_tokens(str(path), 1024)
    assert stream.take(4).tolist() == [0, 0, 0, 0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert (len(stream.tokens), len(tokens)) == (count, (count - 1) // 1024 * 1024 + 1)


@pytest.fixture
def dataset(tmp_path):
    """The data set "mine", of three training shards."""
    for i in range(3):
        write_shard(tmp_path / f"datasets/mine/fineweb_train_{i:06d}.bin", [1])
    write_shard(tmp_path / "datasets/mine/fineweb_val_000000.bin", [1])
    return tmp_path / "datasets/mine"


def write_manifest(dataset, files_train: int = 5, dataset_name: str = "mine", **tokenizer: str) -> None:
    entry = {"name": dataset_name, "tokenizer_name": "tok", "stats": {"files_train": files_train, "files_val": 1}}
    manifest = {"tokenizers": [{"name": "tok", **tokenizer}], "datasets": [{"name": "first"}, entry]}
    (dataset.parent.parent / "manifest.json").write_text(json.dumps(manifest))


def test_without_a_manifest_nothing_is_expected(dataset):
    assert tg.validate_dataset_tokenizer_pair(str(dataset), "any.model") == ("mine", 3, None)


@pytest.mark.parametrize(("name", "files_train", "expected"), [("mine", 5, 5), ("mine", 3, 3), ("other", 5, None)])
def test_the_manifests_entry_says_how_many_training_shards_to_expect(dataset, name, files_train, expected):
    write_manifest(dataset, files_train, name)
    assert tg.validate_dataset_tokenizer_pair(str(dataset), "any.model") == ("mine", 3, expected)


def test_more_training_shards_than_expected_are_refused(dataset):
    write_manifest(dataset, files_train=2)
    with pytest.raises(ValueError, match="3.*2"):
        tg.validate_dataset_tokenizer_pair(str(dataset), "any.model")


@pytest.mark.parametrize(
    "tokenizer",
    [{"model_path": "a/right.model"}, {"path": "a/right.model"}, {"model_path": "right.model", "path": "wrong.model"}],
    ids=str,
)
def test_the_tokenizer_must_have_the_file_name_of_the_manifests(dataset, tokenizer):
    write_manifest(dataset, **tokenizer)
    tg.validate_dataset_tokenizer_pair(str(dataset), "b/right.model")
    with pytest.raises(ValueError, match=r"wrong\.model.*right\.model"):
        tg.validate_dataset_tokenizer_pair(str(dataset), "b/wrong.model")


def test_a_tokenizer_that_the_manifest_does_not_list_is_not_checked(dataset):
    write_manifest(dataset, name="another", model_path="right.model")
    assert tg.validate_dataset_tokenizer_pair(str(dataset), "wrong.model") == ("mine", 3, 5)
