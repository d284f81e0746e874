"""Train pocket-bart's byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2).

BART's conventions (Lewis et al. 2020, section 2.1, after RoBERTa): `<s>` 0, `<pad>` 1, `</s>` 2,
`<unk>` 3, `<mask>` last; a text is encoded as `<s> ... </s>`; a leading space belongs to its word;
capitals and digits are kept as they stand.

    python pretraining/tokenizer.py --texts ../shared/data/pretraining
"""

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FIRST_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MASK = "<mask>"

# Modern dialogue decides the vocabulary; novels are only sampled. Megabytes of each text.
SHARES = {
    "self_dialogue.txt.xz": 19,
    "sgd.txt.xz": 4,
    "taskmaster4.txt.xz": 1,
    "crd3_transcripts.txt.xz": 6,
    "dialogue_summary_pairs.jsonl.xz": 6,
    "qmsum_meetings.txt.xz": 1,
    "classic_books_dialogue_1840_1928.txt.xz": 8,
}


def lines(texts: Path) -> Iterator[str]:
    """Yield the lines of every text, up to its share of megabytes."""
    for name, megabytes in SHARES.items():
        left = megabytes * 1_000_000
        with lzma.open(texts / name, "rt", encoding="utf-8") as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    break
                yield line.replace("\\n", "\n") if name.endswith(".jsonl.xz") else line


def train(texts: Iterator[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `size` entries, `<mask>` the last of them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=FIRST_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/pretraining"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    parser.add_argument("--size", type=int, default=8192)
    arguments = parser.parse_args()
    tokenizer = train(lines(arguments.texts), arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{tokenizer.get_vocab_size()} entries in {arguments.out}")


if __name__ == "__main__":
    main()
