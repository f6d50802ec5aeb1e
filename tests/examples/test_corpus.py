"""examples/corpus.py and examples/batches.py: reading, splitting, entropy, windows."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from pretraining.batches import TrainBatches, validation_batches
from pretraining.corpus import load_corpus, split_documents, standard_library_files
from pretraining.failure import RunError
from pretraining.tokenizer import BPE, train_bpe


def texts(tensor: torch.Tensor) -> list[bytes]:
    return bytes(tensor.tolist()).split(b"\0")[:-1]


def test_split_is_by_document_disjoint_and_deterministic():
    documents = [f"document {i}".encode() for i in range(100)]
    corpus = split_documents("test", documents)
    train, validation = texts(corpus.train), texts(corpus.validation)
    assert len(validation) == 5
    assert sorted(train + validation) == sorted(documents)
    shuffled = split_documents("test", documents[::-1])
    assert set(texts(shuffled.validation)) == set(validation)


def test_a_duplicate_never_sits_on_both_sides():
    documents = [f"document {i % 30}".encode() for i in range(300)]
    corpus = split_documents("test", documents)
    assert not set(texts(corpus.train)) & set(texts(corpus.validation))


def test_few_documents_are_cut_at_nine_tenths():
    corpus = split_documents("test", [b"0123456789" * 10])
    assert texts(corpus.train) == [b"0123456789" * 9]
    assert texts(corpus.validation) == [b"0123456789"]


def test_default_corpus_is_the_standard_library():
    corpus = load_corpus()
    assert len(corpus.train) > 10 * len(corpus.validation) > 1_000_000
    assert corpus.fingerprint == load_corpus().fingerprint
    assert 4 < corpus.unigram_bpb() < 6
    assert b"\nimport sys\n" in corpus.train.numpy().tobytes()


def test_standard_library_files_leave_tests_and_packages_out(tmp_path: Path):
    for name in ("b.py", "a/c.py", "site-packages/x.py", "test/t.py", "a/tests/t.py", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    found = [f.relative_to(tmp_path).as_posix() for f in standard_library_files(tmp_path)]
    assert found == ["a/c.py", "b.py"]


def test_unigram_entropy_of_a_uniform_pair_is_one_bit():
    corpus = split_documents("test", [b"ab" * 500_000])
    # The smoothing and the zero byte at the end cost about 1e-5 bits.
    assert corpus.unigram_bpb() == pytest.approx(1.0, abs=1e-3)


def test_text_and_jsonl_give_the_same_bytes(tmp_path: Path):
    records = [f"Übung {i}\nsecond line" for i in range(40)]
    lines = "".join(json.dumps({"text": r, "id": i}) + "\n\n" for i, r in enumerate(records))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    for i, record in enumerate(records):
        (tmp_path / f"{i}.txt").write_text(record, encoding="utf-8")
    plain = load_corpus([str(tmp_path / "a.jsonl")])
    packed = load_corpus([str(tmp_path / "a.jsonl.gz")])
    files = load_corpus([str(tmp_path / f"{i}.txt") for i in range(40)])
    assert plain.documents == (38, 2)
    assert plain.fingerprint == packed.fingerprint == files.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("binary.txt", b"a\0b", "not text: zero byte at offset 1"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text: bad byte at offset 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("other.jsonl", b'{"text": "a"}\n\n{"content": "b"}\n', 'line 3: no string "text"'),
        ("list.jsonl", b"[1]\n", 'line 1: no string "text"'),
        ("hollow.jsonl", b'{"text": ""}\n', 'every "text" is empty'),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-6], "not a valid gzip file"),
        ("plain.jsonl.gz", b'{"text": "a"}', "not a valid gzip file"),
        ("short.txt", b"abc", "too little text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        load_corpus([str(tmp_path / name)])


def test_missing_files_and_folders_are_named(tmp_path: Path):
    with pytest.raises(RunError, match=r"cannot read .*gone.txt"):
        load_corpus([str(tmp_path / "gone.txt")])
    with pytest.raises(RunError, match=r"has no text: --data takes files named \.txt"):
        load_corpus([str(tmp_path)])


def test_of_a_folder_the_texts_are_taken_and_what_is_none_is_counted(tmp_path: Path):
    for i in range(30):
        (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 3}" / f"{i}.py").write_text(f"document {i}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "model.bin").write_bytes(b"\0")
    corpus = load_corpus([str(tmp_path)])
    assert corpus.name == f"{tmp_path} (1 files left out)"
    assert sum(corpus.documents) == 30
    assert set(texts(corpus.train) + texts(corpus.validation)) == {
        f"document {i}".encode() for i in range(30)
    }


def test_tokens_of_a_bpe_stand_for_the_bytes_of_the_corpus():
    documents = [f"déjà vu, {i} times\n\tthe same\r\n".encode() for i in range(40)]
    corpus = split_documents("test", [*documents, b"not utf-8: \xff"])
    tokenizer = BPE(train_bpe(corpus, 300))
    tokens = tokenizer.tokenized(corpus)
    assert len(tokens.train) < len(corpus.train) / 2
    for split in ("train", "validation"):
        found, expected = getattr(tokens, split), getattr(corpus, split)
        text = tokenizer.decode(found.tolist())
        assert text == expected.numpy().tobytes().replace(b"\0", b"").decode(errors="replace")
        replaced = 2 * text.count("\ufffd")  # three bytes for one
        assert tokens.bytes_in(found) == len(expected) + replaced
    assert tokens.fingerprint == BPE(tokenizer.text).tokenized(corpus).fingerprint
    assert tokens.fingerprint != corpus.fingerprint


def test_an_epoch_shows_every_window_once_and_targets_are_one_ahead():
    data = torch.arange(101).to(torch.uint8)
    batches = TrainBatches(data, seq_len=10, batch_size=5, seed=3)
    assert batches.windows == 10
    pairs = [batches.next() for _ in range(2)]
    starts = sorted(int(t[0]) for tokens, _ in pairs for t in tokens)
    assert starts == list(range(0, 100, 10))
    for tokens, targets in pairs:
        assert torch.equal(targets, tokens + 1)


def test_batches_are_a_function_of_seed_and_position():
    data = torch.randint(0, 256, (997,), dtype=torch.uint8)
    whole = TrainBatches(data, 16, 7, seed=1)
    expected = [whole.next() for _ in range(30)]  # several epochs
    again = TrainBatches(data, 16, 7, seed=1, position=20 * 7)
    for tokens, targets in expected[20:]:
        got = again.next()
        assert torch.equal(got[0], tokens)
        assert torch.equal(got[1], targets)
    assert not torch.equal(TrainBatches(data, 16, 7, seed=2).next()[0], expected[0][0])


def test_validation_windows_are_fixed_spread_and_of_one_shape():
    data = (torch.arange(4001) % 251).to(torch.uint8)
    batches = list(validation_batches(data, seq_len=10, batch_size=4, count=5))
    assert [tuple(t.shape) for t, _ in batches] == [(4, 10)] * 5
    again = validation_batches(data, seq_len=10, batch_size=4, count=5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    few = list(validation_batches(data[:25], seq_len=10, batch_size=4, count=5))
    assert [tuple(t.shape) for t, _ in few] == [(4, 10)]


def test_too_little_data_for_a_window_is_refused():
    with pytest.raises(RunError, match="needs 11: give more data or a smaller --seq-len"):
        TrainBatches(torch.zeros(10, dtype=torch.uint8), 10, 1, seed=0)


def test_a_model_without_context_costs_the_unigram_entropy():
    corpus = split_documents("test", [b"aaab" * 100_000])
    share = torch.tensor([0.75, 0.25])
    entropy = float(-(share * share.log()).sum()) / math.log(2)
    assert corpus.unigram_bpb() == pytest.approx(entropy, abs=0.01)
