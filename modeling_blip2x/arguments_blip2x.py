"""The keyword arguments of a processor's call: which go to the text, which to the images, and which are refused.

transformers warns of an unknown argument and goes on without it; here it is an error.
"""

import difflib

NOT_OF_PROMPTS = {
    "text_pair": "a prompt is one text; put both into it",
    "text_target": "labels are made of the answer's ids; encode it with processor.tokenizer",
    "text_pair_target": "labels are made of the answer's ids; encode it with processor.tokenizer",
    "is_split_into_words": "a prompt is one string; join the words",
    "stride": "a prompt that is too long is cut, not spread over several rows",
    "return_overflowing_tokens": "a prompt that is too long is cut, not spread over several rows",
    "sanitize_control_tokens": "image tokens could not be told from marked ones; take special tokens out of the text",
}
OF_PROMPTS = {
    "return_mm_token_type_ids": "a text of stage 1 has no image tokens",
    "return_text_replacement_offsets": "a text of stage 1 has no image tokens",
    "sanitize_control_tokens": "take special tokens out of the text",
}
TEXT_ARGUMENTS = {
    *("add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side", "verbose"),
    *("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping"),
    *("return_length", "return_tensors", "split_special_tokens", *NOT_OF_PROMPTS, *OF_PROMPTS),
}


def split_arguments(given: dict, of_images: set[str]) -> tuple[dict, dict]:
    """Split arguments into the text's and the images'; what both know goes to both, and None counts as not given.

    Args:
        given: by name, or in groups: text_kwargs, images_kwargs, and common_kwargs for both.
        of_images: names of the image processor's arguments.

    Raises:
        TypeError: an argument that neither has, or that is given twice.
    """
    known = {"text_kwargs": TEXT_ARGUMENTS, "images_kwargs": of_images}
    groups = {name: dict(given.get(name) or {}) for name in (*known, "common_kwargs")}
    single = groups.pop("common_kwargs") | {
        name: value for name, value in given.items() if name not in (*known, "common_kwargs")
    }
    for group, arguments in groups.items():
        _name_unknown(arguments, known[group], f" in {group}")
        twice = sorted(arguments.keys() & single.keys())
        if twice:
            raise TypeError(f"The argument {twice[0]!r} is given by itself and in {group}. Give it once.")
        arguments |= {name: value for name, value in single.items() if name in known[group]}
    _name_unknown(single, TEXT_ARGUMENTS | of_images, "")
    return tuple({name: value for name, value in groups[group].items() if value is not None} for group in known)


def _name_unknown(arguments: dict, known: set[str], where: str) -> None:
    for name, value in arguments.items():
        if name not in known and value is not None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Is it {near[0]!r}?" if near else ""
            raise TypeError(f"A processor of images and texts takes no argument {name!r}{where}.{hint}")


def refuse(options: dict, refused: dict[str, str]) -> None:
    """Raise ValueError for an argument, by its name, that has no meaning here. False and 0 ask for nothing."""
    for name, reason in refused.items():
        value = options.get(name)
        if value is not None and value is not False and not (name == "stride" and value == 0):
            raise ValueError(f"{name}={value!r} is not supported here: {reason}.")
