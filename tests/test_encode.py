"""The encode command: correct statistics and caches, exact resume, refusals."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dsr_jax import build, encode, train
from dsr_jax import config as configs
from dsr_jax.convert.statistics import load_statistics
from dsr_jax.core.errors import ConfigError, DataError, LockError
from dsr_jax.core.files import read_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.data.latents import CachedLatents
from dsr_jax.data.sources import read_all
from dsr_jax.parallel.shardings import batch_sharding
from dsr_jax.telemetry.writers import read_metrics
from tests.programs import quick_programs
from tests.tiny_rae import save_rae

DIGITS = f"--config={Path(__file__).parents[1] / 'configs' / 'digits.py'}"
IMAGES, BATCH = 20, 8


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return save_rae(tmp_path_factory.mktemp("rae"))


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def run(out: Path, overrides: tuple[str, ...], *more: str) -> None:
    settings = [f"--images={IMAGES}", f"--batch={BATCH}", "--save-every=1"]
    encode.main(["statistics", DIGITS, f"--out={out}", *settings, *more, *overrides])


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "whole"
    run(out, overrides, "--no-flip")
    return out


@pytest.mark.parametrize(
    ("what", "argument"),
    [
        *(("statistics", each) for each in ("--save-every=0", "--batch=-4", "--stop-after=-1")),
        *(("cache", each) for each in ("--shard-batches=0", "--copies=0", "--images=-2")),
    ],
)
def test_counts_that_cannot_be_are_refused(
    what: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        encode.main([what, DIGITS, f"--out={tmp_path / 'out'}", argument])
    assert stop.value.code == 2
    assert f"argument {argument.partition('=')[0]}: " in capsys.readouterr().err


def test_statistics_are_those_of_the_images_in_the_order_of_training(whole, overrides) -> None:
    config = configs.load_file(DIGITS.removeprefix("--config="))
    configs.apply_overrides(config, overrides)
    config.space.statistics = ""
    config.data.update(global_batch=BATCH, flip=False)
    space, variables = build.make_space(config)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    sharding = batch_sharding(mesh, rules)
    batches = build.global_batches(config, build.make_source(config), sharding)(0)
    images = np.concatenate([np.asarray(next(batches)["image"]) for _ in range(3)])[:IMAGES]
    latents = np.asarray(jax.jit(space.encode)(variables, images.astype(np.float32) / 255))
    found = load_statistics(whole)
    np.testing.assert_allclose(found["mean"], latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["var"], latents.var(0), atol=1e-5)
    record = read_json(whole / "statistics.json")
    assert record["images"] == IMAGES and 0 <= record["data_wait_share"] <= 1
    assert record["recipe"]["space"]["config.space.encoder"].startswith("sha256:")


def test_a_pass_in_pieces_has_the_same_bits(whole, overrides, tmp_path, capsys) -> None:
    out = tmp_path / "pieces"
    run(out, overrides, "--no-flip", "--stop-after=1")
    assert not (out / "statistics.safetensors").exists()
    run(out, overrides, "--no-flip", "--stop-after=1")
    run(out, overrides, "--no-flip")
    assert "of the time was waiting for data" in capsys.readouterr().err
    results = [(folder / "statistics.safetensors").read_bytes() for folder in (out, whole)]
    assert results[0] == results[1]
    before = (out / "progress.npz").stat().st_mtime_ns
    run(out, overrides, "--no-flip")
    assert "complete" in capsys.readouterr().err
    assert (out / "progress.npz").stat().st_mtime_ns == before


def test_a_finished_pass_of_an_earlier_version_is_complete(whole, overrides, tmp_path, capsys):
    """Its sums have another form, but nothing has to be added to them."""
    out = shutil.copytree(whole, tmp_path / "old")
    with np.load(out / "progress.npz") as saved:
        arrays = {name: saved[name] for name in ("recipe", "step", "count")}
    np.savez(out / "progress.npz", **arrays, sums=np.zeros(3, np.int64))
    run(out, overrides, "--no-flip")
    assert "complete" in capsys.readouterr().err
    (out / "statistics.safetensors").unlink()
    with pytest.raises(ConfigError, match="earlier version"):
        run(out, overrides, "--no-flip")


def test_a_damaged_or_unfinished_save_starts_the_pass_again(
    whole, overrides, tmp_path, capsys
) -> None:
    out = tmp_path / "again"
    run(out, overrides, "--no-flip", "--stop-after=1")
    progress = out / "progress.npz"
    progress.write_bytes(progress.read_bytes()[:-40])
    run(out, overrides, "--no-flip", "--stop-after=1")
    assert "progress.npz is damaged" in capsys.readouterr().err
    # A kill within the first save leaves the temporary file alone.
    progress.rename(out / ".progress.npz.ab12cd_9.tmp")
    run(out, overrides, "--no-flip")
    results = [(folder / "statistics.safetensors").read_bytes() for folder in (out, whole)]
    assert results[0] == results[1]


def test_flips_are_on_by_default(whole, overrides, tmp_path) -> None:
    run(tmp_path / "flipped", overrides)
    assert (
        np.abs(load_statistics(tmp_path / "flipped")["mean"] - load_statistics(whole)["mean"]).max()
        > 1e-4
    )


def test_what_does_not_belong_together_is_refused(whole, overrides, tmp_path) -> None:
    with pytest.raises(ConfigError, match="other settings:\n.*data.seed: 0 -> 1"):
        run(whole, overrides, "--no-flip", "--config.seed=1")
    with pytest.raises(ConfigError, match="other settings:\n.*config.space.preln: False -> True"):
        run(whole, overrides, "--no-flip", "--config.space.preln=True")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        run(tmp_path, overrides)
    with pytest.raises(ConfigError, match="'pixels' has no encoder"):
        run(tmp_path / "new", ())
    assert not (tmp_path / "new").exists()


def cache(out: Path, overrides: tuple[str, ...], *more: str) -> None:
    settings = [f"--images={IMAGES}", f"--batch={BATCH}", "--shard-batches=2", "--dtype=float32"]
    encode.main(["cache", DIGITS, f"--out={out}", *settings, *more, *overrides])


@pytest.fixture(scope="module")
def cached(overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "whole"
    cache(out, overrides, "--copies=2")
    return out


def test_cached_latents_are_those_of_the_order_of_training(cached, overrides) -> None:
    config = configs.load_file(DIGITS.removeprefix("--config="))
    configs.apply_overrides(config, overrides)
    config.space.statistics = ""
    config.data.update(global_batch=2 * IMAGES, flip=True)
    space, variables = build.make_space(config)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    sharding = batch_sharding(mesh, rules)
    batch = next(build.global_batches(config, build.make_source(config), sharding)(0))
    images = np.asarray(batch["image"]).astype(np.float32) / 255
    want = np.asarray(jax.jit(space.encode)(variables, images))
    source = CachedLatents(cached)
    assert len(source) == 2 * IMAGES
    got = np.stack([source[i]["image"] for i in range(len(source))])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert [int(source[i]["label"]) for i in range(len(source))] == batch["label"].tolist()


def test_a_cache_in_pieces_has_the_same_bytes(cached, overrides, tmp_path) -> None:
    out = tmp_path / "pieces"
    cache(out, overrides, "--copies=2", "--stop-after=1")
    with pytest.raises(DataError, match="lacks 2 of 3 shards"):
        CachedLatents(out)
    (out / "latents-00001-of-00003.array_record.part").write_bytes(b"cut off")
    cache(out, overrides, "--copies=2")
    for path in sorted(cached.glob("*.array_record")):
        assert (out / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ConfigError, match="other settings:\n.*images: 40 -> 20"):
        cache(out, overrides, "--copies=1")


def test_damaged_shards_are_made_again(cached, overrides, tmp_path, capsys) -> None:
    out = shutil.copytree(cached, tmp_path / "damaged")
    first, second = sorted(out.glob("*.array_record"))[:2]
    first.write_bytes(first.read_bytes()[:-40])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    cache(out, overrides, "--copies=2")
    shown = capsys.readouterr().err
    assert all(f"{path} is damaged; it is made again" in shown for path in (first, second))
    for path in sorted(cached.glob("*.array_record")):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_damaged_statistics_are_written_again(whole, overrides, tmp_path, capsys) -> None:
    out = shutil.copytree(whole, tmp_path / "damaged")
    path = out / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(out, overrides, "--no-flip")
    assert f"{path} is damaged" in capsys.readouterr().err
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_one_command_at_a_time_encodes_into_a_folder(cached, overrides) -> None:
    with FolderLock(cached), pytest.raises(LockError, match="in use by process"):
        cache(cached, overrides, "--copies=2")


def test_training_reads_the_latents_that_the_encoder_computes(cached, overrides, tmp_path) -> None:
    config = configs.load_file(DIGITS.removeprefix("--config=") + ":runlocal")
    configs.apply_overrides(config, overrides)
    config.space.noise_tau = 0.5
    online, frozen = build.make_space(config)
    config.data.update(global_batch=BATCH, flip=True)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    sharding = batch_sharding(mesh, rules)
    images = next(build.global_batches(config, build.make_source(config), sharding)(0))["image"]
    config.data.latents = str(cached)
    space, variables = build.make_space(config)
    assert set(variables) == {"decoder", "statistics"}
    source = build.make_source(config)
    keys = jax.random.split(jax.random.key(0), BATCH)
    stored = np.stack([source[i]["image"] for i in range(BATCH)])
    got = space.encode(variables, stored, keys)
    want = online.encode(frozen, np.asarray(images).astype(np.float32) / 255, keys)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_a_run_on_cached_latents_trains_and_samples(cached, overrides, tmp_path) -> None:
    shrink = ["--config.train.steps=2", "--config.sample.every_steps=2", "--config.model.depth=2"]
    arguments = [DIGITS + ":runlocal", f"--workdir={tmp_path / 'run'}", *overrides, *shrink]
    train.main([*arguments, f"--config.data.latents={cached}", "--config.model.patch_size=1"])
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()


def test_latents_of_another_encoder_are_refused(cached, overrides, tmp_path) -> None:
    arguments = [DIGITS, f"--workdir={tmp_path / 'run'}", *overrides]
    arguments.append(f"--config.data.latents={cached}")
    with pytest.raises(ConfigError, match="another encoder.*\n.*preln: False -> True"):
        train.main([*arguments, "--config.space.preln=True"])
    with pytest.raises(ConfigError, match="images are needed"):
        train.main([*arguments, "--config.space.name=pixels"])
    assert not (tmp_path / "run").exists()


def test_every_image_is_taken_once(overrides, tmp_path) -> None:
    """The rest of the last batch belongs to the next epoch and does not count."""
    out, config = tmp_path / "all", configs.load_file(DIGITS.removeprefix("--config="))
    encode.main(["statistics", DIGITS, f"--out={out}", "--batch=512", "--no-flip", *overrides])
    images, _ = read_all(build.make_source(config))
    assert read_json(out / "statistics.json")["images"] == len(images)
