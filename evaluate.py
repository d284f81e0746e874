"""Score base and fine-tuned model side by side: python evaluate.py runs/NAME (see --help)."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported
    from minilora.summarization.cli import evaluate_main

    sys.exit(evaluate_main())
