"""The command `minilora`; train.py and evaluate.py call it too.

It is outside the package, because an import of the package imports PyTorch first, which takes
seconds. Ctrl-C within them ends the process as it ends any program: without a traceback.
"""

import signal
import sys


def main(*command: str) -> int:
    """Run `minilora COMMAND ...` on the arguments of this process. Returns the exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it may be ignored, by nohup for example
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from minilora import __main__

    signal.signal(signal.SIGINT, before)
    return __main__.main([*command, *sys.argv[1:]])
