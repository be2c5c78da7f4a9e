/* AVX2 + FMA + F16C + BMI2 (Haswell 2013, Zen 2017 and later): 16 lanes in two registers. */
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../codec/trellis.h"
#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,popcnt")
#endif

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

/* x[lanes[i]] for each lane; lanes below 8. */
static inline bw_vf bw_spread(bw_vf x, const int32_t *lanes) {
    return (bw_vf){_mm256_permutevar8x32_ps(x.a, _mm256_loadu_si256((const __m256i *)lanes)),
                   _mm256_permutevar8x32_ps(x.a, _mm256_loadu_si256((const __m256i *)lanes + 1))};
}
/* Lanes i and i + 8 to eight. */
#define HALVES(op, x) _mm256_##op##_ps((x).a, (x).b)
/* Each of four vectors folded to one number, in the order of FOLD. */
#define FOLD_FOUR(op)                                                                                                  \
    __m128 four[4];                                                                                                    \
    for (int i = 0; i < 4; i++) {                                                                                      \
        __m256 eight = _mm256_##op##_ps(x[i].a, x[i].b);                                                               \
        four[i] = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));                       \
    }                                                                                                                  \
    __m128 ab = _mm_##op##_ps(_mm_movelh_ps(four[0], four[1]), _mm_movehl_ps(four[1], four[0])); /* 0+2 1+3 of each */ \
    __m128 cd = _mm_##op##_ps(_mm_movelh_ps(four[2], four[3]), _mm_movehl_ps(four[3], four[2]));                       \
    _mm_storeu_ps(out, _mm_##op##_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)))
#include "folds.h"

/* 64 codes, one in 16 bits, so that products with 16-bit numbers never saturate. A register holds
 * codes 0..7 | 16..23, the next 8..15 | 24..31 of each 32, so that each half sums one run of 16. */
typedef struct {
    __m256i v[4];
} bw_codes;
/* Bytes that hold a code to 16 bits, a multiplication that shifts its top bit up to bit 15, a shift down. */
typedef struct {
    __m256i pick[2], lift[2];
    __m128i down;
    int bits;
} bw_reader;
typedef struct {
    const uint8_t *p;
} bw_span;

static inline bw_reader bw_read_dense(int bits) {
    bw_reader reader = {.down = _mm_cvtsi32_si128(16 - bits), .bits = bits};
    uint8_t pick[2][16];
    uint16_t lift[2][8];
    for (int i = 0; i < 16; i++) {
        int bit = i * bits;
        pick[i / 8][2 * (i % 8)] = (uint8_t)(bit / 8);
        pick[i / 8][2 * (i % 8) + 1] = (uint8_t)(bit / 8 + 1);
        lift[i / 8][i % 8] = (uint16_t)(1 << (16 - bits - bit % 8));
    }
    for (int h = 0; h < 2; h++) {
        reader.pick[h] = _mm256_broadcastsi128_si256(load_half(pick[h], 0));
        reader.lift[h] = _mm256_broadcastsi128_si256(load_half(lift[h], 0));
    }
    return reader;
}
static inline bw_span bw_open_dense(const uint8_t *p, const bw_reader *reader) {
    (void)reader;
    return (bw_span){p};
}
static inline bw_codes bw_take_dense(const bw_span *span, const bw_reader *reader) {
    bw_codes codes;
    for (int h = 0; h < 2; h++) {
        const uint8_t *p = span->p + 4 * h * reader->bits;
        __m256i bytes =
            _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(p, 0)), load_half(p + 2 * reader->bits, 0), 1);
        for (int i = 0; i < 2; i++) {
            __m256i lifted = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, reader->pick[i]), reader->lift[i]);
            codes.v[2 * h + i] = _mm256_srl_epi16(lifted, reader->down);
        }
    }
    return codes;
}

/* Ternary: byte / 3^j as (256 byte) (2^15 / 3^j, rounded up) / 2^23, which is exact below 243; then the rest by 3. */
static const uint16_t third_powers[24] = {32768, 10923, 3641,  1214,  405,   32768, 10923, 3641,
                                          1214,  405,   32768, 10923, 3641,  1214,  405,   32768,
                                          10923, 3641,  1214,  405,   32768, 10923, 3641,  1214};
