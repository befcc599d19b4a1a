// What becomes of a row's sums before anything else, and what fc1 writes.
#pragma once
#include "config.cuh"
#include "ptx.cuh"

// Their scales have been multiplied by already.
struct RowFactors {
    DEVICE void load(const GemmArgs&, const Segment&, int, int) {}
    DEVICE float scaled(float sum, int, int) const { return sum; }
};

typedef u16 Hidden;  // bf16
DEVICE Hidden as_hidden(float value) { return round_to_bf16(value); }
