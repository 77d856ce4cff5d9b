"""Small tokenizers with the chat templates of well-known families, built in a moment."""

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from expert_iteration.tiny import CHAT_TEMPLATE as CHATML

WORDS = ["<unk>", "system", "user", "assistant", "response", "question", "Be", "brief", ".", "[INST]", "[/INST]"]
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Refuses system messages, as Gemma's first did.
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Begins the response for the model, and puts an empty thought before one that is given.
THINKING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
BARE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


def make_tokenizer(template, special, *, adds_bos=False, **options):
    """Words by white space; `special` tokens are split off first, as in every real tokenizer."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, *special])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(special))
    if adds_bos:
        bos = options["bos_token"]
        words.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **options)


def llama_tokenizer(eos_token="<|eot_id|>"):
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    return make_tokenizer(LLAMA_3, headers, adds_bos=True, bos_token="<|begin_of_text|>", eos_token=eos_token)


def qwen_base_tokenizer(template=CHATML):
    return make_tokenizer(template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|endoftext|>")


def gemma_tokenizer():
    turns = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return make_tokenizer(GEMMA, turns, bos_token="<bos>", eos_token="<eos>")


def base_tokenizer(**options):
    """Of a base model: no chat template, no pad token, no token that is not used."""
    return make_tokenizer(None, ["</s>"], eos_token="</s>", **options)
