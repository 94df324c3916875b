"""The testbed's tasks and the script that makes its base checkpoint."""

from __future__ import annotations

import functools
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from copd_engine import cli
from copd_engine.config import ModelConfig
from copd_engine.models.loading import load_model
from copd_engine.models.qwen3_vl import Qwen3VLPromptEncoder
from copd_engine.testbed import tasks
from copd_engine.testbed.build import MAX_NEW_TOKENS, BuildSettings, _noisy, build
from copd_engine.testbed.model import build_tokenizer
from copd_engine.testbed.tasks import DOMAINS, testbed_examples
from copd_engine.types import Example, UserError
from copd_engine.verifiers import get_verifier
from tests.helpers import tiny_model

examples_of = testbed_examples  # not a test, whatever its name begins with
del testbed_examples


def content(example: Example) -> tuple[object, ...]:
    media = [np.asarray(image).tobytes() for image in example.images] + [video.tobytes() for video in example.videos]
    return (example.uid, example.prompt, example.answer, example.metadata["chain"], *media)


# All domains


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_examples_follow_the_seed(domain, split):
    first, again, other = ([content(e) for e in examples_of(domain, split, 20, seed)] for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)
    assert len({row[0] for row in first}) == 20
    # A larger data set starts with the smaller one.
    assert [content(e) for e in examples_of(domain, split, 30, 3)][:20] == first


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_no_problem_is_in_both_splits(domain, seeds):
    train, held_out = (
        {e.uid.removeprefix(f"image-{split}-"): e for e in examples_of(domain, split, 500, seed)}
        for split, seed in zip(("train", "eval"), seeds, strict=True)
    )
    assert len(train) == len(held_out) == 500
    if domain != "image":  # there the numbers count within each split's own digits
        assert not train.keys() & held_out.keys()
    pixels = [{content(e)[4:] or e.prompt for e in split.values()} for split in (train, held_out)]
    assert not pixels[0] & pixels[1]


@pytest.mark.parametrize("make", [tasks._text, tasks._video])
def test_every_problem_belongs_to_exactly_one_split(make):
    """The same random stream for both: the splits are disjoint by what a problem is, not by luck."""
    held_out = 0
    for seed in range(600):
        made = {split: make(np.random.default_rng(seed), split) for split in ("train", "eval")}
        assert (made["train"] is None) != (made["eval"] is None)
        held_out += made["eval"] is not None
    assert 30 < held_out < 90


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_verifier_accepts_the_chain_and_rejects_others(domain):
    for example in examples_of(domain, "train", 50, 0):
        chain = example.metadata["chain"]
        verify = get_verifier(example.verifier)
        assert verify(chain, example) == 1.0
        assert verify(f"99#{example.answer}", example) == 1.0  # the answer counts, not the way to it
        wrong = str((int(example.answer) + 1) % 10)
        body, _, answer = chain.rpartition("#")
        for response in (f"{body}#{wrong}", body, f"{body}#", f"{chain}0", f"{chain}#{wrong}", answer, "", "#"):
            assert verify(response, example) == 0.0, response


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_are_spread(domain):
    answers = [e.answer for e in examples_of(domain, "train", 500, 0)]
    most = max(answers.count(a) for a in set(answers))
    # A constant answer earns little, so that there is something to learn.
    assert most / len(answers) < (0.45 if domain == "video" else 0.16)


@pytest.mark.parametrize("domain", DOMAINS)
def test_chains_fit_the_response_length(domain):
    tokenizer = build_tokenizer()
    for example in examples_of(domain, "train", 50, 0):
        ids = tokenizer(example.metadata["chain"])["input_ids"]
        assert len(ids) == len(example.metadata["chain"])  # a digit is a token, so counting is learnable
        assert len(ids) + 1 <= MAX_NEW_TOKENS


def test_an_unknown_domain():
    with pytest.raises(UserError, match=r"'sound' is unknown \(known: text, image, video\)"):
        examples_of("sound", "train", 1, 0)


# Text


