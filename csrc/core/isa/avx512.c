/* AVX-512 F+BW+DQ+VL+VBMI+VNNI (Ice Lake 2019, Zen 4 2022 and later): 16 lanes in one register. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi2,popcnt")

typedef __m512 bw_vf;

static inline bw_vf bw_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline void bw_store(float *p, bw_vf x) {
    _mm512_storeu_ps(p, x);
}
static inline bw_vf bw_load_f16(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline bw_vf bw_load_bf16(const void *p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
static inline bw_vf bw_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void bw_store_f16(void *p, bw_vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
/* Nearest, ties to even; NaN keeps its top bits and becomes quiet. */
static inline void bw_store_bf16(void *p, bw_vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void bw_store_u8(uint8_t *p, bw_vf x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline bw_vf bw_set(float x) {
    return _mm512_set1_ps(x);
}
static inline bw_vf bw_add(bw_vf x, bw_vf y) {
    return _mm512_add_ps(x, y);
}
static inline bw_vf bw_sub(bw_vf x, bw_vf y) {
    return _mm512_sub_ps(x, y);
}
static inline bw_vf bw_mul(bw_vf x, bw_vf y) {
    return _mm512_mul_ps(x, y);
}
static inline bw_vf bw_div(bw_vf x, bw_vf y) {
    return _mm512_div_ps(x, y);
}
static inline bw_vf bw_fma(bw_vf x, bw_vf y, bw_vf z) {
    return _mm512_fmadd_ps(x, y, z);
}
static inline bw_vf bw_min(bw_vf x, bw_vf y) {
    return _mm512_min_ps(x, y);
}
static inline bw_vf bw_max(bw_vf x, bw_vf y) {
    return _mm512_max_ps(x, y);
}
/* a < b ? x : y, lane by lane. */
static inline bw_vf bw_select_less(bw_vf a, bw_vf b, bw_vf x, bw_vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline bw_vf bw_rint(bw_vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 2^n for whole n in -127 .. 127 (2^-127 gives 0); anything for other n. */
static inline bw_vf bw_pow2(bw_vf n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

#define FOLD(op)                                                                                   \
    __m256 eight = _mm256_##op##_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));      \
    __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));  \
    __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                   \
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
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

const bw_isa bw_isa_avx512 = BW_TABLE("avx512", 20, supported);
