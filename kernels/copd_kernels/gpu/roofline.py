"""What the GPU plans should cost, computed from the kernels' tile sizes: ``python -m copd_kernels.gpu.roofline``.

A model, not a measurement. Each plan is a list of phases (kernels or library calls), and each phase has FLOPs, bytes
moved between HBM and L2, and bytes that tiles read from L2. A phase takes the longest of FLOPs / rate, L2 bytes / L2
rate and HBM bytes / bandwidth if memory overlaps with the products, and the HBM time on top if it does not; the truth
should lie between, launch gaps and wave tails aside. ``ASSUMPTIONS`` is printed with the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from copd_kernels.gpu.configs import DUAL, DUAL_GRADIENT, Tiles, tiles_of
from copd_kernels.gpu.driver import CHUNK_TOKENS, SLICE_ENTRIES
from copd_kernels.gpu.targets import TARGETS

# Statistics of two heads in one tile, fp32.
_PARTIAL_ROWS = 12


class Gpu(NamedTuple):
    """Peaks from the vendor's data sheet (dense bf16), and what is assumed to be reached."""

    name: str
    target: str
    peak_tflops: float
    reached_tflops: float
    peak_tb_per_s: float
    l2_tb_per_s: float
    l2_mb: float
    num_programs: int  # that run at once: one large tile per SM or compute unit


GPUS = (
    Gpu("A100 SXM", "sm_80", 312, 250, 2.04, 7.2, 40, 108),
    Gpu("H100 SXM", "sm_90", 989, 700, 3.35, 9.0, 50, 132),
    Gpu("H200 SXM", "sm_90", 989, 700, 4.8, 9.0, 50, 132),
    Gpu("B200", "sm_100", 2250, 1500, 8.0, 18.0, 126, 148),
    Gpu("MI300X", "gfx942", 1307, 650, 5.3, 17.2, 256, 304),
)
_PHASES_ON = GPUS[1]
# Streams of large buffers reach about five sixths of the data sheet's HBM bandwidth.
HBM_REACHED = 0.84

ASSUMPTIONS = f"""\
- bf16 inputs, fp32 accumulation. One unit is the 2·N·V·D FLOPs of one projection. Reverse KL, forward and backward,
  with gradients of the student's hidden states and lm_head.
- GEMM rates are the assumed ones below, for our tiles and the library's GEMMs alike; HBM at {HBM_REACHED:.0%} of its
  peak. Overlapped: max(GEMM or L2, HBM) of each phase. Serial: their sum.
- Tile kernels compute whole tiles. A tile of BLOCK_T by BLOCK_V reads (BLOCK_T + BLOCK_V)·D·2 bytes per head from L2:
  hidden states V / BLOCK_V times, weights once per BLOCK_T tokens. From HBM, weights come once per chunk (the programs
  that share them run together); hidden states once per chunk where those of both heads fit in half of L2, else once
  per wave of programs, one on each SM. The chunk and L2 together decide this, and with it the HBM column.
- L2 rates: A100 5120 bytes a clock (NVIDIA), H100 and H200 the same at their clock, B200 taken as two of those, MI300X
  its Infinity Cache. Library GEMMs are taken as bound by FLOPs or HBM alone.
- Workspace: what a plan holds beyond inputs, per-token results and 16-bit gradients; it includes dW in fp32.
- Naive: eager PyTorch in fp32 after bf16 products, each operation reading and writing [N, V] in HBM; nothing fused.
- Left out: launches, wave tails, clocks under load, the optimizer, and any peer's traffic."""


class Shape(NamedTuple):
    num_tokens: int
    vocab_size: int
    hidden_size: int


# Production shapes, and the shape of the CPU's table.
SHAPES = (Shape(16_384, 151_936, 2560), Shape(16_384, 151_936, 4096), Shape(2048, 32_768, 1024))