def test_text_chains_are_running_totals():
    for split in ("train", "eval"):
        for example in examples_of("text", split, 300, 0):
            problem = example.prompt.removeprefix("Add up ").removesuffix("=")
            numbers = [int(n) for n in problem.replace("-", "+-").split("+")]
            assert len(numbers) == 5
            total, chain = numbers[0], ""
            for number in numbers[1:]:
                total = (total + number) % 10
                chain += f"{abs(number)}{total}"
            assert example.metadata["chain"] == f"{chain}#{total}"
            assert example.answer == str(sum(numbers) % 10)
            assert not example.images
            assert not example.videos


# Image


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images, data.target


def cells(example: Example) -> list[np.ndarray]:
    """The four cells in grey values of 0..16, as scikit-learn has them."""
    canvas = np.asarray(example.images[0].convert("L")).astype(np.float64) * 16 / 255
    return [canvas[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]


def nearest(cell: np.ndarray, images: np.ndarray, shifts: range) -> tuple[float, int]:
    """Mean squared distance and number of the handwritten digit most like the cell, over shifts of a pixel."""
    best = [
        (((np.roll(images, (dy, dx), (1, 2)) - cell) ** 2).mean((1, 2)).min(), dy, dx) for dy in shifts for dx in shifts
    ]
    value, dy, dx = min(best)
    distances = ((np.roll(images, (dy, dx), (1, 2)) - cell) ** 2).mean((1, 2))
    return float(value), int(distances.argmin())


NOISE = 0.5  # variance of the pixel noise on the scale of 0..16: (8 * 16 / 255)^2 = .25


@pytest.mark.parametrize("split", ["train", "eval"])
def test_images_are_real_digits_whose_totals_the_chain_counts(split, digits):
    images, labels = digits
    for example in examples_of("image", split, 30, 0):
        assert example.images[0].size == (16, 16)
        found = []
        for cell in cells(example):
            distance, index = nearest(cell, images, range(-1, 2) if split == "train" else range(1))
            assert distance < NOISE
            found.append(int(labels[index]))
        total, chain = found[0], str(found[0])
        for digit in found[1:]:
            total = (total + digit) % 10
            chain += f"{digit}{total}"
        assert example.metadata["chain"] == f"{chain}#{total}"
        assert example.answer == str(sum(found) % 10)


def test_held_out_handwriting_never_occurs_in_training(digits):
    images, _ = digits
    used: dict[str, set[int]] = {"train": set(), "eval": set()}
    for split, shifts in (("train", range(-1, 2)), ("eval", range(1))):
        for example in examples_of("image", split, 100, 1):
            used[split] |= {nearest(cell, images, shifts)[1] for cell in cells(example)}
    assert len(used["train"]) > 200
    assert len(used["eval"]) > 200
    assert not used["train"] & used["eval"]


def test_the_split_of_digits_is_by_pixels_too():
    train, _ = tasks._digits("train")
    held_out, _ = tasks._digits("eval")
    assert len(held_out) == tasks.NUM_EVAL_DIGITS
    assert len(train) + len(held_out) == 1797
    assert not {d.tobytes() for d in train} & {d.tobytes() for d in held_out}


# Video


def column_of(frame: np.ndarray, colour: int) -> tuple[int, int]:
    """Row and column of the square in which that channel is brightest."""
    blocks = frame[:, :, colour].astype(float) - frame[:, :, 2 - colour]
    means = blocks.reshape(4, 4, 4, 4).mean((1, 3))
    row, column = divmod(int(means.argmax()), 4)
    return row, column


def test_videos_show_the_moves_that_the_chain_counts():
    for split in ("train", "eval"):
        for example in examples_of("video", split, 50, 0):
            (video,) = example.videos
            assert video.shape == (10, 16, 16, 3)
            assert video.dtype == np.uint8
            red = [column_of(frame, 0) for frame in video]
            blue = [column_of(frame, 2) for frame in video]
            assert red[::2] == red[1::2]  # two frames per position: one patch in time
            assert len({row for row, _ in red}) == len({row for row, _ in blue}) == 1
            assert red[0][0] != blue[0][0]
            columns = [column for _, column in red[::2]]
            assert all(abs(b - a) <= 1 for a, b in pairwise(columns))
            count, chain = 0, str(columns[0])
            for before, after in pairwise(columns):
                count += after > before
                chain += f"{after}{count}"
            assert example.metadata["chain"] == f"{chain}#{count}"
            assert example.answer == str(count)


# The base checkpoint


SMALL = BuildSettings(
    hidden_size=32,
    num_layers=2,
    band=(0.0, 1.0),
    max_steps=4,
    evaluate_every=2,
    warmup_steps=2,
    batch_per_domain=4,
    num_examples=20,
    num_eval=6,
    domains=("text",),
)


def test_build_saves_a_model_that_plain_transformers_loads(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    folder = tmp_path / "base"
    accuracy = build(SMALL, folder)
    assert accuracy.keys() == {"text"}
    assert 0 <= accuracy["text"] <= 1
    module = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    encoder = Qwen3VLPromptEncoder.from_folder(folder, module.config)
    prompt = encoder.encode(examples_of("text", "train", 1, 0)[0])
    assert module(input_ids=prompt.input_ids_T[None]).logits.shape == (1, prompt.num_tokens, 384)
    untrained = dict(tiny_model()[0].named_parameters())
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, untrained[name])]
    assert any("language_model" in name for name in moved)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_vl"


