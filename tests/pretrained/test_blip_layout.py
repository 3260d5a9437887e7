"""What BLIP's published directories say besides their weights, and what is refused."""

import json
from dataclasses import replace

import pytest

from minivlm import BLIP
from minivlm.errors import UserError
from minivlm.pretrained import blip, comparable, recognise
from tests.models.test_blip import CONFIG

CAPTION = {"architectures": ["BlipForConditionalGeneration"], "model_type": "blip"}


def test_one_model_type_three_uses(tmp_path):
    for architecture, roles in blip.ROLES.items():
        values = {"architectures": [architecture], "model_type": "blip"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert recognise(tmp_path) == "blip"
        config = blip.read_config(values)
        assert config.roles == roles and config.temperature is None and config.encode_token is None
        assert config.attend_padding is (roles == "answer")
        assert comparable(blip.read_config(blip.write_config(config))) == comparable(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {**CAPTION, "architectures": ["BlipModel"]},
            "asks for a BlipModel; of BLIP there are BlipForConditionalGeneration",
        ),
        ({"model_type": "blip"}, "asks for a None"),
        ({**CAPTION, "text_config": {"is_decoder": False}}, "is_decoder = False, which is not supported"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        blip.read_config(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "transformers has no BLIP of all roles at once"),
        ({"roles": "match"}, r"cannot express .*temperature = 0\.07"),
        ({"roles": "answer", "temperature": None, "encode_token": None}, "cannot express .*attend_padding = False"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_transformers_cannot_express(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        BLIP(replace(CONFIG, **changes)).save_pretrained(tmp_path, layout="hf")
