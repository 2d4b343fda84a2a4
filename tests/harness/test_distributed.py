"""Two processes on this machine (gloo, loopback) against one: reductions, networks, and the scripts under torchrun."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HERE, call, write_images
from processes import Forked, finish, start_two
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.multiprocessing import start_processes

from harness import checkpoint, distributed
from quantizers import QUANTIZERS, settings_of

SMALL = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--lr", "1e-3", "--flip",
         "--precision", "fp32", "--device", "cpu", "--log-every", "1")


@pytest.fixture
def folder(tmp_path):
    """A working directory with 63 images 16x16: 51 to train, three batches of 16; a validation split of 6."""
    write_images(tmp_path, 63)
    return tmp_path


def torchrun(folder, *command):
    """Start a script as two processes."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                             str(HERE / command[0]), *map(str, command[1:])], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def curve(folder, name, tag):
    """[(step, value)] of a run's curve."""
    events = EventAccumulator(str(folder / "logs" / name))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def assert_same_curves(folder):
    """Losses of the runs "one" and "two", step by step."""
    for tag in ("loss/train/reconstruction", "loss/train/quantization", "1_valid/psnr", "term/ssim/weighted"):
        one, two = curve(folder, "one", tag), curve(folder, "two", tag)
        assert len(one) > 1 and [step for step, _ in one] == [step for step, _ in two]
        for (step, a), (_, b) in zip(one, two):
            assert b == pytest.approx(a, rel=2e-3 if step else 1e-5), (tag, step)


def until(process, line_start):
    """Read the output of a process up to a line that starts so."""
    for line in process.stdout:
        if line.startswith(line_start):
            break


def kill_one(process, line_start):
    """Kill one of torchrun's processes once a line of output starts so; what was written to stderr."""
    until(process, line_start)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(max(map(int, children.split())), signal.SIGKILL)
    return process.communicate(timeout=60)[1]


# --- within two processes

def _in_process(rank, port, check):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    distributed.start()
    try:
        check(rank)
    finally:
        distributed.stop()


def in_two(check):
    port = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    start_processes(_in_process, (port, check), nprocs=2, start_method="forkserver")


