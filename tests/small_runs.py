"""Small trainings of the script, and what became of them."""
from conftest import call
from processes import Forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8",
         "--log-every", "2", "--device", "cpu", "--precision", "fp32", "--seed", "1"]


def run(folder, *flags, script="vqvae.py"):
    return call(folder, script, *SMALL, *flags)


def run_altered(folder, code, *flags):
    """Run Python code in a process of its own, with what the flags of a small training are: status, stdout, stderr."""
    (folder / "altered.py").write_text(code)
    process = Forked(folder, folder / "altered.py", *SMALL, *flags)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def fails(result, *words):
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and "error: " in err, err
    assert all(word in err for word in words), err


def curves(folder, name="vqvae"):
    """{tag: [(step, value)]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "logs" / name))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
