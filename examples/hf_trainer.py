"""Pretrain a small Llama with the Trainer of Hugging Face and POET-X: from text to a sentence.

    python examples/hf_trainer.py                                # the standard library's sources
    python examples/hf_trainer.py --data notes/*.txt             # files of your own
    python examples/hf_trainer.py --data roneneldan/TinyStories  # a data set of the hub

Needs the extra `hf`; takes a few minutes on two CPU cores. The folder of `--out` gets the
Trainer's checkpoints and, in export/, a plain model that needs nothing of this package.
"""

import argparse
import sysconfig
from itertools import chain
from pathlib import Path

import transformers as hf
from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import poetx_compile as poetx
from poetx_compile.integrations.huggingface import for_trainer

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LENGTH, VOCABULARY, END, PROMPT = 64, 1024, "<end>", "def main("
DOCUMENTS = 20_000  # of a data set that has more, the first


def main(arguments: list[str] | None = None) -> str:
    """Run the command line; returns the sentence."""
    library = sorted(map(str, Path(sysconfig.get_paths()["stdlib"]).glob("[a-m]*.py")))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=library, help="files, or a name of the hub")
    parser.add_argument("--out", default="runs/hf-trainer", help="folder of the run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stage", default="inductor", help="eager: nothing to compile, slower")
    given = parser.parse_args(arguments)

    files = {"path": "text", "data_files": given.data, "sample_by": "document"}
    how = files if Path(given.data[0]).exists() else {"path": given.data[0]}
    texts = load_dataset(split="train", **how)
    texts = texts.select(range(min(len(texts), DOCUMENTS)))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["text"], VOCABULARY, special_tokens=[END], show_progress=False)
    bpe = Tokenizer.from_str(bpe.to_str())
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

    def rows(batch: dict[str, list]) -> dict[str, list]:
        """All documents behind one another, cut into rows of `LENGTH` tokens."""
        tokens = tokenizer([text + END for text in batch["text"]])["input_ids"]
        tokens = list(chain.from_iterable(tokens))
        made = [tokens[end - LENGTH : end] for end in range(LENGTH, len(tokens) + 1, LENGTH)]
        return {"input_ids": made, "labels": made}

    data = texts.map(rows, batched=True, remove_columns=texts.column_names)
    data = data.train_test_split(test_size=64, seed=0)

    hf.set_seed(0)
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    shapes = hf.LlamaConfig(num_attention_heads=4, **SIZES, **special)
    model = hf.AutoModelForCausalLM.from_config(shapes)
    args = hf.TrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=given.steps // 10,
        logging_steps=max(given.steps // 20, 1),
        eval_strategy="steps",
        eval_steps=max(given.steps // 4, 1),
        dataloader_drop_last=True,  # batches of one size are compiled once
        report_to="none",
    )
    # The weights are fresh: docs/how-to/choose-settings.md says what suits those.
    config = poetx.POETXConfig(block_size=SIZES["hidden_size"] // 2, init="spectrum", gains="rows")
    # Prepares the model, compiles it and makes the optimiser; the Trainer stays as it is.
    options = {"stage": given.stage}
    setup = for_trainer(model, args, config, optimizer=poetx.POETXMuon, options=options)
    trainer = hf.Trainer(train_dataset=data["train"], eval_dataset=data["test"], **setup)
    trainer.train()
    print(f"validation loss: {trainer.evaluate()['eval_loss']:.3f} nats per token")

    export = poetx.save_pretrained(model, f"{given.out}/export")
    tokenizer.save_pretrained(export)
    write = hf.pipeline("text-generation", str(export))
    (sample,) = write(PROMPT, max_new_tokens=60, do_sample=True, temperature=0.7)
    print(sample["generated_text"])
    return sample["generated_text"]


if __name__ == "__main__":
    main()
