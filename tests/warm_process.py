"""Start `python -m ...` of a test in a process that has JAX and the engine imported already.

`Popen` and `run` here are those of `subprocess`. A server, started once for each process of pytest,
imports the engine, and forks for every command: a start then costs a tenth of the imports. JAX has
started no device and no thread before the fork, so a command begins as a fresh one does. A test
whose subject is what a process imports uses `subprocess` itself.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import socket
import struct
import subprocess
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRELOADED = (
    "jax.numpy",
    "optax",
    "orbax.checkpoint",
    "cosmo.cli.program",
    "cosmo.engine.train.train",
    "cosmo.engine.infer.infer",
)
# Tracing makes millions of objects that stay.
THRESHOLDS = (100_000, 20, 50)
_PR_SET_CHILD_SUBREAPER = 36
_LENGTH = struct.Struct("!q")


class Popen(subprocess.Popen):
    """A `subprocess.Popen` whose process is forked from the server. It takes Python's commands."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        # The last parameters are those of 3.11 and later: streams come before the others.
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_ = rest
        assert args[0] == sys.executable and preexec_fn is None
        streams = [p2cread, c2pwrite, errwrite]
        streams = [number if fd == -1 else fd for number, fd in enumerate(streams)]
        request = {
            "args": list(map(str, args[1:])),
            "cwd": str(cwd or os.getcwd()),
            "env": {**(os.environ if env is None else env)},
            "fds": [0, 1, 2, *pass_fds],
        }
        self.pid = _server()(request, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(args, *, capture_output=False, check=False, timeout=None, **settings):
    """`subprocess.run` in a warm process."""
    if capture_output:
        settings |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(args, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


if sys.platform != "linux":  # only there a process adopts its grandchildren
    Popen, run = subprocess.Popen, subprocess.run


@functools.cache
def _server():
    """Start the server; return `start(request, fds)`, which returns a process id."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm_process", str(theirs.fileno())],
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()

    def stop():
        ours.close()
        process.wait()

    atexit.register(stop)
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def start(request, fds) -> int:
        data = json.dumps(request).encode()
        # The process that the server forks becomes our child once its own parent has ended.
        assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        try:
            socket.send_fds(ours, [_LENGTH.pack(len(data))], fds)
            ours.sendall(data)
            (pid,) = _LENGTH.unpack(_receive(ours, _LENGTH.size))
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return pid

    return start


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _serve(connection: socket.socket):
    """Answer requests until the connection ends; in a process that was forked, return its work."""
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 16)
            if not data:
                return None
            data += _receive(connection, _LENGTH.size - len(data))
            request = json.loads(_receive(connection, _LENGTH.unpack(data)[0]))
        except EOFError:
            return None
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                for fd in (told, tell, connection.detach()):
                    os.close(fd)
                return functools.partial(_work, request, fds)
            os.write(tell, _LENGTH.pack(pid))
            os._exit(0)
        # First its end, which makes its child one of the process that asked.
        os.waitpid(between, 0)
        connection.sendall(os.read(told, _LENGTH.size))
        for fd in (told, tell, *fds):
            os.close(fd)


def _work(request: dict, fds: list[int]) -> None:
    """Be the process that was asked for: descriptors, folder, environment, then its program."""
    # Copies above all others, because a descriptor may stand where another one must go.
    high = [os.dup2(fd, 200 + number) for number, fd in enumerate(fds)]
    for fd in fds:
        os.close(fd)
    for fd, wanted in zip(high, request["fds"], strict=True):
        os.dup2(fd, wanted)
        os.close(fd)
    os.chdir(request["cwd"])
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ.setdefault("GLIBC_TUNABLES", "")  # else the command line begins a new process
    _update_jax(before)
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, places), *(x for x in sys.path if x not in places)]
    kind, *rest = request["args"]
    sys.orig_argv = [sys.executable, *request["args"]]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = request["args"]
        runpy.run_path(kind, run_name="__main__")


def _update_jax(before: dict[str, str]) -> None:
    """Give JAX the variables that it read when the server imported it."""
    import jax

    for name, value in os.environ.items():
        known = name.lower() in jax.config.values
        if name.startswith("JAX_") and known and before.get(name) != value:
            number = isinstance(jax.config.values[name.lower()], float)
            jax.config.update(name.lower(), float(value) if number else value)


def main() -> None:
    """Serve the connection whose descriptor is the first argument."""
    for name in PRELOADED:
        importlib.import_module(name)
    # Tests whose oracle is a process without them use warm ones.
    assert not {"tensorflow", "seqio"} & sys.modules.keys()
    gc.set_threshold(*THRESHOLDS)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy the pages of all these objects
    connection = socket.socket(fileno=int(sys.argv[1]))
    work = _serve(connection)
    if work is not None:
        work()


if __name__ == "__main__":
    main()
