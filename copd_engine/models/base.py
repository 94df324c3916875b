"""What the engine needs of a model: hidden states of packed rows, a decode step, an output head, a tokenizer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from copd_engine.models.attention import FLASH_NAME, NAME, PackedLayout
from copd_engine.models.cache import DecodeCache, PrefillCache
from copd_engine.models.flash import Backend
from copd_engine.models.lora import FoldedParameters, plain_name, remove_adapters
from copd_engine.models.recompute import recompute_layers
from copd_engine.types import EncodedPrompt, Example, PackedBatch, UserError


class PromptEncoder(ABC):
    """Text and media to token ids and back; shared by all branches."""

    end_token_id: int
    #: ids that must never be sampled: placeholders that the model would take for images, and padding
    suppressed_token_ids: tuple[int, ...]
    #: placeholder ids of image and video tokens
    visual_token_ids: tuple[int, ...] = ()
    spatial_merge_size: int = 1

    @abstractmethod
    def encode(self, example: Example) -> EncodedPrompt:
        """Chat template, tokens, media; UserError for a prompt that cannot be encoded."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Tokenizer and processor files in Hugging Face format."""


class Policy(ABC):
    """One branch's model. Wraps a transformers model whose attention is replaced by the packed one.

    ``attention``: flash (flash-attn) or sdpa. UserError for a model with local or capped attention or with sinks, which
    packed rows do not have.
    """

    def __init__(self, module: PreTrainedModel, attention: Backend = "sdpa") -> None:
        self.module = module
        self._check_attention()
        self.module.set_attn_implementation(self._attention_names(attention))
        self.module.eval()  # no dropout: ratios must be exactly 1 on the first update

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The decoder stack that returns final, normalised hidden states."""

    @abstractmethod
    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Input embeddings ``[1, T, D]`` of a packed row and further keyword arguments of the backbone."""

    @abstractmethod
    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        """Position ids in the form the backbone takes."""

    @property
    def visual(self) -> PreTrainedModel | None:
        """The vision tower with its mergers; None in a text-only model."""
        return None

    def freeze_vision(self) -> None:
        """Take the vision tower and its mergers out of training, as verl's ``freeze_vision_tower`` does."""
        if self.visual is not None:
            self.visual.requires_grad_(False)

    def _attention_names(self, attention: Backend) -> dict[str, str]:
        """What transformers calls the attention of each part of the model; the whole under ''."""
        return {"": FLASH_NAME if attention == "flash" else NAME}

    def _check_attention(self) -> None:
        config = self.module.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        found = None
        if kinds:
            found = f"{sorted(kinds)[0].replace('_', ' ')} layers"
        elif not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
            found = f"a sliding window of {config.sliding_window} tokens"
        elif getattr(config, "attn_logit_softcapping", None) is not None:
            found = "soft-capped attention"
        elif any(name.endswith(".sinks") for name, _ in self.module.named_parameters()):
            found = "attention sinks"
        if found:
            raise UserError(
                f"{type(self.module).__name__} has {found}; packed rows need full causal attention in every layer"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """What the cost of a forward follows from: widths and depths of the decoder and of the vision tower."""
        text, vision = self.module.config.get_text_config(), getattr(self.module.config, "vision_config", None)
        sizes = {"hidden_size": text.hidden_size, "num_layers": text.num_hidden_layers}
        experts = getattr(text, "num_experts_per_tok", None)
        sizes["intermediate_size"] = experts * text.moe_intermediate_size if experts else text.intermediate_size
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sizes["attention_size"] = text.num_attention_heads * head_dim
        sizes["kv_size"] = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim
        if vision is not None:
            sizes |= {"vision_hidden_size": vision.hidden_size, "vision_layers": vision.depth}
        return sizes

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """``[V, D]``, the embedding itself where the head is tied."""
        return self.module.get_output_embeddings().weight

    @property
    def lm_head_bias(self) -> torch.Tensor | None:
        return getattr(self.module.get_output_embeddings(), "bias", None)

    def hidden_states(self, batch: PackedBatch, cache: PrefillCache | None = None) -> torch.Tensor:
        """Hidden states ``[N, D]`` at the rows that predict response tokens (``batch.rows_N``).

        The load-balancing loss of mixture-of-experts models is not computed: the routers learn from the policy's loss
        alone.
        """
        # A cache has no backward, and transformers would drop it.
        with recompute_layers(self.module, active=torch.is_grad_enabled() and cache is None):
            inputs_embeds_1TD, extra = self._embed(batch)
            output = self.backbone(
                inputs_embeds=inputs_embeds_1TD,
                position_ids=self._backbone_positions(batch.position_ids_3T[:, None, :]),
                past_key_values=cache,
                use_cache=False,
                layout=PackedLayout.of(batch),
                **extra,
            )
        return output.last_hidden_state[0].index_select(0, batch.rows_N)

    def decode_step(self, token_ids_B: torch.Tensor, position_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Hidden states ``[B, D]`` after one more token of each of the cache's rows, for which it has made room
        (:meth:`DecodeCache.advance`)."""
        output = self.backbone(
            inputs_embeds=self.module.get_input_embeddings()(token_ids_B[:, None]),
            position_ids=self._backbone_positions(position_B[None, :, None].expand(3, -1, 1)),
            past_key_values=cache,
            use_cache=False,
            layout=cache.layout,
        )
        return output.last_hidden_state[:, 0]

    def clone(self) -> Policy:
        """A copy with its own trainable parameters; the frozen ones are shared, so K LoRA experts hold one base."""
        frozen = (p for p in self.module.parameters() if not p.requires_grad)
        return self._copy({id(parameter): parameter for parameter in frozen})

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their names in the transformers module; a tied head appears once.

        Those of LoRA end in ``.lora_A.default.weight`` and ``.lora_B.default.weight``.
        """
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def full_parameters(self, dtype: torch.dtype | None = None) -> Mapping[str, torch.Tensor]:
        """All weights, trained and frozen, of the model without adapters, by its names, detached; a tied head once.

        Adapters are folded in. Weights are in ``dtype``, None for each one's own: the policy's storage where nothing is
        to be computed. Ask for fp32 to average LoRA experts of a bf16 model without rounding each of them first.
        """
        return FoldedParameters(self.module, dtype)

    def with_full_parameters(self, tensors: Mapping[str, torch.Tensor]) -> Policy:
        """A policy of the same model without adapters and with these weights, such as the merge of the branches.

        ``tensors`` by the names of :meth:`full_parameters`; they become the new policy's storage where dtype and device
        are those of this one, and are converted otherwise. KeyError for a missing name.
        """
        taken: dict[int, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters():
            plain = plain_name(name)
            if plain is None:
                taken[id(parameter)] = parameter  # leaves with its adapter
            else:
                taken[id(parameter)] = nn.Parameter(tensors[plain].detach().to(parameter), parameter.requires_grad)
        policy = self._copy(taken)
        remove_adapters(policy.module)
        return policy

    def _copy(self, parameters: dict[int, nn.Parameter]) -> Policy:
        """A copy in which the parameters of these ids are replaced, tied ones in all their places."""
        policy = copy.copy(self)
        policy.module = copy.deepcopy(self.module, dict(parameters))
        return policy

    def save(self, folder: Path) -> None:
        """Weights and config in plain Hugging Face format (safetensors), adapters folded in, in the model's dtype.

        Names and layout on disk are those of the model's hub checkpoints, where transformers keeps others in memory.
        """
        self.with_full_parameters(self.full_parameters()).module.save_pretrained(folder)
