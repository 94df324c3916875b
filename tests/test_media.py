"""Images and videos to pixels: orientation and transparency, the frames that are chosen, their times, damaged files."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_engine import video_file
from copd_engine.config import MediaConfig
from copd_engine.media import open_image, open_video
from copd_engine.types import Clip, UserError
from tests.video_files import grey, numbers, write_video

MEDIA = MediaConfig()
AT = "d.jsonl:7: videos"


def noise(height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# Images


def test_an_image_from_a_path_from_bytes_and_as_it_is(tmp_path: Path) -> None:
    image = Image.fromarray(noise())
    image.save(tmp_path / "a.png")
    for source in (image, tmp_path / "a.png", encoded(image)):
        opened = open_image(source, AT)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), noise())


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 204 * 257, np.uint16))
    else:
        image = Image.new("RGB", (4, 4), (204, 204, 204)).convert(mode)
    assert image.mode == mode
    opened = open_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), AT)
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (204, 204, 204)


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    opened = open_image(encoded(image), AT)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    half = open_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), AT)
    assert half.getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    assert open_image(encoded(palette, transparency=1), AT).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(noise())
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    opened = open_image(encoded(image, exif=exif), AT)
    np.testing.assert_array_equal(np.asarray(opened), np.rot90(noise(), -1))


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    opened = open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), AT)
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encoded(Image.fromarray(noise()), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"^d\.jsonl:7: videos: .*cut\.jpg cannot be read as an image: .*truncated"):
        open_image(tmp_path / "cut.jpg", AT)
    with pytest.raises(UserError, match=r"text\.png cannot be read as an image"):
        open_image(tmp_path / "text.png", AT)
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png", AT)
    with pytest.raises(UserError, match=r"a file of 3 bytes cannot be read as an image"):
        open_image(b"abc", AT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"decompression bomb"):
        open_image(encoded(Image.new("RGB", (20, 20))), AT)


GOOD_IMAGES = {form: encoded(Image.fromarray(noise(16, 16)), form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP")}


@given(form=st.sampled_from(sorted(GOOD_IMAGES)), cut=st.floats(0, 1), at=st.floats(0, 0.999), byte=st.integers(0, 255))
def test_damaged_images_never_raise_anything_else(form: str, cut: float, at: float, byte: int) -> None:
    data = bytearray(GOOD_IMAGES[form])
    data[int(at * len(data))] = byte
    with contextlib.suppress(UserError):
        assert open_image(bytes(data[: int(cut * len(data))]), AT).mode == "RGB"


# Videos from files


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv"])
def test_a_video_is_sampled_by_time(suffix: str, tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / f"a{suffix}", 60, rate=30), 99.0, MEDIA, AT)
    assert video.times == (0.0, 0.5, 1.0, 1.5)
    assert video.fps == 2.0
    assert numbers(video.frames) == [0, 15, 30, 45]
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (4, 48, 64, 3)


def test_avi_with_reordered_frames(tmp_path: Path) -> None:
    """AVI does not say when frames are shown; H.264 decodes them in another order than it stores them."""
    for codec, options in (("libx264", {"bf": "3"}), ("mpeg4", {"bf": "2"})):
        video = open_video(write_video(tmp_path / "a.avi", 60, codec=codec, options=options), 1.0, MEDIA, AT)
        assert video.times == (0.0, 0.5, 1.0, 1.5), codec
        assert numbers(video.frames) == [0, 15, 30, 45], codec


def test_a_gif_is_a_video_with_times_of_its_own(tmp_path: Path) -> None:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    frames = [Image.new("RGB", (8, 6), colour) for colour in colours]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=250)
    video = open_video(tmp_path / "a.gif", 99.0, MEDIA, AT)
    assert video.times == (0.0, 0.5)
    assert video.frames[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_keeps_the_true_times(suffix: str, tmp_path: Path) -> None:
    times_ms = [0, 100, 150, 900, 1000, 1900, 2000, 2500]
    video = open_video(write_video(tmp_path / f"v{suffix}", 8, times_ms=times_ms), 1.0, MEDIA, AT)
    # Nearest to 0, .5, 1, 1.5, 2, 2.5: .15 is nearer to .5 than .9 is, and 1.9 nearer to 1.5 than 1.0 is.
    assert video.times == pytest.approx((0.0, 0.15, 1.0, 1.9, 2.0, 2.5))
    assert numbers(video.frames) == [0, 2, 4, 5, 6, 7]
    assert video.fps == 2.0


def test_a_file_slower_than_the_grid_gives_every_frame_once(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 5, rate=1), 99.0, MEDIA, AT)
    assert video.times == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert video.fps == 1.0


def test_a_short_file_gives_its_first_and_last_frame(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 6, rate=30), 99.0, MEDIA, AT)
    assert numbers(video.frames) == [0, 5]
    assert video.times == pytest.approx((0.0, 5 / 30))
    assert video.fps == pytest.approx(6.0)


def test_too_many_frames_are_thinned_evenly(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 300, rate=30, gop=30)
    video = open_video(path, 99.0, MediaConfig(video_max_frames=4), AT)
    assert video.times == (0.0, 3.0, 6.5, 9.5)  # points 0, 6, 13, 19 of 20
    assert [round(4 * n) % 256 for n in numbers(video.frames)] == pytest.approx(
        [4 * i % 256 for i in (0, 90, 195, 285)], abs=4
    )
    assert video.fps == pytest.approx(3 / 9.5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times of the frames that go through the decoder."""
    found: list[int] = []
    decode = video_file.av.container.InputContainer.decode

    class Counting:
        def __init__(self, container: Any) -> None:
            self.container = container

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def decode(self, stream: Any) -> Any:
            for frame in decode(self.container, stream):
                found.append(frame.pts)
                yield frame

    opened = video_file.av.open
    monkeypatch.setattr(video_file.av, "open", lambda *a, **k: Counting(opened(*a, **k)))
    return found


