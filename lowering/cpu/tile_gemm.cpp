// out = (a * a_scale) @ (b * b_scale)^T + bias, where b is stored as e4m3 or e2m1 codes.
//
// A tile of b is decoded to BF16 at a time, in the order that brgemm reads (pairs along K beside each
// other), and multiplied by brgemm (oneDNN's BF16 micro-kernel: AMX or AVX512-BF16) with float32 sums.
// Float32 scales are applied to the sums of the columns that share them, and the bias before the one
// rounding to the result's type.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int64_t TILE_M = 64;
constexpr int64_t TILE_N = 64;
constexpr int64_t TRANSPOSED = 16;  // rows at a time: one cache line of pairs
constexpr int64_t ROWS_A_TASK = 256;  // at least, where a result has too few columns for all threads
static_assert(ROWS_A_TASK >= TILE_M, "one tile is one task, which decodes its panel once");

enum Element : int64_t { E4M3 = 0, E2M1 = 1 };
enum Result : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

}  // namespace

// The same fields in the same order as `_Arguments` in tile_gemm.py. Sizes count elements.
struct Arguments {
  const void* a;              // BF16 [M, K], K even
  const float* a_scale;       // [M, ceil(K / a_columns)], or null; null where b_scale is
  const uint8_t* codes;       // [N, K] e4m3, or [N, K / 2] e2m1 with even k in the low nibble
  const uint8_t* block_scale; // e8m0 [N, K / 32], or null
  const float* b_scale;       // [ceil(N / b_rows), ceil(K / b_columns)], or null
  const float* bias;          // [N], or null
  void* out;                  // [M, N]
  int64_t M, N, K;
  int64_t b_bytes;            // from one row of codes to the next; may leave out an odd K's last
  int64_t a_columns, b_rows, b_columns;
  int64_t element, result;
};

namespace {

// Rows n to n + TILE_N of b as brgemm reads them, [K / 2][TILE_N] pairs; missing rows are zeros.
class Panel {
 public:
  // Where all of a is one tile, columns are multiplied once, while a cache nearby has them, and not kept.
  explicit Panel(const Arguments& g)
      : g(g),
        whole(g.M > TILE_M),
        rows(TRANSPOSED * STEP_K),
        pairs((whole ? round_up(g.K, STEP_K) : STEP_K) / 2 * TILE_N) {}

  void decode(int64_t n, int64_t k, int64_t count) {
    for (int64_t first = 0; first < TILE_N; first += TRANSPOSED) {
      for (int64_t j = 0; j < TRANSPOSED; ++j) decode_row(n + first + j, k, count, rows.data() + j * STEP_K);
      transpose(count, at(k) + first);
    }
  }

  uint32_t* at(int64_t k) { return pairs.data() + (whole ? k / 2 * TILE_N : 0); }

 private:
  // From k to k + count, where k is a multiple of 32 and count at most STEP_K.
  void decode_row(int64_t n, int64_t k, int64_t count, uint16_t* values) const {
    const bool e2m1 = g.element == E2M1;
    int64_t decoded = n < g.N ? count : 0;
    if (decoded && !e2m1) decoded = std::min(count, g.b_bytes - k);
    const uint8_t* scale = g.block_scale ? g.block_scale + n * (g.K / MX_BLOCK) : nullptr;
    decode_bfloat16(g.codes + n * g.b_bytes, scale, e2m1, k, decoded, values);
    std::fill(values + decoded, values + count, 0);
  }

  // Copy `count` columns of the rows.
  void transpose(int64_t count, uint32_t* to) const {
#if defined(CPU_CAPABILITY_AVX512)
    const auto* from = reinterpret_cast<const float*>(rows.data());
    at::vec::transpose_mxn<float>(
        from, STEP_K / 2, reinterpret_cast<float*>(to), TILE_N, TRANSPOSED, static_cast<int>(count / 2));
#else
    for (int64_t pair = 0; pair < count / 2; ++pair)
      for (int64_t j = 0; j < TRANSPOSED; ++j)
        std::memcpy(to + pair * TILE_N + j, rows.data() + j * STEP_K + 2 * pair, sizeof(uint32_t));
#endif
  }

