"""The guard of a trial: nothing a trial started outlives it, and no trial outlives its runner.

A trial process forks before it has imported anything heavy. The parent stays behind as the guard, the child
goes on as the trial. The guard adopts every process that the trial's descendants leave behind, in whatever
process group or session they hide. Three things end it all: the trial ends; the runner closes its end of a
pipe (the trial is over its limits); the runner dies, for whatever reason, and the kernel closes the pipe. The
guard then kills all that is left and ends as the trial did, with its exit code or by its signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import uuid
from collections.abc import Sequence
from typing import IO, NoReturn

from harness.store.processes import identity, is_gone, with_variable

GUARD_VARIABLE = "MOCBENCH_GUARD_FD"
# In the environment of all that a trial starts: who its runner is, and which of its trials. So what is left
# can be found where the guard was killed.
MARK_VARIABLE = "MOCBENCH_TRIAL"
# How long a guard may take to kill its processes before its whole group is killed instead.
END_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class GuardedProcess:
    """The runner's side: a command in a session of its own that calls `enter` first thing."""

    def __init__(self, command: Sequence[str], log: IO[bytes], environment: dict[str, str]) -> None:
        inherited, self._lifeline = os.pipe()
        self._mark = f"{identity()}/{uuid.uuid4().hex}"
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, GUARD_VARIABLE: str(inherited), MARK_VARIABLE: self._mark},
                pass_fds=(inherited,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(inherited)
        self.pid = self._process.pid
        self._ended = os.pidfd_open(self.pid)

    def wait(self, seconds: float) -> bool:
        """Wait until the process and all it started are gone; False if they are not after `seconds`."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self) -> int:
        """Kill what is left, wait until it is gone and return the exit status, negative for a signal."""
        os.close(self._lifeline)
        self.wait(END_SECONDS)
        # The guard may be stuck, or have been killed; its group's id is its own until it is waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        os.close(self._ended)
        if status == -signal.SIGKILL:
            _kill_marked(self._mark)
        return status

    def memory_bytes(self) -> int:
        """Resident bytes of the process group, shared pages counted for each process that has them."""
        import psutil

        total = 0
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(process.pid) == self.pid:
                    total += process.memory_info().rss
        return total


def enter() -> None:
    """Fork into guard and trial; returns in the trial. A process started by hand stays as it is."""
    descriptor = os.environ.pop(GUARD_VARIABLE, None)
    if descriptor is None:
        return
    lifeline = int(descriptor)
    guard = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    trial = os.fork()
    if trial == 0:
        os.close(lifeline)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it was killed before the call above
            os.kill(os.getpid(), signal.SIGKILL)
        return
    _end_as(_watch(trial, lifeline))


def _watch(trial: int, lifeline: int) -> int:
    """Wait for the trial's end or the runner's word, leave no descendant; the trial's wait status."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a trial may signal its whole group
        signal.signal(name, signal.SIG_IGN)
    select.select([os.pidfd_open(trial), lifeline], [], [])
    outcome = 0
    while True:
        try:
            gone, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return outcome
        if gone == trial:
            outcome = status
        if gone == 0:
            import psutil  # here: a trial enters at once, and most leave nothing behind

            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    child.kill()
            # Killed processes hand their own children up to here: look again when one is gone.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


def end_orphans() -> None:
    """Kill what is left of trials on this machine whose runner was killed together with their guard."""
    for pid, mark in with_variable(MARK_VARIABLE):
        if is_gone(mark.rpartition("/")[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    while left := [pid for pid, other in with_variable(MARK_VARIABLE) if other == mark]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _end_as(status: int) -> NoReturn:
    """End this process the way the wait status says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
