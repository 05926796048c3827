from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from splitward.data import open_dataset
from splitward.data.catalogue import SIZES
from splitward.errors import DataError


def test_the_phantom_is_synthetic_and_says_so():
    dataset = open_dataset("phantom", size=32, seed=3)
    assert dataset.synthetic
    assert "synthetic" in dataset.name
    assert dataset.train.images.shape[1:] == (1, 32, 32)
    assert dataset.classes == ("normal", "mass")
    again = open_dataset("phantom", size=32, seed=3)
    assert np.array_equal(dataset.test.images, again.test.images)
    other = open_dataset("phantom", size=32, seed=4)
    assert not np.array_equal(dataset.train.images, other.train.images)


def test_a_phantom_mass_is_brighter_than_its_surroundings_on_average():
    dataset = open_dataset("phantom", size=32)
    means = [dataset.train.images[dataset.train.labels == label].mean() for label in (0, 1)]
    assert means[1] > means[0] + 2
    balance = dataset.train.labels.mean()
    assert balance == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("spec", ["mnsit", "no/such/folder", "", "http://example.org/data.npz"])
def test_an_unknown_name_lists_what_is_understood(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"phantom|no such file") as caught:
        open_dataset(spec)
    assert "no such file" in str(caught.value) or "Understood are" in str(caught.value)


def test_a_folder_without_labels_lists_what_is_understood(tmp_path):
    (tmp_path / "loose.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no labels\.csv and no class folder"):
        open_dataset(str(tmp_path))


def test_an_archive_is_to_be_unpacked(tmp_path):
    archive = tmp_path / "mias.tar.xz"
    archive.write_bytes(b"\xfd7zXZ\x00")
    with pytest.raises(DataError, match="Unpack it"):
        open_dataset(str(archive))


def test_another_file_is_no_data_set(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match="is not a data set"):
        open_dataset(str(tmp_path / "notes.txt"))


def test_a_wrong_task_lists_the_tasks():
    with pytest.raises(DataError, match=r"phantom: has no task 'density'\. Its tasks: mass"):
        open_dataset("phantom", task="density")


@pytest.mark.parametrize("size", [0, -1, 4, 30, 225, 1024, 4096])
@pytest.mark.parametrize("spec", ["phantom", "mnist", "no/such/folder"])
def test_sizes_that_no_network_takes_are_refused_before_anything_is_read(spec, size):
    with pytest.raises(DataError, match=f"size {size}: give 8 to 224 pixels, a multiple of 4"):
        open_dataset(spec, size=size)


def test_the_networks_take_every_size():
    from splitward.training.settings import frame_settings

    for size in SIZES:
        assert frame_settings(1, size, 2, "sealed").network.side == size


def test_loading_never_imports_torch():
    code = (
        "import sys; from splitward.data import open_dataset; open_dataset('phantom', size=8); "
        "sys.exit('torch' in sys.modules or 'pydicom' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
