"""gpu.roofline: its arithmetic on a shape worked out by hand, the spec's figures, and the page in docs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
roofline = pytest.importorskip("copd_kernels.gpu.roofline")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "roofline.md"
# Round numbers: 1 TFLOP/s, 1 TB/s from L2; HBM reaches 0.84 of 1 TB/s.
GPU = roofline.Gpu("round", "sm_90", 2, 1, 1, 1, l2_mb=1, num_programs=1)
SHAPE = roofline.Shape(num_tokens=256, vocab_size=256, hidden_size=64)
TILES = roofline.Tiles(128, 128, 64, 8, 3)
UNIT = 2 * 256 * 256 * 64
LOGITS = 256 * 256
WEIGHT = 256 * 64  # entries, of the lm_head and of the hidden states alike


def phase(plan: roofline.Plan, name: str) -> roofline.Phase:
    return next(phase for phase in plan.phases if phase.name == name)


def test_stored_plan_by_hand() -> None:
    plan = roofline.stored(SHAPE, GPU, 128, TILES)  # two chunks
    tiles = phase(plan, "dual tiles, stored")
    assert tiles.flops == 2 * UNIT
    # Two chunks × two tiles × two heads, each 256 rows of 64 bf16.
    assert tiles.l2_bytes == 2 * 2 * 2 * 256 * 64 * 2
    # Both weights twice in bf16, both hidden states once, x and r in fp16.
    assert tiles.hbm_bytes == 2 * 2 * 2 * WEIGHT + 2 * 2 * WEIGHT + 4 * LOGITS
    # 12 fp32 of each token and tile, written and read, and 12 of each token.
    assert phase(plan, "merge of tiles").hbm_bytes == 2 * (2 * 256 * 48) + 256 * 48
    assert phase(plan, "rows").hbm_bytes == (4 + 2) * LOGITS
    # The bf16 gradient, the weight once per chunk, dH.
    assert phase(plan, "dH") == ("dH", UNIT, 2 * LOGITS + 2 * 2 * WEIGHT + 2 * WEIGHT, 0)
    # The gradient, the hidden states, dW read and written in fp32 per chunk, then read and written in bf16.
    assert phase(plan, "dW") == ("dW", UNIT, 2 * LOGITS + 2 * WEIGHT + 2 * 8 * WEIGHT + (4 + 2) * WEIGHT, 0)
    assert plan.hbm_bytes == 1_667_072
    # Of a chunk of 128: x, r, partial statistics; and dW in fp32.
    assert plan.workspace_bytes == 4 * 128 * 256 + 2 * 128 * 48 + 4 * WEIGHT


def test_recompute_plan_by_hand() -> None:
    plan = roofline.recompute(SHAPE, GPU, 128, 64, TILES, TILES)  # two chunks, four slices of the vocabulary
    assert plan.flops == 6 * UNIT
    assert phase(plan, "dual tiles").hbm_bytes == 2 * 4 * WEIGHT + 4 * WEIGHT
    assert phase(plan, "dual tiles again").hbm_bytes == 2 * 4 * WEIGHT + 4 * WEIGHT + 2 * LOGITS
    # As in the stored plan, and dH read and written in fp32 once per slice.
    assert phase(plan, "dH").hbm_bytes == 2 * LOGITS + 2 * 2 * WEIGHT + 2 * WEIGHT + 4 * 8 * WEIGHT
    assert plan.hbm_bytes == 1_339_392 + 32 * WEIGHT
    # Of a chunk of 128: the gradient of a slice, partial statistics, dH in fp32; and dW in fp32.
    assert plan.workspace_bytes == 2 * 128 * 64 + 2 * 128 * 48 + 4 * 128 * 64 + 4 * WEIGHT


def test_naive_plan_by_hand() -> None:
    plan = roofline.naive(SHAPE)
    assert plan.flops == 4 * UNIT
    assert plan.hbm_bytes == 146 * LOGITS + 4 * 2 * WEIGHT + 4 * 2 * WEIGHT
    assert plan.workspace_bytes == 32 * LOGITS


def test_partial_tiles_are_computed_whole() -> None:
    plan = roofline.stored(roofline.Shape(130, 129, 64), GPU, 130, TILES)
    tiles = phase(plan, "dual tiles, stored")
    assert tiles.flops == 2 * 2 * 256 * 256 * 64
    assert tiles.l2_bytes == 2 * 4 * 256 * 64 * 2
    assert phase(plan, "dH").flops == 2 * 130 * 129 * 64


def test_hidden_states_that_do_not_fit_come_once_per_wave() -> None:
    small = GPU._replace(l2_mb=0.01)
    fitting, waves = (phase(roofline.stored(SHAPE, gpu, 128, TILES), "dual tiles, stored") for gpu in (GPU, small))
    # One program at a time, two columns: both heads' hidden states a second time.
    assert waves.hbm_bytes - fitting.hbm_bytes == 2 * 2 * WEIGHT


def test_times() -> None:
    # 3 ms of FLOPs, 2 ms of HBM, 4 ms of L2.
    one = roofline.Phase("one", 3e9, 2 * 0.84e9, 4e9)
    assert one.overlapped_ms(GPU) == pytest.approx(4)
    assert one.serial_ms(GPU) == pytest.approx(4 + 2)
    plan = roofline.Plan("two", (one, roofline.Phase("two", 0, 0.84e9)), 0)
    assert (plan.overlapped_ms(GPU), plan.serial_ms(GPU)) == (pytest.approx(5), pytest.approx(7))


def test_one_unit_on_an_h100() -> None:
    h100 = next(gpu for gpu in roofline.GPUS if gpu.name.startswith("H100"))
    unit = roofline.Phase("unit", roofline.unit_flops(roofline.SHAPES[0]))
    assert unit.serial_ms(h100) == pytest.approx(18.2, abs=0.05)
    assert unit.serial_ms(h100._replace(reached_tflops=h100.peak_tflops)) == pytest.approx(12.9, abs=0.05)


def test_the_page_is_what_the_code_prints() -> None:
    assert PAGE.read_text() == roofline.page(), f"run: python -m copd_kernels.gpu.roofline > {PAGE.name}"
    assert "a model, not a measurement" in PAGE.read_text()
