#pragma once
#include "ptx.cuh"

// gate * sigmoid(alpha gate) * (up + beta), clamped before; NaN stays NaN.
struct Swiglu {
    float negative_alpha_log2e, beta, limit;

    DEVICE float operator()(float gate, float up) const {
        gate = min_nan(gate, limit);
        up = max_nan(min_nan(up, limit), -limit);
        const float power = exp2_approx(negative_alpha_log2e * gate);
        return gate * reciprocal_approx(1.0f + power) * (up + beta);
    }
};
