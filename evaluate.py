"""Score base and fine-tuned model side by side: python evaluate.py runs/NAME (see --help)."""

import os
import signal
import sys

if __name__ == "__main__":
    # Until all is imported, Ctrl-C ends the program at once: an exception could come anywhere.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from minilora.summarization.cli import evaluate_main

    sys.exit(evaluate_main())
