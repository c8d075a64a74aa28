"""Ctrl-C, SIGTERM and SIGUSR1: the run ends after the step it is in, saved, on all processes at the same step.

SIGUSR1 is what SLURM is asked to warn with before a job's time is over (sbatch --signal=USR1@300).

A launcher forwards signals that the terminal has sent to its processes already, so repeats are ignored for IMPATIENT
seconds. A Ctrl-C after that ends the process at once.
"""

import os
import signal
import sys
import threading
import time

IMPATIENT = 3.0
STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None))]  # Windows


class StopSignal:
    """Context in which the signals of STOPPING are noted in `number` (0: none) and nothing else happens."""

    def __init__(self, announce: bool):
        self.number, self.announce, self.since, self.before = 0, announce, 0.0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # python allows handlers there only
            self.before = {number: signal.signal(number, self.note) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if self.announce:
                text = (
                    f"\n{signal.Signals(number).name}: stopping after this step. Ctrl-C again stops at once, unsaved.\n"
                )
                os.write(sys.stderr.fileno(), text.encode())  # print may be in the middle of another
        elif number == signal.SIGINT and time.monotonic() - self.since > IMPATIENT:
            raise KeyboardInterrupt


def shield_worker(_: int) -> None:
    """For a loader's workers: a signal sent to the whole process group is for the run, which still needs their data.

    A worker ends when its parent tells it to, or is gone.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
