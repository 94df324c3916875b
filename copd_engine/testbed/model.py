"""The testbed's own model: Qwen3-VL's architecture at 0.3M parameters, with a byte-level BPE of 384 tokens."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from copd_engine.models.qwen3_vl import Qwen3VLPolicy, Qwen3VLPromptEncoder, VideoProcessorTorch
from copd_engine.testbed import tasks

VOCAB_SIZE = 384
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO]
# Qwen's split: words with their leading space, each digit alone, punctuation, white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
# As in Qwen3-VL, the processor puts the vision tokens around a video's frames itself.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|video_pad|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "user\n assistant\n",
    "<0.2 seconds> <1.2 seconds> <2.2 seconds> <3.2 seconds> <4.2 seconds>",
    tasks.TEXT_INSTRUCTION,
    tasks.IMAGE_INSTRUCTION.removeprefix("<image>"),
    tasks.VIDEO_INSTRUCTION.removeprefix("<video>"),
    "Several experts start from one model. Each learns from its own rewards and from the others as they are "
    "at that moment. At the end their parameters are averaged into one model that reasons over text, images and video.",
    "The answer is the sum of the digits. The red square moves to the right, the blue square does not count.",
]
PATCH_PIXELS = 4
# transformers' default of 0.02 is for widths in the thousands; at 64 it starts the model near zero and learning stalls.
INITIALIZER_RANGE = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the prompts' own words and a few sentences; the same tokens every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 64, num_layers: int = 4) -> Qwen3VLConfig:
    """Qwen3-VL with one token per 8 x 8 pixels (patch 4, merge 2), a vision tower of depth 2 and a tied head."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 16,
            "num_key_value_heads": hidden_size // 32,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "pad_token_id": token(PAD),
            "eos_token_id": token(END),
            "tie_word_embeddings": True,
            "initializer_range": INITIALIZER_RANGE,
        },
        vision_config={
            "depth": 2,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_heads": 2,
            "patch_size": PATCH_PIXELS,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )


def untrained(seed: int, hidden_size: int = 64, num_layers: int = 4) -> tuple[Qwen3VLPolicy, Qwen3VLPromptEncoder]:
    """A tiny Qwen3-VL with random weights drawn from ``seed``, and its prompt encoder."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Qwen3VLForConditionalGeneration(tiny_config(tokenizer, hidden_size, num_layers)).float()
    pixels = {"patch_size": PATCH_PIXELS, "merge_size": 2, "temporal_patch_size": 2}
    image_size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    video_size = {"shortest_edge": 64, "longest_edge": 64 * 64 * 64}
    half = [0.5, 0.5, 0.5]
    encoder = Qwen3VLPromptEncoder(
        tokenizer,
        Qwen2VLImageProcessorPil(size=image_size, image_mean=half, image_std=half, **pixels),
        VideoProcessorTorch(size=video_size, image_mean=half, image_std=half, **pixels),
        module.config,
    )
    return Qwen3VLPolicy(module), encoder