class Phase(NamedTuple):
    """One kernel or library call, summed over chunks."""

    name: str
    flops: float = 0.0
    hbm_bytes: float = 0.0
    l2_bytes: float = 0.0

    def overlapped_ms(self, gpu: Gpu) -> float:
        return max(self._compute_ms(gpu), self._hbm_ms(gpu))

    def serial_ms(self, gpu: Gpu) -> float:
        return self._compute_ms(gpu) + self._hbm_ms(gpu)

    def _compute_ms(self, gpu: Gpu) -> float:
        """The tensor cores, or L2 where it cannot feed them."""
        return max(self.flops / (gpu.reached_tflops * 1e9), self.l2_bytes / (gpu.l2_tb_per_s * 1e9))

    def _hbm_ms(self, gpu: Gpu) -> float:
        return self.hbm_bytes / (gpu.peak_tb_per_s * HBM_REACHED * 1e9)


class Plan(NamedTuple):
    name: str
    phases: tuple[Phase, ...]
    workspace_bytes: float

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def hbm_bytes(self) -> float:
        return sum(phase.hbm_bytes for phase in self.phases)

    @property
    def l2_bytes(self) -> float:
        return sum(phase.l2_bytes for phase in self.phases)

    def overlapped_ms(self, gpu: Gpu) -> float:
        return sum(phase.overlapped_ms(gpu) for phase in self.phases)

    def serial_ms(self, gpu: Gpu) -> float:
        return sum(phase.serial_ms(gpu) for phase in self.phases)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _chunks(num_tokens: int, chunk_tokens: int) -> list[int]:
    return [min(chunk_tokens, num_tokens - begin) for begin in range(0, num_tokens, chunk_tokens)]


def unit_flops(shape: Shape) -> float:
    return 2.0 * shape.num_tokens * shape.vocab_size * shape.hidden_size


# Bytes per logit that each operation of the naive form reads and writes in HBM.
NAIVE_OPERATIONS = (
    ("bf16 products, 2 heads", 0, 4),
    ("to fp32, 2 heads", 4, 8),
    ("log_softmax (two reads, one write), 2 heads", 16, 8),
    ("p = exp", 4, 4),
    ("student - teacher", 8, 4),
    ("times p", 8, 4),
    ("sum", 4, 0),
    ("backward of times: two products", 8, 8),
    ("backward of exp", 8, 4),
    ("sum of the two gradients", 8, 4),
    ("backward of log_softmax (two reads of two, one write)", 16, 4),
    ("to bf16", 4, 2),
    ("read by the products for dH and dW", 4, 0),
)
# fp32: student's log-probs, p and difference, which autograd keeps, and four gradients at the peak; bf16: both logits.
NAIVE_BYTES_PER_LOGIT = 4 * 7 + 2 * 2


def naive(shape: Shape) -> Plan:
    num_tokens, vocab_size, hidden_size = shape
    elements = float(num_tokens * vocab_size)
    passes = elements * sum(read + written for _, read, written in NAIVE_OPERATIONS)
    weights, hiddens = 2.0 * vocab_size * hidden_size, 2.0 * num_tokens * hidden_size
    phases = (
        Phase("products", 4 * unit_flops(shape), 3 * weights + 3 * hiddens + weights + hiddens),
        Phase("elementwise", 0.0, passes),
    )
    return Plan("naive eager", phases, NAIVE_BYTES_PER_LOGIT * elements)


