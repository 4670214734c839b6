"""Times single kernels on a GPU in an 8B model's shape: attention with several block sizes and splits, and placing of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

from cachetune_rag.kernels import row_addresses, rows_of
from cachetune_rag.kernels.attention import attend
from cachetune_rag.kernels.rows import place, scatter
from cachetune_store import LayerSpec, get_codec

HEADS, KV_HEADS, DIM = 32, 8, 128
CHUNK = 512
CASES = ((4096, 0.05), (4096, 0.15), (16384, 0.004), (16384, 0.05), (16384, 0.15), (32768, 0.05))
BLOCKS = ((128, 64, 8, 3), (64, 64, 4, 3))
SPLITS = (1, 2, 4, 8)


def main() -> None:
    """Measure and print."""
    for length, share in CASES:
        attention(length, int(length * share) + 64)
    rows_into_place(16384)


def attention(length: int, tokens: int) -> None:
    keys = [torch.randn(length, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")]
    values = [torch.randn_like(keys[0])]
    table = addresses(keys, values)
    positions = torch.randperm(length, device="cuda")[:tokens].sort().values
    query = torch.randn(1, HEADS, tokens, DIM, dtype=torch.bfloat16, device="cuda")
    work = 4 * DIM * HEADS * float((positions + 1).sum())

    def run(**how: Any) -> str:
        def call() -> None:
            attend(query, table, 0, positions, kv_heads=KV_HEADS, v_dim=DIM, scale=DIM**-0.5, **how)

        took = microseconds(call)
        return f"{took:.0f} us {work / took / 1e6:.0f} TFLOP/s"

    found = [f"{b} x{s}: {run(blocks=b, splits=s)}" for b in BLOCKS for s in SPLITS]
    print(length, tokens, "chosen: " + run(), *found, sep=" | ", flush=True)


def rows_into_place(length: int) -> None:
    keys = [torch.randn(length, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")]
    values = [torch.randn_like(keys[0])]
    table, places = addresses(keys, values), torch.randperm(length, device="cuda")
    cos = torch.randn(length, DIM, dtype=torch.bfloat16, device="cuda")
    written = 2 * keys[0].numel() * keys[0].element_size()
    for codec in ("exact", "int8", "fp8", "int4"):
        form = get_codec(codec).row_format(LayerSpec(KV_HEADS, DIM, DIM), torch.bfloat16)
        chunk = form.size(CHUNK)
        rows = get_codec(codec).encode(values[0][:CHUNK], values[0][:CHUNK]).repeat(length // CHUNK)
        bases = rows.data_ptr() + chunk * torch.arange(length // CHUNK, device="cuda")
        where = torch.from_numpy(rows_of([CHUNK] * (length // CHUNK))).cuda()
        how = {
            "row_bytes": form.row_bytes,
            "group_rows": form.group_rows,
            "group_bytes": form.group_bytes,
            "aligned": True,
        }

        def call(
            codec: str = codec, bases: torch.Tensor = bases, where: torch.Tensor = where, how: dict[str, Any] = how
        ) -> None:
            place(bases, where, places, cos, cos, keys[0], values[0], codec=codec, **how)

        took = microseconds(call)
        print(f"place {length} rows of {codec}: {took:.0f} us, {(rows.numel() + written) / took / 1e6:.2f} TB/s")
    fresh = torch.randn(1, KV_HEADS, 2048, DIM, dtype=torch.bfloat16, device="cuda")
    print(f"scatter 2048 rows: {microseconds(lambda: scatter(fresh, fresh, table, 0, places[:2048])):.0f} us")


def addresses(keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor(row_addresses(keys, values), device=keys[0].device)


def microseconds(call: Callable[[], None]) -> float:
    return float(do_bench(call, warmup=5, rep=25, return_mode="median")) * 1e3


if __name__ == "__main__":
    main()
