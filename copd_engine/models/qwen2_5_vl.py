"""Qwen2.5-VL through transformers' own modules."""

from __future__ import annotations

from transformers import Qwen2_5_VLForConditionalGeneration

from copd_engine.models.vision import VisionPolicy


class Qwen2_5_VLPolicy(VisionPolicy):  # noqa: N801 (transformers' own spelling)
    """A ``Qwen2_5_VLForConditionalGeneration`` over packed rows.

    The tower attends within windows in most layers and orders its patches by them inside; its output is in the order of
    the image again, so nothing but the features reaches the decoder.
    """

    module: Qwen2_5_VLForConditionalGeneration
