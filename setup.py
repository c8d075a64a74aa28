"""Packaging of blip2x: the library `modeling_blip2x`, and `blip2x_training`, which is the folder training/.

space_app/ is run from the repository.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "modeling_blip2x" / "__init__.py").read_text()).group(1)

# From the oldest release that was tested (constraints-oldest.txt) to the first that was not: of transformers, whose minor
# releases rename arguments, the next minor one, of the others the next major one. `make test-latest` tries what is between.
CORE = [
    "torch>=2.13.0,<3",
    "transformers>=5.23.0,<5.25",
    "safetensors>=0.8.0,<1",
    "huggingface-hub>=1.31.0,<3",
    "pillow>=12.0.0,<14",
    "numpy>=2.0.0,<3",
]
TRAIN = [
    "accelerate>=1.15.0,<2",
    "datasets>=5.2.0,<6",
    "peft>=0.21.2,<1",
    "obstore>=0.12.1,<1",  # data in object stores and on web servers
    "pyyaml>=6.0",
    "tqdm>=4.67.0",
    "matplotlib>=3.10.0",
    "tensorboard>=2.20.0",
]
EVAL = ["evaluate>=0.4.6", "matplotlib>=3.10.0", "jinja2>=3.1.0"]
SPACE = ["gradio>=6.31.0,<7", "psutil>=7.0.0"]
QUANTIZE = ["bitsandbytes>=0.50.0,<1"]  # 4- and 8-bit language models
BROWSER = ["playwright>=1.65.0", "axe-playwright-python>=0.1.8"]
PYTEST = ["pytest>=9.0.0", "pytest-xdist>=3.8.0"]
# Tests do with our models what users of these do.
USERS = ["trl>=1.16.0", "onnx>=1.23.0", "onnxscript>=0.7.0", "onnxruntime>=1.32.0", "moto[server]>=5.2.5"]
TEST_LIBRARY = [*TRAIN, *EVAL, *QUANTIZE, *USERS, *PYTEST]
TEST = [*TEST_LIBRARY, *SPACE, *BROWSER, "ruff>=0.17.0", "mkdocs>=1.6.0,<2"]

setup(
    name="blip2x",
    version=VERSION,
    description="BLIP-2 for the Hugging Face ecosystem: both training stages, any vision encoder, any language model",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["modeling_blip2x", "blip2x_training", *(f"blip2x_training.{name}" for name in find_packages("training"))],
    package_dir={"blip2x_training": "training"},
    package_data={
        "blip2x_training": ["configs/**/*.yaml"],
        "blip2x_training.evaluation.report": ["*.jinja"],
        "blip2x_training.photo_run": ["*.jinja"],
    },
    entry_points={
        "console_scripts": [
            "blip2x-photos = blip2x_training.photos:command",
            "blip2x-stage1 = blip2x_training.pretrain_stage1:command",
            "blip2x-stage2 = blip2x_training.pretrain_stage2:command",
            "blip2x-finetune = blip2x_training.finetune:command",
            "blip2x-evaluate = blip2x_training.run_evaluation:command",
            "blip2x-cache = blip2x_training.cache_features:command",
            "blip2x-index = blip2x_training.index_dataset:command",
            "blip2x-capfilt = blip2x_training.bootstrap_captions:command",
            "blip2x-convert = modeling_blip2x.convert:command",
        ]
    },
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "space": SPACE,
        "quantize": QUANTIZE,
        "test-library": TEST_LIBRARY,
        "test": TEST,
    },
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
