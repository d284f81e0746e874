"""Fine-tune a BART to summarize dialogues: python train.py --rank 8 (see --help)."""

import sys

from minilora.summarization.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
