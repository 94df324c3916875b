"""The lines of a memory plan: what the trainer and the rollout engine hold on a GPU, and for what."""

from __future__ import annotations

from dataclasses import dataclass

from copd_engine.algorithms import Schedule
from copd_engine.config import RunConfig
from copd_engine.models.decode_layout import GPU_CALL_BYTES
from copd_engine.models.meta import ModelSizes
from copd_engine.plan_estimates import lm_head_bytes
from copd_engine.plan_moves import state_bytes

#: The item of ``training`` that ``optim.offload`` brings.
UPDATED = "masters and moments of one expert"


@dataclass(frozen=True)
class Item:
    """One line of the plan; ``exact`` or an estimate."""

    name: str
    num_bytes: int
    exact: bool
    note: str = ""


def total(items: tuple[Item, ...]) -> int:
    """Bytes of all of them."""
    return sum(item.num_bytes for item in items)


def base_bytes_on_host(config: RunConfig, sizes: ModelSizes) -> int:
    """Of the base model: what is trained of it waits with the masters, if there are any (``trainer.py``)."""
    waits = config.optim.offload and sizes.master_bytes and not config.objective.kl.weight
    return sizes.trained_bytes if waits else 0


def resident_items(config: RunConfig, sizes: ModelSizes, num_experts: int, base_on_host: int) -> tuple[Item, ...]:
    """Held from the first update to the end; masters and moments are none where they wait in host memory."""
    base = sizes.weight_bytes + 4 * sizes.adapter_parameters - base_on_host
    held = 0 if config.optim.offload else num_experts
    moments = state_bytes(sizes) - sizes.master_bytes
    shared = "; shared by the experts" if sizes.num_adapters else ""
    own = "" if sizes.master_bytes else "what is trained is fp32 already"
    return (
        Item("base model", base, True, "theta_0, for the merge" + shared),
        Item(
            "experts' weights",
            num_experts * sizes.trained_bytes,
            True,
            f"{num_experts} x what is trained; teachers too",
        ),
        Item("fp32 masters", held * sizes.master_bytes, True, own),
        Item("AdamW moments", held * moments, True, "fp32, from the first update on"),
    )


def training_items(
    sizes: ModelSizes, itemsize: int, num_tokens: int, activations: dict[str, int], recompute: bool
) -> tuple[Item, ...]:
    """Held while one expert is updated by micro-batches of ``num_tokens``."""
    kept = activations["checkpointed" if recompute else "kept"]
    how = "gradient checkpointing" if recompute else "all kept"
    head = "a chunk of logits" + (", fp32 gradient of the head" if sizes.trains_lm_head else "")
    moving = sizes.largest_trained_bytes if sizes.master_bytes else 0
    return (
        Item("gradient sums", 4 * sizes.trained_parameters, True, "fp32, of one expert at a time"),
        Item("a gradient on its way", moving, False, "of the largest tensor, in the model's dtype"),
        Item("activations", kept, False, f"{num_tokens:,} tokens, {how}"),
        Item("lm_head kernels", lm_head_bytes(sizes, itemsize), False, head),
    )


def teacher_heads(config: RunConfig, sizes: ModelSizes, itemsize: int) -> tuple[Item, ...]:
    """Copies for a distillation signal over the vocabulary; heads that are not trained need none."""
    teachers = {teacher for of_student in Schedule(config).teachers.values() for teacher in of_student}
    if config.distillation.signal == "sampled" or not sizes.trains_lm_head or not teachers:
        return ()
    num_bytes = len(teachers) * sizes.lm_head_parameters * itemsize
    return (Item("teachers' heads", num_bytes, True, f"{len(teachers)} x as of a step's start, in phase II"),)


def engine_copies(
    config: RunConfig, sizes: ModelSizes, itemsize: int, num_experts: int, engine: str
) -> tuple[Item, ...]:
    """What the rollout engine holds besides keys and values; its weights first."""
    if engine == "embedded":
        return (
            Item("engine's weights", 0, True, "the trainer's own"),
            Item("gathers of decoding", GPU_CALL_BYTES, False),
        )
    weights = Item(
        "engine's weights", sizes.weight_bytes // config.rollout.tensor_parallel, True, "one copy for all experts"
    )
    if config.model.lora is not None:
        return weights, Item("engine's adapters", num_experts * sizes.adapter_parameters * itemsize, False)
    return weights, Item(
        "weights on their way", min(config.rollout.bucket_mb << 20, sizes.trained_bytes), False, "a bucket"
    )
