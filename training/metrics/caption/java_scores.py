"""METEOR and SPICE: there is no definition of them but their Java programs, which the package pycocoevalcap carries."""

import importlib.util
import shutil
import subprocess
import warnings
from pathlib import Path


def java_scores(predicted: list[list[str]], referred: list[list[list[str]]]) -> dict[str, float]:
    """METEOR and SPICE of tokenized captions, those of the two that can run here; a warning tells why one is left out.

    METEOR needs Java and `pip install pycocoevalcap`; SPICE also the two stanford-corenlp-3.6.0 jars in that package's
    spice/lib (`python -m pycocoevalcap.spice.get_stanford_models` fetches them) and about 8 GB of memory.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    folder = Path(package.submodule_search_locations[0]) if package else None
    jars = {
        "METEOR": ["meteor/meteor-1.5.jar"],
        "SPICE": ["spice/spice-1.0.jar", *(f"spice/lib/stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models"))],
    }
    predictions = {image: [" ".join(words)] for image, words in enumerate(predicted)}
    references = {image: [" ".join(words) for words in captions] for image, captions in enumerate(referred)}
    scores = {}
    for name, files in jars.items():
        missing = [file for file in files if folder is None or not (folder / file).exists()]
        if shutil.which("java") is None:
            warnings.warn(f"{name} is left out: there is no java on the PATH.", stacklevel=2)
        elif folder is None:
            warnings.warn(f"{name} is left out: its Java program comes with `pip install pycocoevalcap`.", stacklevel=2)
        elif missing:
            warnings.warn(f"{name} is left out: {folder} lacks {', '.join(missing)}.", stacklevel=2)
        else:
            try:
                scores[name] = float(scorer(name).compute_score(references, predictions)[0])
            except (subprocess.CalledProcessError, ValueError, OSError) as error:
                warnings.warn(f"{name} is left out: its Java program failed ({error}).", stacklevel=2)
    return scores


def scorer(name: str):
    if name == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()
    from pycocoevalcap.spice.spice import Spice

    return Spice()
