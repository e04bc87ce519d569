"""`python -m benchmarks.kernels --compile`: the table in the documents."""

from __future__ import annotations

import pytest

from benchmarks.kernels import compile as bench_kernels_compile


def test_the_compile_table_goes_between_its_markers(tmp_path) -> None:
    row = {
        "kernel": "walk", "architecture": 90, "warps": 4, "registers": 64, "spill_bytes": 8, "shared_bytes": 2048,
        "wgmma": False, "multiplies": True, "presets": ["ladder_20m"],
    }  # fmt: skip
    result = {"triton": "3.9.0", "rows": [row, row | {"architecture": 80, "spill_bytes": 136}]}
    document = tmp_path / "kernels.md"
    begin, end = bench_kernels_compile.BEGIN, bench_kernels_compile.END
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    bench_kernels_compile.write_table(document, bench_kernels_compile.table_of(result))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| walk | 1 | 4 | 64 / 136 / 2 | 64 / 8 / 2 | no |" in text
    assert "walk: spills 8 bytes per thread and multiplies without wgmma" in text
    assert "Spills of more than 128 bytes per thread on sm_80: walk (136)." in text
    document.write_text("nothing")
    with pytest.raises(ValueError, match="must hold the lines"):
        bench_kernels_compile.write_table(document, "table")
