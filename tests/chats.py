"""Chat templates as they are published, each told in words of ours, and a tokeniser that knows their tokens."""

TOKENS = [
    "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip

HERE = "Today Date: 26 Jul 2024\n\n"
TOLD = "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set t = messages[1:] %}{% else %}{% set t = messages %}"
# name → (the template, its bos_token and eos_token, how it is read: a known name, or "own")
PUBLISHED = {
    "qwen2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_end|>"),
        "chatml",
    ),
    "smollm2": (  # whose bos_token is the beginning of a turn
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a small model.<|im_end|>\n"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "chatml",
    ),
    "zephyr": (  # as of TinyLlama, over several lines
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n{% elif m.role == 'system' %}"
        "\n{{ '<|system|>\n' + m.content + eos_token }}\n{% else %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        ("<s>", "</s>"),
        "zephyr",
    ),
    "llama-2": (
        TOLD + "{% endif %}{% for m in t %}{% if m.role == 'user' %}{% if loop.first and s is defined %}"
        "{% set c = '<<SYS>>\n' ~ s ~ '\n<</SYS>>\n\n' ~ m.content %}{% else %}{% set c = m.content %}{% endif %}"
        "{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "llama-2",
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|eot_id|>"),
        "llama-3",
    ),
    "llama-3.1": (  # the day is told whoever speaks
        TOLD + "{% set s = '' %}{% endif %}{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n" + HERE + "' + s|trim + '<|eot_id|>' }}"
        "{% for m in t %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|eot_id|>"),
        "own",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "mistral",
    ),
    "mistral, later": (
        TOLD + "{% endif %}{{ bos_token }}{% for m in t %}{% if m.role == 'user' %}{% if loop.first and s is defined %}"
        "{{ '[INST] ' + s + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "own",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content|trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>"),
        "gemma",
    ),
    "vicuna": (
        TOLD + "{% set s = 'A chat.' %}{% endif %}{{ bos_token + s + ' ' }}{% for m in t %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"),
        "vicuna",
    ),
    "llava": (  # pictures first; answers are not ended
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
        "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{% generation %}{{ c.text + ' ' }}{% endgeneration %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"),
        "own",
    ),
}  # fmt: skip

UNKNOWN = {  # and how each is no way of writing turns, or does harm
    "says nothing": "hello",
    "is no template": "{% for m in messages %}",
    "has thoughts of its own": PUBLISHED["qwen2"][0].replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    ),
    "looks into Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "numbers its turns": "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",
}
HOSTILE = {
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "grows": "{% set n = namespace(x='12345678') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
}


def tokenizer(start=None, prepend=False):
    """Of GPT-2's kind, or (prepend) of LLaMA's. start: the token that it puts before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if prepend:
        alphabet = [*(f"<0x{i:02X}>" for i in range(256)), "▁"]
    vocab = {token: i for i, token in enumerate([*TOKENS, "<|endoftext|>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=prepend))
    if prepend:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        made.normalizer = normalizers.NFC()
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*TOKENS, "<|endoftext|>"])
    if start is not None:
        ids = [(start, vocab[start])]
        made.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=ids)
    return made
