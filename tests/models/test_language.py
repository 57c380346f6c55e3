"""The language model against transformers' Qwen2, and its presets against the released sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.convert.qwen2 import model_of_config, qwen2_rules, tie_head
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.prompts import IGNORED
from dsr_jax.models.language import QWEN2, LanguageModel
from dsr_jax.training.language_loss import language_loss


def _reference(kv_heads, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(kv_heads)
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.add_(0.1 * torch.randn_like(tensor) if "weight" in name else 0.3)
    return torch, network, config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False), (1, True)])
def test_equals_transformers_with_right_padding(kv_heads, tied):
    torch, network, config = _reference(kv_heads, tied)
    state = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    state = tie_head(state, tied)
    model = model_of_config(config, state)
    rules = qwen2_rules(model)
    params = torch_to_flax(state, rules)
    back = flax_to_torch(params, rules)
    assert {name: value.tobytes() for name, value in back.items()} == {
        name: value.tobytes() for name, value in state.items()
    }
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    mask = np.ones_like(tokens)
    mask[1, 6:] = 0
    with torch.no_grad():
        want = network(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        got = np.asarray(model.apply({"params": params}, jnp.asarray(tokens)))
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=2e-4, atol=2e-5)


def test_presets_have_the_released_numbers_of_parameters():
    counts = {}
    for name, sizes in QWEN2.items():
        model = LanguageModel(**sizes)
        model.check_sizes()
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        counts[name] = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) / 1e9
    expected = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616}
    assert {name: round(count, 3) for name, count in counts.items()} == expected


def test_restricted_positions_give_the_same_loss_and_gradients():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 12, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(8, 20)), jnp.float32)
    targets = rng.integers(0, 20, (3, 12))
    targets[0, :9], targets[1, 3:], targets[2, ::2] = IGNORED, IGNORED, IGNORED

    def loss(hidden, table, max_targets):
        sums = language_loss(lambda x: x @ table, hidden, jnp.asarray(targets), max_targets)
        return sums.total.sum() / sums.tokens.sum()

    whole, few = (jax.value_and_grad(loss, (0, 1))(hidden, table, n) for n in (0, 6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, few)


def test_errors_name_the_setting():
    sizes = {"vocab_size": 8, "hidden_size": 12, "depth": 1, "num_heads": 3, "mlp_dim": 8}
    with pytest.raises(ConfigError, match="no multiple of num_kv_heads=2"):
        LanguageModel(**sizes, num_kv_heads=2).check_sizes()
    with pytest.raises(ConfigError, match="hidden_size=12 does not divide"):
        LanguageModel(**{**sizes, "num_heads": 4}, num_kv_heads=2).check_sizes()
    with pytest.raises(ConversionError, match="use_sliding_window=True"):
        model_of_config({"use_sliding_window": True})
    with pytest.raises(ConversionError, match="lacks vocab_size"):
        model_of_config({"hidden_size": 8})


def test_a_tied_head_is_dropped_only_if_it_equals_the_embedding():
    state = {"model.embed_tokens.weight": np.ones((2, 3)), "lm_head.weight": np.ones((2, 3))}
    assert list(tie_head(state, tied=True)) == ["model.embed_tokens.weight"]
    assert list(tie_head(state, tied=False)) == list(state)
    state["lm_head.weight"] = np.zeros((2, 3))
    with pytest.raises(ConversionError, match=r"lm_head.weight differs"):
        tie_head(state, tied=True)
