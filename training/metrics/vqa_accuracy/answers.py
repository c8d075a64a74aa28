"""Normalisation of short answers by the official VQAv2 scorer (visualqa.org/evaluation.html).

exact_match imports it from the installed package: evaluate copies a metric's own folder only.
"""

import re

# With the apostrophe where it belongs; people leave one of them out.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll
you'd you'd've you'll you're you've""".split()
SPELLINGS = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in CONTRACTIONS
    for place, letter in enumerate(contraction)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # so in the official list, too late to mend
DIGITS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = frozenset(["a", "an", "the"])
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
STOP = re.compile(r"\.(?!\d)")


def normalize_answer(text: str) -> str:
    """An answer as the official scorer compares it.

    Punctuation goes: a mark that stands beside a space somewhere in the answer is deleted, as are all marks when there is
    a number such as 1,000; other marks become spaces. Stops go unless a digit follows; case and articles go; number words
    up to ten become digits; contractions get their apostrophe.
    """
    text = trimmed(text)
    number = COMMA_IN_NUMBER.search(text)
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or number else " ")
    words = [DIGITS.get(word, word) for word in STOP.sub("", stripped).lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
