"""stdout and stderr that are closed, full or read by nobody: work goes on, and the exit status says what was lost."""
import os
import subprocess
import sys

import pytest
from conftest import HERE, call, write_images

from harness import checkpoint

TRAIN = ["--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8", "--num-epochs", "2",
         "--device", "cpu", "--precision", "fp32", "--num-workers", "0"]
PRINTS = ("import sys\nfrom harness import streams\nwith streams.lasting():\n"
          "    for _ in range(3):\n        print('line', flush=True)\n        print('line', file=sys.stderr)\n"
          "    open('done', 'w').write('whole')\n    streams.check()\n")


def shell(folder, command, code=PRINTS):
    """Run `$0 -c $1`, Python and the code, as a shell's command says: its exit status, stdout and stderr."""
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}", sys.executable, code], cwd=folder, text=True,
                          capture_output=True, timeout=60, env=os.environ | {"PYTHONPATH": str(HERE)})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("streams", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "| true",
                                     "2>&1 | head -1",
                                     "2>&1 >&- | true"])
def test_a_stream_that_is_gone_stops_nothing(tmp_path, streams):
    code, _, err = shell(tmp_path, f'"$0" -c "$1" {streams}')
    assert code == 0 and "Traceback" not in err and "Exception" not in err, err
    assert (tmp_path / "done").read_text() == "whole"  # and of no stream


def test_what_a_full_disk_lost_is_said_at_the_end(tmp_path):
    code, _, err = shell(tmp_path, '"$0" -c "$1" >/dev/full')
    assert code and err.splitlines()[:3] == ["line"] * 3 and "what was printed is lost (No space left" in err
    assert (tmp_path / "done").exists()


def test_a_file_that_a_run_opens_never_gets_what_is_printed(tmp_path):
    code = PRINTS.replace("with streams", "first = open('first', 'w')\nwith streams")
    assert shell(tmp_path, '"$0" -c "$1" 2>&-', code)[0] == 0 and (tmp_path / "first").read_text() == ""


def test_training_goes_on_and_keeps_its_checkpoints(tmp_path):
    write_images(tmp_path, 24)
    script = f"import sys\nfrom harness import cli\nimport vqvae\nsys.argv[1:] = {TRAIN!r}\ncli.run(vqvae.main)"
    code, out, _ = shell(tmp_path, '"$0" -c "$1" 2>&- | head -1', script)
    assert code == 0 and out.count("\n") == 1, out
    run = tmp_path / "models" / "vqvae"
    assert checkpoint.load(run / "last.pt", "vqvae")["counters"]["epoch"] == 2 and (run / "results.json").exists()
    assert call(tmp_path, "evaluate.py", "--model", run, "--no-features")[0] == 0
