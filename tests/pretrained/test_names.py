import importlib
import pkgutil
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from minivlm import pretrained
from minivlm.errors import UserError
from minivlm.pretrained.names import IGNORED, Row, table, tied, to_ours, to_theirs, under

ROWS = under(
    table("""
        layers.*.norm           blocks.*.norm
        layers.*.qkv.weight     blocks.*.{q,k,v}.weight
        proj                    out.weight                  transpose
        scale|old_scale         scale                       one
        temperature             logit_scale                 temperature
    """),
    ("", "model."),
    "tower.",
)


LOGIT_SCALE = {"tower.logit_scale": torch.tensor(0.0)}  # is a temperature of one


def ours():
    """Every kind of row, twice where it has a layer number."""
    state = {f"tower.blocks.{i}.{name}.weight": torch.randn(2, 3) for i in (0, 11) for name in ("q", "k", "v")}
    state |= {f"tower.blocks.{i}.norm.{name}": torch.randn(3) for i in (0, 11) for name in ("weight", "bias")}
    return {**state, "tower.out.weight": torch.randn(4, 3), "tower.scale": torch.tensor(2.5), **LOGIT_SCALE}


def test_to_theirs_follows_the_table():
    state = ours()
    theirs = to_theirs(state, ROWS)
    assert set(theirs) == {
        *(f"layers.{i}.{name}" for i in (0, 11) for name in ("norm.weight", "norm.bias", "qkv.weight")),
        *("proj", "scale", "temperature"),
    }
    assert to_theirs({"tower.logit_scale": torch.tensor(2.0)}, ROWS)["temperature"].item() == pytest.approx(0.1353353)
    assert theirs["layers.11.qkv.weight"].shape == (6, 3)
    assert torch.equal(theirs["layers.11.qkv.weight"][2:4], state["tower.blocks.11.k.weight"])
    assert torch.equal(theirs["proj"], state["tower.out.weight"].T)
    assert theirs["scale"].tolist() == [2.5]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_to_ours_is_the_reverse_under_every_spelling(prefix):
    state = ours()
    theirs = {prefix + name: tensor for name, tensor in to_theirs(state, ROWS).items()}
    theirs[prefix + "old_scale"] = theirs.pop(prefix + "scale")
    back = to_ours(theirs, state, ROWS, "x")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_to_ours_copies_nothing():
    state = ours()
    theirs = to_theirs(state, ROWS)
    back = to_ours(theirs, state, ROWS, "x")
    assert back.pop("tower.logit_scale") == 0 and theirs.pop("temperature") == 1  # the only one that is computed
    memory = {t.untyped_storage().data_ptr() for t in theirs.values()}
    assert {t.untyped_storage().data_ptr() for t in back.values()} == memory


def test_a_number_may_be_stored_with_or_without_an_axis():
    state = {"tower.scale": torch.tensor(1.0)}
    for stored in (torch.tensor(3.0), torch.tensor([3.0])):
        assert to_ours({"scale": stored}, state, ROWS, "x")["tower.scale"].shape == ()


def test_everything_that_does_not_fit_is_named():
    state = ours()
    theirs = to_theirs(state, ROWS)
    del theirs["layers.0.qkv.weight"], theirs["layers.11.norm.bias"]
    theirs |= {"proj": torch.zeros(4, 3), "stranger.weight": torch.zeros(1), "layers.0.norm.bias": torch.zeros(3).int()}
    with pytest.raises(UserError) as error:
        to_ours(theirs, state, ROWS, "file.safetensors")
    message = str(error.value)
    assert message.startswith("file.safetensors ") and "\n" not in message
    assert "2 missing (layers.0.qkv.weight, layers.11.norm.bias)" in message
    assert "1 unexpected (stranger.weight)" in message
    assert "layers.0.norm.bias is int32, proj is (4, 3) instead of (3, 4)" in message


def test_long_lists_are_cut_with_their_count():
    with pytest.raises(UserError, match=r"12 missing \(w0, .*, w7 and 4 more\)"):
        to_ours({}, {f"w{i}": torch.zeros(1) for i in range(12)}, None, "x")


def test_a_layer_too_many_is_unexpected():
    state = ours()
    theirs = to_theirs(state, ROWS)
    with pytest.raises(UserError, match=r"3 unexpected \(layers.11"):
        to_ours(theirs, {k: v for k, v in state.items() if ".11." not in k}, ROWS, "x")


