"""Existing DEQ code on our solvers: `torchdeq`, `locuslab` and `checkpoints` translate names and numbers.

Nothing is imported here, so that `import triton_deq.compat.torchdeq` works without TorchDEQ until its
`install()` is called.
"""
