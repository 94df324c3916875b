"""Examples of a branch, and the shuffled stream that hands them out.

A JSONL row::

    {"prompt": "How many cats?", "answer": "2", "images": ["cats.png"], "verifier": "exact", "uid": "cats-1"}

``prompt`` and ``answer`` (text or a number) are required. ``images`` and ``videos`` are paths relative to the data
file. ``verifier``, ``uid``, ``fps`` and ``metadata`` (a mapping) are optional; other fields are errors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageSequence

from copd_engine.config import DataConfig
from copd_engine.types import Example, UserError, suggest
from copd_engine.verifiers import get_verifier

Split = Literal["train", "eval"]
logger = logging.getLogger(__name__)

FIELDS = ("prompt", "answer", "images", "videos", "verifier", "uid", "fps", "metadata")
DEFAULT_VERIFIER = "exact"
QUESTION = "{question}"
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: reasoning-gym draws question i from seed + i: with neighbouring seeds the splits would be shifted copies.
EVAL_SEED_OFFSET = 2**30
#: Held-out candidates drawn per wanted question before a task counts as too small.
EVAL_OVERSAMPLING = 4


def load_examples(config: DataConfig, split: Split, where: str = "branches.0.data") -> Sequence[Example]:
    """All examples of a split; train and eval never share a question.

    - ``testbed``: ``size`` or ``eval_size`` generated examples.
    - ``jsonl``: every row of ``path`` (``size`` does not apply). Eval is every row of ``eval_path`` if given, else the
      last ``eval_size`` rows of ``path`` are held out; half of the rows where the file has no more than ``eval_size``.
    - ``reasoning_gym``: ``size`` generated questions, repeats included; eval up to ``eval_size`` different questions
      drawn from seeds of their own that are not among the train questions.

    ``config.verifier`` overrides the rows' verifier. ``config.instruction`` is a template if it contains
    ``{question}``, else it follows the prompt on a line of its own. Raises :class:`UserError` that names ``where``
    (the section of the config) or file, line and field.
    """
    if config.verifier is not None:
        try:
            get_verifier(config.verifier)
        except UserError as error:
            raise UserError(f"{where}.verifier: {error}") from None
    if config.source == "testbed":
        from copd_engine.testbed.tasks import testbed_examples

        size = config.size if split == "train" else config.eval_size
        try:
            examples = testbed_examples(str(config.domain), split, size, config.seed)
        except UserError as error:
            raise UserError(f"{where}.domain: {error}") from None
        if config.verifier is not None:
            examples = [dataclasses.replace(example, verifier=config.verifier) for example in examples]
    elif config.source == "jsonl":
        examples = _load_jsonl(config, split, where)
    else:
        examples = _load_reasoning_gym(config, split, where)
    if not config.instruction:
        return examples
    return [dataclasses.replace(e, prompt=with_instruction(e.prompt, config.instruction)) for e in examples]


def with_instruction(prompt: str, instruction: str) -> str:
    """``instruction`` filled in where it is a template, else after the prompt."""
    if QUESTION in instruction:
        return instruction.replace(QUESTION, prompt)
    return f"{prompt}\n{instruction}" if instruction else prompt


class DataStream:
    """Endless shuffled examples: every epoch is a fresh permutation drawn from (seed, epoch).

    The state is two integers, so that a resumed stream continues with exactly the next example.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        if not examples:
            raise UserError("a data stream needs at least one example")
        self.examples = examples
        self.seed = seed
        self._go_to(epoch=0, cursor=0)

    def take(self, n: int) -> list[Example]:
        """The next ``n`` examples; one example may come twice where the epoch ends within them."""
        if n < 0:
            raise ValueError(f"n = {n}: must be at least 0")
        taken: list[Example] = []
        while len(taken) < n:
            if self.cursor == len(self.examples):
                self._go_to(self.epoch + 1, cursor=0)
            indices = self._order[self.cursor : self.cursor + n - len(taken)]
            taken += [self.examples[index] for index in indices]
            self.cursor += len(indices)
        return taken

    def state_dict(self) -> dict[str, int]:
        """``epoch`` and ``cursor``, the number of examples handed out in this epoch."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from :meth:`state_dict`. Raises UserError when the state cannot belong to this data."""
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= len(self.examples):
            raise UserError(
                f"data stream state (epoch {epoch}, cursor {cursor}) does not fit {len(self.examples)} examples: "
                "the data set has changed since the checkpoint"
            )
        self._go_to(epoch, cursor)

    def _go_to(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self._order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples)).tolist()


