"""Each step of a packed decoder beside its plain twin, `LanguageModel.states` or `T5.states`."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from minivlm.layers import (
    T5,
    Attention,
    Block,
    Cache,
    LanguageModel,
    RopeScaling,
    T5Config,
    TransformerConfig,
    packed_decoding,
)
from minivlm.layers.lora import LoRAConfig, add_lora, lora_parameters, merge_lora
from minivlm.recording import record_attention
from minivlm.testing import assert_same
from tests.languages import GPT2, LLAMA, NEOX, OPT, OPT_350M, QWEN2, REDPAJAMA

CONFIGS = {
    "gpt2": GPT2,
    "opt": OPT,
    "opt-350m": OPT_350M,
    "llama": LLAMA,
    "llama3": replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0, original_context=20), tie_head=False),
    "qwen2": QWEN2,
    "gpt_neox": NEOX,
    "redpajama": REDPAJAMA,
    "wide heads": replace(LLAMA, head_width=6, kv_heads=1, heads=3),
    "gated with biases": replace(LLAMA, mlp_bias=True, out_bias=True),
}
FIRST_T5 = T5Config(width=12, depth=1, decoder_depth=3, heads=3, vocab_size=30, relative_buckets=6, relative_distance=9)
T5_CONFIGS = {
    "t5": replace(FIRST_T5, scale_head=True),
    "flan-t5": replace(FIRST_T5, activation="gelu_tanh", gated_mlp=True, tie_head=False, head_width=6, mlp_width=20),
}
TOKENS = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(0))
MASKS = {"even": None, "uneven": torch.arange(9) < torch.tensor([[9], [4], [6]])}


def model_of(config=LLAMA, dtype=torch.float64):
    kind = T5 if isinstance(config, T5Config) else LanguageModel
    return randomise(kind(config)).to(dtype).eval()


def randomise(model):
    """Biases and norms as well, which start at 0 and 1."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def plain(model, *arguments, **options):
    """A decoding that is not packed."""
    decoding = model.prefill(*arguments, **options)
    decoding.steps = 1
    return decoding