#define FIFTHS4(b)                                                                                                   \
    b, b, b, b, b, b + 1, b + 1, b + 1, b + 1, b + 1, b + 2, b + 2, b + 2, b + 2, b + 2, b + 3, b + 3, b + 3, b + 3, \
        b + 3
static const uint8_t fifths[80] = {FIFTHS4(0), FIFTHS4(4), FIFTHS4(8), FIFTHS4(12)};

static inline bw_reader bw_read_ternary(void) {
    return (bw_reader){.bits = 0};
}
static inline bw_span bw_open_ternary(const uint8_t *p) {
    return (bw_span){p};
}
/* Eight codes from code `first` of 16 bytes on: which byte, moved to the upper half of 16 bits. */
static inline __m128i pick_fifths(int first) {
    __m128i index = _mm_loadl_epi64((const __m128i *)(fifths + first));
    return _mm_unpacklo_epi8(_mm_set1_epi8((char)0x80), index);
}
static inline bw_codes bw_take_ternary(const bw_span *span, int k, const bw_reader *reader) {
    (void)reader;
    bw_codes codes;
    int offset = 64 * k % 5;
    __m256i bytes = _mm256_broadcastsi128_si256(load_half(span->p + 64 * k / 5, 0));
    for (int i = 0; i < 4; i++) {
        int at = offset + 32 * (i / 2) + 8 * (i % 2);
        __m256i pick = _mm256_set_m128i(pick_fifths(at + 16), pick_fifths(at));
        __m256i power =
            _mm256_set_m128i(load_half(third_powers + (at + 16) % 5, 0), load_half(third_powers + at % 5, 0));
        __m256i quotient = _mm256_srli_epi16(_mm256_mulhi_epu16(_mm256_shuffle_epi8(bytes, pick), power), 7);
        __m256i third = _mm256_mulhi_epu16(quotient, _mm256_set1_epi16(21846));
        codes.v[i] = _mm256_sub_epi16(quotient, _mm256_add_epi16(third, _mm256_add_epi16(third, third)));
    }
    return codes;
}

static inline __m256 widen_codes(__m128i eight) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(eight));
}
/* Codes 16k .. 16k+15 as numbers. */
static inline bw_vf bw_code_floats(bw_codes codes, int k) {
    __m256i a = codes.v[k / 2 * 2], b = codes.v[k / 2 * 2 + 1];
    if (k % 2) return (bw_vf){widen_codes(_mm256_extracti128_si256(a, 1)), widen_codes(_mm256_extracti128_si256(b, 1))};
    return (bw_vf){widen_codes(_mm256_castsi256_si128(a)), widen_codes(_mm256_castsi256_si128(b))};
}
/* Codes of 2, 3 and 4 bits fit bytes whose products with bytes, summed in fours, never saturate 16 bits. Each 16
 * columns are an eighth of two registers, in the order that shifts leave them in: 4 bits: columns 0 2 4 .. 14, 1 3 5 ..
 * 15;  3 bits: as they are;  2 bits: 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15 */
