"""`accelerate launch` with honest signals and exit codes: `python -m alignment.launch --config_file X -m alignment`.

Takes the same words. The exit code is that of the processes, where accelerate says 1 for every fault; SIGTERM is handed
on to them and their end awaited, where accelerate would leave a single process behind. What SIGTERM ended before it
could save exits with 75 too: the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from alignment.stopping import EXIT_STOPPED


def main(words: Sequence[str] | None = None) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments: Any = launch_command_parser().parse_args(words)
    # Left to torch's agent, a second SIGTERM would end the agent while its workers still save.
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    signal.signal(signal.SIGTERM, _hand_on)
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    else:
        code = 0
    return exit_code(code)


def exit_code(code: int) -> int:
    """A process's return code as our own exit code; below 0 it is the signal that ended it."""
    if code == -signal.SIGTERM:
        return EXIT_STOPPED
    return 128 - code if code < 0 else code


def _hand_on(number: int, _frame: Any) -> None:
    import psutil  # comes with accelerate

    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
