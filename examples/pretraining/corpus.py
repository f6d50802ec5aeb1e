"""Corpora: the standard library's own sources, or the user's files.

A corpus is a list of documents (a file, or a line of a jsonl file), split into train and
validation by the hash of their contents, so that the split is the same on every machine and a
duplicate never sits on both sides.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretraining.failure import RunError

END_OF_DOCUMENT = b"\0"
VALIDATION_SHARE = 0.05
_FEWEST_DOCUMENTS = 20
_TEXT_NAMES = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Train and validation bytes, or tokens of them.

    Attributes:
        name: where the bytes come from, for the log.
        train, validation: uint8 [bytes]; documents end with a zero byte. Or int32 [tokens].
        documents: number of documents in (train, validation).
        bytes_of: int64 [vocabulary], the bytes that each token stands for; ``None``: one each.
    """

    name: str
    train: Tensor
    validation: Tensor
    documents: tuple[int, int]
    bytes_of: Tensor | None = None

    def bytes_in(self, tokens: Tensor) -> int:
        """How many bytes some tokens stand for."""
        return tokens.numel() if self.bytes_of is None else int(self.bytes_of[tokens].sum())

    @property
    def fingerprint(self) -> str:
        """Hash of both splits: a resumed run checks that it reads the same tokens."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.validation.numpy().tobytes())
        return digest.hexdigest()[:16]

    def unigram_bpb(self) -> float:
        """Bits per byte of the validation split under the train split's byte frequencies.

        Add-one smoothing keeps a byte that train never showed finite. This is the cross-entropy
        of the best model that ignores context.
        """
        train = torch.bincount(self.train, minlength=256).double() + 1
        validation = torch.bincount(self.validation, minlength=256).double()
        bits = -(train / train.sum()).log2()
        return float((validation / validation.sum() * bits).sum())


def load_corpus(paths: Sequence[str] = ()) -> Corpus:
    """The corpus of `paths` (text, .jsonl, .jsonl.gz, folders), or the standard library's sources.

    Of a folder it takes the files named as text, sources or jsonl; those that are none are left
    out and counted.

    Raises:
        RunError: a file is missing, empty, not text or not valid jsonl; or nothing is left for one
            of the splits.
    """
    if paths:
        found = [_read(Path(path)) for path in paths]
        documents = [d for documents, _ in found for d in documents]
        left = sum(count for _, count in found)
        name = ", ".join(str(p) for p in paths)
        return split_documents(name + (f" ({left} files left out)" if left else ""), documents)
    folder = Path(sysconfig.get_path("stdlib"))
    files = standard_library_files(folder)
    if not files:
        raise RunError(f"no Python sources under {folder}: give text files with --data")
    return split_documents("Python standard library", [file.read_bytes() for file in files])


def standard_library_files(folder: Path) -> list[Path]:
    """The library's .py files in a fixed order; no tests, no installed packages."""
    files = (f for f in folder.rglob("*.py") if not _SKIPPED_FOLDERS & set(f.parts[:-1]))
    return sorted((f for f in files if f.is_file()), key=lambda f: f.relative_to(folder).as_posix())


def _read(path: Path) -> tuple[list[bytes], int]:
    """The documents of a file or of a folder, and how many files of it are no text."""
    if not path.is_dir():
        return read_documents(path), 0
    files = (f for f in path.rglob("*") if f.name.lower().endswith(_TEXT_NAMES) and f.is_file())
    documents: list[bytes] = []
    left = 0
    for file in sorted(files, key=lambda f: f.relative_to(path).as_posix()):
        try:
            documents += read_documents(file)
        except RunError:
            left += 1
    if not documents:
        raise RunError(f"{path} has no text: --data takes files named {', '.join(_TEXT_NAMES)}")
    return documents, left


def read_documents(path: Path) -> list[bytes]:
    """The documents of one file: the lines' "text" of a jsonl file, else the file as a whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    names = path.name.lower()
    if names.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"{path} is not a valid gzip file: {error}") from error
        names = names.removesuffix(".gz")
    if not data.strip():
        raise RunError(f"{path} is empty")
    _check_text(path, data)
    if not names.endswith(".jsonl"):
        return [data]
    return list(_jsonl_documents(path, data))


def _check_text(path: Path, data: bytes) -> None:
    """UTF-8 without zero bytes (a zero byte ends a document)."""
    zero = data.find(0)
    if zero >= 0:
        raise RunError(f"{path} is not text: zero byte at offset {zero}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text: bad byte at offset {error.start}") from error


def _jsonl_documents(path: Path, data: bytes) -> Iterator[bytes]:
    found = False
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise RunError(f'{path}, line {number}: no string "text" in this line')
        if text:
            found = True
            yield text.encode("utf-8", errors="replace")
    if not found:
        raise RunError(f'{path}: every "text" is empty')


def split_documents(name: str, documents: Sequence[bytes]) -> Corpus:
    """Five per cent of the documents, by the order of their hashes, become validation.

    With fewer than 20 documents the last tenth of each one does instead.
    """
    if len(documents) < _FEWEST_DOCUMENTS:
        cuts = [len(d) - len(d) // 10 for d in documents]
        train = [d[:cut] for d, cut in zip(documents, cuts, strict=True)]
        validation = [d[cut:] for d, cut in zip(documents, cuts, strict=True)]
    else:
        hashes = [hashlib.sha256(d).digest() for d in documents]
        last = sorted(hashes)[math.ceil(VALIDATION_SHARE * len(documents)) - 1]
        pairs = list(zip(documents, hashes, strict=True))
        train = [d for d, h in pairs if h > last]
        validation = [d for d, h in pairs if h <= last]
    if not any(train) or not any(validation):
        raise RunError(f"{name}: too little text to split into train and validation")
    counts = (len(train), len(validation))
    return Corpus(name, _to_bytes(train), _to_bytes(validation), counts)


def _to_bytes(documents: Iterable[bytes]) -> Tensor:
    joined = b"".join(d + END_OF_DOCUMENT for d in documents)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