#define BW_NARROW
static int token_order(int bits) {
    return bits >= 2 && bits <= 4 ? bits : 0;
}
static inline __m128i narrow_order(int order) {
    if (order == 4) return _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    if (order == 2) return _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
static inline bw_codes bw_take_narrow(const bw_span *span, int bits) {
    bw_codes codes;
    for (int h = 0; h < 2; h++) {
        if (bits == 4) {
            __m256i twice = _mm256_permute4x64_epi64(_mm256_castsi128_si256(load_half(span->p, h)), 0x50);
            __m256i moved = _mm256_srlv_epi64(twice, _mm256_set_epi64x(4, 0, 4, 0));
            codes.v[h] = _mm256_and_si256(moved, _mm256_set1_epi8(15));
        } else if (bits == 2) {
            const __m256i pick = _mm256_add_epi8(_mm256_set_epi32(0x07060504, 0x07060504, 0x07060504, 0x07060504,
                                                                  0x03020100, 0x03020100, 0x03020100, 0x03020100),
                                                 _mm256_set1_epi8((char)(8 * h)));
            __m256i four_times = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(span->p, 0)), pick);
            __m256i moved = _mm256_srlv_epi32(four_times, _mm256_set_epi32(6, 4, 2, 0, 6, 4, 2, 0));
            codes.v[h] = _mm256_and_si256(moved, _mm256_set1_epi8(3));
        } else { /* pairs of codes, 6 bits in two bytes, moved to the end of 16 bits; then one to each byte */
            const __m256i pick = _mm256_set_epi8(12, 11, 11, 10, 10, 9, 10, 9, 9, 8, 8, 7, 7, 6, 7, 6, /* from bit 48 */
                                                 6, 5, 5, 4, 4, 3, 4, 3, 3, 2, 2, 1, 1, 0, 1, 0);
            const __m256i lift = _mm256_set1_epi64x(0x0100004000100400);
            __m256i bytes = _mm256_broadcastsi128_si256(load_half(span->p + 12 * h, 0));
            __m256i pairs = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, pick), lift), 10);
            codes.v[h] =
                _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 5)), _mm256_set1_epi16(0x0707));
        }
    }
    return codes;
}
/* Sums of pairs of products of 64 codes with the bytes of one digit. */
static inline __m256i narrow_pairs(bw_codes codes, int h, const char *record) {
    return _mm256_maddubs_epi16(codes.v[h], _mm256_loadu_si256((const __m256i *)record + h));
}
/* Sums of four products a lane: codes times whole numbers. */
static inline bw_vf bw_dot_narrow(bw_codes codes, const char *record, int digits) {
    __m256i sums[2];
    for (int h = 0; h < 2; h++) {
        sums[h] = _mm256_madd_epi16(narrow_pairs(codes, h, record), _mm256_set1_epi16(digits == 2 ? 256 : 1));
        if (digits == 2)
            sums[h] =
                _mm256_add_epi32(sums[h], _mm256_madd_epi16(narrow_pairs(codes, h, record + 64), _mm256_set1_epi16(1)));
    }
    return (bw_vf){_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])};
}
/* sum + scale times the products of a whole unit, in any of the lanes. */
static inline bw_vf bw_add_narrow(bw_vf sum, bw_codes codes, const char *record, int digits, float scale) {
    __m256i upper = _mm256_add_epi16(narrow_pairs(codes, 0, record), narrow_pairs(codes, 1, record));
    __m256i whole = _mm256_madd_epi16(upper, _mm256_set1_epi16(digits == 2 ? 256 : 1));
    if (digits == 2) {
        __m256i lower = _mm256_add_epi16(narrow_pairs(codes, 0, record + 64), narrow_pairs(codes, 1, record + 64));
        whole = _mm256_add_epi32(whole, _mm256_madd_epi16(lower, _mm256_set1_epi16(1)));
    }
    return (bw_vf){_mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(scale), sum.a), sum.b};
}

