// How the pairs of an expert are cut into token tiles, and which tile is which. Shared by routing
// and the GEMMs.
//
// Experts with tokens become slots, those with the largest tiles first so that the last wave is of
// small ones. A slot: x = token tiles of the slots before, y = expert, z = its first row, w = its
// pairs. Rows are sorted pairs with each expert's rounded up to whole token tiles, so that a tile's
// rows lie together.
//
// Tokens lie as wgmma reads them: of each token tile, for each 64 k, its rows of 128 bytes with the
// 128-byte swizzle. A stage's tokens are one contiguous copy. slots[E].x is the number of all token
// tiles.
//
// The tiles of fc1 come first, then those of fc2. Blocks take them in this order, so whoever waits
// for a tile of fc1 waits for a block that has it and runs, whatever else is on the GPU.

struct Tile {
    int second;  // fc2
    int expert, panel, first, count, n;  // first: row; n: count rounded up to what is compiled
    int token_tile;                      // among those of all slots
};

// As few tiles as NMAX allows, of equal width.
DEV int tiles_of(int pairs) { return (pairs + NMAX - 1) / NMAX; }
DEV int width_of(int pairs, int tiles) {
    const int each = tiles ? (pairs + tiles - 1) / tiles : 0;
    const int n = (each + NSTEP - 1) / NSTEP * NSTEP;
    return n < NMIN ? NMIN : n;
}

// Tiles of a slot go by groups of up to GROUP token tiles: within one, token tiles of a panel are
// neighbours (its weights come from memory once), and the group's tokens stay in the L2 for all
// panels.
#define GROUP 16
DEV Tile find_tile(const int4* slots, int index) {
    Tile t;
    t.second = index >= slots[E].x * PANELS1;
    if (t.second) index -= slots[E].x * PANELS1;
    const int panels = t.second ? PANELS2 : PANELS1;
    int low = 0, high = E;  // the last slot that begins at or before index
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (slots[middle].x * panels <= index) low = middle;
        else high = middle;
    }
    const int4 slot = slots[low];
    const int tiles = tiles_of(slot.w), n = width_of(slot.w, tiles);
    const int rest = index - slot.x * panels;
    const int group = rest / (panels * GROUP);
    const int size = min(GROUP, tiles - group * GROUP), in_group = rest - group * panels * GROUP;
    const int token_tile = group * GROUP + in_group % size;
    t.token_tile = slot.x + token_tile;
    t.expert = slot.y, t.panel = in_group / size, t.n = n;
    t.first = slot.z + token_tile * n, t.count = min(n, slot.w - token_tile * n);
    return t;
}

// 16 bytes (chunk of 8 columns) of a token tile's row, in bytes from where the tile begins.
DEV u32 tiled(int n, int row, int chunk) {
    return ((chunk >> 3) * n + row) * 128 + ((chunk & 7 ^ row & 7) << 4);
}
