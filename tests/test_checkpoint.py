import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minivlm
from minivlm import atomic_writing
from minivlm.atomic_writing import write_atomically
from minivlm.checkpoint import load, save
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers import ResNetConfig, TextConfig, VisionConfig
from minivlm.layers.lora import LoRAConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.models.momentum import MomentumConfig
from minivlm.processor import Processor
from tests import speakers
from tests.models.test_blip import blip

TEXT = TextConfig(width=16, depth=1, heads=2, vocab_size=300, context=8, end_token=3)
VIT = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8)
RESNET = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=32)
CONFIG = CLIPConfig(vision=VIT, text=TEXT, embed_width=12)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.train(["a red disc", "a blue ring"], vocab_size=300, image_size=16, context=8)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, other = a.state_dict(), b.state_dict()
    return ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def temporary_files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if "tmp" in path.name]


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, vision=RESNET, image_projection=False),
        replace(CONFIG, loss="sigmoid", loss_chunk=4, vision=replace(VIT, pool="mean", patch_bias=True)),
    ],
    ids=["ViT", "ResNet", "sigmoid"],
)
def test_a_model_comes_back_as_it_was(config, processor, tmp_path):
    model = CLIP(config)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # buffers count as well
            norm.running_mean.normal_()
            norm.num_batches_tracked.fill_(7)
    save(tmp_path / "new" / "clip", model, processor)
    back, back_processor = load(tmp_path / "new" / "clip")
    assert type(back) is CLIP and back.config == config and same_state(model, back)
    assert not back.training
    assert back_processor.config == processor.config
    assert back_processor.decode(back_processor.text(["a red ring"])[0]) == ["a red ring"]
    assert sorted(path.name for path in (tmp_path / "new" / "clip").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]


def test_the_verbs_of_the_model(tmp_path):
    model = CLIP(CONFIG)
    model.save_pretrained(tmp_path)
    assert same_state(CLIP.from_pretrained(str(tmp_path)), model)
    assert load(tmp_path)[1] is None
    assert minivlm.load is load


def test_anyone_may_read_what_is_written(tmp_path):
    save(tmp_path, CLIP(CONFIG))
    expected = (tmp_path / "reference").touch() or (tmp_path / "reference").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {expected}


def test_other_files_stay_and_old_ones_are_replaced(processor, tmp_path):
    save(tmp_path, CLIP(CONFIG, seed=1), processor)
    (tmp_path / "log.jsonl").write_text("kept")
    model = CLIP(replace(CONFIG, embed_width=6), seed=2)
    save(tmp_path, model)
    assert (tmp_path / "log.jsonl").read_text() == "kept"
    back, no_processor = load(tmp_path)
    assert same_state(back, model) and no_processor is None


def test_saving_over_the_file_that_a_model_is_mapped_from(tmp_path):
    save(tmp_path, CLIP(CONFIG))
    model, _ = load(tmp_path)
    with torch.no_grad():
        model.loss.logit_scale.fill_(1.5)
    save(tmp_path, model)
    assert same_state(load(tmp_path)[0], model) and model.loss.logit_scale.item() == 1.5


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_parameters_lie_in_the_mapped_file(tmp_path):
    save(tmp_path, CLIP(CONFIG))
    model, _ = load(tmp_path)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert ranges
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)


def test_training_works_and_does_not_write_into_the_file(tmp_path):
    save(tmp_path, CLIP(CONFIG))
    before = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest()
    model, _ = load(tmp_path)
    original = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    tokens = torch.randint(4, 300, (4, 8))
    model.train()(torch.randn(4, 3, 16, 16), tokens, torch.ones_like(tokens, dtype=torch.bool)).loss.backward()
    optimiser.step()
    for name, p in model.named_parameters():
        assert p.requires_grad and p.is_leaf and not torch.equal(p, original[name]), name
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest() == before


