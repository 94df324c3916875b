"""What runs inside sglang's scheduler processes: the sampler, and the loading of weights with checks.

It enters by sglang's own doors: ``Engine.run_scheduler_process_func``, ``register_sampler_backend`` and
``custom_weight_loader``. Only processes that run sglang import this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch.utils._python_dispatch import TorchDispatchMode

from copd_engine.rollout.draws import draw, uniforms
from copd_engine.rollout.sglang_weights import dtype_name, word_sum


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """sglang's scheduler with our sampler; the target of its processes."""
    # Under the name that deterministic inference insists on.
    register_sampler_backend("pytorch", PolicySampler)
    run_scheduler_process(*args, **kwargs)


class OurDraws(CustomLogitProcessor):
    """Marks requests of ours: sglang hands ``custom_params`` only to requests with a processor. Changes no logits."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        return logits


class PolicySampler(Sampler):
    """Draws each token by its request's own seed, and reports the policy's log-prob over the whole vocabulary.

    sglang's own sampler honours seeds in deterministic mode only, and a logit bias, its way to forbid tokens, would
    change the log-probs. Here forbidden ids are left out of the draw alone, as in the embedded engine.
    """

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
        *,
        logprob_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = sampling_info.custom_params
        if not sampling_info.has_custom_logit_processor or any(row is None or "seed" not in row for row in rows):
            return super().forward(
                logits_output,
                sampling_info,
                return_logprob,
                top_logprobs_nums,
                token_ids_logprobs,
                positions,
                logprob_logits=logprob_logits,
            )
        logits_BV = logits_output.next_token_logits
        device = logits_BV.device
        for row in rows:
            # The request's stop ids hold the one end token; further ones of the model's generation config end nothing.
            row["__req__"].eos_token_ids = None
        seed_B, prompt_tokens_B = torch.tensor(
            [[row["seed"] for row in rows], [row["prompt_tokens"] for row in rows]], dtype=torch.int64
        ).to(device)
        suppressed = torch.tensor(rows[0]["suppressed"], dtype=torch.int64, device=device)
        logp_BV = torch.log_softmax(logits_BV.float() / sampling_info.temperatures, dim=-1)
        # ``positions``: of the last token that the model has read.
        uniform_B = uniforms(seed_B, positions.long() + 1 - prompt_tokens_B)
        token_B = draw(logp_BV, uniform_B, sampling_info.top_ks == 1, suppressed).to(torch.int32)
        if return_logprob:
            result = self.output_logprob_processor.compute_logprobs(
                logp_BV, top_logprobs_nums, token_ids_logprobs, token_B
            )
            result.write_output_to(logits_output)
        self._sync_token_ids_across_tp(token_B, sampling_info)
        return token_B


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """sglang's custom weight loader. ``request`` is JSON in a uint8 tensor; the answer is written to a file that it
    names, one per rank, because sglang passes nothing back. Errors are answered too: raised here, they would kill the
    scheduler."""
    tensors = dict(named_tensors)
    request = json.loads(tensors["request"].cpu().numpy().tobytes())
    try:
        reply = _OPERATIONS[request["operation"]](model, request, tensors)
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    path = Path(f"{request['reply']}.{get_parallel().tp_rank}")
    path.write_text(json.dumps(reply))


def _describe(model: Any, request: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What loading tensors of these names and shapes would write, found by sglang's own loading code; nothing is
    changed. ``as``: the name under which sglang takes a tensor, which is the one of the hub's checkpoints."""
    parameters = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    found: dict[str, Any] = {}
    for name, shape in request["tensors"]:
        for alias in _aliases(name):
            try:
                with torch.no_grad(), _Writes() as writes:
                    model.load_weights([(alias, torch.zeros((), device=device).expand(shape))])
            except KeyError:  # how some models meet a name that they do not know
                continue
            except Exception as error:
                found[name] = {"error": str(error) or type(error).__name__}
                break
            taken = [(parameters[storage], dtype) for storage, dtype in writes.seen if storage in parameters]
            if taken:
                names = sorted({parameter for parameter, _ in taken})
                found[name] = {"as": alias, "parameters": names, "dtype": dtype_name(taken[0][1])}
                break
    return {"tensors": found, "parameters": {name: list(p.shape) for name, p in model.named_parameters()}}


def _aliases(name: str) -> list[str]:
    """A parameter's name in transformers, and in the older checkpoints by which sglang knows some models."""
    older = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    return list(dict.fromkeys((name, older)))


class _Writes(TorchDispatchMode):
    """Notes where values would be written, checks that shapes agree, and writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func not in (aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default):
            return func(*args, **(kwargs or {}))
        target = args[0]
        if func is aten.copy_.default and target.shape != args[1].shape:
            raise ValueError(f"the engine's has the shape {list(target.shape)}")
        self.seen.append((target.untyped_storage().data_ptr(), target.dtype))
        return target


def _load(model: Any, request: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load one bucket; answers with the sum of each tensor as it arrived."""
    bucket = tensors["bucket"]
    views = [
        (name, bucket[start:end].view(getattr(torch, dtype)).view(shape))
        for name, shape, dtype, start, end in request["tensors"]
    ]
    sums = {name: word_sum(view) for name, view in views}
    with torch.no_grad():
        model.load_weights(views)
    if bucket.is_cuda:
        torch.cuda.synchronize()
    return {"sums": sums}


def _sums(model: Any, request: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The sum of every parameter as the engine holds it now."""
    return {"sums": {name: word_sum(parameter.detach()) for name, parameter in model.named_parameters()}}


_OPERATIONS: dict[str, Callable[[Any, dict[str, Any], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "describe": _describe,
    "load": _load,
    "sums": _sums,
}