def test_only_what_is_needed_is_decoded(tmp_path: Path, decoded: list[int]) -> None:
    """Four frames of 3,000, a key frame every 50: less than a tenth of the file goes through the decoder."""
    path = write_video(tmp_path / "a.mp4", 3000, rate=30, gop=50, options={"preset": "ultrafast"})
    video = open_video(path, 1.0, MediaConfig(video_max_frames=4), AT)
    assert video.times == (0.0, 33.0, 66.5, 99.5)
    assert len(decoded) < 300


def test_of_a_part_what_is_before_it_is_not_decoded(tmp_path: Path, decoded: list[int]) -> None:
    """Frames 480 to 510 of 600, a key frame every 50: decoding begins at 450."""
    path = write_video(tmp_path / "a.mp4", 600, rate=30, gop=50, options={"preset": "ultrafast"})
    part = open_video(Clip(path, 16.0, 17.2), 1.0, MEDIA, AT)
    assert part.times == (0.0, 0.5, 1.0)
    assert [round(4 * n) for n in numbers(part.frames)] == pytest.approx([4 * i % 256 for i in (480, 495, 510)], abs=4)
    assert len(decoded) < 100


def test_a_long_video_is_never_held_in_full_size(tmp_path: Path) -> None:
    frames = [grey(i, 480, 640) for i in range(200)]
    path = write_video(tmp_path / "a.mp4", frames, rate=2, options={"preset": "ultrafast"})
    del frames
    tracemalloc.start()
    video = open_video(path, 1.0, MEDIA, AT, resize=lambda frame, num_frames: frame[:16, :16])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert video.frames.shape == (200, 16, 16, 3)
    full = 200 * 480 * 640 * 3
    assert peak < full / 10


def test_an_upright_telephone_video(tmp_path: Path) -> None:
    """The display matrix in ``tkhd`` turns the film by 90 degrees."""
    picture = grey(20)
    picture[:, 32:] = 220  # right half light
    data = bytearray(write_video(tmp_path / "a.mp4", [picture] * 30, rate=30).read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    plain = open_video(tmp_path / "a.mp4", 1.0, MEDIA, AT).frames[0]
    turned = open_video(tmp_path / "turned.mp4", 1.0, MEDIA, AT).frames[0]
    assert turned.shape == (64, 48, 3)
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))  # this matrix: clockwise, what was right is below
    assert turned[60].mean() > 200 > 40 > turned[3].mean()


# Videos from frames