def test_dtype_is_as_stored_or_as_asked_for(tmp_path):
    save(tmp_path, CLIP(CONFIG).to(torch.bfloat16))
    assert {p.dtype for p in load(tmp_path)[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float64)[0].parameters()} == {torch.float64}
    resnet = CLIP(replace(CONFIG, vision=RESNET, image_projection=False))
    save(tmp_path, resnet)
    counters = [b for name, b in load(tmp_path, dtype=torch.float16)[0].named_buffers() if "num_batches" in name]
    assert counters and all(b.dtype == torch.int64 for b in counters)


def test_loading_computes_no_initial_values_and_imports_nothing_heavy(tmp_path):
    """torch's decompositions, which initialising on the meta device would import, cost a second."""
    save(tmp_path, CLIP(replace(CONFIG, vision=RESNET, image_projection=False)))
    code = f"import sys, minivlm; minivlm.load({str(tmp_path)!r}); print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout == "False\n", run.stderr


def test_an_empty_model_keeps_what_is_set_on_purpose():
    class Half(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    assert not empty_model(Half, None).frozen.weight.requires_grad


@dataclass(frozen=True)
class TiedConfig:
    width: int = 4


class Tied(nn.Module):
    """Two names for one tensor, a frozen one, and a view of another."""

    config_class = TiedConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(6, config.width)
        self.head = nn.Linear(config.width, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("twice", torch.arange(4.0).expand(2, 4))


def test_tied_frozen_and_overlapping_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(minivlm, "Tied", Tied, raising=False)
    model = Tied(TiedConfig())
    model.register_buffer("view", model.twice[1])
    save(tmp_path, model)
    assert set(load_file(tmp_path / "model.safetensors")) == {"embedding.weight", "frozen", "twice", "view"}
    with pytest.raises(UserError, match=r"1 unexpected \(view\)"):
        load(tmp_path)
    del model.view
    save(tmp_path, model)
    back, _ = load(tmp_path)
    assert same_state(model, back)
    assert back.head.weight is back.embedding.weight and back.head.weight.requires_grad
    assert not back.frozen.requires_grad


def test_what_is_frozen_is_frozen_in_the_model_that_comes_back(tmp_path):
    """The slow copies of a BLIP, and all of a language model but its adapters."""
    adapted = speakers.llava(lora=LoRAConfig(rank=2, alpha=4))
    for name, model in {"momentum": blip(momentum=MomentumConfig(queue=4)), "lora": adapted}.items():
        save(tmp_path / name, model)
        learns = {name: p.requires_grad for name, p in load(tmp_path / name)[0].named_parameters()}
        assert learns == {name: p.requires_grad for name, p in model.named_parameters()}
        assert len(set(learns.values())) == 2


# ---- a full disk, and other ways to fail -----------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_safetensors(*args, **kwargs):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("safetensors.torch.save_file", full),
        ("safetensors.torch.save_file", full_in_safetensors),
        ("pathlib.Path.write_text", full),
        ("os.fsync", full),
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(where, failure, processor, tmp_path, monkeypatch):
    model = CLIP(CONFIG, seed=1)
    save(tmp_path, model, processor)
    with monkeypatch.context() as patch:
        patch.setattr(where, failure)
        with pytest.raises(
            UserError, match=r"could not be written to .*: the disk is full\. What was there before is untouched"
        ):
            save(tmp_path, CLIP(CONFIG, seed=2), processor)
    assert not temporary_files(tmp_path)
    assert same_state(load(tmp_path)[0], model)


def test_nothing_is_renamed_before_all_is_written(processor, tmp_path, monkeypatch):
    """Weights first, config last, and none of them before the last is on the disk."""
    events = []
    replace_file, flush = os.replace, atomic_writing.flush_to_disk
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(Path(b).name) or replace_file(a, b))
    monkeypatch.setattr(atomic_writing, "flush_to_disk", lambda path: events.append("flush") or flush(path))
    save(tmp_path, CLIP(CONFIG), processor)
    renamed = [event for event in events if event != "flush"]
    assert renamed == [atomic_writing.UNFINISHED, "model.safetensors", "tokenizer.json", "config.json"]
    assert events[:6] == ["flush"] * 5 + [atomic_writing.UNFINISHED] and events[-1] == "flush"


def whole(seed, processor):
    """A model, and what it is in a directory: two of them differ in every file."""
    width, mean = (16, (0.5, 0.5, 0.5)) if seed == 1 else (32, (0.4, 0.5, 0.6))
    text = replace(TEXT, vocab_size=processor.vocab_size, end_token=processor.end_token)
    model = CLIP(replace(CONFIG, vision=replace(VIT, width=width), text=text), seed=seed)
    words = processor if seed == 1 else Processor.train(["a green star"], vocab_size=300, image_size=16, context=8)
    return model, Processor(words.tokenizer, replace(words.config, mean=mean))


@pytest.mark.parametrize("layout", ["minivlm", "hf"])
def test_a_kill_at_any_renaming_leaves_the_old_model_or_the_new_one(layout, processor, tmp_path, monkeypatch):
    old, new = (whole(seed, processor) for seed in (1, 2))
    told, originals = [], (os.replace, Path.unlink)
    for at in range(1, 12):
        directory, calls = tmp_path / str(at), []
        save(directory, *old, layout=layout)

        def killed(original, calls=calls, at=at):
            def call(*args, **kwargs):
                calls.append(args)
                if len(calls) >= at:  # and nothing is cleared up any more
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", killed(originals[0]))
            patch.setattr(Path, "unlink", killed(originals[1]))
            save(directory, *new, layout=layout)
        model, words = load(directory)
        told.append("old" if model.config.vision.width == old[0].config.vision.width else "new")
        expected, wanted = old if told[-1] == "old" else new
        assert same_state(model, expected)
        assert words.config.mean == wanted.config.mean
        assert words.text(["a red green star"])[0].tolist() == wanted.text(["a red green star"])[0].tolist()
        assert not (directory / atomic_writing.UNFINISHED).exists()
        save(directory, *new, layout=layout)
        assert same_state(load(directory)[0], new[0])
    assert told == ["old", *["new"] * 10]  # the first renaming is the switch


def test_what_was_broken_off_and_cannot_be_put_in_place_is_one_sentence(processor, tmp_path, monkeypatch):
    save(tmp_path, CLIP(CONFIG), processor)
    (tmp_path / atomic_writing.UNFINISHED).write_text(json.dumps({"config.json": ".config.json.7.tmp"}))
    (tmp_path / ".config.json.7.tmp").write_text("{}")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="was interrupted, and its files cannot be renamed now"):
        load(tmp_path)


