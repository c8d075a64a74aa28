"""Reads a command line, and the YAML file it names, into a dataclass of fields.

A YAML file given by --config sets defaults, flags on the command line override them. Both go through
`transformers.HfArgumentParser`, so a value means the same in either place. Whatever is wrong (unknown keys and flags,
wrong types, values out of range, missing fields) is collected and reported at once.
"""

import argparse
import difflib
import json
import logging
import typing
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..system.atomic_files import write_whole

# peft imports bitsandbytes where it is installed, which then misses an optional package aloud, whatever the command is.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

CONFIGS = Path(__file__).parents[1] / "configs"
MOST_SUGGESTED = 3  # a flag such as --model fits so many fields that a list of them would be no hint


def parse_arguments(kind: type, argv: list[str]):
    """Read `argv` (and the YAML file it names) into a dataclass of the given kind.

    Raises ValueError with one line for each wrong field.
    """
    # Neither ends at the first mistake, since all are reported at once, nor takes prefixes of flags: one that is unique
    # today would turn ambiguous, or mean another field, when a field is added.
    parser = HfArgumentParser(kind, exit_on_error=False, allow_abbrev=False, description=kind.__doc__)
    parser.add_argument("--config", help="YAML file with defaults for the fields below.")
    if any(flag in ("-h", "--help") for flag in argv):
        parser.print_help()
        raise SystemExit(0)

    groups, problems = split_flags(argv)
    config = [values for flag, values in groups if flag == "--config"]
    values, from_file = read_yaml(config[-1], parser, kind) if config else ({}, [])
    problems += from_file
    for flag, tokens in groups:
        if flag != "--config":
            read_flag(parser, kind, flag, tokens, values, problems)

    arguments = kind(**values)
    # A mapping comes as text from either place: HfArgumentParser knows lists, but no mappings.
    if isinstance(getattr(arguments, "qformer_config", None), str):
        try:
            arguments.qformer_config = json.loads(arguments.qformer_config)
            assert isinstance(arguments.qformer_config, dict)
        except (ValueError, AssertionError):
            problems.append(
                f"--qformer_config is {arguments.qformer_config!r}, but must be a mapping such as "
                "'{\"hidden_size\": 256}'."
            )
    problems += arguments.problems()
    if problems:
        raise ValueError(
            f"{len(problems)} wrong {'field' if len(problems) == 1 else 'fields'}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return arguments


def split_flags(argv: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Group a command line into (flag, values) pairs; a value that no flag precedes is a problem."""
    groups, problems = [], []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            groups.append((flag.replace("-", "_").replace("__", "--", 1), [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            problems.append(f"{token!r} stands before any flag. Write --field {token}.")
    return groups, problems


def read_yaml(tokens: list[str], parser: HfArgumentParser, kind: type) -> tuple[dict, list[str]]:
    """Values and problems of a YAML file. Each value takes the command line's way, so types are checked once."""
    if len(tokens) != 1:
        return {}, [f"--config takes one YAML file, not {tokens}."]
    path = Path(tokens[0])
    if not path.exists() and (CONFIGS / path).exists():  # a recipe that comes with the package
        path = CONFIGS / path
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, or no such date
        return {}, [f"--config {path} cannot be read: {error}. Check the path and the YAML."]
    if not isinstance(content, dict):
        return {}, [f"--config {path} holds a {type(content).__name__}, but must hold lines of `field: value`."]
    values, problems = {}, []
    for key, value in content.items():
        if isinstance(value, list):
            read_flag(parser, kind, f"--{key}", [str(item) for item in value], values, problems)
        else:
            text = json.dumps(value) if isinstance(value, dict) else "null" if value is None else str(value)
            read_flag(parser, kind, f"--{key}", [text], values, problems)
    return values, [f"{problem} (in {path})" for problem in problems]


def read_flag(parser: HfArgumentParser, kind: type, flag: str, tokens: list[str], values: dict, problems: list) -> None:
    """Put the value of one flag into `values`, or what is wrong with it into `problems`."""
    names = field_names(kind)
    name = flag.removeprefix("--")
    if name not in names and name.removeprefix("no_") not in names:
        problems.append(f"{flag} is not a field. {suggestion(name, names)}")
        return
    name = name if name in names else name.removeprefix("no_")
    if tokens in (["null"], ["None"]):  # the way back to a default of null that a YAML file overrides
        if type(None) in typing.get_args(typing.get_type_hints(kind)[name]):
            values[name] = None
        else:
            problems.append(f"{flag} cannot be null. Leave it out for its default, or give a value.")
        return
    if not tokens and bool in typing.get_args(typing.get_type_hints(kind)[name]) and flag == f"--{name}":
        tokens = ["true"]  # as of a field that cannot be null, where HfArgumentParser itself takes it so
    try:
        # "=" keeps a value that starts with a dash, such as -2, from being read as another flag.
        known, rest = parser.parse_known_args([f"{flag}={tokens[0]}"] if len(tokens) == 1 else [flag, *tokens])
    except argparse.ArgumentError as error:
        problems.append(f"{flag} {' '.join(tokens)}: {error.message.rstrip('.')}.")
        return
    if rest:
        problems.append(f"{flag} takes one value, but got {tokens}. Quote it, or drop the rest.")
        return
    values[name] = getattr(known, name)


def suggestion(name: str, names: list[str]) -> str:
    """Which fields a flag that is none may mean: those that hold its words, as batch_size, else the nearest spelling."""
    # By spelling alone batch_size is nearest to itc_chunk_size, which does something else.
    holding = [known for known in names if f"_{name}_" in f"_{known}_"]
    near = holding if 0 < len(holding) <= MOST_SUGGESTED else difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {' or '.join(f'--{one}' for one in near)}?" if near else "See --help for the fields."


def field_names(kind: type) -> list[str]:
    return [item.name for item in dataclass_fields(kind)]


ONCE = ("overwrite_output_dir", "accept_changes")  # meant for one command: its repeat continues, and looks again


def save_arguments(arguments: object, path: Path) -> None:
    """Write the fields as YAML that --config reads back, without those that are meant `ONCE`."""
    values = {name: value for name, value in asdict(arguments).items() if name not in ONCE}
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def changed_fields(arguments: object, path: Path) -> list[str]:
    """What differs from the YAML that an earlier run left at `path`, as `--field before -> now`.

    Raises ValueError where that is no YAML of fields any more.
    """
    if not path.exists():
        return []
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}).") from error
    if not isinstance(before, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(before).__name__}, not lines of `field: value`).")
    now = asdict(arguments)
    return [f"--{n} {before[n]} -> {now[n]}" for n in before if n in now and before[n] != now[n]]
