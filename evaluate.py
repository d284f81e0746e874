"""Score base and fine-tuned model side by side: python evaluate.py runs/NAME (see --help)."""

import sys

import minilora_command

if __name__ == "__main__":
    sys.exit(minilora_command.main("evaluate"))