def _check_everything(rank):
    # Reductions.
    own = torch.arange(3.) + 10 * rank if rank else torch.arange(2.)
    assert distributed.total(torch.tensor(rank + 1)) == 3 and distributed.mean(rank) == 0.5
    together = torch.tensor([0., 1., 10., 11., 12.])
    assert torch.equal(distributed.concatenate(own), together)
    count, offset = distributed.count_of(own)
    assert (count, offset) == (5, 2 * rank)
    index = torch.tensor([4, 0, 2, 4])
    assert torch.equal(distributed.take(own.unsqueeze(1), index, offset).squeeze(1), together[index])

    # Batch norm, value, gradient and running statistics, on shares of unequal size.
    torch.manual_seed(0)
    whole = torch.randn(5, 3, 4, 4) * 3 + 1
    reference, model = nn.BatchNorm2d(3), nn.Sequential(distributed.BatchNorm2d(3))
    start, stop = (2, 5) if rank else (0, 2)
    x, y = whole.clone().requires_grad_(), whole[start:stop].clone().requires_grad_()
    wrapped = distributed.wrap(model, torch.device("cpu"))
    expected, out = reference(x), wrapped(y)
    torch.testing.assert_close(out, expected[start:stop], rtol=1e-5, atol=1e-5)
    expected.pow(3).sum().backward()
    out.pow(3).sum().backward()
    torch.testing.assert_close(y.grad, x.grad[start:stop], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(2 * model[0].weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-4)  # DDP averages
    torch.testing.assert_close(model.state_dict()["0.running_var"], reference.running_var)
    torch.testing.assert_close(model.eval()(whole), reference.eval()(whole))

    # Quantizers: the same codes, averages and restarts as of the whole batch at once.
    whole = whole[:, :, :3, :3]
    for name, quantizer in QUANTIZERS.items():
        settings = {"data_init": True, "restart_below": 0.5}
        settings = {key: value for key, value in settings.items() if key in settings_of(name)}
        torch.manual_seed(0)
        books = [quantizer(8, 3, **settings) for _ in range(2)]
        books[1].load_state_dict(books[0].state_dict())
        for step in range(3):
            torch.manual_seed(step)
            torch.rand(rank)  # whatever a process draws by itself changes nothing
            here = books[0].straight_through(whole[start:stop])
            alone, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
            torch.manual_seed(step)
            there = books[1].straight_through(whole)
            torch.distributed.is_initialized = alone
            torch.testing.assert_close([part[start:stop] for part in there], list(here))
            for key, value in books[1].state_dict().items():
                torch.testing.assert_close(books[0].state_dict()[key], value,
                                           msg=lambda text, at=(name, key): f"{at} {text}")


def test_reductions_batch_norm_and_codebook_are_those_of_one_process():
    in_two(_check_everything)


# --- the scripts

def test_two_processes_train_as_one_on_batches_twice_as_large(folder):
    # Biases before a batch norm have no gradient but rounding, which Adam enlarges to the learning rate. Running means
    # lag behind them, so that validation of the two differs by more, the higher the rate.
    flags = ("--num-epochs", "2", "--l1-weight", "1", "--ssim-weight", "0.5", "--lr", "2e-4")
    out = finish(start_two(folder, "vqvae.py", *SMALL, *flags, "--batch-size", "8", "--output-folder", "two"))
    assert out.count("epoch 2/2") == 1  # one of them speaks
    code, _, err = call(folder, "vqvae.py", *SMALL, *flags, "--batch-size", "16", "--output-folder", "one")
    assert code == 0, err
    assert_same_curves(folder)
    one, two = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae") for name in ("one", "two"))
    torch.testing.assert_close(two["model"]["codebook.embedding.weight"], one["model"]["codebook.embedding.weight"],
                               rtol=1e-2, atol=1e-2)
    results = [json.loads((folder / "models" / name / "results.json").read_text()) for name in ("one", "two")]
    for name in ("psnr", "quantization"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-2), name

    # Another number of processes goes on with the same batches.
    for name, batch in (("one", "16"), ("two", "16")):
        code, _, err = call(folder, "vqvae.py", *SMALL, *flags, "--num-epochs", "3", "--batch-size", batch,
                            "--output-folder", name, "--resume")
        assert code == 0, err
    one, two = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae") for name in ("one", "two"))
    assert one["counters"]["step"] == two["counters"]["step"] == 9
    assert_same_curves(folder)
    assert two["best"] == pytest.approx(one["best"], rel=2e-3)


def test_fewer_images_than_processes_are_refused_before_anything_is_written(tmp_path):
    write_images(tmp_path, 12)  # of which one is carved to validate
    processes = start_two(tmp_path, "vqvae.py", *SMALL, "--num-epochs", "1", "--batch-size", "2")
    err = "".join(process.communicate(timeout=120)[1] for process in processes)
    told = {line for line in err.splitlines() if line.startswith("vqvae.py: ")}
    assert all(process.returncode for process in processes) and told == {
        "vqvae.py: error: 1 valid images are fewer than the 2 processes: start fewer processes, or add images"}, err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_vqgan_and_prior_train_in_two_processes(folder):
    flags = (*SMALL, "--num-epochs", "1", "--disc-start", "1", "--disc-hidden-size", "8", "--l1-weight", "1",
             "--balance", "gradient")
    finish(start_two(folder, "vqgan.py", *flags, "--batch-size", "8", "--output-folder", "gan"))
    code, _, err = call(folder, "vqgan.py", *flags, "--batch-size", "16", "--output-folder", "one")
    assert code == 0, err
    for tag in ("loss/train/reconstruction", "loss/train/generator", "loss/train/discriminator", "vqgan/lambda"):
        for (step, a), (_, b) in zip(curve(folder, "one", tag), curve(folder, "gan", tag), strict=True):
            if step != 3:  # a batch that is split 2 + 1
                assert b == pytest.approx(a, rel=2e-2, abs=1e-3), (tag, step)

    flags = ("--model", "models/one/best.pt", "--hidden-size-prior", "8", "--num-layers", "2", "--num-epochs", "2",
             "--precision", "fp32", "--device", "cpu")
    finish(start_two(folder, "pixelcnn_prior.py", *flags, "--batch-size", "8", "--output-folder", "prior2"))
    code, _, err = call(folder, "pixelcnn_prior.py", *flags, "--batch-size", "16", "--output-folder", "prior1")
    assert code == 0, err
    one, two = (json.loads((folder / "models" / name / "results.json").read_text()) for name in ("prior1", "prior2"))
    assert two["nats_per_latent"] == pytest.approx(one["nats_per_latent"], rel=1e-3)
    assert two["codebook_perplexity"] == pytest.approx(one["codebook_perplexity"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_and_leaves_the_last_checkpoint(folder):
    process = torchrun(folder, "vqvae.py", *SMALL, "--num-epochs", "5000", "--batch-size", "8")
    err = kill_one(process, "epoch 2/")
    assert process.returncode and "lost the others" in err and "--resume" in err
    assert checkpoint.load(folder / "models" / "vqvae" / "last.pt", "vqvae")["counters"]["epoch"] >= 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_restarts_of_a_killed_and_resumed_run_are_those_of_one_that_was_not(folder):
    flags = (*SMALL, "--batch-size", "8", "--codebook-decay", "0.5", "--restart-below", "0.5")
    finish(start_two(folder, "vqvae.py", *flags, "--num-epochs", "9", "--output-folder", "whole"))
    processes = start_two(folder, "vqvae.py", *flags, "--num-epochs", "9", "--output-folder", "cut")
    until(processes[0], "epoch 2/")
    for process in processes:
        process.kill()
        process.communicate()
    before = checkpoint.load(folder / "models" / "cut" / "last.pt", "vqvae")["counters"]
    assert 1 <= before["epoch"] < 9 and before["batch"] == 0
    finish(start_two(folder, "vqvae.py", *flags, "--num-epochs", "9", "--output-folder", "cut", "--resume"))
    whole, cut = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae") for name in ("whole", "cut"))
    assert whole["counters"]["step"] == cut["counters"]["step"] == 27 and whole["best"] == cut["best"]
    for part in ("model", "random"):
        assert all(torch.equal(cut[part][key], value) for key, value in whole[part].items() if torch.is_tensor(value))
    for key, values in whole["optimizer"]["state"].items():
        assert all(torch.equal(cut["optimizer"]["state"][key][name], value) for name, value in values.items())


@pytest.mark.parametrize("script", ["evaluate", "compare", "reconstruct", "study/lengths", "benchmarks/benchmark"])
def test_scripts_of_one_process_refuse_to_be_two(folder, script):
    process = Forked(folder, HERE / f"{script}.py", WORLD_SIZE="2")
    err = process.communicate(60)[1]
    name = f"{script.split('/')[-1]}.py"
    assert process.returncode == 2
    assert err == f"{name}: error: this script is one process: start it with python, not with torchrun\n"
