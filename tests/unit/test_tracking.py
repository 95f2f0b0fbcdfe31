"""TensorBoard's event files, read back with its own reader."""

import builtins

import numpy as np
import pytest
from PIL import Image

from genmodels.registry import ConfigError
from genmodels.training.tracking import TensorBoard, check


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def shown(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_scalars_are_those_given_and_on_disk_at_once(tmp_path):
    board = TensorBoard(tmp_path / "new" / "board", 0)
    for step in (1, 2, 30):
        board.scalars(step, {"train/loss": 1 / step, "val/loss": None, "step": step, "samples": 8, "seconds": 0.5})
    found = read(tmp_path / "new" / "board")  # before it is closed
    assert sorted(found.Tags()["scalars"]) == ["train/loss", "val/loss"]
    assert shown(tmp_path / "new" / "board", "train/loss") == [(s, np.float32(1 / s)) for s in (1, 2, 30)]
    assert all(np.isnan(value) for _, value in shown(tmp_path / "new" / "board", "val/loss"))
    board.scalars(40, {f"log/{k}": 0.5 for k in range(200)})
    (file,) = (tmp_path / "new" / "board").iterdir()
    size = file.stat().st_size  # at once: nothing may be on its way
    board.close()
    assert size == file.stat().st_size


def test_steps_that_were_rewound_are_shown_once(tmp_path):
    first = TensorBoard(tmp_path, 0)
    for step in range(0, 11, 2):
        first.scalars(step, {"train/loss": step})
    first.close()
    again = TensorBoard(tmp_path, 6)  # the checkpoint of step 6
    for step in (8, 10, 12):
        again.scalars(step, {"train/loss": -step})
    again.close()
    assert shown(tmp_path, "train/loss") == [(0, 0), (2, 2), (4, 4), (6, 6), (8, -8), (10, -10), (12, -12)]
    TensorBoard(tmp_path, 0).close()  # back to the checkpoint of step 0
    assert shown(tmp_path, "train/loss") == [(0, 0)]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_picture_has_the_same_pixels(tmp_path, mode):
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255  # what is drawn on paper is opaque
    Image.fromarray(pixels.squeeze()).save(tmp_path / "x.png")
    board = TensorBoard(tmp_path / "board", 0)
    board.picture(3, tmp_path / "x.png")
    board.picture(4, tmp_path / "x.npz")  # no picture, and not even there
    board.close()
    (event,) = read(tmp_path / "board").Images("samples")
    (tmp_path / "back.png").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "back.png") as image:
        back = np.asarray(image.convert("RGB"))
    assert event.step == 3
    np.testing.assert_array_equal(back, np.broadcast_to(pixels[..., :3], (5, 7, 3)))


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    check()
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    for use in (check, lambda: TensorBoard(tmp_path / "board", 0)):
        with pytest.raises(ConfigError, match=r"train\.tensorboard: .*pip install 'genmodels\[track\]'"):
            use()
