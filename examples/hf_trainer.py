"""Pretrain a small Llama with the Trainer of Hugging Face and POET-X: from text to a sentence.

    python examples/hf_trainer.py                                # the standard library's sources
    python examples/hf_trainer.py --data notes/*.txt             # files of your own
    python examples/hf_trainer.py --data roneneldan/TinyStories  # a data set of the hub

Needs the extra `hf`. A second word after the name of a data set is its configuration. The folder
of `--out` holds the Trainer's checkpoints and, in export/, a plain model that needs nothing of this
package.
"""

import argparse
import sysconfig
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import poetx_compile as poetx
from poetx_compile.integrations.huggingface import for_trainer

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
LENGTH, VOCABULARY, END, PROMPT = 128, 2048, "<end>", "def main("


def main(arguments: list[str] | None = None) -> str:
    """Run the command line; returns the sentence."""
    files = sorted(map(str, Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=files, help="files, or a data set of the hub")
    parser.add_argument("--out", default="runs/hf-trainer", help="folder of the run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stage", default="inductor", help="aot_eager: no C++ compiler, slower")
    given = parser.parse_args(arguments)

    if Path(given.data[0]).exists():
        how = {"data_files": given.data, "sample_by": "document"}
        texts = load_dataset("text", split="train", **how)
    else:
        texts = load_dataset(*given.data, split="train")
    tokenizer = train_tokenizer(texts["text"])
    data = cut(texts, tokenizer).train_test_split(test_size=64, seed=0)

    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=4, **SIZES, **special))
    args = TrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=given.steps // 10,
        logging_steps=max(given.steps // 30, 1),
        eval_strategy="steps",
        eval_steps=max(given.steps // 3, 1),
        dataloader_drop_last=True,  # batches of one size are compiled once
        report_to="none",
    )
    config = poetx.POETXConfig(block_size=SIZES["hidden_size"] // 2)
    # Prepares the model, compiles it and makes the optimiser; the Trainer stays as it is.
    options = {"stage": given.stage}
    setup = for_trainer(model, args, config, optimizer=poetx.POETXMuon, options=options)
    trainer = Trainer(train_dataset=data["train"], eval_dataset=data["test"], **setup)
    trainer.train()
    print(f"validation loss: {trainer.evaluate()['eval_loss']:.3f} nats per token")

    export = f"{given.out}/export"
    poetx.merge_and_unload(trainer.model)  # plain nn.Linear again, original names
    trainer.save_model(export)
    tokenizer.save_pretrained(export)
    write = pipeline("text-generation", export)
    (written,) = write(PROMPT, max_new_tokens=40, do_sample=True, top_p=0.9)
    print(written["generated_text"])
    return written["generated_text"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for these documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[END]
    )
    tokenizer.train_from_iterator(texts, how)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def cut(texts: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """All documents behind one another, in rows of `LENGTH` tokens."""

    def rows(batch: dict) -> dict:
        tokens = tokenizer([text + END for text in batch["text"]])["input_ids"]
        joined = list(chain.from_iterable(tokens))
        cuts = range(LENGTH, len(joined) + 1, LENGTH)
        made = [joined[end - LENGTH : end] for end in cuts]
        return {"input_ids": made, "labels": made}

    return texts.map(rows, batched=True, remove_columns=texts.column_names)


if __name__ == "__main__":
    main()
