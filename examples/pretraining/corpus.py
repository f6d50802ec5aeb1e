"""Byte-level corpora: the standard library's own sources, or the user's files.

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
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Train and validation bytes.

    Attributes:
        name: where the bytes come from, for the log.
        train, validation: uint8 [bytes]; documents end with a zero byte.
        documents: number of documents in (train, validation).
    """

    name: str
    train: Tensor
    validation: Tensor
    documents: tuple[int, int]

    @property
    def fingerprint(self) -> str:
        """Hash of both splits: a resumed run checks that it reads the same bytes."""
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
    """The corpus of `paths` (text, .jsonl, .jsonl.gz), or the standard library's sources.

    Raises:
        RunError: a file is missing, empty, not text or not valid jsonl; or nothing is left for one
            of the splits.
    """
    if paths:
        documents = [d for path in paths for d in read_documents(Path(path))]
        return split_documents(", ".join(str(p) for p in paths), documents)
    folder = Path(sysconfig.get_path("stdlib"))
    files = standard_library_files(folder)
    if not files:
        raise RunError(f"no Python sources under {folder}: give text files with --data")
    return split_documents("Python standard library", [file.read_bytes() for file in files])


def standard_library_files(folder: Path) -> list[Path]:
    """The library's .py files in a fixed order; no tests, no installed packages."""
    files = (f for f in folder.rglob("*.py") if not _SKIPPED_FOLDERS & set(f.parts[:-1]))
    return sorted((f for f in files if f.is_file()), key=lambda f: f.relative_to(folder).as_posix())


def read_documents(path: Path) -> list[bytes]:
    """The documents of one file: the lines' "text" of a jsonl file, else the file as a whole."""
    if path.is_dir():
        raise RunError(f"{path} is a folder: --data takes files (.txt, .jsonl, .jsonl.gz)")
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
