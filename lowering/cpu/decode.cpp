// Decodes rows of a weight to float32, on all threads.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>

#include "codes.h"

// The same fields in the same order as `_Arguments` in decode.py. Sizes count elements.
struct Arguments {
  const uint8_t* codes;        // [N, K] e4m3, or [N, K / 2] e2m1 with even k in the low nibble
  const uint8_t* block_scale;  // e8m0 [N, K / 32], or null
  const float* scale;          // [ceil(N / scale_rows), ceil(K / scale_columns)], or null
  float* out;                  // [count, K]
  int64_t K;
  int64_t row_bytes;           // from one row of codes to the next
  int64_t scale_rows, scale_columns;  // that share a scale; columns a multiple of 32
  int64_t e2m1;
  int64_t first, count;        // rows to decode
  int64_t threads;
};

namespace {

void decode_row(const Arguments& g, int64_t n, float* out) {
  const int64_t K = g.K;  // a store of values may not change it
  const uint8_t* block_scale = g.block_scale ? g.block_scale + n * (K / MX_BLOCK) : nullptr;
  for (int64_t k = 0; k < K; k += STEP_K)
    decode_elements(
        g.codes + n * g.row_bytes, block_scale, g.e2m1, k, std::min(STEP_K, K - k), out + k);
  if (!g.scale) return;
  const int64_t columns = g.scale_columns;
  const float* scale = g.scale + n / g.scale_rows * ((K + columns - 1) / columns);
  for (int64_t k = 0; k < K; k += columns) {
    const float factor = scale[k / columns];
    for (int64_t i = k; i < std::min(K, k + columns); ++i) out[i] *= factor;
  }
}

}  // namespace

// Returns 0, or 1 with what went wrong in `message`.
EXPORTED int omniq_decode(const Arguments* arguments, char* message, int64_t size) {
  try {
    const Arguments& g = *arguments;
#pragma omp parallel for num_threads(g.threads)
    for (int64_t row = 0; row < g.count; ++row) decode_row(g, g.first + row, g.out + row * g.K);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
