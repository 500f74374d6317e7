"""What a shard's `__metadata__` and config.json say about the quantized modules (spec 7 and 9)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SpqrError
from .header import MAX_NAME_BYTES, Header, short, strict_json
from .layout import Layout, Statistics

FORMAT_VERSION = "1.0"
MAJOR = 1
QUANT_METHOD = "spqr_format"
FEATURES = ("bilevel", "direct", "outliers", "perm")  # of 1.0, in the order in which files list them

VERSION_KEY, FEATURES_KEY, MODULES_KEY = "spqr_version", "spqr_features", "spqr_modules"
HASHES_KEY, HEADER_HASH_KEY = "spqr_sha256", "spqr_header_sha256"
KEYS = (VERSION_KEY, FEATURES_KEY, MODULES_KEY, HASHES_KEY, HEADER_HASH_KEY)
NO_HASH = "0" * 64  # stands for the header's own digest while it is computed

Cache = dict[tuple[str, str], tuple[list[str], dict[str, Layout]]]


@dataclass(frozen=True)
class ShardMetadata:
    """The parsed and checked SpQR part of one shard's `__metadata__`."""

    version: str
    features: list[str]
    modules: dict[str, Layout]
    sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Mapping[str, Layout], sha256: Mapping[str, str] | None = None) -> ShardMetadata:
        """The metadata that a shard with these modules stores."""
        return cls(FORMAT_VERSION, features_of(modules.values()), dict(modules), dict(sha256 or {}))

    def as_strings(self) -> dict[str, str]:
        """The `__metadata__` of a shard: the same modules always give the same strings."""
        strings = {
            "format": "pt",
            VERSION_KEY: self.version,
            FEATURES_KEY: compact_json(self.features),
            MODULES_KEY: compact_json({name: self.modules[name].as_dict() for name in sorted(self.modules)}),
        }
        if self.sha256:
            strings[HASHES_KEY] = compact_json({name: self.sha256[name] for name in sorted(self.sha256)})
        return strings


def parse(metadata: Mapping[str, str], where: str, cache: Cache | None = None) -> ShardMetadata:
    """The SpQR metadata of one shard. Raises E101 .. E104 and E006.

    `cache` keeps what was parsed: tools may repeat the same entries in every shard of a large checkpoint.
    """
    if VERSION_KEY not in metadata:
        raise SpqrError("E101", where, f"__metadata__ has no {VERSION_KEY}")
    version = metadata[VERSION_KEY]
    check_version(version, where, "E104")
    unknown = [key for key in metadata if key.startswith("spqr_") and key not in KEYS]
    missing = [key for key in (FEATURES_KEY, MODULES_KEY) if key not in metadata]
    if unknown or missing:
        problem = f"unknown key {short(unknown[0])}" if unknown else f"no {missing[0]}"
        raise SpqrError("E104", f"{where} __metadata__", problem)
    if metadata.get("format") != "pt":
        raise SpqrError("E104", f"{where} __metadata__", f'format = {short(metadata.get("format"))}, expected "pt"')
    key = (metadata[FEATURES_KEY], metadata[MODULES_KEY])
    if cache is None or key not in cache:
        parsed = _features(key[0], where), _modules(key[1], where)
        if set(parsed[0]) != set(features_of(parsed[1].values())):
            what = f"{parsed[0]}, but the entries of {MODULES_KEY} use {features_of(parsed[1].values())}"
            raise SpqrError("E104", f"{where} {FEATURES_KEY}", what)
        if cache is not None:
            cache[key] = parsed
    else:
        parsed = cache[key]
    hashes: dict[str, str] = {}
    if HASHES_KEY in metadata:
        hashes = _json(metadata[HASHES_KEY], f"{where} {HASHES_KEY}")
        check_schema("sha256", hashes, f"{where} {HASHES_KEY}", "E104")
    return ShardMetadata(version, *parsed, hashes)


def check_version(version: object, where: str, syntax_code: str) -> None:
    """Accepts "1.x". Another major is E102, another syntax is `syntax_code`."""
    if not isinstance(version, str) or not re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version):
        raise SpqrError(syntax_code, where, f"format version {short(version)}, expected MAJOR.MINOR")
    if int(version.split(".")[0]) != MAJOR:
        raise SpqrError("E102", where, f"format version {version}, this reader knows {MAJOR}.x")


def check_features(features: Iterable[str], where: str) -> None:
    """Raises E103 for the first feature that 1.0 does not have."""
    for feature in features:
        if feature not in FEATURES:
            raise SpqrError("E103", where, f"feature {short(feature)}, this reader knows {', '.join(FEATURES)}")


