"""A Python that has imported what scripts need, and forks for each of them: launchers are real, imports are paid once.

    with Python("torch") as warm:
        subprocess.run([sys.executable, *warm.runs, "script.py", "--option"])

As a script this file is what a launcher starts: it hands its arguments, environment, folder and outputs to the process
that forks, and ends as the script does. The script ends when it is killed.
"""

import array
import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback


class Python:
    """Starts when it is entered; what it imports, it imports meanwhile.

    Args:
        modules: What the scripts will import. What is not installed is left to them.
        path: Folders in front of PYTHONPATH while it imports.
    """

    def __init__(self, *modules, path=()):
        self.modules, self.path = modules, path

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="warm")
        address = os.path.join(self.folder.name, "socket")
        self.runs = [__file__, address]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        given = {"PYTHONPATH": os.pathsep.join([*map(str, self.path), *sys.path]), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listener.fileno()), *self.modules],
            pass_fds=[listener.fileno()],
            env=os.environ | given,
            start_new_session=True,
        )
        listener.close()
        return self

    def __exit__(self, *_):
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        self.folder.cleanup()


def serve(descriptor, modules):
    """Forks for whoever connects, until it is killed."""
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    listener, running = socket.socket(fileno=int(descriptor)), {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.05 if running else None):
                if key.fileobj is listener:
                    client = listener.accept()[0]
                    running[fork(client, listener)] = client
                    selector.register(client, selectors.EVENT_READ)
                else:  # it has died
                    selector.unregister(key.fileobj)
                    for child in [child for child, client in running.items() if client is key.fileobj]:
                        os.kill(child, signal.SIGKILL)
            for child, client in list(running.items()):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    with contextlib.suppress(OSError, KeyError):
                        selector.unregister(client)
                        client.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
                    running.pop(child).close()


def fork(client, listener):
    """The child runs the script as its interpreter would; its process id."""
    message, descriptors = b"", array.array("i")
    while not message.endswith(b"\n"):
        part, extra, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(8))
        message += part
        for _, _, data in extra:
            descriptors.frombytes(data)
    child = os.fork()
    if child:
        for descriptor in descriptors:
            os.close(descriptor)
        return child
    listener.close()
    client.close()
    for descriptor, kept in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, kept)
        os.close(descriptor)
    given = json.loads(message)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    sys.argv = given["arguments"]
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[0])), *filter(None, own)]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else bool(stopped.code)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ask(address, arguments):
    """The status with which the script ended."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(address)
    given = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    outputs = array.array("i", [1, 2])
    message = json.dumps(given).encode() + b"\n"
    sent = client.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
    client.sendall(message[sent:])
    status = client.recv(1)
    return status[0] if status else 1


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3:])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
