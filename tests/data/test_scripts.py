"""Text is safe in every script: what is decoded from the tokens is the row, or the report says what changed it."""

import unicodedata
from collections import Counter

import pytest

from finetune.config.schema import DataSection
from finetune.data.dataset import prepare
from finetune.data.quality import measure
from finetune.data.rows import Row
from finetune.data.scripts import NAMES, count_scripts, in_words, shares, trained_scripts
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.conftest import question, section
from tests.data.encoding import encode_row

TEXTS = {
    "Latin": "Größe, naïve, Việt Nam, Łódź",
    "Cyrillic": "Съешь ещё этих мягких булок",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα",
    "Arabic": "نصٌّ حكيمٌ له سرٌّ قاطعٌ",
    "Hebrew": "דג סקרן שט בים",
    "Han": "天地玄黃宇宙洪荒𠀀",
    "Japanese": "いろはにほへと チリヌルヲ 色は",
    "Korean": "키스의 고유조건은 입술끼리",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट",
    "Bengali": "বাংলা ভাষায় লেখা",
    "Tamil": "தமிழ் மொழி எழுத்து",
    "Telugu": "తెలుగు భాష",
    "Kannada": "ಕನ್ನಡ ಭಾಷೆ",
    "Malayalam": "മലയാളം ഭാഷ",
    "Gujarati": "ગુજરાતી ભાષા",
    "Gurmukhi": "ਪੰਜਾਬੀ ਭਾਸ਼ਾ",
    "Oriya": "ଓଡ଼ିଆ ଭାଷା",
    "Sinhala": "සිංහල භාෂාව",
    "Thai": "เป็นมนุษย์สุดประเสริฐ",
    "Lao": "ພາສາລາວ",
    "Myanmar": "မြန်မာဘာသာ",
    "Khmer": "ភាសាខ្មែរ",
    "Tibetan": "བོད་སྐད་",
    "Georgian": "ქართული ენა",
    "Armenian": "Հայերեն լեզու",
    "Ethiopic": "አማርኛ ቋንቋ",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ",
    "Syriac": "ܠܫܢܐ ܣܘܪܝܝܐ",
    "Thaana": "ދިވެހިބަސް",
    "Nko": "ߒߞߏ",
    "Tifinagh": "ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "Cherokee": "ᏣᎳᎩ",
    "Canadian_Aboriginal": "ᐃᓄᒃᑎᑐᑦ",
    "Adlam": "𞤀𞤣𞤤𞤢𞤥",
    "Gothic": "𐌲𐌿𐍄",
}
OTHERS = {
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇺🇳🇩🇪 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ❤️ 1️⃣",
    "right to left": "a \u200fאבג\u200e 123 \u202bעברית\u202c (x)",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff",
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
    "white space": "a\u00a0b\u2003c\u3000d\te\r\nf\u2028g\u0085h",
    "noncharacters": "a\ufffeb\U0001ffffc\ufdd0",
    "combining": "q\u0307\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ ạ̈",
}
DECOMPOSED = ["e\u0301", "\u1112\u1161\u11ab", "\u212b", "か\u3099", "i\u0307\u0323"]


def decoded(text, tokenizer):
    row = encode_row(Row("r", 1, {"prompt": text, "completion": text}), load_template("completion"), tokenizer)
    return tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("name", [*TEXTS, *OTHERS])
def test_what_is_decoded_is_what_stood_in_the_row(name, tokenizer):
    text = unicodedata.normalize("NFC", (TEXTS | OTHERS)[name])
    assert decoded(text, tokenizer) == text + text + tokenizer.eos_token
    chat = encode_row(Row("r", 1, question(text, text)), load_template("chat"), tokenizer)
    answer = tokenizer.decode([label for label in chat.labels if label != -100])
    assert answer == text + "<|im_end|>"
    assert tokenizer.decode(chat.input_ids).count(text) == 2


def test_what_the_tokenizer_composes_is_counted(tokenizer, write_jsonl):
    """Qwen3's tokenizer composes (NFC); a row in another form is trained composed, and the report says which."""
    rows = [question(text, f"fine {text}") for text in [*DECOMPOSED, *TEXTS.values(), *OTHERS.values()]]
    changed = [
        n for n, row in enumerate(rows, 1) if not unicodedata.is_normalized("NFC", row["messages"][0]["content"])
    ]
    assert changed[: len(DECOMPOSED)] == list(range(1, len(DECOMPOSED) + 1))
    for text in DECOMPOSED:
        assert decoded(text, tokenizer).startswith(unicodedata.normalize("NFC", text) * 2)
    report = measure(section(write_jsonl(rows)), tokenizer, seed=0)
    (found,) = [finding for finding in report.findings if "tokenizer" in finding.kind]
    assert (found.kind, found.rows) == ("composed_by_tokenizer", len(changed))
    assert [int(example.row.rpartition(":")[2]) for example in found.examples] == changed[:5]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_of_its_script(name):
    counts = count_scripts(TEXTS[name] + " 123 👩‍👧 \u200b.,!")
    assert counts.most_common(1)[0][0] == name
    assert counts[name] == counts.total()


def test_scripts_that_stand_together():
    assert count_scripts("中文 and English") == Counter(Latin=10, Han=2)
    assert count_scripts("中" * 99 + "の") == Counter(Han=99, Japanese=1)
    assert count_scripts("漢字かな") == Counter(Japanese=4)
    assert count_scripts("漢字 한국어") == Counter(Han=2, Korean=3)
    assert count_scripts("12 + 7 = 19 😀") == Counter()
    assert count_scripts("\U00010400") == Counter(other=1)
    assert len(set(NAMES)) == len(NAMES)


def test_shares_in_words():
    assert in_words(shares(Counter(Latin=930, Han=69, Thai=1))) == "Latin 93 %, Han 7 %, Thai 0.1 %"
    assert in_words(shares(Counter(Latin=99999, Canadian_Aboriginal=1))) == "Latin 99.9 %, 1 more"
    assert in_words({"Latin": 1.0}) == "Latin 100 %"
    assert in_words({}) == "no letters"


def test_prepare_tells_the_scripts_of_what_is_trained(tiny_tokenizer, write_jsonl):
    path = write_jsonl([question("только вопрос", "abcdefgh"), question("x", "日本")])
    prepared = prepare(section(path), tiny_tokenizer, seed=0)
    assert trained_scripts(prepared.train, tiny_tokenizer) == {"Latin": 0.8, "Han": 0.2}


BOMS = {"utf-8-sig": None, "utf-16": "is UTF-16", "utf-32": "is UTF-32", "utf-16-le": "looks like UTF-16"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("encoding", BOMS)
def test_other_encodings_are_refused_by_name_or_read(encoding, suffix, tiny_tokenizer, tmp_path):
    texts = {"jsonl": '{"text": "Größe"}\r\n', "json": '[{"text":\r\n"Größe"}]', "csv": "text\r\nGröße\r\n"}
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(texts.get(suffix, "Größe").encode(encoding))
    rows: DataSection = section(path, template="text")
    if BOMS[encoding] is None:
        assert tiny_tokenizer.decode(prepare(rows, tiny_tokenizer, seed=0).train[0]["input_ids"]).startswith("Größe")
        return
    with pytest.raises(DataError, match=BOMS[encoding]) as caught:
        prepare(rows, tiny_tokenizer, seed=0)
    assert "UTF-8" in caught.value.problems[0].hint