def _tile_phase(name: str, shape: Shape, chunks: list[int], tiles: Tiles, gpu: Gpu, per_logit: int) -> Phase:
    """Both heads' products by our tiles, with ``per_logit`` bytes written for each logit."""
    _, vocab_size, hidden_size = shape
    columns = _blocks(vocab_size, tiles.block_v)
    flops = hbm_bytes = from_l2 = 0.0
    for num_tokens in chunks:
        rows = _blocks(num_tokens, tiles.block_t)
        hiddens, weights = 4.0 * num_tokens * hidden_size, 4.0 * vocab_size * hidden_size
        flops += 4.0 * rows * tiles.block_t * columns * tiles.block_v * hidden_size
        from_l2 += 4.0 * rows * columns * (tiles.block_t + tiles.block_v) * hidden_size
        fits = hiddens <= gpu.l2_mb * 2**20 / 2
        hbm_bytes += weights + hiddens * (1 if fits else columns * min(1.0, rows / gpu.num_programs))
        hbm_bytes += float(per_logit) * num_tokens * vocab_size
    return Phase(name, flops, hbm_bytes, from_l2)


def _partial_bytes(vocab_size: int, num_tokens: int, tiles: Tiles) -> float:
    return 4.0 * _PARTIAL_ROWS * _blocks(vocab_size, tiles.block_v) * num_tokens


def _library_phases(shape: Shape, chunks: list[int]) -> tuple[Phase, Phase]:
    """dH and dW of the student from a bf16 gradient [C, V]; dW summed up in fp32, rounded at the end."""
    num_tokens, vocab_size, hidden_size = shape
    gradient, weight = 2.0 * num_tokens * vocab_size, float(vocab_size * hidden_size)
    hidden = 2.0 * num_tokens * hidden_size
    return (
        Phase("dH", unit_flops(shape), gradient + hidden + len(chunks) * 2 * weight),
        Phase("dW", unit_flops(shape), gradient + hidden + len(chunks) * 8 * weight + 6 * weight),
    )


def stored(shape: Shape, gpu: Gpu, chunk_tokens: int, tiles: Tiles) -> Plan:
    """Tiles leave statistics and centred fp16 logits (x, r); a row kernel puts the bf16 gradient in place of x."""
    num_tokens, vocab_size, hidden_size = shape
    chunks, elements = _chunks(num_tokens, chunk_tokens), float(num_tokens * vocab_size)
    partials = _partial_bytes(vocab_size, num_tokens, tiles)
    phases = (
        _tile_phase("dual tiles, stored", shape, chunks, tiles, gpu, 4),
        Phase("merge of tiles", 0.0, 2 * partials + 4.0 * _PARTIAL_ROWS * num_tokens),
        Phase("rows", 0.0, 6 * elements),
        *_library_phases(shape, chunks),
    )
    chunk = chunks[0]
    workspace = 4.0 * chunk * vocab_size + _partial_bytes(vocab_size, chunk, tiles) + 4.0 * vocab_size * hidden_size
    return Plan(f"stored fp16 workspace, chunks of {chunk_tokens}", phases, workspace)


def recompute(shape: Shape, gpu: Gpu, chunk_tokens: int, slice_entries: int, tiles: Tiles, again: Tiles) -> Plan:
    """Forward keeps statistics alone; backward makes the logits again, one slice of the vocabulary after another."""
    num_tokens, vocab_size, hidden_size = shape
    chunks = _chunks(num_tokens, chunk_tokens)
    partials = _partial_bytes(vocab_size, num_tokens, tiles)
    grad_hidden, grad_weight = _library_phases(shape, chunks)
    # dH adds up over slices in fp32.
    added = 8.0 * num_tokens * hidden_size * _blocks(vocab_size, slice_entries)
    phases = (
        _tile_phase("dual tiles", shape, chunks, tiles, gpu, 0),
        Phase("merge of tiles", 0.0, 2 * partials + 4.0 * _PARTIAL_ROWS * num_tokens),
        _tile_phase("dual tiles again", shape, chunks, again, gpu, 2),
        grad_hidden._replace(hbm_bytes=grad_hidden.hbm_bytes + added),
        grad_weight,
    )
    chunk, entries = chunks[0], min(vocab_size, slice_entries)
    workspace = 2.0 * chunk * entries + _partial_bytes(vocab_size, chunk, tiles) + 4.0 * vocab_size * hidden_size
    return Plan(f"recompute, chunks of {chunk_tokens}", phases, workspace + 4.0 * chunk * hidden_size)


