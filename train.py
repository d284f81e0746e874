"""Fine-tune a BART to summarize dialogues: python train.py --rank 8 (see --help)."""

import os
import signal
import sys

if __name__ == "__main__":
    # Until all is imported, Ctrl-C ends the program at once: an exception could come anywhere.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from minilora.summarization.cli import train_main

    sys.exit(train_main())