def test_frames_without_times_stand_at_fps(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in (0, 2, 10):  # 10 sorts before 2 as text
        Image.fromarray(grey(4 * i)).save(folder / f"frame{i}.png")
    (folder / "notes.txt").write_text("no frame")
    array = np.stack([grey(4 * i) for i in (0, 2, 10)])
    np.save(tmp_path / "clip.npy", array)
    images = (Image.fromarray(array[0]), encoded(Image.fromarray(array[1])), folder / "frame10.png")
    for source in (folder, array, tmp_path / "clip.npy", images):
        video = open_video(source, 4.0, MEDIA, AT)
        np.testing.assert_array_equal(video.frames, array)
        assert video.times == (0.0, 0.25, 0.5)
        assert video.fps == 4.0


def test_frames_over_the_limit_are_thinned() -> None:
    array = np.stack([grey(4 * i) for i in range(9)])
    video = open_video(array, 2.0, MediaConfig(video_max_frames=3), AT)
    assert numbers(video.frames) == [0, 4, 8]
    assert video.times == (0.0, 2.0, 4.0)
    assert video.fps == 0.5


# Damaged files


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    aside = path.with_name(f"cut{path.suffix}")
    aside.write_bytes(data[: int(share * len(data))])
    return aside


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv", ".gif"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"a{suffix}", 60)
    with pytest.raises(
        UserError, match=rf"^d\.jsonl:7: videos: .*cut\{suffix} (cannot be read|is cut off|holds no)"
    ) as e:
        open_video(cut(path, share), 2.0, MEDIA, AT)
    assert "\n" not in str(e.value)


def test_a_truncated_mp4_with_its_index_in_front(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [noise(48, 64) for _ in range(60)], options={"movflags": "faststart"})
    with pytest.raises(UserError, match=r"cut\.mp4"):
        open_video(cut(path, 0.6), 2.0, MEDIA, AT)


def test_a_damaged_mp4(tmp_path: Path) -> None:
    pictures = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(60)]
    data = bytearray(write_video(tmp_path / "a.mp4", pictures, options={"movflags": "faststart"}).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged\.mp4 (is damaged|cannot be read)"):
        open_video(tmp_path / "damaged.mp4", 30.0, MediaConfig(video_fps=30), AT)


def test_a_frame_that_is_lost_is_not_replaced_by_the_next(tmp_path: Path) -> None:
    """FFmpeg leaves out frames that it cannot decode. (Damage that decodes to other pixels cannot be found.)"""
    pictures = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(60)]
    good = write_video(tmp_path / "a.mp4", pictures).read_bytes()
    errors = []
    for start in np.linspace(0.1, 0.9, 40):
        data = bytearray(good)
        for at in range(int(start * len(data)), int(start * len(data)) + 64):
            data[at] ^= 0x5A
        (tmp_path / "damaged.mp4").write_bytes(data)
        try:
            assert len(open_video(tmp_path / "damaged.mp4", 1.0, MediaConfig(video_fps=30), AT).times) == 60
        except UserError as error:
            errors.append(str(error))
    assert [error for error in errors if "is damaged: the frame at " in error]


def test_files_without_a_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "none.mkv", [])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 4, 3)))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.npy").write_text("no array")
    for name, message in {
        "none.mkv": r"none\.mkv holds no frame",
        "text.mp4": r"text\.mp4 cannot be read as a video: Invalid data",
        "empty.mp4": r"empty\.mp4 cannot be read as a video",
        "gone.mp4": r"gone\.mp4 does not exist",
        "folder": r"folder .*folder holds no frames",
        "none.npy": r"none\.npy holds no frame",
        "float.npy": r"is float64 \[2, 3, 4, 3\], it must be uint8",
        "pickled.npy": r"pickled\.npy cannot be read as a \.npy array",
        "bad.npy": r"bad\.npy cannot be read as a \.npy array",
    }.items():
        with pytest.raises(UserError, match=message):
            open_video(tmp_path / name, 2.0, MEDIA, AT)
    with pytest.raises(UserError, match="the tuple holds no frame"):
        open_video((), 2.0, MEDIA, AT)
    with pytest.raises(UserError, match="the frames of the tuple differ in size"):
        open_video((Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))), 2.0, MEDIA, AT)
