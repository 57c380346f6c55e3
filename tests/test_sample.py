"""The sample command on a run with random weights: exact jobs, invariance, errors."""

import argparse
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from dsr_jax import build, sample
from dsr_jax import config as configs
from dsr_jax.build.from_run import load_denoiser
from dsr_jax.convert.files import save_converted
from dsr_jax.core.errors import CheckpointError, ConfigError, DataError, EvaluationError
from dsr_jax.core.files import file_digest, read_json
from dsr_jax.data.classes import read_class_names, write_class_names
from dsr_jax.parallel.axes import Constrain
from dsr_jax.runs import sampling
from dsr_jax.runs.folder import write_run_files
from dsr_jax.runs.sampled_classes import parse_classes
from dsr_jax.sampling.batch import find_batch
from dsr_jax.sampling.job import SampleJob
from dsr_jax.training.checkpoints import Checkpoints


def tiny_config():
    config = configs.base_config()
    config.model.update(hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0, patch_size=2)
    config.registers.update(num=4, start=1)
    config.ema.decays = (0.9,)
    config.sample.update(ema="0.9", num_points=4, guidance=1.5, num=24, batch=8)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with checkpoints 1 and 2, whose weights are noise."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("run")
    write_run_files(config, folder)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, _ = build.make_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    optimizer = build.make_optimizer(config)
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)
    random = np.random.RandomState(0)

    def noise(leaf):
        return jax.device_put(
            (0.2 * random.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding
        )

    with Checkpoints(folder / "checkpoints", every_steps=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jax.tree.map(noise, abstract))
    return folder


def run(workdir, out, *arguments):
    """Runs the command; returns images, labels and record."""
    name = f"samples{len(list(out.glob('*.npz')))}"
    sample.main([f"--workdir={workdir}", f"--out={out}", f"--name={name}", *arguments])
    with np.load(out / f"{name}.npz") as arrays:
        record = read_json(out / f"{name}.json")
        return arrays["arr_0"].astype(int), arrays["labels"], record


@pytest.fixture(scope="module")
def sampled(workdir, tmp_path_factory):
    """Folder and result of the command with the run's own settings."""
    out = tmp_path_factory.mktemp("out")
    return out, run(workdir, out, "--grid")


def test_samples_come_with_labels_picture_and_recipe(sampled):
    out, (images, labels, record) = sampled
    assert images.shape == (24, 8, 8, 1) and len(np.unique(images)) > 50
    assert sorted(np.bincount(labels)) == [2] * 6 + [3] * 4
    recipe = record["recipe"]
    assert recipe["step"] == 2 and recipe["ema"] == "0.9"
    assert recipe["sampler"]["guidance"] == 1.5 and recipe["sampler"]["num_points"] == 4
    assert recipe["weights"].startswith("sha256:")
    assert record["starts"][0]["packages"]["jax"] == jax.__version__
    assert record["samples_digest"] == file_digest(out / "samples0.npz")
    assert (out / "samples0.png").is_file()


def test_batch_and_mesh_do_not_change_the_images(workdir, sampled, tmp_path):
    _, (images, labels, record) = sampled
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    others, other_labels, other_record = run(workdir, tmp_path, "--batch=24", *mesh)
    assert np.abs(others - images).max() <= 1 and (others != images).mean() < 0.01
    assert (other_labels == labels).all()
    assert other_record["recipe"] == record["recipe"]
    assert [r["starts"][0]["batch"] for r in (record, other_record)] == [8, 24]


def test_killed_command_is_finished_by_the_same_command(workdir, sampled, tmp_path, monkeypatch):
    out, _ = sampled
    build_sampler, calls = build.make_sampler, []

    def mortal(*args):
        sampler = build_sampler(*args)

        def sample_or_die(*inputs):
            calls.append(inputs)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return sampler(*inputs)

        return sample_or_die

    monkeypatch.setattr(build, "make_sampler", mortal)
    command = [f"--workdir={workdir}", f"--out={tmp_path}", "--name=killed"]
    with pytest.raises(KeyboardInterrupt):
        sample.main(command)
    assert not (tmp_path / "killed.npz").exists()
    sample.main(command)
    assert len(calls) == 4  # Three batches, and the one that died.
    assert file_digest(tmp_path / "killed.npz") == file_digest(out / "samples0.npz")
    assert len(read_json(tmp_path / "killed.json")["starts"]) == 2
    with pytest.raises(CheckpointError, match="sampler: .*'seed': 0.* -> .*'seed': 1"):
        sample.main([*command, "--seed=1"])


@pytest.mark.slow
def test_the_batch_that_fits_is_found_recorded_and_kept(workdir, sampled, tmp_path, monkeypatch):
    """On a CPU, of which it is pretended that memory is short."""
    _, (images, labels, record) = sampled
    choices, free = [], [10**12]

    def find(*args):
        choices.append(find_batch(*args))
        return choices[-1]

    monkeypatch.setattr(sampling, "find_batch", find)
    limited = functools.partial(sampling.save_samples, free_memory=lambda devices: free[0])
    monkeypatch.setattr(sample, "save_samples", limited)
    found, found_labels, found_record = run(workdir, tmp_path, "--batch=auto")
    # Eight devices: 8, 16, and 32 for all 24 images at once.
    assert choices[-1].size == found_record["starts"][0]["batch"] == 32
    assert np.abs(found - images).max() <= 1 and (found != images).mean() < 0.01
    assert (found_labels == labels).all() and found_record["recipe"] == record["recipe"]

    command = [f"--workdir={workdir}", f"--out={tmp_path}", "--name=stopped", "--batch=auto"]
    free[0] = choices[-1].allocated - 1
    write, written = SampleJob._write, []

    def write_once(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleJob, "_write", write_once)
        sample.main(command)
    assert choices[-1].size < 32
    kept, free[0] = choices[-1].size, 10**12
    sample.main(command)
    assert choices[-1].size == kept
    assert [start["batch"] for start in read_json(tmp_path / "stopped.json")["starts"]] == [
        kept
    ] * 2
    with np.load(tmp_path / "stopped.npz") as arrays:
        others = arrays["arr_0"].astype(int)
    assert np.abs(others - images).max() <= 1 and (others != images).mean() < 0.01
    # A finished job has nothing to compile for.
    sample.main(command)
    assert len(choices) == 3


def test_weights_and_labels_are_those_asked_for(workdir, sampled, tmp_path):
    _, (images, labels, record) = sampled
    np.save(tmp_path / "labels.npy", labels)
    digests = {record["recipe"]["weights"]}
    for weights in ("--checkpoint-step=1", "--ema=none"):
        others, same, record = run(
            workdir, tmp_path, weights, f"--label-file={tmp_path / 'labels.npy'}"
        )
        assert (same == labels).all() and (others != images).mean() > 0.1
        digests.add(record["recipe"]["weights"])
    assert len(digests) == 3


def test_labels_are_balanced_unless_asked_otherwise():
    config = tiny_config()

    def labels(label_file=None, classes=None, random_labels=False):
        args = argparse.Namespace(
            label_file=label_file, classes=classes, random_labels=random_labels
        )
        return sample.make_labels(args, config, None)

    assert np.ptp(np.bincount(labels())) == 1
    assert np.ptp(np.bincount(labels(random_labels=True), minlength=10)) > 1
    assert labels(classes="3,7").tolist() == [3, 7] * 12


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("--ema=0.5", ConfigError, "sample.ema='0.5' .*\n.*none, 0.9"),
        ("--method=leapfrog", ConfigError, "'leapfrog'"),
        ("--num-samples=0", ConfigError, "config.sample.num=0"),
        ("--batch=0", ConfigError, "config.sample.batch=0"),
        ("--interval=0.9", ConfigError, r"config.sample.interval=\(0.9,\)\n.*LOW,HIGH"),
        ("--classes=-1", DataError, "sample 0 has label -1"),
        ("--classes=cat", DataError, "'cat', since the weights come without class names"),
        ("--autoguidance=none", ConfigError, "autoguidance='none' holds neither a run nor"),
        ("--guidance=much", ConfigError, "sample.guidance=much"),
        ("--samples=4", ConfigError, "'--samples=4'"),
        ("--checkpoint-step=7", CheckpointError, "step 7 .*\n.*steps there: 1, 2"),
        ("--classes=3,10", DataError, "sample 1 has label 10"),
        ("--label-file=none.npy", DataError, "'none.npy' not found"),
        ("--classes=", DataError, "no class is called ''"),
        ("--seed=-1", ConfigError, "config.sample.seed=-1"),
        ("--seed=4294967296", ConfigError, "config.sample.seed=4294967296"),
        ("--vae=sdvae", ConfigError, "--vae goes with --converted"),
        ("--decoder-options=--num-heads=2", ConfigError, "--decoder-options goes with --converted"),
    ],
)
def test_errors_name_what_is_wrong(workdir, tmp_path, argument, error, message):
    with pytest.raises(error, match=message):
        sample.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}", argument])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named_before_weights_are_read(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="nothing can be written into .*file/out"):
        sample.main([f"--workdir={workdir}", f"--out={tmp_path / 'file' / 'out'}"])


