"""The bytes of all runs: made once into a folder, and mapped into memory by every worker."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from poetx_compile.state.files import write_atomically
from pretraining.corpus import Corpus, load_corpus, split_documents


@dataclasses.dataclass(frozen=True)
class Stored:
    """A corpus in a folder: ``corpus.bin``, train bytes before validation bytes.

    Attributes:
        train, validation: uint8 [bytes], mapped.
        name: where the bytes come from.
        fingerprint: hash of both splits; it is in the rows.
    """

    train: Tensor
    validation: Tensor
    name: str
    fingerprint: str


def store(folder: Path, paths: Sequence[str] = ()) -> Stored:
    """The corpus in `folder`, made there of `paths` if it is not there yet.

    Raises:
        RunError: a file cannot be read, or is no text.
        ValueError: the folder holds a corpus of something else.
    """
    about = folder / "corpus.json"
    asked = [str(Path(p).resolve()) for p in paths]
    if about.exists():
        values = json.loads(about.read_text(encoding="utf-8"))
        if values["paths"] != asked:
            raise ValueError(f"{about} is of other data: give another --out, or the same --data")
        return load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(paths) if paths else python_sources()
    both = torch.cat([corpus.train, corpus.validation])
    (folder / "corpus.bin").write_bytes(both.numpy().tobytes())
    values = {
        "paths": asked,
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "bytes": [len(corpus.train), len(corpus.validation)],
        "documents": list(corpus.documents),
    }
    text = json.dumps(values, indent=1)
    write_atomically(about, lambda path: path.write_text(text, encoding="utf-8"))
    return load(folder)


def load(folder: Path) -> Stored:
    """The corpus that `store` made in `folder`."""
    values = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    train, validation = values["bytes"]
    both = torch.from_file(
        str(folder / "corpus.bin"), size=train + validation, dtype=torch.uint8, shared=False
    )
    return Stored(both[:train], both[train:], values["name"], values["fingerprint"])


def python_sources(folders: Sequence[Path] | None = None) -> Corpus:
    """All Python sources of the interpreter and of its packages, each document once.

    Args:
        folders: where to look; default the standard library and the site-packages. Documents are in
            the order of the folders, and of the paths within.
    """
    if folders is None:
        places = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
        folders = [Path(place) for place in dict.fromkeys(places)]
    documents: dict[bytes, bytes] = {}
    for folder in folders:
        found = [f for f in folder.rglob("*.py") if f.is_file()]
        for file in sorted(found, key=lambda f: f.relative_to(folder).as_posix()):
            data = file.read_bytes()
            if data.strip() and b"\0" not in data:  # a zero byte ends a document
                documents.setdefault(hashlib.sha256(data).digest(), data)
    return split_documents("Python sources", list(documents.values()))