/* Whole numbers that meet narrow codes: their upper bytes, in the codes' order, and then the lower ones, all signed. */
static inline void store_bytes(char *record, const bw_vf *whole, int digits, int order) {
    for (int k = 0; k < 4; k++) {
        __m256i a = _mm256_cvtps_epi32(whole[k].a), b = _mm256_cvtps_epi32(whole[k].b);
        __m256i n = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        __m256i upper = _mm256_srai_epi16(_mm256_add_epi16(n, _mm256_set1_epi16(128)), 8);
        __m256i lower = _mm256_srai_epi16(_mm256_slli_epi16(n, 8), 8);
        __m256i bytes = _mm256_packs_epi16(digits == 2 ? upper : n, lower);
        bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
        __m128i pick = narrow_order(order);
        _mm_storeu_si128((__m128i *)record + k, _mm_shuffle_epi8(_mm256_castsi256_si128(bytes), pick));
        _mm_storeu_si128((__m128i *)record + 4 + k, _mm_shuffle_epi8(_mm256_extracti128_si256(bytes, 1), pick));
    }
}
/* For narrow codes bytes; else 64 whole numbers of 16 bits, in the order of the codes. */
static inline void bw_store_digits(void *record, const bw_vf *whole, int digits, int order) {
    if (order) {
        store_bytes(record, whole, digits, order);
        return;
    }
    for (int h = 0; h < 2; h++) {
        bw_vf x = whole[2 * h], y = whole[2 * h + 1];
        __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(y.a));
        __m256i second = _mm256_packs_epi32(_mm256_cvtps_epi32(x.b), _mm256_cvtps_epi32(y.b));
        _mm256_storeu_si256((__m256i *)record + 2 * h, _mm256_permute4x64_epi64(first, 0xd8));
        _mm256_storeu_si256((__m256i *)record + 2 * h + 1, _mm256_permute4x64_epi64(second, 0xd8));
    }
}
/* Sums of four products a lane: codes times whole numbers. */
static inline bw_vf bw_dot(bw_codes codes, const char *record, int digits) {
    (void)digits;
    __m256i sums[4];
    for (int i = 0; i < 4; i++)
        sums[i] = _mm256_madd_epi16(codes.v[i], _mm256_loadu_si256((const __m256i *)record + i));
    return (bw_vf){_mm256_cvtepi32_ps(_mm256_add_epi32(sums[0], sums[1])),
                   _mm256_cvtepi32_ps(_mm256_add_epi32(sums[2], sums[3]))};
}

/* 32 whole numbers of 16 bits, for the search of trellis paths: signed for values, unsigned for costs. */
typedef struct {
    __m256i a, b;
} bw_w16;

static inline bw_w16 bw_load16(const void *p) {
    return (bw_w16){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
static inline void bw_store16(void *p, bw_w16 x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
static inline bw_w16 bw_set16(int x) {
    return (bw_w16){_mm256_set1_epi16((short)x), _mm256_set1_epi16((short)x)};
}
#define EACH16(name, op)                                               \
    static inline bw_w16 name(bw_w16 x, bw_w16 y) {                    \
        return (bw_w16){_mm256_##op(x.a, y.a), _mm256_##op(x.b, y.b)}; \
    }
EACH16(bw_subs16, subs_epi16)  /* signed, saturating */
EACH16(bw_adds16, adds_epi16)  /* signed, saturating */
EACH16(bw_mul16, mulhrs_epi16) /* x y / 2^15, rounded; 2^15 (seen as unsigned) for both at -2^15 */
EACH16(bw_addu16, adds_epu16)  /* unsigned, saturating */
EACH16(bw_minu16, min_epu16)   /* unsigned */
EACH16(bw_sub16, sub_epi16)    /* modulo 2^16 */
#undef EACH16
/* Lane i = p[i >> rate]; up to 16 numbers are read. */
static inline bw_w16 bw_repeat16(const uint16_t *p, int rate) {
    if (rate == 5) return bw_set16(*p);
    if (rate == 4) return (bw_w16){_mm256_set1_epi16((short)p[0]), _mm256_set1_epi16((short)p[1])};
    const __m256i lanes = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m256i index = _mm256_mullo_epi16(_mm256_srli_epi16(lanes, rate), _mm256_set1_epi16(0x0202));
    index = _mm256_add_epi16(index, _mm256_set1_epi16(0x0100));
    return (bw_w16){_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(p, 0)), index),
                    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(p + (16 >> rate), 0)), index)};
}
static inline int bw_least16(bw_w16 x) {
    __m256i y = _mm256_min_epu16(x.a, x.b);
    __m128i z = _mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return _mm_cvtsi128_si32(_mm_minpos_epu16(z)) & 0xffff;
}

