"""Every quantizer through the same tests, each against an oracle of its own; and the health of the codebooks."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import call, write_images

from harness import checkpoint
from modules import VectorQuantizedVAE, VQEmbedding
from quantizers import QUANTIZERS, fsq_levels, settings_of

HEALTH = {"decay": 0.9, "data_init": True, "restart_below": 0.02}
SMALL = ("--hidden-size", "8", "--k", "16", "--batch-size", "8", "--lr", "1e-2", "--device", "cpu", "--log-every", "2")


def make(name, K=12, D=6):
    """A quantizer that has seen data, in eval mode."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name](K, D, **{key: value for key, value in HEALTH.items() if key in settings_of(name)})
    for _ in range(3):
        quantizer.straight_through(torch.randn(3, D, 4, 4))
    return quantizer.eval()


def table(quantizer):
    """(K, D) what each latent embeds to."""
    return quantizer.embed(torch.arange(quantizer.K).view(1, 1, -1))[0, :, 0].t().detach()


def rows(z):
    return z.permute(0, 2, 3, 1).flatten(0, 2)


# --- oracles: vectors (N, D) -> latents (N,), and the gradient at them of the one (N, D) at z_q_st

def nearest(quantizer, vectors):
    return (vectors.double().unsqueeze(1) - table(quantizer).double()).square().sum(2).argmin(1)


def most_similar(quantizer, vectors):
    return F.cosine_similarity(vectors.double().unsqueeze(1), table(quantizer).double(), dim=2).argmax(1)


