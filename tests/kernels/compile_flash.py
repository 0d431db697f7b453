"""Compile the attention kernels as a call on a GPU would: `python -m tests.kernels.compile_flash 90 128 '{}'`.

The last argument are options. Prints a line of JSON a kernel: its shared memory, the bytes of its stack and whether it
uses wgmma.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron.kernels.attention.documents import document_bounds
from megatron.kernels.attention.flash import launch

INSPECT = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """What the compiler asks of a driver."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def report(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [INSPECT, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
    }


def compile_kernels(capability, size, documents=False, length=256, heads=(2, 2), **options):
    """Launch forward and backward on the host's memory, but for the launch."""
    driver.set_active(AbsentGPU(capability))
    launch._tile = lambda kernel, query: launch.find_tile(kernel, launch.padded_size(query.shape[-1]), capability // 10)
    run, compiled = JITFunction.run, []

    def compile_alone(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        source = kernel.src
        assert isinstance(source, ASTSource)
        constants = {(source.fn.arg_names.index(key),) if isinstance(key, str) else key for key in source.constants}
        if hasattr(nvidia, "make_launcher"):  # Triton 3.6 writes a launcher for each kernel; 3.7 has one for all
            nvidia.make_launcher(dict.fromkeys(constants), dict(source.signature), kernel.metadata.tensordesc_meta)
        compiled.append(kernel)

    JITFunction.run = compile_alone
    query, key, value = (torch.empty(length, 2, count, size, dtype=torch.bfloat16) for count in (*heads, heads[1]))
    bounds = document_bounds(torch.zeros(2, length, dtype=torch.int32)) if documents else None
    defaults = {"scale": 0.1, "causal": True, "window": 0, "softcap": 0.0, "dropout": 0.0}
    settings = launch.Options(**{**defaults, **options})
    seeds = torch.zeros(1, dtype=torch.int64) if settings.dropout else None
    output, log_sums = launch.launch_forward(query, key, value, bounds, seeds, settings)
    launch.launch_backward(output, query, key, value, output, log_sums, bounds, seeds, settings)
    return [report(kernel) for kernel in compiled]


if __name__ == "__main__":
    for answer in compile_kernels(int(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3])):
        print(json.dumps(answer), flush=True)
