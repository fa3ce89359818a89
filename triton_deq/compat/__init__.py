"""Existing DEQ code on our solvers: names and numbers translated by `torchdeq`, `locuslab` and `tutorial`.

`checkpoints` reads trained weights. Nothing is imported here, so that `import triton_deq.compat.torchdeq`
works without TorchDEQ until its `install()` is called.
"""
