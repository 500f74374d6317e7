"""The one exception of this project. Its codes are the rule numbers of spec/spqr-1.0.md and are never reused."""

from __future__ import annotations

CODES: dict[str, str] = {
    # E0xx container: the bytes are not a safetensors file that this format accepts
    "E001": "the file is shorter than its header says",
    "E002": "the header length is out of range",
    "E003": "the header is not the JSON of a safetensors file",
    "E004": "a tensor's byte range does not match its dtype and shape",
    "E005": "tensor byte ranges overlap, leave holes or do not end at the end of the file",
    "E006": "a size is above a limit of the format",
    "E007": "the file is not a safetensors file, and no other kind is read",
    # E1xx header and metadata
    "E101": "no SpQR metadata where it must stand",
    "E102": "the format version is unknown",
    "E103": "a feature is unknown",
    "E104": "the metadata breaks its schema",
    "E105": "config.json and the shards disagree",
    "E106": "a module's entries in several shards disagree",
    "E107": "a module's tensor is missing",
    "E108": "a tensor has a place that no module's entry allows",
    "E109": "a tensor's dtype is not the one its module's entry implies",
    "E110": "a tensor's shape is not the one its module's entry implies",
    "E111": "config.json is missing or its quantization_config breaks its schema",
    "E112": "the header does not match the digest it records",
    # E2xx dense payload
    "E201": "a statistic is not finite",
    "E202": "padding is not zero",
    "E203": "perm is not a permutation of the input columns",
    "E204": "a bias or a dense tensor is not finite",
    "E205": "a tensor's bytes do not match the recorded sha256",
    # E3xx outliers
    "E301": "outlier_ptr does not start at 0",
    "E302": "outlier_ptr falls",
    "E303": "outlier_ptr does not end at the number of outliers",
    "E304": "an outlier lies outside of its cell or of the matrix",
    "E305": "positions of outliers do not rise within a cell",
    "E306": "an outlier's value is not finite",
    # E4xx shards and index
    "E401": "the index is missing, unreadable, not the only way in, or breaks its schema",
    "E402": "a shard named by the index is missing",
    "E403": "the index and a shard disagree on a tensor's place",
    "E404": "a tensor stands in two shards",
    "E405": "a shard's name leaves the folder",
    # E5xx sources of conversion and requests that cannot be met
    "E501": "the source is not a readable checkpoint",
    "E502": "a source weight is not finite",
    "E503": "an activation or a Hessian is not finite",
    "E504": "no decoder blocks or linear layers were found",
    "E505": "an option is out of range",
    "E506": "the destination exists and is not empty",
    "E507": "the calibration text is too short",
    "E508": "a model does not fit the checkpoint",
    "E509": "an operand's shape, dtype, device or range does not fit the kernel",
    "E510": "the format cannot hold what the source stores without loss",
    "E511": "the destination holds an unfinished conversion of another source, with other options or of another version",
    "E512": "another process is writing into the destination",
    "E513": "more than a twentieth of the linear layers' parameters would stay dense",
}


class SpqrError(ValueError):
    """A broken rule: its code, where it was broken (file, tensor, index) and what was found there.

    Codes: see `CODES` and the rules of the same number in spec/spqr-1.0.md.
    """

    def __init__(self, code: str, where: str, what: str) -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not an error code of this format")
        where, what = _printable(where), _printable(what)
        super().__init__(code, where, what)
        self.code = code
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"SPQR-{self.code} {self.where}: {self.what}"


def _printable(text: str) -> str:
    """The text without control characters: names come from the file, and a terminal would obey them."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
