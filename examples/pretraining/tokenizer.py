"""Tokens: bytes as they are, or a byte-level BPE trained once on the corpus and kept with the run.

The tokenizer is that of the `tokenizers` library; transformers reads its ``tokenizer.json``. Its
tokens are bytes put together, so every text has tokens, and a loss per byte compares runs with
different vocabularies.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretraining.corpus import END_OF_DOCUMENT, Corpus
from pretraining.failure import RunError
from pretraining.files import write_json, write_text

NAME = "tokenizer.json"
END = "<|end|>"
"""The token at the end of a document, in the place of its zero byte."""

MOST_TRAINED_ON = 2**25
"""Bytes of the corpus that a BPE is trained on at most: whole documents, evenly spaced."""

_DOCUMENTS_AT_ONCE = 512


class Bytes:
    """Each byte is a token."""

    size = 256

    def tokenized(self, corpus: Corpus) -> Corpus:
        return corpus

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: there is nothing to keep."""


class BPE:
    """A byte-level BPE, from the text of its ``tokenizer.json``.

    Attributes:
        size: number of its tokens, at most those that were asked for.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._tokenizer = _library().Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise RunError(f"{NAME} is no tokenizer: {error}") from error
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise RunError(f"{NAME} has no token {END}: give the one that the run was started with")
        self._end = int(end)
        self.size = int(self._tokenizer.get_vocab_size())

    @classmethod
    def read(cls, folder: Path) -> BPE:
        """The tokenizer that a run has kept."""
        try:
            return cls((folder / NAME).read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"cannot read {folder / NAME}: {error.strerror}") from error

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, and what `AutoTokenizer` needs beside it."""
        write_text(folder / NAME, self.text)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        write_json(folder / "tokenizer_config.json", settings)

    def tokenized(self, corpus: Corpus) -> Corpus:
        """The corpus with int32 tokens, and how many bytes each token stands for."""
        return dataclasses.replace(
            corpus,
            train=self._encode(corpus.train),
            validation=self._encode(corpus.validation),
            bytes_of=self._bytes_of(),
        )

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode([t for t in tokens if t < self.size])

    def _encode(self, data: Tensor) -> Tensor:
        texts = documents(data)
        parts = []
        for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
            encoded = self._tokenizer.encode_batch_fast(texts[first : first + _DOCUMENTS_AT_ONCE])
            ids = [i for document in encoded for i in (*document.ids, self._end)]
            parts.append(torch.tensor(ids, dtype=torch.int32))
        return torch.cat(parts)

    def _bytes_of(self) -> Tensor:
        """A token is spelled with one letter for each byte."""
        spelled = self._tokenizer.get_vocab(with_added_tokens=True)
        lengths = torch.ones(self.size, dtype=torch.int64)
        for token, index in spelled.items():
            if index != self._end:
                lengths[index] = len(token)
        return lengths


def train_bpe(corpus: Corpus, size: int) -> str:
    """The ``tokenizer.json`` of a BPE of `size` tokens at most, trained on the train split.

    Raises:
        RunError: the library is missing, or `size` leaves no token beside the bytes.
    """
    library = _library()
    if size < 258:
        raise RunError(f"--vocab-size {size}: use at least 258 with --tokenizer bpe")
    texts = documents(corpus.train)
    every = -(-len(corpus.train) // MOST_TRAINED_ON)
    tokenizer = library.Tokenizer(library.models.BPE())
    byte_level = library.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=byte_level.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts[::every], trainer)
    return str(tokenizer.to_str())


def documents(data: Tensor) -> list[str]:
    """The texts of a split of bytes; what is not UTF-8 becomes replacement characters."""
    parts = data.numpy().tobytes().split(END_OF_DOCUMENT)[:-1]
    return [part.decode("utf-8", errors="replace") for part in parts]


def _library() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise RunError("--tokenizer bpe needs tokenizers: pip install tokenizers") from error
    return tokenizers
