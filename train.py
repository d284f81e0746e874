"""Fine-tune a BART to summarize dialogues: python train.py --rank 8 (see --help)."""

import sys

import minilora_command

if __name__ == "__main__":
    sys.exit(minilora_command.main("train"))
