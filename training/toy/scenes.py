"""Toy world of the embedded default: pictures of one or two coloured shapes, their captions, questions and answers.

A scene holds one shape near a corner, or two shapes one of which is clearly left of or above the other. Its caption is
canonical (left before right, upper before lower), so that an exact match is well defined. Four colour-shape pairs are
held out: the training, dev and test_new splits never show, name or ask about them, and every scene of test_held_out
shows at least one. Everything is drawn from a seed.

    python -m blip2x_training.toy.scenes --output_dir scenes --seed 0

writes `data/<split>-00000-of-00001.parquet` (PNG bytes inside), which `datasets.load_dataset(folder)` reads.
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 48
COLORS = {
    "red": (225, 45, 45),
    "green": (40, 185, 60),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 50),
    "purple": (175, 60, 200),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
RADII = {"small": (6.0, 7.0), "big": (9.5, 10.5)}  # pixels
NUMBERS = ("zero", "one", "two")
HELD_OUT_PAIRS = (("red", "ring"), ("green", "triangle"), ("blue", "square"), ("yellow", "cross"))
ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
QUESTION_TYPES = ("color", "shape", "size", "count", "relation", "exists")
CAPTION_PROMPT = "a picture of"
QUESTION_PROMPT = "Question: {} Answer:"
SPLIT_SIZES = {"train": 10000, "dev": 300, "test_new": 400, "test_held_out": 400}
# Random numbers of each split. Those of the test splits were chosen anew after tuning; since then only the number of
# stage-1 steps was raised.
STREAMS = {"train": 0, "dev": 1, "test_new": 22, "test_held_out": 23}


@dataclass(frozen=True)
class Thing:
    """One shape; centre and radius in pixels, y pointing down."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in the order of the caption. `layout` is "across" or "down" for two, e.g. "top left" for one."""

    things: tuple[Thing, ...]
    layout: str

    @property
    def caption(self) -> str:
        first = f"a {self.things[0].name}"
        if len(self.things) == 1:
            return f"{first} at the {self.layout}"
        relation = "left of" if self.layout == "across" else "above"
        return f"{first} {relation} a {self.things[1].name}"


def draw_scene(rng: np.random.Generator, pairs: tuple = SEEN_PAIRS, first_pair: tuple | None = None) -> Scene:
    """Draws a scene whose colour-shape pairs come from `pairs`, one of them being `first_pair` if that is given."""
    pair = first_pair or pairs[rng.integers(len(pairs))]
    if rng.random() < 0.2:
        size, radius = _draw_size(rng)
        low, high = radius + 1, IMAGE_SIZE / 2 - 4  # a centre at least 4 pixels off the middle lines
        x, y = rng.uniform(low, high, 2)
        right, bottom = rng.random(2) < 0.5
        x, y = (IMAGE_SIZE - x if right else x), (IMAGE_SIZE - y if bottom else y)
        layout = f"{'bottom' if bottom else 'top'} {'right' if right else 'left'}"
        return Scene((Thing(size, *pair, x, y, radius),), layout)

    other = _draw_related_pair(rng, pair, pairs)
    chosen = [pair, other] if rng.random() < 0.5 else [other, pair]
    (size_a, radius_a), (size_b, radius_b) = _draw_size(rng), _draw_size(rng)
    along_a, along_b = _draw_apart(rng, radius_a, radius_b)
    # Off the main direction the two stay closer together than along it, so that one relation holds only.
    slack = along_b - along_a - 4
    while True:
        side_a = rng.uniform(radius_a + 1, IMAGE_SIZE - radius_a - 1)
        side_b = rng.uniform(radius_b + 1, IMAGE_SIZE - radius_b - 1)
        if abs(side_a - side_b) <= slack:
            break
    layout = "across" if rng.random() < 0.5 else "down"
    positions = [(along_a, side_a), (along_b, side_b)]
    if layout == "down":
        positions = [(side, along) for along, side in positions]
    sizes = [(size_a, radius_a), (size_b, radius_b)]
    things = tuple(Thing(s, *p, *xy, r) for (s, r), p, xy in zip(sizes, chosen, positions, strict=True))
    return Scene(things, layout)


def _draw_size(rng: np.random.Generator) -> tuple[str, float]:
    size = tuple(RADII)[rng.integers(2)]
    return size, rng.uniform(*RADII[size])


