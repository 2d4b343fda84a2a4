"""The networks against the public project's outputs, and what each loss reaches."""
from pathlib import Path

import pytest
import skimage
import torch
import torch.nn.functional as F

from modules import VectorQuantizedVAE, VQEmbedding, load
from quantizers import filled

FIXTURE = Path(__file__).parent / "fixtures" / "upstream_compat.pt"
HEALTHY = {"quantizer": "ema", "data_init": True, "restart_below": 0.02}


@pytest.fixture(scope="module")
def upstream():
    return torch.load(FIXTURE, weights_only=True)


@pytest.mark.parametrize("codebook", [{}, HEALTHY])
def test_public_checkpoints_load_and_give_the_same_outputs(upstream, codebook):
    model = VectorQuantizedVAE(**upstream["vqvae_args"], **codebook)
    model.load_state_dict(upstream["vqvae_state"])
    model.eval()
    with torch.no_grad():
        x_tilde, z_e, z_q = model(upstream["x"])
        latents = model.encode(upstream["x"])
        decoded = model.decode(latents)
    assert torch.equal(latents, upstream["latents"])
    for found, expected in ((x_tilde, "x_tilde"), (z_e, "z_e"), (z_q, "z_q"), (decoded, "decoded")):
        torch.testing.assert_close(found, upstream[expected], atol=1e-5, rtol=1e-5)


def test_a_loaded_public_codebook_is_not_initialised_again(upstream):
    model = VectorQuantizedVAE(**upstream["vqvae_args"], quantizer="gradient", data_init=True)
    model.load_state_dict(upstream["vqvae_state"])
    model.train()(upstream["x"])
    assert torch.equal(model.codebook.embedding.weight, upstream["vqvae_state"]["codebook.embedding.weight"])


@pytest.mark.parametrize("channels, size", [(1, (28, 28)), (3, (32, 48)), (3, (4, 4))])
def test_shapes_of_square_and_oblong_images(channels, size):
    model = VectorQuantizedVAE(channels, 8, 16)
    x = torch.rand(2, channels, *size) * 2 - 1
    x_tilde, z_e, z_q = model(x)
    assert x_tilde.shape == x.shape and x_tilde.abs().max() <= 1
    assert z_e.shape == z_q.shape == (2, 8, size[0] // 4, size[1] // 4)
    assert model.decode(model.encode(x)).shape == x.shape
    with pytest.raises(ValueError, match="must divide by 4"):
        model.encode(x[..., 1:])


@pytest.mark.parametrize("downsample", [8, 16])
def test_deeper_models_downsample_more(downsample):
    model = VectorQuantizedVAE(3, 8, 16, downsample=downsample)
    x_tilde, z_e, _ = model(torch.zeros(2, 3, 32, 48))
    assert x_tilde.shape == (2, 3, 32, 48) and z_e.shape == (2, 8, 32 // downsample, 48 // downsample)
    with pytest.raises(ValueError, match=f"divide by {downsample}: crop or resize them, say with --image-size 32x48"):
        model.check_size((32 + 1, 48 + downsample - 1), downsample)


def test_frozen_codes_stay_while_the_decoder_learns():
    torch.manual_seed(0)
    source, model = (VectorQuantizedVAE(3, 8, 16, quantizer="gradient", data_init=True, restart_below=0.5)
                     for _ in range(2))
    source(torch.rand(4, 3, 16, 16))  # batch statistics of its own
    model.freeze_codes({"model": source.state_dict(), "model_args": {"input_dim": 3, "dim": 8, "K": 16}})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    for _ in range(3):
        x_tilde, z_e, z_q = model.train()(torch.rand(4, 3, 16, 16))
        (x_tilde.square().mean() + (z_e - z_q).square().mean()).backward()
        optimizer.step()
    assert filled(model)  # else its steps would never be a graph
    for part in ("encoder", "codebook"):
        for name, value in getattr(source, part).state_dict().items():
            assert torch.equal(getattr(model, part).state_dict()[name], value), name
    assert not torch.equal(model.decoder.state_dict()["0.block.1.weight"], start["0.block.1.weight"])
    with pytest.raises(ValueError, match="K 16, this model 32"):
        VectorQuantizedVAE(3, 8, 32).freeze_codes({"model": source.state_dict(),
                                                   "model_args": {"input_dim": 3, "dim": 8, "K": 16}})


def test_sides_that_do_not_divide_say_what_to_pass():
    VectorQuantizedVAE.check_size((28, 32), 4)
    with pytest.raises(ValueError, match="--image-size 28x32"):
        VectorQuantizedVAE.check_size((30, 32), 4)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {part: any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model, part).parameters())
            for part in ("encoder", "codebook", "decoder")}


