import torch
from safetensors.torch import save_file
from torch import nn

from minivlm import older_names, run
from minivlm.model import Model
from minivlm.run import restore, training_state


def test_a_tensor_is_found_by_its_older_name_unless_the_model_knows_that_one():
    older = {"resampler.places": 1, "places": 2, "vision.weight": 3}
    now = {"resampler.image_position_embedding", "image_position_embedding", "vision.weight"}
    assert older_names.current_names(older, now) == {
        "resampler.image_position_embedding": 1,
        "image_position_embedding": 2,
        "vision.weight": 3,
    }
    assert older_names.current_names(older, set(older)) is older
    assert older_names.current_names({"other.places": 4}, now) == {
        "other.places": 4
    }  # which reading then refuses by name


class Line(Model):
    def __init__(self):
        super().__init__(config=None)
        self.image_position_embedding = nn.Parameter(torch.randn(3))


def test_weights_and_moments_of_a_checkpoint_come_back_under_the_names_of_now(tmp_path, monkeypatch):
    model, other = Line(), Line()
    optimisers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (model, other)]
    model.image_position_embedding.sum().backward()
    optimisers[0].step()
    older = lambda tensors: {name.replace("image_position_embedding", "places"): t for name, t in tensors.items()}
    save_file(older(model.state_dict()), tmp_path / "model.safetensors")
    save_file(older(training_state(model, optimisers[0], [])), tmp_path / "training.safetensors")
    monkeypatch.setattr(run, "read_record", lambda path: {"step": 1})
    assert restore(tmp_path, other, optimisers[1]) == 1
    assert torch.equal(other.image_position_embedding, model.image_position_embedding)
    [before], [after] = (optimiser.state.values() for optimiser in optimisers)
    assert before.keys() == after.keys() and all(torch.equal(before[kind], after[kind]) for kind in before)
