"""PTX written by hand, run on tensors."""

import numpy as np

from triton_deq.emulation.memory import Memory
from triton_deq.emulation.program import Program


def run(body, *tensors, warps=1, grid=(1, 1, 1), shared=256, seed=1, traffic=None):
    """Run a kernel that finds its thread in %r0 and the tensors' addresses in %rd100, %rd101, ..."""
    parameters = ",\n".join(f"\t.param .u64 k_param_{k}" for k in range(len(tensors)))
    loads = "\n".join(f"\tld.param.b64 %rd{100 + k}, [k_param_{k}];" for k in range(len(tensors)))
    text = f".visible .entry k(\n{parameters}\n)\n{{\n\tmov.u32 %r0, %tid.x;\n{loads}\n{body}\n\tret;\n}}\n"
    values = [np.uint64(tensor.data_ptr()) for tensor in tensors]
    Program(text).run(grid, values, shared, warps, Memory.of_tensors(tensors, traffic), seed, traffic)
