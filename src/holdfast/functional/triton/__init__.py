"""GPU kernels behind `linear_divergence`, each with a plain twin; Triton is imported by this room alone, when used.

Read `dispatch` (who decides), then `row_state` (the mathematics of a row, shared by both kernels), then `row_kernel`
(logits in memory) or `tile_kernels` (logits never in memory), then the host's side of each, `rows` and `tiles`.
"""
