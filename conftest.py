"""Where Triton is not installed, kernels cannot be imported: pytest is not to look for doctests in them."""

from importlib.util import find_spec

ROOM = "src/holdfast/functional/triton"
NEEDING = ("arithmetic", "row_state", "row_kernel", "tile_kernels", "rows", "tiles")
collect_ignore = [] if find_spec("triton") else [f"{ROOM}/{name}.py" for name in NEEDING]
