"""What others offer for the same work, where it is installed."""
import importlib


def _package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RuntimeError(f"needs pip install {name.replace('_', '-')}") from None


def pytorch_msssim(a, b):
    """SSIM of images in [0, 1] by pytorch-msssim."""
    return _package("pytorch_msssim").ssim(a, b, data_range=1.)


def fussim(a, b):
    """SSIM of images in [0, 1] by fussim, a CUDA kernel."""
    return _package("fussim").fused_ssim(a, b, padding="valid")


def quantizers(x, book):
    """{label: search} of libraries, for inputs x (N, D) and codes (K, D)."""
    try:
        library = _package("vector_quantize_pytorch")
    except RuntimeError:
        return {}
    quantizer = library.VectorQuantize(x.shape[1], len(book)).to(x.device).eval()
    quantizer._codebook.embed.data.copy_(book[None])
    return {"vector-quantize-pytorch": lambda: quantizer(x[None])[1]}