@pytest.fixture
def three_classes(workdir, tmp_path):
    """The run, with images of three classes called 2, 10 and cat in training."""
    folder = shutil.copytree(workdir, tmp_path / "three")
    description = {"source": "x", "images": 6, "fingerprint": "sha256:0"}
    write_class_names(folder, {**description, "names": ["10", "2", "cat"], "counts": [3, 2, 1]})
    return folder


def test_only_trained_classes_are_sampled_unless_asked(three_classes, tmp_path, capsys):
    _, labels, record = run(three_classes, tmp_path, "--num-samples=9")
    assert np.bincount(labels).tolist() == [3, 3, 3]
    assert record["class_names"] == {"0": "10", "1": "2", "2": "cat"}
    assert "warning" not in capsys.readouterr().err

    _, labels, record = run(three_classes, tmp_path, "--all-classes", "--num-samples=10")
    assert sorted(labels) == list(range(10))
    assert "no images of the classes 3, 4, 5, 6, 7, 8, 9" in capsys.readouterr().err
    assert record["class_names"]["2"] == "cat" and len(record["class_names"]) == 3


def test_classes_are_named_or_numbered(three_classes):
    data = read_class_names(three_classes)
    assert parse_classes("cat, 0,name:10", data) == [2, 0, 0]
    assert parse_classes("name:2,label:2,9", data) == [1, 2, 9]
    with pytest.raises(DataError, match="2 is class 'cat', and .* '2' has label 1\n.*name:2"):
        parse_classes("2", data)
    with pytest.raises(DataError, match="'dog'.*\n.*cat"):
        parse_classes("dog", data)


