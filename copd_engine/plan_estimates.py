"""What of a memory plan cannot be counted exactly: activations, the kernels' buffers, CUDA and its allocator."""

from __future__ import annotations

from copd_engine.models.meta import ModelSizes

#: A CUDA context with its libraries, in every process that uses the GPU.
CONTEXT_BYTES = 1 << 30
#: Of the GPU, for holes in the allocator's memory.
FRAGMENTATION = 0.04
#: copd_kernels/gpu/driver.py: 4096 tokens of 2 bytes or 2048 of 4 for each entry of the vocabulary.
LOGIT_BYTES_PER_ENTRY, LOGIT_TOKENS = 8192, 4096


def lm_head_bytes(sizes: ModelSizes, itemsize: int) -> int:
    """Of the policy loss on a GPU: a chunk of logits, its hidden gradient in fp32, and the head's gradient in fp32 and
    rounded, where the head is trained (copd_kernels/gpu/driver.py, plan "stored")."""
    head = sizes.lm_head_parameters * (4 + itemsize) if sizes.trains_lm_head else 0
    return LOGIT_BYTES_PER_ENTRY * sizes.vocab_size + 4 * LOGIT_TOKENS * sizes.hidden_size + head


def reserve_bytes(gpu_bytes: int, num_processes: int) -> int:
    """CUDA contexts and holes in the allocator's memory."""
    return num_processes * CONTEXT_BYTES + int(FRAGMENTATION * gpu_bytes)


def activation_bytes(sizes: ModelSizes, itemsize: int, num_tokens: int, visual_tokens: int, recompute: bool) -> int:
    """Estimate of what a forward of ``num_tokens`` packed tokens keeps for backward.

    Per token and decoder layer, with s bytes per element, D hidden, I intermediate, Q and K query and key heads of d:
    norms 2 D (4 + 2 s), q and k norms (Q + K) d (4 + s), attention (3 Q + 2 K) d s, SwiGLU 4 I s, fp32 statistics
    4 (2 + 2 Q + K). Measured so on a CPU in transformers' modules with SDPA (``tests/test_plan.py``); flash-attn and
    Liger keep less. Under LoRA a 16-bit input is kept again in fp32 for each adapter. Outside the layers: the last
    norm, hidden states and their gradient. With gradient checkpointing: D s per layer, and one layer whole. The vision
    tower: (8 D + 2 I) s per patch and layer, for one prompt of ``visual_tokens`` that are all visual; frozen, nothing.
    """
    s, d, hidden = itemsize, sizes.head_dim, sizes.hidden_size
    layer = 2 * hidden * (4 + 2 * s) + (3 * sizes.num_heads + 2 * sizes.num_kv_heads) * d * s
    layer += 4 * sizes.intermediate_size * s + 4 * (2 + 2 * sizes.num_heads + sizes.num_kv_heads)
    if sizes.qk_norm:
        layer += (sizes.num_heads + sizes.num_kv_heads) * d * (4 + s)
    if sizes.num_adapters and s == 2:
        layer += 4 * sizes.adapter_inputs // sizes.num_layers
    layers = sizes.num_layers * hidden * s + layer if recompute else sizes.num_layers * layer
    outside = hidden * (4 + 2 * s) + 2 * hidden * s
    num_bytes = num_tokens * (layers + outside)
    if sizes.vision is not None and sizes.trains_vision:
        vision = sizes.vision
        kept = (8 * vision.hidden_size + 2 * vision.intermediate_size) * s
        per_patch = vision.num_layers * vision.hidden_size * s + kept if recompute else vision.num_layers * kept
        num_bytes += min(visual_tokens, num_tokens) * vision.patches_per_token * per_patch
    return num_bytes
