"""Any image file gets the answer that a student gives of a training image; what is none is told, and the rest goes on."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from dfkt.data.decode import decode_image
from dfkt.errors import CheckpointError, DataError
from dfkt.students.exported import Exported
from dfkt.students.predict import BATCH, find_images, predict


def brightness(*size: int) -> Exported:
    """Return a student whose logits are a colour's mean, for each colour."""
    names = ["red", "green", "blue"][: size[0]]
    about = {"classes": [*names, "none"], "input_size": list(size)}
    none = torch.full((1, 1), -1.0)

    def answer(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([20 * images.mean((2, 3)), none.expand(len(images), 1)], 1)

    return Exported(about, answer, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_any_kind_are_decoded_as_training_images_are(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / "a.png"
    if mode == "I;16":
        Image.fromarray(np.arange(0, 60000, 40, dtype=np.uint16).reshape(30, 50)).save(path)
    else:
        write_image(path, (50, 30), mode)
    seen: list[torch.Tensor] = []
    student = brightness(channels, 8, 8)
    spy = Exported(student.about, lambda images: student.answer(seen.append(images) or images), 0)  # type: ignore[func-returns-value]
    (answer,) = predict(spy, [path])
    wanted = decode_image(path, size=8, channels=channels)
    assert torch.equal((seen[0] * 255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(wanted.copy()))
    assert answer.error is None
    assert len(answer.classes) == channels + 1


def test_answers_come_in_order_the_likeliest_class_first(tmp_path: Path) -> None:
    paths = []
    for k in range(BATCH + 3):
        pixels = np.zeros((4, 6, 3), np.uint8)
        pixels[..., k % 3] = 200
        paths.append(tmp_path / f"{k}.png")
        write_image(paths[-1], pixels=pixels)
    answers = list(predict(brightness(3, 8, 8), paths, top=2))
    assert [answer.path for answer in answers] == paths
    assert [answer.classes[0] for answer in answers] == [("red", "green", "blue")[k % 3] for k in range(len(paths))]
    for answer in answers:
        first, second = answer.probabilities
        assert 1 > first > 0.9 > second > 0
        assert len(answer.classes) == 2
    assert sum(next(predict(brightness(3, 8, 8), paths[:1], top=99)).probabilities) == pytest.approx(1)


def test_what_is_no_image_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    for name in ("a.png", "c.png", "cut.png"):
        write_image(tmp_path / name, (40, 40))
    (tmp_path / "b.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    paths = find_images([str(tmp_path)])
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png", "cut.png", "gone.png", "pipe.png"]
    found = {answer.path.name: answer for answer in predict(brightness(3, 8, 8), paths)}
    assert [name for name, answer in found.items() if answer.error is None] == ["a.png", "c.png"]
    for name in ("b.png", "cut.png", "gone.png", "pipe.png"):
        assert name in str(found[name].error)
        assert found[name].classes == ()


def test_folders_are_walked_and_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("x/b.png", "x/y/a.JPG", "x/.hidden.png", "odd.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x/notes.txt").touch()
    found = find_images([str(tmp_path / "odd.dat"), str(tmp_path / "x")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["odd.dat", "x/b.png", "x/y/a.JPG"]


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    for place, said in ((tmp_path, "that folder has none"), (tmp_path / "a.png", "there is no such file")):
        with pytest.raises(DataError, match=said):
            find_images([str(place)])


@pytest.mark.parametrize("size", [(1, 8, 4), (2, 8, 8)])
def test_a_student_of_other_images_than_files_give_is_refused(tmp_path: Path, size: tuple[int, int, int]) -> None:
    with pytest.raises(CheckpointError, match="must take square images in grey or colour"):
        next(predict(brightness(*size), [tmp_path / "a.png"]))
