// Quantizes the rows of a large matrix, to the same bits as the formats' own arithmetic in torch.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
// Inductor's flags switch this off, for loops that it has vectorized itself.
#pragma GCC optimize("tree-loop-vectorize")
#endif

namespace {

constexpr int64_t MX_BLOCK = 32;
constexpr int64_t RUN = 512;

enum Method : int64_t { INT8 = 0, FP8 = 1, MXFP8 = 2, MXFP4 = 3, MXFP4_DUALSCALE = 4 };

}  // namespace

// The same fields in the same order as `_Arguments` in quantize.py.
struct Arguments {
  const void* x;   // [rows, K], float32 or BF16
  uint8_t* codes;  // [rows, K], [rows, K'], or [rows, K' / 2] for e2m1; K' is K in whole blocks
  void* scale;     // float32 [rows], or e8m0 bytes [rows, K' / 32]
  float* coarse;   // [rows, ceil(K / 512)], dual scale only
  int64_t rows, K;
  int64_t bfloat16;  // whether x is
  int64_t method;
  int64_t uos;  // whether the block scale is UOS's
  int64_t threads;
};

namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The largest magnitude, as bits: they are in the order of magnitudes, with NaN above all.
inline uint32_t amax_bits(const float* x, int64_t count) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) amax = std::max(amax, to_bits(x[i]) & 0x7FFFFFFFu);
  return amax;
}

inline float or_one(float scale) { return scale == 0 ? 1.0f : scale; }

// Beside 1.5 * 2**(e + 20) a float32 has a step of 2**(e - 3), which is that of e4m3 at 2**e: the
// addition rounds half to even, and leaves the number of steps in the lowest bits.
inline uint8_t encode_e4m3(float x) {
  const float magnitude = std::min(from_bits(to_bits(x) & 0x7FFFFFFF), 448.0f);
  const float binade = std::max(from_bits(to_bits(magnitude) & 0x7F800000), 0x1p-6f);
  const uint32_t steps = to_bits(magnitude + binade * 0x1.8p20f) & 31;
  const uint32_t code = steps + (((to_bits(binade) >> 23) - 121) << 3);
  return static_cast<uint8_t>(code | ((to_bits(x) >> 24) & 0x80));
}

// The same for e2m1, whose step at 2**e is 2**(e - 1).
inline uint8_t encode_e2m1(float x) {
  const float magnitude = std::min(from_bits(to_bits(x) & 0x7FFFFFFF), 6.0f);
  const float binade = std::max(from_bits(to_bits(magnitude) & 0x7F800000), 1.0f);
  const uint32_t steps = to_bits(magnitude + binade * 0x1.8p22f) & 7;
  const uint32_t code = steps + ((to_bits(binade) >> 22) - (127 << 1));
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
  for (int64_t i = 0; i < padded / 2; ++i)
    codes[i] = static_cast<uint8_t>(encode_e2m1(x[2 * i]) | (encode_e2m1(x[2 * i + 1]) << 4));
}

void quantize_row(const Arguments& g, int64_t row, float* x) {
  const int64_t K = g.K;  // a store of codes may not change it
  const int64_t padded = (K + MX_BLOCK - 1) / MX_BLOCK * MX_BLOCK;
  if (g.bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(g.x) + row * K;
    for (int64_t i = 0; i < K; ++i) x[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
  } else {
    std::memcpy(x, static_cast<const float*>(g.x) + row * K, K * sizeof(float));
  }
  std::fill(x + K, x + padded, 0.0f);
  if (g.method == INT8 || g.method == FP8) {
    const float scale = from_bits(amax_bits(x, K)) / (g.method == INT8 ? 127.0f : 448.0f);
    static_cast<float*>(g.scale)[row] = scale;
    const float divisor = or_one(scale);
    uint8_t* codes = g.codes + row * K;
    if (g.method == FP8) {
      for (int64_t i = 0; i < K; ++i) codes[i] = encode_e4m3(x[i] / divisor);
      return;
    }
    for (int64_t i = 0; i < K; ++i) {
      // Beside 1.5 * 2**23 a float32 has a step of 1. A denormal scale can leave more than 127.
      const float limited = std::min(std::max(x[i] / divisor, -127.0f), 127.0f);
      codes[i] = static_cast<uint8_t>(to_bits(limited + 0x1.8p23f));
    }
    return;
  }
  if (g.method == MXFP4_DUALSCALE) {
    const int64_t runs = (K + RUN - 1) / RUN;
    for (int64_t run = 0; run < runs; ++run) {
      float* values = x + run * RUN;
      const int64_t count = std::min(RUN, padded - run * RUN);
      const float coarse = from_bits(amax_bits(values, count)) / 6.0f;
      g.coarse[row * runs + run] = coarse;
      const float divisor = or_one(coarse);
      for (int64_t i = 0; i < count; ++i) values[i] /= divisor;
    }
  }
  const bool e2m1 = g.method != MXFP8;
  uint8_t* codes = g.codes + row * (e2m1 ? padded / 2 : padded);
  uint8_t* scale = static_cast<uint8_t*>(g.scale) + row * (padded / MX_BLOCK);
  quantize_mx(x, padded, e2m1, g.uos, codes, scale);
}

}  // namespace

// Returns 0, or 1 with what went wrong in `message`.
extern "C" int omniq_quantize(const Arguments* arguments, char* message, int64_t size) {
  try {
    const Arguments& g = *arguments;
    const int64_t padded = g.K + MX_BLOCK;
    std::vector<float> buffers(g.threads * padded);
#pragma omp parallel for num_threads(g.threads)
    for (int64_t thread = 0; thread < g.threads; ++thread) {
      float* x = buffers.data() + thread * padded;
      const int64_t end = g.rows * (thread + 1) / g.threads;
      for (int64_t row = g.rows * thread / g.threads; row < end; ++row) quantize_row(g, row, x);
    }
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
