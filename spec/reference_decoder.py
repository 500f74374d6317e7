"""A decoder of SpQR 1.0 files that follows spqr-1.0.md section by section. For reading, and as the tests' oracle.

It imports nothing of this project. It assumes a valid file: checking is the validator's work.

    python spec/reference_decoder.py model.safetensors ...      prints every module's shape and first weights
"""

import json
import struct
import sys

import numpy as np

F32 = np.float32


# Section 6: the container. A file is 8 bytes of header length, the header, and the tensors' bytes.
def read_file(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        data = file.read()
    return header, metadata, data


# Section 5.2: integers are stored little-endian; I16 tensors hold raw 16-bit patterns.
RAW = {"I32": "<u4", "I16": "<u2", "U8": "u1"}


def read_tensors(paths):
    """Name -> array of unsigned integers, and the modules' entries (section 7.2), over all shards."""
    tensors, modules = {}, {}
    for path in paths:
        header, metadata, data = read_file(path)
        modules.update(json.loads(metadata["spqr_modules"]))
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] in RAW:
                tensors[name] = np.frombuffer(data[begin:end], RAW[entry["dtype"]]).reshape(entry["shape"])
    return tensors, modules


# Section 4.2: where the code of row r and column c of a tile lies. Rows: column pair c // 2 of row l (first table line)
# and of row l + 8 (second). (word, bit) of the even column; the odd column is 16 bits higher. SPREAD: bit k of the code
# is bit 15 of word k.
SPREAD = "spread"
TABLE = {
    2: [
        [(0, 0), (0, 2), (0, 4), (0, 6), (1, 0), (1, 2), (1, 4), (1, 6)],
        [(0, 8), (0, 10), (0, 12), (0, 14), (1, 8), (1, 10), (1, 12), (1, 14)],
    ],
    3: [
        [(0, 0), (2, 0), (0, 3), (2, 3), (1, 9), (0, 6), (2, 6), (1, 12)],
        [(1, 0), SPREAD, (1, 3), (0, 9), (2, 9), (1, 6), (0, 12), (2, 12)],
    ],
    4: [
        [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 4), (3, 0), (3, 4)],
        [(0, 8), (0, 12), (1, 8), (1, 12), (2, 8), (2, 12), (3, 8), (3, 12)],
    ],
}


def unpack_codes(words, bits):
    """Section 4.2: words [tiles * bits * 8, blocks] -> q [tiles * 16, blocks * 16]."""
    blocks = words.shape[1]
    words = words.reshape(-1, bits, 8, blocks)  # tile, word, lane, block
    q = np.zeros((words.shape[0] * 16, blocks * 16), np.uint8)
    for r in range(16):
        for c in range(16):
            place = TABLE[bits][r // 8][c // 2]
            lane, high = r % 8, 16 * (c % 2)
            if place == SPREAD:
                code = sum(((words[:, k, lane] >> (15 + high)) & 1) << k for k in range(3))
            else:
                word, bit = place
                code = (words[:, word, lane] >> (bit + high)) & (2**bits - 1)
            q[r::16, c::16] = code
    return q


def unpack_stat_codes(words):
    """Section 4.3: words [tiles * 3, groups] -> sq and zq, each [tiles * 16, groups].

    The three words of a tile are one little-endian number of 96 bits with 12 bits for each lane.
    """
    groups = words.shape[1]
    words = words.reshape(-1, 3, groups)
    sq = np.zeros((words.shape[0] * 16, groups), np.uint8)
    zq = np.zeros_like(sq)

    def code(first_bit):
        bits = [(words[:, (first_bit + k) // 32] >> ((first_bit + k) % 32)) & 1 for k in range(3)]
        return bits[0] | bits[1] << 1 | bits[2] << 2

    for r in range(16):
        base = 12 * (r % 8) + 6 * (r // 8)
        sq[r::16] = code(base)
        zq[r::16] = code(base + 3)
    return sq, zq


def half(raw):
    """The numbers whose fp16 bits are `raw`, in fp32 (exact)."""
    return raw.view(np.float16).astype(F32)


def decode(tensors, entry, module):
    """Section 3: W, float32 [out_features, in_features], in original column order."""
    out, inn = entry["out_features"], entry["in_features"]
    bits, group_size = entry["weight_bits"], entry["group_size"]

    def get(leaf):
        return np.ascontiguousarray(tensors[f"{module}.{leaf}"])

    q = unpack_codes(get("weight"), bits)[:out, :inn].astype(F32)
    group = np.arange(inn) // group_size  # of each stored column
    tile = np.arange(out) // 16  # of each row

    if entry["statistics"] == "bilevel":  # section 2.3
        sq, zq = unpack_stat_codes(get("stat_codes"))
        stats = half(get("tile_stats")).reshape(-1, sq.shape[1], 4)
        ss, sz, zs, zz = (stats[tile, :, k] for k in range(4))
        s = ss * (sq[:out].astype(F32) - sz)
        z = zs * (zq[:out].astype(F32) - zz)
    else:  # direct, section 2.4
        s = half(get("group_sc"))
        z = get("group_zp").astype(F32)

    w_stored = s[:, group] * (q - z[:, group])

    w = np.zeros((out, inn), F32)  # section 2.6: stored column j is original column perm[j]
    w[:, get("perm").astype(np.int64) if entry["permuted"] else np.arange(inn)] = w_stored

    if entry["outliers"]:  # section 2.5: values add, at original columns
        crow = get("crow_indices").astype(np.int64)
        columns = get("col_indices").astype(np.int64)
        values = half(get("values"))
        for row in range(out):
            for k in range(crow[row], crow[row + 1]):
                w[row, columns[k]] = w[row, columns[k]] + values[k]
    return w


def decode_files(paths):
    """Module name -> W for every quantized module of these shards."""
    tensors, modules = read_tensors(paths)
    return {module: decode(tensors, entry, module) for module, entry in modules.items()}


if __name__ == "__main__":
    for name, weight in decode_files(sys.argv[1:]).items():
        print(name, weight.shape, weight.reshape(-1)[:4])
