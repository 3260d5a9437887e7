import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import GatedConfig, GatedCrossAttention, image_mask
from minivlm.testing import (
    assert_batch_independent,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_images_seen_only_where_allowed,
    assert_same,
    assert_zero_gates_change_nothing,
)

B, T, D, C, L = 2, 7, 16, 12, 3
IDEFICS = GatedConfig(norm="rmsnorm", activation="silu", gated_mlp=True, qk_norm="rmsnorm", gate="channel")
OPENFLAMINGO = GatedConfig(heads=4, head_width=6, mlp_width=20, activation="gelu")
CONFIGS = {"idefics": IDEFICS, "openflamingo": OPENFLAMINGO, "flamingo": GatedConfig()}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
BEND = {
    "silu": F.silu,
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x) ** 2,
}  # the last: Alayrac et al. 2022, §A.1.2

PLACEHOLDER, PAD = 9, 0
TOKENS = torch.tensor([[1, PLACEHOLDER, 2, PLACEHOLDER, 3, PLACEHOLDER, 4], [1, 2, 3, PLACEHOLDER, 4, PAD, PAD]])


def layer(config, opened=True):
    block = GatedCrossAttention(D, 2, context_width=C, config=config).double().eval()
    if opened:
        for p in block.parameters():
            p.data += 0.4 * torch.randn_like(p)
    return block


def inputs(images=3):
    return torch.randn(B, T, D).double(), torch.randn(B, images * L, C).double()


@every_config
class TestLayer:
    def test_the_formula(self, config):
        block, (x, images) = layer(config), inputs()
        mask = image_mask(TOKENS, PLACEHOLDER, 3, latents=L)
        a = block.attention
        norm = lambda n, t: t if n is None else n(t)
        heads = lambda t: t.unflatten(-1, (a.heads, a.head_width)).transpose(1, 2)
        q = norm(a.q_norm, heads(a.q_proj(block.attention_norm(x))))
        k, v = norm(a.k_norm, heads(a.k_proj(images))), heads(a.v_proj(images))
        scores = (q @ k.transpose(2, 3) / a.head_width**0.5).masked_fill(~mask[:, None], -torch.inf)
        heard = scores.softmax(dim=-1).nan_to_num(0.0) @ v  # who sees nothing hears nothing
        y = x + block.attention_gate.tanh() * a.out_proj(heard.transpose(1, 2).flatten(2))
        h = block.mlp_norm(y)
        gate = block.mlp.gate_proj
        bend, up = BEND[config.activation], block.mlp.up_proj(h)
        hidden = bend(up) if gate is None else bend(gate(h)) * up
        assert_same(block(x, images, mask), y + block.mlp_gate.tanh() * block.mlp.down_proj(hidden))

    def test_gates_are_closed_at_the_start(self, config):
        block, (x, images) = layer(config, opened=False), inputs()
        assert block.openness().tolist() == [0, 0]
        gates = [block.attention_gate, block.mlp_gate]
        assert_zero_gates_change_nothing(block, lambda x, _: x, x, images, gates=gates)
        y = block(x, images)
        assert_gradient_reaches(y, {"attention": gates[0], "mlp": gates[1]})
        assert_gradient_does_not_reach(y, {n: p for n, p in block.named_parameters() if "gate" not in n.split("_")[-1]})

    def test_opened_everything_learns(self, config):
        block, (x, images) = layer(config), inputs()
        assert_gradient_reaches(block(x, images), block)

    @pytest.mark.parametrize("attend_to", ["last", "all"])
    def test_each_token_attends_to_its_images_alone(self, config, attend_to):
        block, (x, images) = layer(config), inputs()
        mask = image_mask(TOKENS, PLACEHOLDER, 3, latents=L, attend_to=attend_to)
        allowed = image_mask(TOKENS, PLACEHOLDER, 3, attend_to=attend_to)
        read = lambda apart: block(x, apart.flatten(1, 2), mask)
        assert_images_seen_only_where_allowed(read, images.unflatten(1, (3, L)), allowed)

    def test_who_sees_no_image_passes_the_attention_half_untouched(self, config):
        block, (x, images) = layer(config), inputs()
        y = block(x, images, image_mask(TOKENS, PLACEHOLDER, 3, latents=L))
        none = block(x, None)
        assert torch.equal(y[0, 0], none[0, 0]) and torch.equal(y[1, :3], none[1, :3])
        block.mlp_gate.data.zero_()
        assert torch.equal(block(x, None), x)

    def test_remembered_images(self, config):
        block, (x, images) = layer(config), inputs()
        mask = image_mask(TOKENS, PLACEHOLDER, 3, latents=L)
        assert torch.equal(block(x, block.keys_values(images), mask), block(x, images, mask))
        assert_batch_independent(block, x, images, mask)

    def test_openness(self, config):
        block = layer(config)
        block.attention_gate.data.fill_(-0.5)
        block.mlp_gate.data.fill_(0.1)
        assert_same(block.openness(), torch.tensor([-0.5, 0.1], dtype=torch.float64).tanh().abs())


def drawn(*rows):
    return torch.tensor([[cell == "■" for cell in row] for row in rows])


class TestMask:
    def test_entry_by_entry_the_last_image(self):
        mask = image_mask(TOKENS, PLACEHOLDER, 3)
        assert torch.equal(mask[0], drawn("···", "■··", "■··", "·■·", "·■·", "··■", "··■"))
        assert torch.equal(mask[1], drawn("···", "···", "···", "■··", "■··", "■··", "■··"))

    def test_entry_by_entry_all_images(self):
        mask = image_mask(TOKENS, PLACEHOLDER, 3, attend_to="all")
        assert torch.equal(mask[0], drawn("···", "■··", "■··", "■■·", "■■·", "■■■", "■■■"))
        assert torch.equal(mask[1], image_mask(TOKENS, PLACEHOLDER, 3)[1])

    def test_latents_of_an_image_stand_together(self):
        mask = image_mask(TOKENS[:1, :4], PLACEHOLDER, 2, latents=2)
        assert torch.equal(mask[0], drawn("····", "■■··", "■■··", "··■■"))

    def test_images_beyond_the_marks_are_seen_by_none(self):
        for attend_to in ("last", "all"):
            mask = image_mask(TOKENS, PLACEHOLDER, 5, attend_to=attend_to)
            assert not mask[..., 3:].any() and not mask[1, :, 1:].any()
            assert torch.equal(mask[..., :3], image_mask(TOKENS, PLACEHOLDER, 3, attend_to=attend_to))

    def test_no_image(self):
        assert image_mask(TOKENS, PLACEHOLDER, 0).shape == (2, 7, 0)

    def test_another_word(self):
        with pytest.raises(ValueError, match="attend_to is 'next'; there are last and all"):
            image_mask(TOKENS, PLACEHOLDER, 3, attend_to="next")


def test_the_arguments_of_earlier_versions_are_refused_in_a_sentence():
    with pytest.raises(TypeError, match=r"write GatedCrossAttention\(width, heads, context_width=…, config=…\)"):
        GatedCrossAttention(16, 16, GatedConfig())
