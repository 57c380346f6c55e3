"""AutoencoderKL of diffusers against ours: released kinds of latent spaces, tiny and random."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.sdvae import load_vae
from dsr_jax.convert.vae_names import NameStyle, modernize, restyle
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.vae import AutoencoderKL
from dsr_jax.spaces import VAE
from tests.programs import quick_programs
from tests.requirements import require

torch = require("torch", "torch")
diffusers = require("diffusers", "test")

LDM = NameStyle(convolutions=True, ldm=True)
TINY = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "sd": {},
    "flux": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "sdxl_with_statistics": {
        "scaling_factor": 0.5,
        "latents_mean": (-1.6, 1.1, 0.3, 2.1),
        "latents_std": (8.4, 6.0, 5.2, 0.7),
    },
    "va_vae": {
        "latent_channels": 32,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "mar_kl16": {
        "latent_channels": 16,
        "scaling_factor": 0.2325,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    },
    "no_middle_attention": {"mid_block_add_attention": False},
}
IMAGES = np.random.default_rng(0).uniform(size=(2, 16, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs compile quickly and are shared."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def make(case: str) -> Any:
    """A random autoencoder whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**{**TINY, **CASES[case]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def official(model: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents that diffusers' pipelines give a denoiser, and the images that come back."""
    config = model.config
    mean = torch.tensor(config.latents_mean or [config.shift_factor or 0.0]).view(1, -1, 1, 1)
    std = torch.tensor(config.latents_std or [1.0]).view(1, -1, 1, 1)
    with torch.no_grad():
        raw = model.encode(torch.from_numpy(images * 2 - 1).permute(0, 3, 1, 2)).latent_dist.mode()
        latents = (raw - mean) * config.scaling_factor / std
        decoded = model.decode(latents * std / config.scaling_factor + mean).sample
    return tuple(x.permute(0, 2, 3, 1).numpy() for x in (latents, (decoded + 1) / 2))


@pytest.mark.parametrize("case", CASES)
def test_latents_and_images_are_those_of_diffusers(case: str, tmp_path: Path) -> None:
    model = make(case)
    model.save_pretrained(tmp_path / "hub")
    main(["sdvae", f"--source={tmp_path / 'hub'}", f"--out={tmp_path / 'out'}"])
    vae = load_vae(tmp_path / "out")
    space = VAE(AutoencoderKL(vae.config), 16, vae.normalization)
    variables = space.make_variables(vae.params)
    with jax.default_matmul_precision("highest"):
        latents = jax.jit(space.encode)(variables, IMAGES)
        images = jax.jit(space.decode)(variables, latents)
    for got, want in zip((latents, images), official(model, IMAGES), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    back = tmp_path / "back.safetensors"
    main(["export", f"--source={tmp_path / 'out'}", f"--out={back}"])
    exported = {name: torch.from_numpy(x) for name, x in load_file(back).items()}
    model.load_state_dict(exported, strict=True)


@pytest.mark.parametrize("case", ["sd", "flux"])
def test_latent_diffusions_names_are_those_that_diffusers_reads(case: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = make(case)
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    ldm = restyle(state, LDM)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in ldm.items()}
    theirs = convert_ldm_vae_checkpoint(tensors, dict(model.config))
    assert set(theirs) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize(
    ("case", "flags"),
    [
        ("sd", []),
        ("va_vae", ["--scale=0.18215"]),
        ("mar_kl16", ["--scale=0.2325"]),
        ("flux", ["--scale=0.3611", "--shift=0.1159"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_files_with_latent_diffusions_names_convert(
    case: str, flags: list[str], prefix: str, tmp_path: Path
) -> None:
    model = make(case)
    model.save_pretrained(tmp_path / "hub")
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    ldm = {prefix + name: np.array(x) for name, x in restyle(state, LDM).items()}
    if prefix:
        ldm["model.diffusion_model.out.0.weight"] = np.zeros(1, np.float32)
    save_file(ldm, tmp_path / "ldm.safetensors")
    main(["sdvae", f"--source={tmp_path / 'hub'}", f"--out={tmp_path / 'a'}"])
    flags = [*flags, "--num-groups=4"]
    main(["sdvae", f"--source={tmp_path / 'ldm.safetensors'}", f"--out={tmp_path / 'b'}", *flags])
    ours, theirs = load_vae(tmp_path / "b"), load_vae(tmp_path / "a")
    assert (ours.config, ours.normalization) == (theirs.config, theirs.normalization)
    digests = [load_converted(tmp_path / name)[1]["params_digest"] for name in "ab"]
    assert digests[0] == digests[1]
    main(["export", f"--source={tmp_path / 'b'}", f"--out={tmp_path / 'back.safetensors'}"])
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == {name.removeprefix(prefix) for name in ldm if name.startswith(prefix)}
    for name, value in back.items():
        np.testing.assert_array_equal(value, ldm[prefix + name], err_msg=name)


def test_attention_on_levels_has_latent_diffusions_names() -> None:
    state = {name: x.numpy() for name, x in make("va_vae").state_dict().items()}
    ldm = restyle(state, LDM)
    assert modernize(ldm)[1] == LDM
    for layer in ("norm", "q", "k", "v", "proj_out"):
        for kind in ("weight", "bias"):
            assert {f"encoder.down.1.attn.{i}.{layer}.{kind}" for i in (0, 1)} <= set(ldm)
            assert {f"decoder.up.1.attn.{i}.{layer}.{kind}" for i in (0, 1, 2)} <= set(ldm)
    assert not any(".0.attn." in name for name in ldm)
    assert {"encoder.down.0.downsample.conv.weight", "decoder.up.1.upsample.conv.bias"} < set(ldm)
    assert {"decoder.up.0.block.0.nin_shortcut.weight", "decoder.mid.attn_1.q.bias"} < set(ldm)
    assert ldm["encoder.down.1.attn.0.q.weight"].shape == (12, 12, 1, 1)


def test_statistics_of_channels_are_read_as_lightningdit_writes_them(tmp_path: Path) -> None:
    state = {name: x.numpy() for name, x in make("va_vae").state_dict().items()}
    save_file({n: np.array(x) for n, x in restyle(state, LDM).items()}, tmp_path / "x.safetensors")
    statistics = {"mean": torch.randn(1, 32, 1, 1), "std": torch.rand(1, 32, 1, 1) + 0.5}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    flags = [f"--source={tmp_path / 'x.safetensors'}", "--num-groups=4"]
    with pytest.raises(ConversionError, match="32-channel") as caught:
        main(["sdvae", *flags, f"--out={tmp_path / 'none'}"])
    assert "--statistics" in caught.value.remedy
    flags.append(f"--statistics={tmp_path / 'latents_stats.pt'}")
    main(["sdvae", *flags, f"--out={tmp_path / 'out'}"])
    normalization = load_vae(tmp_path / "out").normalization
    latents = np.random.default_rng(0).normal(size=(2, 3, 3, 32)).astype(np.float32)
    mean, std = (statistics[name].numpy().reshape(-1) for name in ("mean", "std"))
    got = np.asarray(normalization.normalize(latents))
    np.testing.assert_allclose(got, (latents - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalization.denormalize(got), latents, rtol=1e-5, atol=1e-5)
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "latents_stats.pt")
    with pytest.raises(ConversionError, match="4 channels for latents of 32"):
        main(["sdvae", *flags, f"--out={tmp_path / 'other'}"])