# JSONL


def _load_jsonl(config: DataConfig, split: Split, where: str) -> list[Example]:
    path = Path(str(config.path))
    lines = _lines(path, f"{where}.path")
    if config.eval_path is not None:
        eval_path = Path(config.eval_path)
        if eval_path.exists() and path.samefile(eval_path):
            raise UserError(
                f"{where}.eval_path: {eval_path} is the training file; without eval_path its last rows are held out"
            )
        if split == "eval":
            path, lines = eval_path, _lines(eval_path, f"{where}.eval_path")
    else:
        if len(lines) < 2:
            raise UserError(
                f"{where}.path: {path} has 1 row; holding out eval rows needs at least 2, or give eval_path"
            )
        held_out = config.eval_size
        if held_out >= len(lines):
            held_out = len(lines) // 2
            logger.warning(
                "%s has %d rows, eval_size is %d: %d rows held out", path, len(lines), config.eval_size, held_out
            )
        lines = lines[-held_out:] if split == "eval" else lines[:-held_out]
    examples: list[Example] = []
    line_of_uid: dict[str, int] = {}
    for number, text in lines:
        example = _row(path, number, text, config.verifier)
        if example.uid in line_of_uid:
            raise UserError(f"{path}:{number}: uid {example.uid!r} is already that of line {line_of_uid[example.uid]}")
        line_of_uid[example.uid] = number
        examples.append(example)
    return examples


def _lines(path: Path, where: str) -> list[tuple[int, str]]:
    """(line number from 1, text) of the rows that are not blank."""
    if not path.is_file():
        raise UserError(f"{where}: {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path} is not UTF-8 text (byte {error.start})") from None
    # Only \n ends a row: JSON strings may hold the other line ends that str.splitlines knows.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{where}: {path} is empty")
    return lines


def _row(path: Path, number: int, text: str, verifier: str | None) -> Example:
    at = f"{path}:{number}"
    try:
        row = json.loads(text, parse_constant=_reject_constant)
    except ValueError as error:
        raise UserError(f"{at}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{at}: a row must be a JSON object, it is {type(row).__name__}")
    for key in row:
        if key not in FIELDS:
            raise UserError(f"{at}: unknown field {key!r}{suggest(key, FIELDS)}; your own values go under 'metadata'")
    for key in ("prompt", "answer"):
        if row.get(key) is None:
            raise UserError(f"{at}: field {key!r} is missing")

    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{at}: prompt = {prompt!r}: must be text that is not empty")
    fps = row.get("fps", 2.0)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise UserError(f"{at}: fps = {fps!r}: must be a number above 0")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{at}: metadata = {metadata!r}: must be a mapping")
    uid = row.get("uid", f"{path.name}:{number}")
    if isinstance(uid, bool) or not isinstance(uid, str | int) or uid == "":
        raise UserError(f"{at}: uid = {uid!r}: must be text or a whole number")
    images = tuple(_image(path.parent / name, f"{at}: images") for name in _paths(row, "images", at))
    videos = tuple(_video(path.parent / name, f"{at}: videos") for name in _paths(row, "videos", at))
    for marker, media, key in (("<image>", images, "images"), ("<video>", videos, "videos")):
        num_markers = prompt.count(marker)
        if num_markers and num_markers != len(media):
            raise UserError(f"{at}: the prompt has {num_markers} {marker} markers, {key!r} has {len(media)} files")
    return Example(
        uid=str(uid),
        prompt=prompt,
        answer=_answer(row["answer"], at),
        verifier=verifier or _row_verifier(row.get("verifier", DEFAULT_VERIFIER), metadata, at),
        images=images,
        videos=videos,
        fps=float(fps),
        metadata=metadata,
    )


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _answer(answer: Any, at: str) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise UserError(f"{at}: answer = {answer!r}: must be text or a number")
    if isinstance(answer, float) and not math.isfinite(answer):  # 1e999
        raise UserError(f"{at}: answer = {answer!r}: must be a finite number")
    # Verifiers compare with stripped text, so an answer with outer blanks could never be right.
    text = str(answer).strip()
    if not text:
        raise UserError(f"{at}: answer = {answer!r}: must not be blank")
    return text


