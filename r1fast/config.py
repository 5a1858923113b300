"""Reads a recipe: YAML and `key.path=value` overrides into the typed objects of schema.py, and back.

Whatever is wrong with what the user wrote is raised here as one sentence (UserError) naming the place, before any
work starts. The object returned is the one the run uses and the one written to RUN_DIR/config.yaml.
"""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from r1fast.schema import RecipeConfig

PRESETS = Path(__file__).parent / "recipes"
DEFAULT_PRESET = "tiny"


class UserError(Exception):
    """Bad input: one clear sentence (what, where, what to do). The command line prints it and exits with code 2."""


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def presets() -> dict[str, str]:
    """Name -> description of the recipes that come with r1fast, read without parsing the YAML (for a quick --help)."""
    found = {}
    for path in sorted(PRESETS.glob("*.yaml")):
        line = re.search(r"^description: *(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found[path.stem] = line.group(1).strip("\"' ") if line else ""
    return found


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> RecipeConfig:
    """The recipe of a preset's name or a YAML file, with each `key.path=value` of `overrides` applied in order.

    Values are YAML. A path may name an entry of a list by its index, and may add an entry where the schema holds
    named ones (stages, tasks, rewards, options); `null` there removes the entry. Relative paths inside a recipe are
    taken from the current directory. Raises UserError for everything that is wrong with either.
    """
    path = find_recipe(name_or_path)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with `name`, `tasks` and `stages`, not {shown(raw)}")
    raw = json.loads(json.dumps(raw, default=str))  # an anchor's block becomes as many, so that an override changes one
    named = {block: set(raw.get(block) or ()) for block in ("stages", "tasks") if isinstance(raw.get(block), dict)}
    for text in overrides:
        _apply(raw, text)
    try:
        # JSON's strict mode is the one that takes a list for a tuple but neither "3" nor `yes` for a number.
        return RecipeConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error, raw, path, list(overrides), named)) from None


def find_recipe(name_or_path: str) -> Path:
    """The YAML file that the user means; UserError lists the presets when there is none."""
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"} or given.is_file():
        if not given.is_file():
            raise UserError(f"no recipe file {name_or_path}; presets are {', '.join(presets())}")
        return given
    preset = PRESETS / f"{name_or_path}.yaml"
    if "/" in name_or_path or not preset.is_file():
        raise UserError(
            f"no recipe {name_or_path!r}{nearest(name_or_path, list(presets()))}; presets are {', '.join(presets())}, "
            f"or give the path of a .yaml file"
        )
    return preset


def dump_recipe(recipe: RecipeConfig) -> str:
    """The whole recipe as YAML, every default written out: loading it gives an equal object."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=120)


# -- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the C parser reads a preset in 5 ms instead of 50
    """Safe YAML, with the three traps of YAML 1.1 removed: `3e-6` is a number, dates stay text, a key given twice is an
    error instead of the last one winning."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or a block, not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """The parsed file; UserError with the line where it is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}:{_yaml_problem(error)}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.line + 1}: " if mark else " "
    return f"{where}malformed YAML: {getattr(error, 'problem', None) or error}"


# -- overrides ----------------------------------------------------------------------------------------------------


def _apply(raw: dict, text: str) -> None:
    """Sets one `key.path=value` in the raw mapping, making blocks on the way; what they may hold is validated after."""
    key, equals, value_text = text.partition("=")
    keys = key.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {text!r} is not of the form key.path=value")
    try:
        value = yaml.load(value_text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: malformed YAML value: {getattr(error, 'problem', error)}") from None
    holder: Any = raw
    for depth, part in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(holder, list):
            if not part.isdigit() or int(part) >= len(holder):
                where, last_index = ".".join(keys[:depth]), len(holder) - 1
                raise UserError(f"override {text!r}: {where} is a list; name one of its entries by 0..{last_index}")
            part = int(part)
        elif not isinstance(holder, dict):
            raise UserError(f"override {text!r}: {'.'.join(keys[:depth])} is {shown(holder)}, which has no keys")
        if last and value is None and isinstance(holder, dict) and _holds_named(raw, keys[:-1]):
            if part not in holder:
                raise UserError(f"override {text!r} removes what is not there{nearest(part, list(holder))}")
            del holder[part]
        elif last:
            holder[part] = value
        else:
            if isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]


def _holds_named(raw: dict, keys: list[str]) -> bool:
    return get_origin(_bare(schema_at(raw, keys))) is dict


# -- what the schema says at a place ------------------------------------------------------------------------------


def _bare(annotation: Any) -> Any:
    """The type without Annotated and Optional."""
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if get_origin(annotation) in {Union, UnionType}:
        inner = [a for a in get_args(annotation) if a is not type(None)]
        if len(inner) == 1:
            return _bare(inner[0])
    return annotation


