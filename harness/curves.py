"""Curves and pictures for TensorBoard, written at once, so that a full disk stops the run and not a hidden thread."""
import time
from contextlib import contextmanager
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter  # of 2.6 and later; the public writers have a hidden thread
from tensorboardX.proto import event_pb2


def files_of(folder):
    """Files that hold the curves of the run in a folder, and none of runs in folders below."""
    return list(folder.glob("events.out.tfevents.*"))


class Curves:
    """An event file in a folder.

    Args:
        folder: made where it is missing. purge_step: what earlier files of the folder hold from this step on is taken
            back; None takes nothing back.
    Raises:
        OSError: here and in every method, the folder cannot be written.
    """

    def __init__(self, folder, purge_step=None):
        self.folder = Path(folder)
        with _named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        if purge_step is not None:
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(session_log=started), purge_step)

    def scalars(self, values, step):
        """Add {tag: number}."""
        for tag, value in values.items():
            self._write(event_pb2.Event(summary=summary.scalar(tag, value)), step)
        self._flush()

    def image(self, tag, picture, step):
        """Add a picture (C, H, W) in [0, 1]."""
        self._write(event_pb2.Event(summary=summary.image(tag, picture.cpu().numpy())), step)
        self._flush()

    def hparams(self, flags, figures, step):
        """Add the flags of a run and what came of it, {tag: number}: a row of TensorBoard's HParams."""
        plain = {name: value if isinstance(value, (int, float, bool)) else str(value).encode(errors="replace").decode()
                 for name, value in flags.items()}
        for part in summary.hparams(plain, figures):
            self._write(event_pb2.Event(summary=part), step)
        self.scalars(figures, step)

    def close(self):
        with _named(self.folder):
            self._file.close()

    def _write(self, event, step):
        event.wall_time, event.step = time.time(), step
        with _named(self.folder):
            self._file.write_event(event)

    def _flush(self):
        with _named(self.folder):
            self._file.flush()


@contextmanager
def _named(folder):
    """An OSError within says which folder it was about."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write the curves in {folder}: {error.strerror or error}; make room or mend the folder, "
                      "and go on with --resume") from error
