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


# Section 4.2: where the code of row r and column c of a block lies. Rows: column pair c // 2 of row l (first table line)
# and of row l + 8 (second). (word, bit) of the even column; the odd column is 16 bits higher. SPREAD: bit k of the code
# is bit 0 of word k.
SPREAD = "spread"
TABLE = {
    2: [
        [(0, 0), (1, 0), (0, 2), (1, 2), (0, 4), (1, 4), (0, 6), (1, 6)],
        [(0, 8), (1, 8), (0, 10), (1, 10), (0, 12), (1, 12), (0, 14), (1, 14)],
    ],
    3: [
        [(0, 1), (1, 1), (0, 4), (1, 4), (0, 7), (1, 7), (0, 10), (1, 10)],
        [(2, 1), SPREAD, (2, 4), (2, 10), (2, 7), (2, 13), (0, 13), (1, 13)],
    ],
    4: [
        [(0, 0), (1, 0), (0, 4), (1, 4), (2, 0), (3, 0), (2, 4), (3, 4)],
        [(0, 8), (1, 8), (0, 12), (1, 12), (2, 8), (3, 8), (2, 12), (3, 12)],
    ],
}


def place_of_word(bits, blocks, block, lane, k):
    """Section 4.2: the column of M.weight at which word k of this lane and block stands."""
    chunk, b = divmod(block, 16)
    start = chunk * 128 * bits
    if chunk < blocks // 16:
        return start + k * 128 + lane * 16 + (b % 4) * 4 + b // 4
    return start + (k * 8 + lane) * (blocks % 16) + b


def unpack_codes(words, bits):
    """Section 4.2: words [tiles, 8 * bits * blocks] -> q [tiles * 16, blocks * 16]."""
    tiles, blocks = words.shape[0], words.shape[1] // (8 * bits)
    q = np.zeros((tiles * 16, blocks * 16), np.uint8)
    for lane in range(8):
        places = [[place_of_word(bits, blocks, block, lane, k) for block in range(blocks)] for k in range(bits)]
        lane_words = [words[:, place] for place in places]  # of each word, [tiles, blocks]
        for half in range(2):
            for c in range(16):
                place = TABLE[bits][half][c // 2]
                high = 16 * (c % 2)
                if place == SPREAD:
                    code = sum(((lane_words[k] >> high) & 1) << k for k in range(3))
                else:
                    word, bit = place
                    code = (lane_words[word] >> (bit + high)) & (2**bits - 1)
                q[lane + 8 * half :: 16, c::16] = code
    return q


def twelve_bits(words, groups, lane, group):
    """Section 4.3: the 12 bits of this lane and group, of every tile; words [tiles, 3 * groups]."""
    sets = groups // 16
    if group < 16 * sets:
        start = group // 16 * 48
        r = group % 16
        i = 4 * lane + r % 8 // 2
        word = words[:, start + i]
        half_word = words[:, start + 32 + i // 2] >> (16 * (i % 2))
        if r < 8:
            found = word >> (12 * (r % 2))
        elif r % 2 == 0:
            found = word >> 24 | (half_word & 15) << 8
        else:
            found = half_word >> 4
        return found & 0xFFF
    n, r = groups % 16, group % 16
    first = 12 * lane  # of the number of 96 bits
    bits = [words[:, 48 * sets + (first + k) // 32 * n + r] >> ((first + k) % 32) & 1 for k in range(12)]
    return sum(bit << k for k, bit in enumerate(bits))


def unpack_stat_codes(words):
    """Section 4.3: words [tiles, 3 * groups] -> sq and zq, each [tiles * 16, groups]."""
    tiles, groups = words.shape[0], words.shape[1] // 3
    sq = np.zeros((tiles * 16, groups), np.uint8)
    zq = np.zeros_like(sq)
    for lane in range(8):
        for group in range(groups):
            v = twelve_bits(words, groups, lane, group)
            sq[lane::16, group], zq[lane::16, group] = v & 7, v >> 3 & 7
            sq[lane + 8 :: 16, group], zq[lane + 8 :: 16, group] = v >> 6 & 7, v >> 9 & 7
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
        pointers, words = get("outlier_ptr"), get("outliers")
        cells_a_tile = -(-inn // 128)
        for cell in range(len(pointers) - 1):  # section 5.3
            tile, h = divmod(cell, cells_a_tile)
            for word in words[pointers[cell] : pointers[cell + 1]]:
                r, c = divmod(int(word) & 0xFFFF, 4096)
                row, column = 16 * tile + r, h // 32 * 4096 + c
                w[row, column] = w[row, column] + half(np.array([word >> 16], "<u2"))[0]
    return w


def decode_files(paths):
    """Module name -> W for every quantized module of these shards."""
    tensors, modules = read_tensors(paths)
    return {module: decode(tensors, entry, module) for module, entry in modules.items()}


if __name__ == "__main__":
    for name, weight in decode_files(sys.argv[1:]).items():
        print(name, weight.shape, weight.reshape(-1)[:4])