def schema_at(raw: Any, keys: list[str] | tuple) -> Any:
    """The annotation that schema.py gives the place `keys` of a raw recipe (a stage's class by its `kind`), or None."""
    kind, value = RecipeConfig, raw
    for key in keys:
        kind = _bare(kind)
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif get_origin(kind) is list:
            kind = get_args(kind)[0]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            field = next((f for n, f in kind.model_fields.items() if key in {n, f.alias}), None)
            if field is None:
                return None
            kind = field.annotation
        else:
            return None
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            value = None
        kind = _by_kind(kind, value)
    return kind


def _by_kind(annotation: Any, value: Any) -> Any:
    """Of a union of stage classes, the one whose `kind` the raw value names."""
    bare = _bare(annotation)
    if get_origin(bare) not in {Union, UnionType}:
        return annotation
    wanted = value.get("kind") if isinstance(value, dict) else None
    for option in get_args(bare):
        if "kind" in getattr(option, "model_fields", {}) and wanted in get_args(option.model_fields["kind"].annotation):
            return option
    return annotation


def known_keys(annotation: Any) -> list[str]:
    """The keys a block may have, as the YAML spells them."""
    kind = _bare(annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [f.alias or name for name, f in kind.model_fields.items()]
    return []


# -- errors as sentences ------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list of two numbers",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean X?)', or nothing where no known word is near."""
    match = get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _explain(error: ValidationError, raw: dict, path: Path, overrides: list[str], named: dict[str, set]) -> str:
    """The first error as a sentence, and how many more there are."""
    first, *rest = error.errors()
    location = _location(raw, first["loc"])
    block = location[0] if location else None
    absent = len(location) >= 2 and block in named and location[1] not in named[block]
    new_without_kind = absent and first["type"] in {"union_tag_not_found", "missing"}
    dotted = ".".join(map(str, location[:2] if new_without_kind else location))
    culprit = next((o for o in reversed(overrides) if _concerns(o.partition("=")[0], dotted)), None)
    where = f"override {_without_secret(culprit)!r}" if culprit else str(path)
    more = f" (and {len(rest)} more)" if rest else ""
    if new_without_kind:
        near = nearest(location[1], sorted(named[block]))
        return f"{where}: the recipe has no {block[:-1]} {location[1]!r}{near}; a new one needs its `kind`{more}"
    return f"{where}: {_sentence(first, raw, location)}{more}"


_SECRET = re.compile(r"(key|token|secret|password|url)$", re.IGNORECASE)


def _without_secret(override: str) -> str:
    """An override as it may be said again, where others read it too."""
    key, _, _ = override.partition("=")
    return f"{key}=***" if _SECRET.search(key) else override


def _concerns(override: str, dotted: str) -> bool:
    return dotted == override or dotted.startswith(override + ".") or override.startswith(dotted + ".")


def _location(raw: dict, loc: tuple) -> list:
    """Pydantic's location without the tag that it puts after a stage's name."""
    keys = list(loc)
    if len(keys) >= 3 and keys[0] == "stages":
        del keys[2]
    return keys


def _sentence(error: dict, raw: dict, keys: list) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    place = ".".join(map(str, keys))
    above = ".".join(map(str, keys[:-1])) or "the recipe"
    if kind == "extra_forbidden":
        known = known_keys(schema_at(raw, keys[:-1]))
        near = nearest(keys[-1], known)
        return f"unknown key {keys[-1]!r} in {above}{near or '; known are ' + ', '.join(known)}"
    if kind == "missing" and isinstance(keys[-1], int):  # of a pair
        return f"{above} needs {keys[-1] + 1} values"
    if kind == "missing":
        return f"{above} needs the key {keys[-1]!r}"
    if kind == "union_tag_not_found":
        if isinstance(given, dict):
            return f"{place} needs the key 'kind'"
        return f"{place} must be a mapping, not {shown(given)}"
    if kind == "union_tag_invalid":
        kinds = re.findall(r"'(\w+)'", context["expected_tags"])
        return f"{place}.kind is {context['tag']!r}{nearest(context['tag'], kinds)}; kinds are {', '.join(kinds)}"
    if kind == "literal_error":
        return f"{place} must be {context['expected']}, not {shown(given)}"
    if kind in {"too_long", "too_short"}:
        return f"{place} must be a list of {context.get('max_length', context.get('min_length'))}, not {shown(given)}"
    if kind in _EXPECTED:
        return f"{place} must be {_EXPECTED[kind]}, not {shown(given)}"
    message = error["msg"].removeprefix("Input should ").removeprefix("Value error, ")
    return f"{place} should {message}, not {shown(given)}" if message.startswith("be ") else f"{place}: {message}"
