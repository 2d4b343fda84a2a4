"""Triton without a GPU: kernels run by its interpreter in a process of their own, or compiled and looked at."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import HERE

PRELUDE = """
import sys
import torch
from kernels.nearest import triton_nearest
from kernels.ssim import triton_ssim
saved = {}
def save(name, *tensors):
    saved[name] = tensors
"""


def interpreted(code):
    """{name: tensors} that the code saves by `save(name, *tensors)` in a process where Triton interprets kernels."""
    pytest.importorskip("triton", reason="needs Triton")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.pt"
        code = f"{PRELUDE}\n{code}\ntorch.save(saved, sys.argv[1])"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, path], cwd=HERE, check=True,
                       env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
        return torch.load(path, weights_only=True)


def resources(kernel, architecture, pointers, integers, constants, options):
    """Bytes of shared memory of a kernel compiled for an architecture, and of what its threads spill."""
    pytest.importorskip("triton", reason="needs Triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("needs the cuobjdump of Triton's package")
    names = list(kernel.arg_names)
    signature = {name: pointers.get(name, "i32" if name in integers else "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return built.metadata.shared, int(re.search(r"STACK:(\d+)", usage)[1])
