// Weights: from eight 4-bit numbers in a word to the registers of wgmma's A operand.
//
// A word has eight weights of one row and one group of 32 k, so one scale: those of k = 2t + {0,
// 1}, 8 + .., 16 + .. and 24 + .. where t is the lane's place among the four that share a row. Pair
// p is what a register of the A fragment holds: p = 0, 1 for the first k16 of the group, 2, 3 for
// the second.
//
// A pair becomes the bf16 bits s000000eem000000, which is 2^-126 of the weight (subnormals
// included); the factor 2^126 is in the scale.
#define E2M1_BITS 0x81C081C0u

#if NIBBLES
// Nibble p of either half is a number of pair p, sign on top: bytes that e4m3 tables can be indexed
// with as well. A product with two powers of two puts the sign and the rest in their places at
// once, on the pipe that is less busy.
DEV u32 pair_bits(u32 word, int p) {
    const u32 v = p & 2 ? word >> 8 : word;
    return (p & 1 ? (v & 0x00F000F0u) * 0x104u : (v & 0x000F000Fu) * 0x1040u) & E2M1_BITS;
}
#else
// Where the bits of a half are (layout.py has the same table): pair 0 in place, pair 1 six to the
// left (its signs in the other half), pair 2 six to the right, pair 3 in what is left: a rotation
// by 4 and a shift by 4. 9 instructions a word, 7 of them on the pipe that binds.
DEV u32 rotate_right(u32 v, int n) { return __funnelshift_r(v, v, n); }
DEV u32 pair_bits(u32 word, int p) {
    if (p == 0) return word & E2M1_BITS;
    if (p == 1) return rotate_right(word, 6) & E2M1_BITS;
    if (p == 2) return word << 6 & E2M1_BITS;
    return (rotate_right(word, 4) & 0x80C080C0u) | (word << 4 & 0x01000100u);
}
#endif

// An E8M0 byte of `bytes` as the bf16 pair 2^(e - 127 + 126). Beyond e = 128 bf16 has no such
// number: layout.py refuses.
DEV u32 scale_factor(u32 bytes, int which) {
    const u32 e = __byte_perm(bytes, 0, 0x4040 + which * 0x0101);
    return e * 128u + 126u * 0x800080u;
}

// What a thread multiplies in a stage of 64 k, of 64 rows: rows r and r + 8 of the warp's 16, two
// groups of 32 k.
struct Weights {
    uint4 words;  // group 0: row r, row r + 8; group 1: the same
    u32 scales;   // bytes in the same order
};
DEV u32 word_of(const Weights& w, int i) { return (&w.words.x)[i]; }

// The A fragment of one of a stage's four k16.
DEV void decode(const Weights& w, int step, u32 (&fragment)[4]) {
    const int group = step >> 1, pair = 2 * (step & 1);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int which = 2 * group + row;
        const u32 factor = scale_factor(w.scales, which), word = word_of(w, which);
        fragment[row] = multiply_bf16x2(pair_bits(word, pair), factor);
        fragment[2 + row] = multiply_bf16x2(pair_bits(word, pair + 1), factor);
    }
}
