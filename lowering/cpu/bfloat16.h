// The codes of the OCP formats as BF16.
//
// C++ of this folder includes it after other headers: `library.read` puts the text in place of the line.

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include "codes.h"

namespace {

// Every value has at most four significant bits: BF16 is the upper half of the float32.
inline uint16_t to_bfloat16(float value) { return static_cast<uint16_t>(to_bits(value) >> 16); }

inline void decode_through_float32(
    const uint8_t* codes, const uint8_t* scale, bool e2m1, int64_t k, int64_t count, uint16_t* values) {
  float elements[STEP_K];
  decode_elements(codes, scale, e2m1, k, count, elements);
  for (int64_t i = 0; i < count; ++i) values[i] = to_bfloat16(elements[i]);
}

#if defined(CPU_CAPABILITY_AVX512)

// The field of BF16's exponent for 2**e.
constexpr uint16_t power(int e) { return static_cast<uint16_t>((e + 127) << 7); }

// BF16 of e2m1 by code, and of e4m3's subnormals by magnitude.
alignas(64) constexpr uint16_t E2M1_VALUES[32] = {
    0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
    0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
alignas(64) constexpr uint16_t E4M3_SUBNORMALS[32] = {
    0x0000, power(-9), power(-8), power(-8) + 0x40, power(-7), power(-7) + 0x20, power(-7) + 0x40, power(-7) + 0x60};

// Decode 32 codes, 16 bytes, and add `shift` to the field of the exponent of those that are not 0.
inline void decode_e2m1_block(const uint8_t* codes, uint16_t shift, uint16_t* values) {
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i code =
      _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), _mm512_set1_epi32(0x000F000F));
  const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(7));
  const __m512i value = _mm512_permutexvar_epi16(code, _mm512_load_si512(E2M1_VALUES));
  _mm512_storeu_si512(values, _mm512_mask_add_epi16(value, some, value, _mm512_set1_epi16(shift)));
}

// The same for `count` codes of e4m3, at most 32.
inline void decode_e4m3_block(const uint8_t* codes, int64_t count, uint16_t shift, uint16_t* values) {
  const auto present = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(present, codes));
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
  const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x7F));
  const __mmask32 subnormal = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(power(-7)));
  value = _mm512_mask_permutexvar_epi16(value, subnormal, magnitude, _mm512_load_si512(E4M3_SUBNORMALS));
  value = _mm512_mask_add_epi16(value, some, value, _mm512_set1_epi16(shift));
  value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FC0));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
  _mm512_mask_storeu_epi16(values, present, _mm512_or_si512(value, sign));
}

// Whether no value of e2m1 or e4m3 but 0 leaves BF16's normal numbers by this e8m0 scale.
inline bool keeps_normal(uint8_t scale) { return scale > 9 && scale < 247; }

#endif

// Decode as `decode_elements` does, to BF16.
inline void decode_bfloat16(
    const uint8_t* codes, const uint8_t* scale, bool e2m1, int64_t k, int64_t count, uint16_t* values) {
#if defined(CPU_CAPABILITY_AVX512)
  for (int64_t i = 0; i < count; i += MX_BLOCK) {
    const uint8_t* block_scale = scale ? scale + (k + i) / MX_BLOCK : nullptr;
    if (block_scale && !keeps_normal(*block_scale)) {
      decode_through_float32(codes, scale, e2m1, k + i, MX_BLOCK, values + i);
      continue;
    }
    const auto shift = static_cast<uint16_t>(block_scale ? (*block_scale - 127) * 128 : 0);
    if (e2m1)
      decode_e2m1_block(codes + (k + i) / 2, shift, values + i);
    else
      decode_e4m3_block(codes + k + i, std::min(MX_BLOCK, count - i), shift, values + i);
  }
#else
  decode_through_float32(codes, scale, e2m1, k, count, values);
#endif
}

}  // namespace
