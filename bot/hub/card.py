"""The metadata at the head of a README.md: read as hostile YAML, and checked as the Hub's validate-yaml does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_MAX_BYTES = 512 * 1024
_HEADER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

# https://huggingface.co/docs/hub/repositories-licenses
_LICENSE_LIST = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENSES = frozenset(_LICENSE_LIST.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual", re.ASCII)


class _Loader(yaml.SafeLoader):
    """Safe loading without aliases: a few hundred bytes of them expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = parent.start_mark if parent is not None else None
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)


class CardError(Exception):
    """The metadata cannot be read; the message says why."""


def metadata(text: str) -> dict[str, Any] | None:
    """The metadata of a card; None where it has none. Raises CardError."""
    match = _HEADER.match(text)
    if match is None:
        return None
    if len(match[1]) > _MAX_BYTES:
        raise CardError(f"The metadata is longer than {_MAX_BYTES} characters.")
    try:
        value = yaml.load(match[1], Loader=_Loader)  # noqa: S506 - a safe loader, and stricter
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise CardError(f"Invalid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CardError("The metadata must be a mapping of keys to values.")
    return {str(key): _plain(each) for key, each in value.items()}


def problems(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses the card, and warnings."""
    try:
        found = metadata(text)
    except CardError as error:
        return [str(error)], []
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    return list(_errors(found)), list(_warnings(found))


def tags(data: dict[str, Any]) -> list[str]:
    """The tags a repository shows because of its card."""
    found = [str(data["library_name"])] if data.get("library_name") else []
    found += [str(data["pipeline_tag"])] if data.get("pipeline_tag") else []
    found += [str(tag) for tag in strings(data.get("tags"))]
    found += [f"dataset:{each}" for each in strings(data.get("datasets"))]
    found += strings(data.get("language"))
    relation = data.get("base_model_relation")
    for each in strings(data.get("base_model")):
        found.append(f"base_model:{each}")
        found += [f"base_model:{relation}:{each}"] if relation else []
    found += [f"license:{each}" for each in strings(data.get("license"))]
    return list(dict.fromkeys(found))


def strings(value: Any) -> list[str]:
    """A value that may be one string or a list of them, as a list."""
    if isinstance(value, str):
        return [value]
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _errors(data: dict[str, Any]) -> Iterator[str]:
    for key in ("pipeline_tag", "library_name", "license_name", "license_link", "thumbnail", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in ("tags", "datasets", "metrics", "language", "base_model", "license"):
        value = data.get(key)
        listed = value if isinstance(value, list) else [value]
        if key in data and not all(isinstance(each, str) and each for each in listed):
            yield f'"{key}" must be a string or a list of strings'
    for each in strings(data.get("license")):
        if each not in LICENSES:
            yield f'"license" {each!r} must be one of the Hub\'s identifiers; use "other" with license_name'
    for each in strings(data.get("base_model")):
        if not _REPO.fullmatch(each):
            yield f'"base_model" with value {each!r} is not valid. Use a model id from https://hf.co/models.'
    for each in strings(data.get("language")):
        if not _LANGUAGE.fullmatch(each):
            yield f'"language" {each!r} must be an ISO 639-1, 639-2 or 639-3 code'
    if isinstance(data.get("base_model_relation"), str) and data["base_model_relation"] not in RELATIONS:
        yield f'"base_model_relation" must be one of {", ".join(RELATIONS)}'
    if "model-index" in data:
        yield from _index_errors(data["model-index"])


def _index_errors(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not index:
        yield '"model-index" must be a list'
        return
    for i, model in enumerate(index):
        at = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"{at}.name" is required'
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list):
            yield f'"{at}.results" must be an array'
            continue
        for j, result in enumerate(results):
            here = f"{at}.results[{j}]"
            if not isinstance(result, dict):
                yield f'"{here}" must be a mapping'
                continue
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                value = result.get(part)
                for key in keys:
                    if not isinstance(value, dict) or not isinstance(value.get(key), str):
                        yield f'"{here}.{part}.{key}" is required'
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                yield f'"{here}.metrics" must be an array'
                continue
            for k, metric in enumerate(metrics):
                for key in ("type", "value"):
                    if not isinstance(metric, dict) or metric.get(key) is None:
                        yield f'"{here}.metrics[{k}].{key}" is required'


def _warnings(data: dict[str, Any]) -> Iterator[str]:
    if "license" not in data:
        yield "The card names no license."
    if data.get("license") == "other" and not data.get("license_name"):
        yield 'A license "other" should be named by "license_name" and "license_link".'


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates as text, keys as strings."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
