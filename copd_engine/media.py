"""Images and videos from what an example holds to pixels.

Nothing is decoded before it is asked for, and of a video only the frames that are used: the packets say when every
frame is shown, so frames are chosen before the first one is decoded.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image, ImageOps

from copd_engine.config import MediaConfig
from copd_engine.types import UserError

if TYPE_CHECKING:
    from copd_engine.types import ImageInput, VideoInput

#: (one frame ``[height, width, 3]``, number of frames of its video) -> the frame in the size that the model takes
FrameResize = Callable[[np.ndarray, int], np.ndarray]

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: Frames that are decoded and thrown away rather than jumped over: a jump costs a flush and the way from a key frame.
MIN_JUMP_FRAMES = 32
#: A video that ends this much before its header says is cut off (seconds, and share of its length).
MISSING_SECONDS, MISSING_SHARE = 0.25, 0.02
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
    if isinstance(video, Path):
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
    first and last frame. Frames without times of their own (an array, a ``.npy`` file, a folder or a tuple of images)
    stand at ``fps`` and all count. More than ``media.video_max_frames`` are thinned evenly, first and last kept.

    ``resize`` is applied to each frame as it is decoded, so that an hour of video is never held in full size.
    UserError opened by ``where`` for files that are missing, damaged, cut off or without a frame.
    """
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


def _frames(video: VideoInput, where: str) -> Sequence[np.ndarray]:
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


@dataclass(frozen=True)
class _Index:
    """When each frame is shown: ``pts`` sorted, in units of ``time_base`` seconds; ``keys`` those of key frames;
    ``length`` from the first frame to the end of the last, in seconds. Old containers (AVI) do not say when frames of
    a reordering codec are shown: then ``counted``, and ``pts`` is the frame's number in units of the frame rate."""

    pts: list[int]
    keys: list[int]
    time_base: float
    length: float
    counted: bool = False

    def seconds(self, pts: int) -> float:
        return (pts - self.pts[0]) * self.time_base


def _open_file(path: Path, media: MediaConfig, where: str, resize: FrameResize | None) -> Video:
    try:
        index = _index(path, where)
        grid = _grid([index.seconds(pts) for pts in index.pts], index.length, media.video_fps)
        chosen = _thin(grid, media.video_max_frames)
        wanted = [index.pts[i] for i in chosen]
        frames = [
            frame if resize is None else resize(frame, len(wanted)) for frame in _decode(path, index, wanted, where)
        ]
    except av.EOFError:
        raise UserError(f"{where}: {path} holds no frame, or only the beginning of a file") from None
    except av.FFmpegError as error:
        raise UserError(f"{where}: {path} cannot be read as a video: {error.strerror}") from None
    times = [index.seconds(pts) for pts in wanted]
    on_grid = len(chosen) == len(grid) and len(chosen) == _grid_points(index.length, media.video_fps)
    return _video(frames, times, media.video_fps if on_grid else None, None)


def _grid_points(length: float, fps: float) -> int:
    """Points 0, 1/fps, 2/fps ... that lie before ``length``, rounding apart."""
    return max(1, math.ceil(length * fps - 1e-3))


def _grid(times: Sequence[float], length: float, fps: float) -> list[int]:
    """Indices of the frames nearest to every point of the grid, none twice; first and last where that leaves one."""
    points = np.arange(_grid_points(length, fps)) / fps
    after = np.searchsorted(times, points).clip(1, max(1, len(times) - 1))
    if len(times) == 1:
        return [0]
    shown = np.asarray(times)
    nearest = np.where(points - shown[after - 1] <= shown[after] - points, after - 1, after)
    chosen = np.unique(nearest).tolist()
    return chosen if len(chosen) > 1 else [0, len(times) - 1]


def _index(path: Path, where: str) -> _Index:
    """Read the packets, decode nothing. UserError for a file that holds no video, no frame or only its beginning."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{where}: {path} holds no video")
        stream = container.streams.video[0]
        base, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
        shown, keys, end, num_packets, counted = [], [], 0, 0, container.format.name == "avi"
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            num_packets += 1
            counted = counted or packet.pts is None
            if packet.is_discard or packet.pts is None:
                continue
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
        num_promised, promised = stream.frames, _promised_seconds(stream)
    if counted:
        shown, keys, base, end = list(range(num_packets)), [], 1 / rate if rate else 0, num_packets
    if not shown or not base:
        raise UserError(f"{where}: {path} holds no frame")
    shown = sorted(set(shown))
    # The last frame may stay as long as any other without the file saying so: slides, recorded screens.
    longest = max((b - a for a, b in itertools.pairwise(shown)), default=0) * base
    if num_packets < num_promised - 1:
        raise UserError(f"{where}: {path} is cut off: it holds {num_packets} of {num_promised} frames")
    if promised - end * base > max(MISSING_SECONDS, MISSING_SHARE * promised, longest):
        raise UserError(f"{where}: {path} is cut off: it holds {end * base:.1f} of {promised:.1f} s")
    if path.suffix.lower() == ".gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise UserError(f"{where}: {path} is cut off: a GIF ends with ';'")
    return _Index(shown, sorted(keys), base, (end - shown[0]) * base, counted)


def _promised_seconds(stream: Any) -> float:
    """Length by the header, 0 where it says none. Matroska writes it as a tag ``00:00:01.5``."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):([0-9.]+)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def _decode(path: Path, index: _Index, wanted: Sequence[int], where: str) -> Iterator[np.ndarray]:
    """The frames shown at ``wanted`` (sorted). Jumps to a key frame where that skips enough frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = enumerate(container.decode(stream))
        at = index.pts[0] - 1  # everything up to here is decoded
        for pts in wanted:
            key = index.keys[bisect_right(index.keys, pts) - 1] if index.keys and index.keys[0] <= pts else None
            if key is not None and bisect_right(index.pts, key) - bisect_right(index.pts, at) > MIN_JUMP_FRAMES:
                container.seek(key, stream=stream)
                frames = enumerate(container.decode(stream))
            for number, frame in frames:
                time = number if index.counted else frame.pts
                if time is None or time < pts:
                    continue
                if frame.is_corrupt or time > pts:
                    raise UserError(
                        f"{where}: {path} is damaged: the frame at {index.seconds(pts):.2f} s cannot be decoded"
                    )
                at = pts
                yield _upright(frame)
                break
            else:
                raise UserError(f"{where}: {path} is cut off: no frame at {index.seconds(pts):.2f} s")


def _upright(frame: Any) -> np.ndarray:
    """RGB, turned as the display matrix says: telephones film upright videos lying down."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _name(media: Any) -> str:
    if isinstance(media, bytes):
        return f"a file of {len(media)} bytes"
    return str(media) if isinstance(media, Path) else {tuple: "the tuple"}.get(type(media), "the array")


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