def kernel_tiles(gpu: Gpu, family: str) -> Tiles:
    """What the launches use for bf16."""
    return tiles_of(TARGETS[gpu.target], family, 2)


def plans(shape: Shape, gpu: Gpu) -> tuple[Plan, ...]:
    tiles, again = kernel_tiles(gpu, DUAL), kernel_tiles(gpu, DUAL_GRADIENT)
    return (
        naive(shape),
        stored(shape, gpu, CHUNK_TOKENS, tiles),
        recompute(shape, gpu, CHUNK_TOKENS, SLICE_ENTRIES, tiles, again),
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.0f}" if num_bytes >= 1e10 else f"{num_bytes / 1e9:,.2f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * 1 + ["---:"] * (len(head) - 1), *rows)]


def page() -> str:
    """The whole page, Markdown."""
    lines = [
        "# GPU roofline: a model, not a measurement",
        "",
        "Written by `python -m copd_kernels.gpu.roofline > docs/roofline.md`; nothing here was timed. Measure with",
        "`make bench-gpu`.",
        "",
        "## Assumptions",
        "",
        ASSUMPTIONS,
        "",
        *_table(
            ["GPU", "bf16 peak, TFLOP/s", "assumed", "HBM peak, TB/s", "L2, TB/s", "L2, MB", "tile T x V x D"],
            (
                [
                    gpu.name,
                    f"{gpu.peak_tflops:,.0f}",
                    f"{gpu.reached_tflops:,.0f}",
                    f"{gpu.peak_tb_per_s}",
                    f"{gpu.l2_tb_per_s}",
                    f"{gpu.l2_mb:.0f}",
                    "x".join(map(str, kernel_tiles(gpu, DUAL)[:3])),
                ]
                for gpu in GPUS
            ),
        ),
    ]
    for shape in SHAPES:
        lines += ["", f"## N = {shape.num_tokens:,}, V = {shape.vocab_size:,}, D = {shape.hidden_size:,}", ""]
        lines += _shape_table(shape)
    lines += ["", f"## Phases on {_PHASES_ON.name}, first shape", "", *_phase_table(SHAPES[0], _PHASES_ON)]
    return "\n".join(lines) + "\n"


def _phase_table(shape: Shape, gpu: Gpu) -> list[str]:
    rows = (
        [
            plan.name,
            phase.name,
            f"{phase.flops / unit_flops(shape):.2f}",
            _gb(phase.hbm_bytes),
            _gb(phase.l2_bytes) if phase.l2_bytes else "-",
            f"{phase.overlapped_ms(gpu):.1f}",
            f"{phase.serial_ms(gpu):.1f}",
        ]
        for plan in plans(shape, gpu)
        for phase in plan.phases
    )
    head = ["plan", "phase", "units", "HBM, GB", "from L2, GB", "overlapped, ms", "serial, ms"]
    return _table(head, rows)


def _shape_table(shape: Shape) -> list[str]:
    head = ["GPU", "plan", "units", "TFLOP", "HBM, GB", "from L2, GB", "workspace, GB", "overlapped, ms", "serial, ms"]
    rows = [
        [
            gpu.name,
            plan.name,
            f"{plan.flops / unit_flops(shape):.2f}",
            f"{plan.flops / 1e12:.1f}",
            _gb(plan.hbm_bytes),
            _gb(plan.l2_bytes) if plan.l2_bytes else "-",
            _gb(plan.workspace_bytes),
            f"{plan.overlapped_ms(gpu):.1f}",
            f"{plan.serial_ms(gpu):.1f}",
        ]
        for gpu in GPUS
        for plan in plans(shape, gpu)
    ]
    return _table(head, rows)


if __name__ == "__main__":
    sys.stdout.write(page())