def test_the_null_class_guides_only_where_it_was_trained(workdir, tmp_path):
    """With label dropout 0, training itself refuses classifier-free guidance, too."""
    folder = shutil.copytree(workdir, tmp_path / "run")
    config = configs.load_run(folder)
    config.objective.label_dropout = 0.0
    (folder / "config.json").write_text(json.dumps(configs.to_json(config)))
    with pytest.raises(ConfigError, match="null class.*never trained\n.*guidance=1.0"):
        sample.main([f"--workdir={folder}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(ConfigError, match="null class"):
        configs.check(config)
    config.sample.guidance = 1.0
    configs.check(config)
    config.sample.update(guidance=1.5, autoguidance=str(workdir))
    configs.check(config)


def test_autoguidance_by_a_run_or_a_converted_folder(workdir, sampled, tmp_path):
    """The guide is the run itself, which changes nothing; another checkpoint as guide does."""
    _, (images, labels, _) = sampled
    np.save(tmp_path / "labels.npy", labels)
    plain, _, _ = run(workdir, tmp_path, "--guidance=1.0")
    itself, _, record = run(workdir, tmp_path, f"--autoguidance={workdir}")
    np.testing.assert_allclose(itself, plain, atol=1)
    guide = record["recipe"]["autoguidance"]
    assert guide == {"step": 2, "ema": "0.9", "weights": record["recipe"]["weights"]}

    model, params, conversion, _ = load_denoiser(workdir, 1)
    save_converted(tmp_path / "guide", params, conversion)
    guided, _, record = run(workdir, tmp_path, f"--autoguidance={tmp_path / 'guide'}")
    assert (np.abs(guided - plain) > 1).mean() > 0.1
    assert record["recipe"]["autoguidance"]["params_digest"].startswith("sha256:")


def test_missing_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        sample.main([f"--workdir={tmp_path}"])
