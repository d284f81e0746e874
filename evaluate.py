"""Score base and fine-tuned model side by side: python evaluate.py runs/NAME (see --help)."""

import sys

from minilora.summarization.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
