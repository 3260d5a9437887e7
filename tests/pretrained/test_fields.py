"""Every field of a config.json is followed, known to be without effect, off, or refused by name."""

import json

import pytest

from minivlm.errors import UserError
from minivlm.layers import TransformerConfig
from minivlm.pretrained import known_fields, read
from minivlm.pretrained.fields import Known, check_config, fields, refuse_unknown

OLD = {  # what transformers 4 wrote into every part of a config
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "begin_suppress_tokens": None,
    "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False,
    "transformers_version": "4.26.0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
MODELS = ("clip", "siglip", "align", "gpt2", "gpt_neox", "opt", "t5", "bert", "visual_bert", "llama", "mistral", "qwen2",
          "llava", "blip", "blip-2", "Blip2ForImageTextRetrieval", "mpt", "mosaic_gpt", "idefics")  # fmt: skip


TABLE = fields("""
    hidden_size             width           64
    num_hidden_layers       depth           2
    num_attention_heads     heads           4
    intermediate_size       mlp_width       128
    hidden_act              activation      "gelu_new"
    eos_token_id            -               [2, 3]
""")


def test_a_table_reads_what_a_file_says_and_writes_it_back():
    ours = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 128, "activation": "gelu_tanh"}
    assert TABLE.read({"hidden_size": 32, "other": 1}) == ours
    written = TABLE.write(TransformerConfig(**ours))
    assert written.keys() == TABLE.keys() - {"eos_token_id"} and TABLE.read(written) == ours
    assert written["hidden_act"] == "gelu_pytorch_tanh"  # the first of the words for it
    derived = TransformerConfig(**{**ours, "mlp_width": None})
    assert TABLE.write(derived)["intermediate_size"] == 4 * 32


def test_a_table_with_other_defaults_is_another_table():
    other = TABLE.but(hidden_size=8, pad_token_id=0)
    assert other.read({})["width"] == 8 and TABLE.read({})["width"] == 64
    assert other.complete({"eos_token_id": 5}) == {
        **TABLE.complete({}),
        "hidden_size": 8,
        "pad_token_id": 0,
        "eos_token_id": 5,
    }
    with pytest.raises(UserError, match="asks for the activation 'tanh'; there are gelu, quick_gelu"):
        other.read({"hidden_act": "tanh"})


def test_what_is_on_and_not_known_is_refused():
    known = Known.of({"a": 1, "b": 2}, "c", d=("x", "y"))
    refuse_unknown(
        {"a": 5, "c": [1], "d": "x", "e": None, "f": False, "g": 0.0, "h": {}, "i": []},
        "f",
        known.fields,
        only=known.only,
    )
    for value in (True, 1, "on", [0], {"a": None}):
        with pytest.raises(UserError, match=r"f has e = .*, which is not known here and may change what comes out"):
            refuse_unknown({"e": value}, "f", known.fields)
    with pytest.raises(UserError, match="f has d = 'z', which is not supported; it must be 'x' or 'y'"):
        refuse_unknown({"d": "z"}, "f", known.fields, only=known.only)


@pytest.mark.parametrize("kind", MODELS)
def test_every_family_refuses_an_unknown_field_and_takes_what_transformers_4_wrote(kind):
    parts = known_fields(kind, {"model_type": kind})
    assert "" in parts
    for name in parts:
        whole = {"model_type": kind, **({name: OLD} if name else OLD)}
        check_config(whole, "config.json", parts)
        path = f"config.json: {name}" if name else "config.json"
        with pytest.raises(UserError, match=f"{path} has new_attention = 'sparse'"):
            more = {"new_attention": "sparse"}
            check_config({**whole, **({name: more} if name else more)}, "config.json", parts)
    with pytest.raises(UserError, match=r"config\.json has quantization_config = "):
        check_config({"quantization_config": {"quant_method": "gptq"}}, "config.json", parts)


def test_the_field_and_its_file_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "attn_logit_softcapping": 50.0}))
    with pytest.raises(UserError, match=r"config\.json has attn_logit_softcapping = 50\.0, which is not known here"):
        read(tmp_path, "llama")


HARMLESS = {  # of dolly-v2, of files of transformers 4.35, of galactica
    "gpt_neox": {
        "custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline"}}
    },
    "llama": {"_flash_attn_2_enabled": True, "model_max_length": 4096},
    "opt": {"learned_embeddings": True, "scale_embeddings": False, "layer_norm_elementwise_affine": True},
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_published_files_say_beside_the_matter_is_no_obstacle(kind):
    check_config(HARMLESS[kind], "config.json", known_fields(kind, {"model_type": kind}))
    with pytest.raises(UserError, match="scale_embeddings = True"):
        check_config({"scale_embeddings": True}, "config.json", known_fields("opt", {"model_type": "opt"}))
