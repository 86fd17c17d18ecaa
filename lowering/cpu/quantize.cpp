// Quantizes the rows of a matrix, to the same bits as the formats' own arithmetic in torch: a weight to
// codes, or an activation to the BF16 values that its codes stand for.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int64_t RUN = 512;

enum Method : int64_t { INT8 = 0, FP8 = 1, MXFP8 = 2, MXFP4 = 3, MXFP4_DUALSCALE = 4 };

}  // namespace

// The same fields in the same order as `_Arguments` in quantize.py. K' is K in whole blocks for the MX
// formats, and K for the others.
struct Arguments {
  const void* x;     // [rows, K], float32 or BF16
  uint8_t* codes;    // [rows, K'], or [rows, K' / 2] for e2m1; or null, and `values` is not
  uint8_t* bytes;    // e8m0 [rows, K' / 32]; null for int8, fp8 and where `values` is not
  float* scale;      // [rows, ceil(K / columns)]; null for the MX formats without a second scale
  uint16_t* values;  // BF16 [rows, K'], without `scale`; null or in place of codes
  int64_t rows, K;
  int64_t columns;   // that share a `scale`: K but for groups
  int64_t bfloat16;  // whether x is
  int64_t method;
  int64_t uos;       // whether the block scale is UOS's
  int64_t threads;
};

namespace {

inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest magnitude, as bits: they are in the order of magnitudes, with NaN above all.
inline uint32_t amax_bits(const float* x, int64_t count) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) amax = larger(amax, to_bits(x[i]) & 0x7FFFFFFF);
  return amax;
}

inline float or_one(float scale) { return scale == 0 ? 1.0f : scale; }

// Beside 1.5 * 2**(e + 20) a float32 has a step of 2**(e - 3), which is that of e4m3 at 2**e: the
// addition rounds half to even, and leaves the number of steps in the lowest bits. Magnitudes are
// compared as integers: std::min and std::max of floats keep a loop from being vectorized.
inline uint8_t encode_e4m3(float x) {
  const uint32_t magnitude = smaller(to_bits(x) & 0x7FFFFFFF, 0x43E00000);  // 448
  const uint32_t binade = larger(magnitude & 0x7F800000, 0x3C800000);       // 2**-6
  const uint32_t steps = to_bits(from_bits(magnitude) + from_bits(binade) * 0x1.8p20f) & 31;
  const uint32_t code = steps + (((binade >> 23) - 121) << 3);
  return static_cast<uint8_t>(code | ((to_bits(x) >> 24) & 0x80));
}

// The same for e2m1, whose step at 2**e is 2**(e - 1).
inline uint8_t encode_e2m1(float x) {
  const uint32_t magnitude = smaller(to_bits(x) & 0x7FFFFFFF, 0x40C00000);  // 6
  const uint32_t binade = larger(magnitude & 0x7F800000, 0x3F800000);       // 1
  const uint32_t steps = to_bits(from_bits(magnitude) + from_bits(binade) * 0x1.8p22f) & 7;
  const uint32_t code = steps + ((binade >> 22) - (127 << 1));
  return static_cast<uint8_t>(code | ((to_bits(x) >> 28) & 8));
}

// The e8m0 byte of a block: OCP Microscaling Formats v1.0, section 6.3, or UOS (`mx.block_scale`).
inline int32_t block_scale(uint32_t amax, int32_t emax, bool uos) {
  const auto field = static_cast<int32_t>(amax >> 23);
  if (field == 255) return 255;
  const int32_t exponent = field + (uos && (amax & 0x7FFFFF) > 0x680000 ? 1 : 0);
  return std::clamp(exponent - emax, 0, 254 - emax);
}

// Quantize blocks of x [padded], which is overwritten.
void quantize_mx(float* x, int64_t padded, bool e2m1, bool uos, uint8_t* codes, uint8_t* scale) {
  for (int64_t block = 0; block < padded / MX_BLOCK; ++block) {
    float* values = x + block * MX_BLOCK;
    const int32_t byte = block_scale(amax_bits(values, MX_BLOCK), e2m1 ? 2 : 8, uos);
    scale[block] = static_cast<uint8_t>(byte);
    const float down = from_bits(byte == 255 ? 0x7FC00000 : static_cast<uint32_t>(254 - byte) << 23);
    for (int64_t i = 0; i < MX_BLOCK; ++i) values[i] *= down;
  }
  if (!e2m1) {
    for (int64_t i = 0; i < padded; ++i) codes[i] = encode_e4m3(x[i]);
    return;
  }
  uint8_t nibbles[STEP_K];
  for (int64_t k = 0; k < padded; k += STEP_K) {
    const int64_t count = std::min(STEP_K, padded - k);
    for (int64_t i = 0; i < count; ++i) nibbles[i] = encode_e2m1(x[k + i]);
    for (int64_t i = 0; i < count / 2; ++i)
      codes[k / 2 + i] = static_cast<uint8_t>(nibbles[2 * i] | (nibbles[2 * i + 1] << 4));
  }
}

