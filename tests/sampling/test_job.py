"""Jobs: every image once, whatever the batch, also after a kill; foreign recipes refused."""

import dataclasses
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core.errors import CheckpointError, LockError, MeshError, NumericsError
from dsr_jax.core.files import file_digest, read_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.sampling.job import SampleJob, Samples

SHAPE = (2, 3, 1)


def picture(indices, labels):
    """Images that hold their index and label."""
    images = np.zeros((len(indices), *SHAPE), np.uint8)
    images[:, 0, 0, 0] = indices
    images[:, 1, 2, 0] = labels
    return images


def sample(indices, labels):
    """Samples on one device."""
    images = jnp.asarray(picture(indices, labels))
    return Samples(images, jnp.ones(len(indices), bool), jnp.asarray(indices))


class Killed(Exception):
    """Stands for SIGKILL: nothing in the job may catch it."""


def killed_after(batches):
    """Samples `batches` batches, then dies."""
    sampled = []

    def mortal(indices, labels):
        if len(sampled) == batches:
            raise Killed
        sampled.append(indices)
        return sample(indices, labels)

    return mortal


def make_job(folder, num=23, **recipe):
    labels = (np.arange(num) * 7 % 10).astype(np.int32)
    return SampleJob(folder, "samples", labels, SHAPE, {"seed": 0, "method": "euler", **recipe})


def quiet(line):
    """Takes progress lines."""


@pytest.mark.parametrize("batch", [1, 5, 23, 64])
def test_npz_holds_every_image_once_whatever_the_batch(tmp_path, batch):
    job = make_job(tmp_path)
    path = job.run(sample, batch, quiet)
    with np.load(path) as arrays:
        assert sorted(arrays) == ["arr_0", "labels"]
        assert arrays["arr_0"].dtype == np.uint8 and arrays["labels"].dtype == np.int32
        np.testing.assert_array_equal(arrays["arr_0"], picture(np.arange(23), job.labels))
        np.testing.assert_array_equal(arrays["labels"], job.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.json", "samples.npz"]


def test_npz_can_be_streamed_as_the_adm_evaluator_does(tmp_path):
    path = make_job(tmp_path).run(sample, 8, quiet)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert (shape, fortran, dtype) == ((23, *SHAPE), False, np.uint8)


def test_killed_job_resumes_without_losing_or_repeating_an_image(tmp_path):
    whole = make_job(tmp_path / "whole").run(sample, 4, quiet)
    job = make_job(tmp_path / "killed")
    with pytest.raises(Killed):
        job.run(killed_after(2), 4, quiet)
    assert not job.npz_path.exists()
    with pytest.raises(Killed):  # Again, with another batch size.
        job.run(killed_after(1), 3, quiet)
    asked, lines = [], []

    def recording(indices, labels):
        asked.append(indices)
        return sample(indices, labels)

    path = job.run(recording, 6, lines.append)
    assert lines[0] == "samples: 11 of 23 images are there already"
    assert np.concatenate(asked).tolist() == list(range(11, 23))
    assert file_digest(path) == file_digest(whole)
    record = read_json(job.json_path)
    assert [start["batch"] for start in record["starts"]] == [4, 3, 6]
    assert record["samples_digest"] == file_digest(path)


def test_gaps_are_filled_from_whatever_parts_there_are(tmp_path):
    job = make_job(tmp_path)
    with pytest.raises(Killed):
        job.run(killed_after(5), 4, quiet)
    next(job.parts.glob("00000004-00000008-*.npy")).unlink()
    images = picture(np.arange(6, 14), job.labels[6:14])
    np.save(job.parts / f"00000006-00000014-{zlib.crc32(images.data):08x}.npy", images)
    with np.load(job.run(sample, 4, quiet)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], picture(np.arange(23), job.labels))


def test_kill_between_the_npz_and_its_record(tmp_path, monkeypatch):
    job = make_job(tmp_path)

    def dies(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dsr_jax.sampling.job.file_digest", dies)
        with pytest.raises(Killed):
            job.run(sample, 8, quiet)
    assert job.npz_path.exists() and not job.json_path.exists()
    path = job.run(killed_after(0), 8, quiet)
    assert read_json(job.json_path)["samples_digest"] == file_digest(path)
    assert not job.parts.exists()


def test_finished_job_samples_nothing(tmp_path):
    digest = file_digest(make_job(tmp_path).run(sample, 8, quiet))
    assert file_digest(make_job(tmp_path).run(killed_after(0), 5, quiet)) == digest


def test_deleted_npz_is_sampled_again(tmp_path):
    job = make_job(tmp_path)
    digest = file_digest(job.run(sample, 8, quiet))
    job.npz_path.unlink()
    assert file_digest(job.run(sample, 8, quiet)) == digest


@pytest.mark.parametrize("finished", [True, False])
def test_other_recipe_is_refused_and_the_key_named(tmp_path, finished):
    if finished:
        make_job(tmp_path).run(sample, 8, quiet)
    else:
        with pytest.raises(Killed):
            make_job(tmp_path).run(killed_after(1), 8, quiet)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="method: euler -> heun2"):
        make_job(tmp_path, method="heun2").run(sample, 8, quiet)
    with pytest.raises(CheckpointError, match="guidance: absent -> 1.5"):
        make_job(tmp_path, guidance=1.5).run(sample, 8, quiet)
    with pytest.raises(CheckpointError, match="num_samples: 23 -> 24"):
        make_job(tmp_path, num=24).run(sample, 8, quiet)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_foreign_npz_is_not_overwritten(tmp_path):
    job = make_job(tmp_path)
    np.savez(job.npz_path, arr_0=np.zeros(3))
    with pytest.raises(CheckpointError, match="its content is unknown"):
        job.run(sample, 8, quiet)


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip])
def test_images_of_a_damaged_part_are_made_again(tmp_path, damage):
    job, lines, asked = make_job(tmp_path), [], []
    with pytest.raises(Killed):
        job.run(killed_after(2), 8, quiet)
    part = next(job.parts.glob("00000000-00000008-*.npy"))
    part.write_bytes(damage(part.read_bytes()))

    def recording(indices, labels):
        asked.append(indices)
        return sample(indices, labels)

    with np.load(job.run(recording, 8, lines.append)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], picture(np.arange(23), job.labels))
    assert f"part {part} is damaged" in lines[0]
    assert lines[1] == "samples: 8 of 23 images are there already"
    assert np.unique(np.concatenate(asked)).tolist() == [*range(8), *range(16, 23)]


