"""torch.compile, on a machine that may lack what it needs."""
import torch
import torch._functorch.config

from harness import distributed


def graphs_fit(device, accumulate):
    """Whether CUDA graphs can be replayed: one process, a GPU, one forward and one backward an update."""
    return device.type == "cuda" and accumulate == 1 and distributed.world_size() == 1


def compile_forward(module, graphs=False, first=True):
    """torch.compile a network's forward in place; where its first call fails, say so in one line and go on without.

    Args:
        graphs: replay CUDA graphs, which launch all kernels at once. What a step computes, its gradients included, is
            overwritten by the next step's: only where `graphs_fit`.
        first: of the networks of a step, so that the step begins with it.
    """
    torch._functorch.config.donated_buffer = False  # else a backward that keeps its graph for another is refused
    plain = module.forward
    fast = torch.compile(plain, mode="reduce-overhead" if graphs else None)

    def step(*args):
        if graphs and first:
            torch.compiler.cudagraph_mark_step_begin()
        return fast(*args)

    def attempt(*args):
        try:
            result = step(*args)
            module.forward = step
        except Exception as error:  # whatever a compiler, or the lack of one, raises
            module.forward = plain
            result = plain(*args)  # raises again what is not the compiler's fault
            reason = (str(error) or repr(error)).splitlines()[0][:200]
            print(f"--compile failed here and is left out: {reason}")
        return result
    module.forward = attempt