inline int64_t in_blocks(int64_t K) { return round_up(K, MX_BLOCK); }

// K' of `Arguments`.
inline int64_t width(const Arguments& g) { return g.method >= MXFP8 ? in_blocks(g.K) : g.K; }

void read_row(const Arguments& g, int64_t row, float* x) {
  const int64_t K = g.K;  // a store may not change it
  if (g.bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(g.x) + row * K;
    for (int64_t i = 0; i < K; ++i) x[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
  } else {
    std::memcpy(x, static_cast<const float*>(g.x) + row * K, K * sizeof(float));
  }
  std::fill(x + K, x + in_blocks(K), 0.0f);
}

// Quantize `count` elements that share a scale; returns it.
float quantize_int8(const float* x, int64_t count, uint8_t* codes) {
  const float scale = from_bits(amax_bits(x, count)) / 127.0f;
  const float divisor = or_one(scale);
  for (int64_t i = 0; i < count; ++i) {
    // Beside 1.5 * 2**23 a float32 has a step of 1. A denormal scale can leave up to 190.
    const auto code = static_cast<int32_t>(to_bits(x[i] / divisor + 0x1.8p23f) - 0x4B400000);
    const int32_t limited = code < -127 ? -127 : code;
    codes[i] = static_cast<uint8_t>(limited > 127 ? 127 : limited);
  }
  return scale;
}

float quantize_fp8(const float* x, int64_t count, uint8_t* codes) {
  const float scale = from_bits(amax_bits(x, count)) / 448.0f;
  const float divisor = or_one(scale);
  if (std::isfinite(scale))
    for (int64_t i = 0; i < count; ++i) codes[i] = encode_e4m3(x[i] / divisor);
  else
    std::memset(codes, 0x7F, count);  // NaN, as is every product with such a scale
  return scale;
}

void divide_coarse(float* x, int64_t padded, float* coarse) {
  for (int64_t run = 0; run * RUN < padded; ++run) {
    float* values = x + run * RUN;
    const int64_t count = std::min(RUN, padded - run * RUN);
    coarse[run] = from_bits(amax_bits(values, count)) / 6.0f;
    const float divisor = or_one(coarse[run]);
    for (int64_t i = 0; i < count; ++i) values[i] /= divisor;
  }
}

// Quantize a row, of which x has room for K in whole blocks.
void quantize_row(const Arguments& g, int64_t row, float* x, uint8_t* codes, uint8_t* bytes) {
  read_row(g, row, x);
  const int64_t K = g.K, padded = in_blocks(K);
  float* scale = g.scale ? g.scale + row * ((K + g.columns - 1) / g.columns) : nullptr;
  if (g.method == INT8 || g.method == FP8) {
    const auto quantize = g.method == INT8 ? quantize_int8 : quantize_fp8;
    for (int64_t k = 0; k < K; k += g.columns)
      scale[k / g.columns] = quantize(x + k, std::min(g.columns, K - k), codes + k);
    return;
  }
  if (g.method == MXFP4_DUALSCALE) divide_coarse(x, padded, scale);
  quantize_mx(x, padded, g.method != MXFP8, g.uos, codes, bytes);
}

// Write what a row's codes stand for, without the float32 scales.
void write_values(const Arguments& g, const uint8_t* codes, const uint8_t* bytes, uint16_t* values) {
  const int64_t count = width(g);
  const uint8_t* scale = g.method >= MXFP8 ? bytes : nullptr;
  for (int64_t k = 0; k < count; k += STEP_K)
    decode_bfloat16(codes, scale, g.method > MXFP8, k, std::min(STEP_K, count - k), values + k);
}

void run(const Arguments& g) {
  const int64_t padded = in_blocks(g.K);
  const int64_t code_bytes = g.method > MXFP8 ? padded / 2 : width(g);
  const int64_t blocks = padded / MX_BLOCK;
  std::vector<float> buffers(g.threads * padded);
  std::vector<uint8_t> own(g.values ? g.threads * (padded + blocks) : 0);
#pragma omp parallel for num_threads(g.threads)
  for (int64_t thread = 0; thread < g.threads; ++thread) {
    float* x = buffers.data() + thread * padded;
    const int64_t end = g.rows * (thread + 1) / g.threads;
    for (int64_t row = g.rows * thread / g.threads; row < end; ++row) {
      if (!g.values) {
        quantize_row(g, row, x, g.codes + row * code_bytes, g.bytes ? g.bytes + row * blocks : nullptr);
        continue;
      }
      uint8_t* codes = own.data() + thread * (padded + blocks);
      quantize_row(g, row, x, codes, codes + padded);
      write_values(g, codes, codes + padded, g.values + row * width(g));
    }
  }
}

}  // namespace

// Returns 0, or 1 with what went wrong in `message`.
EXPORTED int omniq_quantize(const Arguments* arguments, char* message, int64_t size) {
  try {
    run(*arguments);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
