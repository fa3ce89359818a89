"""The Triton kernels. They import triton only; `triton_deq.ops` launches them."""