@pytest.mark.parametrize(
    "entry", [{"../a": "..a.7.tmp"}, {"a": "../x"}, {"a": ".b.7.tmp"}, {"a": 7}, {"a": [".a.7.tmp"]}]
)
def test_a_planted_list_of_files_moves_nothing(entry, processor, tmp_path):
    save(tmp_path, CLIP(CONFIG), processor)
    (tmp_path / atomic_writing.UNFINISHED).write_text(json.dumps(entry))
    with pytest.raises(UserError, match="is not a list of files to be renamed: remove it"):
        load(tmp_path)


def test_the_tokeniser_of_an_earlier_model_does_not_become_a_later_ones(processor, tmp_path):
    save(tmp_path, CLIP(CONFIG), processor)
    save(tmp_path, CLIP(CONFIG), Processor(None, processor.config))
    assert load(tmp_path)[1].source is None


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "new" / "note.txt"
    write_atomically(path, lambda p: p.write_text("first"))
    write_atomically(path, lambda p: p.write_text("second"))
    assert path.read_text() == "second"

    def fail_half_way(p):
        p.write_text("thi")
        full()

    with pytest.raises(UserError, match=r"note\.txt could not be written .* the disk is full"):
        write_atomically(path, fail_half_way)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda p: 1 / 0)
    assert path.read_text() == "second" and [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_place_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "clip"):
        with pytest.raises(UserError, match="could not be written"):
            save(directory, CLIP(CONFIG))


