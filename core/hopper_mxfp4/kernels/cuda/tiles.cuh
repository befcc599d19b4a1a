// Weights of the tiles layout (kernels/tiles/layout.py), from eight 4-bit numbers in a word to the
// registers of the tensor cores' A operand.
//
// A word has eight weights of one row and one group of 32 k, so of one scale: those of k = 2t + 8p
// + {0, 1} for pairs p = 0 .. 3, where t is the lane's place among the four that share a row. A
// pair is what one register of an A fragment holds: pairs 0 and 1 for the first k16 of the group, 2
// and 3 for the second.
#pragma once
#include "ptx.cuh"

// A pair becomes the bf16 bits s000000eem000000 twice, which is 2^-126 of the weights, subnormals
// included; tile_scale_factor makes up for it. Pair 0 lies in place, pair 1 six bits to the left
// (its signs in each other's half), pair 2 six to the right and pair 3 in what is left. 9
// instructions a word, 7 of them on the pipe that binds.
DEVICE u32 tile_pair(u32 word, int pair) {
    constexpr u32 IN_PLACE = 0x81C081C0u;
    if (pair == 0) return word & IN_PLACE;
    if (pair == 1) return rotate_right(word, 6) & IN_PLACE;
    if (pair == 2) return word << 6 & IN_PLACE;
    return (rotate_right(word, 4) & 0x80C080C0u) | (word << 4 & 0x01000100u);
}

// The bf16 number 2^126 times the scale, twice, of one of four E8M0 bytes. Beyond byte 128 bf16 has
// no such number: MOST_FOR_BF16 in layout.py.
DEVICE u32 tile_scale_factor(u32 bytes, int which) {
    const u32 exponents = __byte_perm(bytes, 0, 0x4040 + which * 0x0101);
    return exponents * 128u + 126u * 0x800080u;
}
