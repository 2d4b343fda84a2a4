"""Which way a kernel goes: Triton on a GPU, where it is installed, else PyTorch's own operators in whole float32."""
from contextlib import contextmanager

import torch

from harness import device

CACHED = 2 ** 17  # values of a tensor that a core works on at a time, so that what comes of them stays in its cache


def fits_triton(*tensors):
    """Whether a kernel written in Triton takes these tensors."""
    return all(x.is_cuda and x.dtype != torch.float64 for x in tensors) and device.has_triton()


def in_parts(*tensors, values):
    """The same rows of each of the tensors, a few at a time on a CPU: one, or as many as its caches hold at so many
    `values` a row. Elsewhere all at once.
    """
    on_cpu = tensors[0].device.type == "cpu"
    rows = max(1, CACHED * torch.get_num_threads() // values) if on_cpu else len(tensors[0])
    return zip(*(tensor.split(rows) for tensor in tensors))


def register_gradient(operator):
    """Let autograd use what an operator of `torch.library` returns: a value, and its gradient in the first input."""
    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.others = len(inputs) - 1

    def backward(ctx, grad, _):
        return None if grad is None else grad * ctx.saved_tensors[0], *[None] * ctx.others
    operator.register_autograd(backward, setup_context=keep)


@contextmanager
def exact_products(device):
    """Matrix products and convolutions on a device in float32, where the program may have allowed TF32 or bfloat16.

    It sets the whole program's precision, which no compiler can trace: within an operator of `torch.library`, or where
    nothing is compiled.
    """
    allowed, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
        cudnn.allow_tf32 = convolutions