def check_header_hash(header: Header) -> None:
    """Raises E112 where the header records its own digest and its bytes do not match (spec 7.4)."""
    recorded = header.metadata.get(HEADER_HASH_KEY)
    if recorded is None:
        return
    found = "nothing"
    if re.fullmatch("[0-9a-f]{64}", recorded):  # replacing other text, such as "", could take much memory
        found = header_hash(header.raw.replace(recorded.encode(), NO_HASH.encode(), 1))
    if found != recorded:
        what = f"the header's bytes have {short(found, 20)}, recorded is {short(recorded, 20)}"
        raise SpqrError("E112", f"{header.path.name} {HEADER_HASH_KEY}", what)


def header_hash(raw: bytes) -> str:
    """sha256 of header bytes in which NO_HASH stands for the digest."""
    return hashlib.sha256(raw).hexdigest()


def features_of(layouts: Iterable[Layout]) -> list[str]:
    """The features that these modules use, in the order of FEATURES."""
    used: set[str] = set()
    for layout in layouts:
        used |= {layout.statistics} | {name for name, on in (("outliers", layout.outliers), ("perm", layout.permuted)) if on}
    return [feature for feature in FEATURES if feature in used]


def quantization_config(
    layouts: Iterable[Layout],
    *,
    weight_bits: int = 3,
    group_size: int = 16,
    statistics: Statistics = "bilevel",
    provenance: Mapping[str, Any] | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The quantization_config of a checkpoint with these modules. `extra` may only hold x_ keys (E111)."""
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "features": features_of(layouts),
        "weight_bits": weight_bits,
        "group_size": group_size,
        "statistics": statistics,
    }
    if modules_to_not_convert is not None:
        config["modules_to_not_convert"] = list(modules_to_not_convert)
    if provenance is not None:
        config["provenance"] = dict(provenance)
    config |= extra
    check_config(config, "quantization_config")
    return config


def check_config(config: object, where: str) -> dict[str, Any]:
    """The quantization_config, checked on its own: E111 for its schema, E102 and E103 for version and features."""
    if not isinstance(config, dict):
        raise SpqrError("E111", where, f"{short(config)} is not an object")
    if config.get("quant_method") != QUANT_METHOD:
        raise SpqrError("E111", where, f'quant_method = {short(config.get("quant_method"))}, expected "{QUANT_METHOD}"')
    check_version(config.get("format_version"), where, "E111")
    features = config.get("features")
    if isinstance(features, list) and all(isinstance(feature, str) for feature in features):
        check_features(features, where)
    check_schema("config", config, where, "E111")
    return config


def check_schema(name: str, value: object, where: str, code: str) -> None:
    """Raises `code` where `value` breaks schema/<name>.schema.json."""
    error = next(_validator(name).iter_errors(value), None)
    if error is not None:
        at = "".join(f"[{short(part)}]" if isinstance(part, (str, int)) else "" for part in error.absolute_path)
        raise SpqrError(code, f"{where}{at}", _reason(error))


def _reason(error: Any) -> str:
    if error.validator in ("required", "additionalProperties", "const", "enum", "type") and len(error.message) <= 300:
        return str(error.message)
    return f"{short(error.instance)} breaks {error.validator}: {short(error.validator_value)}"


@functools.cache
def _validator(name: str) -> Any:
    import jsonschema

    schema = json.loads((Path(__file__).parent / "schema" / f"{name}.schema.json").read_text("utf-8"))
    return jsonschema.Draft202012Validator(schema)


def compact_json(value: object) -> str:
    """JSON without spaces, in ASCII, keys in the order given."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(text: str, where: str) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        raise SpqrError("E104", where, f"not JSON: {short(str(error), 200)}") from None


def _features(text: str, where: str) -> list[str]:
    features = _json(text, f"{where} {FEATURES_KEY}")
    check_schema("features", features, f"{where} {FEATURES_KEY}", "E104")
    check_features(features, where)
    return list(features)


def _modules(text: str, where: str) -> dict[str, Layout]:
    entries = _json(text, f"{where} {MODULES_KEY}")
    check_schema("modules", entries, f"{where} {MODULES_KEY}", "E104")
    modules = {}
    for name, entry in entries.items():
        if len(name.encode()) > MAX_NAME_BYTES:
            raise SpqrError("E006", f"{where} {MODULES_KEY}", f"a module name of {len(name.encode())} bytes")
        known = {key: value for key, value in entry.items() if not key.startswith("x_")}
        modules[name] = Layout(**known, where=name)
    return modules
