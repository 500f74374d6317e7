"""Damaged files: cut, flipped, mutated. One exception type, in bounded time, and whatever is accepted decodes safely."""

from __future__ import annotations

import json
import random
import struct
import time
from collections import Counter

import make_vectors
import pytest
import safetensors

FILES = {"base": make_vectors.base, "direct": make_vectors.direct, "hashed": make_vectors.hashed}


def test_every_prefix_is_refused(verdict):
    content = make_vectors.hashed().bytes()
    codes = Counter(verdict(content[:size]) for size in range(len(content)))
    assert set(codes) == {"E001"}, codes


def flips(name: str) -> list[tuple[str, int]]:
    head = len(FILES[name]().bytes()) - len(FILES[name]().data)
    return [(name, bit) for bit in range(8 * head)]


def check_flips(places: list[tuple[str, int]], verdict) -> Counter:
    """Verdicts after one flipped bit in the header or the 8 bytes before it."""
    whole = {name: make().bytes() for name, make in FILES.items()}
    codes: Counter = Counter()
    for name, bit in places:
        content = bytearray(whole[name])
        content[bit // 8] ^= 1 << bit % 8
        code = verdict(bytes(content))
        codes[name, code] += 1
        if code is None:
            free_text_only(name, bytes(content), bit)
            safetensors.deserialize(bytes(content))  # what we accept, safetensors accepts
    return codes


def free_text_only(name: str, content: bytes, bit: int) -> None:
    """An accepted flip changed a name or a number that leaves every tensor as it is; with a digest, only its key."""
    length = struct.unpack("<Q", content[:8])[0]
    header, old = json.loads(content[8 : 8 + length]), json.loads(FILES[name]().header())
    if name == "hashed":
        assert header["__metadata__"].keys() - old["__metadata__"].keys(), "the digest did not see it"
        assert "spqr_header_sha256" not in header["__metadata__"]
    metadata, before = header.pop("__metadata__"), old.pop("__metadata__")
    entries = sorted((entry["data_offsets"], entry["dtype"]) for entry in header.values())
    assert entries == sorted((entry["data_offsets"], entry["dtype"]) for entry in old.values()), bit
    changed = {key for key in metadata.keys() & before.keys() if metadata[key] != before[key]}
    assert changed <= {"spqr_modules", "spqr_version"}, bit


@pytest.mark.parametrize("name", FILES)
def test_every_header_bit_flip(name, verdict):
    codes = check_flips(flips(name), verdict)
    accepted = codes[name, None]
    assert accepted <= 40 if name == "hashed" else accepted <= 0.4 * codes.total(), codes


NUMBERS = (
    0,
    1,
    2,
    15,
    16,
    17,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
    2**64,
    -1,
    3.5,
    True,
    None,
    "1",
)


def mutate(source: random.Random) -> bytes:
    """A file with one to three structural faults."""
    name = source.choice(["base", "direct", "hashed"])
    file = FILES[name]()
    spans = [entry["data_offsets"][:] for entry in file.entries.values()]
    for _ in range(source.randint(1, 3)):
        entry = source.choice(list(file.entries.values()))
        modules = file.metadata.get("spqr_modules")
        kind = source.randrange(10)
        if kind == 0:
            entry["data_offsets"][source.randrange(2)] = source.choice(NUMBERS)
        elif kind == 1 and entry["shape"]:
            entry["shape"][source.randrange(len(entry["shape"]))] = source.choice(NUMBERS)
        elif kind == 2:
            entry["dtype"] = source.choice(["F32", "I32", "I16", "U8", "F16", "BF16", "I64", "F4", "", 7, None])
        elif kind == 3 and isinstance(modules, dict):
            module = source.choice(list(modules.values()))
            module[source.choice(list(module))] = source.choice(NUMBERS)
        elif kind == 4:
            a, b = source.sample(list(file.entries), 2)
            file.entries[a], file.entries[b] = file.entries[b], file.entries[a]
        elif kind == 5:
            file.metadata[source.choice(list(file.metadata))] = source.choice(
                ["", "[]", "{}", "1.0", "[" * 99, "null", "1e999"]
            )
        elif kind == 6:
            entry.pop(source.choice(list(entry)))
        elif kind == 7:
            file.data = file.data[: source.randrange(len(file.data))] + bytes(source.randrange(9))
        elif kind == 8:
            entry["shape"] = source.choice([[], [[]], [0], [2**20] * 3, list(entry["shape"])[::-1], {}, "x"])
        else:
            place = source.randrange(*source.choice(spans))  # a small tensor is hit as often as a large one
            patch = source.choice([b"\xff\xff", b"\0\0", b"\x00\x7e", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80"])
            file.data = file.data[:place] + patch + file.data[place + len(patch) :]
        if any("shape" not in e or "data_offsets" not in e for e in file.entries.values()):
            break
        if any(not isinstance(e["shape"], list) or not isinstance(e["data_offsets"], list) for e in file.entries.values()):
            break
    content = file.bytes()
    if source.random() < 0.1:
        place = source.randrange(8)
        content = content[:place] + bytes([source.randrange(256)]) + content[place + 1 :]
    return content


def check_mutations(count: int, seed: int, verdict) -> Counter:
    source, codes, slowest = random.Random(seed), Counter(), 0.0
    for _ in range(count):
        content = mutate(source)
        start = time.process_time()
        code = verdict(content)
        slowest = max(slowest, time.process_time() - start)
        codes[code] += 1
        if code is None:
            safetensors.deserialize(content)  # what we accept, safetensors accepts
    assert slowest < 1, f"{slowest:.2f} s"
    return codes


def test_a_sample_of_structural_mutations(verdict):
    codes = check_mutations(2000, 4, verdict)
    assert len(codes) > 15, codes


@pytest.mark.slow
def test_structural_mutations(verdict):
    start = time.process_time()
    check_mutations(20_000, 5, verdict)
    assert time.process_time() - start < 120
