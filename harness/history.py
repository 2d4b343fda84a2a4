"""metrics.csv of a run: a row an epoch, so that its curves can be read without TensorBoard."""
import csv
import io

from harness import checkpoint
from harness.errors import UserError


def add_row(path, row):
    """Add a row {column: value} with its "epoch"; a column that is new stays empty in the rows before."""
    _write(path, [*_rows(path), row])


def take_back(path, epochs):
    """Leave the rows of the first so many epochs: a run goes on after them."""
    kept = [row for row in _rows(path) if int(row["epoch"]) <= epochs]
    if kept:
        _write(path, kept)
    else:
        path.unlink(missing_ok=True)


def _rows(path):
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        [int(row["epoch"]) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and only its epochs so far are lost") from error
    return rows


def _write(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomic(path, text.getvalue().encode())
