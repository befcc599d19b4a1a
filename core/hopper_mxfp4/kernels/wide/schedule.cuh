// How the pairs of an expert are cut into token tiles, and which tile is which. Shared by routing
// and the GEMMs.
//
// A pair is a token and one of its experts. Pairs are sorted by expert and each expert's rows are
// rounded up to whole token tiles, so that a tile's rows lie together. Experts with pairs become
// slots, those with the widest tiles first, so that the last wave is of small ones.
#pragma once
#include "config.cuh"

// slots[NUM_EXPERTS].tiles_before is the number of all token tiles.
struct __align__(16) Slot {
    int tiles_before;  // token tiles of the slots before
    int expert, first_row, num_pairs;
};

// A panel of weight rows times a token tile. All tiles of fc1 come first, then those of fc2. Blocks
// take them in this order, so whoever waits for a tile of fc1 waits for a block that has it and
// runs, whatever else is on the GPU.
struct Tile {
    bool is_fc2;
    int expert, panel;
    int width;  // num_pairs rounded up to a width that is compiled; 0: there are no more tiles
    int first_row, num_pairs;
    int token_tile;  // among those of all slots
};

// As few tiles as BLOCK_N allows, of equal width.
DEVICE int num_token_tiles(int pairs) { return (pairs + BLOCK_N - 1) / BLOCK_N; }
DEVICE int width_of(int pairs, int token_tiles) {
    const int each = token_tiles ? (pairs + token_tiles - 1) / token_tiles : 0;
    if (each <= MIN_N) return MIN_N;
    const int width = (each + STEP_N - 1) / STEP_N * STEP_N;
    return width < STEP_FROM ? STEP_FROM : width;
}

// Tiles of a slot go by groups of token tiles: within one, the token tiles of a panel are
// neighbours, so that its weights come from memory once, and the group's tokens stay in the L2 for
// all panels.
constexpr int TILE_GROUP = 16;

DEVICE Tile find_tile(const Slot* slots, int index) {
    Tile tile;
    const int fc1_tiles = slots[NUM_EXPERTS].tiles_before * FC1_PANELS;
    tile.is_fc2 = index >= fc1_tiles;
    if (tile.is_fc2) index -= fc1_tiles;
    const int panels = tile.is_fc2 ? FC2_PANELS : FC1_PANELS;
    int low = 0, high = NUM_EXPERTS;  // the last slot that begins at or before index
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (slots[middle].tiles_before * panels <= index) low = middle;
        else high = middle;
    }
    const Slot slot = slots[low];
    const int token_tiles = num_token_tiles(slot.num_pairs);
    const int in_slot = index - slot.tiles_before * panels;
    const int group = in_slot / (panels * TILE_GROUP);
    const int group_size = min(TILE_GROUP, token_tiles - group * TILE_GROUP);
    const int in_group = in_slot - group * panels * TILE_GROUP;
    const int token_tile = group * TILE_GROUP + in_group % group_size;
    tile.width = width_of(slot.num_pairs, token_tiles);
    tile.expert = slot.expert;
    tile.panel = in_group / group_size;
    tile.first_row = slot.first_row + token_tile * tile.width;
    tile.num_pairs = min(tile.width, slot.num_pairs - token_tile * tile.width);
    tile.token_tile = slot.tiles_before + token_tile;
    return tile;
}