def fsq_numbers(quantizer, vectors):
    """Bounded numbers (N, d) and their slope over L // 2: a step is 1, an even count lies around -1/2."""
    levels = fsq_levels(quantizer.K)
    narrow = quantizer.narrow.double()(vectors.double()).detach()
    quantizer.float()
    numbers, slopes = [], []
    for i, level in enumerate(levels):
        half = (level - 1) / 2 * (1 + 1e-5)
        shift = 0. if level % 2 else math.atanh(0.5 / half)
        numbers.append(torch.tanh(narrow[:, i] + shift) * half - (0. if level % 2 else 0.5))
        slopes.append(half / torch.cosh(narrow[:, i] + shift) ** 2 / (level // 2))
    return torch.stack(numbers, 1), torch.stack(slopes, 1)


def nearest_of_grid(quantizer, vectors):
    """All K points of the grid, the first level's number running fastest."""
    sides = [range(-(level // 2), level - level // 2) for level in fsq_levels(quantizer.K)]
    grid = torch.tensor([point[::-1] for point in itertools.product(*sides[::-1])]).double()
    return (fsq_numbers(quantizer, vectors)[0].unsqueeze(1) - grid).square().sum(2).argmin(1)


def unchanged(quantizer, vectors, grad):
    return grad


def tangential(quantizer, vectors, grad):
    length, direction = vectors.norm(dim=1, keepdim=True), F.normalize(vectors)
    return (grad - direction * (direction * grad).sum(1, True)) / length


def rotated_back(quantizer, vectors, grad):
    """Row by row, with the rotation by the angle between a vector and its code, in their plane, written out."""
    result = []
    for vector, code, g in zip(vectors, table(quantizer)[nearest(quantizer, vectors)], grad):
        e, q = vector / vector.norm(), code / code.norm()
        across = F.normalize(q - (q @ e) * e, dim=0)
        cos, sin = q @ e, q @ across
        rotation = torch.eye(len(e)) + sin * (torch.outer(across, e) - torch.outer(e, across)) + (cos - 1) * (
            torch.outer(e, e) + torch.outer(across, across))
        torch.testing.assert_close(code.norm() / vector.norm() * rotation @ vector, code)
        result.append(code.norm() / vector.norm() * rotation.t() @ g)
    return torch.stack(result)


def through_rounding(quantizer, vectors, grad):
    slopes = fsq_numbers(quantizer, vectors)[1].float()
    return (grad @ quantizer.widen.weight * slopes @ quantizer.narrow.weight).detach()


ORACLES = {"cosine": (most_similar, tangential), "rotation": (nearest, rotated_back),
           "fsq": (nearest_of_grid, through_rounding)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_latents_are_those_of_brute_force(name):
    quantizer, z_e = make(name), 2 * torch.randn(3, 6, 5, 4)
    latents = quantizer(z_e)
    assert latents.shape == (3, 5, 4) and latents.dtype == torch.int64 and len(latents.unique()) > 3
    assert torch.equal(latents.flatten(), ORACLES.get(name, (nearest,))[0](quantizer, rows(z_e)))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_decoder_sees_what_the_latents_embed_to(name):
    quantizer, z_e = make(name), torch.randn(3, 6, 5, 4)
    z_q_st, z_q, latents = quantizer.straight_through(z_e)
    assert torch.equal(latents, quantizer(z_e)) and latents.dtype == torch.int64
    assert torch.equal(z_q_st, quantizer.embed(latents)) and z_q_st.shape == z_e.shape
    assert torch.equal(z_q, z_e if name == "fsq" else z_q_st)
    assert len(table(quantizer).unique(dim=0)) == quantizer.K  # so that no two latents are the same
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer.straight_through(z_e.bfloat16())
        assert torch.equal(quantizer(z_e.bfloat16()), quantizer(z_e.bfloat16().float()))
    assert all(found.dtype == torch.float32 for found in low[:2])
    assert torch.equal(low[0], quantizer.straight_through(z_e.bfloat16().float())[0])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_gradient_is_its_papers(name):
    quantizer, z_e = make(name), torch.randn(2, 6, 3, 5, requires_grad=True)
    z_q_st = quantizer.straight_through(z_e)[0]
    upstream = torch.randn_like(z_q_st)
    found, = torch.autograd.grad(z_q_st, z_e, upstream)
    expected = ORACLES.get(name, (nearest, unchanged))[1](quantizer, rows(z_e.detach()), rows(upstream))
    torch.testing.assert_close(rows(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_are_finite_where_there_is_no_direction(name):
    quantizer, z_e = make(name), torch.zeros(1, 6, 2, 2, requires_grad=True)
    assert torch.autograd.grad(quantizer.straight_through(z_e)[0].sum(), z_e)[0].isfinite().all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_losses_reach_what_learns_by_them(name):
    quantizer, z_e = make(name).train(), torch.randn(2, 6, 3, 5, requires_grad=True)
    z_q = quantizer.straight_through(z_e)[1]
    quantization, commitment = F.mse_loss(z_q, z_e.detach()), F.mse_loss(z_e, z_q.detach())
    assert quantization.requires_grad == (name == "gradient")
    if name == "gradient":
        quantization.backward()
        assert z_e.grad is None and quantizer.embedding.weight.grad.abs().sum() > 0
    gradient, = torch.autograd.grad(commitment, z_e)
    if name == "fsq":
        assert quantization == 0 and commitment == 0 and not gradient.any()
    else:
        torch.testing.assert_close(gradient, 2 * (z_e - z_q).detach() / z_e.numel())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nothing_changes_in_eval_mode(name):
    quantizer = make(name)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.straight_through(10 * torch.randn(3, 6, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_trains_resumes_and_carries_a_prior(name, tmp_path):
    write_images(tmp_path, 40)

    def run(folder, *flags):
        code, out, err = call(tmp_path, "vqvae.py", "--dataset", "folder", "--data-folder", "images", *SMALL,
                              "--quantizer", name, "--output-folder", folder, *flags)
        assert code == 0, err
        return out
    out = run("whole", "--num-epochs", "12")
    assert ("--quantizer fsq --k 16: 4 x 4 levels = 16 codes" in out) == (name == "fsq")
    psnr = [float(line.split("psnr ")[1].split()[0]) for line in out.splitlines() if line.startswith("epoch")]
    assert max(psnr) > psnr[0] + 0.5
    run("cut", "--num-epochs", "2")
    run("cut", "--num-epochs", "12", "--resume")
    whole, cut = (checkpoint.load(tmp_path / "models" / folder / "last.pt", "vqvae") for folder in ("whole", "cut"))
    for part in ("model", "random"):
        assert all(torch.equal(cut[part][key], value) for key, value in whole[part].items() if torch.is_tensor(value))
    model = VectorQuantizedVAE.rebuild(whole)
    assert whole["model_args"]["quantizer"] == name and type(model.codebook) is QUANTIZERS[name]
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.decode(model.encode(x)), model(x)[0])
    code, out, err = call(tmp_path, "pixelcnn_prior.py", "--model", "models/whole/best.pt", "--num-epochs", "1",
                          "--hidden-size-prior", "8", "--num-layers", "2", "--batch-size", "8", "--device", "cpu")
    assert code == 0 and (tmp_path / "models/prior/samples.png").exists(), err


def test_codes_of_cosine_are_of_unit_length_when_weights_are_averaged():
    quantizer, z_e = make("cosine"), torch.randn(3, 6, 5, 4)
    latents = quantizer(z_e)
    with torch.no_grad():
        quantizer.embedding.weight.mul_(torch.linspace(0.5, 1, quantizer.K).unsqueeze(1))  # as a mean over time is
    torch.testing.assert_close(table(quantizer).norm(dim=1), torch.ones(quantizer.K))
    assert torch.equal(quantizer(z_e), latents)


# --- names of flags and arguments

def test_an_unknown_quantizer_names_the_known_ones():
    with pytest.raises(ValueError, match="ema, gradient, cosine, fsq, rotation, got 'magic'"):
        VectorQuantizedVAE(3, 8, 16, quantizer="magic")


def test_a_frozen_codebook_of_another_quantizer_is_refused():
    found = {"model": VectorQuantizedVAE(3, 8, 16).state_dict(), "model_args": {"input_dim": 3, "dim": 8, "K": 16}}
    with pytest.raises(ValueError, match="quantizer gradient, this model cosine"):
        VectorQuantizedVAE(3, 8, 16, quantizer="cosine").freeze_codes(found)


def test_one_image_of_one_latent_is_refused_before_it_trains(tmp_path):
    write_images(tmp_path, 21)  # 17 to train
    code, _, err = call(tmp_path, "vqvae.py", "--dataset", "folder", "--data-folder", "images", *SMALL,
                        "--image-size", "4", "--num-epochs", "1", "--batch-size", "1")
    assert code == 2 and "4x4 is one latent" in err and "--batch-size of 2" in err
    assert not (tmp_path / "models").exists()


# --- finite scalars

def test_levels_come_as_near_as_any_product_of_them():
    reachable = {1}
    for _ in range(7):  # times 3 to 8, as often as fits
        reachable |= {number * level for number in reachable for level in range(3, 9) if number * level < 1400}
    for K in range(3, 600):
        levels = fsq_levels(K)
        assert set(levels) <= set(range(3, 9)) and list(levels) == sorted(levels, reverse=True)
        assert abs(math.prod(levels) - K) == min(abs(number - K) for number in reachable - {1})
        assert fsq_levels(math.prod(levels)) == levels  # so that a checkpoint's K builds the same model
    assert [fsq_levels(K) for K in (512, 1000, 4096)] == [(8, 8, 8), (8, 5, 5, 5), (8, 8, 8, 8)]
    for K in (2, 2 ** 63 - 1):
        with pytest.raises(ValueError, match="from 3 to 16,777,216 codes"):
            fsq_levels(K)


def test_every_level_is_reached_and_zero_is_one_of_them():
    for K in (3, 4, 5, 8):
        quantizer = QUANTIZERS["fsq"](K, 1)
        with torch.no_grad():
            quantizer.narrow.weight.fill_(1.), quantizer.narrow.bias.zero_()
        numbers = torch.linspace(-30, 30, 6001).view(1, 1, 1, -1)
        assert quantizer(numbers).flatten().unique_consecutive().tolist() == list(range(K))
        assert quantizer(torch.zeros(1, 1, 1, 1)).item() == K // 2


# --- the health of a codebook

def test_moving_averages_find_the_means_of_clusters():
    torch.manual_seed(0)
    centers = torch.tensor([[-4., 0.], [4., 0.], [0., 6.]])
    codebook = QUANTIZERS["ema"](3, 2).train()
    codebook.embedding.weight.copy_(centers / 10)  # each nearest to a cluster of its own
    codebook.average_sum.copy_(centers / 10)
    for _ in range(600):
        points = centers[torch.randint(3, (256,))] + 0.1 * torch.randn(256, 2)
        codebook.straight_through(points.view(4, 8, 8, 2).permute(0, 3, 1, 2))
    torch.testing.assert_close(codebook.embedding.weight, centers, atol=0.05, rtol=0)


def test_one_step_of_the_averages_is_the_published_formula():
    torch.manual_seed(0)
    codebook = QUANTIZERS["ema"](4, 3, decay=0.9).train()
    start, z_e = codebook.embedding.weight.detach().clone(), torch.randn(2, 3, 4, 4)
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 3)
    chosen = F.one_hot(torch.cdist(vectors, start).argmin(1), 4).float()  # (N, K)
    unit = 4 / len(vectors)  # of uniform usage
    count = 0.9 + 0.1 * unit * chosen.sum(0)
    total = 0.9 * start + 0.1 * unit * chosen.t() @ vectors
    codebook.straight_through(z_e)
    torch.testing.assert_close(codebook.embedding.weight, total / count.unsqueeze(1), atol=1e-4, rtol=1e-4)


def test_codes_start_as_encoder_outputs_of_the_first_batches():
    torch.manual_seed(0)
    codebook = VQEmbedding(10, 4, data_init=True).train()
    batches = [torch.randn(1, 4, 2, 2) for _ in range(4)]  # four vectors each: three batches fill ten codes
    for batch in batches:
        codebook.straight_through(batch)
    vectors = torch.cat([batch.permute(0, 2, 3, 1).reshape(-1, 4) for batch in batches[:3]])
    assert all((vectors == code).all(1).any() for code in codebook.embedding.weight)
    assert int(codebook.initialised) == 10


@pytest.mark.parametrize("learner", ["ema", "gradient"])
def test_dead_codes_restart_with_their_averages(learner):
    torch.manual_seed(0)
    codebook = QUANTIZERS[learner](8, 4, decay=0.5, restart_below=0.1).train()
    codebook.embedding.weight.data[5:] = 1e3  # nothing comes near
    for _ in range(6):
        codebook.straight_through(torch.randn(4, 4, 4, 4))
    assert codebook.embedding.weight.abs().max() < 10
    assert codebook.average_sum.abs().max() < 30 and (codebook.average_count > 0).all()


def test_no_restart_where_it_is_switched_off():
    codebook = VQEmbedding(8, 4, decay=0.5).train()
    codebook.embedding.weight.data[5:] = 1e3
    for _ in range(6):
        codebook.straight_through(torch.randn(4, 4, 4, 4))
    assert (codebook.embedding.weight[5:] == 1e3).all()


@pytest.mark.parametrize("arguments", [{"K": 0}, {"D": 0}, {"decay": 1.}, {"restart_below": -1}])
def test_wrong_codebook_arguments(arguments):
    with pytest.raises(ValueError):
        VQEmbedding(**({"K": 4, "D": 4} | arguments))



@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "restart_below" in settings_of(name)])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_a_restarted_code_has_time_to_earn_its_place(name, threshold):
    torch.manual_seed(0)
    codebook = QUANTIZERS[name](8, 4, data_init=True, restart_below=threshold).train()
    restarts = []
    for _ in range(20):  # fewer than ln 2.5 / (1 - decay)
        z_e = torch.randn(4, 4, 4, 4)
        codebook.straight_through(z_e)
        vectors = F.normalize(rows(z_e)) if name == "cosine" else rows(z_e)
        restarts.append(int((table(codebook).unsqueeze(1) == vectors).all(2).any(1).sum()))
    assert restarts[0] == (8 if name == "gradient" else 0) and sum(restarts[1:]) == 0
