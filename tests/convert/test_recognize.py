"""Files of another family are recognized: from the golden cases' own names."""

from pathlib import Path

import pytest
from safetensors import safe_open

from dsr_jax.convert.recognize import check_family, recognize
from dsr_jax.core.errors import ConversionError

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = {
    "denoiser_lightningdit_base": "lightningdit",
    "denoiser_lightningdit_reg": "lightningdit",
    "denoiser_lightningdit_altflags": "lightningdit",
    "denoiser_ddt_reg": "ditdh",
    "denoiser_ddt_altflags": "ditdh",
    "denoiser_sit_tiny": "sit",
    "denoiser_jit": "jit",
    "denoiser_sdvae": "sdvae",
}


def names(case: str) -> list[str]:
    with safe_open(GOLDEN / case / "weights.safetensors", "np") as file:
        return list(file.keys())


@pytest.mark.parametrize("case", FAMILIES)
def test_golden_weights_are_recognized(case: str) -> None:
    family = FAMILIES[case]
    assert recognize(names(case)) == [family]
    assert recognize(f"net.{name}" for name in names(case)) == [family]
    check_family(names(case), family, "x.pt")


def test_another_family_is_named_with_its_command() -> None:
    with pytest.raises(ConversionError) as caught:
        check_family(names("denoiser_lightningdit_base"), "sit", "x.pt")
    assert caught.value.problem == "x.pt: this is LightningDiT, not SiT"
    assert caught.value.remedy == "use python -m dsr_jax.convert lightningdit"


def test_what_is_not_recognized_passes() -> None:
    check_family(["a.weight", "my_x_embedder.proj.weight"], "sit", "x.pt")


def test_an_autoencoder_is_recognized_as_both_of_its_families() -> None:
    whole = ["encoder.embeddings.patch_embedding.weight", "decoder.trainable_cls_token"]
    assert set(recognize(whole)) == {"decoder", "siglip2"}
    for family in ("decoder", "siglip2"):
        check_family(whole, family, "x.pt")
    with pytest.raises(ConversionError, match="RAE's decoder with SigLIP2, not SiT"):
        check_family(whole, "sit", "x.pt")
