"""Compile the attention kernels with the tiles of the table: `python -m tests.kernels.compile_flash 90 128 '[{}]'`.

Prints a line of JSON a kernel: its variant's index, shared memory, bytes of the stack and whether it uses wgmma.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron.kernels.attention.flash.backward import key_value_kernel, query_kernel
from megatron.kernels.attention.flash.forward import forward_kernel
from megatron.kernels.attention.flash.tuning import find_tile

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key_value": key_value_kernel}
SOURCES = {"query": "M", "grad_output": "M", "key": "N", "value": "N"}
POINTERS = {
    **dict.fromkeys(
        ("query", "key", "value", "grad_output", "output", "grad_query", "grad_key", "grad_value"), "*bf16"
    ),
    **dict.fromkeys(("log_sums", "deltas"), "*fp32"),
    "bounds": "*i32",
    "seeds": "*i64",
}
SWITCHES = ("WINDOW", "DOCUMENTS", "CAPPED", "DROPOUT", "RAGGED")
INSPECT = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(name, capability, size, switches):
    tile, kernel = find_tile(name, size, capability // 10), KERNELS[name]
    constants = {"GROUP": 1, "M": tile.queries, "N": tile.keys, "SIZE": size, "PADDED": size, "TMA": tile.tma}
    constants |= dict.fromkeys(SWITCHES, False) | {"CAUSAL": True} | switches
    if not constants["DOCUMENTS"]:
        constants["bounds"] = None
    if not constants["DROPOUT"]:
        constants["seeds"] = None
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SOURCES and tile.tma:
            signature[argument] = f"tensordesc<bf16[1,1,{constants[SOURCES[argument]]},{size}]>"
        elif argument in ("scale", "cap"):
            signature[argument] = "fp32"
        else:
            signature[argument] = POINTERS.get(argument, "i32")
            if argument not in ("bundle", "window", "threshold", "batch_size"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers:
        options["maxnreg"] = tile.registers
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name,
        "shared": compiled.metadata.shared,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
    }


def stack_bytes(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [INSPECT, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


if __name__ == "__main__":
    for (index, variant), kernel_name in itertools.product(enumerate(json.loads(sys.argv[3])), KERNELS):
        print(
            json.dumps({"variant": index, **compile_kernel(kernel_name, int(sys.argv[1]), int(sys.argv[2]), variant)}),
            flush=True,
        )
