"""Fine-tune a BART to summarize dialogues: python train.py --rank 8 (see --help)."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported
    from minilora.summarization.cli import train_main

    sys.exit(train_main())
