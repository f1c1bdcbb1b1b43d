"""Processes of `wardround` and `wardround-site` that start in milliseconds, to be killed by the hundred.

Loading TensorFlow takes 5 to 8 seconds of CPU a process. The zygote is one process that has loaded it, and the
project's modules, but has run no operation, opened no channel and started no thread; it forks a child for each request.
A child sets its environment, reads `WARDROUND_FAILPOINTS` anew, sends what it says to a file and runs the command's
`main`. It can be signalled by its pid as any process, and dies with the zygote.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import pkgutil
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from client.package import installed_package

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "wardround": "server.cli",
    "wardround-site": "client.cli",
    "light-site": "tests.system.faults.light",
}
"""Names of commands, and the modules whose `main` they run."""

_LOADED = ("common", "tensorflow", "tensorflow_federated", "tests.system.faults.light")
_PACKAGES = ("common", "server", "client")  # all modules of these, too: children load nothing that changed meanwhile
_PR_SET_PDEATHSIG = 1
_at_end: list[Callable[[], object]] = []


class Child:
    """A process that the zygote forked."""

    def __init__(self, pid: int, status: int, log: Path, name: str) -> None:
        self.pid = pid
        self.log = log
        self.name = name
        self.started = time.monotonic()
        self._status = status
        self._code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it lives."""
        with self._lock:
            if self._code is None and select.select([self._status], [], [], 0)[0]:
                text = os.read(self._status, 32)
                os.close(self._status)
                self._code = int(text) if text else -signal.SIGKILL  # the zygote itself is gone
            return self._code

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended; raises TimeoutError, with the end of its log."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} does not end; it said:\n{self.said()[-3000:]}")
            time.sleep(0.01)
        return code

    def send(self, number: int) -> None:
        """Signals it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL, as when memory runs out or the power goes."""
        self.send(signal.SIGKILL)
        return self.wait(30)

    def stopped(self) -> bool:
        """Whether it is halted by SIGSTOP."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def said(self) -> str:
        """What it, and those before it at the same log, wrote."""
        return self.log.read_text(errors="replace")


class Zygote:
    """Starts the zygote; a context manager that ends it and all its children."""

    def __init__(self, log: Path) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its, log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.system.zygote", str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
            )
        self._control = mine
        self._lock = threading.Lock()
        if not self._control.recv(16):
            raise RuntimeError(f"the zygote ended at once:\n{log.read_text()[-3000:]}")

    def start(
        self, command: str, arguments: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Runs the command with these arguments and these additions to the environment."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        request = {
            "command": command,
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "environment": dict(environment or {}),
        }
        reading, writing = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._control, [json.dumps(request).encode()], [writing])
                answer = self._control.recv(16)
        finally:
            os.close(writing)
        if not answer:
            os.close(reading)
            raise RuntimeError("the zygote has ended")
        return Child(int(answer), reading, log, command)

    def close(self) -> None:
        """Ends it, and with it all that it started."""
        self._control.close()
        self._process.wait(30)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# The zygote's process. ----------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> None:
    for name in _LOADED:
        importlib.import_module(name)
    for package in map(importlib.import_module, _PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    installed_package()  # its children run what is loaded now, whatever changes on disk meanwhile
    gc.collect()
    gc.freeze()  # children share the pages, as long as the collector writes nothing into them
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    control.send(b"ready")
    while True:
        ready, _, _ = select.select([control.fileno(), reading], [], [])
        if reading in ready:
            os.read(reading, 4096)
            _reap(children)
        if control.fileno() in ready:
            request, (status,) = _receive(control)
            if request is None:
                break
            pid = os.fork()
            if pid == 0:
                _run(request, [control.fileno(), reading, writing, status, *children.values()])
            children[pid] = status
            control.send(str(pid).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    _reap(children, flags=0)


def _receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 1)
    return (json.loads(data), descriptors) if data else (None, [-1])


def _reap(children: dict[int, int], flags: int = os.WNOHANG) -> None:
    while children:
        try:
            pid, status = os.waitpid(-1, flags)
        except ChildProcessError:
            return
        if pid == 0:
            return
        with os.fdopen(children.pop(pid), "w") as pipe:
            try:
                pipe.write(str(os.waitstatus_to_exitcode(status)))
                pipe.flush()
            except OSError:  # nobody waits for it any more
                return


def _run(request: dict[str, Any], inherited: Sequence[int]) -> NoReturn:
    """The child: becomes the command, and never returns."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor in inherited:
            os.close(descriptor)
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.close(log)
        os.environ.update(request["environment"])
        importlib.reload(sys.modules["common.failpoints"])  # its functions see the new actions, whoever holds them
        random.seed()
        if request["command"] != "wardround":  # a site puts its own handler before TensorFlow puts one
            logging.root.handlers.clear()
        sys.argv = [request["command"], *request["arguments"]]
        _prepare(request["environment"])
        code = sys.modules[COMMANDS[request["command"]]].main(request["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for write in _at_end:
            write()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _prepare(environment: Mapping[str, str]) -> None:
    """What a fault run asks of a child beyond the command's own options."""
    if hours := environment.get("FAULTS_CLOCK_HOURS"):
        true_time = time.time
        time.time = lambda: true_time() + 3600 * float(hours)
    if seconds := environment.get("FAULTS_LONGEST_PAUSE"):  # of a site between two attempts to reach the coordinator
        sys.modules["client.agent"].__dict__["_LONGEST_PAUSE"] = float(seconds)
    if path := environment.get("FAULTS_COUNT"):
        _count_failpoints(Path(path))


def _count_failpoints(path: Path) -> None:
    """Has this process write, when it ends, how often it came by each failpoint."""
    from common import failpoints

    failpoints._actions = {name: failpoints.Action("sleep", "0", sys.maxsize) for name in failpoints.NAMES}

    _at_end.append(lambda: path.write_text(json.dumps(failpoints._counts)))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
