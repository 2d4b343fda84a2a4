"""stdout and stderr that may go away: what can no longer be printed is lost, and the work goes on."""
import errno
import os
import sys
from contextlib import contextmanager


class _Lasting:
    """A stream that falls silent once it cannot be written; `lost` is the OSError that said so, None until then."""

    def __init__(self, stream):
        self._stream, self.lost = stream, None

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            self.lost = error
            with open(os.devnull, "w") as null:  # where what is still in its buffers goes, too
                os.dup2(null.fileno(), self._stream.fileno())


@contextmanager
def lasting():
    """Within it, a stdout or stderr that is closed, full or a pipe that nobody reads stops nothing."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file of the run would get the number of a closed one
        pass
    os.close(spare)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = [_Lasting(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def check():
    """OSError where something printed within `lasting` was lost, except in a pipe whose reader wanted no more."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost and lost.errno != errno.EPIPE:
        raise OSError(f"what was printed is lost ({lost.strerror}); files are written: make room, or send stdout "
                      "elsewhere")