def _row_verifier(name: Any, metadata: dict[str, Any], at: str) -> str:
    if not isinstance(name, str):
        raise UserError(f"{at}: verifier = {name!r}: must be a name")
    try:
        get_verifier(name)
    except UserError as error:
        raise UserError(f"{at}: verifier: {error}") from None
    if name == "reasoning_gym" and "reasoning_gym" not in metadata:
        raise UserError(f"{at}: verifier 'reasoning_gym' needs metadata.reasoning_gym with 'task' and 'entry'")
    return name


def _paths(row: dict[str, Any], key: str, at: str) -> list[str]:
    names = row.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{at}: {key} = {names!r}: must be a list of paths")
    return names


def _image(path: Path, at: str) -> Image.Image:
    """RGB; every pixel is decoded here, so that a damaged file is found at load and not in step 500."""
    if not path.is_file():
        raise UserError(f"{at}: {path} does not exist")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{at}: {path} cannot be read as an image: {error}") from None


def _video(path: Path, at: str) -> np.ndarray:
    """uint8 ``[frames, height, width, 3]`` of a folder of frames, an animated GIF or a ``.npy`` file."""
    if not path.exists():
        raise UserError(f"{at}: {path} does not exist")
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in FRAME_SUFFIXES), key=_natural)
        frames = [np.asarray(_image(file, at)) for file in files]
        if not frames:
            raise UserError(f"{at}: folder {path} holds no frames ({', '.join(FRAME_SUFFIXES)})")
        if len({frame.shape for frame in frames}) > 1:
            raise UserError(f"{at}: the frames in {path} differ in size")
        return np.stack(frames)
    if path.suffix.lower() == ".gif":
        try:
            with Image.open(path) as image:
                return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{at}: {path} cannot be read as a GIF: {error}") from None
    if path.suffix.lower() == ".npy":
        try:
            video: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{at}: {path} cannot be read as a .npy array: {error}") from None
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
            raise UserError(
                f"{at}: {path} is {video.dtype} {list(video.shape)}, it must be uint8 [frames, height, width, 3]"
            )
        return video
    raise UserError(
        f"{at}: {path} has no readable video format: a folder of frames, an animated .gif or a uint8 .npy array "
        "are read so far"
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key: frame 10 follows frame 9, with or without leading zeros."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


# reasoning-gym


def _load_reasoning_gym(config: DataConfig, split: Split, where: str) -> list[Example]:
    task = str(config.task)
    train = _reasoning_gym_entries(config, config.size, config.seed, where)
    if split == "train":
        return [_reasoning_gym_example(config, entry, f"{task}-{config.seed}-{i}") for i, entry in enumerate(train)]
    seen = {entry["question"] for entry in train}
    num_candidates = config.eval_size * EVAL_OVERSAMPLING
    examples: list[Example] = []
    for entry in _reasoning_gym_entries(config, num_candidates, config.seed + EVAL_SEED_OFFSET, where):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            examples.append(_reasoning_gym_example(config, entry, f"{task}-{config.seed}-eval-{len(examples)}"))
            if len(examples) == config.eval_size:
                return examples
    if not examples:
        raise UserError(
            f"{where}: none of {num_candidates} held-out questions of task {task!r} is missing from the "
            f"{config.size} train questions: lower 'size' or widen 'task_config'"
        )
    logger.warning(
        "%s: task %s gave %d held-out questions, eval_size is %d", where, task, len(examples), config.eval_size
    )
    return examples


def _reasoning_gym_entries(config: DataConfig, size: int, seed: int, where: str) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"{where}.source: 'reasoning_gym' needs the package reasoning-gym: install the extra 'llm'")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = str(config.task)
    if task not in DATASETS:
        raise UserError(f"{where}.task: reasoning-gym has no task {task!r}{suggest(task, DATASETS)}")
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"size", "seed"}
    for key in config.task_config:
        if key not in known:
            raise UserError(f"{where}.task_config: task {task!r} has no option {key!r}{suggest(key, known)}")
    try:
        json.dumps(config.task_config)  # the scorer is rebuilt from it
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **config.task_config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{where}.task_config: task {task!r} refuses it: {error}") from None
    return (dataset[index] for index in range(size))


def _reasoning_gym_example(config: DataConfig, entry: dict[str, Any], uid: str) -> Example:
    return Example(
        uid=uid,
        prompt=entry["question"],
        answer=str(entry["answer"]),
        verifier=config.verifier or "reasoning_gym",
        metadata={
            "reasoning_gym": {"task": str(config.task), "task_config": config.task_config, "entry": entry},
        },
    )