/* Rows, `stride` apart, of 16 columns of 16 numbers. */
static inline void bw_transpose16(const float *columns, float *rows, ptrdiff_t stride) {
    for (int block = 0; block < 4; block++) { /* of eight columns and rows */
        const float *from = columns + block / 2 * 128 + block % 2 * 8;
        float *to = rows + block % 2 * 8 * stride + block / 2 * 8;
        __m256 r[8], t[8];
        for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + 16 * i);
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                __m256d even = _mm256_castps_pd(t[i + j]), odd = _mm256_castps_pd(t[i + j + 2]);
                r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(even, odd));
                r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd));
            }
        for (int j = 0; j < 4; j++) { /* half q of r[4i + j] is row 4q + j, columns 4i .. 4i+3 */
            _mm256_storeu_ps(to + j * stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
            _mm256_storeu_ps(to + (4 + j) * stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
        }
    }
}

/* Sixteen states of a trellis at once, one a row of a column; a hash is four bytes a lane. */
typedef struct {
    __m256i a, b;
} bw_hash;
typedef struct {
    __m256i pick[2], shift[2], mask, multiplier, addend;
} bw_windows;

/* The window of row r ends rate * (15 - r) bits before the end of the column's bytes, which count from the top. */
static inline bw_windows bw_read_windows(int rate, int width) {
    bw_windows w = {.mask = _mm256_set1_epi32((1 << width) - 1),
                    .multiplier = _mm256_set1_epi32((int)bw_trellis_multiplier(width)),
                    .addend = _mm256_set1_epi32((int)bw_trellis_addend(width))};
    for (int h = 0; h < 2; h++) {
        uint8_t pick[32];
        int32_t shift[8];
        for (int r = 0; r < 8; r++) {
            int below = rate * (15 - r - 8 * h);
            shift[r] = below & 7;
            for (int b = 0; b < 4; b++) pick[4 * r + b] = (uint8_t)(15 - below / 8 - b);
        }
        w.pick[h] = _mm256_loadu_si256((const __m256i *)pick);
        w.shift[h] = _mm256_loadu_si256((const __m256i *)shift);
    }
    return w;
}
/* From the 16 bytes before `end`. */
static inline bw_hash bw_hash_column(const uint8_t *end, const bw_windows *w) {
    __m256i bytes = _mm256_broadcastsi128_si256(load_half(end - 16, 0));
    __m256i a = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, w->pick[0]), w->shift[0]);
    __m256i b = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, w->pick[1]), w->shift[1]);
    a = _mm256_mullo_epi32(_mm256_and_si256(a, w->mask), w->multiplier);
    b = _mm256_mullo_epi32(_mm256_and_si256(b, w->mask), w->multiplier);
    return (bw_hash){_mm256_add_epi32(a, w->addend), _mm256_add_epi32(b, w->addend)};
}
/* Sums in whole numbers of 32 bits. */
typedef struct {
    __m256i a, b;
} bw_w32;
enum { DIGIT_PLANES = 1 }; /* numbers of 16 bits are taken whole */

static inline bw_w32 bw_set32(int32_t x) {
    return (bw_w32){_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
static inline bw_vf bw_float32(bw_w32 x) {
    return (bw_vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
static inline bw_w32 bw_add32(bw_w32 x, bw_w32 y) {
    return (bw_w32){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
static inline bw_w32 bw_join32(bw_w32 high, bw_w32 low) {
    (void)low;
    return high;
}
/* A whole number as bw_dot_hash takes it; plane 0 is the upper digit where there are two. */
static inline int32_t bw_digit(int32_t n, int digits, int plane) {
    (void)digits, (void)plane;
    return (int32_t)((uint32_t)(n & 0xffff) * 0x10001u);
}
/* sum + (sum of the hash's bytes) * x */
static inline bw_w32 bw_dot_hash(bw_w32 sum, bw_hash hash, int32_t x) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i factor = _mm256_set1_epi32(x);
    return (bw_w32){_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(hash.a, ones), factor)),
                    _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(hash.b, ones), factor))};
}

#include "eights.h"
#include "../kernels/all.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int supported(void) {
    __builtin_cpu_init();
    unsigned a, b, c = 0, d; /* F16C by hand: clang's list of features has no name for it */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

const bw_isa bw_isa_avx2 = BW_TABLE("avx2", 10, supported);
