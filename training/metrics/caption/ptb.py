"""Words of a caption as the COCO caption scorer counts them, without its Java tokenizer.

The official scorer runs Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1), lower-cases its tokens and drops a list of
punctuation marks. Its habits below were found by asking the Java program; they decide which words two captions share:
`don't` is `do n't`, `cannot` is `can not`, `t-shirt` and `black/white` are one word, `St.` keeps its stop, and round
brackets stay as `-lrb-` and `-rrb-`, because the list of dropped marks has them in capitals.
"""

import re
from functools import lru_cache

# Abbreviations that keep their stop wherever they stand; single letters do so as well.
ABBREVIATIONS = """adj adm adv al ala apr ariz assn attys aug ave bancorp bhd bldg brig bros calif cf cie cmdr co col colo
comdr conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind intl jan
jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mme mo mon mr mrs ms mt mtg neb nev nov oct okla penn pfc ph
plc pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supts sys tel
tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo""".split()
CAPITALIZED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()  # in lower case they are words
NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop".split()  # abbreviations only where a number follows

# A single letter and a stop end a sentence where one of these follows: "the letter B. The man".
SENTENCE_STARTS = frozenset(
    """A About According After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other Our She
    Since So Some Such That The Their Then There These They This We What When While Yet You""".split()
)

REWRITTEN = str.maketrans(
    {mark: text for marks, text in (("‘’", "'"), ("“”", '"'), ("–—", "--"), ("…", "...")) for mark in marks}
    | {"£": "#", "€": "$", "¢": " cents", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])

LETTER = r"[^\W\d_]"
CLITIC = rf"'(?:s|m|d|re|ve|ll)(?!{LETTER})"
TOKEN = re.compile(
    "|".join(
        (
            r"</?[A-Za-z][^<>\s]*>",  # a tag
            r"(?:https?://|www\.)\S*[^\s.,;:!?'\")]",
            r"[\w.+-]*\w@\w+(?:[.-]\w+)*",  # a mail address
            r"[:;=]'?-?[()](?!\w)|[:;=]'?-?[DPp](?!\w)|-_-|\^_\^",  # smileys
            rf"(?:cannot|gonna|gotta|lemme|gimme|wanna)(?!\w|[-/.]{LETTER})",  # two words each, see PAIRS
            r"'t(?=(?:is|was)\b)",
            rf"(?:{LETTER}\.){{2,}}(?!{LETTER})(?:-\w+)*|ph\.d\.",  # U.S.A., also U.S.-based
            rf"{LETTER}+(?=n['`]t(?!{LETTER}))|n['`]t(?!{LETTER})",  # do + n't
            r"o'clock|ne'er|e'er|c'mon|cap'n|ol'|(?:dunk|someth)in'|'em\b|'till?\b|'cause\b|'n'|'n(?!\w)",
            rf"(?-i:[A-HJ-XZdlno])'(?!(?:ll|re|ve)\b){LETTER}{{2,}}|[ld]'{LETTER}+|c'est\b",  # O'Brien, l'eau, d'oh
            rf"{LETTER}+[aeiouy]'[aeiou]{LETTER}*|[jy]'(?={LETTER})",  # ma'am, y'all
            r"'\d0s|'\d\d(?!\w|')",  # '90s, '05
            CLITIC,
            # Numbers, which may start with a sign or a point and be part of a compound: 1.5-inch, 12:30, 1/2
            r"\d{1,4}/\d{1,4}(?:/\d{2,4})?(?:-\w+)*(?!\w)",
            r"[-+]?(?:\d+(?:[.,]\d+)+|[.,:]\d+)(?:-\w+)+|[-+]?\d*(?:[.,:]\d+)+|[-+]\d+",
            rf"(?:{'|'.join(ABBREVIATIONS)})\.(?!{LETTER})(?:-\w+)*",
            rf"(?-i:{'|'.join(CAPITALIZED_ABBREVIATIONS)})\.(?!{LETTER})",
            rf"(?:{'|'.join(NUMBER_ABBREVIATIONS)})\.(?=\d)",
            rf"{LETTER}\.(?!\w)",
            rf"{LETTER}+\.(?:(?=[,;:])|(?:-\w+)+)",  # what a comma or hyphen follows cannot have ended a sentence
            r"(?-i:[A-Z]+&[A-Z]+)",  # AT&T
            # Words and compounds: red-haired, and/or, 4x4, 5-year-old, statefarm.com
            rf"{LETTER}\w*(?:[-/_]\w+|(?<={LETTER})[.!?@]{LETTER}\w*)*|\w+(?:[-/_]\w+)*",
            rf"#{LETTER}+|@{LETTER}\w*",
            r"##+|@@+|__+|\*+|[?!]{2,}|\.{3,}|--+",
            r"\S",
        )
    ),
    re.IGNORECASE,
)
PAIRS = {word: (word[:3], word[3:]) for word in ("cannot", "gonna", "gotta", "lemme", "gimme", "wanna")}


@lru_cache(maxsize=1 << 16)
def chunk_words(chunk: str) -> tuple[str, ...]:
    """Words of a piece of text without spaces, lower-cased, punctuation dropped."""
    if chunk.isalpha() and chunk.isascii() and chunk.lower() not in PAIRS:
        return (chunk.lower(),)
    for entity, mark in ENTITIES.items():
        chunk = chunk.replace(entity, mark)
    words = []
    for token in TOKEN.findall(chunk.translate(REWRITTEN)):
        token = token.lower()
        if token in PAIRS:
            words += PAIRS[token]
        elif token not in DROPPED and not token.startswith(("...", "--")):
            words.append("".join(BRACKETS.get(letter, letter) for letter in token))
    return tuple(words)


def tokenize(caption: str) -> list[str]:
    """Words of a caption that the COCO scorer counts.

    The Java tokenizer reads all captions as one text and looks beyond the end of one: it keeps the stop of a single last
    letter ("plan B.") or not, depending on the caption that happens to follow. Here the end of a caption ends a sentence.
    """
    chunks = caption.split()
    words = []
    for chunk, following in zip(chunks, [*chunks[1:], "A"]):
        words += chunk_words(chunk)
        if not chunk.endswith("."):
            continue
        if words and len(words[-1]) == 2 and words[-1][1] == "." and following in SENTENCE_STARTS:
            words[-1] = words[-1][0]
        elif following[0].isdigit() and chunk[:-1].lower() in NUMBER_ABBREVIATIONS:
            words[-1] += "."
    return words
