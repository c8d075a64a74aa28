"""Which rows show the same image: by all of its bytes, never by a name, a size or a part of the bytes."""

from collections.abc import Callable, Sequence

from .images import BadRow, FoundImage


class ImageNumbers:
    """Numbers of images, equal where their bytes are, over one data set or several that are trained on together.

    Little is read: nothing of an image whose size no other has, and both ends of the others; all of it only where the
    ends are equal too, as of pictures without compression that have white margins.
    """

    def __init__(self):
        self.count = 0
        self.places: dict[str | tuple, int] = {}
        # By size, (size, ends) and (size, ends, content): the only image like that with its number, or None for several
        # of equal size or ends, which have longer keys.
        self.images: dict[tuple, tuple[FoundImage, int] | None] = {}
        self.numbers_of_ids: dict[tuple[int, str], dict[str | None, int]] = {}  # by number of the content, data set

    def number_rows(
        self, found: Sequence[FoundImage | BadRow], ids: Sequence[str | None] | None = None, dataset: str = ""
    ) -> list[int]:
        """A number for each row of a data set; -1 for bad rows.

        Images that are equal, but have different `ids`, count as different: the data set says so.
        """
        ids = ids or [None] * len(found)
        return [
            -1 if isinstance(image, BadRow) else self.with_id(self.by_content(image), image_id, dataset)
            for image, image_id in zip(found, ids, strict=True)
        ]

    def by_content(self, image: FoundImage) -> int:
        if image.place is not None and image.place in self.places:
            return self.places[image.place]
        number = self.search(image)
        if image.place is not None:
            self.places[image.place] = number
        return number

    def search(self, image: FoundImage) -> int:
        key = (image.size,)
        for measure in (ends_of, content_of):
            if key not in self.images:
                return self.keep(key, image)
            first = self.images[key]
            if first is not None:  # the second image of this key: the first one moves to a longer key
                self.images[key] = None
                self.images[(*key, measure(first[0]))] = first
            key = (*key, measure(image))
        return self.images[key][1] if key in self.images else self.keep(key, image)

    def keep(self, key: tuple, image: FoundImage) -> int:
        self.images[key] = image, self.next_number()
        return self.images[key][1]

    def with_id(self, number: int, image_id: str | None, dataset: str) -> int:
        if image_id is None:
            return number
        numbers = self.numbers_of_ids.setdefault((number, dataset), {})
        if image_id not in numbers:
            numbers[image_id] = self.next_number() if numbers else number
        return numbers[image_id]

    def next_number(self) -> int:
        self.count += 1
        return self.count - 1


def rows_by_image(rows: Sequence[int], found: Sequence[FoundImage | BadRow], numbers: Sequence[int]) -> list[list[int]]:
    """The rows that validation and evaluation count as one image, in the order of the first ones.

    These are rows of one number (see `ImageNumbers`); copies in files of different names stay apart, as official figures
    count them and evaluation servers want an answer for each.
    """
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        place = found[row].place
        groups.setdefault((numbers[row], place if isinstance(place, str) else None), []).append(row)
    return list(groups.values())


def ends_of(image: FoundImage) -> object:
    return measured(image.ends)


def content_of(image: FoundImage) -> object:
    return measured(image.content)


def measured(measure: Callable[[], bytes]) -> object:
    """What is measured; something of its own for an image that cannot be read, which is equal to no other."""
    try:
        return measure()
    except OSError:
        return object()