def assert_same_steps(model, mask=None, *, room=7, tolerance=None, **options):
    packed, twin = model.prefill(TOKENS, mask, room=room, **options), plain(model, TOKENS, mask, room=room)
    assert torch.equal(packed.logits, twin.logits)
    for i in range(7):
        tokens = (TOKENS[:, 0] + i) % 30
        packed.step(tokens)
        twin.step(tokens)
        assert_same(packed.logits, twin.logits, f"step {i}", tolerance=tolerance)
    assert packed.packed is not None and twin.packed is None
    return packed


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", {**CONFIGS, **T5_CONFIGS})
def test_packed_is_plain(config, mask):
    assert_same_steps(model_of({**CONFIGS, **T5_CONFIGS}[config]), MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("room", [7, 31])  # the cache is looked at as a whole, or in part
@pytest.mark.parametrize("config", [LLAMA, *T5_CONFIGS.values()], ids=["llama", *T5_CONFIGS])
def test_packed_is_plain_with_more_room(config, room, mask):
    assert_same_steps(model_of(config), MASKS[mask], room=room)


@pytest.mark.parametrize("config", [replace(LLAMA, context=300), T5_CONFIGS["t5"]], ids=["llama", "t5"])
def test_packed_is_plain_beyond_64_columns(config):
    model = model_of(config)
    packed, twin = model.prefill(TOKENS, room=200), plain(model, TOKENS, room=200)
    for i in range(70):
        packed.step(TOKENS[:, i % 9])
        twin.step(TOKENS[:, i % 9])
    assert_same(packed.logits, twin.logits)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", ["gpt2", "llama", "flan-t5"])
def test_packed_is_plain_in_bf16(config, mask):
    assert_same_steps(model_of({**CONFIGS, **T5_CONFIGS}[config], torch.bfloat16), MASKS[mask], tolerance=0.05)


def test_a_cache_does_not_forget_what_autocast_made_it():
    """Begun under autocast, a decoding computes in bf16 even where the autocast has ended."""
    model = model_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        decoding = model.prefill(TOKENS, room=2)
    decoding.step(TOKENS[:, 0])
    assert decoding.packed.dtype == decoding.cache.keys.dtype == torch.bfloat16
    exact = model.prefill(TOKENS, room=2)
    exact.step(TOKENS[:, 0])
    assert 0 < (decoding.logits - exact.logits).abs().max() < 0.2 and exact.packed.dtype == torch.float32


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", [LLAMA, T5_CONFIGS["flan-t5"]], ids=["llama", "t5"])
def test_rows_go_on_as_others_did(config, mask):
    model = model_of(config)
    packed, twin = (
        begin(TOKENS, MASKS[mask], room=4) for begin in (model.prefill, lambda *a, **o: plain(model, *a, **o))
    )
    for rows in ([2, 0, 0, 1], [3, 3], [0, 1]):
        for decoding in (packed, twin):
            decoding.reorder(torch.tensor(rows))
            decoding.step(torch.arange(len(rows)))
        assert_same(packed.logits, twin.logits, str(rows))


def test_the_cache_is_as_the_plain_twin_leaves_it():
    """So a conversation can go on with a further prompt."""
    model = model_of()
    packed, twin = model.prefill(TOKENS, room=4), plain(model, TOKENS, room=4)
    for decoding in (packed, twin):
        decoding.step(TOKENS[:, 0])
    a, b = (model.states(model.embed(TOKENS[:, :2]), cache=d.cache) for d in (packed, twin))
    assert_same(a, b)


def test_a_text_without_a_single_token_is_read_the_plain_way():
    decoding = model_of(T5_CONFIGS["t5"]).prefill(TOKENS, torch.arange(9) < torch.tensor([[9], [0], [6]]), room=2)
    decoding.step(TOKENS[:, 0])
    assert decoding.packed is None and decoding.logits.isfinite().all()


@pytest.mark.parametrize("config", [LLAMA, T5_CONFIGS["t5"]], ids=["llama", "t5"])
def test_whoever_records_attention_misses_no_step(config):
    model = model_of(config)
    said = model.generate(TOKENS, max_new_tokens=5)  # leaves a packing behind
    assert model.packing.current is not None
    with record_attention(model.decoder if isinstance(model, T5) else model.transformer) as maps:
        assert torch.equal(model.generate(TOKENS, max_new_tokens=5), said)
    assert {len(weights) for weights in maps.values()} == {5} and model.prefill(TOKENS, room=2).packed is None
    assert_same_steps(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_is_its_linears_side_by_side(bias, dtype):
    linears = [nn.Linear(40, n, bias=bias, dtype=dtype) for n in (7, 33)]
    matrix = packed_decoding.Matrix.of(*linears, dtype=dtype)
    assert (
        matrix.weight.is_mkldnn == packed_decoding.in_blocks(torch.device("cpu"), dtype)
        and matrix.weight.dtype == dtype
    )
    for B in (1, 2, 9):
        x = torch.randn(B, 40)
        assert_same(matrix(x), torch.cat([linear(x.to(dtype)) for linear in linears], dim=1))


@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("read", [True, False], ids=["with a context", "without"])
def test_a_block_that_reads_at_either_place_of_its_norms(read, place):
    config = TransformerConfig(width=12, depth=1, heads=3, causal=True, norm_place=place)
    block = randomise(Block(config, cross_attention=True)).double().eval()
    x, context = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    cache = Cache(1, 2, 3, 1, 4, dtype=torch.float64)
    cache.begin(1)
    source = block.cross_attention.keys_values(context) if read else None
    sight = packed_decoding.Visible.of(None, None, x, block.attention, x.dtype)
    packed = packed_decoding.PackedBlock(block, x.dtype)(x, None, cache.layer(0), sight, source, sight)
    assert_same(packed, block(x[:, None], source)[:, 0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [None, (1, 4, 1, 5)], ids=["", "bias"])
@pytest.mark.parametrize("mask", [None, (1, 5), (3, 1, 1, 5)], ids=str)
def test_what_is_seen_on_a_cpu_is_what_is_seen_elsewhere(mask, bias, kv_heads):
    a = Attention(8, 4, kv_heads=kv_heads)
    q, k, v = torch.randn(3, 4, 1, 2), torch.randn(3, kv_heads, 5, 2), torch.randn(3, kv_heads, 5, 2)
    bias = None if bias is None else torch.randn(bias)
    mask = None if mask is None else (torch.rand(mask) < 0.5).index_fill(-1, torch.tensor([0]), True)
    seen = packed_decoding.Visible.of(mask, bias, torch.zeros(3, 8), a, torch.float32)
    assert seen.added is not None
    assert_same(seen.attend(a, q, k, v), packed_decoding.Visible(mask, bias, None).attend(a, q, k, v))


def test_no_room_left():
    model = model_of()
    for static in (False, True):
        decoding = model.prefill(TOKENS, room=1, static=static)
        decoding.step(TOKENS[:, 0])
        with pytest.raises(ValueError, match="no room for another token"):
            decoding.step(TOKENS[:, 0])


class TestWeights:
    """What is laid out is a copy, so it has to follow the weights, and to stay out of everyone's way."""

    @pytest.mark.parametrize("config", [LLAMA, T5_CONFIGS["t5"]], ids=["llama", "t5"])
    def test_one_copy_serves_all_until_the_weights_change(self, config):
        model = model_of(config)
        assert model.prefill(TOKENS, room=2).packed is None  # not before the first token is out
        first, second = assert_same_steps(model), assert_same_steps(model)
        assert first.packed is second.packed

    @pytest.mark.parametrize("speak_before", ["the forward", "the update"])
    @pytest.mark.parametrize("fused", [False, True])  # fused optimisers do not count their changes
    @pytest.mark.parametrize("config", [LLAMA, T5_CONFIGS["t5"]], ids=["llama", "t5"])
    def test_after_training(self, config, fused, speak_before):
        model = model_of(config, torch.float32)  # in eval mode all along
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        if speak_before == "the forward":
            assert_same_steps(model)
        given = (TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), TOKENS)
        sum(model.losses(*(given if isinstance(model, T5) else given[::2])).values()).backward()
        assert model.packing.current is None
        if speak_before == "the update":
            assert_same_steps(model)
        optimiser.step()
        optimiser.zero_grad()
        assert_same_steps(model)

    def test_there_is_none_while_training(self):
        for config in (LLAMA, T5_CONFIGS["t5"]):
            assert_same_steps(model := model_of(config))
            decoding = model.train().prefill(TOKENS, room=2)
            decoding.step(TOKENS[:, 0])
            assert decoding.packed is None

    def test_after_other_weights_were_loaded_in_place_or_assigned(self):
        for assign in (False, True):
            model, other = model_of(), model_of()
            assert_same_steps(model)
            model.load_state_dict(other.state_dict(), assign=assign)
            assert_same_steps(model)

    def test_after_another_dtype(self):
        model = model_of()
        assert_same_steps(model)
        model.float()
        assert model.packing.current is None
        assert_same_steps(model)

    def test_adapters_are_merged_in_it_while_they_learn_and_when_they_are_merged(self):
        model = model_of()
        assert_same_steps(model)
        add_lora(model, LoRAConfig(rank=2, targets=("q_proj", "v_proj", "down_proj")))
        for step in (lambda p: nn.init.normal_(p, std=0.3), lambda p: p.add_(0.1)):
            with torch.no_grad():
                for parameter in lora_parameters(model):
                    step(parameter)
            assert_same_steps(model)
        merge_lora(model)
        assert_same_steps(model)

    @pytest.mark.parametrize("config", [LLAMA, T5_CONFIGS["t5"]], ids=["llama", "t5"])
    def test_it_is_neither_saved_nor_copied(self, config):
        model = model_of(config)
        names = list(model.state_dict())
        assert_same_steps(model)
        assert model.packing.current is not None
        assert list(model.state_dict()) == names
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.packing.current is None
            assert_same_steps(twin)

    def test_what_is_too_large_or_reads_a_context_goes_the_plain_way(self, monkeypatch):
        reader = model_of(replace(LLAMA, cross_attention_every=1))
        monkeypatch.setattr(packed_decoding, "LARGEST", 1000)
        for model in (reader, model_of()):
            decoding = model.prefill(TOKENS, room=2)
            decoding.step(TOKENS[:, 0])
            assert decoding.packed is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("largest", [packed_decoding.LARGEST, 0], ids=["packed", "plain"])
def test_a_compiled_step_is_compiled_once(largest, mask, backend, monkeypatch):
    monkeypatch.setattr(packed_decoding, "LARGEST", largest)
    torch._dynamo.reset()
    model, counter = model_of(dtype=torch.float32), CompileCounter()
    for _ in range(2):  # the second conversation finds everything compiled
        compiled, eager = (model.prefill(TOKENS, MASKS[mask], room=8, static=static) for static in (True, False))
        compiled.compile(backend=counter if backend == "eager" else backend)
        for i in range(8):
            tokens = eager.logits.argmax(dim=-1)
            assert torch.equal(compiled.logits.argmax(dim=-1), tokens), f"token {i}"
            compiled.step(tokens)
            eager.step(tokens)
            assert_same(compiled.logits, eager.logits)
        assert (compiled.packed is None) == (largest == 0)
    assert counter.frame_count == (backend == "eager")


def test_what_lies_in_blocks_is_not_compiled():
    torch._dynamo.reset()
    model = model_of(dtype=torch.bfloat16)
    compiled, eager = model.prefill(TOKENS, room=8, static=True), plain(model, TOKENS, room=8)
    compiled.compile(backend="aot_eager")
    for decoding in (compiled, eager):
        decoding.step(TOKENS[:, 0])
    assert (compiled.packed is None) == packed_decoding.in_blocks(torch.device("cpu"), torch.bfloat16)
    assert_same(compiled.logits, eager.logits, tolerance=0.05)
