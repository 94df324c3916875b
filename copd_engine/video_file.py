"""Which frames a video file holds, which of them to take, and those decoded: what is not taken is jumped over."""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from copd_engine.types import UserError

#: Frames that are decoded and thrown away rather than jumped over: a jump costs a flush and the way from a key frame.
MIN_JUMP_FRAMES = 32
#: A video that ends this much before its header says is cut off (seconds, and share of its length).
MISSING_SECONDS, MISSING_SHARE = 0.25, 0.02


@dataclass(frozen=True)
class VideoIndex:
    """When each frame is shown: ``pts`` sorted, in units of ``time_base`` seconds; ``keys`` those of key frames;
    ``length`` from the first frame to the end of the last, in seconds. Old containers (AVI) do not say when frames of
    a reordering codec are shown: then ``counted``, and ``pts`` is the frame's number in units of the frame rate.
    ``file_pts``: ``pts`` of the whole file, of which this may be a part."""

    pts: list[int]
    keys: list[int]
    time_base: float
    length: float
    file_pts: list[int]
    counted: bool = False

    def seconds(self, pts: int) -> float:
        return (pts - self.pts[0]) * self.time_base

    def between(self, start: float, end: float, where: str) -> VideoIndex:
        """The frames shown from ``start`` to ``end`` seconds, the one on show at ``start`` first. UserError, opened by
        ``where``, for a part that is empty or begins after the video's end."""
        if not start < end or start >= self.length:
            raise UserError(f"{where}: no part from {start:g} to {end:g} s in a video of {self.length:.1f} s")
        times = [self.seconds(pts) for pts in self.pts]
        first = max(0, bisect_right(times, start) - 1)
        pts = self.pts[first : max(first + 1, bisect_right(times, end))]
        return replace(self, pts=pts, length=min(end, self.length) - times[first])


def grid_points(length: float, fps: float) -> int:
    """Points 0, 1/fps, 2/fps ... that lie before ``length``, rounding apart."""
    return max(1, math.ceil(length * fps - 1e-3))


def choose_frames(times: Sequence[float], length: float, fps: float) -> list[int]:
    """Indices of the frames nearest to every point of the grid, none twice; first and last where that leaves one."""
    points = np.arange(grid_points(length, fps)) / fps
    after = np.searchsorted(times, points).clip(1, max(1, len(times) - 1))
    if len(times) == 1:
        return [0]
    shown = np.asarray(times)
    nearest = np.where(points - shown[after - 1] <= shown[after] - points, after - 1, after)
    chosen = np.unique(nearest).tolist()
    return chosen if len(chosen) > 1 else [0, len(times) - 1]


def read_index(path: Path, where: str) -> VideoIndex:
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
    return VideoIndex(shown, sorted(keys), base, (end - shown[0]) * base, shown, counted)


def _promised_seconds(stream: Any) -> float:
    """Length by the header, 0 where it says none. Matroska writes it as a tag ``00:00:01.5``."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):([0-9.]+)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def decode_frames(path: Path, index: VideoIndex, wanted: Sequence[int], where: str) -> Iterator[np.ndarray]:
    """The frames shown at ``wanted`` (sorted). Jumps to a key frame where that skips enough frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = enumerate(container.decode(stream))
        at = index.file_pts[0] - 1  # everything up to here is decoded
        for pts in wanted:
            key = index.keys[bisect_right(index.keys, pts) - 1] if index.keys and index.keys[0] <= pts else None
            skipped = 0 if key is None else bisect_right(index.file_pts, key) - bisect_right(index.file_pts, at)
            if key is not None and skipped > MIN_JUMP_FRAMES:
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
