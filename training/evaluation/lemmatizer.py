"""Base forms of the nouns and verbs of an answer, as LAVIS has before VQA accuracy (`dogs sitting` is `dog sit`)."""

import importlib.util
from collections.abc import Callable


def load_lemmatizer() -> Callable[[str], str]:
    """spaCy with en_core_web_sm, as LAVIS, else NLTK with WordNet; raises ValueError where neither is there."""
    if importlib.util.find_spec("spacy"):
        import spacy

        try:
            pipeline = spacy.load("en_core_web_sm")
        except OSError:
            pass  # its English model is not there
        else:
            return lambda text: " ".join(
                token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in pipeline(text)
            )
    if importlib.util.find_spec("nltk"):
        from nltk.stem import WordNetLemmatizer

        lemmatizer = WordNetLemmatizer()
        try:
            lemmatizer.lemmatize("dogs")
        except (LookupError, OSError):
            pass  # its WordNet is not there
        else:
            return lambda text: " ".join(base_form(lemmatizer, word) for word in text.split())
    raise ValueError(
        "--lemmatize needs spaCy with its English model (pip install spacy; python -m spacy download en_core_web_sm) or NLTK "
        "with WordNet (pip install nltk; python -m nltk.downloader wordnet). Install one, or drop the flag."
    )


def base_form(lemmatizer, word: str) -> str:
    """As a noun, and where that changes nothing as a verb: NLTK does not tell which it is."""
    noun = lemmatizer.lemmatize(word, "n")
    return noun if noun != word else lemmatizer.lemmatize(word, "v")
