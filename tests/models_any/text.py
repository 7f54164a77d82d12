"""Tiny tokenizers and text encoders with random weights, for pipelines with a language model as text encoder."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<bos>", "<|vision_start|>", "<|image_pad|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def make_chat_tokenizer(start: str = "") -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes with the chat format of Qwen; `start` is the first token of every text."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer: Any = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if start:
        parts = {"single": f"{start} $A", "special_tokens": [(start, tokenizer.token_to_id(start))]}
        tokenizer.post_processor = processors.TemplateProcessing(**parts)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        bos_token="<bos>",
        padding_side="right",
    )
    made.chat_template = CHAT
    return made


def make_language_model(model_class: Any, config_class: Any, **changes: Any) -> Any:
    """Build a decoder of two layers, 16 channels wide, for the tokens of `make_chat_tokenizer`."""
    settings: dict[str, Any] = {
        "vocab_size": len(make_chat_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return model_class(config_class(**{**settings, **changes})).eval()
