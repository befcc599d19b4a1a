// The consumers of moe_gemm: warps that add up the streamers' parts of a dot product and do what
// comes after it. A finisher has 8 tokens of every unit that lands in its stage.
#pragma once
#include "config.cuh"
#include "convert.cuh"
#include "ptx.cuh"
#include "rows.cuh"

struct Finisher {
    const GemmArgs& args;
    const Shared& shared;
    const int lane, row, column;  // of the lane: row and row + 8, columns 2 * column and the next
    const int n_tile, stage;

    // What belongs to a unit beside its sums.
    struct Operands {
        int count;              // tokens of the segment
        int pairs[2];           // of the lane's columns; -1 where there is none
        float weights[2];       // of those pairs; fc2's alone
        float bias[SLICES][2];  // [slice][row or row + 8]
        RowFactors factors;     // of those rows
    };

    DEVICE Finisher(const GemmArgs& args, const Shared& shared)
        : args(args),
          shared(shared),
          lane(lane_index()),
          row(lane >> 2),
          column(lane & 3),
          n_tile((warp_index() - NUM_STREAMERS) % N_TILES),
          stage((warp_index() - NUM_STREAMERS) / N_TILES) {}

    // The output row of a lane's sums of a slice; `half`, fc2's alone: row or row + 8. There four
    // neighbours belong to two neighbouring lanes.
    DEVICE int output_row(int block, int slice, int half) {
        if (GATED) return OUTPUT_ROWS * block + 8 * slice + row;
        return OUTPUT_ROWS * block + SLICE_ROWS * slice + 4 * (row >> 1) + 2 * half + (row & 1);
    }

    // Where that row's bias is: w13's are the halves [up; gate].
    DEVICE int bias_row(int block, int slice, int half) {
        return output_row(block, slice, half) + (GATED && half == 0 ? ROWS_PADDED : 0);
    }

    // Loaded while the streamers still multiply.
    DEVICE Operands load(const Segment& segment, int block) {
        Operands of;
        of.count = segment.count;
        of.factors.load(args, segment, block, row);
#pragma unroll
        for (int j = 0; j < 2 * SLICES; j++) {
            of.bias[j >> 1][j & 1] = 0;
            if (args.bias)
                of.bias[j >> 1][j & 1] = bf16_to_float(
                    args.bias[(u64)segment.expert * WEIGHT_ROWS + bias_row(block, j >> 1, j & 1)]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int n = 8 * n_tile + 2 * column + j;
            const int pair = n < of.count ? shared.routing.sorted[segment.begin + n] : -1;
            of.pairs[j] = pair;
            if (!GATED && pair >= 0) {
                const int token = token_of(pair, args.pairs.top_k_reciprocal);
                const int choice = pair - token * args.pairs.top_k;
                of.weights[j] = args.topk_weights[(long long)token * args.weights_token_stride +
                                                  (long long)choice * args.weights_choice_stride];
            }
        }
        return of;
    }

    // Adds up the streamers' parts of the lane's sums. round: how often the stage was used before.
    DEVICE void collect(float (&sums)[SLICES][4], int count, int round) {
        mbarrier_wait(shared.full + stage, round & 1);
        if (8 * n_tile < count) {
            const float4* const from = shared.sums + stage * STAGE_SUMS + n_tile * 32 + lane;
#pragma unroll 4
            for (int i = 0; i < NUM_STREAMERS; i++)
#pragma unroll
                for (int slice = 0; slice < SLICES; slice++) {
                    const float4 part = from[(SLICES * i + slice) * N_TILES * 32];
                    sums[slice][0] += part.x, sums[slice][1] += part.y;
                    sums[slice][2] += part.z, sums[slice][3] += part.w;
                }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.empty + stage);
    }

    // The rows' factors and biases, then SwiGLU or the top-k weight.
    DEVICE void write(const float (&sums)[SLICES][4], const Operands& of, int block) {
#pragma unroll
        for (int i = 0; i < 2 * SLICES; i++) {
            const int j = i & 1, slice = i >> 1;
            if (of.pairs[j] < 0) continue;
            const float first = of.factors.scaled(sums[slice][j], slice, 0) + of.bias[slice][0];
            const float second =
                of.factors.scaled(sums[slice][2 + j], slice, 1) + of.bias[slice][1];
            const u64 at = (u64)of.pairs[j] * ROWS + output_row(block, slice, 0);
            if (GATED) {
                ((Hidden*)args.out)[at] = as_hidden(swiglu(first, second));
            } else {
                ((float*)args.out)[at] = first * of.weights[j];
                ((float*)args.out)[at + 2] = second * of.weights[j];
            }
        }
    }

    DEVICE float swiglu(float gate, float up) {
        // Not fminf and fmaxf, which would make a NaN a number.
        const float limit = args.limit, g = gate > limit ? limit : gate;
        const float u = up > limit ? limit : up < -limit ? -limit : up;
        return g / (1.0f + __expf(-args.alpha * g)) * (u + args.beta);
    }
};