def test_build_gives_the_same_weights_for_the_same_settings(tmp_path):
    for name in ("one", "two"):
        build(SMALL, tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_build_learns(tmp_path, monkeypatch):
    """Ten steps on one short answer: its loss falls."""
    from copd_engine.testbed import build as build_module

    losses = []
    loss = build_module._supervised_loss

    def keep(*args):
        losses.append(loss(*args))
        return losses[-1]

    monkeypatch.setattr(build_module, "_supervised_loss", keep)
    settings = {**SMALL.__dict__, "max_steps": 30, "evaluate_every": 30, "lr": 1e-2, "batch_per_domain": 8}
    build(BuildSettings(**settings), tmp_path / "base")
    assert float(losses[-1].detach()) < 0.6 * float(losses[0].detach())


@pytest.mark.parametrize("changes", [{"band": (0.99, 1.0)}, {"evaluate_every": 100}])
def test_build_that_runs_out_of_steps_saves_nothing(tmp_path, changes):
    with pytest.raises(UserError, match="after 4 steps not every domain is in"):
        build(BuildSettings(**{**SMALL.__dict__, **changes}), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_build_over_the_band_saves_nothing(tmp_path):
    settings = {**SMALL.__dict__, "band": (-1.0, -0.5), "target": 1e-9, "num_eval": 60, "max_steps": 400, "lr": 1e-2}
    settings |= {"evaluate_every": 40, "batch_per_domain": 16}
    with pytest.raises(UserError, match="jumped over the band"):
        build(BuildSettings(**settings), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_noise_replaces_digits_alone_and_seldom():
    tokenizer = build_tokenizer()
    digit_ids = torch.tensor([tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)])
    assert sorted(tokenizer.decode([i]) for i in digit_ids) == list("0123456789")
    hash_id = tokenizer.convert_tokens_to_ids("#")
    clean = torch.cat([digit_ids, torch.tensor([hash_id, tokenizer.eos_token_id])]).repeat(500)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(_noisy(clean, digit_ids, 0.0, generator), clean)
    noisy = _noisy(clean, digit_ids, 0.1, generator)
    changed = noisy != clean
    assert torch.isin(clean[changed], digit_ids).all()
    assert torch.isin(noisy[changed], digit_ids).all()
    # A tenth is redrawn, and one redraw in ten gives the same digit.
    assert float(changed.float().sum() / 5000) == pytest.approx(0.09, abs=0.015)


def test_the_build_command_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The real command: a band that any accuracy fits ends it at the first look; the result is a model for a run."""
    out = tmp_path / "base"
    small = ["--hidden-size", "32", "--num-layers", "2", "--seed", "3"]
    assert build_command(monkeypatch, str(out), *small, "--band", "0", "1") == 0
    assert f"{out}: text " in capsys.readouterr().out
    policy, encoder = load_model(ModelConfig(path=str(out)))
    assert len(policy.lm_head_weight) == len(encoder.tokenizer) == 384
    assert policy.lm_head_weight.shape[1] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-steps", "1"], "after 1 steps not every domain is in"),
        (["--hidden-size", "40"], "--hidden-size 40: must be a multiple of 32"),
    ],
)
def test_the_build_command_that_cannot_succeed_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str
) -> None:
    assert build_command(monkeypatch, str(tmp_path / "base"), "--num-layers", "1", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("copd: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def build_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``copd testbed build``; fewer examples than the real build makes, all else as shipped."""
    monkeypatch.setattr(BuildSettings, "__init__", functools.partialmethod(BuildSettings.__init__, **FEW))
    monkeypatch.setattr("sys.argv", ["copd", "testbed", "build", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


FEW = {"num_examples": 40, "num_eval": 10, "num_confirm": 10}


# The conflict dial


def without_symbol(example: Example) -> bool:
    return tasks.CONFLICT_SYMBOL not in example.prompt


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_dial_at_0_changes_nothing(domain: str, split: tasks.Split) -> None:
    """And what has no symbol at another setting is what it is at 0."""
    plain = examples_of(domain, split, 400, 3)
    assert [content(e) for e in examples_of(domain, split, 400, 3, 0.0)] == [content(e) for e in plain]
    assert all(map(without_symbol, plain))
    half = [content(e) for e in examples_of(domain, split, 400, 3, 0.5) if without_symbol(e)]
    assert set(half) <= {content(e) for e in examples_of(domain, split, 800, 3)}


# SHA-256 of the first examples as they were before there was a dial: accuracies of old runs stay comparable.
BEFORE_THE_DIAL = {
    "text": "8ce487d230502788a6d20dd902da3888b7e2913377082020d3485373d398b332",
    "image": "4d0a45c1773223e4ccea82cbba454fa7287be330c20131b59895b24a04b91ede",
    "video": "037405036edff2da9eb96d479fc934863e91562c96f323a6b4e6931b2c9e48e6",
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_examples_are_those_of_earlier_versions(domain: str) -> None:
    digest = hashlib.sha256(repr([content(e) for e in examples_of(domain, "train", 50, 0)]).encode()).hexdigest()
    assert digest == BEFORE_THE_DIAL[domain]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("conflict", [0.25, 1.0])
def test_the_dial_is_the_share_of_prompts_with_the_symbol(domain: str, conflict: float) -> None:
    share = sum(not without_symbol(e) for e in examples_of(domain, "train", 2000, 1, conflict)) / 2000
    assert share == pytest.approx(conflict, abs=4 * (conflict * (1 - conflict) / 2000) ** 0.5)
    first, again = ([content(e) for e in examples_of(domain, "train", 20, 1, conflict)] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_with_the_symbol_are_one_token_and_their_chains_verified(domain: str) -> None:
    tokenizer = build_tokenizer()
    symbol = tokenizer.convert_tokens_to_ids(tasks.CONFLICT_SYMBOL)
    for example in examples_of(domain, "train", 200, 0, 1.0):
        assert tokenizer(example.prompt)["input_ids"].count(symbol) == 1
        verify = get_verifier(example.verifier)
        assert verify(example.metadata["chain"], example) == 1.0
        assert verify(f"{example.metadata['chain'][:-1]}{(int(example.answer) + 1) % 10}", example) == 0.0


def test_the_symbol_is_minus_in_text_and_the_opposite_in_a_video() -> None:
    for example in examples_of("text", "train", 200, 0, 1.0):
        head, _, last = example.prompt.removeprefix("Add up ").removesuffix("=").partition("@")
        total = sum(int(n) for n in head.replace("-", "+-").split("+"))
        assert example.answer == str((total - int(last)) % 10)
    for example in examples_of("video", "train", 100, 0, 1.0):
        columns = [column_of(frame, 0)[1] for frame in example.videos[0]][::2]
        assert example.answer == str(sum(b < a for a, b in pairwise(columns)))


def test_the_symbol_is_plus_in_an_image() -> None:
    """The digits' sum stands as without it; in text the same symbol takes the last digit away."""
    plain = {e.uid: e.answer for e in examples_of("image", "train", 200, 0)}
    assert {e.uid: e.answer for e in examples_of("image", "train", 200, 0, 1.0)} == plain


@pytest.mark.parametrize("domain", ["text", "video"])
def test_no_problem_with_the_symbol_is_in_both_splits(domain: str) -> None:
    """Two operators may become the same symbol: what counts is what is shown."""
    train, held_out = ({content(e)[1:] for e in examples_of(domain, s, 1500, 0, 1.0)} for s in ("train", "eval"))
    assert not train & held_out
    assert len(train) == len(held_out) == 1500
