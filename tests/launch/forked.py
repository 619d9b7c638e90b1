"""A Python whose imports are done: `forked.py SCRIPT ...` and `forked.py -m MODULE ...` run what `python` would run, in
a process forked from one that has imported torch, transformers, accelerate and hf_edit, which takes a rank longer than
most tests. `accelerate launch` and torchrun start their ranks with what PYTHON_EXEC names.

What is forked shares the seed of Python's hashes, so that ranks see their sets in one order. The launches that many
tests share, and the README's main job, are started without this.

Run, it is the client, which has to start fast; `serve` is the other end.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

SOCKET = "EDIT_TESTS_SOCKET"  # where the server listens
SIGNALS = signal.SIGTERM, signal.SIGINT


def client() -> None:
    """Hands arguments, environment, folder and files over, then signals; ends as the forked process did."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.environ[SOCKET])
    for number in SIGNALS:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(4)
    if len(answer) < 4:
        sys.exit("the process that forks has ended")
    code = int.from_bytes(answer, "big", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> list[str]:
    """Listens at `path` until its parent has ended. Returns in the forked processes: what to run."""
    import gc

    import accelerate.commands.accelerate_cli
    import datasets
    import torch.distributed.run
    import transformers

    import hf_edit

    # Lazy names: what a Trainer script asks for.
    transformers.Trainer, transformers.LlamaForCausalLM, hf_edit.EDiTTrainer, hf_edit.EDiT  # noqa: B018
    del accelerate, datasets, torch
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path + ".new")
    listener.listen(64)
    listener.settimeout(1.0)
    os.rename(path + ".new", path)
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return supervise(connection)
            connection.close()
    sys.exit()


def supervise(connection: socket.socket) -> list[str]:
    """Forks the process, in which it returns, and tells the client how that ended."""
    connection.setblocking(True)
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        connection.close()
        words, environment, folder = json.loads(text)
        become(environment, folder, files)
        return words
    for file in (*files, 0, 1, 2):  # who reads its output waits for all that could write there
        os.close(file)
    ended = os.pidfd_open(pid)
    while ended not in (ready := select.select([connection, ended], [], [])[0]):
        assert ready == [connection]
        numbers = connection.recv(64)
        for number in numbers:
            os.kill(pid, number)
        if not numbers:  # the client was killed
            end_all(pid)
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def end_all(pid: int) -> None:
    import psutil

    process = psutil.Process(pid)
    for one in [*process.children(recursive=True), process]:
        one.kill()


def become(environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Makes this process what `python` would be at the start of a script."""
    import random

    import numpy

    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    numpy.random.seed()


def run(words: list[str]) -> None:
    """What `python` does with these arguments."""
    import runpy

    while words[0] == "-u":
        del words[0]
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    client()
