/* AVX2 + FMA + F16C + BMI2 (Haswell 2013, Zen 2017 and later): 16 lanes in two registers. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,popcnt")

typedef struct {
    __m256 a, b; /* lanes 0..7 and 8..15 */
} bw_vf;

static inline bw_vf bw_load(const float *p) {
    return (bw_vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
static inline void bw_store(float *p, bw_vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline __m128i load_half(const void *p, int i) {
    return _mm_loadu_si128((const __m128i *)p + i);
}
static inline bw_vf bw_load_f16(const void *p) {
    return (bw_vf){_mm256_cvtph_ps(load_half(p, 0)), _mm256_cvtph_ps(load_half(p, 1))};
}
static inline __m256 widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline bw_vf bw_load_bf16(const void *p) {
    return (bw_vf){widen_bf16(load_half(p, 0)), widen_bf16(load_half(p, 1))};
}
static inline bw_vf bw_load_u8(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (bw_vf){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                   _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline void bw_store_f16(void *p, bw_vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
/* Nearest, ties to even; NaN keeps its top bits and becomes quiet. */
static inline __m256i narrow_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
static inline void bw_store_bf16(void *p, bw_vf x) {
    __m256i packed = _mm256_packus_epi32(narrow_bf16(x.a), narrow_bf16(x.b));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
static inline void bw_store_u8(uint8_t *p, bw_vf x) {
    __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
static inline bw_vf bw_set(float x) {
    return (bw_vf){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
static inline bw_vf bw_add(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
static inline bw_vf bw_sub(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
static inline bw_vf bw_mul(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
static inline bw_vf bw_div(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
static inline bw_vf bw_fma(bw_vf x, bw_vf y, bw_vf z) {
    return (bw_vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline bw_vf bw_min(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
static inline bw_vf bw_max(bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
/* a < b ? x : y, lane by lane. */
static inline bw_vf bw_select_less(bw_vf a, bw_vf b, bw_vf x, bw_vf y) {
    return (bw_vf){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
                   _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
static inline bw_vf bw_rint(bw_vf x) {
    return (bw_vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/* 2^n for whole n in -127 .. 127 (2^-127 gives 0); anything for other n. */
static inline __m256 pow2_half(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline bw_vf bw_pow2(bw_vf n) {
    return (bw_vf){pow2_half(n.a), pow2_half(n.b)};
}

#define FOLD(op)                                                                                  \
    __m256 eight = _mm256_##op##_ps(x.a, x.b);                                                    \
    __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                  \
    return _mm_cvtss_f32(_mm_##op##_ss(two, _mm_movehdup_ps(two)))
static inline float bw_sum(bw_vf x) {
    FOLD(add);
}
static inline float bw_reduce_min(bw_vf x) {
    FOLD(min);
}
static inline float bw_reduce_max(bw_vf x) {
    FOLD(max);
}

#define bw_pext(x, mask) _pext_u64(x, mask)
#define bw_pdep(x, mask) _pdep_u64(x, mask)

#include "../kernels/all.h"

#pragma GCC pop_options

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}

const bw_isa bw_isa_avx2 = BW_TABLE("avx2", 10, supported);
