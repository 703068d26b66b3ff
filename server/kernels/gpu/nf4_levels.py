"""The sixteen NF4 levels, and PTX that turns packed codes into them without a table in memory.

A look-up per weight in shared or global memory costs as many cycles as reading the weights themselves. The byte
permute instruction looks four codes up at once in eight bytes that lie in registers: a 16-bit level has two bytes and
there are two halves of eight levels, hence four permutes, one choice between the halves by the code's top bit, and two
permutes that put the bytes together. 25 instructions for eight weights.
"""

from __future__ import annotations

import torch

# As in bitsandbytes and the QLoRA paper: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def unpack_asm(dtype: torch.dtype) -> str:
    """PTX for two int16, that is four packed bytes ($4), to eight levels in the 16-bit `dtype`, two a register.

    $0: of the high nibbles of both int16's first bytes, $1: of their low nibbles; $2 and $3: of the second bytes. These
    are weights 4i, 4i + 1, 4i + 2 and 4i + 3 of int16 i.
    """
    bits = [int(v) & 0xFFFF for v in torch.tensor(LEVELS).to(dtype).view(torch.int16).tolist()]
    table = {}
    for half, levels in (("n", bits[:8]), ("p", bits[8:])):  # by the code's top bit: not above zero, above zero
        for plane, shift in (("l", 0), ("h", 8)):
            octets = [level >> shift & 0xFF for level in levels]
            table[half + plane] = [f"0x{int.from_bytes(bytes(octets[at : at + 4]), 'little'):08x}" for at in (0, 4)]
    lines = [
        ".reg .b32 s, m, t, nl, nh, pl, ph, k;",
        "and.b32 s, $4, 0x77777777;",  # a selector's own top bit would mean something else
        "shr.b32 m, $4, 1;",
        "and.b32 m, m, 0x44444444;",  # 4 selects the first byte of the second operand, 0 of the first
    ]
    for high, low, octets_of in (("$0", "$1", "0x0020"), ("$2", "$3", "0x0031")):
        lines.append(f"prmt.b32 t, s, s, {octets_of};")
        lines += [f"prmt.b32 {name}, {first}, {second}, t;" for name, (first, second) in table.items()]
        lines += [
            f"prmt.b32 t, m, m, {octets_of};",
            "prmt.b32 k, 0x00000000, 0xffffffff, t;",
            "lop3.b32 nl, k, pl, nl, 0xca;",  # k ? pl : nl, bit by bit
            "lop3.b32 nh, k, ph, nh, 0xca;",
            # Nibbles come as low, high, low, high; a level's two bytes as nl, nh.
            f"prmt.b32 {high}, nl, nh, 0x7351;",
            f"prmt.b32 {low}, nl, nh, 0x6240;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"
