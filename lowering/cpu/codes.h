// The codes of the OCP formats as float32.
//
// C++ of this folder includes it after other headers: `library.read` puts the text in place of the line.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// Inductor's flags switch this off, for loops that it has vectorized itself.
#pragma GCC optimize("tree-loop-vectorize")
#endif

// Libraries of Windows hide what does not say otherwise.
#if defined(_WIN32)
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C"
#endif

namespace {

constexpr int64_t MX_BLOCK = 32;
constexpr int64_t STEP_K = 512;  // of a row decoded at a time: 64 rows in BF16 stay in the L2 cache

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

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

// Without a branch, so that loops over it vectorize.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// e4m3 (OCP 8-bit Floating Point v1.0), without a float32 denormal on the way.
inline float decode_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7F;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  const uint32_t normal = choose(magnitude == 0x7F, 0x7FC00000, (magnitude << 20) + (120u << 23));
  return from_bits(choose(magnitude < 8, to_bits(subnormal), normal) | ((code & 0x80) << 24));
}

// e2m1 (OCP Microscaling Formats v1.0, section 5.3.3).
inline float decode_e2m1(uint32_t code) {
  const uint32_t magnitude = code & 7;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.5f;
  const uint32_t normal = (magnitude << 22) + (126u << 23);
  return from_bits(choose(magnitude < 2, to_bits(subnormal), normal) | ((code & 8) << 28));
}

// e8m0 (section 5.4.1) as two factors, so that neither is a denormal.
struct Power {
  float small, large;
};

inline Power decode_e8m0(uint32_t byte) {
  const uint32_t large = std::max(byte, 2u);
  return {from_bits((byte - large + 127) << 23), byte == 255 ? NAN : from_bits(large << 23)};
}

// Decode elements k to k + count of a row, where k is a multiple of 32 and count at most STEP_K.
//
// `codes` are e4m3 bytes, or e2m1 with even k in the low nibble. `scale` has an e8m0 byte for each 32
// elements, of which count is then a multiple; or it is null.
inline void decode_elements(
    const uint8_t* codes, const uint8_t* scale, bool e2m1, int64_t k, int64_t count, float* values) {
  if (e2m1) {
    uint8_t nibbles[STEP_K];
    for (int64_t i = 0; i < count / 2; ++i) {
      nibbles[2 * i] = codes[k / 2 + i] & 15;
      nibbles[2 * i + 1] = codes[k / 2 + i] >> 4;
    }
    for (int64_t i = 0; i < count; ++i) values[i] = decode_e2m1(nibbles[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = decode_e4m3(codes[k + i]);
  }
  if (!scale) return;
  for (int64_t block = 0; block < count / MX_BLOCK; ++block) {
    const Power power = decode_e8m0(scale[k / MX_BLOCK + block]);
    for (int64_t i = block * MX_BLOCK; i < (block + 1) * MX_BLOCK; ++i)
      values[i] = values[i] * power.small * power.large;
  }
}

}  // namespace
