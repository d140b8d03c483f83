"""The layout of a row: BOS, EOS, the boundary between prompt and answer, truncation."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ofmu_ray.config import FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError

TEXTS = ["Question: Who wrote the lantern?\nAnswer: Ada Quill wrote it.", "user assistant [INST] [/INST]"] * 4
SPACE_AT_END = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content | trim }}{% endfor %}"
SPACE_AT_END += "{% if add_generation_prompt %}<|assistant|> {% endif %}"
INST = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
INST += "{% elif m.role == 'system' %}{{ raise_exception('no system') }}"
INST += "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def one_word() -> Tokenizer:
    """Merges over white space and across the complete text, so that prompt and answer can share a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def build(make=byte_level, *, bos="<s>", eos="</s>", chat=None, texts=TEXTS) -> PreTrainedTokenizerFast:
    tokenizer = make()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [t for t in (bos, eos) if t]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=chat)


LAYOUTS = {
    "qa": (build(), FormatConfig()),
    "qa without bos": (build(bos=None), FormatConfig()),
    "one word": (build(one_word), FormatConfig(prompt_template="{question}")),
    "chat ends in a space": (build(chat=SPACE_AT_END), FormatConfig()),
    "chat with inst": (build(chat=INST), FormatConfig()),
}


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=40)
@given(
    st.text("abcAda Quill.?é漢 ", min_size=1).filter(str.strip),
    st.text("abcAda Quill.?é漢 ", min_size=1).filter(str.strip),
)
def test_every_layout_keeps_its_promises(name: str, question: str, answer: str) -> None:
    tokenizer, config = LAYOUTS[name]
    template = Template(tokenizer, config)
    ids, prompt = template.encode(question, answer)
    assert ids[:prompt] == template.encode_prompt(question)  # generation starts from what training conditioned on
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    if tokenizer.bos_token_id is None:
        assert tokenizer.bos_token_id not in ids
    else:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[prompt:-1]).strip() == answer.strip()  # no token of the answer lost to the prompt
    said = tokenizer.decode(ids[:prompt]).removeprefix("<s>")
    assert said == f"{template.before}{question.strip()}{template.between}".removeprefix("<s>").rstrip(" ")


def test_token_across_the_boundary_is_split() -> None:
    tokenizer = build(one_word, texts=["lantern is"] * 4)
    assert len(tokenizer("lantern is", add_special_tokens=False)["input_ids"]) == 1
    ids, prompt = Template(tokenizer, FormatConfig(prompt_template="{question}")).encode("lantern", "is")
    assert tokenizer.decode(ids[1:prompt]) == "lantern"
    assert tokenizer.decode(ids[prompt:-1]) == " is"


def test_space_at_the_end_of_a_chat_prompt_joins_the_answer() -> None:
    tokenizer = build(chat=SPACE_AT_END)
    ids, prompt = Template(tokenizer, FormatConfig()).encode("Who wrote the lantern?", "Ada Quill wrote it.")
    assert tokenizer.convert_ids_to_tokens(ids[prompt:])[0] == "ĠAda"
    assert tokenizer.decode(ids[:prompt]).endswith("<|assistant|>")


def test_finished_conversation_tells_the_space_before_the_answer() -> None:
    tokenizer = build(chat=INST)
    ids, prompt = Template(tokenizer, FormatConfig()).encode("Who?", "Ada")
    assert tokenizer.decode(ids[1:prompt]) == "[INST] Who? [/INST]"
    assert tokenizer.decode(ids[prompt:-1]) == " Ada"


def test_qa_template_is_literal_and_ignores_other_braces() -> None:
    tokenizer = build()
    template = Template(tokenizer, FormatConfig(prompt_template="{x} {question}\nA:"))
    ids, prompt = template.encode("a {0}?", "Ada")
    assert tokenizer.decode(ids[1:prompt]) == "{x} a {0}?\nA:"
    assert tokenizer.decode(ids[1:-1]) == "{x} a {0}?\nA: Ada"


def test_truncation_keeps_eos_and_is_counted() -> None:
    tokenizer = build()
    whole = Template(tokenizer, FormatConfig()).encode_rows(["Who?"], ["Ada Quill wrote it."])[0]
    assert whole.cut == 0
    cut = Template(tokenizer, FormatConfig(max_length=len(whole.input_ids) - 2)).encode_rows(
        ["Who?"], ["Ada Quill wrote it."]
    )[0]
    assert cut.input_ids == [*whole.input_ids[:-3], tokenizer.eos_token_id]
    assert (cut.cut, cut.only_prompt) == (2, False)
    short = Template(tokenizer, FormatConfig(max_length=whole.prompt_tokens + 1))
    assert short.encode_rows(["Who?"], ["Ada Quill wrote it."])[0].only_prompt


def test_metaspace_words_stay_whole() -> None:
    tokenizer = build(metaspace)
    ids, prompt = Template(tokenizer, FormatConfig()).encode("Who wrote the lantern?", "Ada Quill")
    assert tokenizer.convert_ids_to_tokens(ids[prompt:-1]) == ["▁Ada", "▁Quill"]


def test_pickle_gives_the_same_tokens_and_the_fingerprint_follows_the_layout() -> None:
    template = Template(build(chat=SPACE_AT_END), FormatConfig())
    copy = pickle.loads(pickle.dumps(template))
    assert copy.encode("Who?", "Ada") == template.encode("Who?", "Ada")
    assert copy.fingerprint() == template.fingerprint()
    other = Template(build(chat=SPACE_AT_END), FormatConfig(template="qa"))
    assert other.fingerprint() != template.fingerprint()


@pytest.mark.parametrize(
    ("tokenizer", "config", "said"),
    [
        (build(eos=None), FormatConfig(), "no EOS"),
        (build(), FormatConfig(template="chat"), "--data.format.template qa"),
        (build(chat=INST), FormatConfig(system_prompt="Be kind."), "data.format.system_prompt"),
        (build(chat="{{ bos_token }}"), FormatConfig(), "exactly once"),
    ],
)
def test_mistakes_are_reported(tokenizer: PreTrainedTokenizerFast, config: FormatConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Template(tokenizer, config)


def test_a_prompt_never_has_the_current_date() -> None:
    """Templates ask for it by a function or, in Llama 3.1's, take a variable; tokens must be the same tomorrow."""
    dated = "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ date_string }} " + SPACE_AT_END.removeprefix(
        "{{ bos_token }}"
    )
    first, second = (Template(build(chat=dated), FormatConfig(**options)) for options in ({}, {"date": "2025-01-31"}))
    assert "26 Jul 2024 26 Jul 2024 " in first.before
    assert "31 Jan 2025 31 Jan 2025 " in second.before
    assert first.fingerprint() != second.fingerprint()
    with pytest.raises(UserError, match=r"data\.format\.date = '2024-13-01'"):
        FormatConfig(date="2024-13-01")