@pytest.mark.parametrize(
    "name",
    [
        "text_model.embeddings.position_ids",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "transformer.h.11.attn.masked_bias",
        "visual.bn1.num_batches_tracked",
        "input_resolution",
    ],
)
def test_buffers_without_effect_are_ignored(name):
    assert IGNORED.fullmatch(name)
    assert to_ours({name: torch.zeros(1)}, {}, None, "x") == {}


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.bias", "model.vocab_size", "layers.0.attn.bias"])
def test_weights_with_similar_names_are_not_ignored(name):
    with pytest.raises(UserError, match="1 unexpected"):
        to_ours({name: torch.zeros(1)}, {}, None, "x")


def test_counters_of_batch_norm_need_not_be_there():
    with torch.device("meta"):
        norm = nn.BatchNorm2d(3)
    state = norm.state_dict(keep_vars=True)
    stored = {k: torch.ones(3) for k in state if k != "num_batches_tracked"}
    assert to_ours(stored, state, None, "x")["num_batches_tracked"].item() == 0


def test_tied_tensors_share_whichever_name_is_stored():
    head, embedding = nn.Linear(2, 5, bias=False), nn.Embedding(5, 2)
    head.weight = embedding.weight
    state = nn.ModuleDict({"embedding": embedding, "head": head}).state_dict(keep_vars=True)
    assert tied(state) == [["embedding.weight", "head.weight"]]
    stored = torch.randn(5, 2)
    for name in ("embedding.weight", "head.weight"):
        found = to_ours({name: stored}, state, None, "x")
        assert found["embedding.weight"] is found["head.weight"] is stored


def test_a_table_without_a_row_is_a_mistake_of_ours():
    with pytest.raises(KeyError, match=r"no row for other\.weight"):
        to_theirs({"other.weight": torch.zeros(1)}, ROWS)


ROLES = {
    "q": r"(?:to_)?q(?:_proj|_ln|_layer_norm)?|query",
    "k": r"(?:to_)?k(?:_proj|_ln|_layer_norm)?|key",
    "v": r"(?:to_)?v(?:_proj)?|value",
    "gate": r"gate_proj|wi_0",
    "up": r"up_proj|mlp_up|fc1|c_fc|wi|wi_1|linear_1|dense_h_to_4h",
    "down": r"down_proj|mlp_down|fc2|wo|linear_2|dense_4h_to_h",
}


def roles_of(name):
    """What a tensor is for, as far as its name says so: of `layers.*.self_attn.q_proj.weight` q."""
    last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    return {role for role, words in ROLES.items() if re.fullmatch(words, last)}


def test_in_every_table_queries_are_queries_and_gates_are_gates():
    """A table that mistakes one for another goes there and back without a loss: only published weights would tell."""
    rows = set()
    for about in pkgutil.iter_modules(pretrained.__path__, "minivlm.pretrained."):
        module = importlib.import_module(about.name)
        tables = [value for value in vars(module).values() if isinstance(value, (list, dict))]
        lists = [value for table in tables for value in (table.values() if isinstance(table, dict) else [table])]
        rows |= {row for some in lists if isinstance(some, list) for row in some if isinstance(row, Row)}
    assert len(rows) > 300
    told = set()
    for row in rows:
        ours = re.match(
            r"(q|k|v|gate|up|down)_(?:proj|norm)$", re.sub(r"\.(weight|bias)$", "", row.ours).rpartition(".")[2]
        )
        if row.parts > 1 and ours is not None:
            gated = ours[1] in ("gate", "up")
            assert ours[1] == (("gate", "up") if gated else "qkv" if row.parts == 3 else "kv")[row.part], row
        elif ours is not None:
            for theirs in row.theirs:
                assert roles_of(theirs) <= {ours[1]}, row
                told |= roles_of(theirs)
    assert told == set(ROLES)


def test_parts_that_are_woven_head_by_head():
    rows = [replace(row, heads=2) for row in table("qkv {q,k,v}")]
    ours = {f"{part}.weight": torch.arange(4.0) + 10 * i for i, part in enumerate("qkv")}
    theirs = to_theirs(ours, rows)
    assert theirs["qkv.weight"].tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    back = to_ours(theirs, ours, rows, "file")
    assert all(torch.equal(back[name], ours[name]) for name in ours)