def _draw_related_pair(rng: np.random.Generator, pair: tuple, pairs: tuple) -> tuple:
    """A second pair; often of the same colour or shape, so that counts of two and doubtful references occur."""
    chance = rng.random()
    if chance < 0.25:
        pairs = [p for p in pairs if p[0] == pair[0]]
    elif chance < 0.5:
        pairs = [p for p in pairs if p[1] == pair[1]]
    return pairs[rng.integers(len(pairs))]


def _draw_apart(rng: np.random.Generator, radius_a: float, radius_b: float) -> tuple[float, float]:
    """Two centres along the main direction that leave a gap between the shapes."""
    gap = radius_a + radius_b + 2
    a = rng.uniform(radius_a + 1, IMAGE_SIZE - radius_b - 1 - gap)
    return a, rng.uniform(a + gap, IMAGE_SIZE - radius_b - 1)


def render(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    """Pictures (n, 48, 48, 3), uint8: anti-aliased shapes on a dark noisy ground, colours jittered a little."""
    n = len(scenes)
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    canvas = np.repeat(rng.uniform(20, 50, (n, 1, 1, 1)), 3, axis=3).astype(np.float32)
    canvas = np.broadcast_to(canvas, (n, IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for slot in range(2):
        rows = np.array([i for i, scene in enumerate(scenes) if len(scene.things) > slot], dtype=int)
        if len(rows) == 0:
            continue
        things = [scenes[i].things[slot] for i in rows]
        place = np.array([(thing.x, thing.y, thing.radius) for thing in things], dtype=np.float32)
        x = (grid[None, None, :] - place[:, 0, None, None]) / place[:, 2, None, None]  # in radii
        y = (grid[None, :, None] - place[:, 1, None, None]) / place[:, 2, None, None]
        distance = np.empty((len(rows), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
        for shape in SHAPES:
            of_shape = [j for j, thing in enumerate(things) if thing.shape == shape]
            distance[of_shape] = _distance(shape, x[of_shape], y[of_shape])
        cover = np.clip(0.5 - distance * place[:, 2, None, None], 0, 1)[..., None]
        color = np.array([COLORS[thing.color] for thing in things], dtype=np.float32)
        color = color + rng.normal(0, 10, color.shape).astype(np.float32)
        canvas[rows] = canvas[rows] * (1 - cover) + color[:, None, None, :] * cover
    canvas += rng.normal(0, 4, canvas.shape).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in radii, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9
    if shape == "triangle":  # pointing up
        return np.maximum(y - 0.75, 0.87 * np.abs(x) - 0.5 * y - 0.5)
    if shape == "cross":
        return np.minimum(np.maximum(np.abs(x) - 1, np.abs(y) - 0.32), np.maximum(np.abs(y) - 1, np.abs(x) - 0.32))
    return np.abs(np.hypot(x, y) - 0.75) - 0.25  # ring


def ask(scene: Scene, rng: np.random.Generator, pairs: tuple = SEEN_PAIRS) -> list[tuple[str, str, str]]:
    """One (type, question, answer) for each question type that the scene can answer.

    Answers are drawn evenly where the scene leaves a choice, so that guessing without the picture pays little.
    `pairs` are the colour-shape pairs that may be named.
    """
    drawn = [_ask_color(scene, rng), _ask_shape(scene, rng), _ask_size(scene, rng), _ask_count(scene, rng)]
    drawn += [_ask_relation(scene, rng), _ask_exists(scene, rng, pairs)]
    return [(kind, *qa) for kind, qa in zip(QUESTION_TYPES, drawn, strict=True) if qa is not None]


def _reference(scene: Scene, thing: Thing, *attributes: str) -> str | None:
    """The attributes' words if they fit this thing only."""
    words = [getattr(thing, attribute) for attribute in attributes]
    fitting = [t for t in scene.things if [getattr(t, attribute) for attribute in attributes] == words]
    return " ".join(words) if len(fitting) == 1 else None


def _pick(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[rng.integers(len(scene.things))]


def _ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(scene, rng)
    name = _reference(scene, thing, "size", "shape")
    return (f"what color is the {name}?", thing.color) if name else None


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(scene, rng)
    name = _reference(scene, thing, "size", "color")
    return (f"what shape is the {name} thing?", thing.shape) if name else None


def _ask_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(scene, rng)
    name = _reference(scene, thing, "color", "shape")
    return (f"what size is the {name}?", thing.size) if name else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    answers: dict[int, list[str]] = {len(scene.things): ["things"]}
    for color in COLORS:
        answers.setdefault(sum(t.color == color for t in scene.things), []).append(f"{color} things")
    for shape, plural in SHAPES.items():
        answers.setdefault(sum(t.shape == shape for t in scene.things), []).append(plural)
    number = sorted(answers)[rng.integers(len(answers))]
    return f"how many {answers[number][rng.integers(len(answers[number]))]} are there?", NUMBERS[number]


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if len(scene.things) == 1:
        return None
    index = int(rng.integers(2))
    names = [_reference(scene, thing, "color", "shape") for thing in scene.things]
    if None in names:
        return None
    answer = (("left", "right") if scene.layout == "across" else ("above", "below"))[index]
    return f"where is the {names[index]} from the {names[1 - index]}?", answer


def _ask_exists(scene: Scene, rng: np.random.Generator, pairs: tuple) -> tuple[str, str]:
    shown = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        thing = _pick(scene, rng)
        return f"is there a {thing.color} {thing.shape}?", "yes"
    absent = [pair for pair in pairs if pair not in shown]
    colors, shapes = {color for color, _ in shown}, {shape for _, shape in shown}
    near = [pair for pair in absent if pair[0] in colors or pair[1] in shapes]
    swapped = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    chance = rng.random()
    pool = swapped if swapped and chance < 0.4 else near if near and chance < 0.8 else absent
    return "is there a {} {}?".format(*pool[rng.integers(len(pool))]), "no"


def draw_split(split: str, seed: int, size: int | None = None) -> tuple[list[Scene], np.random.Generator]:
    """The scenes of a split, and the generator to go on with. Each split has a stream of its own."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLIT_SIZES)}.")
    rng = np.random.default_rng([seed, STREAMS[split]])
    count = SPLIT_SIZES[split] if size is None else size
    if split != "test_held_out":
        return [draw_scene(rng) for _ in range(count)], rng
    first = [HELD_OUT_PAIRS[rng.integers(len(HELD_OUT_PAIRS))] for _ in range(count)]
    return [draw_scene(rng, ALL_PAIRS, pair) for pair in first], rng


def make_rows(split: str, seed: int, size: int | None = None) -> dict[str, list]:
    """Columns of a split.

    image: PNG bytes; caption: str; prompt and text: equally long lists, the caption under its prompt and then each
    question under its prompt with the answer; type: "caption" or the question type of each of these; question: bare.
    """
    scenes, rng = draw_split(split, seed, size)
    asking = rng.spawn(1)[0]  # of its own, so that pictures do not depend on what is asked
    pairs = ALL_PAIRS if split == "test_held_out" else SEEN_PAIRS
    rounds = 2 if split == "train" else 1  # two draws of questions a training picture cost nothing
    rows: dict[str, list] = {name: [] for name in ("image", "caption", "prompt", "text", "type", "question")}
    for start in range(0, len(scenes), 500):
        for scene, pixels in zip(scenes[start : start + 500], render(scenes[start : start + 500], rng), strict=True):
            asked = [qa for _ in range(rounds) for qa in ask(scene, asking, pairs)]
            # The caption is as long as five answers: it gets a quarter of the draws.
            texts = [("caption", "", scene.caption)] * (3 if split == "train" else 1) + asked
            rows["image"].append({"bytes": _png(pixels), "path": None})
            rows["caption"].append(scene.caption)
            rows["type"].append([kind for kind, _, _ in texts])
            rows["question"].append([question for _, question, _ in texts])
            rows["prompt"].append([QUESTION_PROMPT.format(q) if q else CAPTION_PROMPT for _, q, _ in texts])
            rows["text"].append([answer for _, _, answer in texts])
    return rows


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def write_scenes(output_dir: str | Path, seed: int, sizes: dict[str, int] | None = None) -> Path:
    """Writes all splits below `output_dir`; a split file that is already there is kept."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    words = List(Value("string"))
    features = Features(
        image=ImageFeature(), caption=Value("string"), prompt=words, text=words, type=words, question=words
    )
    folder = Path(output_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (sizes or SPLIT_SIZES).items():
        target = folder / f"{split}-00000-of-00001.parquet"
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            Dataset.from_dict(make_rows(split, seed, size), features=features).to_parquet(str(unfinished))
            unfinished.rename(target)
    return Path(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the toy scenes.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_scenes(arguments.output_dir, arguments.seed))
