"""Train pocket-bart's byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2).

BART's conventions (Lewis et al. 2020, section 2.1, after RoBERTa): `<s>` 0, `<pad>` 1, `</s>` 2,
`<unk>` 3, `<mask>` last; a text is encoded as `<s> ... </s>`; a leading space belongs to its word;
capitals are kept; a number is a token a digit.

    python pretraining/tokenizer.py --texts ../shared/data
"""

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

FIRST_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MASK = "<mask>"

# Modern chats and plain prose decide the vocabulary. Megabytes of each text.
SHARES = {
    "plainchat/pretraining.jsonl": 2,
    "pretraining2/chat_chitchat_byu.txt.xz": 8,
    "pretraining2/chat_topical_chat_valid_test.txt.xz": 4,
    "pretraining2/chat_synthetic_persona_chat.txt.xz": 2,
    "pretraining2/prose_tinystories_pieces.txt.xz": 3,
    "pretraining2/prose_squality_summaries.txt.xz": 3,
    "pretraining2/prose_african_storybook_storyweaver.txt.xz": 1,
    "pretraining2/prose_openstax_ccby.txt.xz": 1,
    "pretraining/self_dialogue.txt.xz": 6,
    "pretraining/sgd.txt.xz": 3,
    "pretraining/dialogue_summary_pairs.jsonl.xz": 2,
}


def lines(texts: Path) -> Iterator[str]:
    """Yield the lines of every text, up to its share of megabytes."""
    for name, megabytes in SHARES.items():
        left = megabytes * 1_000_000
        path = texts / name
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    break
                yield line.replace("\\n", "\n") if ".jsonl" in name else line


def train(texts: Iterator[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `size` entries, `<mask>` the last of them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    # Every digit is a token of its own, so that a number is copied digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
    parser.add_argument("--texts", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    parser.add_argument("--size", type=int, default=8192)
    arguments = parser.parse_args()
    tokenizer = train(lines(arguments.texts), arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{tokenizer.get_vocab_size()} entries in {arguments.out}")


if __name__ == "__main__":
    main()