def test_an_unknown_layout(tmp_path):
    with pytest.raises(UserError, match=r"unknown layout 'pickle'; there are minivlm and hf"):
        save(tmp_path, CLIP(CONFIG), layout="pickle")


# ---- broken directories ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(processor, tmp_path):
    save(tmp_path, CLIP(CONFIG), processor)
    return tmp_path


def edit_config(directory: Path, edit) -> None:
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))


def edit_weights(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda v: v["config"].update(depht=3), r"unknown field 'depht'"),
        (
            lambda v: v["config"]["text"].update(widht=3),
            r"config\.text has an unknown field 'widht'.*Did you mean width",
        ),
        (lambda v: v["config"]["text"].pop("width"), r"config\.text lacks width"),
        (lambda v: v["config"].update(embed_width="12"), r"embed_width is '12', but must be int"),
        (lambda v: v["config"]["text"].update(heads=3), r"no model that can be built: width 16 is not a multiple of 3"),
        (lambda v: v["config"]["text"].update(heads=0), r"config\.text\.heads is 0, but must be at least 1"),
        (lambda v: v["config"]["vision"].update(image_size=17), r"image_size 17 is not a multiple"),
        (lambda v: v.update(config=[1]), r"config is \[1\], but must be an object"),
        (lambda v: v["processor"].update(crop="left"), r"processor\.crop is 'left'"),
        (lambda v: v.update(model="CLAP"), r"asks for the model 'CLAP'\. Did you mean CLIP"),
        (lambda v: v.update(model=None), r"asks for the model None"),
        (lambda v: v.pop("config"), r"config\.json lacks config"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(edit, said, saved):
    edit_config(saved, edit)
    with pytest.raises(UserError, match=said) as error:
        load(saved)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("text.norm.weight"), r"1 missing \(text\.norm\.weight\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda t: t.update({"text.norm.weight": torch.zeros(3)}),
            r"1 of another shape or kind \(text\.norm\.weight is \(3,\) instead of \(16,\)\)",
        ),
        (lambda t: t.update({"text.norm.weight": torch.zeros(16, dtype=torch.int8)}), r"text\.norm\.weight is int8"),
        (lambda t: t.clear(), r" and \d+ more\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, said, saved):
    edit_weights(saved, edit)
    with pytest.raises(UserError, match=said) as error:
        load(saved)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


def test_broken_and_missing_files(saved):
    weights, whole = saved / "model.safetensors", (saved / "model.safetensors").read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load(saved)
    torch.save(CLIP(CONFIG).state_dict(), weights)
    with pytest.raises(UserError, match="a pickle, which could run code"):
        load(saved)
    weights.rename(saved / "pytorch_model.bin")  # nor is a pickle looked for in a directory of ours
    with pytest.raises(UserError, match=r"holds no weights: model\.safetensors should be there"):
        load(saved)
    (saved / "config.json").write_text('{"minivlm": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match="is no model directory"):
        load(saved)


def test_a_processor_whose_tokeniser_is_gone_still_reads_pictures(saved):
    (saved / "tokenizer.json").unlink()
    _, processor = load(saved)
    assert processor.images([torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()]).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="no tokeniser"):
        processor.text(["a"])


def test_a_directory_that_is_not_there():
    with pytest.raises(
        UserError, match=r"out/clip-missing does not exist; train it with python train\.py clip-missing"
    ):
        load("out/clip-missing")


def test_a_model_of_another_class(saved):
    class Other(CLIP):
        pass

    with pytest.raises(TypeError, match="holds a CLIP, not a Other"):
        Other.from_pretrained(saved)
