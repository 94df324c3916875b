"""Policies and prompt encoders against transformers' own classes and numbers worked out by hand."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
)

from copd_engine.config import ModelConfig
from copd_engine.models.attention import varlen_attention
from copd_engine.models.causal_lm import CausalLMPolicy, TextPromptEncoder
from copd_engine.models.loading import load_model
from copd_engine.models.qwen3_vl import Qwen3VLPromptEncoder
from copd_engine.packing import pack
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed.model import SPECIAL, build_tokenizer, untrained
from copd_engine.types import EncodedPrompt, Example, RolloutRequest, UserError
from tests.helpers import prompts_of_all_domains, response_of, tiny_model
from tests.plain import plain_logp, plain_model, plain_token_logp

PATCH, MERGE = 4, 2  # of the testbed's model: one token per 8 x 8 pixels


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def encoder(model) -> Qwen3VLPromptEncoder:
    return model[1]


def image(height: int = 16, width: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def video(frames: int = 4, height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def example(prompt: str, images=(), videos=(), fps: float = 2.0) -> Example:
    return Example("row-7", prompt, "1", "exact", images=tuple(images), videos=tuple(videos), fps=fps)


def packed_logp(policy, encoder, prompt: EncodedPrompt, response: torch.Tensor) -> torch.Tensor:
    batch = pack([prompt], [response], encoder.visual_token_ids, encoder.spatial_merge_size)
    logits_NV = torch.nn.functional.linear(policy.hidden_states(batch), policy.lm_head_weight, policy.lm_head_bias)
    return torch.log_softmax(logits_NV.double(), -1)


# Policy


def test_a_clone_is_independent(model):
    policy, encoder = model
    before = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    clone = policy.clone()
    assert type(clone) is type(policy)
    assert clone.named_parameters().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in clone.named_parameters().items())
    prompt = prompts_of_all_domains(encoder, 1)[1]
    response = response_of(encoder, prompt)
    torch.testing.assert_close(
        packed_logp(clone, encoder, prompt, response), packed_logp(policy, encoder, prompt, response), atol=0, rtol=0
    )
    with torch.no_grad():
        for parameter in clone.named_parameters().values():
            parameter += 1
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters().items())
    # The tied head of the clone is the clone's own embedding.
    assert clone.lm_head_weight.data_ptr() == clone.module.get_input_embeddings().weight.data_ptr()
    assert clone.lm_head_weight.data_ptr() != policy.lm_head_weight.data_ptr()


def test_a_tied_head_is_one_parameter(model):
    names = model[0].named_parameters()
    assert sum(p.data_ptr() == model[0].lm_head_weight.data_ptr() for p in names.values()) == 1
    assert sum(p.numel() for p in names.values()) == sum(p.numel() for p in model[0].module.parameters())


@pytest.mark.parametrize("auto", [Qwen3VLForConditionalGeneration, AutoModelForImageTextToText])
def test_saved_weights_load_in_plain_transformers_with_the_same_logits(model, tmp_path, auto):
    policy, encoder = model
    policy.save(tmp_path)
    plain = auto.from_pretrained(tmp_path).eval()
    assert plain.config._attn_implementation == "sdpa"  # ours is not written into the config
    for prompt in prompts_of_all_domains(encoder, 1):
        response = response_of(encoder, prompt)
        torch.testing.assert_close(
            packed_logp(policy, encoder, prompt, response), plain_logp(plain, prompt, response), atol=1e-5, rtol=1e-5
        )


def test_a_saved_policy_and_encoder_come_back_through_load_model(model, tmp_path):
    policy, encoder = model
    policy.save(tmp_path)
    encoder.save(tmp_path)
    again, again_encoder = load_model(ModelConfig(path=str(tmp_path)))
    for name, parameter in again.named_parameters().items():
        assert torch.equal(parameter, policy.named_parameters()[name])
    assert again_encoder.end_token_id == encoder.end_token_id
    assert again_encoder.suppressed_token_ids == encoder.suppressed_token_ids
    for prompt in prompts_of_all_domains(encoder, 1):
        other = again_encoder.encode(prompt.example)
        assert torch.equal(other.input_ids_T, prompt.input_ids_T)
        assert torch.equal(other.position_ids_3T, prompt.position_ids_3T)
        for field in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            left, right = getattr(other, field), getattr(prompt, field)
            assert left is right is None or torch.equal(left, right), field


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(ModelConfig(path=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UserError, match="cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_untrained_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (untrained(seed, 32, 1)[0].named_parameters() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(
        one["lm_head.weight" if "lm_head.weight" in one else next(iter(one))], next(iter(other.values()))
    )


# Attention


def qkv(batch: int = 1, tokens: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, 4, generator=generator) for heads in (2, 1, 1)]


def test_attention_without_layout_is_plain_and_not_causal():
    query, key, value = qkv(2)
    out, weights = varlen_attention(torch.nn.Module(), query, key, value, None)
    scores = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value  # one key head serves both query heads
    torch.testing.assert_close(out, scores.transpose(1, 2))
    assert weights is None


def test_attention_refuses_what_it_would_get_wrong(model):
    policy, encoder = model
    prompts = prompts_of_all_domains(encoder, 1)
    layout_of = policy.module.model.language_model  # a real layout, caught on its way
    caught = {}
    handle = layout_of.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True)
    packed_logp(policy, encoder, prompts[0], torch.tensor([1, 2]))
    handle.remove()
    with pytest.raises(ValueError, match="takes one row, got a batch of 2"):
        varlen_attention(torch.nn.Module(), *qkv(2), None, layout=caught["layout"])
    with pytest.raises(ValueError, match="takes a layout, not an attention_mask"):
        varlen_attention(torch.nn.Module(), *qkv(), torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="does not support softcap"):
        varlen_attention(torch.nn.Module(), *qkv(), None, softcap=50.0)
    # transformers would run the decoder without a causal mask: wrong numbers, no error.
    with pytest.raises(ValueError, match="needs a layout in a decoder"):
        policy.module(input_ids=prompts[0].input_ids_T[None])


def test_sliding_windows_are_refused():
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    policy = CausalLMPolicy(Qwen3ForCausalLM(config))
    text_encoder = text_prompt_encoder()
    with pytest.raises(ValueError, match="does not support sliding_window"):
        packed_logp(policy, text_encoder, text_encoder.encode(example("hello")), torch.tensor([1, 2]))


# Text-only models

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def text_prompt_encoder() -> TextPromptEncoder:
    tokenizer = build_tokenizer()
    return TextPromptEncoder(tokenizer, tokenizer.eos_token_id)


@pytest.fixture(scope="module", params=["llama", "llama, tied", "qwen3"])
def text_model(request):
    torch.manual_seed(0)
    if request.param == "qwen3":
        module = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    else:
        module = LlamaForCausalLM(
            LlamaConfig(**SIZES, tie_word_embeddings="tied" in request.param, attention_bias=True)
        )
    return CausalLMPolicy(module), text_prompt_encoder()


QUESTIONS = ("1+1=", "a long question about cats and dogs", "?")


def test_text_models_packed_equal_each_sample_alone(text_model):
    policy, encoder = text_model
    prompts = [encoder.encode(example(q)) for q in QUESTIONS for _ in range(2)]
    responses = [torch.arange(10 + i, 11 + 3 * i) for i in range(len(prompts))]
    batch = pack(prompts, responses)
    hidden_ND = policy.hidden_states(batch)
    plain = plain_model(policy)
    logp_NV = torch.log_softmax((hidden_ND @ policy.lm_head_weight.T).double(), -1)
    alone = [plain_logp(plain, p, r) for p, r in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(logp_NV, torch.cat(alone), atol=1e-5, rtol=1e-5)
    # Gradients too.
    direction = torch.randn(logp_NV.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy.module.zero_grad()
    (logp_NV * direction).sum().backward()
    (torch.cat(alone) * direction).sum().backward()
    expected = dict(plain.named_parameters())
    whole = sum(float(p.grad.square().sum()) for p in expected.values()) ** 0.5
    for name, parameter in policy.named_parameters().items():
        error = float((parameter.grad - expected[name].grad).norm())
        assert error < 1e-4 * max(float(expected[name].grad.norm()), 1e-2 * whole), name


def test_text_models_sample_what_a_plain_forward_says(text_model):
    policy, encoder = text_model
    requests = [
        RolloutRequest(encoder.encode(example(q)), 10 * i + n, i) for i, q in enumerate(QUESTIONS) for n in range(3)
    ]
    rollouts = EmbeddedEngine({"e": policy}, encoder).generate("e", requests, Sampling(0.9, 7))
    plain = plain_model(policy)
    for rollout in rollouts:
        expected = plain_token_logp(plain, rollout, 0.9).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_text_models_save_and_load(text_model, tmp_path):
    policy, encoder = text_model
    policy.save(tmp_path)
    encoder.save(tmp_path)
    again, again_encoder = load_model(ModelConfig(path=str(tmp_path)))
    assert isinstance(again, CausalLMPolicy)
    prompt = again_encoder.encode(example("1+1="))
    response = torch.tensor([20, 30, encoder.end_token_id])
    plain = type(policy.module).from_pretrained(tmp_path)
    torch.testing.assert_close(
        packed_logp(again, encoder, prompt, response), plain_logp(plain, prompt, response), atol=1e-5, rtol=1e-5
    )


def test_text_prompts_follow_the_chat_template():
    encoder = text_prompt_encoder()
    prompt = encoder.encode(example("What is 1+1?"))
    text = encoder.tokenizer.decode(prompt.input_ids_T)
    assert text == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.position_ids_3T.tolist() == [list(range(prompt.num_tokens))] * 3
    assert prompt.next_position == prompt.num_tokens
    assert encoder.suppressed_token_ids == (encoder.tokenizer.pad_token_id,)


def test_text_prompts_that_cannot_be_encoded():
    with pytest.raises(UserError, match="'row-7' has images or videos, the model is text-only"):
        text_prompt_encoder().encode(example("x", [image()]))
    tokenizer = build_tokenizer()
    with pytest.raises(UserError, match="no end token"):
        TextPromptEncoder(tokenizer, None)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        TextPromptEncoder(tokenizer, 2)


# Tokenizer


def test_the_vocabulary_has_384_tokens(encoder):
    tokenizer = encoder.tokenizer
    assert len(tokenizer) == tokenizer.vocab_size == 384
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
    assert tokenizer.convert_ids_to_tokens(encoder.end_token_id) == "<|im_end|>"
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


@given(st.text(string.printable, max_size=60))
def test_decoding_undoes_encoding(text):
    encoder = text_prompt_encoder()
    assert encoder.decode(encoder.tokenizer(text)["input_ids"]) == text


def test_all_printable_ascii_survives_and_special_tokens_vanish(encoder):
    ids = encoder.tokenizer(string.printable)["input_ids"]
    assert encoder.decode(ids) == string.printable
    special = encoder.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert encoder.decode([*special, *ids, *special]) == string.printable


def test_every_digit_is_a_token_of_its_own(encoder):
    assert [encoder.decode([i]) for i in encoder.tokenizer("8+10=2#0")["input_ids"]] == list("8+10=2#0")


# Prompts with images and videos


def text_of(encoder, prompt: EncodedPrompt) -> str:
    return encoder.tokenizer.decode(prompt.input_ids_T)


def turn(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def pads(count: int, kind: str = "image") -> str:
    return f"<|vision_start|>{f'<|{kind}_pad|>' * count}<|vision_end|>"


def test_markers_say_where_images_stand(encoder):
    small, large = image(8, 8), image(16, 24)  # 1 and 2 x 3 tokens
    prompt = encoder.encode(example("Is <image> in <image>?", [small, large]))
    assert text_of(encoder, prompt) == turn(f"Is {pads(1)} in {pads(6)}?")
    assert prompt.image_grid_thw.tolist() == [[1, 2, 2], [1, 4, 6]]
    prompt = encoder.encode(example("Is <image> in <image>?", [large, small]))
    assert text_of(encoder, prompt) == turn(f"Is {pads(6)} in {pads(1)}?")
    assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]


def test_media_without_markers_stand_in_front(encoder):
    prompt = encoder.encode(example("What?", [image(8, 8), image(16, 16)]))
    assert text_of(encoder, prompt) == turn(f"{pads(1)}{pads(4)}What?")
    prompt = encoder.encode(example("<image>What?", [image(8, 8)]))
    assert text_of(encoder, prompt) == turn(f"{pads(1)}What?")


def test_videos_carry_times_and_one_block_per_two_frames(encoder):
    at_2 = encoder.encode(example("Look: <video>!", videos=[video(4)]))
    times = "".join(f"<{t} seconds>{pads(4, 'video')}" for t in ("0.2", "1.2"))  # (0 + .5) / 2 and (1 + 1.5) / 2
    assert text_of(encoder, at_2) == turn(f"Look: {times}!")
    assert at_2.video_grid_thw.tolist() == [[2, 4, 4]]
    at_half = encoder.encode(example("<video>", videos=[video(4)], fps=0.5))
    assert "<1.0 seconds>" in text_of(encoder, at_half)
    assert "<5.0 seconds>" in text_of(encoder, at_half)


def test_a_prompt_may_hold_an_image_and_a_video(encoder):
    prompt = encoder.encode(example("<video> or <image>?", [image(8, 8)], [video(2, 8, 8)]))
    assert text_of(encoder, prompt) == turn(f"<0.2 seconds>{pads(1, 'video')} or {pads(1)}?")
    with pytest.raises(ValueError, match="mixes images and videos"):
        pack([prompt], [torch.tensor([1])], encoder.visual_token_ids, MERGE)


@pytest.mark.parametrize(
    ("prompt", "num_images", "num_videos", "message"),
    [
        ("<image><image>", 1, 0, r"'row-7' has 2 <image> markers for 1 file\(s\)"),
        ("<image>", 0, 0, r"has 1 <image> markers for 0 file\(s\)"),
        ("a <video> b", 1, 0, r"has 1 <video> markers for 0 file\(s\)"),
        ("<video><video>", 0, 1, r"has 2 <video> markers for 1 file\(s\)"),
        ("a <|image_pad|> b", 0, 0, r"'row-7' contains <\|image_pad\|>"),
        ("a <|video_pad|> b", 1, 0, r"'row-7' contains <\|video_pad\|>"),
    ],
)
def test_prompts_that_do_not_fit_their_files(encoder, prompt, num_images, num_videos, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(example(prompt, [image()] * num_images, [video()] * num_videos))


def test_media_that_the_processor_refuses(encoder):
    with pytest.raises(UserError, match="'row-7' cannot be encoded"):
        encoder.encode(example("x", videos=[video(frames=1)]))
    with pytest.raises(UserError, match="'row-7' cannot be encoded: absolute aspect ratio"):
        encoder.encode(example("x", [image(8, 8 * 201)]))


def positions_by_hand(encoder, prompt: EncodedPrompt) -> tuple[list[list[int]], int]:
    """Text counts up in all three rows; pixels from p on stand at time p, row p + i, column p + j; then p + max."""
    if prompt.image_grid_thw is not None:
        blocks = [(h // MERGE, w // MERGE) for _, h, w in prompt.image_grid_thw.tolist()]
    elif prompt.video_grid_thw is not None:
        blocks = [(h // MERGE, w // MERGE) for t, h, w in prompt.video_grid_thw.tolist() for _ in range(t)]
    else:
        blocks = []
    ids, rows, position, at = prompt.input_ids_T.tolist(), [], 0, 0
    while at < len(ids):
        if ids[at] not in encoder.visual_token_ids:
            rows.append([position] * 3)
            position, at = position + 1, at + 1
            continue
        height, width = blocks.pop(0)
        rows += [[position, position + i, position + j] for i in range(height) for j in range(width)]
        position, at = position + max(height, width), at + height * width
    assert not blocks
    return [list(column) for column in zip(*rows, strict=True)], position


@pytest.mark.parametrize(
    "row",
    [
        example("no pictures"),
        example("a <image> b", [image(16, 40)]),
        example("<image> then <image>", [image(24, 8), image(8, 8)]),
        example("a <video> b", videos=[video(6, 8, 24)]),
    ],
    ids=["text", "image", "two images", "video"],
)
def test_positions_by_hand(encoder, row):
    prompt = encoder.encode(row)
    expected, following = positions_by_hand(encoder, prompt)
    assert prompt.position_ids_3T.tolist() == expected
    assert prompt.next_position == following


def patches_by_hand(frames: np.ndarray) -> np.ndarray:
    """``[frames, height, width, 3]`` uint8 -> one row per patch, in the order in which 2 x 2 patches become a token."""
    values = (frames.astype(np.float64) / 255 - 0.5) / 0.5
    side = PATCH * MERGE
    rows = []
    for time in range(0, len(values), 2):
        for token_y in range(values.shape[1] // side):
            for token_x in range(values.shape[2] // side):
                for patch_y in range(MERGE):
                    for patch_x in range(MERGE):
                        y, x = token_y * side + patch_y * PATCH, token_x * side + patch_x * PATCH
                        block = values[time : time + 2, y : y + PATCH, x : x + PATCH]  # [2, 4, 4, 3]
                        rows.append(block.transpose(3, 0, 1, 2).ravel())  # channel, time, y, x
    return np.stack(rows)


def test_patches_of_an_image_by_hand(encoder):
    picture = image(16, 24)
    prompt = encoder.encode(example("<image>", [picture]))
    frames = np.stack([np.asarray(picture)] * 2)  # an image is a video of two equal frames
    np.testing.assert_allclose(prompt.pixel_values.numpy(), patches_by_hand(frames), atol=1e-6)


@pytest.mark.parametrize("num_frames", [2, 5, 6])
def test_patches_of_a_video_by_hand(encoder, num_frames):
    frames = video(num_frames, 24, 16)
    prompt = encoder.encode(example("<video>", videos=[frames]))
    if num_frames % 2:  # the last frame once more
        frames = np.concatenate([frames, frames[-1:]])
    assert prompt.video_grid_thw.tolist() == [[len(frames) // 2, 6, 4]]
    assert prompt.pixel_values_videos.dtype == torch.float32
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), patches_by_hand(frames), atol=1e-6)


def test_two_videos_of_different_sizes_keep_their_order(encoder):
    first, second = video(4, 16, 16, 1), video(2, 8, 24, 2)
    prompt = encoder.encode(example("<video><video>", videos=[first, second]))
    assert prompt.video_grid_thw.tolist() == [[2, 4, 4], [1, 2, 6]]
    expected = np.concatenate([patches_by_hand(first), patches_by_hand(second)])
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), expected, atol=1e-6)


def test_videos_are_resized_to_whole_tokens_like_pil_does(encoder):
    """20 x 28 becomes 16 x 32 (round(2.5) is 2, round(3.5) is 4), bicubic with antialias, up to two grey levels.

    PIL also cuts at black and white between its two passes, so that is tested apart.
    """
    extreme = encoder.encode(example("<video>", videos=[video(2, 20, 28) // 128 * 255])).pixel_values_videos
    assert extreme.aminmax() == (-1.0, 1.0)
    frames = 64 + video(2, 20, 28) // 2
    prompt = encoder.encode(example("<video>", videos=[frames]))
    assert prompt.video_grid_thw.tolist() == [[1, 4, 8]]
    resized = np.stack([np.asarray(Image.fromarray(f).resize((32, 16), Image.Resampling.BICUBIC)) for f in frames])
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), patches_by_hand(resized), atol=2.1 * 2 / 255)


def test_grey_videos_become_three_equal_channels(encoder):
    grey = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    rgb = encoder.processor.video_processor.convert_to_rgb(grey)
    assert rgb.shape == (2, 3, 3, 4)
    assert all(torch.equal(rgb[:, c], grey[:, 0]) for c in range(3))
    assert encoder.processor.video_processor.convert_to_rgb(rgb) is rgb
