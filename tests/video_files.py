"""Video files for tests, written by PyAV: frame i is grey of brightness ``4 * i``, so a decoded frame names itself."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4", ".mkv": "libx264", ".gif": "gif"}


def grey(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value % 256, np.uint8)


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 60,
    rate: int = 30,
    times_ms: Sequence[int] | None = None,
    codec: str | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    """Frames at ``rate`` a second, or shown at ``times_ms``; a key frame at least every ``gop``."""
    pictures = [grey(4 * i) for i in range(frames)] if isinstance(frames, int) else frames
    pixels = "rgb8" if path.suffix == ".gif" else "yuv420p"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec or CODECS[path.suffix], rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2] if len(pictures) else (48, 64)
        stream.pix_fmt, stream.gop_size = pixels, gop
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are, by their brightness."""
    return [round(float(frame.mean()) / 4) for frame in frames]
