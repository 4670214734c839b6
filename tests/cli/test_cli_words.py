"""Which spellings `ask` takes for the same word, in many scripts."""

from __future__ import annotations

import unicodedata

import pytest

from cachetune_rag.cli.lexical import rank, words


@pytest.mark.parametrize(
    ("question", "text"),
    [
        pytest.param("STRASSE", "Die Straße.", id="case"),
        pytest.param("café", "le cafe\u0301 du phare", id="decomposed accent"),
        pytest.param("cafe", "le café", id="no accent"),
        pytest.param("Đà Nẵng", "da nang", id="Vietnamese"),
        pytest.param("İSTANBUL", "istanbul'da", id="Turkish dots"),
        pytest.param("ёлка", "елка", id="Russian"),
        pytest.param("office", "the oﬃce", id="ligature"),
        pytest.param("1871", "１８７１年", id="full-width digits"),
        pytest.param("ABC", "ＡＢＣ", id="full-width letters"),
        pytest.param("1871", "عَامَ ١٨٧١", id="Arabic digits"),
        pytest.param("२०२४", "in 2024", id="Devanagari digits"),
        pytest.param("متى بنيت المنارة", "بُنِيَتِ المَنَارَةُ", id="Arabic vowel signs"),
        pytest.param("بُنِيَتِ", "متى بنيت", id="vowel signs in the question"),
        pytest.param("منارة", "وفي المنارة", id="Arabic article"),
        pytest.param("اسلام", "الإسلام دين", id="Arabic hamza"),
        pytest.param("مـــنار", "منار", id="Arabic stretch"),
        pytest.param("می‌خواهم", "من میخواهم", id="Persian joiner"),
        pytest.param("کتاب", "كتاب", id="Persian and Arabic kaf"),
        pytest.param("מגדלור", "מִגְדַּלּוֹר גָּדוֹל", id="Hebrew points"),
        pytest.param("ประภาคาร", "ประภาคารสร้างขึ้นในปี พ.ศ. ๒๔๑๔", id="Thai"),
        pytest.param("2414", "ประภาคารสร้างขึ้นในปี พ.ศ. ๒๔๑๔", id="Thai digits"),
        pytest.param("ປະພາຄານ", "ປະພາຄານສ້າງຂຶ້ນ", id="Lao"),
        pytest.param("ប្រទីប", "ប្រទីបត្រូវបានសាងសង់", id="Khmer"),
        pytest.param("ប្រទីប", "នេះ\u200bប្រទីប\u200bធំ", id="Khmer with break marks"),
        pytest.param("မီးပြတိုက်", "မီးပြတိုက်ကိုဆောက်", id="Burmese"),
        pytest.param("ལྷ་ས", "ལྷ་ས་གྲོང་ཁྱེར", id="Tibetan"),
        pytest.param("प्रकाशस्तंभ", "यह प्रकाशस्तंभ पुराना है", id="Hindi"),
        pytest.param("கலங்கரை", "கலங்கரை விளக்கம்", id="Tamil"),
        pytest.param("灯塔", "灯塔建于一八七一年", id="Chinese"),
        pytest.param("海", "青い海", id="one ideograph"),
        pytest.param("東京", "東京都庁", id="Japanese compound"),
        pytest.param("ﾗﾝﾌﾟ", "ランプが点く", id="half-width kana"),
        pytest.param("등대", "등대는 크다", id="Korean particle"),
        pytest.param("등대지기", "등대 지기", id="Korean compound"),
        pytest.param("배", "배는 크다", id="one syllable"),
        pytest.param("등대", unicodedata.normalize("NFD", "등대는"), id="Korean in letters"),
    ],
)
def test_a_word_is_found_however_it_is_written(question: str, text: str) -> None:
    assert rank(question, [("other", "Nothing of it."), ("this", text)]) == ["this"]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("แมว", "ประภาคารสร้างขึ้น"),
        ("바다", "등대는 크다"),
        ("कमल", "कमाल"),
        ("灯台", "白い海"),
        ("ночь", "день"),
        ("cat", "concatenate"),
    ],
)
def test_other_words_are_not_found(question: str, text: str) -> None:
    assert rank(question, [("this", text)]) == []


def test_whole_words_of_unspaced_scripts_come_before_their_parts() -> None:
    texts = [("part", "塔の下に灯がある。"), ("whole", "白い灯塔。"), ("thai part", "ภาพ"), ("thai", "ที่ประภาคาร")]
    assert rank("灯塔", texts) == ["whole", "part"]
    assert rank("ประภาคาร", texts) == ["thai", "thai part"]


def test_words_of_english_are_what_they_were() -> None:
    assert words("The keeper's log_book, 2nd Ed.: X-ray") == [
        "the",
        "keeper",
        "s",
        "log",
        "book",
        "2nd",
        "ed",
        "x",
        "ray",
    ]
