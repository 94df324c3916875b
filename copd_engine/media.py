"""Images and videos from what an example holds to pixels.

Nothing is decoded before it is asked for, and of a video only the frames that are used: the packets say when every
frame is shown, so frames are chosen before the first one is decoded.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image, ImageOps

from copd_engine.config import MediaConfig
from copd_engine.types import Clip, UserError
from copd_engine.video_file import choose_frames, decode_frames, grid_points, read_index

if TYPE_CHECKING:
    from copd_engine.types import ImageInput, VideoInput

#: (one frame ``[height, width, 3]``, number of frames of its video) -> the frame in the size that the model takes
FrameResize = Callable[[np.ndarray, int], np.ndarray]

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Video:
    """``frames`` uint8 ``[frames, height, width, 3]``; ``times`` of the frames in seconds from the video's first frame;
    ``fps``: frames per second of the grid they were chosen on."""

    frames: np.ndarray
    times: tuple[float, ...]
    fps: float


def open_image(image: ImageInput, where: str) -> Image.Image:
    """RGB, every pixel decoded: turned upright by its EXIF orientation, transparency over white, the first frame of an
    animation. ``where`` opens the error line, e.g. ``data.jsonl:7: images``; UserError for what cannot be read.
    """
    if isinstance(image, Path) and not image.is_file():
        raise UserError(f"{where}: {image} does not exist")
    try:
        if isinstance(image, Image.Image):
            return _rgb(image)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _rgb(opened)
    except _IMAGE_ERRORS as error:
        raise UserError(f"{where}: {_name(image)} cannot be read as an image: {_text(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, (255, 255, 255))
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def check_image(image: ImageInput, where: str) -> None:
    """UserError unless the file exists; nothing is decoded."""
    if isinstance(image, Path) and not image.is_file():
        raise UserError(f"{where}: {image} does not exist")


def check_video(video: VideoInput, where: str) -> None:
    """UserError unless the file, or a folder with frames, exists; nothing is decoded."""
    if isinstance(video, Clip):
        check_image(video.path, where)
    elif isinstance(video, Path):
        if not video.exists():
            raise UserError(f"{where}: {video} does not exist")
        if video.is_dir() and not any(f.suffix.lower() in FRAME_SUFFIXES for f in video.iterdir()):
            raise UserError(f"{where}: folder {video} holds no frames ({', '.join(FRAME_SUFFIXES)})")
    elif isinstance(video, tuple):
        for frame in video:
            check_image(frame, where)


def open_video(
    video: VideoInput, fps: float, media: MediaConfig, where: str, resize: FrameResize | None = None
) -> Video:
    """The frames that the model sees.

    A video file is sampled every ``1 / media.video_fps`` seconds (the frame nearest in time; none twice), at least its
    first and last frame; of a :class:`Clip` the same from its start, which is then time 0, to its end. Frames without
    times of their own (an array, a ``.npy`` file, a folder or a tuple of images) stand at ``fps`` and all count. More
    than ``media.video_max_frames`` are thinned evenly, first and last kept.

    ``resize`` is applied to each frame as it is decoded, so that an hour of video is never held in full size.
    UserError opened by ``where`` for files that are missing, damaged, cut off or without a frame.
    """
    if isinstance(video, Clip):
        return _open_file(video.path, media, where, resize, (video.start, video.end))
    if isinstance(video, Path):
        if not video.exists():
            raise UserError(f"{where}: {video} does not exist")
        if not video.is_dir() and video.suffix.lower() != ".npy":
            return _open_file(video, media, where, resize)
    frames = _frames(video, where)
    chosen = _thin(range(len(frames)), media.video_max_frames)
    decoded = [frames[index] for index in chosen]
    if len({frame.shape for frame in decoded}) > 1:
        raise UserError(f"{where}: the frames of {_name(video)} differ in size")
    times = tuple(index / fps for index in chosen)
    return _video(decoded, times, fps if len(chosen) == len(frames) else None, resize)


def _video(
    frames: Sequence[np.ndarray], times: Sequence[float], fps: float | None, resize: FrameResize | None
) -> Video:
    if resize is not None:
        frames = [resize(frame, len(frames)) for frame in frames]
    return Video(np.stack(frames), tuple(times), fps or _mean_fps(times))


def _mean_fps(times: Sequence[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0


def _thin(items: Sequence[Any], limit: int) -> list[Any]:
    if len(items) <= limit:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, limit).round().astype(int)]


# Frames that were given as such


class _Images(Sequence[np.ndarray]):
    """Images as frames, decoded when asked for."""

    def __init__(self, images: Sequence[ImageInput], where: str) -> None:
        self.images, self.where = images, where

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(open_image(self.images[index], self.where))


def _frames(video: np.ndarray | Path | tuple[ImageInput, ...], where: str) -> Sequence[np.ndarray]:
    """uint8 ``[height, width, 3]`` each; UserError where there is none."""
    frames: Any
    if isinstance(video, tuple):
        frames = _Images(video, where)
    elif isinstance(video, np.ndarray):
        frames = _array(video, f"{where}: the array")
    elif video.is_dir():
        files = sorted((f for f in video.iterdir() if f.suffix.lower() in FRAME_SUFFIXES), key=_natural)
        if not files:
            raise UserError(f"{where}: folder {video} holds no frames ({', '.join(FRAME_SUFFIXES)})")
        frames = _Images(files, where)
    else:
        try:
            array = np.load(video, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise UserError(f"{where}: {video} cannot be read as a .npy array: {_text(error)}") from None
        frames = _array(array, f"{where}: {video}")
    if not len(frames):
        raise UserError(f"{where}: {_name(video)} holds no frame")
    return frames


def _array(video: np.ndarray, name: str) -> np.ndarray:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape[1:]:
        raise UserError(f"{name} is {video.dtype} {list(video.shape)}, it must be uint8 [frames, height, width, 3]")
    return video


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key: frame 10 follows frame 9, with or without leading zeros."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


# Video files


def _open_file(
    path: Path, media: MediaConfig, where: str, resize: FrameResize | None, part: tuple[float, float] | None = None
) -> Video:
    try:
        index = read_index(path, where)
        if part is not None:
            index = index.between(*part, f"{where}: {path}")
        grid = choose_frames([index.seconds(pts) for pts in index.pts], index.length, media.video_fps)
        chosen = _thin(grid, media.video_max_frames)
        wanted = [index.pts[i] for i in chosen]
        frames = [
            frame if resize is None else resize(frame, len(wanted))
            for frame in decode_frames(path, index, wanted, where)
        ]
    except av.EOFError:
        raise UserError(f"{where}: {path} holds no frame, or only the beginning of a file") from None
    except av.FFmpegError as error:
        raise UserError(f"{where}: {path} cannot be read as a video: {error.strerror}") from None
    times = [index.seconds(pts) for pts in wanted]
    on_grid = len(chosen) == len(grid) and len(chosen) == grid_points(index.length, media.video_fps)
    return _video(frames, times, media.video_fps if on_grid else None, None)


def _name(media: Any) -> str:
    if isinstance(media, bytes):
        return f"a file of {len(media)} bytes"
    return str(media) if isinstance(media, Path) else {tuple: "the tuple"}.get(type(media), "the array")


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