def test_each_loss_reaches_only_its_own_part():
    torch.manual_seed(0)
    model, x = VectorQuantizedVAE(3, 8, 16), torch.rand(2, 3, 16, 16) * 2 - 1
    x_tilde, z_e, z_q = model(x)
    assert gradients(F.mse_loss(x_tilde, x), model) == {"encoder": True, "codebook": False, "decoder": True}
    x_tilde, z_e, z_q = model(x)
    assert gradients(F.mse_loss(z_q, z_e.detach()), model) == {"encoder": False, "codebook": True, "decoder": False}
    x_tilde, z_e, z_q = model(x)
    assert gradients(F.mse_loss(z_e, z_q.detach()), model) == {"encoder": True, "codebook": False, "decoder": False}


def test_straight_through_passes_the_decoders_gradient_to_the_encoder_unchanged():
    codebook, z_e = VQEmbedding(8, 4), torch.randn(2, 4, 3, 5, requires_grad=True)
    z_q_st, z_q, _ = codebook.straight_through(z_e)
    upstream = torch.randn_like(z_q_st)
    assert torch.equal(torch.autograd.grad(z_q_st, z_e, upstream)[0], upstream)
    assert torch.equal(z_q_st, z_q) and not torch.autograd.grad(z_q.sum(), z_e, allow_unused=True)[0]


def test_eval_mode_freezes_everything():
    model = VectorQuantizedVAE(3, 8, 16, **HEALTHY).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_last_and_bfloat16_change_little():
    torch.manual_seed(0)
    model, x = VectorQuantizedVAE(3, 16, 32).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    plain = model(x)[0]
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last))[0], plain, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[2].dtype == torch.float32


@pytest.mark.parametrize("downsample, scales", [(4, 1), (8, 2)])
def test_fine_blocks_stand_at_each_scale_between_latents_and_image_and_start_as_nothing(downsample, scales):
    torch.manual_seed(0)
    plain = VectorQuantizedVAE(3, 8, 16, downsample=downsample)
    fine = VectorQuantizedVAE(3, 8, 16, downsample=downsample, fine_blocks=2).eval()
    blocks = [model.decoder for model in (plain, fine)]
    counts = [sum(type(module).__name__ == "ResBlock" for module in decoder) for decoder in blocks]
    assert counts == [2, 2 + 2 * scales]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for module in fine.decoder:
        if type(module).__name__ == "ResBlock":
            features = torch.randn(1, 8, 4, 4)
            assert torch.equal(module(features), features.relu())
    assert fine(x)[0].shape == x.shape and fine.encode(x).shape == (2, 32 // downsample, 32 // downsample)


@pytest.mark.parametrize("name, side", [("photos", 128), ("cifar", 32)])
def test_the_weights_that_come_with_the_project_reconstruct(name, side):
    folder = Path(__file__).parent.parent / "pretrained" / name
    assert (folder / "best.pt").stat().st_size < 3e6 and [path.name for path in folder.iterdir()] == ["best.pt"]
    image = torch.from_numpy(skimage.transform.resize(skimage.data.astronaut(), (side, side))).permute(2, 0, 1).float()
    x = image.unsqueeze(0) * 2 - 1
    model = load(folder)
    assert (model.decode(model.encode(x)) - x).square().mean() < 0.04  # 20 dB; grey has 10