def test_a_flipped_bit_in_the_header_of_a_part_is_noticed(tmp_path):
    job = make_job(tmp_path)
    with pytest.raises(Killed):
        job.run(killed_after(1), 8, quiet)
    (part,) = job._part_files()
    content = part.path.read_bytes()
    for place in range(8 * 96):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        part.path.write_bytes(flipped)
        try:
            read = job._load_part(part)
        except CheckpointError as error:
            assert f"part {part.path} is damaged" in str(error)
        else:  # The padding of the header decides nothing.
            np.testing.assert_array_equal(read, picture(np.arange(8), job.labels[:8]))


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    job, lines = make_job(tmp_path), []
    digest = file_digest(job.run(sample, 8, quiet))
    job.npz_path.write_bytes(damage(job.npz_path.read_bytes()))
    assert file_digest(job.run(sample, 8, lines.append)) == digest
    assert f"{job.npz_path} is damaged" in lines[0]


def test_notes_stand_in_the_record_and_change_nothing_else(tmp_path):
    job = dataclasses.replace(make_job(tmp_path), notes={"class_names": {"0": "cat"}})
    digest = file_digest(job.run(sample, 8, quiet))
    assert read_json(job.json_path)["class_names"] == {"0": "cat"}
    assert file_digest(make_job(tmp_path).run(killed_after(0), 8, quiet)) == digest


def test_image_that_is_not_finite_stops_the_job(tmp_path):
    def diverged(indices, labels):
        return sample(indices, labels)._replace(finite=jnp.asarray(indices != 13))

    job = make_job(tmp_path)
    with pytest.raises(NumericsError, match="sample 13 is not finite"):
        job.run(diverged, 8, quiet)
    assert [p.name[:17] for p in job.parts.glob("*.npy")] == ["00000000-00000008"]


@pytest.mark.parametrize("axes", ["data", None], ids=["split", "replicated"])
def test_images_on_several_devices(tmp_path, axes):
    devices = np.array(jax.devices()[:4])
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec(axes))

    def on_devices(indices, labels):
        return Samples(*(jax.device_put(part, sharding) for part in sample(indices, labels)))

    job = make_job(tmp_path)
    with np.load(job.run(on_devices, 8, quiet)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], picture(np.arange(23), job.labels))


def test_images_under_other_indices_are_refused(tmp_path):
    """A program that returns rows in another order than it was given stores nothing."""

    def shuffled(indices, labels):
        return sample(indices[::-1], labels[::-1])

    job = make_job(tmp_path)
    with pytest.raises(MeshError, match="row 0 is the result of input 7, not of input 0"):
        job.run(shuffled, 8, quiet)
    assert not list(job.parts.glob("*.npy"))


def test_progress_names_what_is_done_and_what_is_left(tmp_path, monkeypatch):
    seconds = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("dsr_jax.sampling.progress.monotonic", lambda: next(seconds))
    lines = []
    make_job(tmp_path, num=24).run(sample, 8, lines.append)
    assert lines[0] == "sampled 8/24"
    assert lines[1] == "sampled 16/24, 0.8 images/s, 0:00:10 left"
    assert lines[2] == "sampled 24/24, 0.8 images/s, 0:00:00 left"


def test_one_command_at_a_time_makes_the_files_of_a_name(tmp_path):
    job, other = make_job(tmp_path), dataclasses.replace(make_job(tmp_path), name="others")
    with FolderLock(tmp_path, "samples"):
        with pytest.raises(LockError, match="samples is in use by process"):
            job.run(sample, 5, quiet)
        other.run(sample, 5, quiet)
    job.run(sample, 5, quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{name}.{end}" for name in ("others", "samples") for end in ("json", "npz")
    ]


def test_leftovers_of_a_killed_assembly_are_removed(tmp_path):
    kept = [".others.npz.ab12cd_9.tmp", ".samples.5.npz.ab12cd_9.tmp"]
    for name in (".samples.npz.ab12cd_9.tmp", ".samples.png.ab12cd_9.tmp", *kept):
        (tmp_path / name).touch()
    make_job(tmp_path).run(sample, 5, quiet)
    assert sorted(p.name for p in tmp_path.glob("*.tmp")) == kept
