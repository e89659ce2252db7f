// A processor's vectors under one set of names, chosen when this is compiled: AVX-512 with VNNI, AVX2, or any processor's.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {
// Lanes: WIDTH numbers side by side. Sums: of products of nibbles (0 .. 15) and x8 (-127 .. 127). Rows of x that share one
// reading of the weights: ROWS of packed ones, PLAIN_ROWS of plain ones, of which OUTPUTS rows share one reading of x; as
// many as registers hold.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int WIDTH = 16, ROWS = 8, PLAIN_ROWS = 9, OUTPUTS = 3;
using Bytes = __m512i;
using Sums = __m512i;
using Lanes = __m512;
inline Bytes load(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
inline Bytes low(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
inline Bytes high(Bytes codes) { return low(_mm512_srli_epi16(codes, 4)); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums add(Sums sums, Bytes nibbles, int32_t x8) { return _mm512_dpbusd_epi32(sums, nibbles, _mm512_set1_epi32(x8)); }
inline Lanes floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Lanes splat(float value) { return _mm512_set1_ps(value); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes load_halves(const at::Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline Lanes load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Lanes load_upper_halves(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
inline float sum(Lanes lanes) { return _mm512_reduce_add_ps(lanes); }
inline void store(float* to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 4, PLAIN_ROWS = 6, OUTPUTS = 2;
using Bytes = __m256i;
using Lanes = __m256;
inline Bytes load(const uint8_t* codes) { return _mm256_loadu_si256((const __m256i*)codes); }
inline Bytes low(Bytes codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
inline Bytes high(Bytes codes) { return low(_mm256_srli_epi16(codes, 4)); }
// Sixteen sums of two products each, in int16: a block adds 8 of at most 2 x 15 x 127 = 3,810, and 30,480 fits.
using Sums = __m256i;
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Sums add(Sums sums, Bytes nibbles, int32_t x8) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, _mm256_set1_epi32(x8)));
}
inline Lanes floats(Sums sums) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))); }
inline Lanes splat(float value) { return _mm256_set1_ps(value); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes load_halves(const at::Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline Lanes load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline Lanes load_upper_halves(const uint16_t* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}
inline float sum(Lanes lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline void store(float* to, Lanes lanes) { _mm256_storeu_ps(to, lanes); }
#else  // any processor: the compiler makes vectors of these loops as it can
constexpr int WIDTH = 16, ROWS = 1, PLAIN_ROWS = 2, OUTPUTS = 2;
struct Bytes { uint8_t at[WIDTH * 4]; };
struct Sums { int32_t at[WIDTH]; };
struct Lanes { float at[WIDTH]; };
template <typename Result, int N, typename F> inline Result each(F f) {
  Result result;
  for (int i = 0; i < N; i++) result.at[i] = f(i);
  return result;
}
inline Bytes load(const uint8_t* codes) { return each<Bytes, WIDTH * 4>([&](int i) { return codes[i]; }); }
inline Bytes low(const Bytes& codes) { return each<Bytes, WIDTH * 4>([&](int i) { return codes.at[i] & 15; }); }
inline Bytes high(const Bytes& codes) { return each<Bytes, WIDTH * 4>([&](int i) { return codes.at[i] >> 4; }); }
inline Sums no_sums() { return {}; }
inline Sums add(const Sums& sums, const Bytes& nibbles, int32_t x8) {
  const int8_t* x = (const int8_t*)&x8;
  return each<Sums, WIDTH>([&](int i) {
    const uint8_t* q = nibbles.at + 4 * i;
    return sums.at[i] + q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3];
  });
}
inline Lanes floats(const Sums& sums) { return each<Lanes, WIDTH>([&](int i) { return (float)sums.at[i]; }); }
inline Lanes splat(float value) { return each<Lanes, WIDTH>([&](int) { return value; }); }
inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each<Lanes, WIDTH>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline Lanes load_halves(const at::Half* from) { return each<Lanes, WIDTH>([&](int i) { return (float)from[i]; }); }
inline Lanes load_floats(const float* from) { return each<Lanes, WIDTH>([&](int i) { return from[i]; }); }
inline Lanes load_upper_halves(const uint16_t* from) {
  return each<Lanes, WIDTH>([&](int i) { return std::bit_cast<float>((uint32_t)from[i] << 16); });
}
inline float sum(const Lanes& lanes) {
  float total = 0;
  for (float value : lanes.at) total += value;
  return total;
}
inline void store(float* to, const Lanes& lanes) { std::copy_n(lanes.at, WIDTH, to); }
#endif
inline Lanes load_any(const float* from) { return load_floats(from); }
inline Lanes load_any(const at::Half* from) { return load_halves(from); }
inline Lanes load_any(const at::BFloat16* from) { return load_upper_halves((const uint16_t*)from); }  // of fp32 numbers
}  // namespace
