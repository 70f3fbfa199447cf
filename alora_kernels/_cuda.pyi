"""The extension that csrc/binding.cpp defines; absent where it was not built."""

param_sizes: dict[str, int]

def launch(
    name: str,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    block: int,
    shared: int,
    params: bytes,
    device: int,
    stream: int,
    dependent: bool = False,
    cooperative: bool = False,
) -> None: ...
def tensor_map(
    address: int,
    is_bf16: bool,
    columns: int,
    rows: int,
    stride: int,
    box_columns: int,
    box_rows: int,
) -> bytes: ...
def kernel_names() -> tuple[str, ...]: ...
def versions() -> tuple[int, int]: ...