  const Arguments& g;
  const bool whole;
  std::vector<uint16_t> rows;
  std::vector<uint32_t> pairs;
};

// Multiply columns k to end of rows m to m + count with rows n to n + TILE_N of b: sums [count][TILE_N].
// `fresh` says that these columns of the panel are still to be decoded.
void multiply(
    const Arguments& g, int64_t m, int64_t count, int64_t n, int64_t k, int64_t end, bool fresh, Panel& panel,
    float* sums) {
  const auto* a = static_cast<const at::BFloat16*>(g.a) + m * g.K;
  for (int64_t step = k; step < end; step += STEP_K) {
    const int64_t width = std::min(STEP_K, end - step);
    if (fresh) panel.decode(n, step, width);
    const auto* b = reinterpret_cast<const at::BFloat16*>(panel.at(step));
    at::native::cpublas::brgemm(count, TILE_N, width, g.K, TILE_N, TILE_N, step > k, a + step, b, sums);
  }
}

// Add the sums of columns that share a scale, from column k on, to the total.
void add_scaled(
    const Arguments& g, int64_t m, int64_t count, int64_t n, int64_t k, const float* sums, float* total) {
  const int64_t a_groups = (g.K + g.a_columns - 1) / g.a_columns;
  const int64_t b_groups = (g.K + g.b_columns - 1) / g.b_columns;
  float b_scale[TILE_N] = {};
  for (int64_t j = 0; j < TILE_N && n + j < g.N; ++j)
    b_scale[j] = g.b_scale[(n + j) / g.b_rows * b_groups + k / g.b_columns];
  for (int64_t i = 0; i < count; ++i) {
    const float a_scale = g.a_scale ? g.a_scale[(m + i) * a_groups + k / g.a_columns] : 1;
    const float* from = sums + i * TILE_N;
    float* to = total + i * TILE_N;
    for (int64_t j = 0; j < TILE_N; ++j) {
      const float scaled = from[j] * a_scale * b_scale[j];
      to[j] = k == 0 ? scaled : to[j] + scaled;
    }
  }
}

template <typename T>
void store(const Arguments& g, int64_t m, int64_t count, int64_t n, const float* total) {
  const int64_t width = std::min(TILE_N, g.N - n);
  float bias[TILE_N] = {};
  if (g.bias) std::copy_n(g.bias + n, width, bias);
  for (int64_t i = 0; i < count; ++i) {
    T* to = static_cast<T*>(g.out) + (m + i) * g.N + n;
    const float* from = total + i * TILE_N;
    if (g.bias)
      for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(from[j] + bias[j]);
    else
      for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(from[j]);
  }
}

void run(const Arguments& g) {
  const int64_t group = g.b_scale ? std::gcd(g.a_columns, g.b_columns) : g.K;
  const int64_t across = (g.N + TILE_N - 1) / TILE_N;
  const int64_t wanted = (2 * at::get_num_threads() + across - 1) / across;
  const int64_t down = std::clamp<int64_t>(wanted, 1, (g.M + ROWS_A_TASK - 1) / ROWS_A_TASK);
  const int64_t rows_a_task = round_up((g.M + down - 1) / down, TILE_M);
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    Panel panel(g);
    std::vector<float> sums(TILE_M * TILE_N), total(TILE_M * TILE_N);
    int64_t decoded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / down * TILE_N;
      const int64_t first = task % down * rows_a_task;
      const int64_t last = std::min(g.M, first + rows_a_task);
      for (int64_t m = first; m < last; m += TILE_M) {
        const int64_t count = std::min(TILE_M, last - m);
        for (int64_t k = 0; k < g.K; k += group) {
          multiply(g, m, count, n, k, std::min(g.K, k + group), n != decoded, panel, sums.data());
          if (g.b_scale) add_scaled(g, m, count, n, k, sums.data(), total.data());
        }
        decoded = n;
        const float* result = g.b_scale ? total.data() : sums.data();
        if (g.result == BFLOAT16) store<at::BFloat16>(g, m, count, n, result);
        else if (g.result == FLOAT16) store<at::Half>(g, m, count, n, result);
        else store<float>(g, m, count, n, result);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

// Say whether brgemm takes BF16 pairs on this CPU, by calling it: `could_pack` answers for AMX only.
EXPORTED int omniq_tile_gemm_supported() {
  try {
    const std::vector<uint16_t> zeros(2 * TILE_N);
    std::vector<float> sums(TILE_N);
    const auto* values = reinterpret_cast<const at::BFloat16*>(zeros.data());
    at::native::cpublas::brgemm(1, TILE_N, 2, 2, TILE_N, TILE_N, false, values, values, sums.data());
    at::native::cpublas::brgemm_release();
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

// Returns 0, or 1 with what went wrong in `message`.
EXPORTED int omniq_tile_gemm(const Arguments* arguments, char* message, int64_t size) {
  try {
    run(*arguments);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
