"""Scripts in processes of their own that need not import torch again: forks of one process that has."""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torchvision.transforms", "tensorboardX"])


def _become(folder, command, environment, out, err):
    """The forked process from here on: what `python COMMAND` would be, in a folder."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """A script that runs, as subprocess.Popen shows it: the part of it that tests use."""

    def __init__(self, folder, *command, **environment):
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self.process = CONTEXT.Process(target=_become, args=(
            str(folder), tuple(map(str, command)), os.environ | environment, *(write for _, write in pipes)))
        self.process.start()
        for _, write in pipes:
            write.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(read.fileno()), "r") for read, _ in pipes)
        self.pid = self.process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def terminate(self):
        self.process.terminate()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)

    @property
    def returncode(self):
        return self.process.exitcode

    def communicate(self, timeout=None):
        """What was left of stdout and of stderr, once the process has ended."""
        texts = {}
        threads = [threading.Thread(target=lambda name=name: texts.update({name: getattr(self, name).read()}),
                                    daemon=True) for name in ("stdout", "stderr")]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return texts["stdout"], texts["stderr"]


class ForkedPopen(Forked):
    """subprocess.Popen as study/runs.py calls it to train."""

    def __init__(self, command, stdout, env, **_):
        super().__init__(os.getcwd(), *command[1:], **env)
        self.output = stdout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def communicate(self, timeout=None):
        out, err = super().communicate(timeout)
        self.output.write(out)
        return out, err


def start_two(folder, script, *flags):
    """A script as two processes of one run, as torchrun would start them, in order of rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}
    return [Forked(folder, HERE / script, *flags, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def finish(processes):
    """What rank 0 wrote, once all have ended well."""
    texts = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), texts
    assert not any("Warning" in err for _, err in texts), texts
    return texts[0][0]
